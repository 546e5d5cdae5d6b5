"""What preparing any segmentation data set needs: find the source, convert image by image, report."""

import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from utils import UserError
from utils.ending import ending
from utils.run import Progress, open_output
from utils.storage import atomic_write

from ..segmentation import LAYOUTS, LONG_NAMES, ROOTS


def first_folder(source: Path, candidates: Sequence[str], expected: str) -> Path:
    """The first of the candidates that is a folder in source. Raises UserError with the expected tree if none is."""
    for candidate in candidates:
        if (source / candidate).is_dir():
            return source / candidate
    raise UserError(f"{source} has no folder {candidates[0]}; expected with --source DIR: {expected}")


def pair_by_name(images: Path, annotations: Path) -> list[tuple[Path, Path]]:
    """(image, annotation) for every name in either folder. A missing file is reported when it is read."""
    names = sorted({path.stem for path in images.glob("*.jpg")} | {path.stem for path in annotations.glob("*.png")})
    return [(images / f"{name}.jpg", annotations / f"{name}.png") for name in names]


def read_index_map(path: Path) -> np.ndarray:
    """A grey or palette PNG of class numbers as uint8 [height, width]. Raises ValueError for other PNGs."""
    with Image.open(path) as image:
        if image.mode not in ("L", "P"):
            raise ValueError(f"{path.name} is a PNG of mode {image.mode}, not an 8-bit map of class numbers")
        return np.asarray(image)


def import_loadmat() -> Callable:
    try:
        from scipy.io import loadmat
    except ImportError:
        raise UserError("reading .mat files needs scipy; install it with: pip install scipy") from None
    return loadmat


def attempt(item, function: Callable) -> tuple[object, str]:
    """(function(item), ""), or (None, what went wrong): a damaged file may raise anything, and does not stop others."""
    try:
        return function(item), ""
    except UserError:
        raise
    except Exception as error:
        return None, f"{type(error).__name__}: {' '.join(str(error).split())}"


def attempt_all(function: Callable, items: Sequence, workers: int, label: str) -> tuple[list, list[str]]:
    """(results, errors) of attempt on all items, by that many processes. Raises UserError if a process is killed."""
    progress, outcomes, function = Progress(len(items), label, "images"), [], partial(attempt, function=function)
    try:
        with ProcessPoolExecutor(workers) if workers > 1 else nullcontext() as pool:
            for outcome in pool.map(function, items, chunksize=8) if pool else map(function, items):
                outcomes.append(outcome)
                progress.update()
    except BrokenProcessPool:
        raise UserError("a worker process was killed, perhaps because memory ran out; "
                        "run again with fewer --workers, finished files are kept") from None
    return [result for result, _ in outcomes], [error for _, error in outcomes]


def raise_failures(root: Path, items: Sequence[tuple[Path, ...]], errors: Sequence[str]) -> None:
    """Writes the lines "annotation, tab, error" of (image, annotation, ...) to root/failed.txt and raises UserError;
    removes the file if none failed."""
    report = root / "failed.txt"
    failed = [f"{annotation}\t{error}\n" for (_, annotation, *_), error in zip(items, errors, strict=True) if error]
    if not failed:
        report.unlink(missing_ok=True)
        return
    write_text(report, "".join(failed))
    raise UserError(f"{len(failed)} of {len(items)} images could not be prepared, the first: {failed[0].strip()}; "
                    f"all are in {report}; repair them and run again, finished files are kept")


def write_text(path: Path, text: str) -> None:
    atomic_write(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def prepare(dataset: str, target: Path, pairs: dict[str, list[tuple[Path, Path]]], names: Sequence[str],
            read_labels: Callable[[Path], np.ndarray], workers: int, layout: tuple[str, str] = LAYOUTS[0],
            left_out: int = 0, left_out_reason: str = "") -> None:
    """Converts all (image, annotation) pairs of the splits "train" and "val", and prints a report.

    read_labels: annotation -> uint8 [height, width], 0 = other, k = names[k - 1]. left_out: how many images.
    Raises UserError where the target holds maps of another class list and, after the report, if an image failed.
    """
    root, items, folders = target / ROOTS[dataset][0], [], []
    for split, listed in pairs.items():
        if not listed:
            raise UserError(f"{root.name}: no images for the split {split} in --source; both splits are needed")
        targets = [root / folder.format(split, LONG_NAMES[split]) for folder in layout]
        folders += targets
        items += [(*pair, *targets) for pair in listed]
    open_output(root)
    path, text = root / "names.txt", "\n".join(names) + "\n"
    if path.is_file() and path.read_bytes() != text.encode():
        raise UserError(f"{path} is the class list of an earlier run and differs from this one's; "
                        "remove that folder or use another --target")
    if not path.is_file() and any(next(folder.glob("*.png"), None) for folder in folders):
        raise UserError(f"{root} holds label maps without names.txt, not made here; use another --target")
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    write_text(path, text)

    ending.saved = "finished files are kept; run again for the others"
    outcomes, errors = attempt_all(partial(prepare_one, read_labels=read_labels), items, workers, root.name)
    print(f"{root}: {len(names)} classes, {len(pairs['train'])} images for training, "
          f"{len(pairs['val'])} for validation")
    for outcome, count in sorted(Counter(outcome or "failed" for outcome in outcomes).items()):
        print(f"  {count} {outcome}")
    if left_out:
        print(f"  {left_out} left out: {left_out_reason}")
    raise_failures(root, items, errors)


def prepare_one(item: tuple[Path, Path, Path, Path], read_labels: Callable[[Path], np.ndarray]) -> str:
    """Writes one image and its label map; says what was done. Raises UserError where they cannot be written."""
    image_path, annotation, image_folder, label_folder = item
    target_image, target_labels = image_folder / image_path.name, label_folder / f"{image_path.stem}.png"
    if target_image.is_file() and target_labels.is_file():
        return "complete already"
    for path in (image_path, annotation):
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing")
    labels = read_labels(annotation)
    with Image.open(image_path) as image:
        image.load()
        if image.size != labels.shape[::-1]:
            raise ValueError(f"the image is {image.size}, the annotation {labels.shape[::-1]} (width, height)")
    try:
        atomic_write(target_image, lambda path: shutil.copyfile(image_path, path))
        atomic_write(target_labels, lambda path: Image.fromarray(labels).save(path, format="PNG"))
    except OSError as error:
        raise UserError(f"{error.filename or target_image}: {error.strerror or error}; correct this and run again, "
                        "finished files are kept") from None
    return "made" if labels.any() else "made, with no labelled pixel"
