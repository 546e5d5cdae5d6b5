"""How runs end: a mistake in one line, a defect with its traceback, and once, not once a process, under torchrun."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import call_main
from PIL import Image

import segment
from utils import UserError, run

ROOT = Path(__file__).parents[1]
DINO = ["--model", "dino", "--weights", ROOT / "tests/golden/dino/checkpoint.pth", "--num-heads", 3, "--image-size", 64,
        "--device", "cpu", "--workers", 0]
ERRORS = {
    "UserError": (UserError("wrong;\n mend it"), 2, "error: wrong; mend it\n"),
    "file": (FileNotFoundError(2, "No such file", "a"), 2, "error: a: No such file; correct this and start again\n"),
    "memory": (MemoryError(), 2, "error: memory ran out (): use a smaller --batch-size, fewer --workers\n"),
    "fork": (OSError(12, "Cannot allocate memory"), 2, "error: memory ran out "
             "([Errno 12] Cannot allocate memory): use a smaller --batch-size, fewer --workers\n"),
    "CUDA": (torch.OutOfMemoryError("CUDA out of memory."), 2,
             "error: memory ran out (CUDA out of memory.): use a smaller --batch-size, fewer --workers\n"),
    "Ctrl-C": (KeyboardInterrupt(), 130, "stopped by Ctrl-C; --resume goes on from a checkpoint, where there is one\n")}


def raising(error):
    def main():
        raise error
    return main


@pytest.mark.parametrize("name", ERRORS)
def test_what_a_user_can_mend_is_one_line(name):
    error, status, line = ERRORS[name]
    assert call_main(raising(error), []) == (status, "", line)


def test_memory_that_really_runs_out_is_one_line():
    status, _, err = call_main(lambda: torch.empty(1 << 50, dtype=torch.uint8), [])
    assert status == 2 and err.startswith("error: memory ran out (") and len(err.splitlines()) == 1


def test_output_that_nobody_reads_on_is_no_defect():
    """As in --table | head."""
    body = "import sys; sys.path.insert(0, '.'); from utils.run import run_main; run_main(lambda: print('x' * 10**6))"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", body], cwd=ROOT, **pipes) as process:
        process.stdout.close()
        assert process.stderr.read() == b"" and process.wait() == 1


@pytest.mark.parametrize(("flags", "said"), [("avx2 avx512_bf16", False), ("avx2", True)])
def test_bf16_on_a_cpu_without_it_is_said(tmp_path, monkeypatch, flags, said):
    monkeypatch.setattr(sys, "argv", ["", "--precision", "bf16", "--device", "cpu", "--output-dir", str(tmp_path)])
    args = segment.parse_arguments()
    read = Path.read_text
    monkeypatch.setattr(Path, "read_text", lambda path, *words, **options: f"flags: {flags}"
                        if str(path) == "/proc/cpuinfo" else read(path, *words, **options))
    run.setup(args)
    assert (b"this CPU has no instructions for bf16" in (tmp_path / "log.txt").read_bytes()) == said


@pytest.mark.parametrize("error", [ZeroDivisionError("x"), OSError("no name"), RuntimeError("shapes differ")])
def test_a_defect_shows_its_traceback(error):
    status, _, err = call_main(raising(error), [])
    assert status == 1 and err.startswith("Traceback") and err.rstrip().endswith(f"{type(error).__name__}: {error}")


def test_a_command_line_that_cannot_be_is_one_line_and_help_is_none():
    def main():
        parser = run.OneLineParser("Does a thing.\n\n    python do.py --rate 1    as an example\n", prog="do.py")
        parser.add_argument("--rate", type=run.positive_float)
        parser.parse_args()

    status, _, err = call_main(main, ["--rate", "x"])
    assert status == 2 and err == "error: argument --rate: invalid number value: 'x' (all options: do.py --help)\n"
    status, out, err = call_main(main, ["--help"])
    assert status == 0 and not err and "Does a thing." in out and "python do.py --rate 1    as an example" in out


def script(tmp_path, body):
    """A script whose main joins torchrun's processes and does this."""
    path = tmp_path / "script.py"
    path.write_text(f"import os, signal, sys, time\nsys.path.insert(0, {str(ROOT)!r})\n"
                    "from utils.distributed import *\nfrom utils.run import OneLineParser, run_main\ndef main():\n"
                    f"    init_processes('cpu')\n    {body}\nrun_main(main)\n")
    return [path]


