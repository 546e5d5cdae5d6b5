"""Whole images of ImageNet-like folders, and the grid of patches of the paper's picture sheets."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from utils import UserError

from .files import read_rgb
from .patches import PatchDataset, PatchImage, Transform

# What torchvision's ImageFolder takes.
IMG_EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
# Boxes (left, upper, right, lower) of the grid in the 224 x 224 image, row by row: 56 x 56, stride 28.
GRID_BOXES = tuple((x, y, x + 56, y + 56) for y in range(0, 169, 28) for x in range(0, 169, 28))


def load_image_folder(root: str | Path, split: str, transform: Transform) -> PatchDataset:
    """The whole images root/split/CLASS/**/IMAGE, one patch each, in the order of torchvision's ImageFolder. The
    classes are the folders of this split: labels of two splits agree only if their .classes are equal. Raises UserError
    for another layout."""
    folder = Path(root, split)
    classes = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir()) if folder.is_dir() else []
    if not classes:
        raise UserError(f"{folder} has no class folders; --data-path must be a folder with {split}/CLASS/*.JPEG")
    images, empty, seen = [], [], {os.path.realpath(folder)}
    for label, name in enumerate(classes):
        paths = image_files(folder / name, seen)
        if not paths:
            empty.append(name)
        labels = [label]  # one list per class, shared by its images
        images += [PatchImage(path, None, labels) for path in paths]
    if empty:
        raise UserError(f"{folder / empty[0]} holds no image ({len(empty)} of {len(classes)} class folders "
                        "are empty, or links to others); fill or remove them")
    return PatchDataset(images, classes, transform)


def image_files(folder: str | Path, seen: set[str]) -> list[str]:
    """The paths of the image files below a folder, folder by folder in the order of torchvision's ImageFolder. Links
    are followed, but no folder is entered twice: seen holds the real paths of those that were."""
    found = []
    for parent, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        found.append((parent, sorted(name for name in names if name.lower().endswith(IMG_EXTENSIONS))))
    return [os.path.join(parent, name) for parent, names in sorted(found) for name in names]


def list_images(folder: str | Path, num_images: int | None = None, seed: int = 0) -> list[str]:
    """The sorted paths of the image files below a folder, at any depth; with num_images, a sample drawn by the seed."""
    paths = sorted(image_files(folder, set()))
    chosen = torch.randperm(len(paths), generator=torch.Generator().manual_seed(seed))[:num_images]
    return [paths[index] for index in sorted(chosen.tolist())]


def central(image: Image.Image, scale: int = 1) -> Image.Image:
    """The 224 x 224 image that GRID_BOXES divides: short side 256, bicubic, central crop; both times scale."""
    from torchvision import transforms
    return transforms.CenterCrop(224 * scale)(transforms.Resize(256 * scale, Image.BICUBIC)(image))


def grid_patches(image: Image.Image, size: int = 224) -> torch.Tensor:
    """The 49 patches of the paper's sheets (appendix A.5): the central image enlarged to 4 x size (bicubic, by Pillow),
    in windows of size with stride size / 2.

    image: PIL, RGB. size: even. Returns uint8 [49, 3, size, size], in the order of GRID_BOXES.
    """
    image = central(image).resize((4 * size, 4 * size), Image.BICUBIC)
    windows = torch.from_numpy(np.array(image)).unfold(0, size, size // 2).unfold(1, size, size // 2)
    return windows.reshape(49, 3, size, size)


def shown_patch(path: str, position: int) -> Image.Image:
    """A grid patch at twice the grid's resolution, 112 x 112."""
    return central(read_rgb(path), 2).crop([2 * side for side in GRID_BOXES[position]])


def query_image(path: str, position: int) -> Image.Image:
    """The query's image, with a red box around its patch, and beside it the patch, enlarged to the same height."""
    image, patch = central(read_rgb(path)), shown_patch(path, position)
    left, upper, right, lower = GRID_BOXES[position]
    ImageDraw.Draw(image).rectangle((left, upper, right - 1, lower - 1), outline=(255, 0, 0), width=3)
    both = Image.new("RGB", (452, 224), "white")
    both.paste(image, (0, 0))
    both.paste(patch.resize((224, 224), Image.Resampling.BICUBIC), (228, 0))
    return both


def overlap(patch: int, query: int) -> bool:
    """Whether two grid patches, numbered image by image, share pixels."""
    (x, y, *_), (query_x, query_y, *_) = (GRID_BOXES[number % len(GRID_BOXES)] for number in (patch, query))
    return patch // len(GRID_BOXES) == query // len(GRID_BOXES) and abs(x - query_x) < 56 and abs(y - query_y) < 56


class GridDataset(PatchDataset):
    """Images cut into their grid patches; the boxes are GRID_BOXES, in the 224 x 224 image, not in the original."""

    def __init__(self, paths: Sequence[str], image_size: int):
        labels = [0] * len(GRID_BOXES)
        super().__init__([PatchImage(path, GRID_BOXES, labels) for path in paths], ["patch"])
        self.image_size = image_size

    def cut(self, image: Image.Image, boxes: Sequence[tuple] | None) -> torch.Tensor:
        return grid_patches(image, self.image_size)


def load_grid(root: str | Path, num_images: int | None = None,
              seed: int = 0, image_size: int = 224) -> GridDataset:
    """The grid patches of the images that list_images gives, all of one class. Raises UserError where there is none."""
    paths = list_images(root, num_images, seed)
    if not paths:
        raise UserError(f"no image ({', '.join(IMG_EXTENSIONS)}) below {root}; --data-path must be a folder of images")
    return GridDataset(paths, image_size)
