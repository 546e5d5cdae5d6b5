"""Files are written whole and read back as data; arrays live on the same tier for all processes."""

import os
from functools import partial
from io import FileIO
from types import SimpleNamespace

import pytest
import torch
from conftest import call_main

from utils import UserError, storage
from utils.distributed import all_reduce, gather_rows, init_processes, rank
from utils.storage import allocate, atomic_write, load, save

CPU = torch.device("cpu")


# Files

def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    """As on a disk that is full: the error names the file, nothing else is left."""
    path = tmp_path / "file"
    path.write_text("old")

    def fails(temporary):
        temporary.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left on device.*file"):
        atomic_write(path, fails)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    atomic_write(path, lambda temporary: temporary.write_text("new"))
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_one_line(tmp_path):
    """/dev/full takes no byte, as torch.save finds out."""
    def main():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(storage, "open", lambda path, mode: FileIO("/dev/full", mode), raising=False)
            save(tmp_path / "checkpoint.pth", {"x": torch.zeros(1000)})

    status, _, err = call_main(main, [])
    assert status == 2 and err == (f"error: {tmp_path}/checkpoint.pth: No space left on device; correct this and "
                                   "start again\n")


@pytest.mark.parametrize("damage", ["cut", "empty", "a bit", "text", "a key", "code", "no file"])
def test_a_damaged_file_is_one_line_that_names_it(tmp_path, damage):
    path, content = tmp_path / "head.pth", {"head": torch.arange(1000.0), "kind": "linear"}
    save(path, content)
    found = load(path, "a head", ("head", "kind"))
    assert torch.equal(found["head"], content["head"]) and found["kind"] == "linear"
    whole = bytearray(path.read_bytes())
    if damage == "a key":
        save(path, {"head": torch.zeros(1)})
    elif damage == "code":
        torch.save(content | {"more": os.getcwd}, path)
    elif damage == "no file":
        path.unlink()
    else:
        whole[len(whole) // 2] ^= 1
        path.write_bytes({"cut": whole[:-1000], "empty": b"", "a bit": whole, "text": b"head"}[damage])
    with pytest.raises(UserError, match=r"^--evaluate .*head.pth (does not exist; name|is not) a head") as caught:
        load(path, "a head", ("head", "kind"), "--evaluate ")
    assert "\n" not in str(caught.value)


# Arrays

def allocate_with(folder, free_by_rank, tier="auto"):
    """One process of several: allocates 4,000 bytes with that much memory free, and prints what it got."""
    init_processes("cpu")
    storage.free_memory = lambda device: free_by_rank[rank()]
    lines = []
    array = allocate((10, 100), torch.float32, CPU, tier, folder, "array", lines.append)
    array.fill_(rank() + 1)
    # Waits for ever, or fails, where only some processes came here.
    print(int(all_reduce(array.sum())), tuple(array.shape), *lines)


def test_processes_that_differ_in_free_memory_take_one_tier(launch, tmp_path, monkeypatch):
    """They share the machine's memory, and of a process's share two thirds may be taken."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    for free, where in (((12020, 12020), "in memory (0.00 GB free)"), ((12020, 11980), "in a mapped file"),
                        ((11980, 12020), "in a mapped file")):
        out, _ = launch(partial(allocate_with, tmp_path, free), [], processes=2)
        assert out.startswith("3000 (10, 100) array: 0.00 GB, ") and where in out
    assert not list(tmp_path.iterdir())


def test_the_tier_that_is_asked_for_and_what_stays_free(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "free_memory", lambda device: 10_000)
    for tier, count, where in (("cpu", 1000, "in memory"), ("gpu", 1000, "in memory"), ("disk", 1000, "in a mapped"),
                               ("auto", 1660, "in memory"), ("auto", 1670, "in a mapped file in")):
        lines = []
        array = allocate((count,), torch.float32, CPU, tier, tmp_path, "x", lines.append)
        assert where in lines[0] and array.dtype == torch.float32


def test_a_mapped_file_has_no_name_and_a_full_disk_is_said_at_once(tmp_path, monkeypatch):
    array = allocate((3, 1000), torch.bfloat16, CPU, "disk", tmp_path, "x", print)
    array.copy_(torch.arange(3000).view(3, 1000))
    assert array[2, 40] == 2040 and not list(tmp_path.iterdir())

    def full(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match=f"No space left on device: '{tmp_path}'"):
        allocate((3, 1000), torch.bfloat16, CPU, "disk", tmp_path, "x", print)


def gather():
    init_processes("cpu")
    for dtype in (torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.float64):
        rows = torch.arange(rank() * 3 * 2).view(-1, 2).to(dtype)
        assert gather_rows(rows).equal(torch.tensor([[0, 1], [2, 3], [4, 5]]).to(dtype))


def test_rows_of_all_processes(launch):
    """Of any type, and where a process has none."""
    launch(gather, [], processes=2)


def test_memory_in_which_the_system_caches_files_is_free(monkeypatch):
    """In a container's accounts it is used, and it is given back when it is needed."""
    texts = {"/proc/meminfo": "MemTotal: 20 kB\nMemAvailable:   10 kB\n", "/sys/fs/cgroup/memory.max": "1000\n",
             "/sys/fs/cgroup/memory.current": "900\n", "/sys/fs/cgroup/memory.stat": "anon 400\ninactive_file 450\n"}
    monkeypatch.setattr(storage, "Path", lambda name: SimpleNamespace(read_text=lambda: texts[name]))
    assert storage.free_memory(CPU) == 1000 - 900 + 450
    texts["/sys/fs/cgroup/memory.max"] = "max\n"
    assert storage.free_memory(CPU) == 10 * 1024
