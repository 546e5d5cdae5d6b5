"""Part patches of people in COCO 2017, from the person keypoints (Lin et al. 2014; https://cocodataset.org)."""

import json
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image

from utils import UserError

from .patches import PatchDataset, keypoint_patches

KEYPOINTS = (1, 11, 16)  # nose, right wrist, left ankle: the paper's three, in its order


def load_coco(root: str | Path, split: str = "train", keypoints: Sequence[int] = KEYPOINTS, crop_scale: float = 0.5,
              transform: Callable[[Image.Image], torch.Tensor] | None = None,
              skip_bad_images: bool = False) -> PatchDataset:
    """The part patches of the people of COCO 2017 (by the rule of select_keypoints).

    root: holds annotations/person_keypoints_{split}2017.json, and images/{split}2017 or {split}2017. split: "train" (as
    in part retrieval) or "val". keypoints: numbers from 1 to 17, in the file's order; class k is the k-th. Only
    visibility 2 counts, and only persons with at least two such keypoints. All persons of an image are pooled, with the
    annotation's id as a third coordinate of distances. Order: the file's images, its annotations, then keypoints.
    Raises UserError for another layout, a malformed file, an unknown keypoint, and where no patch is left.
    """
    annotations = Path(root, "annotations", f"person_keypoints_{split}2017.json")
    folders = [Path(root, "images", f"{split}2017"), Path(root, f"{split}2017")]
    folder = next((folder for folder in folders if folder.is_dir()), None)
    if folder is None or not annotations.is_file():
        missing = annotations if folder else f"{folders[0]} (or {folders[1]})"
        raise UserError(f"{missing} does not exist; --data-path must be a folder with "
                        f"annotations/person_keypoints_{split}2017.json and images/{split}2017/*.jpg")
    names, file_names, persons = read_person_keypoints(annotations)
    known = [(label, keypoint) for label, keypoint in enumerate(keypoints) if 1 <= keypoint <= len(names)]
    points = {image: [] for image in file_names}  # (class, (x, y, annotation id))
    for image, annotation, values in persons:
        visible = [(label, (*values[3 * keypoint - 3:3 * keypoint - 1], annotation))
                   for label, keypoint in known if values[3 * keypoint - 1] == 2]
        if len(visible) >= 2:
            points[image] += visible
    by_path = ((str(folder / name), points[image]) for image, name in file_names.items())
    return keypoint_patches(by_path, keypoints, dict(enumerate(names, 1)), "keypoint", annotations, crop_scale,
                            transform, skip_bad_images)


def read_person_keypoints(path: Path) -> tuple[list[str], dict[int, str], list[tuple[int, int, array]]]:
    """(keypoint names, image id -> file name, persons in the file's order), a person being (image id, annotation id,
    array of x, y, visibility of each keypoint). The outlines, nine tenths of the file, are dropped while it is parsed.
    Raises UserError for a file that is not JSON or not of this kind."""
    def compact(entry: dict):
        if "image_id" in entry:
            return entry["image_id"], entry["id"], array("d", entry["keypoints"])
        if "file_name" in entry:
            return entry["id"], entry["file_name"]
        return entry

    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file, object_hook=compact)
        [category] = content["categories"]
        names, file_names, persons = category["keypoints"], dict(content["images"]), content["annotations"]
        for image, annotation, values in persons:
            if image not in file_names or len(values) != 3 * len(names):
                raise UserError(f"{path}: annotation {annotation} has {len(values)} keypoint values, of image {image}; "
                                f"expected {3 * len(names)} and an image of the file's list; unpack the file again")
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}, column {error.colno}: {error.msg}; "
                        "unpack the file again") from None
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is not a COCO person keypoints file ({type(error).__name__}: {error}); "
                        "unpack the file again") from None
    return names, file_names, persons
