"""What a run of any script needs: common options, one-line errors, the log, progress."""

import argparse
import multiprocessing
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import TextIO

import torch
import torch.distributed as dist

from . import UserError
from .distributed import any_process, end_run, environment, finish, init_processes, is_main, stops_here, world_size
from .formats import STYLES
from .provenance import check_same, this_run
from .results import args_to_json, unsaved
from .storage import RunLock, load_checked, save_checked, sweep

WORKER_LOST = ("a data loading process was killed or is stuck, most often because memory or shared memory (/dev/shm) "
               "ran out; use fewer --workers")
# A signal to all of a run's processes may reach a worker first.
WORKER_STOPPED = re.compile(r"DataLoader worker .* signal: (Terminated|Interrupt)")
# What memory that ran out, and processes that ended, are called by those who notice.
NO_MEMORY = re.compile("out of memory|not enough memory|can't allocate memory|Cannot allocate memory|bad_alloc", re.I)
NO_PROCESS = re.compile("gloo|NCCL|Connection closed|Connection reset|Broken pipe|Timed out", re.I)


class OneLineParser(argparse.ArgumentParser):
    """argparse, with errors on one line. doc: a script's docstring; its first line becomes the description, its
    indented lines the examples after --help."""

    def __init__(self, doc: str = "", **options):
        examples = "\n".join(line for line in doc.splitlines() if line.startswith("    "))
        super().__init__(description=doc.split("\n")[0], epilog=examples and f"examples:\n{examples}",
                         formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def parse_args(self, words: Sequence[str] | None = None, namespace: argparse.Namespace | None = None):
        """As argparse's, and as `changed` the names of those that differ from their default, which tables mark. Empty
        words, as of a shell variable that is not set, and those that no file can be named after are errors. Raises
        UserError where a list holds a value twice."""
        words = sys.argv[1:] if words is None else words
        for option, word in zip(["", *words], words, strict=False):
            name, longest = os.fsencode(word), max(map(len, re.sub(".*://.*", "", word).split("/")))
            if re.fullmatch(r"(--[\w-]+=)?", word) or longest > 200 or "\ufffd" in name.decode(errors="replace"):
                self.error(f"argument {option}: {ascii(word[:40])} is empty, longer than file names are, or not UTF-8")
        args = super().parse_args(words, namespace)
        for action in self._actions:
            values = vars(args).get(action.dest) if action.nargs == "+" else None
            if values and len(set(values)) < len(values):
                raise UserError(f"{action.option_strings[0]} {' '.join(map(str, values))}: the values must differ")
        args.changed = [name for name, value in vars(args).items() if value != self.get_default(name)]
        return args

    @staticmethod
    def check_used(args: argparse.Namespace, mode: str, *unused: str) -> None:
        """Raises UserError for options other than their default that a mode does not read; --table reads none."""
        changed = [f"--{name.replace('_', '-')}" for name in unused if name in args.changed]
        if changed and not args.table:
            raise UserError(f"{' '.join(changed)} has no effect with {mode}; leave one of them out")

    def error(self, message):
        end_run(f"{self.prog}: error: {message} (all options: --help)", 2)


class Interrupted(KeyboardInterrupt):
    """SIGINT or SIGTERM; args: its number."""


class Ending:
    """What the end of this process's run must know, since it may come anywhere."""
    saved, options, log = "", {}, print  # what to go on from, and the run's arguments and log
    save: Callable[[], None] | None = None  # writes a checkpoint of what is done
    whole, signal = False, 0  # whether a signal must wait, and one that does


def exit_with_one_line_errors(main: Callable[[], None]) -> None:
    """Runs main. A user's mistake, memory that runs out, a process that was killed or a full disk is one line on
    standard error and exit status 2; Ctrl-C or SIGTERM one that says what is saved, and 130 or 143."""
    Ending.saved, Ending.save, Ending.whole, Ending.signal = "nothing is saved yet; start again", None, False, 0
    unsaved.clear()
    before = {each: signal.signal(each, signal_handler()) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        main()
        finish()
    except BrokenPipeError:
        silence(sys.stdout)
    except (Interrupted, UserError, MemoryError, RuntimeError, OSError) as error:
        number = error.args[0] if isinstance(error, Interrupted) else signal.SIGTERM
        if isinstance(error, Interrupted) or WORKER_STOPPED.match(str(error)):
            if Ending.save:
                Ending.save()
            name = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
            status, line = 128 + number, f"stopped by {name}: {Ending.saved}"
        elif (line := one_line(error)) is None:
            raise
        else:
            status, line = 2, f"error: {line}"
        for each in before:
            # torchrun sends one to the others as soon as one process has ended.
            signal.signal(each, signal.SIG_IGN)
        kill_workers()
        end_run(line, status)
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
    # All processes are here and all is written. NCCL asks for destroy_process_group, which takes gloo's half along, and
    # with torch 2.6 that was seen to wait for its own threads for ever.
    if dist.is_initialized() and "nccl" in str(dist.get_backend_config()):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def kill_workers() -> None:
    """Ends this process's own, of which one may be stuck: leaving in order would wait for it."""
    raises = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's, for a worker that ends
    for child in multiprocessing.active_children():
        child.kill()
        child.join(1)
    signal.signal(signal.SIGCHLD, raises or signal.SIG_DFL)


def one_line(error: Exception) -> str | None:
    """What the user should know of an error, on one line; None for one that is a defect of this code."""
    text = " ".join(str(error).split())
    if isinstance(error, UserError):
        return text
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or NO_MEMORY.search(text):
        cache = ", or --cache disk" if "cache" in Ending.options else ""
        return f"memory ran out ({text[:150]}): use a smaller --batch-size, fewer --workers{cache}"
    if text.startswith("DataLoader worker"):
        return WORKER_LOST
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'a file'}: {error.strerror}; correct this and start again"
    if "PytorchStreamWriter" in text:
        return f"a file could not be written ({text[:150]}); make room and start again"
    if dist.is_initialized() and NO_PROCESS.search(text):
        return (f"another process of this run has ended or is stuck ({text[:150]}); what it said, or the system's log, "
                f"says why; {Ending.saved}")
    return None


def signal_handler() -> Callable:
    """The first signal stops the run, by an Interrupted in the main process; the second one stops it at once."""
    owner = os.getpid()

    def handle(number, frame):
        if os.getpid() != owner:
            # A forked worker, which the run itself will end.
            if number == signal.SIGTERM:
                os._exit(128 + number)
            return
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler would raise when workers end
        for each in (signal.SIGINT, signal.SIGTERM):
            # torchrun sends a second one itself.
            signal.signal(each, signal.SIG_IGN if "TORCHELASTIC_RUN_ID" in os.environ else signal.SIG_DFL)
        if not stops_here(number):
            return
        if not Ending.whole:
            raise Interrupted(number)
        Ending.signal = number
    return handle


@contextmanager
def uninterrupted() -> Iterator[None]:
    """A signal that stops the run waits for the end of the body."""
    Ending.whole = True
    try:
        yield
    finally:
        Ending.whole = False
    if Ending.signal:
        raise Interrupted(Ending.signal)


@cache
def log_once(line: str) -> None:
    Ending.log(line)


class Checkpoint:
    """The file that a stopped run goes on from, which no other run uses until close().

    what: the file in messages. unit: "epoch" or "iteration", the key of how many are done. settings: all that must be
    the same when the run is resumed. Raises UserError where another run uses the file.
    """

    def __init__(self, path: Path, what: str, unit: str, settings: dict):
        self.path, self.what, self.unit, self.settings, self.lock = path, what, unit, settings, RunLock(path)

    def load(self, resume: bool, keys: Sequence[str], log: Callable[[str], None]) -> dict:
        """The content, with these keys at least; {} where the run starts from the beginning. Raises UserError for the
        file of a run with other settings; without resume only where that is unfinished, since it would be lost."""
        saved, keys = {}, ("settings", self.unit, *keys)
        if not resume:
            with suppress(UserError):  # a file that cannot be read is no loss
                saved = load_checked(self.path, self.what, keys)
            # When probing has finished there is no checkpoint any more.
            if saved and (self.unit == "epoch" or saved["iteration"] < saved["settings"]["iterations"]):
                check_same(self.path, saved["settings"], self.settings, "without --resume", "that run is unfinished: "
                           "continue it with --resume, give this one another --name, or delete the file")
            return {}
        if not any_process(self.path.exists()):
            log(f"{self.path} does not exist: starting from the beginning")
            return {}
        saved = load_checked(self.path, self.what, keys, "--resume: ")
        check_same(self.path, saved["settings"], self.settings)
        log(f"resumed after {self.unit} {saved[self.unit]}")
        Ending.saved = self.how_to_go_on(saved[self.unit])
        return saved

    def save(self, done: int, content: dict) -> None:
        """Writes the content and how many epochs or iterations are done, as save_or_warn does."""
        save_or_warn(self.path, {"settings": self.settings, self.unit: done, **content}, self.how_to_go_on(done))

    def how_to_go_on(self, done: int) -> str:
        return f"{self.unit} {done} is saved in {self.path}; go on with --resume"

    def close(self, delete: bool = False) -> None:
        if delete and is_main():
            self.path.unlink(missing_ok=True)
        self.lock.close()


def save_or_warn(path: Path, content: dict, saved: str = "") -> None:
    """save_checked that does not stop the run: a file that cannot be written is warned of once, and by append_result
    unless a later try succeeds. saved: what a stopped run then tells its user."""
    try:
        save_checked(path, content)
        unsaved.pop(path, None)
        Ending.saved = saved or Ending.saved
    except UserError as error:
        if path not in unsaved:
            Ending.log(f"warning: {error}; the run goes on")
        unsaved[path] = str(error)


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
    cores = len(os.sched_getaffinity(0)) // environment("LOCAL_WORLD_SIZE", 1, 1)
    group.add_argument("--workers", type=worker_count, default=max(1, min(256, cores)),
                       help="data loading processes per process (default: its share of the cores, here %(default)s)")
    group.add_argument("--precision", choices=("fp32", "bf16", "fp16"),
                       help="of the encoder (default: bf16 on CUDA, fp32 on CPU)")
    group.add_argument("--compile", action="store_true",
                       help="torch.compile the encoder's blocks: seconds to minutes at the start, for long runs")
    group.add_argument("--seed", type=seed_number, default=0, help="(default: %(default)s)")
    group.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: %(default)s)")
    group.add_argument("--debug", action="store_true", help="show the whole traceback of an error")
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
    group.add_argument("--skip-bad-images", action="store_true",
                       help="leave out images that cannot be decoded, and count them, instead of stopping")
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
        with suppress(ValueError, OverflowError):
            # Not true of nan either.
            if low <= (value := kind(text)) <= high:
                return value
        name = "whole number" if kind is int else "number"
        raise argparse.ArgumentTypeError(f"{text!r} is not a {name} from {low} to {high}")
    return parse


