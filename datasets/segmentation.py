"""The segmentation data sets by name: protocol, class names, folders, images with their label maps."""

import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from functools import cache
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from utils import UserError
from utils.results import digest

from .files import read_rgb
from .label_maps import label_map_size, pair_files, read_label_map, reduce_label
from .patches import draw_numbers
from .segmentation_classes import class_names
from .segmentation_transforms import IGNORE
from .synthetic import NUM_IMAGES, OBJECT_NAMES, PART_NAMES, draw_figure, image_seeds


class Protocol(NamedTuple):
    """Paper, appendix A.4, and the authors' configurations. Scales are (long side, short side) limits."""
    base_scale: tuple[int, int]
    crop_size: int
    test_scale: tuple[int, int]
    stride: int


_ADE20K = Protocol((2048, 512), 512, (2048, 512), 341)
_PASCAL = Protocol((520, 520), 480, (3840, 480), 161)
PAPER_PROTOCOLS = {
    "ade20k": _ADE20K, "ade20k-object": _ADE20K, "ade20k-part": _ADE20K,
    "pascal-object": _PASCAL, "pascal-part": _PASCAL, "lip": Protocol((1024, 320), 320, (4096, 320), 161),
}
# None is published for linear heads on PartImageNet: these are ADE20K's values, with val as the test split.
PROTOCOLS = PAPER_PROTOCOLS | dict.fromkeys(("partimagenet-object", "partimagenet-part", "folder"), _ADE20K)
PROTOCOLS |= dict.fromkeys(("synthetic", "synthetic-object", "synthetic-part"),
                           Protocol((1024, 256), 256, (1024, 256), 171))

# Folders below --data-path; the first that holds images and label maps is used, the last choice is --data-path itself.
ROOTS = {
    "ade20k": ("ADEChallengeData2016",),
    "ade20k-object": ("ade_59object/ADEChallengeData2016", "ADEChallengeData2016"),
    "ade20k-part": ("ADE20K_Part",), "pascal-object": ("pascal_semantic",), "pascal-part": ("pascal_part",),
    "lip": ("LIP",), "partimagenet-object": ("PartImageNet_Seg",), "partimagenet-part": ("PartImageNet_Seg",),
    "folder": (),
}
# Images, label maps. {0} is train or val, {1} training or validation. LIP has its own folders, those its archives
# unpack to, and mmsegmentation's.
LAYOUTS = (("img/{0}", "ann/{0}"), ("images/{1}", "annotations/{1}"))
OTHER_LAYOUTS = {
    "lip": (*LAYOUTS, ("TrainVal_images/{0}_images", "TrainVal_parsing_annotations/{0}_segmentations"),
            ("TrainVal_images/TrainVal_images/{0}_images",
             "TrainVal_parsing_annotations/TrainVal_parsing_annotations/{0}_segmentations"),
            ("{0}_images", "{0}_segmentations")),
    "partimagenet-object": (("images/{0}", "annotations/{0}_whole"),),
    "partimagenet-part": (("images/{0}", "annotations/{0}"),),
    "folder": (("images/{0}", "labels/{0}"),),
}
LONG_NAMES = {"train": "training", "val": "validation"}


def fit_windows(crop_size: int | None, stride: int | None, protocol: Protocol, patch: int) -> tuple[int, int]:
    """Crop size and stride: those given, else the data set's, or where the patch does not divide its crop the nearest
    multiples of the patch. Raises UserError for a given crop size that is none."""
    def nearest(size: int) -> int:
        return max(1, round(size / patch)) * patch

    if crop_size and crop_size % patch:
        raise UserError(f"--crop-size {crop_size} is not divisible by the patch size {patch}; "
                        f"use --crop-size {nearest(crop_size)}")
    usual_stride = protocol.stride if protocol.crop_size % patch == 0 else nearest(protocol.stride)
    return crop_size or nearest(protocol.crop_size), stride or usual_stride


def open_segmentation(name: str, data_path: Path | None, split: str, num_images: int | None = None,
                      seed: int = 0) -> "Split":
    """The split "train" or "val" of one of PROTOCOLS. num_images: that many, drawn by the seed, in the order of their
    names. Raises UserError where folders or files are missing or do not pair."""
    if name.startswith("synthetic"):
        opened = SyntheticSplit("object" if name == "synthetic-object" else "part", split)
    else:
        opened = FolderSplit(*find_folders(name, data_path, split), name)
    if num_images and num_images < len(opened):
        opened = opened.subset(draw_numbers(len(opened), num_images, seed))
        opened.sampled = True
    return opened


def default_iterations(num_images: int, batch_size: int = 16) -> int:
    """Iterations of training on label maps of one's own: as many passes over the images as the paper makes over
    ADE20K's 20,210 (127), within 2,000 and the published 160,000 iterations."""
    return max(2_000, min(160_000, round(127 * num_images / batch_size)))


def find_folders(dataset: str, data_path: Path, split: str) -> tuple[Path, Path, Path]:
    """The root, the image folder and the label folder of a split. Raises UserError where no known layout is there."""
    known = OTHER_LAYOUTS.get(dataset, LAYOUTS)
    layouts = [tuple(folder.format(split, LONG_NAMES[split]) for folder in pair) for pair in known]
    for root in (data_path / name for name in (*ROOTS[dataset], "")):
        for images, labels in layouts:
            if (root / images).is_dir() and (root / labels).is_dir():
                return root, root / images, root / labels
    others = f", there or in {' or '.join(ROOTS[dataset])}; see python -m datasets.prepare" if ROOTS[dataset] else ""
    raise UserError(f"{data_path} does not hold the images and label maps of --dataset {dataset}: expected "
                    f"{' or '.join(map(' and '.join, layouts))}{others}")


