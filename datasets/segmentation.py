"""The segmentation data sets by name: protocol, class names, folders, label maps. segmentation_store.py caches them.

A split has names, num_classes, len(), name(i), subset(indices), sizes(workers) -> [(height, width)] and load(i) ->
(uint8 [H, W, 3], uint8 [H, W]): the image and its label map by reduce_label (appendix A.4); the ignored label is
"other", 0, of PartImageNet "background", the last, or none (255 only) of a folder whose names.txt begins with "0 NAME".
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from functools import cache
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from utils import UserError
from utils.provenance import digest, files_digest

from . import check_data_path
from .files import image_errors, load_rgb, open_image
from .segmentation_classes import class_names
from .segmentation_transforms import IGNORE
from .synthetic import NUM_IMAGES, OBJECT_NAMES, PART_NAMES, synthetic_segmentation


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
# None is published for linear heads on PartImageNet: these are ADE20K's values, with val as the test split. All its
# images are ImageNet training images: an encoder trained on ImageNet has seen those of the test split too.
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
PARTIMAGENET_NOTE = ("all images of PartImageNet are ImageNet training images: an encoder trained on ImageNet has seen "
                     "those of the test split too")
LONG_NAMES = {"train": "training", "val": "validation"}


def open_segmentation(name: str, data_path: Path | None, split: str, extra_label: bool = False,
                      ) -> "FolderSplit | SyntheticSplit":
    """The split "train" or "val" of one of PROTOCOLS. extra_label: accept a label one above the class count, as the
    authors' metrics do. Raises UserError where folders or files are missing or do not pair."""
    check_data_path(name, data_path)
    if name.startswith("synthetic"):
        return SyntheticSplit("object" if name == "synthetic-object" else "part", split)
    return FolderSplit(*find_folders(name, data_path, split), name, extra_label)


def find_folders(dataset: str, data_path: Path, split: str) -> tuple[Path, Path, Path]:
    """The root, the image folder and the label folder of a split. Raises UserError where no known layout is there."""
    if not data_path.is_dir():
        raise UserError(f"--data-path {data_path} is not a folder")
    known = OTHER_LAYOUTS.get(dataset, LAYOUTS)
    layouts = [tuple(folder.format(split, LONG_NAMES[split]) for folder in pair) for pair in known]
    for root in (data_path / name for name in (*ROOTS[dataset], "")):
        for images, labels in layouts:
            if (root / images).is_dir() and (root / labels).is_dir():
                return root, root / images, root / labels
    expected = f"expected {' or '.join(map(' and '.join, layouts))}"
    if dataset == "folder":
        raise UserError(f"{data_path} does not hold images and label maps: {expected}")
    source = "unpack it there" if dataset.startswith("partimagenet") else "python -m datasets.prepare makes them"
    raise UserError(f"{data_path} does not hold {dataset}: {expected}, there or in {' or '.join(ROOTS[dataset])}; "
                    f"{source}")


