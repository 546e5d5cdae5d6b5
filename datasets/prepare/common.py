"""What preparing any segmentation data set needs: find the source, convert image by image, report (see prepare.py)."""

import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from utils import UserError
from utils.run import Progress, open_output
from utils.storage import atomic_write


class Item(NamedTuple):
    image: Path
    annotation: Path
    target_image: Path
    target_labels: Path


def first_folder(source: Path, candidates: Sequence[str], expected: str) -> Path:
    """The first of the candidates that is a folder in source. Raises UserError naming the expected tree if none is."""
    for candidate in candidates:
        if (source / candidate).is_dir():
            return source / candidate
    raise UserError(f"{source} has no folder {candidates[0]}; expected with --source DIR: {expected}")


def pair_by_name(images: Path, annotations: Path, target_images: Path, target_labels: Path) -> list[Item]:
    """An Item for every name in either folder: where one file is missing, reading it fails and is reported."""
    names = sorted({path.stem for path in images.glob("*.jpg")} | {path.stem for path in annotations.glob("*.png")})
    return [Item(images / f"{name}.jpg", annotations / f"{name}.png",
                 target_images / f"{name}.jpg", target_labels / f"{name}.png") for name in names]


def read_index_map(path: Path) -> np.ndarray:
    """A PNG of class numbers (grey or palette) as it is, uint8 [height, width]. Raises ValueError for other PNGs."""
    with Image.open(path) as image:
        if image.mode not in ("L", "P"):
            raise ValueError(f"{path.name} is a PNG of mode {image.mode}, not an 8-bit map of class numbers")
        return np.asarray(image)


def apply_table(labels: np.ndarray, table: np.ndarray) -> np.ndarray:
    """table[labels]. Raises ValueError for a label beyond the table."""
    if labels.max(initial=0) >= len(table):
        raise ValueError(f"label {labels.max()} is above {len(table) - 1}")
    return table[labels]


def read_name_list(path: Path) -> list[str]:
    """The lines of a file of class names. Raises UserError if it is missing or empty or repeats a name."""
    if not path.is_file():
        raise UserError(f"--classes {path} does not exist; it is a text file of class names, one a line")
    names = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not names or len(set(names)) < len(names):
        raise UserError(f"--classes {path} is empty or repeats a name; it is one name a line, each once")
    return names


def import_loadmat() -> Callable:
    try:
        from scipy.io import loadmat
    except ImportError:
        raise UserError("reading .mat files needs scipy; install it with: pip install scipy") from None
    return loadmat


def prepare_one(item: Item, read_labels: Callable[[Path], np.ndarray]) -> tuple[str, str]:
    """Writes one image and its label map. Returns what was done and, for "failed", why."""
    if item.target_image.is_file() and item.target_labels.is_file():
        return "complete already", ""
    for path in (item.image, item.annotation):
        if not path.is_file():
            return "failed", f"{path} is missing"
    try:
        labels = read_labels(item.annotation)
        with Image.open(item.image) as image:
            image.load()
            if image.size != labels.shape[::-1]:
                raise ValueError(f"the image is {image.size}, the annotation {labels.shape[::-1]} (width, height)")
    # Whatever a damaged file raises, it is named in the report, and the other images are still prepared.
    except Exception as error:
        return "failed", f"{type(error).__name__}: {' '.join(str(error).split())}"
    atomic_write(item.target_image, lambda path: shutil.copyfile(item.image, path))
    atomic_write(item.target_labels, lambda path: Image.fromarray(labels).save(path, format="PNG"))
    return ("made" if labels.any() else "made, with no labelled pixel"), ""


def in_parallel(function: Callable, items: Sequence, workers: int, label: str) -> list:
    """[function(item) for item in items] in that many processes, with progress. Raises UserError if a process dies."""
    progress, results = Progress(len(items), label, "images"), []
    if workers == 1:
        for item in items:
            results.append(function(item))
            progress.update()
        return results
    try:
        with ProcessPoolExecutor(workers) as pool:
            for result in pool.map(function, items, chunksize=8):
                results.append(result)
                progress.update()
    except BrokenProcessPool:
        raise UserError("a worker process was killed, perhaps for want of memory; "
                        "run again with fewer --workers, what is done is kept") from None
    return results


def write_text(path: Path, text: str) -> None:
    atomic_write(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def start_target(root: Path, names: Sequence[str], folders: Sequence[Path]) -> None:
    """Makes the folders and names.txt. Raises UserError where maps of another or an unknown class list are there."""
    open_output(root)
    path, text = root / "names.txt", "\n".join(names) + "\n"
    if path.is_file() and path.read_text(encoding="utf-8") != text:
        raise UserError(f"{path} is the class list of an earlier run and differs from this one's; "
                        "remove that folder or name another with --target")
    if not path.is_file() and any(next(folder.glob("*.png"), None) for folder in folders):
        raise UserError(f"{root} holds label maps without names.txt, not made here; name another folder with --target")
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    write_text(path, text)


def prepare(root: Path, items: dict[str, list[Item]], names: Sequence[str], read_labels: Callable[[Path], np.ndarray],
            workers: int, left_out: dict[str, int] | None = None) -> None:
    """Converts all items and prints the report.

    items: by split, "train" and "val". read_labels: annotation -> uint8 [height, width], 0 = other, k = names[k - 1].
    left_out: how many images each rule leaves out. Raises UserError, after the report, if an image failed.
    """
    for split, listed in items.items():
        if not listed:
            raise UserError(f"{root.name}: no images for the split {split} in --source; both splits are needed")
    everything = items["train"] + items["val"]
    start_target(root, names, sorted({path.parent for item in everything
                                      for path in (item.target_image, item.target_labels)}))
    try:
        results = in_parallel(partial(prepare_one, read_labels=read_labels), everything, workers, root.name)
    except OSError as error:
        raise UserError(f"{error.filename or root}: {error.strerror or error}; mend it and run again, "
                        "what is done is kept") from None
    print(f"{root}: {len(names)} classes, {len(items['train'])} images for training, "
          f"{len(items['val'])} for validation")
    for what, count in sorted(Counter(outcome for outcome, _ in results).items()):
        print(f"  {count} {what}")
    for rule, count in (left_out or {}).items():
        if count:
            print(f"  {count} left out: {rule}")
    failed = [f"{item.annotation}\t{reason}\n"
              for item, (outcome, reason) in zip(everything, results, strict=True) if outcome == "failed"]
    raise_failures(root, failed, len(everything))


def raise_failures(root: Path, failed: list[str], total: int) -> None:
    """Writes the lines "file, tab, reason" to root/failed.txt and raises UserError; without any, removes that file."""
    report = root / "failed.txt"
    if not failed:
        report.unlink(missing_ok=True)
        return
    write_text(report, "".join(failed))
    raise UserError(f"{len(failed)} of {total} images could not be prepared, the first: {failed[0].strip()}; "
                    f"all are in {report}; mend them and run again, what is done is kept")
