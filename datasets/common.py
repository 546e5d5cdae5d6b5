"""What the three scripts share around a run: arguments, one-line errors, log, progress, results lines, tables.

Nothing here knows of a task. A script calls, in this order: add_common_arguments, open_output, Log, Progress,
append_result, and runs its main function through exit_with_one_line_errors.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path

import torch
import torch.distributed as dist

from models import METHODS, CheckpointError

from . import UserError
from .distributed import is_main, world_size

PAPER_TABLES = Path(__file__).with_name("paper_tables.json")


class OneLineParser(argparse.ArgumentParser):
    """argparse, with errors on one line and no usage text before them."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message} (all options: --help)\n")


def exit_with_one_line_errors(main: Callable[[], None]) -> None:
    """Runs main; a mistake of the user's, or memory run out, becomes one line on standard error and exit status 2."""
    try:
        main()
    except (UserError, CheckpointError, torch.OutOfMemoryError) as error:
        mend = " (take a smaller --batch-size)" if isinstance(error, torch.OutOfMemoryError) else ""
        print(f"error: {' '.join(str(error).split())}{mend}", file=sys.stderr, flush=True)
        if dist.is_initialized():
            # The others may wait in a collective for this process; leaving the group in order would wait for them.
            os._exit(2)
        sys.exit(2)
    # NCCL asks for this. Gloo does not, and with torch 2.6 it was seen to wait for its own threads for ever.
    if dist.is_initialized() and "nccl" in str(dist.get_backend_config()):
        dist.destroy_process_group()


def add_common_arguments(parser: argparse.ArgumentParser, datasets: Sequence[str],
                         batch_size: int | None) -> None:
    """Adds the options that mean the same in all scripts."""
    group = parser.add_argument_group("model")
    group.add_argument("--model", default="ibot", help=f"{', '.join(METHODS)}, or timm/NAME (default: %(default)s)")
    group.add_argument("--weights", default="official", help="official, random (seeded control), a path or a URL")
    group.add_argument("--num-heads", type=positive_int, help="attention heads, where width / 64 is wrong")
    group = parser.add_argument_group("data")
    group.add_argument("--dataset", default="synthetic", choices=datasets, help="(default: %(default)s)")
    group.add_argument("--data-path", type=Path, metavar="DIR", help="the data set's root folder")
    group = parser.add_argument_group("run")
    group.add_argument("--output-dir", type=Path, default=Path("outputs"), metavar="DIR", help="(default: %(default)s)")
    group.add_argument("--batch-size", type=positive_int, default=batch_size,
                       help=f"over all processes together (default: {batch_size or 'the published one'})")
    cores = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    group.add_argument("--workers", type=non_negative_int, default=max(1, min(16, cores)),
                       help="data loading processes per process (default: its share of the cores, here %(default)s)")
    group.add_argument("--precision", choices=("fp32", "bf16", "fp16"),
                       help="of the encoder (default: bf16 on CUDA, fp32 on CPU)")
    group.add_argument("--seed", type=int, default=0)
    group.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    group.add_argument("--table", action="store_true",
                       help="no run: print the results in --output-dir, the paper's numbers beside them")


