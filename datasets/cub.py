"""CUB-200-2011 part patches (Wah et al. 2011; https://www.vision.caltech.edu/datasets/cub_200_2011/)."""

import math
from collections.abc import Sequence
from pathlib import Path

from utils import UserError

from .files import path_below, picture_size, read_lines
from .patches import PatchDataset, Transform, choose_keypoints, count_outside, keypoint_patches

PARTS = (11, 12, 9, 14)  # right eye, right leg, left wing, tail: the paper's four, in its order


def load_cub(root: str | Path, split: str | None = None, parts: Sequence[int | str] = PARTS, crop_scale: float = 0.5,
             transform: Transform | None = None) -> PatchDataset:
    """The part patches of the official folder CUB_200_2011 (by the rule of select_keypoints): 30,543 of 11,231 images.

    split: "train", "test", or None for all images, as in part retrieval. parts: ids or names of parts/parts.txt, or
    ["all"]; class k is the k-th of them. Only visible parts count, in the distances too. Order: images.txt, within an
    image that of parts. Raises UserError as read_cub and count_outside, for an unknown part, and without any patch.
    """
    root = Path(root)
    if split is None:
        paths, points, names = read_cub(root)
    else:
        paths, points, names, is_train = read_cub(root, "train_test_split.txt")
        paths = {image: path for image, path in paths.items() if is_train[image][1] == (split == "train")}
    parts = choose_keypoints(parts, names, "part", root / "parts/parts.txt")
    by_path = ((path, [(label, points[image][part]) for label, part in enumerate(parts) if part in points[image]])
               for image, path in paths.items())
    dataset = keypoint_patches(by_path, parts, names, "part", crop_scale, transform)

    sizes = {image: picture_size(path) for image, path in paths.items() if points[image]}
    visible = [(image, part) for image in sizes for part in points[image]]
    dataset.num_outside = count_outside(
        [points[image][part] for image, part in visible], [sizes[image] for image, _ in visible],
        lambda number: "{}, image {}, part {}".format(root / "parts/part_locs.txt", *visible[number]))
    return dataset


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


def read_cub(root: Path, *others: str) -> tuple[dict, ...]:
    """By image id, the paths and the (x, y) of the visible parts by part id; the names of the parts by part id; and the
    tables of others, as read_table gives them. Raises UserError for a missing file or folder, a line that does not fit
    or contradicts another, and an image without a line."""
    if not (root / "images").is_dir():
        raise missing(root / "images")
    images, parts, located, *tables = (read_table(root, name) for name in (
        "images.txt", "parts/parts.txt", "parts/part_locs.txt", *others))
    paths, points, lines = {}, {image: {} for image in images}, {}
    for image, (number, name) in images.items():
        where = f"{root / 'images.txt'}, line {number}"
        paths[image] = path_below(root / "images", name, where)
        if lines.setdefault(name, number) != number:
            raise UserError(f"{where}: {name} is on line {lines[name]} already; remove one of them")
    for (image, part), (number, x, y, visible) in located.items():
        if image not in images or part not in parts:
            what = f"image {image} is not in images.txt" if image not in images else f"part {part} is not in parts.txt"
            raise UserError(f"{root / 'parts/part_locs.txt'}, line {number}: {what}; both lists must be whole, or both "
                            "shortened: unpack the data set again")
        if visible:
            points[image][part] = x, y
    for name, known in (("parts/part_locs.txt", {image for image, _ in located}), *zip(others, tables, strict=True)):
        if absent := [image for image in images if image not in known]:
            raise UserError(f"{root / name} has no line of image {absent[0]}, which is in images.txt; both lists must "
                            "be whole, or both shortened: unpack the data set again")
    return paths, points, {part: name for part, (_, name) in parts.items()}, *tables


def read_table(root: Path, name: str) -> dict:
    """{id, or (image id, part id): (line number, values of the other columns)} of a file of COLUMNS: columns separated
    by spaces, of which the last may contain spaces. Raises UserError where there is no file, and at a line that does
    not fit or repeats an id."""
    path, columns, table = root / name, COLUMNS[name], {}
    if not path.is_file():
        raise missing(path)
    for number, line in enumerate(read_lines(path), 1):
        fields = line.strip().split(maxsplit=len(columns) - 1)
        if not fields:
            continue
        try:
            key, *values = (convert(field) for convert, field in zip(columns.values(), fields, strict=True))
        except ValueError:  # of the conversions, and of too few fields
            raise UserError(f"{path}, line {number}: found {line.strip()[:60]!r} instead of '{' '.join(columns)}'; "
                            "unpack the data set again") from None
        if name == "parts/part_locs.txt":
            key = key, values.pop(0)
        if key in table:
            raise UserError(f"{path}, line {number}: {key} is on line {table[key][0]} already; remove one of them")
        table[key] = number, *values
    return table
