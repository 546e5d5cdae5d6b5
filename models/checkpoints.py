"""Checkpoint files: download, check, open as data.

A file is used only after its hash is known: against the published SHA-256 or MD5 prefix where there is one, otherwise
against the SHA-256 that was written beside the file when it was first used. Opening is restricted to tensors and plain
values, and argparse.Namespace, which training scripts save; a file that would run code is refused.
"""

import argparse
import fcntl
import hashlib
import http.client
import os
import pickle
import re
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

import torch

from .encoder import CheckpointError


def file_hash(path: Path, algorithm: str = "sha256") -> str:
    digest = hashlib.new(algorithm)
    with open(path, "rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def fetch(url: str, name: str | None = None, published: dict[str, str] | None = None) -> Path:
    """The file of a URL in torch.hub's cache, downloaded at first use and checked at every use.

    name: in the cache; by default the URL's last part after a hash of the whole URL, since many projects call theirs
    checkpoint.pth. published: {"sha256" or "md5": leading hexadecimal digits}; without it, the digits at the end of the
    file name are taken as a SHA-256 prefix, torch.hub's convention. Raises CheckpointError.
    """
    base = url.split("?")[0].rsplit("/", 1)[-1]
    name = name or f"{hashlib.sha256(url.encode()).hexdigest()[:8]}_{base}"
    if not published and (match := re.search(r"-([a-f0-9]{8,})\.", base)):
        published = {"sha256": match[1]}
    path = Path(torch.hub.get_dir()) / "checkpoints" / name
    recorded = path.with_name(name + ".sha256")

    def check(file: Path) -> None:
        for algorithm, digits in (published or {}).items():
            found = file_hash(file, algorithm)
            if not found.startswith(digits):
                raise CheckpointError(f"{path}: its {algorithm.upper()} begins with {found[:len(digits)]}, published "
                                      f"is {digits}; delete the file and start again")

    try:
        if not path.exists():
            download(url, path, check)
            recorded.write_text(file_hash(path) + "\n")
            return path
        check(path)
        found = file_hash(path)
        if not recorded.exists():
            recorded.write_text(found + "\n")
        elif recorded.read_text().strip() != found:
            raise CheckpointError(f"{path}: its SHA-256 is no longer the one recorded at first use in {recorded.name}; "
                                  "delete both files and start again")
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}; set TORCH_HOME to a writable folder") from None
    return path


def download(url: str, path: Path, check: Callable[[Path], None] = lambda file: None) -> None:
    """Downloads to PATH.part, continuing what an earlier try left there; checks it and renames it when it is complete.

    Shows bytes, rate and time left on standard error. Two processes do not disturb each other: the second waits for
    the first. Raises CheckpointError where the server or the network says no, where the file ends before the length
    that the server announced (the part stays, to be continued), and where check raises (the part is removed).
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    by_hand = f"download it by hand to {path}, or give --weights PATH"
    with open(part, "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        if path.exists():
            part.unlink(missing_ok=True)
            return
        try:
            done, total = _receive(url, file)
        except urllib.error.HTTPError as error:
            part.unlink()
            raise CheckpointError(f"{url}: the server answered {error.code} {error.reason}; {by_hand}") from None
        # ValueError and HTTPException: an address that is none, an answer that is no HTTP.
        except (urllib.error.URLError, TimeoutError, ConnectionError, ValueError, http.client.HTTPException) as error:
            if not file.tell():
                part.unlink()
            raise CheckpointError(f"{url} cannot be reached ({getattr(error, 'reason', error)}); {by_hand}") from None
        file.flush()
        os.fsync(file.fileno())
        if total is not None and done != total:
            raise CheckpointError(f"{url}: the download ended after {done} of {total} bytes; "
                                  "start again to continue it")
        try:
            check(part)
        except CheckpointError:
            part.unlink()
            raise
        os.replace(part, path)


def _receive(url: str, file) -> tuple[int, int | None]:
    """Appends the rest of the URL's content to the open file; returns the bytes there now and those announced."""
    headers = {"User-Agent": "torch.hub"}
    if file.tell():
        headers["Range"] = f"bytes={file.tell()}-"
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=60) as response:
        if response.status != 206:
            # The server sends the whole file, whatever was asked for.
            file.truncate(0)
        done, begin, shown = file.tell() if response.status == 206 else 0, time.monotonic(), 0.0
        first = done
        length = response.headers.get("Content-Length")
        total = done + int(length) if length else None
        while chunk := response.read(1 << 20):
            file.write(chunk)
            done += len(chunk)
            now = time.monotonic()
            if now - shown > (0.5 if sys.stderr.isatty() else 10) or done == total:
                shown, rate = now, (done - first) / max(now - begin, 1e-9)
                left = f" of {total / 1e6:.0f} MB, {(total - done) / rate:.0f} s left" if total else " MB"
                start, end = ("\r\033[K", "\n" if done == total else "") if sys.stderr.isatty() else ("", "\n")
                print(f"{start}{url.rsplit('/', 1)[-1]}: {done / 1e6:.0f}{left}, {rate / 1e6:.1f} MB/s", end=end,
                      file=sys.stderr, flush=True)
    return done, total


