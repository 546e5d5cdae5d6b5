"""Training and test sets for classification, by name, with the published deterministic transforms."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from utils import UserError

from .coco import load_coco, open_keypoints
from .cub import load_cub
from .imagenet import load_image_folder
from .patches import PatchDataset, draw_numbers, resize_center_crop
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
    options = {"transform": resize_center_crop(image_size)}
    if name in CLASSIFICATION_PARTS:
        options |= {"keypoints": keypoints, "crop_scale": crop_scale}
    elif keypoints is not None:
        raise UserError(f"--keypoints chooses among part patches ({', '.join(CLASSIFICATION_PARTS)}), not for {name}")
    if name == "keypoints":
        sets = open_keypoints(files, 2, **options)
        if len(sets) == 1:
            tested = hold_out(sets[0], seed, one_in=5)
            sets = [sets[0].subset(sets[0].image_index[chosen].unique().tolist()) for chosen in (~tested, tested)]
            sets[1].num_outside, sets[1].notes = 0, []  # the file's, once
    elif name.startswith("synthetic"):
        load = load_synthetic_patches if name == "synthetic" else load_synthetic_species
        sets = [load(split, num_images, **options) for split in ("train", "test")]
    else:
        load = {"cub": load_cub, "coco": load_coco, "imagenet": load_image_folder,
                "folder": partial(load_image_folder, upright=True)}[name]
        has_val = name in ("coco", "imagenet") or name == "folder" and (data_path / "val").is_dir()
        sets = [load(data_path, split, **options) for split in ("train", "val" if has_val else "test")]
    train, test = sets
    if name in CLASSIFICATION_PARTS:
        test.transform = resize_center_crop(image_size, short_side=image_size)
    if num_images:
        train = train.subset(draw_numbers(len(train), num_images, seed))
    trained = {train.classes[label] for label in train.labels.unique()}
    if num_images:
        known = [number for number, image in enumerate(test.images)
                 if trained.issuperset(test.classes[label] for label in image.labels)]
        test = test.subset([known[number] for number in draw_numbers(len(known), num_images, seed)])
    if test.num_patches == 0:
        raise UserError("the test set is empty; check its folder, --crop-scale and --num-images")
    if unknown := [name for name in (test.classes[label] for label in test.labels.unique()) if name not in trained]:
        raise UserError(f"class {unknown[0]} is in the test set and has no training patch; add some, or remove it from "
                        "the test set")
    if train.classes != test.classes:
        index = torch.tensor([train.classes.index(name) if name in trained else -1 for name in test.classes])
        test.labels, test.classes = index[test.labels], train.classes
    return train, test


def hold_out(dataset: PatchDataset, seed: int, one_in: int = 10) -> torch.Tensor:
    """bool [num_patches]: the patches of a tenth of the images (of one in `one_in`), chosen at random. Raises UserError
    where a class would have no patch left to train on."""
    images = draw_numbers(len(dataset), max(1, len(dataset) // one_in), seed)
    held_out = torch.isin(dataset.image_index, torch.tensor(images))
    if lost := sorted({*dataset.labels.unique().tolist()} - {*dataset.labels[~held_out].unique().tolist()}):
        raise UserError(f"the images held out by --seed {seed} are all that {len(lost)} classes have to train on, the "
                        f"first {dataset.classes[lost[0]]}; use another --seed or more images, or hold none out")
    return held_out
