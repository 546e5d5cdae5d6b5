"""Final tokens of a data set, each image decoded and encoded once: on the GPU, in host memory, or in a mapped file.

Every process holds the features of its own contiguous share of the images. Tokens are kept layer-normalised, as
attentive heads use them, in the type of the run's precision (float32, bfloat16, float16); class tokens as the encoder
gives them. A data set here is what datasets.patches.PatchDataset is.
"""

import fcntl
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import timm
import torch

from utils import UserError
from utils.distributed import any_process, barrier, gather_rows, is_main, shard
from utils.run import Progress, autocast
from utils.storage import allocate, atomic_write, create_file, map_file, temporary_file

from .encoder import Encoder
from .probes import normalise

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Batch(NamedTuple):
    """This process's part of a global batch: tokens[rows], or all tokens where rows is None, and their labels.

    tokens [M, N, D]: normalised; or raw class tokens [M, 1, D], for heads that use no others.
    """
    tokens: torch.Tensor
    rows: torch.Tensor | None
    labels: torch.Tensor


class Encoded(NamedTuple):
    """Of a batch of images: class tokens [B, D] as the encoder gives them, all tokens [B, 1 + N, D] normalised."""
    cls: torch.Tensor
    tokens: torch.Tensor


@dataclass
class Features:
    """This process's rows: of the patches with ids first_id, first_id + 1, and so on.

    labels int64 [n] and cls [n, D] lie on the device, tokens [n, N, D], or None, where they have room. missing: ids, of
    all processes, without features because their image could not be decoded.
    """

    first_id: int
    labels: torch.Tensor
    cls: torch.Tensor
    tokens: torch.Tensor | None
    missing: torch.Tensor

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """Those of the ids that this process holds, as sorted row numbers, on the CPU."""
        rows = ids - self.first_id
        return rows[(rows >= 0) & (rows < len(self.labels))].sort().values

    def batches(self, steps: Sequence[torch.Tensor], with_tokens: bool) -> Iterator[Batch]:
        """This process's part of each global batch of ids; with_tokens: all tokens, else the class token.

        Tokens that lie elsewhere are fetched by a thread, one step ahead.
        """
        device = self.labels.device
        if not with_tokens or self.tokens.device == device:
            tokens = self.tokens if with_tokens else self.cls[:, None]
            for ids in steps:
                rows = self.rows(ids)
                if len(rows) and len(rows) == rows[-1] - rows[0] + 1:
                    # Neighbours, as in every test batch, need not be gathered.
                    part = slice(int(rows[0]), int(rows[-1]) + 1)
                    yield Batch(tokens[part], None, self.labels[part])
                else:
                    rows = rows.to(device)
                    yield Batch(tokens, rows, self.labels[rows])
            return

        def fetch(ids):
            rows = self.rows(ids)
            staged = torch.empty(len(rows), *self.tokens.shape[1:], dtype=self.tokens.dtype, pin_memory=True)
            torch.index_select(self.tokens, 0, rows, out=staged)
            return Batch(staged.to(device, non_blocking=True), None, self.labels[rows.to(device)])

        # CUDA's current device is a thread's own.
        with ThreadPoolExecutor(1, initializer=torch.cuda.set_device, initargs=(device,)) as thread:
            ahead = thread.submit(fetch, steps[0])
            for index in range(len(steps)):
                batch = ahead.result()
                if index + 1 < len(steps):
                    ahead = thread.submit(fetch, steps[index + 1])
                yield batch


def decoded_ids(dataset, features: Features) -> torch.Tensor:
    """The ids of the patches that have features. Raises UserError where none has."""
    ids = torch.arange(dataset.num_patches)
    ids = ids[~torch.isin(ids, features.missing)]
    if len(ids) == 0:
        raise UserError("no image of a split could be decoded; restore the files")
    return ids


@torch.inference_mode()
def encode_tokens(encoder: Encoder, images: torch.Tensor, precision: str) -> Encoded:
    """uint8 [B, 3, H, W] on the encoder's device -> class tokens and normalised tokens in the precision's type."""
    with autocast(images.device, precision):
        tokens = encoder(encoder.preprocess(images))
    # Class tokens are a copy: a view would keep all tokens of the batch alive. Normalised before the cast: afterwards
    # an error of the mean would stay.
    return Encoded(tokens[:, 0].to(DTYPES[precision], copy=True), normalise(tokens.float()).to(DTYPES[precision]))


