"""Files that are written whole, and large arrays on the GPU, in host memory or in mapped temporary files."""

import os
import zipfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryFile

import torch

from . import UserError
from .distributed import gather_rows, is_main, local_world_size


def free_memory(device: torch.device) -> int:
    """Free bytes: on CUDA of the driver and PyTorch's cache, on CPU of the system, within the control group's limit."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    available = int(Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0]) * 1024
    with suppress(OSError, ValueError):  # no control group, or one without a limit
        limit, used, parts = (Path(f"/sys/fs/cgroup/memory.{name}").read_text() for name in ("max", "current", "stat"))
        # Counted as used, and given back when it is needed.
        cached_files = int(parts.split("inactive_file")[1].split()[0])
        available = min(available, max(int(limit) - int(used) + cached_files, 0))
    return available


def free_on_all(device: torch.device) -> int:
    """Free bytes to the process with the least, the same number on all; processes share their machine's memory."""
    free = free_memory(device)
    if device.type == "cpu":
        free //= local_world_size()
    return int(gather_rows(torch.tensor([free])).min())


def atomic_write(path: Path, write: Callable[[Path], None]) -> None:
    """Calls write(temporary path), flushes the file to disk and renames it to path: a reader never sees half of it.
    Raises OSError that names the path."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def save(path: Path, content: dict) -> None:
    """torch.save of tensors and plain values by the main process, whole. Raises OSError."""
    def write(temporary: Path) -> None:
        # PyTorch's error for a path says nothing of a full disk.
        with open(temporary, "wb") as file:
            torch.save(content, file)
    if is_main():
        atomic_write(path, write)


def load(path: Path, what: str, keys: Sequence[str], option: str = "") -> dict:
    """The content, on the CPU, of a file that save wrote with these keys at least. what: "a checkpoint of classify.py".
    option: the one that named the file. Raises UserError."""
    if not path.is_file():
        raise UserError(f"{option}{path} does not exist; name {what}")
    with suppress(Exception):  # torch.load raises many kinds on a file that is none of its own
        check_archive(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
        if content.keys() >= set(keys):
            return content
    raise UserError(f"{option}{path} is not {what}, or is damaged; name another file, or write it again")


def check_archive(path: Path) -> None:
    """Compares the members of a zip archive, as torch.save writes it, with their CRC-32, which torch.load does not do.
    Raises zipfile.BadZipFile. Members saved without one (0) and files that are no archive pass."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                if member.CRC:
                    archive.read(member)


def allocate(shape: Sequence[int], dtype: torch.dtype, device: torch.device, tier: str, folder: Path, what: str,
             log: Callable[[str], None], pin: bool = True) -> torch.Tensor:
    """An uninitialised array on the GPU, in host memory or in a mapped file in folder, the same tier on every process.

    tier: "gpu", "cpu" or "disk", tried first; the others follow in this order, which is "auto"'s. A third of what is
    free stays unused, for training and others on the machine. what: the array in the log. pin: page-locked for a GPU.
    Raises OSError where the disk is too small.
    """
    count, pinned = torch.Size(shape).numel(), pin and device.type == "cuda"
    most = int(gather_rows(torch.tensor([count])).max())
    need = most * dtype.itemsize
    tiers = [] if tier == "disk" else ["gpu", "cpu"] if device.type == "cuda" else ["cpu"]
    for one in sorted(tiers, key=lambda one: one != tier):
        target = device if one == "gpu" else torch.device("cpu")
        free = free_on_all(target)
        # PyTorch takes page-locked memory in powers of two.
        taken = 1 << (need - 1).bit_length() if pinned and one == "cpu" else need
        if taken <= 2 * free // 3:
            where = "on the GPU" if one == "gpu" else "in pinned host memory" if pinned else "in memory"
            log(f"{what}: {need / 1e9:.2f} GB, {where} ({free / 1e9:.2f} GB free)")
            return torch.empty(shape, dtype=dtype, device=target, pin_memory=pinned and one == "cpu")
    log(f"{what}: {need / 1e9:.2f} GB, in a mapped file in {folder}")
    with TemporaryFile(dir=folder) as file:  # without a name, so that it vanishes with the array
        try:
            # All blocks are reserved: writing to a mapped file of holes would kill the process where the disk is full.
            os.posix_fallocate(file.fileno(), 0, need)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(folder)) from error
        array = torch.from_file(f"/proc/self/fd/{file.fileno()}", shared=True, size=most, dtype=dtype)
        return array[:count].view(shape)


def prefetched(batches: Iterator[Sequence], device: torch.device) -> Iterator[Sequence]:
    """The same batches, whose parts are tensors or None; on a GPU made two ahead, by a thread, on a stream of its own,
    whose short kernels go before those of the work that they feed."""
    if device.type != "cuda":
        yield from batches
        return
    stream = torch.cuda.Stream(device, priority=-1)
    stream.wait_stream(torch.cuda.current_stream(device))  # which wrote what batches are made of

    def make():
        with torch.cuda.device(device), torch.cuda.stream(stream):
            return next(batches, None), stream.record_event()

    with ThreadPoolExecutor(1) as thread:
        ahead = deque(thread.submit(make) for _ in range(2))
        while (made := ahead.popleft().result())[0] is not None:
            ahead.append(thread.submit(make))
            batch, ready = made
            torch.cuda.current_stream(device).wait_event(ready)
            for tensor in batch:
                if tensor is not None:
                    tensor.record_stream(torch.cuda.current_stream(device))
            yield batch
