"""Part label maps from the full release of ADE20K (2016_07_26 or 2021_17_01).

NAME_seg.png holds the objects, NAME_parts_1.png the parts of objects, both as class = (R // 10) * 256 + G, counted from
1 in the index file's objectnames, and instance = B. A class of the label maps is a pair of object name and part name. A
part belongs to the object under most pixels of its instance: in the public images of 2021 these are the pairs of the
json's ispartof, while the pairs of single pixels would add false ones along outlines.
"""

import json
import math
import mmap
import os
import pickle
import pickletools
import re
from collections import Counter
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np

from utils import UserError
from utils.run import open_output

from ..files import open_image
from ..segmentation import LONG_NAMES, ROOTS
from ..segmentation_classes import ADE20K_OBJECT_59, read_names
from .common import attempt_all, first_folder, import_loadmat, prepare, raise_failures, write_text

TREE = ("DIR/images/{training,validation}/**/*_seg.png (2016_07_26) or "
        "DIR/images/ADE/{training,validation}/**/*_seg.png (2021_17_01), "
        "with *_parts_1.png and *.jpg beside them and index_ade20k.mat or .pkl in DIR")
NUM_TRAIN = 20210
# Labels 1 to 254: 0 is "other", 255 is ignored.
MAX_CLASSES = 254


