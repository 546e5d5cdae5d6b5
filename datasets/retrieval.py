"""Patches for part retrieval, by the name of the data set."""

from collections.abc import Sequence
from pathlib import Path

from .coco import load_coco, open_keypoints
from .cub import load_cub
from .files import read_rgb
from .patches import PatchDataset, PatchImage, draw_numbers, resize_center_crop
from .sheets import list_images, load_grid
from .synthetic import draw_image, image_seeds, load_synthetic_patches

RETRIEVAL_DATASETS = ("cub", "coco", "keypoints", "imagenet", "synthetic")


def open_retrieval(name: str, data_path: Path | None, keypoints: Sequence[str] | None, crop_scale: float,
                   num_images: int | None, seed: int, image_size: int = 224,
                   files: Sequence = (None, None, None)) -> PatchDataset:
    """The patches of one of RETRIEVAL_DATASETS: all of CUB, COCO's training set, the keypoints of one of the user's
    files, the grid of any images, or synthetic.

    keypoints: numbers or names, ["all"], or None for the paper's (of files: all). num_images: drawn by the seed from
    the images that have patches (default all; of synthetic, pictures that are drawn, default 30). files: as of
    open_keypoints. Raises UserError for an unknown keypoint, and files that are missing or wrong.
    """
    options = {"keypoints": keypoints, "crop_scale": crop_scale,
               "transform": resize_center_crop(image_size, short_side=image_size)}
    if name == "synthetic":
        return load_synthetic_patches("train", num_images or 30, seed, **options)
    if name == "imagenet":
        return load_grid(data_path, num_images, seed, image_size)
    if name == "keypoints":
        dataset = open_keypoints(files, 1, **options)[0]
    else:
        dataset = (load_cub if name == "cub" else load_coco)(data_path, **options)
    return dataset.subset(draw_numbers(len(dataset), num_images, seed)) if num_images else dataset


def open_images(name: str, data_path: Path | None, num_images: int, seed: int, image_size: int) -> PatchDataset:
    """Whole images, the central image_size x image_size at a short side of 256 / 224 of that: "imagenet", a sample of
    those below data_path drawn by the seed, or "synthetic", its test split. Raises UserError where there is none."""
    if name == "synthetic":
        paths, notes, load = image_seeds("test", num_images, seed), [], draw_image
    else:
        (paths, notes), load = list_images(data_path, num_images, seed), read_rgb
    images = [PatchImage(path, None, [0]) for path in paths]
    return PatchDataset(images, ["image"], resize_center_crop(image_size), load, notes)
