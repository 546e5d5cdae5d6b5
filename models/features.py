"""Final tokens of a datasets.patches.PatchDataset, each image encoded once: on the GPU, in memory, or in a mapped file.

Every process holds the features of its own contiguous share of the images, in the type of the run's precision: tokens
layer-normalised, as attentive heads use them, class tokens as the encoder gives them.
"""

import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from utils import UserError
from utils.distributed import any_process, barrier, gather_rows, is_main, shard, world_size
from utils.provenance import digest, this_run
from utils.run import Progress, autocast, log_waiting
from utils.storage import (
    RunLock,
    allocate,
    atomic_write,
    create_file,
    files_record,
    is_recorded,
    map_file,
    prefetched,
    require_room,
    temporary_file,
)

from .encoder import Encoder
from .own import OwnEncoder
from .probes import normalise

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Of the folder of a kept cache: the beginning of its fingerprint's digest, and what it holds.
CACHE_NAME = re.compile("[0-9a-f]{20}-(tokens|cls)")


class Batch(NamedTuple):
    """This process's part of a global batch: tokens[rows] (all where rows is None) and their labels.

    tokens: normalised [M, N, D], or class tokens as they are [M, 1, D], for heads that use no others.
    """
    tokens: torch.Tensor
    rows: torch.Tensor | None
    labels: torch.Tensor


class Encoded(NamedTuple):
    """Class tokens [B, D] as the encoder gives them, and all tokens [B, 1 + N, D], normalised."""
    cls: torch.Tensor
    tokens: torch.Tensor


@dataclass
class Features:
    """The rows of this process: of the patches with ids first_id, first_id + 1, and so on.

    labels int64 [n] and cls [n, D] lie on the device, tokens ([n, N, D] or None) where they have room. missing: ids of
    all processes whose image could not be decoded.
    """

    first_id: int
    labels: torch.Tensor
    cls: torch.Tensor
    tokens: torch.Tensor | None
    missing: torch.Tensor

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """Sorted row numbers, on the CPU, of those ids that this process holds."""
        rows = ids - self.first_id
        return rows[(rows >= 0) & (rows < len(self.labels))].sort().values

    def batches(self, steps: Sequence[torch.Tensor], with_tokens: bool) -> Iterator[Batch]:
        """This process's part of each global batch of ids; with_tokens: all tokens, else the class token. Tokens that
        do not lie on the device are copied there by a thread, ahead of the steps."""
        device = self.labels.device
        tokens = self.tokens if with_tokens else self.cls[:, None]
        if tokens.device == device:
            for rows in map(self.rows, steps):
                if len(rows) and len(rows) == rows[-1] - rows[0] + 1:
                    # Neighbours, as in every test batch, need not be gathered.
                    part = slice(int(rows[0]), int(rows[-1]) + 1)
                    yield Batch(tokens[part], None, self.labels[part])
                else:
                    rows = rows.to(device, non_blocking=True)  # without this, it waits for the step before
                    yield Batch(tokens, rows, self.labels[rows])
            return

        def staged():
            for rows in map(self.rows, steps):
                copy = torch.empty(len(rows), *tokens.shape[1:], dtype=tokens.dtype, pin_memory=device.type == "cuda")
                torch.index_select(tokens, 0, rows, out=copy)
                yield Batch(copy.to(device, non_blocking=True), None, self.labels[rows.to(device, non_blocking=True)])

        yield from prefetched(staged(), device)


def decoded_ids(dataset, features: Features) -> torch.Tensor:
    """The ids of the patches that have features. Raises UserError where none has."""
    ids = torch.arange(dataset.num_patches)
    ids = ids[~torch.isin(ids, features.missing)]
    if len(ids) == 0:
        raise UserError("no image of a split could be decoded; restore the files")
    return ids


@torch.inference_mode()
def encode_tokens(encoder: Encoder, images: torch.Tensor, precision: str) -> Encoded:
    """uint8 [B, 3, H, W] on the encoder's device -> tokens in the precision's type."""
    with autocast(images.device, precision):
        tokens = encoder(encoder.preprocess(images))
    # Class tokens are a copy: a view would keep all tokens of the batch alive. Normalised before the cast: afterwards
    # an error of the mean would stay.
    return Encoded(tokens[:, 0].to(DTYPES[precision], copy=True), normalise(tokens.float()).to(DTYPES[precision]))


