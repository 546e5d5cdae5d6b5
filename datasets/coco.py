"""Part patches from files of COCO keypoints: of people in COCO 2017 (Lin et al. 2014; https://cocodataset.org), and of
any objects in a file of the user's own."""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from utils import UserError

from .files import picture_size, read_rgb
from .patches import PatchDataset, Transform, choose_keypoints, count_outside, keypoint_patches

KEYPOINTS = (1, 11, 16)  # nose, right wrist, left ankle: the paper's three, in its order
FAR = 1e7  # pixels, more than any picture has


def load_coco(root: str | Path, split: str = "train", keypoints: Sequence[int | str] | None = None,
              crop_scale: float = 0.5, transform: Transform | None = None) -> PatchDataset:
    """The part patches of the people of COCO 2017, by load_keypoints.

    root: holds annotations/person_keypoints_{split}2017.json, and images/{split}2017 or {split}2017. split: "train" or
    "val". keypoints: default KEYPOINTS. Raises UserError for another layout, and as load_keypoints.
    """
    annotations = Path(root, "annotations", f"person_keypoints_{split}2017.json")
    folder = Path(root, "images", f"{split}2017")
    if not folder.is_dir():
        folder = Path(root, f"{split}2017")
    if not folder.is_dir() or not annotations.is_file():
        raise UserError(f"{folder if annotations.is_file() else annotations} does not exist; --data-path must be a "
                        f"folder with annotations/person_keypoints_{split}2017.json and images/{split}2017/*.jpg")
    return load_keypoints(annotations, folder, None, keypoints or KEYPOINTS, crop_scale, transform, own=False)


def open_keypoints(files: Sequence, most: int, **options) -> list[PatchDataset]:
    """load_keypoints (options: its) of each of 1 to most annotation files. files: what --annotations, --images (one
    folder for all or one for each) and --category say, each a list or None. Raises UserError."""
    annotations, images, categories = files
    if not annotations or not images:
        raise UserError("--dataset keypoints needs --annotations FILE (COCO keypoints, JSON) and --images DIR")
    if len(annotations) > most or len(images) not in (1, len(annotations)):
        raise UserError(f"--annotations takes {'one FILE' if most == 1 else 'one or two FILEs'} here, and --images one "
                        f"DIR, or one for each FILE; {len(annotations)} and {len(images)} were given")
    folders = images if len(images) > 1 else images * len(annotations)
    return [load_keypoints(path, folder, categories, **options)
            for path, folder in zip(annotations, folders, strict=True)]


