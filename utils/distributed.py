"""Processes: join torchrun's group, share work, gather rows. Without torchrun there is one process; nothing waits."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from . import UserError

# A process may wait in a collective while another one downloads weights or has more images to decode.
TIMEOUT = timedelta(days=1)


def init_processes(device: str = "auto") -> torch.device:
    """Joins torchrun's process group, if there is one, and returns this process's device.

    device: "auto" (CUDA where available), "cpu" or "cuda". Raises UserError where "cuda" is absent or has fewer GPUs
    than there are processes on this machine.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this machine has no CUDA device that PyTorch can use; use --device cpu")
    use_cuda = device != "cpu" and torch.cuda.is_available()
    if use_cuda:
        gpus, here = torch.cuda.device_count(), local_world_size()
        if here > gpus:
            raise UserError(f"{here} processes were started on a machine with {gpus} GPU(s), and each needs its own; "
                            f"use --nproc-per-node {gpus}, or --device cpu")
        # Some launchers show each process only its own.
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)) % gpus)
        # fp32 is float32: TF32 would round the factors of products and convolutions to 11 bits.
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    found = torch.device("cuda", torch.cuda.current_device()) if use_cuda else torch.device("cpu")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        # NCCL's barriers would guess the GPU from the rank, wrongly where machines differ in their GPUs.
        backend, device_id = ("nccl", found) if use_cuda else ("gloo", None)
        dist.init_process_group(backend, timeout=TIMEOUT, device_id=device_id)
    return found


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def local_world_size() -> int:
    """How many processes of this run are on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def is_main() -> bool:
    return rank() == 0


@contextmanager
def local_main_first() -> Iterator[None]:
    """The first process of every machine runs the body before the others: one download, then the others find the
    file."""
    first = int(os.environ.get("LOCAL_RANK", 0)) == 0
    if dist.is_initialized() and not first:
        dist.barrier()
    yield
    if dist.is_initialized() and first:
        dist.barrier()


def shard(count: int) -> range:
    """This process's share of range(count): contiguous, in rank order; sizes differ by at most one."""
    return range(count * rank() // world_size(), count * (rank() + 1) // world_size())


def all_reduce(value: torch.Tensor) -> torch.Tensor:
    """Adds the processes' tensors of one shape, in place, and returns the sum, on every process."""
    if world_size() > 1:
        # NCCL knows GPUs only.
        there = value.cuda() if dist.get_backend() == "nccl" else value
        dist.all_reduce(there)
        value.copy_(there)
    return value


def gather_rows(rows: torch.Tensor) -> torch.Tensor:
    """Concatenates the processes' rows [n, ...] in rank order, on every process; n may differ, and be 0."""
    if world_size() == 1:
        return rows
    counts = torch.zeros(world_size(), dtype=torch.int64)
    counts[rank()] = len(rows)
    counts = all_reduce(counts).tolist()
    whole = rows.new_zeros(sum(counts), *rows.shape[1:])
    whole.split(counts)[rank()].copy_(rows)
    return all_reduce(whole)
