"""Processes: join them as torchrun's variables say (without them: one process), share work, gather rows.

One that fails or dies breaks the collectives of the others; one that is only slow does not.
"""

import os
import time
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from . import UserError

# Collectives follow a barrier where the processes' work before them may take unequal time; barriers wait without limit.
COLLECTIVE, BARRIER, JOIN = timedelta(minutes=30), timedelta(days=30), timedelta(minutes=10)


class Processes:
    """What the processes share once they have joined (else None): a store of texts, which torchrun keeps, and a group
    whose collectives wait without limit."""
    store: dist.Store | None = None
    group: dist.ProcessGroup | None = None


processes = Processes()


def environment(name: str, default: int = 0, least: int = 0) -> int:
    """One of torchrun's variables. Raises UserError where it is not a whole number from least up."""
    text = os.environ.get(name, str(default))
    if not text.isdecimal() or int(text) < least:
        raise UserError(f"{name}={text} in the environment is not a whole number from {least}; unset it, or start the "
                        "script with torchrun, which sets it")
    return int(text)


def init_processes(device: str = "auto") -> torch.device:
    """Joins torchrun's process group, if there is one, and returns this process's device.

    device: "auto" (CUDA where available), "cpu" or "cuda". Raises UserError where "cuda" is absent or has fewer GPUs
    than there are processes on this machine, where torchrun's variables do not fit together, and where the processes
    do not meet.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this machine has no CUDA device that PyTorch can use; use --device cpu")
    use_cuda = device != "cpu" and torch.cuda.is_available()
    if use_cuda:
        gpus, here = torch.cuda.device_count(), environment("LOCAL_WORLD_SIZE", 1, 1)
        if here > gpus:
            raise UserError(f"{here} processes were started on a machine with {gpus} GPU(s), and each needs its own; "
                            f"use --nproc-per-node {gpus}, or --device cpu")
        # Some launchers show each process only its own.
        torch.cuda.set_device(environment("LOCAL_RANK") % gpus)
        # fp32 is float32: TF32 would round the factors of products and convolutions to 11 bits.
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    if environment("WORLD_SIZE", 1, 1) > 1 and not dist.is_initialized():
        join("cpu:gloo,cuda:nccl" if use_cuda else "gloo")
    return torch.device("cuda", torch.cuda.current_device()) if use_cuda else torch.device("cpu")


def join(backend: str) -> None:
    size, missing = environment("WORLD_SIZE"), sorted({"RANK", "MASTER_ADDR"} - os.environ.keys())
    if missing:
        raise UserError(f"WORLD_SIZE={size} in the environment promises {size} processes, but {' and '.join(missing)} "
                        "are not set; unset WORLD_SIZE, or start the script with torchrun")
    if environment("RANK") >= size:
        raise UserError(f"RANK={environment('RANK')} in the environment must be below WORLD_SIZE={size}; start the "
                        "script with torchrun, which sets both")
    try:
        store, *place = next(dist.rendezvous("env://", timeout=JOIN))
        dist.init_process_group(backend, store=store, rank=place[0], world_size=place[1], timeout=COLLECTIVE)
        # Over gloo also where tensors go over NCCL, whose waiting processes would keep their GPUs busy.
        processes.group = dist.new_group(backend="gloo", timeout=BARRIER)
        processes.store = store
        barrier()
    except (RuntimeError, ValueError) as error:
        raise UserError(f"the {size} processes did not meet at {os.environ['MASTER_ADDR']}:"
                        f"{os.environ.get('MASTER_PORT')} ({str(error).splitlines()[0]}); start them "
                        "with torchrun, or unset WORLD_SIZE") from None


def first_end(own: str = "") -> str:
    """How the first process of this run ended: what it gave as own, unlike all others. "" where none has, or this
    cannot be known."""
    if processes.store is None:
        # Not joined: what is wrong then is so for all processes of torchrun.
        return own if os.environ.get("RANK", "0") == "0" or "TORCHELASTIC_RUN_ID" not in os.environ else ""
    try:
        # Sets it where it is empty or absent.
        return processes.store.compare_set("end", "", own).decode()
    except RuntimeError:
        # Without torchrun the store goes with process 0.
        return own if rank() == 1 else ""


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    return rank() == 0


def barrier() -> None:
    """Waits for all processes, without limit. Raises RuntimeError where one has ended."""
    if processes.group is not None:
        work = dist.barrier(group=processes.group, async_op=True)
        # Not within wait(), where no signal would be heard.
        while not work.is_completed():
            time.sleep(0.005)
        work.wait()


@contextmanager
def local_main_first():
    """The first process of every node runs the body before the others: one download, then the others find the file.
    Gives the body whether this is the first process."""
    first = environment("LOCAL_RANK") == 0 or not dist.is_initialized()
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
    barrier()
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
    barrier()
    return all_reduce(torch.tensor([int(condition)])).item() > 0
