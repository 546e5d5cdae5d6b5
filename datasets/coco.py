"""Part patches from files of COCO keypoints: of people in COCO 2017 (Lin et al. 2014; https://cocodataset.org), and of
any objects in a file of the user's own."""

import json
import math
from array import array
from collections.abc import Sequence
from pathlib import Path

from utils import UserError

from .files import path_below
from .patches import PatchDataset, Transform, choose_keypoints, keypoint_patches

KEYPOINTS = (1, 11, 16)  # nose, right wrist, left ankle: the paper's three, in its order


def load_coco(root: str | Path, split: str = "train", keypoints: Sequence[int | str] = KEYPOINTS,
              crop_scale: float = 0.5, transform: Transform | None = None) -> PatchDataset:
    """The part patches of the people of COCO 2017, by load_keypoints.

    root: holds annotations/person_keypoints_{split}2017.json, and images/{split}2017 or {split}2017. split: "train" (as
    in part retrieval) or "val". Raises UserError for another layout, and as load_keypoints.
    """
    annotations = Path(root, "annotations", f"person_keypoints_{split}2017.json")
    folders = [Path(root, "images", f"{split}2017"), Path(root, f"{split}2017")]
    folder = next((folder for folder in folders if folder.is_dir()), None)
    if folder is None or not annotations.is_file():
        missing = annotations if folder else f"{folders[0]} (or {folders[1]})"
        raise UserError(f"{missing} does not exist; --data-path must be a folder with "
                        f"annotations/person_keypoints_{split}2017.json and images/{split}2017/*.jpg")
    return load_keypoints(annotations, folder, None, keypoints, crop_scale, transform)


def open_keypoints(files: Sequence, most: int, **options) -> list[PatchDataset]:
    """load_keypoints (options: its) of each of 1 to most annotation files. files: what --annotations, --images (one
    folder for all or one for each) and --category say, each a list or None. Raises UserError."""
    annotations, images, categories = files
    if not annotations or not images:
        raise UserError("--dataset keypoints needs --annotations FILE (COCO keypoints, JSON) and --images DIR")
    if len(annotations) > most or len(images) not in (1, len(annotations)):
        raise UserError(f"--annotations takes {'one FILE' if most == 1 else 'one or two FILEs'} here, and --images one "
                        f"DIR, or one for each FILE; {len(annotations)} and {len(images)} were given")
    if missing := [path for path in annotations if not path.is_file()] + [path for path in images if not path.is_dir()]:
        raise UserError(f"{missing[0]} does not exist; give --annotations FILE and --images DIR")
    folders = images if len(images) > 1 else images * len(annotations)
    return [load_keypoints(path, folder, categories, **options)
            for path, folder in zip(annotations, folders, strict=True)]


def load_keypoints(annotations: Path, folder: Path, categories: Sequence[str] | None = None,
                   keypoints: Sequence[int | str] = ("all",), crop_scale: float = 0.5,
                   transform: Transform | None = None) -> PatchDataset:
    """The part patches of a file of COCO keypoints (by the rule of select_keypoints); folder: its images.

    categories: names, or None for all; several are pooled where their keypoints are the same. keypoints: numbers from 1
    in the category's order, names, or ["all"]; class k is the k-th. Only visibility 2 counts, and only objects with at
    least two such keypoints. All objects of an image are pooled, with the annotation's id as a third coordinate of
    distances. Order: the file's images, its annotations, then keypoints. Raises UserError for a malformed file, unknown
    categories or keypoints, categories with different keypoints, and where no patch is left.
    """
    names, file_names, objects = read_keypoints(annotations, categories)
    names = dict(enumerate(names, 1))
    keypoints = choose_keypoints(keypoints, names, "keypoint", annotations)
    points = {image: [] for image in file_names}  # (class, (x, y, annotation id))
    for image, annotation, values in objects:
        visible = [(label, (*values[3 * keypoint - 3:3 * keypoint - 1], annotation))
                   for label, keypoint in enumerate(keypoints) if values[3 * keypoint - 1] == 2]
        if len(visible) >= 2:
            points[image] += visible
    by_path = ((path_below(folder, name, f"{annotations}, image {image}"), points[image])
               for image, name in file_names.items())
    return keypoint_patches(by_path, keypoints, names, "keypoint", crop_scale, transform)


def read_keypoints(path: Path, categories: Sequence[str] | None = None,
                   ) -> tuple[list[str], dict[int, str], list[tuple[int, int, array]]]:
    """(keypoint names, image id -> file name, objects in the file's order), an object being (image id, annotation id,
    array of x, y, visibility of each keypoint). categories: names, whose keypoints must be the same; None: all. The
    outlines, nine tenths of the file, are dropped while it is parsed.
    Raises UserError for a file that is not JSON or not of this kind."""
    def compact(entry: dict):
        if "image_id" in entry:
            try:
                return entry["image_id"], entry["id"], entry["category_id"], array("d", entry.get("keypoints", ()))
            except (KeyError, TypeError, OverflowError) as error:
                raise ValueError(f"annotation {entry.get('id')}, {error}") from None
        return (entry["id"], entry["file_name"]) if "file_name" in entry else entry

    def refuse(what: str):
        raise UserError(f"{path}: {what}; correct it, or unpack the file again")

    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file, object_hook=compact)
        known = {category["name"]: category for category in content["categories"]}
        for name in categories or ():
            if name not in known:
                raise UserError(f"{path} has no category {name!r}; choose --category from {', '.join(known)}")
        chosen = [known[name] for name in categories or known]
        names, file_names = chosen[0]["keypoints"], {}
        if different := [category["name"] for category in chosen if category.get("keypoints") != names]:
            raise UserError(f"{path}: the categories {chosen[0]['name']} and {different[0]} have different keypoints; "
                            f"choose --category from {', '.join(known)} (--dataset keypoints)")
        if not all(isinstance(name, str) for name in names) or len(set(names)) < len(names):
            refuse(f"the names of its keypoints are {str(names)[:40]}")
        for image, name in content["images"]:
            if image in file_names:
                refuse(f"image {image} is listed twice")
            file_names[image] = name
        if len(set(file_names.values())) < len(file_names):
            refuse("two images have one file_name")
        wanted, listed = {category["id"] for category in chosen}, {category["id"] for category in known.values()}
        objects, ids = [], set()
        for image, annotation, category, values in content["annotations"]:
            if category not in wanted:
                if category not in listed:
                    refuse(f"annotation {annotation} is of category {category}, which is not listed once")
                continue
            if image not in file_names or len(values) != 3 * len(names):
                refuse(f"annotation {annotation} has {len(values)} keypoint values, of image {image}; expected "
                       f"{3 * len(names)} and an image of the file's list")
            if not math.isfinite(sum(values)):
                refuse(f"annotation {annotation} has a keypoint that is not finite")
            # The id is a coordinate of the distances.
            if type(annotation) is not int or abs(annotation) > 2**53 or annotation in ids:
                refuse(f"annotation {annotation}: its id is used twice, or is not a whole number")
            ids.add(annotation)
            objects.append((image, annotation, values))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}, column {error.colno}: {error.msg}; "
                        "unpack the file again") from None
    except (KeyError, TypeError, ValueError, IndexError, RecursionError) as error:
        raise UserError(f"{path} is not a COCO keypoints file ({type(error).__name__}: {error}); "
                        "restore the file") from None
    return names, file_names, objects
