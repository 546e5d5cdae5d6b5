"""Makes the label maps of the segmentation data sets from the original releases.

    python -m datasets.prepare pascal-part --source VOC2010 --target data
    python -m datasets.prepare pascal-object --source VOC2010 --target data
    python -m datasets.prepare ade20k-part --source ADE20K_2016_07_26 --target data
    python -m datasets.prepare ade20k-object --source ADEChallengeData2016 --target data
    python -m datasets.prepare lip --source LIP --target data

The layout is that of the authors' prepared sets: {img,ann}/{train,val} in data/pascal_part, data/pascal_semantic,
data/ADE20K_Part, data/LIP, and {images,annotations}/{training,validation} in data/ade_59object/ADEChallengeData2016.
Images are copied; label maps are 8-bit PNGs of the image's size, 0 = other, k = line k of names.txt. After an
interruption run it again: complete files are kept. Images that fail are listed in failed.txt, with exit status 2.
"""

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from utils import UserError
from utils.ending import exit_with_one_line_errors
from utils.run import OneLineParser, number

from ..files import read_lines
from ..segmentation import LAYOUTS, LONG_NAMES, OTHER_LAYOUTS
from ..segmentation_classes import ADE20K_150, CLASS_NAMES, PASCAL_OBJECT_16, PASCAL_PART_193, read_names
from .ade20k_part import prepare_ade20k_part
from .common import first_folder, import_loadmat, pair_by_name, prepare, read_index_map

PASCAL_TREE = "DIR/Annotations_Part/*.mat, DIR/JPEGImages/*.jpg, DIR/ImageSets/Main/{train,val}.txt"
ADE20K_OBJECT_TREE = "DIR/images/{training,validation}/*.jpg, DIR/annotations/{training,validation}/*.png"
LIP_TREE = ("DIR/TrainVal_images/{train,val}_images/*.jpg, "
            "DIR/TrainVal_parsing_annotations/{train,val}_segmentations/*.png")
# No object of these classes has parts in Pascal-Part; the paper leaves them out.
PASCAL_WITHOUT_PARTS = ("boat", "chair", "diningtable", "sofa", "table")


def prepare_lip(source: Path, target: Path, workers: int) -> None:
    """LIP, in any of its layouts: the labels stay, only the folders change."""
    images, labels = (first_folder(source, [folder.format("train") for folder in folders], LIP_TREE).parent
                      for folders in zip(*OTHER_LAYOUTS["lip"][2:], strict=True))
    pairs = {split: pair_by_name(images / f"{split}_images", labels / f"{split}_segmentations") for split in LONG_NAMES}
    unchanged = np.arange(len(CLASS_NAMES["lip"]) + 1, dtype=np.uint8)
    prepare("lip", target, pairs, CLASS_NAMES["lip"], partial(read_and_renumber, table=unchanged), workers)


def prepare_ade20k_object(source: Path, target: Path, workers: int, classes: Path | None) -> None:
    """Some of the 150 classes of ADEChallengeData2016, renumbered; the others become 0. classes: a file of names (first
    synonyms of objectInfo150.txt) in label order (default: the paper's 59)."""
    names = read_names(classes) if classes else CLASS_NAMES["ade20k-object"]
    unknown = [name for name in names if name not in ADE20K_150]
    if unknown:
        raise UserError(f"--classes {classes}: {unknown[0]} is not one of the 150 names of ADE20K "
                        "(ADE20K_150 in datasets/segmentation_classes.py)")
    table = np.zeros(len(ADE20K_150) + 1, dtype=np.uint8)
    for label, name in enumerate(names, 1):
        table[ADE20K_150.index(name) + 1] = label
    challenge = first_folder(source, ("annotations/training", "ADEChallengeData2016/annotations/training"),
                             ADE20K_OBJECT_TREE).parents[1]
    pairs = {split: pair_by_name(challenge / "images" / folder, challenge / "annotations" / folder)
             for split, folder in LONG_NAMES.items()}
    prepare("ade20k-object", target, pairs, names, partial(read_and_renumber, table=table), workers, LAYOUTS[1])


def read_and_renumber(path: Path, table: np.ndarray) -> np.ndarray:
    """table[labels]. Raises ValueError for a label beyond the table."""
    labels = read_index_map(path)
    if labels.max(initial=0) >= len(table):
        raise ValueError(f"label {labels.max()} is above {len(table) - 1}")
    return table[labels]


