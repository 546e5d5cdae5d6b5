"""How a run ends.

1. A user's mistake, memory that ran out, a full disk or a process that was killed is one line and exit status 2; any
   other error is a defect of this code, and shows its traceback.
2. Ctrl-C and SIGTERM end the run with one line that says what is saved, and status 130 or 143. The main process saves;
   the others work on meanwhile, since its last step may need them. A second Ctrl-C ends it at once (torchrun apart).
3. Of several processes the first to fail speaks. The others, when a collective breaks or torchrun sends them SIGTERM,
   find in the processes' store that it has spoken, and end quietly with its status.
4. A log or a checkpoint that cannot be written is a warning, and the run goes on; a result is printed instead.
5. Where nobody reads the output any more (| head), the run goes on without it.
"""

import json
import multiprocessing
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

import torch
import torch.distributed as dist

from . import UserError
from .distributed import any_process, barrier, first_end, is_main, rank
from .provenance import check_same
from .storage import RunLock, load_checked, save_checked

# Seconds that the other processes give the main one to end a step: torchrun kills all 30 s after its signal.
PATIENCE = 10
WORKER_LOST = ("a data loading process was killed or is stuck, most often because memory or shared memory (/dev/shm) "
               "ran out; use fewer --workers")
# A signal to all of a run's processes may reach a worker first.
WORKER_STOPPED = re.compile(r"DataLoader worker .* signal: (Terminated|Interrupt)")
# What memory that ran out, and processes that ended, are called by those who notice.
NO_MEMORY = re.compile("out of memory|not enough memory|can't allocate memory|Cannot allocate memory|bad_alloc", re.I)
NO_PROCESS = re.compile("gloo|NCCL|Connection closed|Connection reset|Broken pipe|Timed out", re.I)


class Ending:
    """What must be known wherever the run may end. The only one, `ending`, is made anew for every run."""

    def __init__(self):
        self.log: Callable[[str], None] = print
        self.logged: set[str] = set()  # lines of log_once
        self.saved = "nothing is saved yet; start again"  # what to go on from
        self.save: Callable[[], None] | None = None  # writes a checkpoint of what is done
        self.unsaved: dict[Path, str] = {}  # files that could not be written, and why
        self.signal = 0  # the one that stops the run
        self.in_step = False  # a signal waits; after an error in a step, nothing whole can be saved
        self.deadline = 0.0  # of the main process, where another waits for it
        self.begun = False  # a signal comes too late
        self.handlers: dict = {}  # of signals, before the run
        self.process = os.getpid()

    def handle(self, number: int, handler: Callable | int) -> None:
        """Sets a signal's handler until the end of the run."""
        before = signal.signal(number, handler)
        self.handlers.setdefault(number, before or signal.SIG_DFL)

    def log_once(self, line: str) -> None:
        if line not in self.logged:
            self.logged.add(line)
            self.log(line)


ending = Ending()


def exit_with_one_line_errors(main: Callable[[], None]) -> None:
    """Runs main and ends as the rules above say: returns after a run without error, else raises SystemExit (several
    processes leave at once) or, for a defect, the error."""
    ending.__init__()
    for number in (signal.SIGINT, signal.SIGTERM):
        ending.handle(number, stop)
    try:
        main()
        barrier()
    except BrokenPipeError:
        silence(sys.stdout)
    except (Exception, KeyboardInterrupt) as error:
        ending.begun = True
        end(error)
        raise
    finally:
        for number, handler in ending.handlers.items():
            signal.signal(number, handler)
    # All processes are here and all is written. NCCL asks for destroy_process_group, which takes gloo's half along, and
    # with torch 2.6 that was seen to wait for its own threads for ever.
    if dist.is_initialized() and "nccl" in str(dist.get_backend_config()):
        leave(0)