def open_checkpoint(path: Path) -> dict:
    """The content of a checkpoint file, on the CPU. Raises CheckpointError for a file that is absent, truncated, not a
    checkpoint, or that asks for anything but tensors, plain values and argparse.Namespace."""
    if not path.is_file():
        raise CheckpointError(f"weights file {path} does not exist; give --weights PATH, official or random")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, ValueError, OSError) as error:
        refused = re.search(r"GLOBAL ([\w.]+)", str(error))
        if refused:
            raise CheckpointError(f"{path} asks for {refused[1]} on loading, which plain weights do not need and which "
                                  "could run code: refused; save it again with tensors and plain values only") from None
        reason = (str(error) or type(error).__name__).splitlines()[0][:100]
        raise CheckpointError(f"{path} is truncated or no PyTorch checkpoint ({reason}); get the file again") from None
    if not isinstance(checkpoint, dict):
        raise CheckpointError(f"{path} holds a {type(checkpoint).__name__}, not a dictionary")
    return checkpoint


# Under what training scripts save a model, and what they put before its keys.
NESTINGS = ("state_dict", "model", "model_state_dict", "teacher", "student", "model_ema", "state_dict_ema", "ema")
PREFIXES = ("module.", "_orig_mod.", "backbone.", "encoder.", "model.")


def state_dicts(content: object, path: str = "") -> dict[str, dict[str, torch.Tensor]]:
    """The state dictionaries in a checkpoint, by where they lie: "", "model", "teacher/backbone", ..."""
    if not isinstance(content, dict):
        return {}
    found = {}
    tensors = {key: value for key, value in content.items() if isinstance(value, torch.Tensor) and isinstance(key, str)}
    if tensors:
        found[path] = tensors
    for prefix in PREFIXES:
        inner = {key[len(prefix):]: value for key, value in tensors.items() if key.startswith(prefix)}
        if inner:
            found |= state_dicts(inner, f"{path}/{prefix[:-1]}".lstrip("/"))
    for name in NESTINGS:
        found |= state_dicts(content.get(name), f"{path}/{name}".lstrip("/"))
    return found


def as_official(checkpoint: dict, weights_key: str, nesting: str) -> dict:
    """The state dictionary that lies at weights_key, under the name that official files have it. Raises CheckpointError
    where there is none."""
    states = state_dicts(checkpoint)
    if weights_key not in states:
        raise CheckpointError(f"--weights-key {weights_key}: it has {', '.join(map(repr, states)) or 'no weights'}")
    return {nesting: states[weights_key]} if nesting else states[weights_key]


def find_state(checkpoint: dict, load: Callable[[dict], None], weights_key: str | None = None) -> None:
    """Calls load(state dictionary) with the only one in the checkpoint that it accepts.

    load raises CheckpointError for one that does not fit. weights_key: where it lies, as state_dicts names it. Raises
    CheckpointError where none fits, and where several do.
    """
    if weights_key is not None:
        return load(as_official(checkpoint, weights_key, ""))
    states, errors = state_dicts(checkpoint), {}
    for where, state in states.items():
        try:
            load(state)
        except CheckpointError as error:
            errors[where] = error
    fitting = [where for where in states if where not in errors]
    if len(fitting) > 1:
        raise CheckpointError(f"several of its state dictionaries fit: {', '.join(map(repr, fitting))}; choose one "
                              "with --weights-key")
    if not fitting:
        # What the largest one lacks is what the user wants to know.
        largest = max(states, key=lambda where: len(states[where]), default=None)
        raise CheckpointError(str(errors[largest]) if states else "it holds no weights")
    return None