def positive_int(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive whole number")
    return value


def non_negative_int(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return value


def default_precision(device: torch.device) -> str:
    """The encoder's precision where the user names none; measured in tests/bench_retrieval.py."""
    return "bf16" if device.type == "cuda" else "fp32"


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context in which the encoder runs at "fp32", "bf16" or "fp16"."""
    dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    return torch.autocast(device.type, dtype, enabled=dtype is not None)


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


def open_output(folder: Path) -> Path:
    """Makes the output folder and proves that it can be written, before any work is done. Raises UserError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".writable.{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"output folder {folder} cannot be written ({error.strerror}); "
                        "choose another with --output-dir") from None
    return folder


def write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Calls write(temporary path), flushes the file to disk and renames it to path: a reader never sees half of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def revision() -> str:
    """The commit of this code, with "+changes" where the files differ from it; "unknown" outside a checkout."""
    def git(*words):
        return subprocess.run(("git", *words), cwd=Path(__file__).parent, capture_output=True, text=True,
                              check=True).stdout.strip()
    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


class Log:
    """Prints lines from the main process and appends them to the folder's log.txt.

    The file waits for keep, which a script calls once its inputs have been read: a mistake leaves no file behind.
    """

    def __init__(self, folder: Path):
        self.path, self.waiting, self.kept = folder / "log.txt", [], False

    def __call__(self, line: str) -> None:
        if not is_main():
            return
        print(line, flush=True)
        self.waiting.append(line)
        if self.kept:
            self.keep()

    def keep(self) -> None:
        """Writes the lines so far, and from now on every line at once."""
        self.kept = True
        if is_main() and self.waiting:
            with open(self.path, "a") as file:
                file.writelines(line + "\n" for line in self.waiting)
            self.waiting.clear()

    def start(self, arguments: argparse.Namespace) -> None:
        """Writes what a reader needs to repeat the run: revision, versions, processes, sorted arguments."""
        self(f"{Path(sys.argv[0]).name} revision {revision()}, torch {torch.__version__}, processes {world_size()}")
        self(" ".join(f"{name}={value}" for name, value in sorted(plain_arguments(arguments).items())))


class Progress:
    """Shows how far long work is and how long it will take, from the main process, on standard error.

    One line that is rewritten in a terminal; elsewhere a line every tenth of the work, at most one in ten seconds, and
    the last.
    """

    def __init__(self, total: int, label: str, unit: str = ""):
        self.total, self.label, self.unit = total, label, unit
        self.done, self.start, self.last = 0, time.monotonic(), 0.0
        self.terminal = sys.stderr.isatty()
        self.next_share = 0.1

    def update(self, count: int = 1) -> None:
        self.done += count
        now = time.monotonic()
        if not is_main() or self.total == 0:
            return
        share, elapsed = self.done / self.total, now - self.start
        if self.terminal:
            due = now - self.last > 0.2 or share >= 1
        else:
            due = share >= self.next_share and now - self.last > 10 or (share >= 1 and elapsed > 10)
        if not due:
            return
        self.last, self.next_share = now, share + 0.1
        rate = self.done / max(elapsed, 1e-9)
        text = (f"{self.label}: {self.done}/{self.total} {self.unit} ({rate:.1f}/s), "
                f"{clock(elapsed)} gone, {clock((self.total - self.done) / rate)} left")
        ending = "\n" if share >= 1 or not self.terminal else ""
        print(("\r\033[K" if self.terminal else "") + text, end=ending, file=sys.stderr, flush=True)


def clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"


def plain_arguments(arguments: argparse.Namespace) -> dict:
    """The arguments as values that JSON can hold."""
    def plain(value):
        if isinstance(value, (list, tuple)):
            return [plain(item) for item in value]
        return str(value) if isinstance(value, Path) else value
    return {name: plain(value) for name, value in vars(arguments).items()}


def append_result(folder: Path, result: dict) -> None:
    """Appends one line to results.jsonl, in one write, so that runs that share a folder do not mix their lines."""
    line = json.dumps(result) + "\n"
    with open(folder / "results.jsonl", "a") as file:
        file.write(line)
        file.flush()
        os.fsync(file.fileno())


def read_results(folder: Path, task: str) -> list[dict]:
    """The results lines of one task, oldest first. Raises UserError where there is no file or a line is no result."""
    path = folder / "results.jsonl"
    if not path.is_file():
        raise UserError(f"{path} does not exist; run without --table first, or name its folder with --output-dir")
    results = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            result = json.loads(line)
            if not {"task", "model", "weights", "dataset", "args"} <= result.keys():
                raise ValueError
        except (ValueError, AttributeError):
            raise UserError(f"{path}, line {number}, is not a results line; remove it") from None
        results.append(result)
    return [result for result in results if result["task"] == task]


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def beside_published(published: float | None, ours: float | None) -> list[str]:
    """Three cells: published, ours, difference; "-" where one is missing."""
    show = [f"{value:.1f}" if value is not None else "-" for value in (published, ours)]
    both = published is not None and ours is not None
    return [*show, f"{ours - published:+.1f}" if both else "-"]


def labels_of_run(result: dict) -> str:
    """What must stand wherever the result is printed: random weights, synthetic data; "" for neither."""
    marks = []
    if result["weights"] == "random":
        marks.append("random weights")
    if result["dataset"].startswith("synthetic"):
        marks.append("synthetic data")
    return ", ".join(marks)
