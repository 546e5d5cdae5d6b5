"""Final tokens of a data set, each image decoded and encoded once: on the GPU, in host memory, or in a mapped file.

Every process holds the features of its own contiguous share of the images. Tokens are kept in the type of the run's
precision (float32, bfloat16, float16), which is what a head would be given without a cache too.
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import timm
import torch

from datasets.patches import PatchDataset
from utils import UserError
from utils.distributed import all_reduce, barrier, gather_rows, is_main, rank, shard, world_size
from utils.run import Progress, autocast
from utils.storage import atomic_write, create_file, free_memory, map_file

from .encoder import Encoder
from .probes import token_rstd

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Features:
    """This process's rows: of the patches with ids first_id, first_id + 1, and so on.

    labels int64 [n], cls [n, D], tokens [n, N, D] and rstd [n, N] (models.probes.token_rstd) or None; all but tokens
    lie on the device. missing: ids, of all processes, without features because their image could not be decoded.
    """

    first_id: int
    labels: torch.Tensor
    cls: torch.Tensor
    tokens: torch.Tensor | None
    rstd: torch.Tensor | None
    missing: torch.Tensor

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """Those of the ids that this process holds, as sorted row numbers, on the CPU."""
        rows = ids - self.first_id
        return rows[(rows >= 0) & (rows < len(self.labels))].sort().values

    def batches(self, steps: Sequence[torch.Tensor], with_tokens: bool) -> Iterator[tuple]:
        """For each tensor of ids (of the global batch) yields this process's part: (tokens, rstd, rows, labels), where
        the batch is tokens[rows], or all tokens where rows is None. Without tokens: of the class token, [n, 1, D].

        Tokens that lie elsewhere are fetched by a thread, one step ahead.
        """
        device = self.labels.device
        if not with_tokens or self.tokens.device == device:
            tokens, rstd = (self.tokens, self.rstd) if with_tokens else (self.cls[:, None], None)
            for ids in steps:
                rows = self.rows(ids)
                if len(rows) and len(rows) == rows[-1] - rows[0] + 1:
                    # Neighbours, as in every test batch, need not be gathered.
                    part = slice(int(rows[0]), int(rows[-1]) + 1)
                    yield tokens[part], rstd[part] if with_tokens else None, None, self.labels[part]
                else:
                    rows = rows.to(device)
                    yield tokens, rstd, rows, self.labels[rows]
            return

        def fetch(ids):
            rows = self.rows(ids)
            staged = torch.empty(len(rows), *self.tokens.shape[1:], dtype=self.tokens.dtype, pin_memory=True)
            torch.index_select(self.tokens, 0, rows, out=staged)
            return staged.to(device, non_blocking=True), rows.to(device)

        # CUDA's current device is a thread's own.
        with ThreadPoolExecutor(1, initializer=torch.cuda.set_device, initargs=(device,)) as thread:
            ahead = thread.submit(fetch, steps[0])
            for index in range(len(steps)):
                tokens, rows = ahead.result()
                if index + 1 < len(steps):
                    ahead = thread.submit(fetch, steps[index + 1])
                yield tokens, self.rstd[rows], None, self.labels[rows]


def decoded_ids(dataset: PatchDataset, features: Features) -> torch.Tensor:
    """The ids of the patches that have features. Raises UserError where none has."""
    ids = torch.arange(dataset.num_patches)
    ids = ids[~torch.isin(ids, features.missing)]
    if len(ids) == 0:
        raise UserError("no image of a split could be decoded; restore the files")
    return ids


@torch.inference_mode()
def encode_tokens(encoder: Encoder, images: torch.Tensor, precision: str) -> torch.Tensor:
    """uint8 [B, 3, H, W] on the encoder's device -> final tokens [B, 1 + N, D], in the type of the precision."""
    with autocast(images.device, precision):
        tokens = encoder(encoder.preprocess(images))
    return tokens.to(DTYPES[precision])


