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
from .patches import PatchDataset, draw_numbers, resize_center_crop, resize_square, some_images
from .synthetic import load_synthetic_patches, load_synthetic_species

CLASSIFICATION_PARTS = ("cub", "coco", "keypoints", "synthetic")
CLASSIFICATION_IMAGES = ("imagenet", "folder", "synthetic-species")


def open_classification(name: str, data_path: Path | None, crop_scale: float = 0.5, image_size: int = 224,
                        keypoints: Sequence[str] | None = None, files: Sequence = (None, None, None), seed: int = 0,
                        num_images: int | None = None) -> tuple[PatchDataset, PatchDataset]:
    """(training set, test set), with Resize(256) and CenterCrop(224), but Resize(224) for the test set of
    CLASSIFICATION_PARTS; other image sizes in proportion. Test labels are indices into the training set's classes.

    keypoints, files: as of open_retrieval; two files, for training and test, or one, a fifth of whose images, drawn by
    the seed, is the test set. num_images: of training, and of test among those of the classes that are left. Raises
    UserError for another layout, an empty split, and a test class that is not in training.
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
        train, test = found if len(found) == 2 else split_images(found[0], seed)
        test.transform = test_transform
    else:
        load = {"cub": partial(load_cub, data_path), "coco": partial(load_coco, data_path),
                "synthetic": partial(load_synthetic_patches, num_images=num_images),
                "synthetic-species": partial(load_synthetic_species, num_images=num_images),
                "imagenet": partial(load_image_folder, data_path),
                "folder": partial(load_image_folder, data_path, upright=True)}[name]
        has_val = name in ("coco", "imagenet") or name == "folder" and (data_path / "val").is_dir()
        test_split = "val" if has_val else "test"
        train = load("train", transform=cropped, **options)
        test = load(test_split, transform=test_transform, **options)
    if num_images and not name.startswith("synthetic"):
        train = some_images(train, draw_numbers(len(train), num_images, seed))
        trained = {train.classes[label] for label in train.labels.unique()}
        known = [number for number, image in enumerate(test.images)
                 if trained.issuperset(test.classes[label] for label in image.labels)]
        test = some_images(test, [known[number] for number in draw_numbers(len(known), num_images, seed)])
    check_classes(train, test)
    return train, test


def check_classes(train: PatchDataset, test: PatchDataset) -> None:
    """Turns the test labels into indices of the training set's classes; errors as of open_classification."""
    for dataset, split in ((train, "training"), (test, "test")):
        if dataset.num_patches == 0:
            raise UserError(f"the {split} set is empty; check its folder, --crop-scale and --num-images")
    trained = {train.classes[label] for label in train.labels.unique()}
    for name in (test.classes[label] for label in test.labels.unique()):
        if name not in trained:
            raise UserError(f"class {name} is in the test set and has no training patch; add some, or remove it from "
                            "the test set")
    if train.classes != test.classes:
        index = torch.tensor([train.classes.index(name) if name in trained else -1 for name in test.classes])
        test.labels, test.classes = index[test.labels], train.classes


def split_images(dataset: PatchDataset, seed: int) -> tuple[PatchDataset, PatchDataset]:
    """(training set, test set) of one file of keypoints: a fifth of its images, drawn by the seed, are the test set."""
    tested = hold_out(dataset, seed, one_in=5)
    train, test = images_with(dataset, ~tested), images_with(dataset, tested)
    test.num_outside, test.notes = 0, []  # the file's, once
    return train, test


def hold_out(dataset: PatchDataset, seed: int, one_in: int = 10) -> torch.Tensor:
    """bool [num_patches]: the patches of a tenth of the images (of one in `one_in`), chosen at random. Raises UserError
    where a class would have no patch left to train on."""
    count = max(1, len(dataset.images) // one_in)
    images = torch.tensor(draw_numbers(len(dataset.images), count, seed))
    held_out = torch.isin(dataset.image_index, images)
    if lost := sorted({*dataset.labels.unique().tolist()} - {*dataset.labels[~held_out].unique().tolist()}):
        raise UserError(f"the images held out by --seed {seed} are all that {len(lost)} classes have to train on, the "
                        f"first {dataset.classes[lost[0]]}; use another --seed or more images, or hold none out")
    return held_out


def images_with(dataset: PatchDataset, chosen: torch.Tensor) -> PatchDataset:
    """The images of the chosen patches (bool [num_patches], or ids), as a data set of their own."""
    return some_images(dataset, dataset.image_index[chosen].unique().tolist())