class FolderSplit:
    """A split in two folders: images and label maps of the same names."""

    def __init__(self, root: Path, images: Path, labels: Path, dataset: str, extra_label: bool = False):
        self.names = class_names(dataset, root)
        self.num_classes = len(self.names)
        if self.num_classes > 254:
            raise UserError(f"{root / 'names.txt'} holds {self.num_classes} names; 8-bit label maps hold up to 254")
        self.background, self.largest_label = 0, self.num_classes + extra_label
        if dataset.startswith("partimagenet"):
            self.background = self.largest_label = self.num_classes
        elif dataset == "folder" and self.names[0].startswith("0 "):  # label 0 is a class too
            self.names = (self.names[0][2:].strip(), *self.names[1:])
            self.background, self.largest_label = IGNORE, self.num_classes - 1
        self.pairs = pair_files(images, labels)

    def __len__(self) -> int:
        return len(self.pairs)

    def identity(self, what: str) -> dict:
        """What the split holds, by name in words. what: this split in these words."""
        return {f"the number of images of the {what}": len(self),
                f"the list of classes of the {what}": list(self.names),
                f"the ignored label of the {what}": self.background,
                f"the list of images and label maps of the {what}": files_digest([*chain(*self.pairs)])}

    def name(self, index: int) -> str:
        return self.pairs[index][0].stem

    def subset(self, indices: Sequence[int]) -> "FolderSplit":
        """Some images of this split as a split of their own."""
        chosen = copy(self)
        chosen.pairs = [self.pairs[index] for index in indices]
        return chosen

    def sizes(self, workers: int) -> list[tuple[int, int]]:
        """(height, width) of all images, from the headers. Raises UserError that lists label maps of another size."""
        def size(path):
            with image_errors(path), open_image(path) as image:
                return image.size
        pairs = list(in_order(lambda pair: [*map(size, pair)], self.pairs, workers))
        different = [f"{self.name(i)} ({' / '.join(f'{w} x {h}' for w, h in pair)})"
                     for i, pair in enumerate(pairs) if pair[0] != pair[1]]
        if different:
            raise UserError(f"{len(different)} images differ in size from their label maps: {', '.join(different)}; "
                            "replace one of the two files")
        return [(height, width) for (width, height), _ in pairs]

    def load(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Raises UserError for a damaged file; sizes() has compared the two sizes."""
        image_path, label_path = self.pairs[index]
        return read_image(image_path), read_label(label_path, self.largest_label, self.background)


class SyntheticSplit:
    """Images drawn by code, with part or object masks. Each is drawn once."""

    def __init__(self, kind: str, split: str):
        self.kind, self.split, self.background = kind, split, 0
        self.names = PART_NAMES if kind == "part" else OBJECT_NAMES
        self.num_classes = len(self.names)
        self.numbers: Sequence[int] = range(NUM_IMAGES[split])
        self.draw = cache(self._draw)

    def __len__(self) -> int:
        return len(self.numbers)

    def identity(self, what: str) -> dict:
        return {f"the list of classes of the {what}": list(self.names),
                f"the list of images of the {what}": digest(self.kind, self.split, list(self.numbers))}

    def name(self, index: int) -> str:
        return f"{self.split}_{self.numbers[index]:05}"

    def subset(self, indices: Sequence[int]) -> "SyntheticSplit":
        chosen = copy(self)
        chosen.numbers = [self.numbers[index] for index in indices]
        return chosen

    def sizes(self, workers: int) -> list[tuple[int, int]]:
        return [self.load(index)[1].shape for index in range(len(self))]

    def load(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        return self.draw(self.numbers[index])

    def _draw(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        image, label = synthetic_segmentation(number, self.split, self.kind)
        return np.array(image), reduce_label(label)


def pair_files(images: Path, labels: Path) -> list[tuple[Path, Path]]:
    """Sorted pairs (image, label map). Raises UserError for two images of one name, and one that lists all files
    without a partner."""
    def by_stem(folder, *suffixes):
        found = {}
        for path in sorted(folder.iterdir()):
            if path.suffix.lower() in suffixes and not path.name.startswith("."):
                if path.stem in found:
                    raise UserError(f"{folder} holds {found[path.stem].name} and {path.name}; remove one of them")
                found[path.stem] = path
        return found
    image_files, label_files = by_stem(images, ".jpg", ".jpeg", ".png"), by_stem(labels, ".png")
    if not image_files.keys() & label_files.keys():
        raise UserError(f"no image of {images} ({len(image_files)} images) has a label map of its name in {labels} "
                        f"({len(label_files)} PNG files)")
    for alone, what, missing in ((image_files.keys() - label_files.keys(), "images", f"label map in {labels}"),
                                 (label_files.keys() - image_files.keys(), "label maps", f"image in {images}")):
        if alone:
            raise UserError(f"{len(alone)} {what} have no {missing}: {', '.join(sorted(alone))}; add or remove them")
    return [(image_files[stem], label_files[stem]) for stem in sorted(image_files)]


def read_image(path: Path) -> np.ndarray:
    """uint8 [H, W, 3], whatever the file's colours."""
    return np.array(load_rgb(path))


def read_label(path: Path, largest: int, background: int = 0) -> np.ndarray:
    """A label map as uint8 [H, W], reduced by reduce_label; palette and 16-bit files give their indices.
    Raises UserError for a colour image or a label above largest."""
    with image_errors(path), open_image(path) as image:
        if image.mode not in ("1", "L", "P", "I", "I;16", "I;16B"):
            raise UserError(f"{path} is a picture of mode {image.mode}; a label map holds one class number per pixel")
        raw = np.asarray(image)
    above = raw[(raw > largest) & (raw != IGNORE)]
    if above.size:
        raise UserError(f"{path}: label {above.max()} is above the class count {largest}; "
                        "is it the label map of another data set? (python -m datasets.prepare)")
    return reduce_label(raw, background)


def reduce_label(raw: np.ndarray, background: int = 0) -> np.ndarray:
    """uint8: 0 -> 255, 255 -> 255, the others one less. With another background than 0, whose classes count from 0:
    background -> 255, the others as they are."""
    reduced = raw.astype(np.uint8) - np.uint8(not background)  # 0 - 1 is 255
    reduced[raw == (background or IGNORE)] = IGNORE
    return reduced


def in_order(function: Callable, items: Iterable, workers: int) -> Iterator:
    """map(function, items) by that many threads (0: by this one), at most two items ahead per thread, in order."""
    if workers == 0:
        yield from map(function, items)
        return
    items, pool = iter(items), ThreadPoolExecutor(workers)
    try:
        pending = deque(pool.submit(function, item) for item in islice(items, 2 * workers))
        while pending:
            pending.extend(pool.submit(function, item) for item in islice(items, 1))
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