def encode_features(encoder: Encoder, dataset: PatchDataset, label: str, with_tokens: bool, precision: str,
                    workers: int, place: str, folder: Path, keep: Path | None, log: Callable[[str], None],
                    image_size: int = 224) -> Features:
    """Features of a data set whose transform is deterministic, from one pass over its images, or from a kept cache.

    label: the data set's name in messages. with_tokens: all tokens, else the class token only. place: where tokens
    live, "gpu", "cpu", "disk", or "auto" for the first with room; it is said, with the size, before memory is taken,
    and where it does not fit another is taken and that is said too. folder: for a mapped file. keep: folder of kept
    caches.
    Raises UserError where there is no room anywhere, or no finite feature.
    """
    device = next(encoder.parameters()).device
    images = shard(len(dataset))
    first, last = int(dataset.first_id[images.start]), int(dataset.first_id[images.stop])
    width, length = encoder.embed_dim, 1 + (image_size // encoder.patch_size) ** 2
    shapes = {"cls": ((width,), DTYPES[precision]), "decoded": ((), torch.uint8)}
    if with_tokens:
        shapes |= {"tokens": ((length, width), DTYPES[precision]), "rstd": ((length,), torch.float32)}

    kept = None
    if keep:
        name = fingerprint(encoder, dataset, precision, with_tokens)[:20]
        path = keep / f"{name}-{'tokens' if with_tokens else 'cls'}"
        kept = FeatureCache.open(path, shapes, dataset.num_patches, log)
    arrays = {name: torch.zeros(last - first, *shape, dtype=dtype, device=device)
              for name, (shape, dtype) in shapes.items() if name != "tokens"}
    if with_tokens:
        def mapped():
            return kept.arrays["tokens"][first:last] if kept else None
        what = f"{label}: tokens of {dataset.num_patches} patches, {length} x {width} {precision} each"
        arrays["tokens"] = allocate((last - first, length, width), DTYPES[precision], device, place, folder, mapped,
                                    what, log)

    if kept and kept.complete:
        log(f"{label}: features come from the cache {kept.path}")
        for name, array in arrays.items():
            if array.data_ptr() != kept.arrays[name][first:last].data_ptr():
                array.copy_(kept.arrays[name][first:last])
    else:
        encode_into(arrays, encoder, dataset, images, first, label, precision, workers)
        if kept:
            kept.write(arrays, first, last)

    suspect = arrays["rstd"] if with_tokens else arrays["cls"]
    bad = all_reduce((~suspect[arrays["decoded"] == 1].isfinite()).any().long().reshape(1))
    if bad.item():
        raise UserError(f"{label}: the encoder gave features that are not finite at --precision {precision}; "
                        "take bf16 or fp32")
    missing = (gather_rows(arrays["decoded"]) == 0).nonzero().flatten().cpu()
    if len(missing):
        log(f"{label}: {len(missing)} patches are left out, their images could not be decoded")
    return Features(first, dataset.labels[first:last].to(device), arrays["cls"], arrays.get("tokens"),
                    arrays.get("rstd"), missing)


def encode_into(arrays: dict[str, torch.Tensor], encoder: Encoder, dataset: PatchDataset, images: range, first: int,
                label: str, precision: str, workers: int) -> None:
    """One pass over the images: fills the arrays (row = id - first) with what was encoded, and found with 1."""
    device = arrays["cls"].device
    progress = Progress(len(arrays["cls"]), f"encoding {label}", "patches")
    batches = dataset.batches(images, encode_batch_size(device), workers, pin_memory=device.type == "cuda")
    for patches, ids in batches:
        tokens = encode_tokens(encoder, patches.to(device, non_blocking=True), precision)
        values = {"cls": tokens[:, 0], "decoded": torch.ones(len(ids), dtype=torch.uint8, device=device)}
        if "tokens" in arrays:
            values |= {"tokens": tokens, "rstd": token_rstd(tokens)}
        # Rows are consecutive but for images that could not be decoded.
        breaks = (ids.diff() != 1).nonzero().flatten() + 1
        for run in torch.arange(len(ids)).tensor_split(breaks):
            start, stop = int(run[0]), int(run[-1]) + 1
            row = int(ids[start]) - first
            for name, value in values.items():
                arrays[name][row:row + stop - start].copy_(value[start:stop], non_blocking=True)
        progress.update(len(ids))
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def encode_batch_size(device: torch.device) -> int:
    return 256 if device.type == "cuda" else 16


def allocate(shape: Sequence[int], dtype: torch.dtype, device: torch.device, place: str, folder: Path,
             mapped: Callable[[], torch.Tensor | None], what: str, log: Callable[[str], None]) -> torch.Tensor:
    """An array on the GPU, in (pinned) host memory, or in a file, whichever place asks for and has room.

    mapped: gives a file's array that exists anyway, or None for a file of its own in folder, which vanishes with the
    process.
    """
    need = torch.Size(shape).numel() * dtype.itemsize
    neighbours = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    order = [one for one in ("gpu", "cpu", "disk") if one != "gpu" or device.type == "cuda"]
    if place != "auto":
        order.sort(key=lambda one: one != place)
    share = f" in each of {world_size()} processes" if world_size() > 1 else ""
    reasons = []
    for one in order:
        note = f"; {', '.join(reasons)}" if reasons else ""
        try:
            if one == "disk":
                log(f"{what}: {need / 1e9:.2f} GB{share}, in a memory-mapped file in {folder}{note}")
                array = mapped()
                return array if array is not None else temporary_file(folder, shape, dtype)
            free = free_memory(device) if one == "gpu" else free_memory(torch.device("cpu")) // neighbours
            name = "on the GPU" if one == "gpu" else "in pinned host memory" if device.type == "cuda" else "in memory"
            # PyTorch takes pinned memory in powers of two. The rest is for the encoder, the heads and the batch.
            pinned = one == "cpu" and device.type == "cuda"
            if (1 << (need - 1).bit_length() if pinned and need else need) > 0.8 * free:
                reasons.append(f"only {free / 1e9:.2f} GB are free {name}")
                continue
            log(f"{what}: {need / 1e9:.2f} GB{share}, {name} ({free / 1e9:.2f} GB free){note}")
            if one == "gpu":
                return torch.empty(shape, dtype=dtype, device=device)
            return torch.empty(shape, dtype=dtype, pin_memory=pinned)
        except OSError as error:
            reasons.append(f"{folder} cannot take the file ({error.strerror})")
        except RuntimeError as error:
            reasons.append(f"{one} memory was refused ({str(error).splitlines()[0][:60]})")
    raise UserError(f"{what}: {need / 1e9:.2f} GB{share} fit nowhere: {', '.join(reasons)}; name a larger disk with "
                    "--cache-dir, start more processes, or take --probe linear knn, which needs no tokens")


def temporary_file(folder: Path, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f".tokens.{os.getpid()}.{rank()}"
    try:
        create_file(path, shape, dtype)
        return map_file(path, shape, dtype)
    finally:
        path.unlink(missing_ok=True)


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
        barrier()
        complete = bool(all_reduce(torch.tensor([int(complete)])).item())
        source, arrays = path if complete else partial, {}
        try:
            if not problem:
                arrays = {name: map_file(source / name, shape, dtype, writable=not complete)
                          for name, (shape, dtype) in full.items()}
        except RuntimeError:
            problem = f"{source} is not seen by every process"
        if all_reduce(torch.tensor([int(bool(problem))])).item():
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

    def write(self, arrays: dict[str, torch.Tensor], first: int, last: int) -> None:
        """Called by every process with its rows first to last; the cache is complete when it returns."""
        for name, array in arrays.items():
            if array.data_ptr() != self.arrays[name][first:last].data_ptr():
                self.arrays[name][first:last].copy_(array)
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


def fingerprint(encoder: Encoder, dataset: PatchDataset, precision: str, with_tokens: bool) -> str:
    """SHA-256 of all that the features depend on: weights and buffers, images (path, size, time of change, boxes,
    labels), transform, precision, device type, the code of encoders and patches, versions."""
    digest = hashlib.sha256()
    device = next(encoder.parameters()).device.type
    for text in (precision, device, torch.__version__, timm.__version__, str(with_tokens), repr(dataset.transform),
                 repr(dataset.classes), repr(getattr(encoder, "shuffle", None) is not None)):
        digest.update(text.encode() + b"\0")
    for name, tensor in (*encoder.named_parameters(), *encoder.named_buffers()):
        digest.update(name.encode() + str(tuple(tensor.shape)).encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    root = Path(__file__).parents[1]
    for pattern in ("models/*.py", "datasets/patches.py", "datasets/synthetic*.py"):
        for path in sorted(root.glob(pattern)):
            if not path.name.startswith(("probe", "segmentation")):
                digest.update(path.read_bytes())
    for image in dataset.images:
        digest.update(repr(image).encode())
        if isinstance(image.path, str) and os.path.exists(image.path):
            status = os.stat(image.path)
            digest.update(f"{status.st_size} {status.st_mtime_ns}".encode())
    return digest.hexdigest()
