"""Files that are written whole, and large arrays on the GPU, in host memory or in mapped files."""

import errno
import fcntl
import glob
import json
import os
import socket
import weakref
import zipfile
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch

from . import UserError
from .distributed import any_process, environment, gather_rows, is_main, rank, world_size
from .provenance import digest

TIERS = ("gpu", "cpu", "disk")


def free_memory(device: torch.device) -> int:
    """Free bytes: on CUDA of the driver and PyTorch's cache, on CPU of the system, within the control group's limit."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with suppress(OSError, IndexError):
        available = int(Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0]) * 1024
    with suppress(OSError, ValueError, IndexError):
        limit, used, parts = (Path(f"/sys/fs/cgroup/memory.{name}").read_text() for name in ("max", "current", "stat"))
        # Counted as used, and given back when it is needed.
        cached_files = int(parts.split("inactive_file")[1].split()[0])
        available = min(available, max(int(limit) - int(used) + cached_files, 0))
    return available


def temporary_name(path: Path) -> Path:
    # Cut: with what is added, the whole could be longer than names of files may be.
    return path.with_name(f".{path.name[:40]}.{socket.gethostname()}.{os.getpid()}.tmp")


def sweep(folder: Path) -> None:
    """Removes the temporary files that processes of this machine left in the folder when they died."""
    for path in folder.glob(f".*.{glob.escape(socket.gethostname())}.*.tmp"):
        # What is another user's, file or process, stays.
        with suppress(ValueError, PermissionError):
            try:
                os.kill(int(path.name.split(".")[-2]), 0)
            except ProcessLookupError:
                path.unlink(missing_ok=True)


class RunLock:
    """Held by the main process while it uses the file at path, which no other run then uses; released by close() or by
    the end of the process. Raises UserError where another run holds it."""

    def __init__(self, path: Path):
        self.close = lambda: None
        if rank() > 0:
            return
        lock = path.with_name(f".{path.name}.lock")
        file = open(lock, "w")  # noqa: SIM115  held until close()
        try:
            # Not flock, which forked workers would keep when this process is dead.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # A holder that ended meanwhile has removed the file, and another run may hold a new one.
            held = os.path.samestat(os.stat(lock), os.fstat(file.fileno()))
        except OSError:
            held = False
        if not held:
            raise UserError(f"another run is writing {path}; wait for its end, or give another --name")
        # Called at the latest when this object or the process ends.
        self.close = weakref.finalize(self, lambda: (lock.unlink(missing_ok=True), file.close()))


def atomic_write(path: Path, write: Callable[[Path], None]) -> None:
    """Calls write(temporary path), flushes the file to disk and renames it to path: a reader never sees half of it.
    Raises OSError, also where a device or a pipe is at path, which the renaming would replace."""
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    temporary = temporary_name(path)
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_checked(path: Path, content: dict) -> None:
    """torch.save of tensors and plain values by the main process, whole (atomic_write), with a digest by which
    load_checked knows them. Raises UserError where the file cannot be written."""
    if not is_main():
        return
    try:
        atomic_write(path, lambda temporary: torch.save({"digest": digest(content), **content}, temporary))
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path} could not be written ({reason}); what was there before is unchanged; make room, or "
                        "choose another folder") from None


def load_checked(path: Path, what: str, keys: Sequence[str], option: str = "") -> dict:
    """The content, on the CPU, of a file that save_checked wrote with these keys at least. what: "a checkpoint of
    classify.py". option: the one that named the file. Raises UserError."""
    if not path.is_file():
        raise UserError(f"{option}{path} does not exist; name {what}")
    with suppress(Exception):  # torch.load raises many kinds on a file that is none of its own
        content = torch.load(path, map_location="cpu", weights_only=True)
        if content.pop("digest") == digest(content) and content.keys() >= set(keys):
            return content
    raise UserError(f"{option}{path} is not {what}, or not as it was written (damaged, cut, changed); name another "
                    "file, or write it again")


def files_record(made_with: dict, files: Sequence[Path]) -> bytes:
    """What is written beside large files, as JSON: what they were made with, and the CRC-32 of their content. Flushes
    them to disk. Raises OSError, and ValueError for an empty file."""
    sums = {}
    for path in files:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        sums[path.name] = zlib.crc32(np.memmap(path, mode="r"))
    return json.dumps({"made_with": made_with, "checksums": sums}).encode()


def is_recorded(record: Path, made_with: dict, files: Sequence[Path], log: Callable[[str], None]) -> bool:
    """Whether the files are, byte by byte, those whose files_record lies at record."""
    with suppress(OSError, ValueError):
        saved = record.read_bytes()
        log(f"comparing {', '.join(path.name for path in files)} with the checksums in {record}")
        return saved == files_record(made_with, files)
    return False


