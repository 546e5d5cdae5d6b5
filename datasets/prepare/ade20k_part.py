"""Reads the full release of ADE20K (2016_07_26 or 2021_17_01), of which the part label maps are made.

NAME_seg.png holds the objects, NAME_parts_1.png the parts of objects, both as class = (R // 10) * 256 + G, counted from
1 in the index file's objectnames, and instance = B. A class of the label maps is a pair of object and part. A part
belongs to the object under most pixels of its instance: in the public images of 2021 these are the pairs of the json's
ispartof, while single pixels along outlines would add false ones.
"""

import pickle
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from utils import UserError

from ..files import open_image
from ..label_maps import require_png


def list_images(release: Path, split: str) -> list[tuple[Path, Path]]:
    """(image, _seg.png) of the images of "train" or "val" that the release of 2016 has too: its 20,210 and 2,000."""
    paths = sorted((release / "images").rglob(f"ADE_{split}_*_seg.png"))
    return [(path.with_name(path.name.replace("_seg.png", ".jpg")), path) for path in paths
            if int(path.name.split("_")[2]) <= 20210]


def read_classes(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Class indices and instance codes, each uint16 [height, width], of a _seg.png or _parts_N.png. Or UserError."""
    with open_image(path) as image:
        require_png(path, image)
        pixels = np.asarray(image.convert("RGB"), dtype=np.uint16)
    return pixels[..., 0] // 10 * 256 + pixels[..., 1], pixels[..., 2]


def part_instances(segmentation: Path) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """The part instances in an image: instance [height, width], 0 = none, i = entry i - 1 of pairs, and pairs (object
    index, 0 where no object is under the part, part index). Raises UserError."""
    objects, _ = read_classes(segmentation)
    instance = np.zeros(objects.shape, dtype=np.int32)
    parts_file = segmentation.with_name(segmentation.name.replace("_seg.png", "_parts_1.png"))
    if not parts_file.is_file():
        return instance, []
    parts, codes = read_classes(parts_file)
    if parts.shape != objects.shape:
        raise UserError(f"{parts_file} and {segmentation.name} differ in size; restore them")
    inside = parts > 0
    keys, rows = np.unique(parts[inside].astype(np.int64) * 256 + codes[inside], return_inverse=True)
    instance[inside] = rows + 1
    below = objects[inside]
    parents = [int(np.bincount(below[(rows == row) & (below > 0)], minlength=1).argmax()) for row in range(len(keys))]
    return instance, list(zip(parents, (keys // 256).tolist(), strict=True))


def find_pairs(segmentation: Path) -> set[tuple[int, int]]:
    """The (object index, part index) in an image."""
    return {(thing, part) for thing, part in part_instances(segmentation)[1] if thing}


def read_parts(segmentation: Path, labels: dict[tuple[int, int], int]) -> np.ndarray:
    """Label map of an image, uint8 [height, width]. labels: of a pair (object index, part index); others become 0."""
    instance, pairs = part_instances(segmentation)
    return np.array([0] + [labels.get(pair, 0) for pair in pairs], dtype=np.uint8)[instance]


class IndexUnpickler(pickle.Unpickler):
    """Loads plain values and NumPy arrays. Every other class or function, which could run code, is refused."""

    ALLOWED = {"numpy.ndarray", "numpy.dtype", "numpy.core.multiarray._reconstruct", "numpy.core.multiarray.scalar",
               "numpy.core.numeric._frombuffer", "_codecs.encode"}

    def find_class(self, module: str, name: str):
        # What was numpy.core in NumPy 1 is numpy._core in NumPy 2.
        if f"{module}.{name}".replace("numpy._core.", "numpy.core.") not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}")
        return super().find_class(module, name)


def read_index(release: Path) -> list[str]:
    """The names of the classes, whose indices count from 1, from index_ade20k.pkl or .mat. Raises UserError."""
    path = release / "index_ade20k.pkl"
    try:
        if path.is_file():
            with open(path, "rb") as file:
                return ["", *map(str, IndexUnpickler(file).load()["objectnames"])]
        path = path.with_suffix(".mat")
        from scipy.io import loadmat
        return ["", *("".join(cell) for cell in loadmat(str(path))["index"][0, 0]["objectnames"].ravel())]
    except Exception as error:  # a damaged pickle or matrix may raise anything
        raise UserError(f"{path} cannot be read as the release's index, which names the classes ({error}); "
                        "unpack it again") from None


def name_pairs(pairs: Iterable[tuple[int, int]], names: list[str]) -> dict[str, tuple[int, int]]:
    """The pairs by their names' first synonyms, "car wheel"; by all synonyms where two would share a name."""
    first = [name.split(",")[0].strip() for name in names]
    short = {(thing, part): f"{first[thing]} {first[part]}" for thing, part in sorted(pairs)}
    count = Counter(short.values())
    return {name if count[name] == 1 else f"{names[pair[0]]} / {names[pair[1]]} {list(pair)}": pair
            for pair, name in short.items()}