def start(words, processes=0, options=(), **environment):
    """(exit status, output, errors) of a script as a user starts it, or, with processes, torchrun."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes] if processes else []
    # A shell has the jobs that it starts in the background ignore Ctrl-C, and they hand that on.
    done = subprocess.run([sys.executable, *options, *map(str, [*torchrun, *words])], cwd=ROOT, capture_output=True,
                          encoding="utf-8", env=os.environ | {"OMP_NUM_THREADS": "1"} | environment, timeout=300,
                          preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    return done.returncode, done.stdout, done.stderr


def test_ctrl_c(tmp_path):
    status, _, err = start(script(tmp_path, "os.kill(os.getpid(), signal.SIGINT); time.sleep(50)"))
    assert status == 130 and err == ERRORS["Ctrl-C"][2]


@pytest.mark.parametrize(("body", "said"), [
    ("dist.barrier() if is_main() else OneLineParser().error('wrong')", "error: wrong (all options: script.py --help)"),
    ("dist.barrier() if is_main() else 1 / 0", "ZeroDivisionError: division by zero")])
def test_torchrun_ends_all_and_names_the_error_of_one_in_its_report(tmp_path, body, said):
    status, _, err = start(script(tmp_path, body), 2)
    before, _, report = err.partition("FAILED")
    assert status == 1 and before.splitlines().count(said) == 1
    assert said.removeprefix("error: ") in report, err


def test_a_wrong_path_under_torchrun(tmp_path):
    words = ["retrieval.py", *DINO, "--dataset", "cub", "--data-path", tmp_path / "none", "--output-dir", tmp_path]
    status, _, err = start(words, 2)
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert status == 1 and len(lines) == 1 and f"{tmp_path}/none" in lines[0]
    assert f"{tmp_path}/none" in err.partition("FAILED")[2] and not (tmp_path / "results.jsonl").exists()


def classify_folder(tmp_path, *names):
    """The command line of classify.py on class folders of these names."""
    for split in ("train", "val"):
        for number, name in enumerate(names):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for index in range(3):
                Image.new("RGB", (64, 64), (100 * number, 80 * index, 9)).save(
                    tmp_path / "data" / split / name / f"{index}.png")
    return ["classify.py", *DINO, "--dataset", "imagenet", "--data-path", tmp_path / "data", "--output-dir", tmp_path,
            "--epochs", 2, "--save-plots"]


@pytest.mark.parametrize("environment", [{"PYTHONIOENCODING": "ascii"}, {"LANG": "C", "LC_ALL": "C"}])
def test_names_that_the_terminal_cannot_show_end_no_run(tmp_path, environment):
    """Class names in Chinese, and bytes that are no text. The log says what the terminal does."""
    words = [*classify_folder(tmp_path, "猫", b"\xff".decode(errors="surrogateescape")), "--name", "猫"]
    status, out, err = start(words, **environment)
    assert status == 0 and (tmp_path / "results.jsonl").exists() and list(tmp_path.glob("*_accuracy.png")), err
    said = (tmp_path / "log.txt").read_text(encoding="utf-8")
    assert "name=猫" in said and out in (said, said.encode("ascii", "backslashreplace").decode())


def test_warnings_as_errors(tmp_path):
    status, out, err = start(classify_folder(tmp_path, "cats", "dogs"), options=["-W", "error"])
    assert status == 0 and (tmp_path / "log.txt").read_text() == out and "classify.py run " in out, err


def test_progress_that_is_no_terminal(capsys, monkeypatch):
    """A first line after ten seconds, then every tenth of the work, or every five minutes of slow work."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    progress, seen = run.Progress(1000, "testing", "images"), []
    for seconds, count in ((9, 1), (2, 1), (100, 50), (10, 51), (250, 1), (60, 1), (9, 800), (3, 95)):
        now[0] += seconds
        progress.update(count)
        seen.append(capsys.readouterr().err)
    assert seen[1] == "testing: 2/1000 images, 0:00:11 elapsed, 1:31:29 left\n"
    assert [bool(line) for line in seen] == [False, True, False, True, False, True, False, True]
    assert seen[-1].startswith("testing: 1000/1000 images, 0:07:23 elapsed, 0:00:00 left")


def test_progress_of_a_process_with_nothing_or_more_than_its_share(capsys, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    shown = []
    for total, count in ((3, 0), (0, 1), (3, 5)):
        progress = run.Progress(total, "encoding", "patches")
        now[0] += 20
        progress.update(count)
        shown.append(capsys.readouterr().err)
    assert shown == ["", "", "encoding: 3/3 patches, 0:00:20 elapsed, 0:00:00 left\n"]
