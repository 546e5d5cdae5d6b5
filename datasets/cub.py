"""CUB-200-2011 part patches (Wah et al. 2011; https://www.vision.caltech.edu/datasets/cub_200_2011/)."""

from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from utils import UserError

from .files import picture_size, read_lines
from .patches import PatchDataset, Transform, choose_keypoints, count_outside, keypoint_patches

PARTS = (11, 12, 9, 14)  # right eye, right leg, left wing, tail: the paper's four, in its order


def load_cub(root: str | Path, split: str | None = None, keypoints: Sequence[int | str] | None = None,
             crop_scale: float = 0.5, transform: Transform | None = None) -> PatchDataset:
    """The part patches of the official folder CUB_200_2011 (by the rule of select_keypoints): 30,543 of 11,231 images.

    split: "train", "test", or None for all images, as in part retrieval. keypoints: ids or names of parts, or ["all"]
    (default PARTS); class k is the k-th of them. Only visible parts count, in the distances too. Order: images.txt,
    then keypoints. Raises UserError as read_cub and count_outside, for an unknown part, and without any patch.
    """
    root = Path(root)
    paths, points, names = read_cub(root)
    if split is not None:
        is_train = dict(read_table(root, "train_test_split.txt", (int, int), paths))
        paths = {image: path for image, path in paths.items() if is_train[image] == (split == "train")}
    parts = choose_keypoints(keypoints or PARTS, names, "part", root / "parts/parts.txt")
    by_path = ((path, [(label, points[image][part]) for label, part in enumerate(parts) if part in points[image]])
               for image, path in paths.items())
    dataset = keypoint_patches(by_path, parts, names, "part", crop_scale, transform)

    sizes = {image: picture_size(path) for image, path in paths.items() if points[image]}
    visible = [(image, part) for image in sizes for part in points[image]]
    dataset.num_outside, dataset.notes = count_outside(
        [points[image][part] for image, part in visible], [sizes[image] for image, _ in visible],
        lambda number: "{}, image {}, part {}".format(root / "parts/part_locs.txt", *visible[number]))
    return dataset


def read_cub(root: Path) -> tuple[dict, dict, dict]:
    """By image id, the paths and the (x, y) of the visible parts by part id; and the names of the parts by part id.
    Raises UserError as read_table, and where a part of an image has no row."""
    images = dict(read_table(root, "images.txt", (int, str)))
    names = dict(read_table(root, "parts/parts.txt", (int, str)))
    points = {image: {} for image in images}
    rows = read_table(root, "parts/part_locs.txt", (int, int, float, float, int), images)
    if len(rows) != len(images) * len(names):
        raise UserError(f"{root}/parts/part_locs.txt has {len(rows)} rows, not {len(images)} x {len(names)}: shortened")
    for image, part, x, y, visible in rows:
        if visible:
            points[image][part] = x, y
    return {image: str(root / "images" / name) for image, name in images.items()}, points, names


def read_table(root: Path, name: str, columns: Sequence[Callable], images: Collection[int] | None = None) -> list[list]:
    """The rows of one of CUB's lists: columns separated by spaces, the last of which may contain some. columns: what
    converts each. images: the image ids that the first column must hold, all of them. Raises UserError."""
    path, rows = root / name, []
    if not path.is_file() or not (root / "images").is_dir():
        missing = root / "images" if path.is_file() else path
        raise UserError(f"{missing} does not exist; --data-path must be a folder CUB_200_2011/{{images.txt, "
                        "parts/parts.txt, parts/part_locs.txt, train_test_split.txt, images/CLASS/*.jpg}")
    for number, line in enumerate(read_lines(path), 1):
        fields = line.strip().split(maxsplit=len(columns) - 1)
        try:
            if fields:
                rows.append([convert(field) for convert, field in zip(columns, fields, strict=True)])
        except ValueError:
            raise UserError(f"{path}, line {number}: {line.strip()[:60]!r} is not a line of CUB-200-2011") from None
    if images is not None and (alone := {*images} ^ {row[0] for row in rows}):
        raise UserError(f"image {min(alone)} is in one of {root / 'images.txt'} and {path} only; both lists must be "
                        "whole, or both shortened")
    return rows