def stop(number: int, frame: object) -> None:
    """The handler of SIGINT and SIGTERM; the main process stops, the others when it has, or when it is overdue."""
    if os.getpid() != ending.process:
        # A forked worker, which the run itself will end.
        if number == signal.SIGTERM:
            os._exit(128 + number)
        return
    ending.signal = ending.signal or number
    if ending.begun:
        return
    ending.handle(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's raises when workers end
    for each in (signal.SIGINT, signal.SIGTERM):
        # torchrun passes on a signal that its processes may have got already.
        ending.handle(each, signal.SIG_IGN if "TORCHELASTIC_RUN_ID" in os.environ else signal.SIG_DFL)
    ending.deadline = ending.deadline or time.monotonic() + PATIENCE
    if rank() > 0 and not first_end() and time.monotonic() < ending.deadline:
        # Looks again in a second.
        ending.handle(signal.SIGALRM, stop)
        signal.alarm(1)
    elif rank() > 0 or not ending.in_step:
        raise KeyboardInterrupt


@contextmanager
def uninterrupted() -> Iterator[None]:
    """A step, before and after which ending.save is right: a signal to the main process waits for its end."""
    ending.in_step = True
    yield
    ending.in_step = False
    if ending.signal and rank() == 0:
        raise KeyboardInterrupt


def end(error: BaseException) -> None:
    """Ends this process because of an error or a signal. Returns where the error is a defect and came first."""
    signal.alarm(0)
    ending.handle(signal.SIGCHLD, signal.SIG_DFL)
    number = ending.signal or (signal.SIGTERM if WORKER_STOPPED.match(str(error)) else 0)
    if number:
        if rank() == 0 and ending.save and not ending.in_step and not first_end():
            ending.save()
        name = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
        status, line = 128 + number, f"stopped by {name}: {ending.saved}"
    elif line := one_line(error):
        status, line = 2, f"error: {line}"
    else:
        status, line = 1, f"{type(error).__name__}: {error}"
    for child in multiprocessing.active_children():
        # One may be stuck: leaving in order would wait for it.
        child.kill()
        child.join(1)
    own = f"{rank()} {status} {line}"
    # Where a signal has ended another process than the main one, that one speaks.
    first = first_end("" if number and rank() > 0 else own)
    _, status, line = (first or own).split(" ", 2)
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        # torchrun's report shows it.
        details = {"py_callstack": line, "timestamp": str(int(time.time()))}
        with suppress(OSError):
            Path(path).write_text(json.dumps({"message": {"message": line, "extraInfo": details}}))
    if first == own:
        if status == "1":
            return
        say(line, sys.stderr)
    if not dist.is_initialized():
        sys.exit(int(status))
    # In order it would wait for processes that wait in a collective for this one.
    leave(int(status))


def leave(status: int) -> None:
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)


def one_line(error: BaseException) -> str | None:
    """What the user should know of an error, on one line; None for one that is a defect of this code."""
    text = " ".join(str(error).split())
    if isinstance(error, UserError):
        return text
    if not isinstance(error, MemoryError | RuntimeError | OSError):
        return None
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or NO_MEMORY.search(text):
        return f"memory ran out ({text[:150]}): use a smaller --batch-size, fewer --workers"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'a file'}: {error.strerror}; correct this and start again"
    if text.startswith("DataLoader worker"):
        return WORKER_LOST
    if dist.is_initialized() and NO_PROCESS.search(text):
        reason = re.sub(r"^\[\S+\] ", "", text).split(". ")[0]  # without gloo's place in its source, and advice
        return (f"another process of this run has ended or is stuck ({reason[:150]}); what it said, or the system's "
                f"log, says why; {ending.saved}")
    return None


def save_or_warn(path: Path, content: dict, saved: str = "") -> None:
    """save_checked that does not stop the run: a file that cannot be written is warned of once, and by append_result
    unless a later try succeeds. saved: what a stopped run then tells its user."""
    try:
        save_checked(path, content)
        ending.unsaved.pop(path, None)
        ending.saved = saved or ending.saved
    except UserError as error:
        if path not in ending.unsaved:
            ending.log(f"warning: {error}; the run goes on")
        ending.unsaved[path] = str(error)


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
        ending.saved = self.how_to_go_on(saved[self.unit])
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


def say(text: str, stream: TextIO, end: str = "\n") -> None:
    """print, but where nobody reads any more (| head), or the disk is full, the run goes on without it."""
    try:
        print(text, end=end, file=stream, flush=True)
    except OSError:
        silence(stream)


def silence(stream: TextIO) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
