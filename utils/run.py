"""What a run of any script needs: its command line, device, log, progress, and how it ends."""

import argparse
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from . import UserError
from .distributed import init_processes, is_main, local_world_size, world_size
from .formats import STYLES
from .results import args_to_json, this_run

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}  # by --precision


def run_main(main: Callable[[], None]) -> None:
    """Runs a script's main. A mistake of the user's, a file that cannot be used and memory that ran out are one line
    and exit status 2, Ctrl-C is one line and 130; anything else is a defect and shows its traceback."""
    if dist.is_torchelastic_launched():  # by torchrun, whose report shows the error
        from torch.distributed.elastic.multiprocessing.errors import record
        main = record(main)
    with suppress(AttributeError):  # where standard output is no stream of the system's
        sys.stdout.reconfigure(errors="backslashreplace")  # names that the terminal cannot show
    try:
        main()
        if dist.is_initialized():
            dist.destroy_process_group()
    except KeyboardInterrupt:
        leave("stopped by Ctrl-C; --resume goes on from a checkpoint, where there is one", 130)
    except Exception as error:
        text = " ".join(str(error).split())
        if isinstance(error, BrokenPipeError):
            os._exit(1)  # nobody reads on, as in "| head"; a regular end would write once more
        if isinstance(error, UserError):
            leave(f"error: {text}", 2)
        if isinstance(error, OSError) and error.filename:
            leave(f"error: {error.filename}: {error.strerror}; correct this and start again", 2)
        # PyTorch's allocator of CPU memory raises a RuntimeError, starting a worker process an OSError.
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in text:
            leave(f"error: memory ran out ({text[:150]}): use a smaller --batch-size, fewer --workers", 2)
        leave(traceback.format_exc(), 1)


def leave(message: str, status: int) -> None:
    """Ends the process with a message on standard error. Another process than the first waits before: if the first has
    failed too, torchrun ends this one meanwhile, and it is said once."""
    if int(os.environ.get("RANK", 0)) > 0:
        time.sleep(3)
    print(message, file=sys.stderr, flush=True)
    if dist.is_initialized():
        # In order it would wait for processes that wait in a collective for this one.
        sys.stdout.flush()
        os._exit(status)
    sys.exit(status)


class OneLineParser(argparse.ArgumentParser):
    """argparse, with errors on one line. doc: a script's docstring, which --help shows."""

    def __init__(self, doc: str = "", **options):
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def parse_args(self, words: Sequence[str] | None = None, namespace: argparse.Namespace | None = None):
        """As argparse's, and as `changed` the names of those that differ from their default, which tables mark."""
        args = super().parse_args(words, namespace)
        args.changed = [name for name, value in vars(args).items() if value != self.get_default(name)]
        return args

    @staticmethod
    def check_used(args: argparse.Namespace, mode: str, *unused: str) -> None:
        """Raises UserError for options other than their default that a mode does not read; --table reads none."""
        changed = [f"--{name.replace('_', '-')}" for name in unused if name in args.changed]
        if changed and not args.table:
            raise UserError(f"{' '.join(changed)} has no effect with {mode}; leave one of them out")

    def error(self, message: str):
        raise UserError(f"{message} (all options: {self.prog} --help)")


def add_common_arguments(parser: argparse.ArgumentParser, models: Sequence[str], datasets: Sequence[str],
                         batch_size: int | None) -> None:
    """Adds the options that mean the same in all scripts. models, datasets: names; batch_size: the default."""
    group = parser.add_argument_group("model")
    group.add_argument("--model", default="ibot",
                       help=f"{', '.join(models)}, timm/NAME, or FILE.py:FUNCTION, your own (default: %(default)s)")
    group.add_argument("--name", help="of the run in results, tables and file names (default: the model's)")
    group.add_argument("--weights", default="official",
                       help="official, random (untrained control), a path or a URL (default: %(default)s)")
    group.add_argument("--weights-key", metavar="KEY", help="which of a file's state dictionaries: model, ema, ...")
    group.add_argument("--num-heads", type=positive_int, help="attention heads, where width / 64 is wrong")
    group = parser.add_argument_group("data")
    group.add_argument("--dataset", default="synthetic", choices=datasets, help="(default: %(default)s)")
    group.add_argument("--data-path", type=Path, metavar="DIR", help="the data set's root folder")
    group = parser.add_argument_group("run")
    group.add_argument("--output-dir", type=Path, default=Path("outputs"), metavar="DIR", help="(default: %(default)s)")
    group.add_argument("--batch-size", type=positive_int, default=batch_size,
                       help=f"over all processes together (default: {batch_size or 'the published one'})")
    group.add_argument("--workers", type=non_negative_int,
                       default=max(1, len(os.sched_getaffinity(0)) // local_world_size()),
                       help="data loading processes per process (default: its share of the cores, here %(default)s)")
    group.add_argument("--precision", choices=("fp32", "bf16", "fp16"),
                       help="of the encoder (default: bf16 on CUDA, fp32 on CPU)")
    group.add_argument("--compile", action="store_true",
                       help="torch.compile the encoder's blocks: seconds to minutes at the start, for long runs")
    group.add_argument("--seed", type=seed_number, default=0, help="(default: %(default)s)")
    group.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: %(default)s)")
    group.add_argument("--table", action="store_true",
                       help="no run: print the results in --output-dir beside the paper's numbers (python -m "
                            "utils.tables: of all tasks)")
    group.add_argument("--format", choices=STYLES, default="text", help="of --table (default: %(default)s)")