def prepare_pascal(source: Path, target: Path, workers: int, lists: Path | None, parts: bool) -> None:
    """Pascal-Part, unpacked into VOCdevkit/VOC2010, whose 10,103 training and validation images it annotates. lists: a
    folder with train.txt and val.txt (default: VOC's ImageSets/Main, 4,998 and 5,105 names)."""
    import_loadmat()

    def find(folder: str) -> Path:
        return first_folder(source, (folder, f"VOC2010/{folder}", f"VOCdevkit/VOC2010/{folder}"), PASCAL_TREE)

    annotations, images = find("Annotations_Part"), find("JPEGImages")
    names, pairs = {}, {}
    for split in LONG_NAMES:
        path = (lists or find("ImageSets/Main")) / f"{split}.txt"
        if not path.is_file():
            raise UserError(f"{path} does not exist; it is a list of image names of VOC 2010's ImageSets/Main; "
                            "--lists names another folder")
        names[split] = {line.split()[0] for line in read_lines(path) if line.strip()}
        for name in names[split]:
            if "/" in name or "\\" in name:
                raise UserError(f"{path}: {name!r} is no image name of VOC 2010; correct it")
        pairs[split] = [(images / f"{name}.jpg", annotations / f"{name}.mat") for name in sorted(names[split])]
    if names["train"] & names["val"]:
        raise UserError(f"{min(names['train'] & names['val'])} is in train.txt and in val.txt; remove it from one")
    unlisted = {path.stem for path in annotations.glob("*.mat")} - names["train"] - names["val"]
    dataset = "pascal-part" if parts else "pascal-object"
    prepare(dataset, target, pairs, CLASS_NAMES[dataset], partial(read_pascal, parts=parts), workers,
            left_out=len(unlisted), left_out_reason="annotated, but neither in train.txt nor in val.txt")


def read_pascal(path: Path, parts: bool) -> np.ndarray:
    """The parts or the objects of one Pascal-Part file, uint8 [height, width], labels of PASCAL_PART_193 or _OBJECT_16.

    Painted as by the devkit's mat2map.m: objects and their parts in the order of the file, later over earlier. Later
    objects do not clear parts; objects of a class without parts cover objects with 0. ValueError for an unknown name.
    """
    objects = import_loadmat()(path)["anno"][0, 0]["objects"].ravel()
    labels = np.zeros(objects[0]["mask"].shape, dtype=np.uint8)
    for item in objects:
        name = str(item["class"][0])
        if name not in PASCAL_OBJECT_16 + PASCAL_WITHOUT_PARTS:
            raise ValueError(f"unknown class {name}")
        if not parts:
            labels[item["mask"] > 0] = PASCAL_OBJECT_16.index(name) + 1 if name in PASCAL_OBJECT_16 else 0
            continue
        for part in item["parts"].ravel():
            family = str(part["part_name"][0]).rstrip("0123456789").removesuffix("_")
            if f"{name} {family}" not in PASCAL_PART_193:
                raise ValueError(f"unknown part {part['part_name'][0]} of {name}")
            labels[part["mask"] > 0] = PASCAL_PART_193.index(f"{name} {family}") + 1
    return labels


FUNCTIONS: dict[str, Callable] = {
    "ade20k-object": prepare_ade20k_object,
    "ade20k-part": prepare_ade20k_part,
    "pascal-object": partial(prepare_pascal, parts=False),
    "pascal-part": partial(prepare_pascal, parts=True),
    "lip": prepare_lip,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Raises UserError for a user's mistake and, after the report, if an image could not be prepared."""
    parser = OneLineParser(__doc__, prog="python -m datasets.prepare")
    commands = parser.add_subparsers(dest="dataset", required=True, metavar="{" + ",".join(FUNCTIONS) + "}")
    for name in FUNCTIONS:
        command = commands.add_parser(name)
        command.add_argument("--source", type=Path, required=True, metavar="DIR", help="the unpacked release")
        command.add_argument("--target", type=Path, required=True, metavar="DIR", help="where to make the folder")
        command.add_argument("--workers", type=number(int, 1, 256), default=min(256, os.cpu_count() or 1),
                             help="processes (default: %(default)s)")
        if name.startswith("ade20k"):
            command.add_argument("--classes", type=Path, metavar="FILE",
                                 help="names of the classes to keep, one a line, in label order")
        if name.startswith("pascal"):
            command.add_argument("--lists", type=Path, metavar="DIR",
                                 help="folder of train.txt and val.txt (default: the source's ImageSets/Main)")
    options = vars(parser.parse_args(arguments))
    if not options["source"].is_dir():
        raise UserError(f"--source {options['source']} is not a folder; give the unpacked release")
    options.pop("changed")  # for tables
    FUNCTIONS[options.pop("dataset")](**options)


if __name__ == "__main__":
    exit_with_one_line_errors(main)
