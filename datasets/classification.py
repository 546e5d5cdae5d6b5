"""Training and test sets for classification, by name, with the published deterministic transforms."""

from functools import partial
from pathlib import Path

import torch

from utils import UserError

from . import check_data_path
from .coco import load_coco
from .cub import load_cub
from .imagenet import load_image_folder
from .patches import PatchDataset, resize_center_crop, resize_square
from .synthetic import load_synthetic_patches, load_synthetic_species

CLASSIFICATION_PARTS = ("cub", "coco", "synthetic")
CLASSIFICATION_IMAGES = ("imagenet", "folder", "synthetic-species")


def open_classification(name: str, data_path: Path | None, crop_scale: float = 0.5,
                        skip_bad_images: bool = False, image_size: int = 224) -> tuple[PatchDataset, PatchDataset]:
    """(training set, test set), with Resize(256) and CenterCrop(224), but Resize(224) for the test set of
    CLASSIFICATION_PARTS; other image sizes in proportion. Test labels are indices into the training set's classes.

    Raises UserError for a missing folder or another layout, an empty split, and a test class that is not in training.
    """
    check_data_path(name, data_path)
    cropped = resize_center_crop(round(image_size * 256 / 224), image_size)
    folder = partial(load_image_folder, data_path)
    load, *test_splits = {
        "cub": (partial(load_cub, data_path), "test"), "coco": (partial(load_coco, data_path), "val"),
        "synthetic": (load_synthetic_patches, "test"), "synthetic-species": (load_synthetic_species, "test"),
        "imagenet": (folder, "val"), "folder": (folder, "val", "test")}[name]
    test_split, test_transform = test_splits[0], cropped
    if name in CLASSIFICATION_PARTS:
        load, test_transform = partial(load, crop_scale=crop_scale), resize_square(image_size)
    elif load is folder:
        test_split = next((split for split in test_splits if (data_path / split).is_dir()), None)
        if test_split is None:
            raise UserError(f"{data_path} has no folder {' or '.join(test_splits)}; --data-path must be a folder with "
                            f"train/CLASS/*.JPEG and {' or '.join(f'{split}/CLASS/*.JPEG' for split in test_splits)}")
    train, test = (load(split, transform=transform, skip_bad_images=skip_bad_images)
                   for split, transform in (("train", cropped), (test_split, test_transform)))
    check_classes(train, test)
    return train, test


def check_classes(train: PatchDataset, test: PatchDataset) -> None:
    """Turns the test labels into indices of the training set's classes; errors as of open_classification."""
    for dataset, split in ((train, "training"), (test, "test")):
        if dataset.num_patches == 0:
            raise UserError(f"the {split} set is empty; check its folder and --crop-scale")
    trained = {train.classes[label] for label in train.labels.unique()}
    for name in (test.classes[label] for label in test.labels.unique()):
        if name not in trained:
            raise UserError(f"class {name} is in the test set and has no training patch; add some, or remove it from "
                            "the test set")
    if train.classes != test.classes:
        index = torch.tensor([train.classes.index(name) if name in trained else -1 for name in test.classes])
        test.labels, test.classes = index[test.labels], train.classes


def hold_out(dataset: PatchDataset, seed: int) -> torch.Tensor:
    """bool [num_patches]: the patches of a tenth of the images, chosen at random."""
    count = max(1, len(dataset.images) // 10)
    images = torch.randperm(len(dataset.images), generator=torch.Generator().manual_seed(seed))[:count]
    return torch.isin(dataset.image_index, images)


def held_out_images(dataset: PatchDataset, held_out: torch.Tensor) -> PatchDataset:
    """The images whose patches are held out, as a data set of their own."""
    images = [dataset.images[index] for index in dataset.image_index[held_out].unique()]
    return PatchDataset(images, dataset.classes, dataset.transform, dataset.load, dataset.skip_bad_images)