def add_patch_arguments(parser: argparse.ArgumentParser, files: str) -> None:
    """Adds the options of part patches and images. files: how many annotation files are taken, for the help."""
    group = parser.add_argument_group("patches and images")
    group.add_argument("--image-size", type=positive_int, default=224, metavar="N",
                       help="of what the encoder gets, patches or whole images (default: %(default)s)")
    group.add_argument("--crop-scale", type=positive_float, default=0.5,
                       help="side of a part patch / distance to the next keypoint (default: 0.5, the authors' code; "
                            "the paper's text: 1.0)")
    group.add_argument("--keypoints", nargs="+", metavar="K",
                       help="numbers from 1 or names, or all (default: the paper's; of --dataset keypoints all)")
    group.add_argument("--annotations", type=Path, nargs="+", metavar="FILE",
                       help=f"--dataset keypoints: your own, in COCO's form (JSON): {files}")
    group.add_argument("--images", type=Path, nargs="+", metavar="DIR", help="their folder, or one for each FILE")
    group.add_argument("--category", nargs="+", metavar="NAME",
                       help="of these alone; several are pooled and must have the same keypoints (default: all)")


def number(kind: type, low: float, high: float = 10**9) -> Callable[[str], float]:
    """The argparse type of an int or a float from low to high."""
    def parse(text: str) -> float:
        value = kind(text)
        if not low <= value <= high:  # nan is neither
            raise argparse.ArgumentTypeError(f"{text!r} is not from {low} to {high}")
        return value
    parse.__name__ = "whole number" if kind is int else "number"  # for argparse's message
    return parse


positive_int, non_negative_int = number(int, 1), number(int, 0)
# What float32 holds with room to multiply.
positive_float, non_negative_float = number(float, 1e-30, 1e30), number(float, 0, 1e30)
# Seeds are multiplied by up to a million on the way to a generator of 64 bits.
seed_number = number(int, 0, 2**32 - 1)


def setup(args: argparse.Namespace) -> tuple[torch.device, "Log"]:
    """Starts a run: joins the processes, chooses device, precision and name (kept in args), makes the output folder,
    and logs run, revision, versions, processes and arguments. Raises UserError and OSError."""
    args.name = args.name or args.model
    if not args.name.isprintable():
        raise UserError(f"--name {args.name!r}: use characters that can be printed, on one line")
    if args.dataset != "keypoints" and any(vars(args).get(name) for name in ("annotations", "images", "category")):
        raise UserError(f"--annotations, --images and --category are for --dataset keypoints, not for {args.dataset}")
    if args.data_path is None and args.dataset != "keypoints" and not args.dataset.startswith("synthetic"):
        raise UserError(f"--dataset {args.dataset} needs --data-path DIR; --dataset synthetic needs no files")
    if args.data_path and args.dataset.startswith("synthetic"):
        raise UserError(f"--data-path {args.data_path}: --dataset {args.dataset} reads no files; name another data set")
    device = init_processes(args.device)
    args.precision = args.precision or ("bf16" if device.type == "cuda" else "fp32")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    log = Log(args.output_dir)
    this_run.cache_clear()
    run = this_run()
    log(f"{Path(sys.argv[0]).name} run {run['run']}, {run['date']}, revision {run['revision']}, "
        + ", ".join(f"{name} {version}" for name, version in run["versions"].items()) + f", processes {world_size()}")
    log(" ".join(f"{name}={value}" for name, value in sorted(args_to_json(args).items())))
    # x86 says avx512_bf16 or amx_bf16, ARM bf16.
    if args.precision == "bf16" and device.type == "cpu" and "bf16" not in Path("/proc/cpuinfo").read_text():
        log("this CPU has no instructions for bf16: --precision fp32 is several times faster on it")
    return device, log


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context in which the encoder runs at a --precision."""
    return torch.autocast(device.type, DTYPES[precision], enabled=precision != "fp32")


class Log:
    """Prints lines from the main process, and appends them to log.txt in the folder."""

    def __init__(self, folder: Path):
        self.path = folder / "log.txt"

    def __call__(self, line: str) -> None:
        if is_main():
            print(line, flush=True)
            with open(self.path, "a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(line + "\n")


class Progress:
    """Says on the main process's standard error how far long work is and how long it will take: after ten seconds, then
    at every tenth of the work, or every five minutes."""

    def __init__(self, total: int, label: str, unit: str = ""):
        self.total, self.label, self.unit = total, label, unit
        self.done, self.next_share = 0, 0.0
        self.start = self.last = time.monotonic()

    def update(self, count: int = 1) -> None:
        # A process's own share, from which the others' is estimated, may be more than theirs, or nothing.
        self.done = min(self.done + count, self.total)
        if not is_main() or self.done == 0:
            return
        now, share = time.monotonic(), self.done / self.total
        if now - self.last <= 10 or share < self.next_share and now - self.last <= 300:
            return
        self.last, self.next_share, elapsed = now, share + 0.1, now - self.start
        left = elapsed * (self.total - self.done) / self.done
        print(f"{self.label}: {self.done}/{self.total} {self.unit}, {timedelta(seconds=int(elapsed))} elapsed, "
              f"{timedelta(seconds=int(left))} left", file=sys.stderr, flush=True)
