"""results.jsonl, a line for each finished run: written and read. utils.tables makes tables of it."""

import json
import os
import re
from argparse import Namespace
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from . import UserError
from .distributed import is_main, world_size
from .ending import ending
from .provenance import NAME_ENCODER, NO_EFFECT, this_run


def run_slug(name: str) -> str:
    """A run's name as the beginning of file names: timm/vit_tiny -> timm-vit_tiny."""
    return re.sub(r"[^\w.+-]+", "-", name)


def args_to_json(args: Namespace) -> dict:
    """The arguments as values that JSON can hold: paths, inf and nan become strings, tuples lists."""
    return json.loads(json.dumps(vars(args), default=str), parse_constant=str)


def settings_of(args: Namespace) -> dict:
    """The arguments that must be the same when a run is resumed, as values that JSON can hold."""
    return {name: value for name, value in args_to_json(args).items() if name not in NO_EFFECT | NAME_ENCODER}


def start_line(task: str, args: Namespace, encoder: object) -> dict:
    """The first keys of a results line; encoder has weights, sha256 and cls_from."""
    return {"task": task, "name": args.name, "model": args.model, "weights": encoder.weights, "sha256": encoder.sha256,
            "cls_from": encoder.cls_from, "dataset": args.dataset, "world_size": world_size(),
            "precision": args.precision, "seed": args.seed, "args": args_to_json(args)}


def append_result(folder: Path, *results: dict) -> None:
    """Appends the results and what run they are of to results.jsonl, from the main process, in one write: runs may
    share a folder. Raises UserError, on all processes, where a figure is not finite and, having printed the lines,
    where a file of the run could not be written."""
    path, text = folder / "results.jsonl", ""
    for result in results:
        for name, value in result.items():
            try:
                json.dumps(value, allow_nan=False)
            except ValueError:
                raise UserError(f"{name} of the result is not finite; no line is written") from None
        text += json.dumps(result | this_run()) + "\n"
    if not is_main():
        return
    problem = next(iter(ending.unsaved.values()), "")
    try:
        if not problem:
            append_text(path, text)
    except OSError as error:
        problem = f"{path} could not be written ({error.strerror})"
    if problem:
        print(text, end="", flush=True)
        raise UserError(f"{problem}; the result is what standard output ends in: append it to {path}")


def append_text(path: Path, text: str) -> None:
    """Appends whole lines in one write, on a new line where a run that was killed left half of one."""
    with open(path, "ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            text = text if file.read(1) == b"\n" else "\n" + text
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())


def is_finished(folder: Path, probe: str, line: dict) -> bool:
    """Whether results.jsonl has the line of a run's probe. line: its start, with "made_with", a digest of all that its
    figures depend on."""
    same = {"probe": probe, **{key: line[key] for key in ("task", "name", "made_with")}}
    with suppress(UserError):
        return any(result | same == result for result in read_results(folder)[0])
    return False


def read_results(folder: Path, needed: Iterable[str] = (), task: str | None = None) -> tuple[list[dict], list[str]]:
    """The results lines of a folder, or of one task, oldest first, and a note on each line that is none. A line of an
    older version may lack keys, but all that are returned have strings at task, dataset and model, and those of the
    task its needed keys. Raises UserError where there is no result."""
    path, results, notes = folder / "results.jsonl", [], []
    if not path.is_file():
        raise UserError(f"{path} does not exist; name the folder of a finished run, or run without --table first")
    for number, line in enumerate(path.read_bytes().decode(errors="replace").split("\n"), 1):
        try:
            result = json.loads(line)
            result["model"] = result.get("model", result.get("name"))
            missing = [key for key in ("task", "dataset", "model") if not isinstance(result.get(key), str)]
            missing += [key for key in needed if result.get("task") == task and key not in result]
            reason = ", ".join(f"no {key}" for key in missing)
        except (ValueError, RecursionError, TypeError, AttributeError):
            reason = "not whole JSON"
        if not reason:
            results.append(result)
        elif line.strip():
            notes.append(f"{path}, line {number}, is not a results line ({reason}); left out")
    if not results:
        raise UserError(notes[0] if notes else f"{path} is empty; run without --table first")
    if len(notes) > 20:
        notes[20:] = [f"{len(notes) - 20} more such lines"]
    return [result for result in results if task in (None, result["task"])], notes


def caveats(result: dict) -> str:
    """What must stand wherever the result is printed: random weights, synthetic data; "" for neither."""
    random = "random weights" if result.get("weights") == "random" else ""
    synthetic = "synthetic data" if result["dataset"].startswith("synthetic") else ""
    return ", ".join(filter(None, (random, synthetic)))


def with_marks(name: str, marks: str, separator: str = " ") -> str:
    return f"{name}{separator}({marks})" if marks else name


def run_title(result: dict) -> str:
    """Model, data set and caveats of a result: "ibot on synthetic (random weights, synthetic data)"."""
    return with_marks(f"{result.get('name', result['model'])} on {result['dataset']}", caveats(result))
