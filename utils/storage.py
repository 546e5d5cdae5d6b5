"""Where bytes go: how much memory is free, files that are written whole, arrays in memory-mapped files."""

import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import torch


def free_memory(device: torch.device) -> int:
    """Bytes that can still be taken on the device: on CUDA what the driver and PyTorch's cache hold free, on CPU what
    the system calls available, within the control group's limit."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                available = int(line.split()[1]) * 1024
    with suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text()) - int((group / "memory.current").read_text())
        available = min(available, max(limit, 0))
    return available


def atomic_write(path: Path, write: Callable[[Path], None]) -> None:
    """Calls write(temporary path), flushes the file to disk and renames it to path: a reader never sees half of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def create_file(path: Path, shape: Sequence[int], dtype: torch.dtype) -> None:
    """A file whose blocks are all reserved. Raises OSError where the disk is full; a mapped file of holes would kill
    the process when it is written to."""
    with open(path, "wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(1, torch.Size(shape).numel() * dtype.itemsize))


def map_file(path: Path, shape: Sequence[int], dtype: torch.dtype, writable: bool = True) -> torch.Tensor:
    count = torch.Size(shape).numel()
    if count == 0:
        return torch.empty(shape, dtype=dtype)
    return torch.from_file(str(path), shared=writable, size=count, dtype=dtype).view(shape)
