"""Training and test sets for classification, by name, with the published deterministic transforms."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from utils import UserError

from . import check_data_path
from .coco import load_coco, open_keypoints
from .cub import load_cub
from .imagenet import load_image_folder
from .patches import PatchDataset, resize_center_crop, resize_square
from .synthetic import load_synthetic_patches, load_synthetic_species

CLASSIFICATION_PARTS = ("cub", "coco", "keypoints", "synthetic")
CLASSIFICATION_IMAGES = ("imagenet", "folder", "synthetic-species")


def open_classification(name: str, data_path: Path | None, crop_scale: float = 0.5, image_size: int = 224,
                        keypoints: Sequence[str] | None = None, files: Sequence = (None, None, None), seed: int = 0,
                        num_images: int | None = None) -> tuple[PatchDataset, PatchDataset]:
    """(training set, test set), with Resize(256) and CenterCrop(224), but Resize(224) for the test set of
    CLASSIFICATION_PARTS; other image sizes in proportion. Test labels are indices into the training set's classes.

    keypoints, files: as of open_retrieval; two files, for training and test, or one, a fifth of whose images, drawn by
    the seed, is the test set. Raises UserError for a missing folder or another layout, an empty split, and a test class
    that is not in training.
    """
    check_data_path(name, data_path)
    test_transform = cropped = resize_center_crop(round(image_size * 256 / 224), image_size)
    options = {}
    if name in CLASSIFICATION_PARTS:
        options["crop_scale"], test_transform = crop_scale, resize_square(image_size)
        if keypoints is not None:
            options["parts" if name == "cub" else "keypoints"] = keypoints
    elif keypoints is not None:
        raise UserError(f"--keypoints chooses among part patches ({', '.join(CLASSIFICATION_PARTS)}), not for {name}")
    if name == "keypoints":
        found = open_keypoints(files, 2, transform=cropped, **options)
        if len(found) == 1:
            tested = hold_out(found[0], seed, one_in=5)
            found = images_with(found[0], ~tested), images_with(found[0], tested)
        train, test = found
        test.transform = test_transform
    else:
        folder = partial(load_image_folder, data_path)
        load, test_split = {
            "cub": (partial(load_cub, data_path), "test"), "coco": (partial(load_coco, data_path), "val"),
            "synthetic": (load_synthetic_patches, "test"), "synthetic-species": (load_synthetic_species, "test"),
            "imagenet": (folder, "val"), "folder": (folder, "val")}[name]
        if name == "folder" and not (data_path / "val").is_dir():
            test_split = "test"
            if not (data_path / "test").is_dir():
                raise UserError(f"{data_path} has no folder val or test; --data-path must be a folder with "
                                "train/CLASS/*.JPEG and val/CLASS/*.JPEG or test/CLASS/*.JPEG")
        train = load("train", transform=cropped, **options)
        test = load(test_split, transform=test_transform, **options)
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


def hold_out(dataset: PatchDataset, seed: int, one_in: int = 10) -> torch.Tensor:
    """bool [num_patches]: the patches of a tenth of the images (of one in `one_in`), chosen at random. Raises UserError
    where a class would have no patch left to train on."""
    count = max(1, len(dataset.images) // one_in)
    images = torch.randperm(len(dataset.images), generator=torch.Generator().manual_seed(seed))[:count]
    held_out = torch.isin(dataset.image_index, images)
    if lost := sorted({*dataset.labels.unique().tolist()} - {*dataset.labels[~held_out].unique().tolist()}):
        raise UserError(f"the images held out by --seed {seed} are all that {len(lost)} classes have to train on, the "
                        f"first {dataset.classes[lost[0]]}; use another --seed or more images, or hold none out")
    return held_out


def images_with(dataset: PatchDataset, chosen: torch.Tensor) -> PatchDataset:
    """The images of the chosen patches (bool [num_patches]), as a data set of their own."""
    images = [dataset.images[index] for index in dataset.image_index[chosen].unique()]
    return PatchDataset(images, dataset.classes, dataset.transform, dataset.load)
