"""Checkpoint files: download, check, open as data.

A download's hash is checked at first use against the published one, where there is one, and at every later use against
the SHA-256 that was written beside it at first use. A file that would run code is refused.
"""

import argparse
import fcntl
import hashlib
import http.client
import os
import re
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

import torch
from torch.hub import tqdm

from utils.storage import atomic_write, check_archive

from .encoder import CheckpointError, take_prefix

SAFETENSORS = ".safetensors"
_hashes: dict[tuple, str] = {}


def file_hash(path: Path, algorithm: str = "sha256") -> str:
    """Hexadecimal hash of a file's content, computed once per process while inode, size and time of change stay."""
    status = os.stat(path)
    key = algorithm, status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
    if key not in _hashes:
        digest = hashlib.new(algorithm)
        with open(path, "rb") as file:
            while chunk := file.read(1 << 22):
                digest.update(chunk)
        _hashes[key] = digest.hexdigest()
    return _hashes[key]


def fetch(url: str, name: str | None = None, published: dict[str, str] | None = None) -> Path:
    """The file of a URL in torch.hub's cache, downloaded at first use and checked at every use.

    name: in the cache (default: a hash of the URL and its last part). published: {"sha256" or "md5": leading
    hexadecimal digits}; default: a SHA-256 prefix in the file name, torch.hub's convention. Raises CheckpointError.
    """
    base = url.split("?")[0].rsplit("/", 1)[-1]
    name = name or f"{hashlib.sha256(url.encode()).hexdigest()[:8]}_{base}"
    if not published and (match := re.search(r"-([a-f0-9]{8,})\.", base)):
        published = {"sha256": match[1]}
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    path, part, recorded = (folder / (name + suffix) for suffix in ("", ".part", ".sha256"))
    try:
        if not (path.exists() and recorded.exists()):
            folder.mkdir(parents=True, exist_ok=True)
            # One process at a time; one that waited finds the file. The lock stays: removing it would let two in.
            with open(folder.parent / "checkpoints.lock", "w") as lock:
                fcntl.lockf(lock, fcntl.LOCK_EX)
                if not path.exists():
                    download(url, part, f"download it by hand to {path}, or give --weights PATH")
                new = path if path.exists() else part
                for algorithm, digits in (published or {}).items():
                    if not (found := file_hash(new, algorithm)).startswith(digits):
                        part.unlink(missing_ok=True)
                        raise CheckpointError(f"{path}: its {algorithm.upper()} begins with {found[:len(digits)]}, "
                                              f"published is {digits}; delete it if it is there and start again")
                atomic_write(recorded, lambda file: file.write_text(file_hash(new) + "\n"))
                os.replace(new, path)
        if recorded.read_bytes().strip() != file_hash(path).encode():
            raise CheckpointError(f"{path}: its SHA-256 is no longer the one recorded at first use in {recorded.name}; "
                                  "delete both files and start again")
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}; set TORCH_HOME to a writable folder") from None
    return path


def download(url: str, part: Path, advice: str) -> None:
    """Downloads to the file part, continuing what an earlier try left there; shows progress on standard error.

    The server's name for the file's version, where it gives one, is kept beside a part, and a part of another version
    is not continued. Raises CheckpointError for a server that fails and for a file that ends early, which torch.hub's
    function accepts. advice: what the user can do without the server.
    """
    kept = part.with_name(part.name + ".version")
    with open(part, "ab") as file:
        headers, version = {"User-Agent": "torch.hub"}, kept.read_bytes() if kept.exists() else b""
        version = version.decode("ascii", "ignore").strip()
        if file.tell():
            headers |= {"Range": f"bytes={file.tell()}-"} | ({"If-Range": version} if version else {})
        try:
            request = urllib.request.Request(url, headers=headers)
            with urllib.request.urlopen(request, timeout=60) as response:
                etag, date = (response.headers.get(name, "") for name in ("ETag", "Last-Modified"))
                found = etag if etag.startswith('"') else date  # W/"..." does not promise equal bytes
                if response.status != 206:
                    # The server sends the whole file, not the range.
                    file.seek(0)
                    file.truncate()
                    kept.unlink(missing_ok=True)
                    if found:
                        kept.write_text(found)
                elif found not in ("", version):
                    file.truncate(0)
                    download(url, part, advice)
                    return
                length = response.headers.get("Content-Length")
                total = file.tell() + int(length) if length else None
                with tqdm(desc=url.rsplit("/", 1)[-1], total=total, initial=file.tell(), unit="B", unit_scale=True,
                          mininterval=0.5 if sys.stderr.isatty() else 10) as progress:
                    while chunk := response.read(1 << 20):
                        progress.update(file.write(chunk))
        except CheckpointError:
            raise
        except urllib.error.HTTPError as error:
            part.unlink()
            kept.unlink(missing_ok=True)
            raise CheckpointError(f"{url}: the server answered {error.code} {error.reason}; {advice}") from None
        # ValueError and HTTPException: not a URL, not an answer in HTTP.
        except (urllib.error.URLError, TimeoutError, ConnectionError, ValueError, http.client.HTTPException) as error:
            if not file.tell():
                part.unlink()
                kept.unlink(missing_ok=True)
            raise CheckpointError(f"{url} cannot be reached ({getattr(error, 'reason', error)}); {advice}") from None
        if total is not None and file.tell() != total:
            raise CheckpointError(f"{url}: the download ended after {file.tell()} of {total} bytes; "
                                  "start again to continue it")
        file.flush()
        os.fsync(file.fileno())
        kept.unlink(missing_ok=True)


