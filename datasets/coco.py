"""Part patches from files of COCO keypoints: of people in COCO 2017 (Lin et al. 2014; https://cocodataset.org), and of
any objects in a file of the user's own."""

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from utils import UserError

from .files import picture_size, read_rgb
from .patches import PatchDataset, Transform, choose_keypoints, count_outside, keypoint_patches

KEYPOINTS = (1, 11, 16)  # nose, right wrist, left ankle: the paper's three, in its order
FAR = 1e7  # pixels, more than any picture has


def load_coco(root: str | Path, split: str = "train", keypoints: Sequence[int | str] = KEYPOINTS,
              crop_scale: float = 0.5, transform: Transform | None = None) -> PatchDataset:
    """The part patches of the people of COCO 2017, by load_keypoints.

    root: holds annotations/person_keypoints_{split}2017.json, and images/{split}2017 or {split}2017. split: "train" (as
    in part retrieval) or "val". Raises UserError for another layout, and as load_keypoints.
    """
    annotations = Path(root, "annotations", f"person_keypoints_{split}2017.json")
    folder = Path(root, "images", f"{split}2017")
    if not folder.is_dir():
        folder = Path(root, f"{split}2017")
    if not folder.is_dir() or not annotations.is_file():
        raise UserError(f"{folder if annotations.is_file() else annotations} does not exist; --data-path must be a "
                        f"folder with annotations/person_keypoints_{split}2017.json and images/{split}2017/*.jpg")
    return load_keypoints(annotations, folder, None, keypoints, crop_scale, transform, own=False)


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
                   keypoints: Sequence[int | str] = ("all",), crop_scale: float = 0.5,
                   transform: Transform | None = None, own: bool = True) -> PatchDataset:
    """The part patches of a file of COCO keypoints (by the rule of select_keypoints); folder: its images.

    categories: names, or None for all; several are pooled where their keypoints are the same. keypoints: numbers from 1
    in the category's order, names, or ["all"]; class k is the k-th. Only visibility 2 counts, and only objects with at
    least two such keypoints. All objects of an image are pooled, with a third coordinate of distances that keeps them
    apart: FAR, or, not own, the annotation's id, as in the authors' code. own: pictures are upright; not own (COCO): as
    stored. Order: the file's images, its annotations, then keypoints. Raises UserError as read_keypoints,
    check_keypoints and choose_keypoints, and where no patch is left.
    """
    names, images, objects = read_keypoints(annotations, categories)
    paths = {image: str(folder / name) for image, (name, _) in images.items()}
    sizes = {image: images[image][1] or picture_size(paths[image], upright=own)
             for image in {image for image, _, _ in objects}}
    outside = check_keypoints(annotations, names, objects, sizes, own)

    names = dict(enumerate(names, 1))
    keypoints = choose_keypoints(keypoints, names, "keypoint", annotations)
    points = {image: [] for image in images}  # (class, (x, y, what keeps objects apart))
    for number, (image, annotation, values) in enumerate(objects):
        apart = number * FAR if own else annotation
        visible = [(label, (*values[3 * keypoint - 3:3 * keypoint - 1], apart))
                   for label, keypoint in enumerate(keypoints) if values[3 * keypoint - 1] == 2]
        if len(visible) >= 2:
            points[image] += visible
    by_path = ((paths[image], points[image], size) for image, (_, size) in images.items())
    dataset = keypoint_patches(by_path, keypoints, names, "keypoint", crop_scale, transform,
                               partial(read_rgb, upright=own))
    dataset.num_outside, dataset.notes = outside
    return dataset


def check_keypoints(path: Path, names: Sequence[str], objects: Sequence[tuple], sizes: Mapping[int, tuple[int, int]],
                    own: bool) -> tuple[int, list[str]]:
    """What count_outside gives of the visible keypoints. names, objects: as of read_keypoints; sizes: image id
    -> (width, height). Raises UserError for more than count_outside takes, for keypoints none of which is visible or
    whose unit is not the pixel, and for one of the user's own that is visible at (0, 0)."""
    values = np.array([values for _, _, values in objects]).reshape(-1, len(names), 3)
    at, keypoint = np.nonzero(values[..., 2] == 2)
    points, others = values[at, keypoint, :2], int((values[..., 2] % 2 != 0).sum())
    if len(points) == 0 and others:
        raise UserError(f"{path}: none of its keypoints has visibility 2, the only one that counts, and {others} have "
                        "another; give 2 to those that are seen")
    if len(points) and points.max() <= 1:
        raise UserError(f"{path}: the largest coordinate of a visible keypoint is {points.max():g}; coordinates are in "
                        "pixels, not in parts of the picture")

    def where(number: int) -> str:
        return f"{path}, annotation {objects[at[number]][1]}, keypoint {names[keypoint[number]]}"

    missing = np.flatnonzero((points == 0).all(1))
    if own and len(missing):
        raise UserError(f"{where(missing[0])}: it is visible at (0, 0), as are {len(missing)} in all; a missing point "
                        "has visibility 0")
    return count_outside(points, [sizes[objects[number][0]] for number in at], where)


def read_keypoints(path: Path, categories: Sequence[str] | None = None) -> tuple[list[str], dict[int, tuple], list]:
    """(keypoint names, image id -> (file name, (width, height) or None), objects in the file's order), an object being
    (image id, annotation id, [x, y, visibility of each keypoint]). categories: as of choose_categories. Raises
    UserError for another kind of file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        names, wanted = choose_categories(path, content["categories"], categories)
        images = {image["id"]: (image["file_name"],
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
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is not a COCO keypoints file ({type(error).__name__}: {error})") from None
    return names, images, objects


def choose_categories(path: Path, listed: Sequence[dict], wanted: Sequence[str] | None) -> tuple[list[str], set]:
    """(names of the keypoints, ids of the wanted categories). wanted: names; None: all. Raises UserError for an unknown
    one, one without keypoints, and several with different keypoints."""
    known = {category["name"]: category for category in listed}
    choice = f"choose --category from {', '.join(name for name in known if known[name].get('keypoints'))}"
    if unknown := [name for name in wanted or () if name not in known]:
        raise UserError(f"{path} has no category {unknown[0]!r}; {choice}")
    chosen = [known[name] for name in wanted or known]
    if without := [category["name"] for category in chosen if not category.get("keypoints")]:
        raise UserError(f"{path}: the category {without[0]} has no keypoints; {choice}")
    names = chosen[0]["keypoints"]
    if different := [category["name"] for category in chosen if category["keypoints"] != names]:
        raise UserError(f"{path}: the categories {chosen[0]['name']} and {different[0]} have different keypoints; "
                        f"{choice} (--dataset keypoints)")
    return names, {category["id"] for category in chosen}