def read_classes(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Class indices (uint16) and instance codes (uint8) of a _seg.png or _parts_N.png, each [height, width]."""
    with open_image(path) as image:
        pixels = np.asarray(image.convert("RGB"))
    high_byte = (np.arange(256) // 10 * 256).astype(np.uint16)
    return high_byte[pixels[..., 0]] + pixels[..., 1], pixels[..., 2]


def part_instances(segmentation: Path) -> tuple[np.ndarray, np.ndarray]:
    """The part instances in an image: instance [height, width], 0 = none, i = row i - 1 of pairs, and pairs [N, 2]:
    object index (0 where no object is under the part), part index. ValueError where the files differ in size."""
    parts_file = segmentation.with_name(segmentation.name.replace("_seg.png", "_parts_1.png"))
    if not parts_file.is_file():
        with open_image(segmentation) as image:
            return np.zeros((image.height, image.width), dtype=np.int32), np.zeros((0, 2), dtype=np.int64)
    parts, codes = read_classes(parts_file)
    objects, _ = read_classes(segmentation)
    if parts.shape != objects.shape:
        raise ValueError(f"{parts_file.name} is {parts.shape[::-1]}, {segmentation.name} {objects.shape[::-1]}")
    inside = parts > 0
    keys, rows = np.unique(parts[inside].astype(np.int64) * 256 + codes[inside], return_inverse=True)
    candidates, columns = np.unique(objects[inside], return_inverse=True)
    votes = np.bincount(rows * len(candidates) + columns, minlength=len(keys) * len(candidates))
    votes = votes.reshape(len(keys), len(candidates))
    votes[:, candidates == 0] = 0
    instance = np.zeros(parts.shape, dtype=np.int32)
    instance[inside] = rows + 1
    parents = np.where(votes.any(axis=1), candidates[votes.argmax(axis=1)], 0) if len(keys) else keys
    return instance, np.stack([parents, keys // 256], axis=1)


def read_parts(segmentation: Path, labels: dict[tuple[int, int], int]) -> np.ndarray:
    """Label map of an image, uint8 [height, width]. labels: of a pair (object index, part index); others become 0."""
    instance, pairs = part_instances(segmentation)
    return np.array([0] + [labels.get(tuple(pair), 0) for pair in pairs.tolist()], dtype=np.uint8)[instance]


def scan(segmentation: Path, with_names: bool) -> tuple[set[tuple[int, int]], dict[int, str]]:
    """The pairs in an image, and with_names the names of its classes, from its json."""
    pairs = {(parent, part) for parent, part in part_instances(segmentation)[1].tolist() if parent}
    if not with_names:
        return pairs, {}
    text = segmentation.with_name(segmentation.name.replace("_seg.png", ".json")).read_bytes()
    objects = json.loads(text.decode("utf-8", errors="replace"))["annotation"]["object"]
    # MATLAB wrote the files: a list of one is its element.
    return pairs, {item["name_ndx"]: item["name"] for item in (objects if isinstance(objects, list) else [objects])}


class Array(np.ndarray):
    """An array that takes no memory before its values are there."""

    def __setstate__(self, state):
        if math.prod(state[1]) > len(state[4]):
            raise pickle.UnpicklingError(f"an array of shape {state[1]} has {len(state[4])} bytes or objects")
        super().__setstate__(state)


class IndexUnpickler(pickle.Unpickler):
    """Loads dictionaries, lists, strings, numbers and NumPy arrays; refuses all that could run code, and what declares
    more values than it holds."""

    # NumPy's own helpers, in files written by NumPy 1 (numpy.core) and 2 (numpy._core).
    ALLOWED = {
        "multiarray._reconstruct": lambda kind, shape, letter: Array(0),
        "multiarray.scalar": lambda dtype, value: np.float64().__reduce__()[0](dtype, value),
        "numeric._frombuffer": lambda *arguments: np.empty(1).__reduce_ex__(5)[0](*arguments).view(Array),
        "numpy.ndarray": None,  # named, never called
        "numpy.dtype": np.dtype,
        "_codecs.encode": lambda text, encoding: text.encode("latin1"),
    }

    def __init__(self, content: BinaryIO | mmap.mmap):
        for number, (opcode, argument, _) in enumerate(pickletools.genops(content)):  # checks the sizes of strings
            if "PUT" in opcode.name and argument > number:
                raise pickle.UnpicklingError(f"it refers to object {argument}, after {number} operations")
        content.seek(0)
        super().__init__(content)

    def find_class(self, module, name):
        known = f"{module}.{name}".replace("numpy._core.", "").replace("numpy.core.", "")
        if known not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}")
        return self.ALLOWED[known]


def read_index(release: Path) -> dict[int, str] | None:
    """Names by class index from index_ade20k.pkl or .mat; None where there is neither. Raises UserError."""
    pkl, mat = release / "index_ade20k.pkl", release / "index_ade20k.mat"
    if pkl.is_file():
        try:
            with open(pkl, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                names = IndexUnpickler(content).load()["objectnames"]
            if not all(isinstance(name, str) for name in names):
                raise TypeError("objectnames are not all text")
        except Exception as error:
            raise UserError(f"{pkl} is damaged or holds more than plain data ({error}); remove it, then the names are "
                            "read from index_ade20k.mat or the json files") from None
        return dict(enumerate(map(str, names), 1))
    if not mat.is_file():
        return None
    loadmat = import_loadmat()
    try:
        cells = loadmat(mat)["index"][0, 0]["objectnames"].ravel()
    except Exception as error:
        raise UserError(f"{mat} is no index of ADE20K ({type(error).__name__}); unpack it again") from None
    return {index: str(cell.item()) if cell.size else "" for index, cell in enumerate(cells, 1)}


def find_segmentations(folder: Path) -> Iterable[Path]:
    for path, folders, files in os.walk(folder):
        # In 2021, folders named as the images hold instance masks, most of the files.
        folders[:] = sorted(name for name in folders if not name.startswith("ADE_"))
        yield from (Path(path, name) for name in sorted(files) if name.endswith("_seg.png"))


def first_synonym(name: str) -> str:
    return name.split(",")[0].strip()


def find_parts(root: Path, release: Path, pairs: dict[str, list[tuple[Path, Path]]], workers: int) -> list[dict]:
    """Every part of an object in the release, with names and numbers of images; written to root/parts.json, and read
    from there where that is of the same release and as many images. Raises UserError where an image cannot be read,
    because all images determine the class list."""
    report = root / "parts.json"
    numbers = {"release": release.name, **{split: len(listed) for split, listed in pairs.items()}}
    if report.is_file():
        try:
            known = json.loads(report.read_text(encoding="utf-8"))
            if {key: known[key] for key in numbers} == numbers:
                return known["parts"]
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{report} is not the list of an earlier run; remove it") from None
    names = read_index(release)
    everything = pairs["train"] + pairs["val"]
    if names is None and not everything[0][0].with_suffix(".json").is_file():
        raise UserError(f"{release} has neither index_ade20k.mat nor index_ade20k.pkl, which name the classes; "
                        "put the release's index there")
    results, errors = attempt_all(partial(scan, with_names=names is None), [annotation for _, annotation in everything],
                                  workers, "looking for parts")
    raise_failures(root, everything, errors)
    names, train, val = dict(names or {}), Counter(), Counter()
    for number, (found, names_here) in enumerate(results):
        (train if number < len(pairs["train"]) else val).update(found)
        names.update(names_here)
    parts = [{"object": names.get(parent, f"class {parent}"), "part": names.get(part, f"class {part}"),
              "indices": [parent, part], "train": train[parent, part], "val": val[parent, part]}
             for parent, part in sorted(train | val)]
    lines = ",\n".join(json.dumps(part, ensure_ascii=False) for part in parts)
    write_text(report, json.dumps(numbers)[:-1] + f', "parts": [\n{lines}\n]}}\n')
    return parts


def name_parts(parts: list[dict]) -> list[str]:
    """First synonyms, "car wheel"; all synonyms where two parts would share a name."""
    short = [f"{first_synonym(part['object'])} {first_synonym(part['part'])}" for part in parts]
    return [f"{part['object']} / {part['part']} {part['indices']}" if short.count(name) > 1 else name
            for name, part in zip(short, parts, strict=True)]


def prepare_ade20k_part(source: Path, target: Path, workers: int, classes: Path | None) -> None:
    """The parts that occur in both splits. classes: a file of some of an earlier run's names, to keep only those."""
    training = first_folder(source, [f"{release}images/{inner}training" for release in
                                     ("", "ADE20K_2016_07_26/", "ADE20K_2021_17_01/") for inner in ("", "ADE/")], TREE)
    images = training.parent
    release = images.parent if images.name == "images" else images.parents[1]
    root = target / ROOTS["ade20k-part"][0]
    pairs, left_out = {"train": [], "val": []}, 0
    for split, folder in LONG_NAMES.items():
        for path in find_segmentations(images / folder):
            name = path.name.removesuffix("_seg.png")
            number = re.fullmatch(r"ADE_(?:train|val)_(\d+)", name)
            if number is None or int(number[1]) > NUM_TRAIN:
                left_out += 1
            else:
                pairs[split].append((path.with_name(f"{name}.jpg"), path))
        if not pairs[split]:
            raise UserError(f"{images / folder} holds no *_seg.png; expected with --source DIR: {TREE}")
    open_output(root)
    parts = [part for part in find_parts(root, release, pairs, workers) if part["train"] and part["val"]]
    if not parts:
        raise UserError(f"{release}: no part occurs in both splits; both must be unpacked")
    named = dict(zip(name_parts(parts), parts, strict=True))
    of_59 = [name for name, part in named.items() if first_synonym(part["object"]) in ADE20K_OBJECT_59]
    write_text(root / "names_of_59_objects.txt", "".join(f"{name}\n" for name in of_59))
    print(f"parts in both splits: {len(named)} with their objects, {len({part['part'] for part in parts})} by the "
          f"part's name alone, {len(of_59)} of the 59 objects (names_of_59_objects.txt, for --classes); the paper: 209")
    if classes:
        names = read_names(classes)
        unknown = [name for name in names if name not in named]
        if unknown or len(names) > MAX_CLASSES:
            raise UserError(f"--classes {classes}: " + (f"{unknown[0]} is not a part that occurs in both splits"
                            if unknown else f"{len(names)} names; an 8-bit label map holds {MAX_CLASSES}"))
    else:
        names = sorted(sorted(named, key=lambda name: -named[name]["train"])[:MAX_CLASSES])
        if len(names) < len(named):
            print(f"  an 8-bit label map holds {MAX_CLASSES} classes: those in most training images are kept")
    labels = {tuple(named[name]["indices"]): label for label, name in enumerate(names, 1)}
    prepare("ade20k-part", target, pairs, names, partial(read_parts, labels=labels), workers, left_out=left_out,
            left_out_reason=f"not among the {NUM_TRAIN} training images of 2016 by its number")
