"""Training and test sets for classification, by name, with the published deterministic transforms."""

from pathlib import Path

import torch

from utils import UserError

from .coco import load_coco
from .cub import load_cub
from .imagenet import load_image_folder
from .patches import PatchDataset, resize_center_crop, resize_square
from .synthetic import load_synthetic_patches, load_synthetic_species


def load_classification(name: str, root: Path | None, crop_scale: float = 0.5,
                        skip_bad_images: bool = False) -> tuple[PatchDataset, PatchDataset]:
    """(training set, test set). Part patches (cub, coco, synthetic): Resize(256) and CenterCrop(224) for training,
    Resize(224) for test. Whole images (imagenet, folder, synthetic-species): Resize(256) and CenterCrop(224) for both.

    Labels of the test set count the training set's classes. Raises UserError for a missing or other layout, an empty
    split, and a class that is in the test set and not in the training set.
    """
    if root is None and not name.startswith("synthetic"):
        raise UserError(f"--dataset {name} needs --data-path DIR; --dataset synthetic needs no files")
    cropped = resize_center_crop()
    options = {"skip_bad_images": skip_bad_images}
    if name == "cub":
        train, test = (load_cub(root, split, crop_scale=crop_scale, transform=transform, **options)
                       for split, transform in (("train", cropped), ("test", resize_square())))
    elif name == "coco":
        train, test = (load_coco(root, split, crop_scale=crop_scale, transform=transform, **options)
                       for split, transform in (("train", cropped), ("val", resize_square())))
    elif name == "synthetic":
        train, test = (load_synthetic_patches(split, crop_scale=crop_scale, transform=transform, **options)
                       for split, transform in (("train", cropped), ("test", resize_square())))
    elif name == "synthetic-species":
        train, test = (load_synthetic_species(split, transform=cropped, **options) for split in ("train", "test"))
    else:
        names = ("val",) if name == "imagenet" else ("val", "test")
        split = next((one for one in names if (root / one).is_dir()), None)
        if split is None:
            raise UserError(f"{root} has no folder {' or '.join(names)}; --data-path must be a folder with "
                            f"train/CLASS/*.JPEG and {' or '.join(f'{one}/CLASS/*.JPEG' for one in names)}")
        train, test = (load_image_folder(root, one, cropped, **options) for one in ("train", split))
    check_classes(train, test)
    return train, test


def check_classes(train: PatchDataset, test: PatchDataset) -> None:
    """Makes the test set's labels count the training set's classes. Raises UserError where there is nothing to train
    on or to test, and for a class of the test set without training patches."""
    for dataset, split in ((train, "training"), (test, "test")):
        if dataset.num_patches == 0:
            raise UserError(f"the {split} set is empty; look at its folder, or at --crop-scale")
    trained = {train.classes[label] for label in train.labels.unique().tolist()}
    for label in test.labels.unique().tolist():
        if test.classes[label] not in trained:
            raise UserError(f"class {test.classes[label]} is in the test set and has no training patch; add some, or "
                            "remove it from the test set")
    if train.classes != test.classes:
        index = torch.tensor([train.classes.index(name) if name in trained else -1 for name in test.classes])
        test.labels, test.classes = index[test.labels], train.classes


def hold_out(dataset: PatchDataset, seed: int) -> torch.Tensor:
    """bool [num_patches]: the patches of a tenth of the images, chosen at random; no image is on both sides."""
    count = max(1, len(dataset.images) // 10)
    images = torch.randperm(len(dataset.images), generator=torch.Generator().manual_seed(seed))[:count]
    return torch.isin(dataset.image_index, images)


def held_out_images(dataset: PatchDataset, held_out: torch.Tensor) -> PatchDataset:
    """The images whose patches are held out, as a data set of its own."""
    images = dataset.image_index[held_out].unique().tolist()
    return PatchDataset([dataset.images[index] for index in images], dataset.classes, dataset.transform, dataset.load,
                        dataset.skip_bad_images)
