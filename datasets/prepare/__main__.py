"""Makes the label maps of the segmentation data sets from the original releases.

    python -m datasets.prepare pascal-part --source VOC2010 --target data
    python -m datasets.prepare pascal-object --source VOC2010 --target data
    python -m datasets.prepare ade20k-part --source ADE20K_2016_07_26 --target data
    python -m datasets.prepare ade20k-object --source ADEChallengeData2016 --target data
    python -m datasets.prepare lip --source LIP --target data

The layout is that of the authors' prepared sets: {img,ann}/{train,val} in data/pascal_part, data/pascal_semantic,
data/ADE20K_Part, data/LIP, and {images,annotations}/{training,validation} in data/ade_59object/ADEChallengeData2016.
Images are copied; label maps are 8-bit PNGs, 0 = other, k = line k of names.txt. The first file that cannot be read
ends the run; another run keeps what is finished.
"""

import os
import shutil
import signal
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from utils import UserError
from utils.run import OneLineParser, Progress, positive_int, run_main
from utils.storage import atomic_write

from ..files import read_lines, read_rgb
from ..label_maps import pair_files, read_label_map
from ..segmentation import LAYOUTS, LONG_NAMES, OTHER_LAYOUTS, ROOTS
from ..segmentation_classes import ADE20K_150, ADE20K_OBJECT_59, CLASS_NAMES, PASCAL_OBJECT_16, PASCAL_PART_193
from .ade20k_part import find_pairs, list_images, name_pairs, read_index, read_parts

PASCAL_PART_LABELS = {name: label for label, name in enumerate(PASCAL_PART_193, 1)}
PASCAL_OBJECT_LABELS = {name: label for label, name in enumerate(PASCAL_OBJECT_16, 1)}


def open_lip(args: Namespace) -> tuple[dict, Sequence[str], Callable]:
    """LIP, in any of its layouts: the labels stay, only the folders change."""
    layouts = OTHER_LAYOUTS["lip"][len(LAYOUTS):]  # not those of prepared sets
    images, labels = next((pair for pair in layouts if (args.source / pair[0].format("train")).is_dir()), layouts[0])
    pairs = {split: pair_files(args.source / images.format(split), args.source / labels.format(split))[0]
             for split in LONG_NAMES}
    return pairs, CLASS_NAMES["lip"], partial(read_and_renumber, table=np.arange(20, dtype=np.uint8))


def open_ade20k_object(args: Namespace) -> tuple[dict, Sequence[str], Callable]:
    """The paper's 59 of the 150 classes of ADEChallengeData2016, renumbered."""
    pairs = {split: pair_files(args.source / "images" / folder, args.source / "annotations" / folder)[0]
             for split, folder in LONG_NAMES.items()}
    table = np.zeros(len(ADE20K_150) + 1, dtype=np.uint8)
    for label, name in enumerate(ADE20K_OBJECT_59, 1):
        table[ADE20K_150.index(name) + 1] = label
    return pairs, ADE20K_OBJECT_59, partial(read_and_renumber, table=table)


def read_and_renumber(path: Path, table: np.ndarray) -> np.ndarray:
    """table[labels] of a label map, uint8 [height, width]. Raises UserError for labels beyond the table."""
    return table[read_label_map(path, len(table) - 1)]


def open_pascal(args: Namespace) -> tuple[dict, Sequence[str], Callable]:
    """Pascal-Part, unpacked into VOCdevkit/VOC2010, whose 10,103 training and validation images it annotates."""
    pairs = {}
    for split in LONG_NAMES:
        lines = read_lines(args.source / "ImageSets" / "Main" / f"{split}.txt")
        names = sorted({line.split()[0] for line in lines if line.strip()})
        pairs[split] = [(args.source / "JPEGImages" / f"{name}.jpg", args.source / "Annotations_Part" / f"{name}.mat")
                        for name in names]
    return pairs, CLASS_NAMES[args.dataset], partial(read_pascal, parts=args.dataset == "pascal-part")


def read_pascal(path: Path, parts: bool) -> np.ndarray:
    """The parts or the objects of one Pascal-Part file, uint8 [height, width]. Raises UserError for an unknown name.

    Painted as by the devkit's mat2map.m: objects and their parts in the order of the file, later over earlier. Later
    objects do not clear parts; objects of a class without parts cover objects with 0.
    """
    try:
        from scipy.io import loadmat
        objects = loadmat(str(path))["anno"][0, 0]["objects"].ravel()
        labels = np.zeros(objects[0]["mask"].shape, dtype=np.uint8)
        for item in objects:
            name = str(item["class"][0])
            if not parts:
                # The other four classes have no parts in Pascal-Part; the paper leaves them out.
                labels[item["mask"] > 0] = PASCAL_OBJECT_LABELS.get(name, 0)
                continue
            for part in item["parts"].ravel():
                family = str(part["part_name"][0]).rstrip("0123456789").removesuffix("_")
                labels[part["mask"] > 0] = PASCAL_PART_LABELS[f"{name} {family}"]
        return labels
    except Exception as error:  # a damaged file may raise anything
        raise UserError(f"{path} cannot be read ({type(error).__name__}: {error})") from None


