"""Where arrays live: all processes take the same tier, whatever each of them has free."""

import os
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from utils import UserError, storage
from utils.distributed import all_reduce, init_processes, rank
from utils.storage import atomic_write

FLOAT = torch.float32


def allocate_with(free_by_rank, full_disk_on=None):
    """One process of several: allocates 1,000 floats with that much memory free, and prints what it got."""
    init_processes("cpu")
    storage.free_memory = lambda device: free_by_rank[rank()]

    def on_disk():
        if rank() == full_disk_on:
            raise OSError(28, "No space left on device")
        return torch.zeros(1000)

    lines, cpu = [], torch.device("cpu")
    try:
        array = storage.allocate((1000,), FLOAT, cpu, "auto", Path("folder"), on_disk, "array", "buy more",
                                 lines.append)
    except UserError as error:
        array, lines = (), [str(error)]
    # Waits for ever, or fails, where only some processes came here.
    total = all_reduce(torch.ones(1) * len(array))
    print(int(total), "; ".join(lines))


def test_processes_that_differ_in_free_memory_take_one_tier(launch):
    # 4,000 bytes are needed, and 0.8 of what is free may be taken.
    for free, where in (((5100, 5100), "in memory"), ((5100, 4900), "in a mapped file"), ((4900, 5100), "in a mapped")):
        out, _ = launch(partial(allocate_with, free), [], processes=2)
        assert out.startswith("2000 array") and where in out


def test_a_disk_that_fails_for_one_process_fails_for_all(launch):
    out, _ = launch(partial(allocate_with, (0, 0), full_disk_on=1), [], processes=2)
    assert out.startswith("0 array")
    assert "fit nowhere: only 0.00 GB are free in memory, another process was refused; buy more" in out


def test_nothing_fits(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"fit nowhere: .*File exists.*only .* GB are free in memory"):
        storage.allocate((1 << 45,), FLOAT, torch.device("cpu"), "disk", tmp_path,
                         lambda: storage.temporary_file(tmp_path / "file", (1,), FLOAT), "array", "buy more", print)


def test_a_pipe_or_a_device_is_not_replaced_by_a_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="not a regular file"):
        atomic_write(tmp_path / "pipe", lambda path: path.write_text("x"))
    assert (tmp_path / "pipe").is_fifo()


def test_memory_in_which_the_system_caches_files_is_free(monkeypatch):
    """In a container's accounts it is used, and it is given back when it is needed."""
    texts = {"/proc/meminfo": "MemTotal: 20 kB\nMemAvailable:   10 kB\n", "/sys/fs/cgroup/memory.max": "1000\n",
             "/sys/fs/cgroup/memory.current": "900\n", "/sys/fs/cgroup/memory.stat": "anon 400\ninactive_file 450\n"}
    monkeypatch.setattr(storage, "Path", lambda name: SimpleNamespace(read_text=lambda: texts[name]))
    assert storage.free_memory(torch.device("cpu")) == 1000 - 900 + 450
    texts["/sys/fs/cgroup/memory.max"] = "max\n"
    assert storage.free_memory(torch.device("cpu")) == 10 * 1024
