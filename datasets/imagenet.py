"""Whole images of ImageNet-like folders."""

import os
from functools import partial
from pathlib import Path

from utils import UserError

from .files import read_rgb
from .patches import PatchDataset, PatchImage, Transform

# What torchvision's ImageFolder takes.
IMG_EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


def load_image_folder(root: str | Path, split: str, transform: Transform, upright: bool = False) -> PatchDataset:
    """The whole images root/split/CLASS/**/IMAGE, one patch each, in the order of torchvision's ImageFolder. The
    classes are the folders of this split: labels of two splits agree only if their .classes are equal. upright: EXIF
    orientations are obeyed. Raises UserError for another layout."""
    folder = Path(root, split)
    entries = [entry for entry in os.scandir(folder) if is_shown(entry.name)] if folder.is_dir() else []
    classes = sorted(entry.name for entry in entries if entry.is_dir())
    if not classes:
        raise UserError(f"{folder} has no class folders; --data-path must be a folder with {split}/CLASS/*.JPEG")
    images, others = [], [entry.path for entry in entries if entry.is_file()]
    for label, name in enumerate(classes):
        paths, unread = image_files(folder / name)
        if not paths:
            raise UserError(f"{folder / name} holds no image; fill or remove it")
        labels = [label]  # one list per class, shared by its images
        images += [PatchImage(path, None, labels) for path in paths]
        others += unread
    return PatchDataset(images, classes, transform, partial(read_rgb, upright=upright),
                        notes_of(others, "another suffix, or beside the class folders"))


def is_shown(name: str) -> bool:
    """Not one of the files and folders that systems and editors leave behind."""
    return not name.startswith(".") and name != "__MACOSX"


def image_files(folder: str | Path) -> tuple[list[str], list[str]]:
    """The paths of the image files below a folder, folder by folder in the order of torchvision's ImageFolder, links
    followed, and those of the other files. Names that begin with a dot are left out."""
    images, others = [], []
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders[:] = filter(is_shown, folders)
        for name in filter(is_shown, names):
            found = images if name.lower().endswith(IMG_EXTENSIONS) else others
            found.append((parent, name))
    return [os.path.join(*path) for path in sorted(images)], [os.path.join(*path) for path in others]


def notes_of(others: list[str], reason: str) -> list[str]:
    """What the log says of files that were not read."""
    return [f"{len(others)} files were not read ({reason}), the first {min(others)}"] if others else []
