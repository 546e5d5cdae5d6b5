"""CUB-200-2011 part patches (Wah et al. 2011; https://www.vision.caltech.edu/datasets/cub_200_2011/)."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
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
    images_txt, parts_txt, part_locs_txt, split_txt = files = [
        Path(root, name) for name in ("images.txt", "parts/parts.txt", "parts/part_locs.txt", "train_test_split.txt")]
    folder = Path(root, "images")
    for path in (*files[:4 if split else 3], folder):
        if not path.exists():
            raise UserError(f"{path} does not exist; --data-path must be a folder CUB_200_2011/{{images.txt, "
                            "train_test_split.txt, parts/parts.txt, parts/part_locs.txt, images/CLASS/*.jpg}")

    names, paths = read_table(parts_txt, part_id=int, part_name=str), image_paths(images_txt, folder)
    points = visible_points(part_locs_txt, paths, names)
    if split is not None:
        is_train = read_table(split_txt, image_id=int, is_training_image=flag)
        check_complete(split_txt, paths, is_train)
        paths = {image: path for image, path in paths.items() if is_train[image] == (split == "train")}

    parts = choose_keypoints(parts, names, "part", parts_txt)
    by_path = ((path, [(label, points[image][part]) for label, part in enumerate(parts) if part in points[image]])
               for image, path in paths.items())
    return keypoint_patches(by_path, parts, names, "part", crop_scale, transform, skip_bad_images)


def image_paths(images_txt: Path, folder: Path) -> dict[int, str]:
    """The path of every image by its id. Raises UserError for a repeated id or image."""
    paths, numbers = {}, {}
    for number, image, name in read_rows(images_txt, image_id=int, name=str):
        path = path_below(folder, name, f"{images_txt}, line {number}")
        for seen, value in ((paths, image), (numbers, path)):
            if value in seen:
                raise UserError(f"{images_txt}, line {number}: image {value} is listed twice; remove one of the lines")
        paths[image], numbers[path] = path, number
    return paths


def visible_points(part_locs_txt: Path, images: Mapping, parts: Mapping | None = None) -> dict[int, dict]:
    """By image, (x, y) of its visible parts by id. Raises UserError at a line of an unknown image or part, for a part
    with two lines, and for an image with none."""
    points, seen = {}, set()
    rows = read_rows(part_locs_txt, image_id=int, part_id=int, x=finite, y=finite, visible=flag)
    for number, image, part, x, y, visible in rows:
        problem = (f"image {image} is not in images.txt" if image not in images else
                   f"part {part} is not in parts.txt" if parts is not None and part not in parts else
                   f"image {image} has two lines of part {part}" if (image, part) in seen else "")
        if problem:
            raise UserError(f"{part_locs_txt}, line {number}: {problem}; unpack the data set again")
        seen.add((image, part))
        points.setdefault(image, {}).update({part: (x, y)} if visible else {})
    check_complete(part_locs_txt, images, points)
    return points


def check_complete(path: Path, images: Mapping, found: Mapping) -> None:
    for image in images:
        if image not in found:
            raise UserError(f"{path} has no line of image {image}; unpack the data set again")


def finite(text: str | float) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text} is not finite")
    return value


def flag(text: str) -> bool:
    return bool(("0", "1").index(text))


def read_table(path: Path, **columns: Callable) -> dict:
    """The rows of read_rows by their first value: the other, or the tuple of the others. Raises UserError, also for a
    repeated first value."""
    table = {}
    for number, key, *values in read_rows(path, **columns):
        if key in table:
            raise UserError(f"{path}, line {number}: {key} has a line already; remove one of them")
        table[key] = values[0] if len(values) == 1 else tuple(values)
    return table


def read_rows(path: Path, **columns: Callable) -> Iterator[tuple]:
    """Yields (line number, value, ...) of every line with text in a file of columns separated by spaces; the last may
    contain spaces. columns: name = what converts its text. Raises UserError at a line that does not fit."""
    for number, line in enumerate(read_lines(path), 1):
        fields = line.strip().split(maxsplit=len(columns) - 1)
        if not fields:
            continue
        try:
            row = [convert(field) for convert, field in zip(columns.values(), fields, strict=True)]
        except ValueError:  # of the conversions, and of too few fields
            raise UserError(f"{path}, line {number}: found {line.strip()[:60]!r} instead of '{' '.join(columns)}'; "
                            "unpack the data set again") from None
        yield number, *row
