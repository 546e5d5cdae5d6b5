"""Label maps: which belongs to which image, how its file is read, and what may be wrong with those of a whole split."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from utils import UserError

from .files import open_image, picture_size
from .segmentation_transforms import IGNORE


def pair_files(images: Path, labels: Path) -> tuple[list[tuple[Path, Path]], list[str]]:
    """Sorted pairs (image, label map), and a note on each folder with files of other suffixes. Hidden files are passed
    over. Raises UserError for two images of one name, and where a file has no partner."""
    notes = []

    def by_stem(folder: Path, *suffixes: str) -> dict[str, Path]:
        shown = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
        read = [path for path in shown if path.suffix.lower() in suffixes]
        if others := [path for path in shown if path.suffix.lower() not in suffixes and path.is_file()]:
            notes.append(f"{len(others)} files were not read (another suffix), the first {others[0]}")
        found = {path.stem: path for path in read}
        if not len(found) == len(read) > 0:
            raise UserError(f"{folder} holds {len(read)} files ({', '.join(suffixes)}) of {len(found)} names; every "
                            "image needs one, and one only")
        return found

    image_files, label_files = by_stem(images, ".jpg", ".jpeg", ".png"), by_stem(labels, ".png")
    for alone, what, missing in ((image_files.keys() - label_files.keys(), "images", f"label map in {labels}"),
                                 (label_files.keys() - image_files.keys(), "label maps", f"image in {images}")):
        if alone:
            raise UserError(f"{len(alone)} {what} have no {missing}, the first {min(alone)}; add or remove them")
    return [(image_files[stem], label_files[stem]) for stem in sorted(image_files)], notes


def label_map_size(pair: tuple[Path, Path]) -> tuple[int, int]:
    """(height, width) of a label map. pair: of its image and itself. Raises UserError for an image of another size,
    stored or upright."""
    image, label = pair
    width, height = picture_size(label)
    stored = picture_size(image)
    if stored != (width, height) != picture_size(image, upright=True):
        raise UserError(f"{image} has {stored[0]} x {stored[1]} pixels, its label map {label} {width} x {height}; "
                        "replace one of the two files")
    return height, width


def require_png(path: Path, image: Image.Image) -> None:
    """Raises UserError where the picture in a file of labels is in another format, as JPEG, which changes labels."""
    if image.format != "PNG":
        raise UserError(f"{path} is a {image.format} file; save the label map as PNG, from where it was made")


def read_label_map(path: Path, largest: int) -> np.ndarray:
    """The numbers in a PNG of one channel, integers [H, W]: indices of a palette, grey values of 1 to 16 bits as they
    are. Raises UserError for another format, colours, and a label above largest but 255."""
    with open_image(path) as image:
        require_png(path, image)
        if image.mode not in ("1", "L", "P", "I", "I;16"):  # grey values or a palette
            raise UserError(f"{path} is a picture of mode {image.mode}; a label map holds one class number per pixel")
        raw = np.asarray(image, dtype=np.uint8 if image.mode == "1" else None)
        if image.mode == "L":
            # Pillow scales the values of 2 and 4 bits to 0 to 255; the depth is in the first chunk of a PNG.
            with open(path, "rb") as file:
                depth = file.read(25)[24]
            raw = raw // (255 // (2**depth - 1))
    above = raw[(raw > largest) & (raw != IGNORE)]
    if above.size:
        raise UserError(f"{path}: label {above.max()} is above the class count {largest}; "
                        "is it the label map of another data set? (python -m datasets.prepare)")
    return raw


def reduce_label(raw: np.ndarray, background: int = 0) -> np.ndarray:
    """uint8: 0 -> 255, 255 -> 255, the others one less. With another background than 0, whose classes count from 0:
    background -> 255, the others as they are."""
    reduced = raw.astype(np.uint8) - np.uint8(not background)  # 0 - 1 is 255
    reduced[raw == (background or IGNORE)] = IGNORE
    return reduced


def require_labelled(pixels: Sequence[int], what: str) -> None:
    """Raises UserError where no pixel has a class. pixels: of each class. what: whose, as "training"."""
    if not any(pixels):
        raise UserError(f"no pixel of the {what} label maps has a class: all are 0, 255 or background")


def check_labels(train_split, test_split, workers: int, log: Callable[[str], None], held_out=None) -> None:
    """Reads the label maps of one's own data set once, before anything is trained on them.

    train_split, held_out (or None), test_split: FolderSplit. Raises UserError where a split has no labelled pixel, and
    where label 0 occurs in them and the last name's label does not: then the names are mostly one off. Where images
    were drawn, or there is no training split, the last label may be elsewhere: the same is logged.
    """
    total = 0
    for what, split in (("training", train_split), ("held-out", held_out), ("test", test_split)):
        if split is not None:
            counts = split.count_labels(workers)
            first = int(not split.background)
            require_labelled(counts[first:first + split.num_classes], what)
            total = total + counts
    last = test_split.num_classes
    if test_split.background or not total[0] or total[last]:
        return
    line = (f"label 0 occurs in the label maps, and label {last}, {test_split.names[-1]}, never: if label 0 is a "
            'class, begin names.txt with a line "0 NAME"; if it is none, take out the names that never occur')
    if train_split is None or train_split.sampled or test_split.sampled:
        log(line)
    else:
        raise UserError(line)
