"""Processes: join them as torchrun's variables say (without them: one process), share work, gather rows."""

import os
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from . import UserError


def init_processes(device: str = "auto") -> torch.device:
    """Joins torchrun's process group, if there is one, and returns this process's device.

    device: "auto" (CUDA where available), "cpu" or "cuda". Raises UserError where "cuda" is absent, or has fewer GPUs
    than there are processes on this machine.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this machine has no CUDA device that PyTorch can use; use --device cpu")
    use_cuda = device != "cpu" and torch.cuda.is_available()
    if use_cuda:
        gpus, here = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        if here > gpus:
            raise UserError(f"{here} processes were started on a machine with {gpus} GPU(s), and each needs its own; "
                            f"use --nproc-per-node {gpus}, or --device cpu")
        # Some launchers show each process only its own.
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)) % gpus)
        # fp32 is float32: TF32 would round the factors of products and convolutions to 11 bits.
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
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
    """The first process of every node runs the body before the others: one download, then the others find the file.
    Gives the body whether this is the first process."""
    first = int(os.environ.get("LOCAL_RANK", 0)) == 0 or not dist.is_initialized()
    if not first:
        barrier()
    try:
        yield first
    finally:
        # Also after an error: the others must not wait for ever.
        if first:
            barrier()


def shard(count: int) -> range:
    """This process's share of range(count): contiguous, in rank order; sizes differ by at most one."""
    return range(count * rank() // world_size(), count * (rank() + 1) // world_size())


def gather_rows(rows: torch.Tensor) -> torch.Tensor:
    """Concatenates the processes' rows [n, ...] in rank order, on every process; n may differ, and be 0."""
    if world_size() == 1:
        return rows
    counts = torch.zeros(world_size(), dtype=torch.int64, device=rows.device)
    counts[rank()] = len(rows)
    counts = all_reduce(counts).tolist()
    # all_gather wants equal shapes; the padding is cut off again below.
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