def open_ade20k_part(args: Namespace) -> tuple[dict, Sequence[str], Callable]:
    """The parts that occur in both splits, with their objects; of more than 254 those in most training images."""
    class_names = read_index(args.source)
    pairs, images = {}, {}
    for split in LONG_NAMES:
        pairs[split] = list_images(args.source, split)
        found = run_all(find_pairs, [path for _, path in pairs[split]], args.workers, f"parts of {split}")
        images[split] = Counter(pair for in_one in found for pair in in_one)
    parts = name_pairs(images["train"].keys() & images["val"].keys(), class_names)
    print(f"parts in both splits: {len(parts)} with their objects, {len({part for _, part in parts.values()})} by the "
          "part's name alone; the paper: 209")
    # A label map of 8 bits has no room for more, as 0 is "other" and 255 is ignored.
    names = sorted(sorted(parts, key=lambda name: -images["train"][parts[name]])[:254])
    return pairs, names, partial(read_parts, labels={parts[name]: label for label, name in enumerate(names, 1)})


def run_all(function: Callable, items: Sequence, workers: int, label: str) -> list:
    """[function(item) for item in items], by that many processes. Raises what the first failure raises."""
    progress, results = Progress(len(items), label, "images"), []
    # Ctrl-C reaches all processes; this one alone answers it. With one worker no other is started.
    with ProcessPoolExecutor(workers, initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN)) as pool:
        for result in pool.map(function, items, chunksize=8) if workers > 1 else map(function, items):
            results.append(result)
            progress.update()
    return results


def prepare_one(item: tuple[Path, Path, Path, Path], read_labels: Callable[[Path], np.ndarray]) -> bool:
    """Writes one image and its label map; False where an earlier run has. Raises UserError for a damaged file."""
    image_path, annotation, target_image, target_labels = item
    if target_image.is_file() and target_labels.is_file():
        return False
    labels = read_labels(annotation)
    read_rgb(image_path, labels.shape[::-1])  # raises UserError for a damaged image and for one of another size
    atomic_write(target_image, lambda path: shutil.copyfile(image_path, path))
    atomic_write(target_labels, lambda path: Image.fromarray(labels).save(path, format="PNG"))
    return True


OPEN = {"ade20k-object": open_ade20k_object, "ade20k-part": open_ade20k_part, "lip": open_lip,
        "pascal-object": open_pascal, "pascal-part": open_pascal}


def main(words: Sequence[str] | None = None) -> None:
    parser = OneLineParser(__doc__, prog="python -m datasets.prepare")
    parser.add_argument("dataset", choices=OPEN)
    parser.add_argument("--source", type=Path, required=True, metavar="DIR", help="the unpacked release")
    parser.add_argument("--target", type=Path, required=True, metavar="DIR", help="where to make the folder")
    parser.add_argument("--workers", type=positive_int, default=os.cpu_count(), help="processes (default: %(default)s)")
    args = parser.parse_args(words)

    pairs, names, read_labels = OPEN[args.dataset](args)
    root, layout = args.target / ROOTS[args.dataset][0], LAYOUTS[args.dataset == "ade20k-object"]
    items, names_file, text = [], root / "names.txt", "".join(f"{name}\n" for name in names)
    same_list = names_file.is_file() and names_file.read_bytes() == text.encode()
    for split, listed in pairs.items():
        if not listed:
            raise UserError(f"--source {args.source}: no images for the split {split}; both splits are needed")
        images, labels = (root / folder.format(split, LONG_NAMES[split]) for folder in layout)
        if next(labels.glob("*.png"), None) and not same_list:
            raise UserError(f"{root} holds maps of another class list; remove that folder or use another --target")
        images.mkdir(parents=True, exist_ok=True)
        labels.mkdir(parents=True, exist_ok=True)
        items += [(*pair, images / pair[0].name, labels / f"{pair[0].stem}.png") for pair in listed]
    atomic_write(names_file, lambda path: path.write_text(text, encoding="utf-8"))
    made = run_all(partial(prepare_one, read_labels=read_labels), items, args.workers, root.name)
    print(f"{root}: {len(names)} classes, {len(pairs['train'])} images for training, {len(pairs['val'])} for "
          f"validation, {made.count(False)} of them finished earlier")


if __name__ == "__main__":
    # Its functions by a name under which new processes can import them, where they are not forked.
    from datasets.prepare import __main__ as importable
    run_main(importable.main)