def load_keypoints(annotations: Path, folder: Path, categories: Sequence[str] | None = None,
                   keypoints: Sequence[int | str] | None = None, crop_scale: float = 0.5,
                   transform: Transform | None = None, own: bool = True) -> PatchDataset:
    """The part patches of a file of COCO keypoints (by the rule of select_keypoints); folder: its images.

    categories: names, or None for all; several are pooled where their keypoints are the same. keypoints: numbers from 1
    in the category's order, or names (default all); class k is the k-th. Only visibility 2 counts, and only objects
    with at least two such keypoints. All objects of an image are pooled, with a third coordinate of distances that
    keeps them apart: FAR, or, not own, the annotation's id, as in the authors' code. own: pictures are upright; not own
    (COCO): as stored. Order: the file's images, its annotations, then keypoints. Raises UserError as read_keypoints,
    count_outside and choose_keypoints, for keypoints none of which is visible or whose unit is not the pixel, for one
    of the user's own that is visible at (0, 0), and where no patch is left.
    """
    names, images, objects = read_keypoints(annotations, folder, categories)
    shown = {image for image, _, _ in objects}
    sizes = {image: size or picture_size(path, upright=own) for image, (path, size) in images.items() if image in shown}

    values = np.array([values for _, _, values in objects]).reshape(-1, len(names), 3)
    rows, columns = np.nonzero(values[..., 2] == 2)
    visible, others = values[rows, columns, :2], int((values[..., 2] % 2 != 0).sum())
    if len(visible) == 0 and others:
        raise UserError(f"{annotations}: none of its keypoints has visibility 2, the only one that counts, and "
                        f"{others} have another; give 2 to those that are seen")
    if len(visible) and visible.max() <= 1:
        raise UserError(f"{annotations}: the largest coordinate of a visible keypoint is {visible.max():g}; "
                        "coordinates are in pixels, not in parts of the picture")

    def where(number: int) -> str:
        return f"{annotations}, annotation {objects[rows[number]][1]}, keypoint {names[columns[number]]}"

    missing = np.flatnonzero((visible == 0).all(1))
    if own and len(missing):
        raise UserError(f"{where(missing[0])}: it is visible at (0, 0), as are {len(missing)} in all; a missing point "
                        "has visibility 0")
    outside = count_outside(visible, [sizes[objects[row][0]] for row in rows], where)

    numbered = dict(enumerate(names, 1))
    chosen = choose_keypoints(keypoints or ["all"], numbered, "keypoint", annotations)
    points = {image: [] for image in images}  # (class, (x, y, what keeps objects apart))
    for number, (image, annotation, triples) in enumerate(objects):
        apart = number * FAR if own else annotation
        found = [(label, (*triples[3 * keypoint - 3:3 * keypoint - 1], apart))
                 for label, keypoint in enumerate(chosen) if triples[3 * keypoint - 1] == 2]
        if len(found) >= 2:
            points[image] += found
    by_path = ((path, points[image], size) for image, (path, size) in images.items())
    dataset = keypoint_patches(by_path, chosen, numbered, "keypoint", crop_scale, transform,
                               partial(read_rgb, upright=own))
    dataset.num_outside, dataset.notes = outside
    return dataset


def read_keypoints(path: Path, folder: Path, categories: Sequence[str] | None) -> tuple[list[str], dict, list]:
    """A file of COCO keypoints -> (their names; by image id the path in folder and the (width, height) that the file
    states, or None; the objects (image id, annotation id, [x, y, visibility of each keypoint in turn]) of the
    categories). categories: names; None: all. Raises UserError for another kind of file, an unknown category, one
    without keypoints, and several with different keypoints."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        known = {category["name"]: category for category in content["categories"]}
        choice = f"choose --category from {', '.join(name for name in known if known[name].get('keypoints'))}"
        if unknown := [name for name in categories or () if name not in known]:
            raise UserError(f"{path} has no category {unknown[0]!r}; {choice}")
        chosen = [known[name] for name in categories or known]
        if without := [category["name"] for category in chosen if not category.get("keypoints")]:
            raise UserError(f"{path}: the category {without[0]} has no keypoints; {choice}")
        names, wanted = chosen[0]["keypoints"], {category["id"] for category in chosen}
        if different := [category["name"] for category in chosen if category["keypoints"] != names]:
            raise UserError(f"{path}: the categories {chosen[0]['name']} and {different[0]} have different keypoints; "
                            f"{choice} (--dataset keypoints)")
        images = {image["id"]: (str(folder / image["file_name"]),
                                (int(image["width"]), int(image["height"])) if "width" in image else None)
                  for image in content["images"]}
        if len(images) < len(content["images"]):
            raise ValueError("two of its images have the same id")
        objects = [(one["image_id"], one["id"], [float(value) for value in one.get("keypoints", ())])
                   for one in content["annotations"] if one["category_id"] in wanted]
        for image, annotation, values in objects:
            if image not in images or len(values) != 3 * len(names):
                raise ValueError(f"annotation {annotation} has {len(values)} keypoint values, of image {image}; "
                                 f"expected {3 * len(names)} and an image of the file's list")
    except (LookupError, TypeError, ValueError) as error:
        raise UserError(f"{path} is not a COCO keypoints file ({type(error).__name__}: {error})") from None
    return names, images, objects
