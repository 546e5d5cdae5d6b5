"""Label maps from the original releases of the segmentation data sets: python -m datasets.prepare."""