def open_checkpoint(path: Path) -> dict:
    """The content of a checkpoint file of PyTorch's or safetensors' format, on the CPU. Raises CheckpointError for a
    file that is missing or damaged, and for one that holds anything but tensors, plain values and argparse.Namespace,
    which training scripts save."""
    if not path.is_file():
        what = "is not a regular file" if path.exists() else "does not exist"
        raise CheckpointError(f"weights file {path} {what}; give --weights PATH, official or random")
    try:
        if path.suffix == SAFETENSORS:
            from safetensors.torch import load_file  # comes with timm
            return load_file(path)
        check_archive(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many kinds on a file that is none of its own
        if refused := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise CheckpointError(f"{path} asks for {refused[1]} on loading, which weights do not need and which could "
                                  "run code: refused; save it again with tensors and plain values only") from None
        reason = (str(error) or type(error).__name__).splitlines()[0][:100]
        raise CheckpointError(f"{path} is truncated or no PyTorch checkpoint ({reason}); download it again") from None
    if not isinstance(checkpoint, dict):
        raise CheckpointError(f"{path} holds a {type(checkpoint).__name__}, not a dictionary")
    return checkpoint


# Names under which training scripts save a model, and prefixes of its keys.
NESTINGS = ("state_dict", "model", "model_state_dict", "teacher", "student", "model_ema", "state_dict_ema", "ema")
PREFIXES = ("module.", "_orig_mod.", "backbone.", "encoder.", "model.")


def state_dicts(content: object, path: str = "") -> dict[str, dict[str, torch.Tensor]]:
    """The state dictionaries in a checkpoint, by where they lie: "", "model", "teacher/backbone", ..."""
    if not isinstance(content, dict):
        return {}
    tensors = {key: value for key, value in content.items() if isinstance(value, torch.Tensor) and isinstance(key, str)}
    found = {path: tensors} if tensors else {}
    for prefix in PREFIXES:
        if inner := take_prefix(tensors, prefix):
            found |= state_dicts(inner, f"{path}/{prefix[:-1]}".lstrip("/"))
    for name in NESTINGS:
        found |= state_dicts(content.get(name), f"{path}/{name}".lstrip("/"))
    return found


def as_official(checkpoint: dict, weights_key: str, nesting: str) -> dict:
    """The state dictionary at weights_key, nested as in an official file. Raises CheckpointError if there is none."""
    states = state_dicts(checkpoint)
    if weights_key not in states:
        raise CheckpointError(f"--weights-key {weights_key}: it has {', '.join(map(repr, states)) or 'no weights'}")
    return {nesting: states[weights_key]} if nesting else states[weights_key]


def find_state(checkpoint: dict, load: Callable[[dict], None], weights_key: str | None = None) -> None:
    """Calls load with each state dictionary in the checkpoint, or with the one at weights_key. load raises
    CheckpointError for one that does not fit; so does this function unless exactly one fits."""
    states, errors = state_dicts(checkpoint), {}
    if weights_key is not None:
        states = {weights_key: as_official(checkpoint, weights_key, "")}
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