positive_int, non_negative_int = number(int, 1), number(int, 0)
# What float32 holds with room to multiply.
positive_float, non_negative_float = number(float, 1e-30, 1e30), number(float, 0, 1e30)
# More threads or processes do not start on common systems.
worker_count = number(int, 0, 256)
# Seeds are multiplied by up to a million on the way to a generator of 64 bits.
seed_number = number(int, 0, 2**32 - 1)


def setup(args: argparse.Namespace) -> tuple[torch.device, "Log"]:
    """Starts a run: joins the processes, chooses device, precision and name (kept in args), makes the output folder,
    and logs run, revision, versions, processes and arguments. Raises UserError."""
    device, Ending.options = init_processes(args.device), vars(args)
    args.precision, args.name = args.precision or default_precision(device), args.name or args.model
    if vars(args).get("cache") == "gpu" and device.type == "cpu":
        raise UserError("--cache gpu: this run has no GPU; use --cache cpu or disk")
    if args.dataset != "keypoints" and any(vars(args).get(name) for name in ("annotations", "images", "category")):
        raise UserError(f"--annotations, --images and --category are for --dataset keypoints, not for {args.dataset}")
    if args.data_path and args.dataset.startswith("synthetic"):
        raise UserError(f"--data-path {args.data_path}: --dataset {args.dataset} reads no files; name another data set")
    open_output(args.output_dir)
    log = Ending.log = Log()
    this_run.cache_clear()
    run = this_run()
    log(f"{Path(sys.argv[0]).name} run {run['run']}, {run['date']}, revision {run['revision']}, "
        + ", ".join(f"{name} {version}" for name, version in run["versions"].items()) + f", processes {world_size()}")
    log(" ".join(f"{name}={value}" for name, value in sorted(args_to_json(args).items())))
    return device, log


