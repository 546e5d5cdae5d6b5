"""CUB-200-2011 part patches (Wah et al. 2011; https://www.vision.caltech.edu/datasets/cub_200_2011/)."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from PIL import Image

from utils import UserError

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

    names = {part: name for _, part, name in read_rows(parts_txt, part_id=int, part_name=str)}
    paths = {image: str(folder / name) for _, image, name in read_rows(images_txt, image_id=int, name=str)}
    points = {}  # by image, then by part: (x, y), or None where it is not visible
    rows = read_rows(part_locs_txt, image_id=int, part_id=int, x=float, y=float, visible=int)
    for number, image, part, x, y, visible in rows:
        if image not in paths or part not in names:
            listing, what = (images_txt, f"image {image}") if image not in paths else (parts_txt, f"part {part}")
            raise UserError(f"{part_locs_txt}, line {number}: {what} is not in {listing}; unpack the data set again")
        points.setdefault(image, {})[part] = (x, y) if visible == 1 else None
    check_complete(part_locs_txt, paths, points)
    if split is not None:
        is_train = {image: flag == 1 for _, image, flag in read_rows(split_txt, image_id=int, is_training_image=int)}
        check_complete(split_txt, paths, is_train)
        paths = {image: path for image, path in paths.items() if is_train[image] == (split == "train")}

    parts = choose_keypoints(parts, names, "part", parts_txt)
    by_path = ((path, [(label, points[image][part]) for label, part in enumerate(parts) if points[image].get(part)])
               for image, path in paths.items())
    return keypoint_patches(by_path, parts, names, "part", crop_scale, transform, skip_bad_images)


def check_complete(path: Path, images: dict, found: dict) -> None:
    for image in images:
        if image not in found:
            raise UserError(f"{path} has no line of image {image}; unpack the data set again")


def read_rows(path: Path, **columns: type) -> Iterator[tuple]:
    """Yields (line number, value, ...) of every line with text in a file of columns separated by spaces; the last may
    contain spaces. columns: name = type. Raises UserError at a line that does not fit."""
    with open(path, encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            fields = line.strip().split(maxsplit=len(columns) - 1)
            if not fields:
                continue
            try:
                row = [kind(field) for kind, field in zip(columns.values(), fields, strict=True)]
            except ValueError:
                raise UserError(f"{path}, line {number}: found {line.strip()[:60]!r} instead of '{' '.join(columns)}'; "
                                "unpack the data set again") from None
            yield number, *row
