"""Results: results.jsonl, written and read, and tables of ours beside the paper's."""

import json
import os
import subprocess
from argparse import Namespace
from collections.abc import Iterable, Sequence
from pathlib import Path

from . import UserError
from .distributed import is_main, world_size

PAPER_TABLES = Path(__file__).with_name("paper_tables.json")


def revision() -> str:
    """The commit of this code, with "+changes" where the files differ from it; "unknown" outside a checkout."""
    def git(*words):
        return subprocess.run(("git", *words), cwd=Path(__file__).parent, capture_output=True, text=True,
                              check=True).stdout.strip()
    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def args_to_json(args: Namespace) -> dict:
    """The arguments as values that JSON can hold."""
    def convert(value):
        if isinstance(value, (list, tuple)):
            return [convert(item) for item in value]
        return str(value) if isinstance(value, Path) else value
    return {name: convert(value) for name, value in vars(args).items()}


def start_line(task: str, args: Namespace, encoder: object) -> dict:
    """What a results line begins with: task, model and its weights (encoder has weights and sha256), data set, and how
    the run was started."""
    return {"task": task, "model": args.model, "weights": encoder.weights, "sha256": encoder.sha256,
            "dataset": args.dataset, "world_size": world_size(), "precision": args.precision, "seed": args.seed,
            "args": args_to_json(args)}


def append_result(folder: Path, result: dict) -> None:
    """Appends one line to results.jsonl, from the main process, in one write, so that runs that share a folder do not
    mix their lines."""
    if not is_main():
        return
    line = json.dumps(result) + "\n"
    with open(folder / "results.jsonl", "a") as file:
        file.write(line)
        file.flush()
        os.fsync(file.fileno())


def read_results(folder: Path, task: str) -> list[dict]:
    """The results lines of one task, oldest first. Raises UserError where there is no file or a line is no result."""
    path = folder / "results.jsonl"
    if not path.is_file():
        raise UserError(f"{path} does not exist; run without --table first, or name its folder with --output-dir")
    results = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            result = json.loads(line)
            if not {"task", "model", "weights", "dataset", "args"} <= result.keys():
                raise ValueError
        except (ValueError, AttributeError):
            raise UserError(f"{path}, line {number}, is not a results line; remove it") from None
        results.append(result)
    return [result for result in results if result["task"] == task]


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def beside_published(published: float | None, ours: float | None) -> list[str]:
    """Three cells: published, ours, difference; "-" where one is missing."""
    show = [f"{value:.1f}" if value is not None else "-" for value in (published, ours)]
    both = published is not None and ours is not None
    return [*show, f"{ours - published:+.1f}" if both else "-"]


def caveats(result: dict) -> str:
    """What must stand wherever the result is printed: random weights, synthetic data; "" for neither."""
    marks = []
    if result["weights"] == "random":
        marks.append("random weights")
    if result["dataset"].startswith("synthetic"):
        marks.append("synthetic data")
    return ", ".join(marks)


def run_title(result: dict) -> str:
    """Model, data set and caveats of a result: "ibot on synthetic (random weights, synthetic data)"."""
    marks = caveats(result)
    return f"{result['model']} on {result['dataset']}" + (f" ({marks})" if marks else "")