def default_precision(device: torch.device) -> str:
    """The encoder's precision where the user names none; measured in tests/bench_retrieval.py."""
    return "bf16" if device.type == "cuda" else "fp32"


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context in which the encoder runs at "fp32", "bf16" or "fp16"."""
    dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    return torch.autocast(device.type, dtype, enabled=dtype is not None)


def open_output(folder: Path) -> None:
    """Makes the output folder and checks that it can be written. Raises UserError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".writable.{os.getpid()}"
        probe.touch()
        probe.unlink()
        sweep(folder)
    except OSError as error:
        raise UserError(f"output folder {folder} cannot be written ({error.strerror}); "
                        "choose another with --output-dir") from None


class Log:
    """Prints lines from the main process. Once a script opens it, after its inputs have been read so that a mistake
    leaves no file behind, all lines also go to log.txt."""

    def __init__(self):
        self.path, self.pending, self.failed = None, [], False

    def __call__(self, line: str) -> None:
        if is_main():
            say(line, sys.stdout)
            self.pending.append(line)
            self._write()

    def open(self, folder: Path) -> None:
        self.path = folder / "log.txt"
        self._write()

    def _write(self) -> None:
        if not (self.path and self.pending):
            return
        try:
            with open(self.path, "a") as file:
                file.writelines(line + "\n" for line in self.pending)
            self.pending.clear()
        except OSError as error:
            # The lines stay for the next try.
            if not self.failed:
                say(f"warning: {self.path} cannot be written ({error.strerror}); the run goes on", sys.stdout)
            self.failed = True


