"""Processes: join them as torchrun's variables say (without them: one process), share work, gather rows, end together.

A process that fails or dies ends the others, whatever they are waiting for; one that is only slow does not.
"""

import json
import os
import sys
import time
from contextlib import contextmanager, suppress
from datetime import timedelta
from threading import Thread

import torch
import torch.distributed as dist

from . import UserError

# Seconds: how often the processes look at each other, and after what silence one is taken for dead.
BEAT, SILENCE = 1.0, 120.0
# Collectives follow a barrier where the processes' work before them may take unequal time; barriers wait without limit.
COLLECTIVE, BARRIER, JOIN = timedelta(minutes=30), timedelta(days=30), timedelta(minutes=10)
_group = {"patient": None, "watch": None}


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
        _group["patient"] = dist.new_group(backend="gloo", timeout=BARRIER)
        _group["watch"] = Watch()
        barrier()
        _group["watch"].start()
    except (RuntimeError, ValueError) as error:
        raise UserError(f"the {size} processes did not meet at {os.environ['MASTER_ADDR']}:"
                        f"{os.environ.get('MASTER_PORT')} ({str(error).splitlines()[0]}); start them "
                        "with torchrun, or unset WORLD_SIZE") from None


class Watch(Thread):
    """Shows the other processes through the group's store that this one lives, and ends it with them."""

    def __init__(self):
        super().__init__(daemon=True)
        # A connection of its own: in the group's, a waiting main thread would hold up this one.
        store = dist.TCPStore(os.environ["MASTER_ADDR"], environment("MASTER_PORT"), is_master=False,
                              wait_for_workers=False, timeout=timedelta(seconds=30))
        self.store = dist.PrefixStore(f"watch {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        self.alive, self.rank = [f"alive {number}" for number in range(world_size())], rank()
        self.stopping = self.finished = False
        self.store.set(self.alive[self.rank], "0")

    def run(self) -> None:
        heard, lost = {}, 0
        while lost < 10:
            time.sleep(BEAT)
            now = time.monotonic()
            try:
                self.store.set(self.alive[self.rank], "finished" if self.finished else str(now))
                if self.store.check(["end"]):
                    status, line = self.store.get("end").decode().split(" ", 1)
                    end_process(line, int(status))
                if self.rank == 0 and not self.stopping and self.store.check(["signal"]):
                    os.kill(os.getpid(), int(self.store.get("signal")))
                for number, value in enumerate(self.store.multi_get(self.alive)):
                    if value == b"finished" or heard.get(number, (None, now))[0] != value:
                        heard[number] = value, now
                    if now - heard[number][1] > SILENCE:
                        end_run(f"error: process {number} of {world_size()} has not been heard of for {SILENCE:.0f} s: "
                                "its machine or its connection failed, or it was killed", 2)
                lost = 0
            except RuntimeError:
                # The store lived in process 0. That one may have finished, and this one be about to.
                lost += 1
        if not self.finished:
            end_run("error: process 0 has ended without a word: it was killed, or its machine failed", 2)


def end_run(line: str, status: int) -> None:
    """Ends this process, and with it the others: prints the line on standard error unless another process was first."""
    first, watch = environment("RANK") == 0 or "TORCHELASTIC_ERROR_FILE" not in os.environ, _group["watch"]
    if watch:
        try:
            first = watch.store.add("ends", 1) == 1
            if first:
                watch.store.set("end", f"{status} {line}")
        except RuntimeError:
            first = rank() < 2
    if first:
        print(line, file=sys.stderr, flush=True)
    end_process(line, status)


def end_process(line: str, status: int) -> None:
    """Ends this process without a word but to torchrun, whose report then shows the line."""
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        with suppress(OSError), open(path, "w") as file:
            details = {"py_callstack": line, "timestamp": str(int(time.time()))}
            json.dump({"message": {"message": line, "extraInfo": details}}, file)
    watch = _group["watch"]
    if not watch:
        sys.exit(status)
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    with suppress(RuntimeError):
        left, deadline = watch.store.add("left", 1), time.monotonic() + 5
        # The store may live in process 0, so that the others leave first.
        while rank() == 0 and left < world_size() and time.monotonic() < deadline:
            time.sleep(0.05)
            left = watch.store.add("left", 0)
    # In order it would wait for processes that wait in a collective for this one.
    os._exit(status)


def stops_here(number: int) -> bool:
    """Whether this process stops the run on a signal: the main one, which has what is to be saved. Another passes the
    signal on to it, and works until it ends all, since what it saves may need a step of all."""
    watch = _group["watch"]
    if watch and watch.rank:
        watch.store.set("signal", str(number))
    elif watch:
        watch.stopping = True
    return not watch or watch.rank == 0


def finish() -> None:
    """Waits for all processes at the end of a run, so that none is taken for lost."""
    if watch := _group["watch"]:
        watch.finished = True
        barrier()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    return rank() == 0


def barrier() -> None:
    """Waits for all processes, without limit; those that fail meanwhile end the others."""
    if dist.is_initialized():
        work = dist.barrier(group=_group["patient"], async_op=True)
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
