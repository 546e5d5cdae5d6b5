"""Data sets, one file each, and what they share: patches and their transforms, segmentation splits and their pixels."""