def say(text: str, stream: TextIO, end: str = "\n") -> None:
    """print, but where nobody reads any more (| head), or the disk is full, the run goes on without it."""
    try:
        print(text, end=end, file=stream, flush=True)
    except OSError:
        silence(stream)


def silence(stream: TextIO) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class Progress:
    """Shows on the main process's standard error how far long work is and how long it will take: on one rewritten line
    in a terminal; elsewhere on a line every tenth of the work, at most one in ten seconds, and the last."""

    def __init__(self, total: int, label: str, unit: str = ""):
        self.total, self.label, self.unit = total, label, unit
        self.done, self.start, self.last = 0, time.monotonic(), 0.0
        self.terminal, self.next_share = sys.stderr.isatty(), 0.1

    def update(self, count: int = 1) -> None:
        self.done += count
        now = time.monotonic()
        if not is_main() or self.total == 0:
            return
        share, elapsed = self.done / self.total, now - self.start
        due = share >= self.next_share and now - self.last > 10 or share >= 1 and elapsed > 10
        if self.terminal:
            due = now - self.last > 0.2 or share >= 1
        if not due:
            return
        self.last, self.next_share = now, share + 0.1
        rate = self.done / max(elapsed, 1e-9)
        text = (f"{self.label}: {self.done}/{self.total} {self.unit} ({rate:.1f}/s), "
                f"{clock(elapsed)} elapsed, {clock((self.total - self.done) / rate)} left")
        ending = "\n" if share >= 1 or not self.terminal else ""
        say(("\r\033[K" if self.terminal else "") + text, sys.stderr, ending)


def log_waiting(batches: Iterable, what: str, log: Callable[[str], None]) -> Iterator:
    """The same batches; at the end logs for how long they were waited for, and how long what is done with them took."""
    start, waited, batches = time.monotonic(), 0.0, iter(batches)
    while True:
        before = time.monotonic()
        batch = next(batches, None)
        waited += time.monotonic() - before
        if batch is None:
            break
        yield batch
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    total = time.monotonic() - start
    log(f"{what}: {total:.1f} s, {waited:.1f} s of it waiting for images to be decoded, the rest for the encoder")


def clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