def encode_features(encoder: Encoder, dataset, label: str, with_tokens: bool, precision: str, workers: int, tier: str,
                    folder: Path, keep: Path | None, log: Callable[[str], None], image_size: int = 224) -> Features:
    """Features of a data set whose transform is deterministic, from one pass over its images, or from a kept cache.

    label: the data set's name in messages. with_tokens: all tokens, else the class token only. tier: where tokens live
    (utils.storage.allocate). folder: for a mapped file. keep: folder of kept caches, or None.
    Raises UserError where there is no room anywhere, and for features that are not finite.
    """
    device = next(encoder.parameters()).device
    images = shard(len(dataset))
    start, stop = int(dataset.first_id[images.start]), int(dataset.first_id[images.stop])
    shapes = {"cls": ((encoder.embed_dim,), DTYPES[precision]), "decoded": ((), torch.uint8)}
    length = 1 + (image_size // encoder.patch_size) ** 2
    if with_tokens:
        shapes["tokens"] = ((length, encoder.embed_dim), DTYPES[precision])

    kept = None
    if keep:
        name = fingerprint(encoder, dataset, precision, with_tokens)[:20]
        path = keep / f"{name}-{'tokens' if with_tokens else 'cls'}"
        kept = FeatureCache.open(path, shapes, dataset.num_patches, log)
    arrays = {name: torch.zeros(stop - start, *shape, dtype=dtype, device=device)
              for name, (shape, dtype) in shapes.items() if name != "tokens"}
    if with_tokens:
        shape, dtype = (stop - start, *shapes["tokens"][0]), DTYPES[precision]
        what = f"{label}: tokens of {dataset.num_patches} patches, {length} x {encoder.embed_dim} {precision} each"
        arrays["tokens"] = allocate(
            shape, dtype, device, tier, keep if kept else folder,
            lambda: kept.arrays["tokens"][start:stop] if kept else temporary_file(folder, shape, dtype), what,
            "use a larger disk with --cache-dir, more processes, or --probe linear knn, which need no tokens", log)

    if kept and kept.complete:
        log(f"{label}: features come from the cache {kept.path}")
        for name, array in arrays.items():
            if array.data_ptr() != kept.arrays[name][start:stop].data_ptr():
                array.copy_(kept.arrays[name][start:stop])
    else:
        finite = encode_into(arrays, encoder, dataset, images, start, label, precision, workers)
        if any_process(not finite):
            raise UserError(f"{label}: the encoder gave features that are not finite at --precision {precision}; "
                            "use bf16 or fp32")
        if kept:
            kept.write(arrays, start, stop)
    missing = (gather_rows(arrays["decoded"]) == 0).nonzero().flatten().cpu()
    if len(missing):
        log(f"{label}: {len(missing)} patches are left out, their images could not be decoded")
    return Features(start, dataset.labels[start:stop].to(device), arrays["cls"], arrays.get("tokens"), missing)


def encode_into(arrays: dict[str, torch.Tensor], encoder: Encoder, dataset, images: range, first_id: int, label: str,
                precision: str, workers: int) -> bool:
    """One pass over the images: fills the arrays (row = id - first_id) and sets decoded to 1. Whether all is finite."""
    device = arrays["cls"].device
    progress = Progress(len(arrays["cls"]), f"encoding {label}", "patches")
    finite = torch.ones((), dtype=torch.bool, device=device)
    for patches, ids in dataset.batches(images, encode_batch_size(device), workers, pin_memory=device.type == "cuda"):
        encoded = encode_tokens(encoder, patches.to(device, non_blocking=True), precision)
        values = encoded._asdict() | {"decoded": torch.ones(len(ids), dtype=torch.uint8, device=device)}
        for name in arrays:
            finite &= values[name].isfinite().all()
        # Rows are consecutive but for images that could not be decoded.
        breaks = (ids.diff() != 1).nonzero().flatten() + 1
        for run in torch.arange(len(ids)).tensor_split(breaks):
            part = slice(int(run[0]), int(run[-1]) + 1)
            row = int(ids[part.start]) - first_id
            for name, array in arrays.items():
                array[row:row + len(run)].copy_(values[name][part], non_blocking=True)
        progress.update(len(ids))
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return bool(finite)


def encode_batch_size(device: torch.device) -> int:
    return 256 if device.type == "cuda" else 16


class FeatureCache:
    """A folder with a file for each array, over the patches of all processes, that a later run can use.

    It is written under the name PATH.partial and renamed when it is complete. arrays: name -> mapped tensor.
    """

    def __init__(self, path: Path, complete: bool, arrays: dict[str, torch.Tensor], lock=None):
        self.path, self.complete, self.arrays, self.lock = path, complete, arrays, lock

    @classmethod
    def open(cls, path: Path, shapes: dict, num_rows: int, log: Callable[[str], None]) -> "FeatureCache | None":
        """The cache at path, complete or to be written; None, and it is said why, where it cannot be written."""
        partial, lock, problem, complete = path.with_name(path.name + ".partial"), None, "", False
        full = {name: ((num_rows, *shape), dtype) for name, (shape, dtype) in shapes.items()}
        if is_main():
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                complete = cls.is_complete(path, full)
                if not complete:
                    lock = open(path.with_name(path.name + ".lock"), "w")  # noqa: SIM115  held until it is complete
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    for half in (path, partial):
                        if half.exists():
                            log(f"{half} is half-written: refused, it is written anew")
                            shutil.rmtree(half)
                    partial.mkdir()
                    for name, (shape, dtype) in full.items():
                        create_file(partial / name, shape, dtype)
            except BlockingIOError:
                problem = "another run is writing it"
            except OSError as error:
                problem = f"{error.strerror}: {error.filename or partial}"
                shutil.rmtree(partial, ignore_errors=True)
        complete = any_process(complete)
        source, arrays = path if complete else partial, {}
        try:
            if not problem:
                arrays = {name: map_file(source / name, shape, dtype, writable=not complete)
                          for name, (shape, dtype) in full.items()}
        except RuntimeError:
            problem = f"{source} is not seen by every process"
        if any_process(bool(problem)):
            log(f"the features are not kept in {path}: {problem or 'not every process can write it'}")
            return None
        return cls(path, complete, arrays, lock)

    @staticmethod
    def is_complete(path: Path, full: dict) -> bool:
        try:
            sizes = json.loads((path / "complete.json").read_text())
            return all(sizes[name] == (path / name).stat().st_size for name in full)
        except (OSError, ValueError, KeyError):
            return False

    def write(self, arrays: dict[str, torch.Tensor], start: int, stop: int) -> None:
        """Called by every process with its rows start to stop; the cache is complete when it returns."""
        for name, array in arrays.items():
            if array.data_ptr() != self.arrays[name][start:stop].data_ptr():
                self.arrays[name][start:stop].copy_(array)
        barrier()
        if is_main():
            partial = self.path.with_name(self.path.name + ".partial")
            for name in self.arrays:
                with open(partial / name, "rb+") as file:
                    os.fsync(file.fileno())
            sizes = {name: (partial / name).stat().st_size for name in self.arrays}
            atomic_write(partial / "complete.json", lambda path: path.write_text(json.dumps(sizes)))
            os.replace(partial, self.path)
            Path(self.lock.name).unlink(missing_ok=True)
            self.lock.close()
        barrier()


def source_files(*objects: object) -> set[str]:
    """The files of this repository in which the classes of these objects, and functions among them, are written, and
    those of the same folder whose classes or functions they use."""
    root, files = str(Path(__file__).parents[1]), set()
    # A partial function's own module is functools.
    kinds = [kind for one in objects for kind in (getattr(one, "func", one), *type(one).__mro__)]
    names = [getattr(kind, "__module__", None) for kind in kinds]
    while names:
        module = sys.modules.get(names.pop())
        path = getattr(module, "__file__", None) or ""
        if path.startswith(root) and path not in files:
            files.add(path)
            used = (str(getattr(value, "__module__", "")) for value in vars(module).values())
            names += [name for name in used if name.startswith(f"{module.__package__}.")]
    return files


def fingerprint(encoder: Encoder, dataset, precision: str, with_tokens: bool) -> str:
    """SHA-256 of all that the features depend on: weights, buffers and heads, images (path, size, time of change,
    boxes, labels), transform, precision, device type, versions, and the code of the encoder and of the data set."""
    digest = hashlib.sha256()
    device = next(encoder.parameters()).device.type
    for value in (precision, device, torch.__version__, timm.__version__, with_tokens, dataset.transform,
                  dataset.classes, encoder, encoder.num_heads, getattr(encoder, "shuffle", None) is not None):
        digest.update(f"{value}\0".encode())
    for name, tensor in (*encoder.named_parameters(), *encoder.named_buffers()):
        digest.update(name.encode() + str(tuple(tensor.shape)).encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    code = source_files(encoder, encoder.position_embedding, encoder.projector, dataset, dataset.load)
    for path in sorted({*code, __file__, encoder.method}):
        digest.update(Path(path).read_bytes())
    for image in dataset.images:
        digest.update(repr(image).encode())
        if isinstance(image.path, str) and os.path.exists(image.path):
            status = os.stat(image.path)
            digest.update(f"{status.st_size} {status.st_mtime_ns}".encode())
    return digest.hexdigest()