def check_archive(path: Path) -> None:
    """Compares the members of a zip archive, as torch.save writes it, with their CRC-32, which torch.load does not do.
    Raises zipfile.BadZipFile. Members saved without one (0) and files that are no archive pass."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                if member.CRC:
                    with archive.open(member) as file:
                        while file.read(1 << 22):
                            pass


def create_file(path: Path, shape: Sequence[int], dtype: torch.dtype) -> None:
    """A file whose blocks are all reserved: writing to a mapped file of holes would kill the process where the disk is
    full. Raises OSError there."""
    with open(path, "wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(1, torch.Size(shape).numel() * dtype.itemsize))


def map_file(path: Path, shape: Sequence[int], dtype: torch.dtype, writable: bool = True) -> torch.Tensor:
    count = torch.Size(shape).numel()
    if count == 0:
        return torch.empty(shape, dtype=dtype)
    return torch.from_file(str(path), shared=writable, size=count, dtype=dtype).view(shape)


def temporary_file(folder: Path, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """An array in a mapped file of this process alone, which vanishes with it. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    path = temporary_name(folder / f"array{rank()}")
    try:
        create_file(path, shape, dtype)
        return map_file(path, shape, dtype)
    finally:
        path.unlink(missing_ok=True)


def has_room(need: int, device: torch.device, reserve: int = 0, pinned: bool = False) -> tuple[bool, int]:
    """(whether every process finds need bytes free on the device, bytes free to the process with the least). A fifth of
    what is free stays unused, and at least reserve bytes; the processes of a machine share its memory."""
    free = free_memory(device)
    if device.type == "cpu":
        free //= environment("LOCAL_WORLD_SIZE", 1, 1)
        # PyTorch takes pinned memory in powers of two.
        if pinned and need:
            need = 1 << (need - 1).bit_length()
    numbers = gather_rows(torch.tensor([[need, free]]))
    need, free = int(numbers[:, 0].max()), int(numbers[:, 1].min())
    return need <= min(0.8 * free, free - reserve), free


def require_room(need: float, device: torch.device, what: str, advice: Callable[[float], str]) -> None:
    """Raises UserError, on all processes, where one of them has not need bytes free on the device. what: needs them, in
    the plural; advice: of the share of need that would fit, what to use instead."""
    room, free = has_room(int(need), device)
    if not room:
        share = " in each process" if world_size() > 1 else ""
        raise UserError(f"{what} need {need / 1e9:.2f} GB{share}, {free / 1e9:.2f} GB are free on {device}; use "
                        f"{advice(0.8 * free / need)}")


def allocate(shape: Sequence[int], dtype: torch.dtype, device: torch.device, tier: str, folder: Path,
             on_disk: Callable[[], torch.Tensor], what: str, advice: str, log: Callable[[str], None],
             reserve: dict[str, int] | None = None, pin: bool = True) -> torch.Tensor:
    """An uninitialised array on the GPU, in host memory or in a file, the same tier on every process.

    tier: tried first; the others follow as in TIERS ("auto": TIERS alone). The choice and its reasons are logged before
    memory is taken. on_disk: makes the array in a file in folder, or raises OSError. what: the array in messages.
    reserve: bytes to leave free, by tier. advice: for the UserError where it fits nowhere. pin: page-locked where there
    is a GPU.
    """
    need = torch.Size(shape).numel() * dtype.itemsize
    share = f" in each of {world_size()} processes" if world_size() > 1 else ""
    what = f"{what}: {need / 1e9:.2f} GB{share}"
    pinned, reasons = pin and device.type == "cuda", []
    places = {"gpu": "on the GPU", "cpu": "in pinned host memory" if pinned else "in memory",
              "disk": f"in a mapped file in {folder}"}
    for one in sorted(TIERS[device.type != "cuda":], key=lambda one: one != tier):
        where = places[one]
        if one != "disk":
            target = device if one == "gpu" else torch.device("cpu")
            room, free = has_room(need, target, (reserve or {}).get(one, 0), pinned)
            if not room:
                reasons.append(f"only {free / 1e9:.2f} GB are free {where}")
                continue
            where += f" ({free / 1e9:.2f} GB free)"
        log("; ".join([f"{what}, {where}", *reasons]))
        array, reason = None, "another process was refused"
        try:
            if one == "disk":
                array = on_disk()
            else:
                array = torch.empty(shape, dtype=dtype, device=target, pin_memory=pinned and one == "cpu")
        except OSError as error:
            reason = f"{folder} cannot take the file ({error.strerror})"
        except RuntimeError as error:
            reason = f"{one} memory was refused ({str(error).splitlines()[0][:60]})"
        if not any_process(array is None):
            return array
        reasons.append(reason)
    raise UserError(f"{what} fit nowhere: {', '.join(reasons)}; {advice}")


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

    # The interpreter waits at its end for an executor's thread, as it must where that is within a call of CUDA.
    thread = ThreadPoolExecutor(1)
    try:
        ahead = deque(thread.submit(make) for _ in range(2))
        while (made := ahead.popleft().result())[0] is not None:
            ahead.append(thread.submit(make))
            batch, ready = made
            torch.cuda.current_stream(device).wait_event(ready)
            for tensor in batch:
                if tensor is not None:
                    tensor.record_stream(torch.cuda.current_stream(device))
            yield batch
    finally:
        thread.shutdown(cancel_futures=True)
