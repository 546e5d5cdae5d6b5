"""What a figure depends on: the arguments that matter, and what made each file that a later run uses."""

import hashlib
import os
import secrets
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime, timezone
from functools import cache
from importlib import metadata
from itertools import zip_longest
from pathlib import Path

import torch

from . import UserError

PACKAGES = ("torch", "torchvision", "timm", "numpy", "pillow")

# Arguments of all scripts that no figure depends on: where things lie, what is written, where it runs. A run may be
# resumed with others (what lies in a data set is compared apart), and tables do not mark them.
NO_EFFECT = frozenset((
    "annotations", "cache", "cache_dir", "changed", "checkpoint_every", "checkpoint_seconds", "columns", "compile",
    "data_path", "debug", "device", "eval_every", "figure6", "format", "images", "name", "output_dir", "pictures",
    "query", "resume", "save_features", "save_pictures", "save_plots", "table", "top", "workers"))
# Arguments that name an encoder, whose identity (models.features.encoder_identity) is compared in their place.
NAME_ENCODER = frozenset(("weights", "weights_key", "num_heads"))


@cache
def this_run() -> dict:
    """What every results line says of its run: id, date and time of its start (UTC), revision, versions of packages."""
    versions = {}
    for name in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return {"run": secrets.token_hex(6), "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "revision": revision(), "versions": versions}


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


def digest(*values: object) -> str:
    """SHA-256, in hexadecimal digits, of tensors (type, shape, content), plain values, and mappings and sequences of
    them."""
    found = hashlib.sha256()

    def add(value):
        if isinstance(value, torch.Tensor):
            found.update(f"{value.dtype} {tuple(value.shape)}".encode())
            found.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        elif isinstance(value, Mapping | list | tuple):
            found.update(f"{type(value).__name__} {len(value)}".encode())
            for one in value.items() if isinstance(value, Mapping) else value:
                add(one)
        else:
            found.update(f"{value!r}\0".encode())

    add(values)
    return found.hexdigest()


def files_digest(paths: Sequence[str | Path | int]) -> str:
    """The digest of a list of files, in its order: each by its place below their common folder, size and time of
    change; of what is no path, the seed of a drawn image, the value alone."""
    # The absolute path of each folder once, as there may be a million files.
    folders = {folder: os.path.abspath(folder) for folder in {os.path.dirname(str(path)) for path in paths}}
    common, found = os.path.commonpath(folders.values() or [""]), hashlib.sha256()
    for path in paths:
        folder, name = os.path.split(str(path))
        found.update(f"{folders[folder][len(common):]}/{name}\0".encode(errors="surrogateescape"))
        if not isinstance(path, int):
            with suppress(OSError):
                status = os.stat(path)
                found.update(f"{status.st_size} {status.st_mtime_ns}\0".encode())
    return found.hexdigest()


def check_same(path: Path, saved: Mapping, current: Mapping, option: str = "--resume",
               mend: str = "give the same arguments and data, or start without --resume", where: str = "now") -> None:
    """Raises UserError that names all that differs between what made the file at path (saved) and what is to use it
    (current): values by their names in words. option: what named the file; mend: what the user can do."""
    differences = []
    for name in {**saved, **current}:
        was, now = saved.get(name), current.get(name)
        if was == now:
            continue
        if isinstance(was, list) and isinstance(now, list) and len(f"{was}{now}") > 120:
            at = [one == other for one, other in zip_longest(was, now)].index(False)
            name, was, now = f"{name}, from number {at + 1} on,", was[at:at + 2], now[at:at + 2]
        long = max(len(str(was)), len(str(now))) > 60
        differences.append(f"{name} differs {where} from when {path} was written" if long else
                           f"{name} was {was} when {path} was written and is {now} {where}")
    if differences:
        raise UserError(f"{option}: {'; '.join(differences)}; {mend}")
