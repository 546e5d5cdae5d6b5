"""Checkpoint files: download, check, open as data. A file that would run code is refused."""

import argparse
import hashlib
import re
from pathlib import Path

import torch

from utils.storage import check_archive

from .encoder import CheckpointError, take_prefix

# Names under which training scripts save a model, and prefixes of its keys.
NESTINGS = ("state_dict", "model", "model_state_dict", "teacher", "student", "model_ema", "state_dict_ema", "ema")
PREFIXES = ("module.", "_orig_mod.", "backbone.", "encoder.", "model.")


def file_hash(path: Path, algorithm: str = "sha256") -> str:
    """Hexadecimal hash of a file's content."""
    return hashlib.new(algorithm, path.read_bytes()).hexdigest()


def one_line(error: Exception) -> str:
    """The kind and message of an error, without line breaks and colours of a terminal, cut at 400 characters. The kind
    is left out where the message was written for the user."""
    kind = "" if isinstance(error, CheckpointError) else f"{type(error).__name__}: "
    return kind + " ".join(re.sub(r"\x1b\[[0-9;]*m", "", str(error)).split())[:400]


def fetch(url: str, name: str | None = None, md5: str | None = None) -> Path:
    """The file of a URL in torch.hub's cache, downloaded at first use.

    name: in the cache (default: a hash of the URL and its last part). md5: its published leading digits. They and those
    of a SHA-256 in the URL's file name, torch.hub's convention, are checked at every use. Raises CheckpointError.
    """
    base = url.split("?")[0].rsplit("/", 1)[-1]
    name = name or f"{hashlib.sha256(url.encode()).hexdigest()[:8]}_{base}"
    path = Path(torch.hub.get_dir()) / "checkpoints" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        try:
            torch.hub.download_url_to_file(url, str(path))
        except (OSError, ValueError) as error:  # ValueError: it is no URL
            raise CheckpointError(f"{url} could not be downloaded ({one_line(error)}); download it by hand to {path}, "
                                  "or give --weights PATH") from None
    sha256 = re.search(r"-([a-f0-9]{8,})\.", base)
    for algorithm, digits in (("sha256", sha256 and sha256[1]), ("md5", md5)):
        if digits and not (found := file_hash(path, algorithm)).startswith(digits):
            raise CheckpointError(f"{path}: its {algorithm.upper()} begins with {found[:len(digits)]}, published is "
                                  f"{digits}; delete it and start again")
    return path


def fetch_official(name: str, files: dict[str, dict], full: bool) -> Path:
    """One of a method's OFFICIAL files. full: the one with projector or decoder, if there are two. Raises
    CheckpointError."""
    entry = files["full" if full and "full" in files else "backbone"]
    if "url" not in entry:
        raise CheckpointError(f"{name}: scripts cannot download the official file {entry['file']} from Google Drive; "
                              f"download it from {entry['where']} and give --weights PATH")
    return fetch(entry["url"], entry.get("file") or entry["url"].rsplit("/", 1)[-1], entry.get("md5"))


def open_checkpoint(path: Path) -> dict:
    """The content of a file of PyTorch's or safetensors' format, on the CPU. Raises CheckpointError for one that is
    missing or damaged, or holds anything but tensors, plain values and argparse.Namespace (training scripts')."""
    if not path.is_file():
        raise CheckpointError(f"there is no weights file {path}; give --weights PATH, official or random")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file  # comes with timm
            return load_file(path)
        check_archive(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many kinds on a file that is none of its own
        if refused := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise CheckpointError(f"{path} asks for {refused[1]} on loading, which weights do not need and which could "
                                  "run code: refused; save it again with tensors and plain values only") from None
        raise CheckpointError(f"{path} is truncated or no PyTorch checkpoint ({one_line(error)[:100]}); delete it and "
                              "download it again") from None
    if not isinstance(checkpoint, dict):
        raise CheckpointError(f"{path} holds a {type(checkpoint).__name__}, not a dictionary")
    return checkpoint


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