class Split:
    """Images with label maps. names: of the classes; items: what each image is made of; background: the ignored label
    of the maps, 0 ("other"), of PartImageNet the last, 255 where label 0 is a class; sampled: whether the images were
    drawn; notes: lines for the log about what was read."""

    def __init__(self, names: Sequence[str], items: Sequence, background: int = 0, notes: Sequence[str] = ()):
        self.names, self.items, self.background = names, items, background
        self.num_classes, self.sampled, self.notes = len(names), False, notes

    def __len__(self) -> int:
        return len(self.items)

    def subset(self, indices: Sequence[int]) -> "Split":
        """Some images of this split as a split of their own."""
        chosen = copy(self)
        chosen.items = [self.items[index] for index in indices]
        return chosen

    def identity(self, what: str) -> dict:
        """What tells this split from another, by its name in words. what: this split in these words."""
        return {f"the number of images of the {what}": len(self),
                f"the list of classes of the {what}": list(self.names),
                f"the ignored label of the {what}": self.background,
                f"the names of the images of the {what}": digest([self.name(index) for index in range(len(self))])}


class FolderSplit(Split):
    """A split in two folders: images and label maps of the same names."""

    def __init__(self, root: Path, images: Path, labels: Path, dataset: str):
        names, background = class_names(dataset, root), 0
        pairs, notes = pair_files(images, labels)
        self.largest_label = len(names)
        if dataset.startswith("partimagenet"):
            background = len(names)
            notes.append("all images of PartImageNet are ImageNet training images: an encoder trained on ImageNet has "
                         "seen those of the test split too")
        elif dataset == "folder" and (zero := re.match(r"0[\s:]+(?=\S)", names[0])):  # label 0 is a class too
            names = (names[0][zero.end():], *names[1:])
            background, self.largest_label = IGNORE, len(names) - 1
        super().__init__(names, pairs, background, notes)

    def name(self, index: int) -> str:
        return self.items[index][0].stem

    def files(self) -> list[Path]:
        return [image for image, _ in self.items]

    def sizes(self, workers: int) -> list[tuple[int, int]]:
        """(height, width) of all label maps, from the headers. Raises UserError for an image of another size."""
        return list(in_order(label_map_size, self.items, workers))

    def count_labels(self, workers: int) -> np.ndarray:
        """The pixels of each number from 0 to 255 in all label maps, as their files hold it, int64 [256]."""
        def count(pair: tuple[Path, Path]) -> np.ndarray:
            return np.bincount(read_label_map(pair[1], self.largest_label).ravel(), minlength=256)
        return sum(in_order(count, self.items, workers))

    def load(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """(uint8 [H, W, 3], uint8 [H, W]): the image and its label map by reduce_label (appendix A.4). The image is
        upright, as OpenCV reads it, unless it has the size of its label map only as stored. Raises UserError."""
        image_path, label_path = self.items[index]
        label = reduce_label(read_label_map(label_path, self.largest_label), self.background)
        height, width = label.shape
        return np.array(read_rgb(image_path, (width, height), upright=True)), label


class SyntheticSplit(Split):
    """Images drawn by code, with part or object masks. Each is drawn once."""

    def __init__(self, kind: str, split: str):
        super().__init__(PART_NAMES if kind == "part" else OBJECT_NAMES, range(NUM_IMAGES[split]))
        self.kind, self.split = kind, split

    def name(self, index: int) -> str:
        return f"{self.split}_{self.items[index]:05}"

    def files(self) -> list[Path]:
        return []

    def sizes(self, workers: int) -> list[tuple[int, int]]:
        return [self.load(index)[1].shape for index in range(len(self))]

    def load(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        return draw_synthetic(self.kind, self.split, self.items[index])


@cache
def draw_synthetic(kind: str, split: str, number: int) -> tuple[np.ndarray, np.ndarray]:
    picture = draw_figure(image_seeds(split)[number])
    return np.array(picture.image), reduce_label(picture.part_mask if kind == "part" else picture.object_mask)


def hold_out(split: Split, seed: int) -> tuple[Split, Split]:
    """(the split without a tenth of its images, that tenth), drawn by the seed. Raises UserError for a single image."""
    if len(split) < 2:
        raise UserError("--select held-out needs two training images at least")
    held = draw_numbers(len(split), max(1, len(split) // 10), seed)
    return split.subset(sorted({*range(len(split))} - {*held})), split.subset(held)


def in_order(function: Callable, items: Iterable, workers: int) -> Iterator:
    """map(function, items) by that many threads, one at least, and at most two items ahead per thread, in order."""
    threads, items = max(1, workers), iter(items)
    with ThreadPoolExecutor(threads) as pool:
        pending = deque(pool.submit(function, item) for item in islice(items, 2 * threads))
        while pending:
            pending.extend(pool.submit(function, item) for item in islice(items, 1))
            yield pending.popleft().result()
