"""results.jsonl, a line for each finished run, and what must be equal where a run goes on or a head is used again."""

import hashlib
import json
import re
import secrets
import subprocess
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from functools import cache
from importlib import metadata
from pathlib import Path

import torch

from . import UserError
from .distributed import is_main, world_size
from .storage import load

# Arguments of all scripts that no figure depends on: where things lie, what is written, where it runs. A run may be
# resumed with others (what lies in a data set is compared apart), and tables do not mark them.
NO_EFFECT = frozenset((
    "annotations", "cache", "changed", "checkpoint_every", "compile", "data_path", "device",
    "figure6", "format", "images", "name", "output_dir", "pictures", "plot_format", "query", "resume", "save_features",
    "save_pictures", "save_plots", "table", "top", "workers"))
# Arguments that name an encoder; its signature is compared in their place.
NAME_ENCODER = frozenset(("weights", "weights_key", "num_heads"))


@cache
def this_run() -> dict:
    """What every results line says of its run: id, date and time of its start (UTC), revision (the commit of this code,
    "-dirty" where the files differ from it, "unknown" outside a checkout), versions of packages."""
    packages = ("torch", "torchvision", "timm", "numpy", "pillow")
    found = subprocess.run("git describe --always --dirty --exclude '*'", shell=True, cwd=Path(__file__).parent,
                           capture_output=True, text=True)
    return {"run": secrets.token_hex(6), "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "revision": found.stdout.strip() or "unknown",
            "versions": {name: metadata.version(name) for name in packages}}


def digest(*values: object) -> str:
    """SHA-256, in hexadecimal digits, of tensors (type, shape, content), plain values, and mappings and sequences of
    them."""
    found = hashlib.sha256()
    for value in values:
        if isinstance(value, torch.Tensor):
            found.update(f"{value.dtype} {tuple(value.shape)}\0".encode())
            found.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        elif isinstance(value, Mapping):
            found.update(f"mapping {digest(*value, *value.values())}\0".encode())
        elif isinstance(value, list | tuple):
            found.update(f"sequence {digest(*value)}\0".encode())
        else:
            found.update(f"{value!r}\0".encode())
    return found.hexdigest()


def args_to_json(args: Namespace) -> dict:
    """The arguments as values that JSON can hold: paths, inf and nan become strings, tuples lists."""
    return json.loads(json.dumps(vars(args), default=str), parse_constant=str)


def settings_of(args: Namespace) -> dict:
    """The arguments that must be the same when a run is resumed, as values that JSON can hold."""
    return {name: value for name, value in args_to_json(args).items() if name not in NO_EFFECT | NAME_ENCODER}


def equal(one: object, other: object) -> bool:
    """Whether two settings are the same; tensors (signatures of encoders) within rounding."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.shape == other.shape and bool((one - other).abs().max() <= 1e-3 * other.abs().max())
    return type(one) is type(other) and one == other


def check_same(path: Path, saved: Mapping, current: Mapping, option: str = "--resume",
               mend: str = "give the same arguments and data, or start without --resume") -> None:
    """Raises UserError that names all that differs between what made the file at path (saved) and what is to use it
    (current): values by their names in words. option: what named the file; mend: what the user can do."""
    differences = []
    for name in {**saved, **current}:
        was, now = saved.get(name), current.get(name)
        if not equal(was, now):
            if isinstance(now, torch.Tensor) or len(f"{was}{now}") > 120:
                differences.append(f"{name} differs from when {path} was written")
            else:
                differences.append(f"{name} was {was} when {path} was written and is {now} now")
    if differences:
        raise UserError(f"{option}: {'; '.join(differences)}; {mend}")


def resume_from(path: Path, settings: Mapping, keys: Sequence[str], log: Callable[[str], None]) -> dict:
    """The content of the checkpoint at path: its "settings" and these keys; {} where there is none. Raises UserError
    for a file that is no checkpoint, and for one of other settings."""
    if not path.exists():
        log(f"{path} does not exist: starting from the beginning")
        return {}
    saved = load(path, "a checkpoint", ("settings", *keys), "--resume: ")
    check_same(path, saved["settings"], settings)
    return saved


def start_line(task: str, args: Namespace, encoder: object) -> dict:
    """The first keys of a results line; encoder has weights, sha256, cls_from and signature (models.load_encoder)."""
    return {"task": task, "name": args.name, "model": args.model, "weights": encoder.weights, "sha256": encoder.sha256,
            "signature": [round(value, 4) for value in encoder.signature[:8].tolist()], "cls_from": encoder.cls_from,
            "dataset": args.dataset, "world_size": world_size(), "precision": args.precision, "seed": args.seed,
            "args": args_to_json(args)}


def append_result(folder: Path, *results: dict) -> None:
    """Appends the results, and what run they are of, to results.jsonl, from the main process, in one write: runs may
    share a folder. Raises UserError, on all processes, where a figure is not finite."""
    try:
        lines = [json.dumps(result | this_run(), allow_nan=False) + "\n" for result in results]
    except ValueError:
        raise UserError("a figure of the result is not finite; no line is written") from None
    if is_main():
        with open(folder / "results.jsonl", "a") as file:
            file.write("".join(lines))


def is_finished(folder: Path, probe: str, line: dict) -> bool:
    """Whether results.jsonl has the line of a run's probe. line: its start, with "made_with", a digest of all settings
    and data that its figures depend on."""
    same = {"probe": probe, **{key: line[key] for key in ("task", "name", "made_with")}}
    if not (folder / "results.jsonl").is_file():
        return False
    return any(result | same == result and equal(*(torch.tensor(one["signature"]) for one in (result, line)))
               for result in read_results(folder, line["task"]))


def read_results(folder: Path, task: str | None = None) -> list[dict]:
    """The results lines of a folder, or of one task, oldest first. Raises UserError where there is no file, and at a
    line that is not JSON."""
    path, results = folder / "results.jsonl", []
    if not path.is_file():
        raise UserError(f"{path} does not exist; name the folder of a finished run, or run without --table first")
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            results.append(json.loads(line))
        except ValueError:
            raise UserError(f"{path}, line {number}, is not whole; remove it") from None
    return [result for result in results if task in (None, result["task"])]


def run_slug(name: str) -> str:
    """A run's name as the beginning of file names: timm/vit_tiny -> timm-vit_tiny."""
    return re.sub(r"[^\w.+-]+", "-", name)


def caveats(result: dict) -> str:
    """What must stand wherever the result is printed: " (random weights, synthetic data)", or "" for neither."""
    notes = {"random weights": result.get("weights") == "random",
             "synthetic data": result["dataset"].startswith("synthetic")}
    shown = ", ".join(note for note, holds in notes.items() if holds)
    return f" ({shown})" if shown else ""


def run_title(result: dict) -> str:
    """Model, data set and caveats of a result: "ibot on synthetic (random weights, synthetic data)"."""
    return f"{result['name']} on {result['dataset']}{caveats(result)}"