def encode_features(encoder: Encoder, dataset, label: str, with_tokens: bool, precision: str, workers: int, tier: str,
                    folder: Path, keep: Path | None, log: Callable[[str], None], image_size: int = 224) -> Features:
    """Features of a data set whose transform is deterministic, from one pass over its images or from a kept cache.

    label: the data set's name in messages. with_tokens: all tokens, else the class token only. tier: where tokens live
    (utils.storage.allocate). folder: of a mapped file. keep: folder of kept caches, or None.
    Raises UserError where there is no room anywhere, or a feature is not finite.
    """
    device, dtype, width = next(encoder.parameters()).device, DTYPES[precision], encoder.embed_dim
    images, length = shard(len(dataset)), 1 + (image_size // encoder.patch_size) ** 2
    start, stop = int(dataset.first_id[images.start]), int(dataset.first_id[images.stop])
    shape, total = (stop - start, length, width), dataset.num_patches
    arrays = {"cls": torch.zeros(stop - start, width, dtype=dtype, device=device),
              "decoded": torch.zeros(stop - start, dtype=torch.uint8, device=device)}

    kept = None
    if keep:
        full = {"cls": ((total, width), dtype), "decoded": ((total,), torch.uint8)}
        full |= {"tokens": ((total, length, width), dtype)} if with_tokens else {}
        made_with = fingerprint(encoder, dataset, precision, with_tokens)
        name = f"{digest(made_with)[:20]}-{'tokens' if with_tokens else 'cls'}"
        kept = FeatureCache.open(keep / name, full, slice(start, stop), made_with, log)
    if with_tokens:
        arrays["tokens"] = allocate(
            shape, dtype, device, tier, keep if kept else folder,
            lambda: kept.arrays["tokens"] if kept else temporary_file(folder, shape, dtype),
            f"{label}: tokens of {total} patches, {length} x {width} {precision} each",
            "use a larger disk with --cache-dir, more processes, or --probe linear knn, which need no tokens", log)

    if kept and kept.complete:
        log(f"{label}: features come from the cache {kept.path}")
        copy_arrays(kept.arrays, arrays)
    else:
        finite = encode_into(arrays, encoder, dataset, images, start, label, precision, workers, log)
        if any_process(not finite):
            raise UserError(f"{label}: the encoder gave features that are not finite at --precision {precision}; "
                            "use bf16 or fp32")
        if kept:
            kept.write(arrays)
    missing = (gather_rows(arrays["decoded"]) == 0).nonzero().flatten().cpu()
    if len(missing):
        log(f"{label}: {len(missing)} patches are left out, their images could not be decoded")
    return Features(start, dataset.labels[start:stop].to(device), arrays["cls"], arrays.get("tokens"), missing)


def encode_into(arrays: dict[str, torch.Tensor], encoder: Encoder, dataset, images: range, first_id: int, label: str,
                precision: str, workers: int, log: Callable[[str], None]) -> bool:
    """One pass over the images: fills the arrays, whose first row is that of first_id, and sets decoded to 1. Returns
    whether all that was written is finite."""
    device = arrays["cls"].device
    progress = Progress(len(arrays["cls"]), f"encoding {label}", "patches")
    finite = torch.ones((), dtype=torch.bool, device=device)
    batches = dataset.batches(images, encode_batch_size(device), workers, pin_memory=device.type == "cuda")
    for patches, ids in log_waiting(batches, f"encoding {label}", log):
        encoded = encode_tokens(encoder, patches.to(device, non_blocking=True), precision)
        values = encoded._asdict() | {"decoded": torch.ones(len(ids), dtype=torch.uint8, device=device)}
        for name in arrays:
            finite &= values[name].isfinite().all()
        # Ids are consecutive but for images that could not be decoded.
        start = 0
        for run in ids.tensor_split((ids.diff() != 1).nonzero().flatten() + 1):
            row = int(run[0]) - first_id
            for name, array in arrays.items():
                array[row:row + len(run)].copy_(values[name][start:start + len(run)], non_blocking=True)
            start += len(run)
        progress.update(len(ids))
    return bool(finite)


def require_batch_room(encoder: Encoder, size: int, batch_size: int, option: str = "--image-size") -> None:
    """Raises UserError, on all processes, where a batch (batch_size: over all processes) of images of size x size,
    which option sets, would not fit while it is encoded in float32. Counted is the least: pixels as bytes and twice as
    floats, and of one block the tokens, their sum with what is added and an MLP four times as wide."""
    count, patch = -(-batch_size // world_size()), encoder.patch_size
    need = count * (27 * size**2 + 4 * 6 * (size // patch) ** 2 * encoder.embed_dim)
    require_room(need, encoder.mean.device, f"batches of {batch_size} images of {size} x {size}", lambda share:
                 f"--batch-size {int(share * count) * world_size()} or less" if share * count >= 1 else
                 f"--batch-size 1 and {option} {max(1, int(size * (share * count) ** 0.5) // patch) * patch} or less")


def encode_batch_size(device: torch.device) -> int:
    return 256 if device.type == "cuda" else 16


def copy_arrays(source: dict[str, torch.Tensor], target: dict[str, torch.Tensor]) -> None:
    """Fills the target's arrays, except those that are the source's own memory."""
    for name, array in target.items():
        if array.data_ptr() != source[name].data_ptr():
            array.copy_(source[name])


@dataclass
class FeatureCache:
    """A folder with a file for each array, written as PATH.partial and renamed when it is complete.

    arrays: mapped, this process's rows. lock: of the main process while the cache is written. made_with: the
    fingerprint of the features, in complete.json beside the sizes and checksums of the files.
    """
    path: Path
    made_with: dict
    complete: bool
    arrays: dict[str, torch.Tensor]
    lock: RunLock | None

    @classmethod
    def open(cls, path: Path, full: dict, rows: slice, made_with: dict,
             log: Callable[[str], None]) -> "FeatureCache | None":
        """The cache at path, complete or to be written; None, with a line in the log, where it cannot be written. full:
        name -> (shape over all processes, dtype). rows: this process's."""
        partial, lock, problem, complete, arrays = partial_path(path), None, "", False, {}
        if is_main():
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                complete = is_recorded(path / "complete.json", made_with, [path / name for name in full], log)
                if not complete:
                    lock = RunLock(path)
                    start_files(path, full, log)
            except UserError:
                problem = "another run is writing it"
            except OSError as error:
                problem = f"{error.strerror}: {error.filename or partial}"
        complete = any_process(complete)
        folder = path if complete else partial
        if not problem:
            try:
                arrays = {name: map_file(folder / name, shape, dtype, writable=not complete)[rows]
                          for name, (shape, dtype) in full.items()}
            except RuntimeError:
                problem = f"{folder} is not seen by every process"
        if any_process(bool(problem)):
            if lock:
                shutil.rmtree(partial, ignore_errors=True)
            log(f"the features are not kept in {path}: {problem or 'not every process can write it'}")
            return None
        return cls(path, made_with, complete, arrays, lock)

    def write(self, arrays: dict[str, torch.Tensor]) -> None:
        """Called by every process with its rows; the cache is complete when it returns."""
        copy_arrays(arrays, self.arrays)
        barrier()
        if is_main():
            partial = partial_path(self.path)
            record = files_record(self.made_with, [partial / name for name in self.arrays])
            atomic_write(partial / "complete.json", lambda path: path.write_bytes(record))
            os.replace(partial, self.path)
            self.lock.close()
        barrier()


def partial_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.partial")


def start_files(path: Path, full: dict[str, tuple], log: Callable[[str], None]) -> None:
    """Makes the files of a cache, in their size, at partial_path(path). Removes what was there and at path, and other
    half-written caches that no run writes any more. Raises OSError."""
    partial = partial_path(path)
    for other in {*path.parent.glob("*.partial")} - {partial}:
        # A folder of the user's stays.
        if not CACHE_NAME.fullmatch(other.stem):
            continue
        with suppress(UserError):
            others = RunLock(other.with_suffix(""))
            shutil.rmtree(other, ignore_errors=True)
            others.close()
    for old in (path, partial):
        if old.exists():
            log(f"{old} is damaged or half-written: refused, it is written anew")
            shutil.rmtree(old)
    partial.mkdir()
    for name, (shape, dtype) in full.items():
        create_file(partial / name, shape, dtype)


def source_files(*objects: object) -> set[str]:
    """The files of this repository that define these functions and the classes of these objects, and those of the same
    folder whose functions or classes they use."""
    root, files = str(Path(__file__).parents[1]), set()
    # A partial function's own module is functools.
    names = [getattr(kind, "__module__", None) for one in objects
             for kind in (getattr(one, "func", one), *type(one).__mro__)]
    while names:
        module = sys.modules.get(names.pop())
        path = getattr(module, "__file__", None) or ""
        if path.startswith(root) and path not in files:
            files.add(path)
            used = (str(getattr(value, "__module__", "")) for value in vars(module).values())
            names += [name for name in used if name.startswith(f"{module.__package__}.")]
    return files


def encoder_identity(encoder: Encoder) -> dict:
    """All that an encoder's tokens depend on but the code, by name in words; kept in encoder.identity, as a timm model
    fits its tables to the images that it gets."""
    if "identity" not in vars(encoder):
        unused = ("projector", "decoder")
        tensors = {name: tensor for name, tensor in (*encoder.named_parameters(), *encoder.named_buffers())
                   if name.split(".")[0] not in unused}
        # What is absent or off in evaluation is left out: timm's versions differ in what they list.
        layers = [line for name, child in encoder.named_children() if name not in unused
                  for line in str(child).splitlines() if "Identity()" not in line and "Drop" not in line]
        position, own = getattr(encoder.position_embedding, "__name__", None), isinstance(encoder, OwnEncoder)
        encoder.identity = {
            "the content of the encoder's weights": digest(tensors),
            "the architecture of the encoder": digest(layers, position, encoder.cls_from, own and encoder.sha256),
            "the number of heads": encoder.num_heads,
            "the order of patches": "shuffled" if getattr(encoder, "shuffle", None) else "in place"}
    return encoder.identity


def fingerprint(encoder: Encoder, dataset, precision: str, with_tokens: bool) -> dict:
    """All that the features depend on, by name in words: encoder and data set, the code of both, versions, precision,
    type of device."""
    code = source_files(encoder, encoder.position_embedding, encoder.projector, dataset, dataset.load)
    return {**encoder_identity(encoder), **dataset.identity("data set"), "the precision": precision,
            "the type of device": next(encoder.parameters()).device.type, "the kind of tokens": with_tokens,
            "the versions of packages": this_run()["versions"],
            "the code": digest([Path(path).read_bytes() for path in sorted({*code, __file__, encoder.method})])}
