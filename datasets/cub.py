"""CUB-200-2011 part patches (Wah et al. 2011; https://www.vision.caltech.edu/datasets/cub_200_2011/)."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image

from utils import UserError

from .files import path_below, read_lines
from .patches import PatchDataset, choose_keypoints, keypoint_patches

PARTS = (11, 12, 9, 14)  # right eye, right leg, left wing, tail: the paper's four, in its order


def load_cub(root: str | Path, split: str | None = None, parts: Sequence[int | str] = PARTS, crop_scale: float = 0.5,
             transform: Callable[[Image.Image], torch.Tensor] | None = None,
             skip_bad_images: bool = False) -> PatchDataset:
    """The part patches of the official folder CUB_200_2011 (by the rule of select_keypoints): 30,543 of 11,730 images.

    split: "train", "test", or None for all images, as in part retrieval. parts: ids or names of parts/parts.txt, or
    ["all"]; class k is the k-th of them. Only visible parts count, in the distances too. Order: images.txt, within an
    image that of parts. Raises UserError for another layout, a malformed or contradictory line, an unknown part, and
    where no patch is left.
    """
    root = Path(root)
    if not (root / "images").is_dir():
        raise missing(root / "images")
    paths, points, names, *is_train = read_cub(root, "parts/parts.txt", *["train_test_split.txt"] * (split is not None))
    if split is not None:
        paths = {image: path for image, path in paths.items() if is_train[0][image][1] == (split == "train")}
    names = {part: name for part, (_, name) in names.items()}
    parts = choose_keypoints(parts, names, "part", root / "parts/parts.txt")
    by_path = ((path, [(label, points[image][part]) for label, part in enumerate(parts) if part in points[image]])
               for image, path in paths.items())
    return keypoint_patches(by_path, parts, names, "part", crop_scale, transform, skip_bad_images)


def finite(text: str | float) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text} is not finite")
    return value


def flag(text: str) -> bool:
    return bool(("0", "1").index(text))


COLUMNS = {
    "images.txt": {"image_id": int, "name": str}, "parts/parts.txt": {"part_id": int, "part_name": str},
    "parts/part_locs.txt": {"image_id": int, "part_id": int, "x": finite, "y": finite, "visible": flag},
    "train_test_split.txt": {"image_id": int, "is_training_image": flag},
    "bounding_boxes.txt": {"image_id": int, "x": finite, "y": finite, "width": finite, "height": finite},
}


def missing(path: Path) -> UserError:
    return UserError(f"{path} does not exist; --data-path must be a folder CUB_200_2011/{{{', '.join(COLUMNS)}, "
                     "images/CLASS/*.jpg}")


def read_cub(root: Path, *others: str) -> list[dict]:
    """By image id, the paths and (x, y) of the visible parts by part id; and the tables of others, of COLUMNS, as
    read_table gives them. Raises UserError for a file that is missing, a line that does not fit or contradicts another,
    and an image without a line."""
    files = [root / name for name in ("images.txt", "parts/part_locs.txt", *others)]
    for path in files:
        if not path.is_file():
            raise missing(path)
    names, located, *tables = (read_table(path, COLUMNS[path.relative_to(root).as_posix()]) for path in files)
    paths, points, lines = {}, {image: {} for image in names}, {}
    for image, (number, name) in names.items():
        paths[image] = path_below(root / "images", name, f"{files[0]}, line {number}")
        if lines.setdefault(name, number) != number:
            raise UserError(f"{files[0]}, line {number}: {name} is on line {lines[name]} already; remove one of them")
    known = dict(zip(others, tables, strict=True)).get("parts/parts.txt")
    for (image, part), (number, x, y, visible) in located.items():
        if image not in names or known is not None and part not in known:
            what = f"part {part} is not in parts.txt" if image in names else f"image {image} is not in images.txt"
            raise UserError(f"{files[1]}, line {number}: {what}; unpack the data set again")
        if visible:
            points[image][part] = x, y
    for path, table in zip(files[1:], ({image: () for image, _ in located}, *tables), strict=True):
        if table is not known and (absent := [image for image in names if image not in table]):
            raise UserError(f"{path} has no line of image {absent[0]}; unpack the data set again")
    return [paths, points, *tables]


def read_table(path: Path, columns: dict[str, Callable]) -> dict:
    """{value of the first column, or the first two where both are ids: (line number, values of the others)} of a file
    of columns separated by spaces, of which the last may contain spaces. columns: name, and what converts its text.
    Raises UserError at a line that does not fit or repeats a key."""
    table = {}
    for number, line in enumerate(read_lines(path), 1):
        fields = line.strip().split(maxsplit=len(columns) - 1)
        if not fields:
            continue
        try:
            first, *row = (convert(field) for convert, field in zip(columns.values(), fields, strict=True))
        except ValueError:  # of the conversions, and of too few fields
            raise UserError(f"{path}, line {number}: found {line.strip()[:60]!r} instead of '{' '.join(columns)}'; "
                            "unpack the data set again") from None
        key = (first, row.pop(0)) if "part_id" in [*columns][1:] else first
        if key in table:
            raise UserError(f"{path}, line {number}: {key} is on line {table[key][0]} already; remove one of them")
        table[key] = number, *row
    return table
