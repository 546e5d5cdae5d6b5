"""CUB-200-2011 part patches (Wah et al. 2011; https://www.vision.caltech.edu/datasets/cub_200_2011/)."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from PIL import Image

from utils import UserError

from .patches import PatchDataset, patch_image

PARTS = (11, 12, 9, 14)  # right eye, right leg, left wing, tail: the paper's four, in its order


def load_cub(root: str | Path, split: str | None = None, parts: Sequence[int] = PARTS, crop_scale: float = 0.5,
             transform: Callable[[Image.Image], torch.Tensor] | None = None,
             skip_bad_images: bool = False) -> PatchDataset:
    """Reads the official folder CUB_200_2011 and returns its part patches (select_keypoints has the rule).

    split: "train", "test" (train_test_split.txt), or None for all images, which part retrieval uses. parts: ids of
    parts/parts.txt; class k is the k-th of them. Only visible ones count, in the distances too. Patches come in the
    order of images.txt, within an image in the order of parts, the same for any order of the rows of part_locs.txt.
    On the official files the default gives 30,543 patches of 11,730 images.

    Raises UserError for a folder of another layout, a malformed or contradictory line, an unknown part, and where no
    patch is left.
    """
    root = Path(root)
    files = [root / name for name in ("images.txt", "parts/parts.txt", "parts/part_locs.txt", "train_test_split.txt")]
    for path in (*files[:3 if split is None else 4], root / "images"):
        if not path.exists():
            raise UserError(f"{path} does not exist; --data-path must be a folder CUB_200_2011/{{images.txt, "
                            "train_test_split.txt, parts/parts.txt, parts/part_locs.txt, images/CLASS/*.jpg}")
    images_txt, parts_txt, part_locs_txt, split_txt = files

    names = {part: name for _, part, name in read_rows(parts_txt, part_id=int, part_name=str)}
    for part in parts:
        if part not in names:
            known = ", ".join(f"{number} {name}" for number, name in names.items())
            raise UserError(f"part {part} is not in {parts_txt}; choose from {known}")
    if len(set(parts)) < len(parts):
        raise UserError(f"a part is named twice: {', '.join(map(str, parts))}")

    paths = {image: str(root / "images" / name) for _, image, name in read_rows(images_txt, image_id=int, name=str)}
    # By image, then by part: (x, y) where visible, else None.
    points = {image: {} for image in paths}
    rows = read_rows(part_locs_txt, image_id=int, part_id=int, x=float, y=float, visible=int)
    for number, image, part, x, y, visible in rows:
        if image not in points or part not in names:
            listing, what = (images_txt, f"image {image}") if image not in points else (parts_txt, f"part {part}")
            raise UserError(f"{part_locs_txt}, line {number}: {what} is not in {listing}; unpack the data set again")
        points[image][part] = (x, y) if visible == 1 else None
    for image, path in paths.items():
        if not points[image]:
            raise UserError(f"{part_locs_txt} has no line of image {image} ({path}); unpack the data set again")

    chosen = list(paths)
    if split is not None:
        is_train = {image: flag == 1 for _, image, flag in read_rows(split_txt, image_id=int, is_training_image=int)}
        for image in chosen:
            if image not in is_train:
                raise UserError(f"{split_txt} has no line of image {image}; unpack the data set again")
        chosen = [image for image in chosen if is_train[image] == (split == "train")]

    images = []
    for image in chosen:
        visible = [(label, points[image][part]) for label, part in enumerate(parts) if points[image].get(part)]
        entry = patch_image(paths[image], [point for _, point in visible], [label for label, _ in visible], crop_scale)
        if entry.boxes:
            images.append(entry)
    if not images:
        raise UserError(f"no patch of the parts {', '.join(map(str, parts))} is left; take two or more")
    return PatchDataset(images, [names[part] for part in parts], transform, skip_bad_images=skip_bad_images)


def read_rows(path: Path, **columns: type) -> Iterator[tuple]:
    """Yields (line number, value, ...) of each line of a text file of columns with spaces between; the last column may
    hold spaces itself. columns: name = type. Raises UserError at a line that does not fit; empty lines are passed over.
    """
    with open(path, encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            line = line.strip()
            if not line:
                continue
            fields = line.split(maxsplit=len(columns) - 1)
            try:
                row = [kind(field) for kind, field in zip(columns.values(), fields, strict=True)]
            except ValueError:
                raise UserError(f"{path}, line {number}: found {line[:60]!r} in place of '{' '.join(columns)}'; "
                                "unpack the data set again") from None
            yield number, *row
