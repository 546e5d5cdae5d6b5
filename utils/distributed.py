"""Processes: join them, share work among them, bring rows together again.

Everything here also works without a launcher, as one process. Started by torchrun, a script reads RANK, WORLD_SIZE
and LOCAL_RANK from the environment and needs no flag of its own.
"""

import os
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from . import UserError


def init_processes(device: str = "auto") -> torch.device:
    """Joins the process group described by torchrun's variables, if there is one, and returns this process's device.

    device: "auto" (CUDA where available), "cpu" or "cuda". Raises UserError if "cuda" is asked for and absent.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this machine has no CUDA device that PyTorch can use; take --device cpu")
    use_cuda = device != "cpu" and torch.cuda.is_available()
    if use_cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    if "WORLD_SIZE" in os.environ and not dist.is_initialized():
        # Hours: a process may wait while the main one downloads a checkpoint or writes a cache.
        dist.init_process_group("cpu:gloo,cuda:nccl" if use_cuda else "gloo", timeout=timedelta(hours=6))
    return torch.device("cuda", torch.cuda.current_device()) if use_cuda else torch.device("cpu")


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    return rank() == 0


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


@contextmanager
def local_main_first():
    """The first process of every node runs the body before the others: one download, then the others find the file."""
    first = int(os.environ.get("LOCAL_RANK", 0)) == 0 or not dist.is_initialized()
    if not first:
        barrier()
    try:
        yield
    finally:
        # Also after an error: the others must not wait for ever.
        if first:
            barrier()


def shard(count: int) -> range:
    """This process's share of range(count): contiguous, in rank order, every index in exactly one share.

    Shares differ by at most one, and are empty where there are more processes than indices.
    """
    return range(count * rank() // world_size(), count * (rank() + 1) // world_size())


def gather_rows(rows: torch.Tensor) -> torch.Tensor:
    """Concatenates the processes' rows in rank order, on every process.

    rows: [n, ...]; n may differ between processes (0 too), the other sizes and the dtype may not.
    Returns [sum of n, ...].
    """
    if world_size() == 1:
        return rows
    counts = [torch.zeros(1, dtype=torch.int64, device=rows.device) for _ in range(world_size())]
    dist.all_gather(counts, torch.tensor([len(rows)], device=rows.device))
    counts = [int(count) for count in counts]
    # all_gather wants equal shapes on every backend; the padding is cut off again below.
    padded = rows.new_zeros((max(counts), *rows.shape[1:]))
    padded[: len(rows)] = rows
    gathered = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(gathered, padded)
    return torch.cat([part[:count] for part, count in zip(gathered, counts, strict=True)])


def all_reduce(value: torch.Tensor) -> torch.Tensor:
    """Adds the processes' tensors of one shape, in place, and returns the sum, on every process."""
    if world_size() > 1:
        dist.all_reduce(value)
    return value


def any_process(condition: bool) -> bool:
    """Whether the condition holds on any of the processes; the same answer on all of them."""
    return all_reduce(torch.tensor([int(condition)])).item() > 0
