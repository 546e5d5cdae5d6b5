"""How runs end that do not end well: full disks, readers that have gone, signals, processes that died, leftovers."""

import itertools
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import keep_store, torchrun_variables
from PIL import Image
from test_segment import draw_lip

import classify
import segment
from datasets import patches
from datasets.patches import PatchDataset, PatchImage
from models import segmentation_probe
from utils import UserError, run, storage
from utils.distributed import init_processes
from utils.ending import ending, exit_with_one_line_errors, save_or_warn
from utils.results import append_result
from utils.run import Log

ROOT = Path(__file__).parents[1]
WORDS = ["--model", "ibot", "--weights", ROOT / "tests" / "golden" / "ibot" / "checkpoint.pth", "--num-heads", 3,
         "--device", "cpu", "--workers", 0]
LINE = {"task": "retrieval", "model": "m", "weights": "w", "dataset": "cub", "args": {}}


@pytest.fixture(scope="module")
def lip(tmp_path_factory):
    """A command line of segment.py on a small data set, without iterations and folder."""
    data = draw_lip(tmp_path_factory.mktemp("lip"))
    return [*WORDS, "--dataset", "lip", "--data-path", data, "--layers", 0, 3, "--batch-size", 3, "--crop-size", 48,
            "--base-scale", 128, 48, "--test-scale", 128, 48, "--stride", 32, "--lr", 0.05]


def draw_folder(folder):
    for split, label, number in itertools.product(("train", "val"), ("cats", "dogs"), range(2)):
        (folder / split / label).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (90 * number, 0, 200)).save(folder / split / label / f"{number}.png")
    return folder


def no_space(*_, **__):
    raise OSError(28, "No space left on device")


def ended(main):
    """(exit status, last line of standard error) of a main function."""
    with pytest.raises(SystemExit) as stop:
        exit_with_one_line_errors(main)
    return stop.value.code


# Full disks

def test_half_a_results_line_is_ended_before_the_next(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text('{"task": "retr')
    append_result(tmp_path, LINE, LINE)
    append_result(tmp_path, LINE)
    half, *whole = path.read_text().splitlines()
    assert half == '{"task": "retr' and [json.loads(line)["model"] for line in whole] == ["m"] * 3


def test_a_result_that_cannot_be_written_is_printed(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(UserError, match=r"results.jsonl could not be written \(No space left on device\).*append it"):
        append_result(tmp_path, LINE, LINE | {"model": "n"})
    assert [json.loads(line)["model"] for line in capsys.readouterr().out.splitlines()] == ["m", "n"]


@pytest.mark.parametrize(("metrics", "name"), [
    ({"ap_avg": float("nan")}, "ap_avg"), ({"heads": [{"lr": 1.0}, {"acc1": float("inf")}]}, "heads")])
def test_a_figure_that_is_not_finite_is_refused_by_its_name(tmp_path, metrics, name):
    with pytest.raises(UserError, match=name):
        append_result(tmp_path, LINE | metrics)
    assert not (tmp_path / "results.jsonl").exists()


def test_a_full_disk_does_not_stop_the_log_and_is_said_once(tmp_path, capsys, monkeypatch):
    log = Log()
    log.open(tmp_path / "missing")
    for number in range(3):
        log(f"line {number}")
    (tmp_path / "missing").mkdir()
    log("line 3")
    assert (tmp_path / "missing" / "log.txt").read_text() == "line 0\nline 1\nline 2\nline 3\n"
    assert capsys.readouterr().out.count("warning") == 1


def test_a_checkpoint_that_cannot_be_written_is_said_once_and_the_run_goes_on(tmp_path, monkeypatch):
    lines, path = [], tmp_path / "checkpoint.pth"
    monkeypatch.setattr(ending, "log", lines.append)
    monkeypatch.setattr(ending, "saved", "")
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", no_space)
        save_or_warn(path, {}, "iteration 1 is saved")
        save_or_warn(path, {}, "iteration 2 is saved")
    assert len(lines) == 1 and "could not be written (No space left on device)" in lines[0]
    with pytest.raises(UserError, match="checkpoint.pth could not be written"):
        append_result(tmp_path, LINE)
    assert ending.saved == ""
    save_or_warn(path, {}, "iteration 3 is saved")
    assert ending.saved == "iteration 3 is saved" and path.exists()
    append_result(tmp_path, LINE)


def test_a_log_line_and_a_checkpoint_lost_midway_cost_nothing(launch, lip, tmp_path, monkeypatch):
    """Every checkpoint but the last fails."""
    tries, save = [], torch.save

    def fails_first(content, path):
        tries.append(path)
        if len(tries) < 3:
            no_space()
        save(content, path)

    monkeypatch.setattr(torch, "save", fails_first)
    out, _ = launch(segment.main, [*lip, "--iterations", "6", "--checkpoint-every", "2", "--output-dir", tmp_path])
    assert out.count("could not be written (No space left on device)") == 1
    assert json.loads((tmp_path / "results.jsonl").read_text())["iterations"] == 6


# Readers that have gone

def test_a_reader_that_has_gone_does_not_stop_the_run(tmp_path):
    code = ("import sys; sys.path.insert(0, '.'); from pathlib import Path; from utils.run import Log\n"
            "from utils.ending import exit_with_one_line_errors\n"
            "def main():\n log = Log(); log.open(Path(sys.argv[1]))\n for n in range(2000): log(f'line {n}')\n"
            "exit_with_one_line_errors(main)")
    process = subprocess.Popen([sys.executable, "-c", code, tmp_path], cwd=ROOT, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)
    process.stdout.readline()
    process.stdout.close()
    assert (process.wait(60), process.stderr.read()) == (0, "")
    assert len((tmp_path / "log.txt").read_text().splitlines()) == 2000


# Signals

def start(script, words, processes=1):
    """Starts a script as a user does, or several as torchrun does; each process a group of its own."""
    store, started = keep_store(), []
    for rank in range(processes):
        several = torchrun_variables(store, rank, processes) if processes > 1 else {}
        started.append(subprocess.Popen([sys.executable, script, *map(str, words)], cwd=ROOT, text=True,
                                        env=os.environ | {"OMP_NUM_THREADS": "1"} | several, start_new_session=True,
                                        stdout=subprocess.PIPE, stderr=subprocess.PIPE))
        started[-1].store = store
    return started


def wait_for(process, text):
    for line in process.stdout:
        if text in line:
            return
    pytest.fail(f"{text} did not come: {process.stderr.read()}")


def outcome(process):
    """(exit status, lines on standard error that are no progress)."""
    _, err = process.communicate(timeout=60)
    return process.returncode, [line for line in err.splitlines() if " left" not in line]


@pytest.mark.parametrize(("number", "status", "name"), [
    (signal.SIGINT, 130, "Ctrl-C"), (signal.SIGTERM, 143, "SIGTERM")])
def test_a_stopped_segmentation_resumes_to_the_same_bits(launch, lip, tmp_path, number, status, name):
    words = [*lip, "--iterations", "150"]
    launch(segment.main, [*words, "--output-dir", tmp_path / "whole"])
    process, = start("segment.py", [*words, "--output-dir", tmp_path / "parts"])
    wait_for(process, "iteration 50")
    os.kill(process.pid, number)
    code, lines = outcome(process)
    checkpoint, = (tmp_path / "parts").glob("*_segment.pt")
    done = torch.load(checkpoint, weights_only=True)["iteration"]
    assert code == status and 50 <= done < 150
    assert lines == [f"stopped by {name}: iteration {done} is saved in {checkpoint}; go on with --resume"]
    assert not (tmp_path / "parts" / "results.jsonl").exists()
    launch(segment.main, [*words, "--output-dir", tmp_path / "parts", "--resume"])
    whole, parts = (torch.load(tmp_path / side / checkpoint.name, weights_only=True) for side in ("whole", "parts"))
    assert all(torch.equal(value, parts["head"][key]) for key, value in whole["head"].items())


def test_a_stopped_classification_resumes_to_the_same_bits(launch, tmp_path):
    data = draw_folder(tmp_path / "data")
    words = [*WORDS, "--dataset", "folder", "--data-path", data, "--no-augment", "--epochs", 900]
    launch(classify.main, [*words, "--output-dir", tmp_path / "whole"])
    process, = start("classify.py", [*words, "--output-dir", tmp_path / "parts"])
    wait_for(process, "epoch 50:")
    os.kill(process.pid, signal.SIGTERM)
    code, lines = outcome(process)
    checkpoint = tmp_path / "parts" / "ibot_folder_checkpoint.pth"
    done = torch.load(checkpoint, weights_only=True)["epoch"]
    assert code == 143 and 49 <= done < 900
    assert lines == [f"stopped by SIGTERM: epoch {done} is saved in {checkpoint}; go on with --resume"]
    launch(classify.main, [*words, "--output-dir", tmp_path / "parts", "--resume"])
    name = "ibot_folder_linear_head.pth"
    whole, parts = (torch.load(tmp_path / side / name, weights_only=True) for side in ("whole", "parts"))
    assert all(torch.equal(value, parts["head"][key]) for key, value in whole["head"].items())
    lines = [json.loads((tmp_path / side / "results.jsonl").read_text()) for side in ("whole", "parts")]
    assert lines[0]["best_acc1"] == lines[1]["best_acc1"] and lines[0]["confusion"] == lines[1]["confusion"]


def test_the_second_ctrl_c_ends_the_run_at_once(tmp_path):
    """Though saving never ends."""
    body = ("from utils.ending import ending\ndef save():\n    print('saving', flush=True)\n    time.sleep(50)\n"
            "ending.save = save\nprint('ready', flush=True)\ntime.sleep(50)")
    process, = start(write_script(tmp_path, body), [])
    for word in ("ready", "saving"):
        wait_for(process, word)
        os.kill(process.pid, signal.SIGINT)
    assert outcome(process) == (-signal.SIGINT, [])


def test_a_signal_to_one_of_the_others_ends_the_run_with_one_line_of_the_main_process(tmp_path):
    body = ("from utils import ending\nending.PATIENCE = 2\nprint('ready', flush=True)\n"
            "barrier() if is_main() else time.sleep(50)")
    main, other = start(write_script(tmp_path, body), [], 2)
    wait_for(other, "ready")
    os.kill(other.pid, signal.SIGTERM)
    assert outcome(other) == (143, [])
    status, lines = outcome(main)
    assert status == 2 and len(lines) == 1 and "another process of this run has ended" in lines[0]


def test_the_other_processes_end_soon_after_the_main_one_though_they_meet_in_no_collective(tmp_path):
    body = "from utils import ending\nending.PATIENCE = 45\nprint('ready', flush=True)\ntime.sleep(50)"
    main, other = start(write_script(tmp_path, body), [], 2)
    for process in (main, other):
        wait_for(process, "ready")
    started = time.monotonic()
    for process in (other, main):
        os.kill(process.pid, signal.SIGTERM)
    assert outcome(main) == (143, ["stopped by SIGTERM: nothing is saved yet; start again"])
    assert outcome(other) == (143, []) and time.monotonic() - started < 30


def test_nothing_of_a_run_is_left_for_the_next(capsys):
    def fails():
        ending.save, ending.saved, ending.in_step, ending.unsaved[ROOT] = fails, "much", True, "full"
        ending.log_once("x")
        raise UserError("wrong")

    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)]
    assert ended(fails) == 2
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)] == before
    exit_with_one_line_errors(lambda: None)
    assert (ending.save, ending.in_step, ending.unsaved, ending.logged) == (None, False, {}, set())
    assert ending.saved == "nothing is saved yet; start again"


# What lies in the folder already

def test_a_finished_run_is_not_repeated_and_an_unfinished_one_not_overwritten(launch, lip, tmp_path, monkeypatch):
    words = [*lip, "--iterations", 4, "--checkpoint-every", 2, "--output-dir", tmp_path]
    launch(segment.main, words)
    out, _ = launch(segment.main, [*words, "--resume"])
    assert "finished already, its line is in" in out
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 1
    # A finished run's head may be written anew; an unfinished run's checkpoint not.
    loss, calls = segmentation_probe.upsampled_cross_entropy, []

    def fails_in_the_fourth(*inputs, **options):
        calls.append(1)
        if len(calls) == 4:
            no_space()
        return loss(*inputs, **options)

    monkeypatch.setattr(segmentation_probe, "upsampled_cross_entropy", fails_in_the_fourth)
    launch(segment.main, [*words, "--iterations", 5], status=2)
    monkeypatch.undo()
    before = (tmp_path / "ibot_lip_segment.pt").read_bytes()
    _, err = launch(segment.main, [*words, "--iterations", 6], status=2)
    assert "without --resume: iterations was 5 when" in err and "that run is unfinished: continue it with --res" in err
    assert (tmp_path / "ibot_lip_segment.pt").read_bytes() == before
    launch(segment.main, [*words, "--iterations", 5, "--resume"])
    launch(segment.main, [*words, "--iterations", 6, "--name", "other"])
    assert not list(tmp_path.glob(".*"))


def test_a_finished_classification_is_not_repeated(launch, tmp_path):
    """Its checkpoint goes with its end; the results line stays."""
    folder = draw_folder(tmp_path / "data")
    words = [*WORDS, "--dataset", "folder", "--data-path", folder, "--output-dir", tmp_path, "--epochs", 2, "--resume",
             "--no-augment", "--probe", "linear", "knn"]
    for number in range(2):
        out, _ = launch(classify.main, words)
        assert ("finished already" in out) == bool(number)
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 2
    for number in range(2):
        out, _ = launch(classify.main, [*words[:-2], "knn", "--output-dir", tmp_path / "knn alone"])
        assert ("finished already" in out) == bool(number)
    Image.new("RGB", (32, 32)).save(folder / "train" / "cats" / "more.png")
    launch(classify.main, words)
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 4


def test_two_live_runs_of_one_name(tmp_path):
    """The lock goes with its process, though a worker of it lives on."""
    code = ("import os, sys, time, pathlib; sys.path.insert(0, '.')\nfrom utils.storage import RunLock\n"
            "lock = RunLock(pathlib.Path(sys.argv[1]))\nif not os.fork(): time.sleep(60)\nprint('locked', flush=True)\n"
            "time.sleep(60)")
    process = subprocess.Popen([sys.executable, "-c", code, tmp_path / "x.pt"], cwd=ROOT, stdout=subprocess.PIPE,
                               text=True, start_new_session=True)
    assert process.stdout.readline() == "locked\n"
    with pytest.raises(UserError, match="another run is writing .*x.pt; wait for its end, or give"):
        storage.RunLock(tmp_path / "x.pt")
    process.kill()
    process.wait()
    storage.RunLock(tmp_path / "x.pt").close()
    os.killpg(process.pid, signal.SIGKILL)
    assert not list(tmp_path.iterdir())


def test_temporary_files_of_dead_processes_are_swept(tmp_path):
    dead = subprocess.Popen(["true"])
    dead.wait()
    host = socket.gethostname()
    names = {f".a.{host}.{dead.pid}.tmp": False, f".a.{host}.{os.getpid()}.tmp": True,
             f".a.{host}2.{dead.pid}.tmp": True, ".hidden": True}
    for name in names:
        (tmp_path / name).write_text("")
    run.open_output(tmp_path)
    assert {name: (tmp_path / name).exists() for name in names} == names
    # The names are those that are given.
    storage.atomic_write(tmp_path / "a", lambda path: path.write_text(path.name))
    assert (tmp_path / "a").read_text() == f".a.{host}.{os.getpid()}.tmp"


def test_a_lock_file_that_its_holder_removed_meanwhile_is_no_lock(tmp_path, monkeypatch):
    """Two others could else hold one each: of the file that was removed, and of a new one of its name."""
    lockf = storage.fcntl.lockf

    def another_run_ends_first(*words):
        (tmp_path / ".x.pt.lock").unlink()
        lockf(*words)

    with monkeypatch.context() as patched, pytest.raises(UserError, match="another run is writing .*x.pt; wait for"):
        patched.setattr(storage.fcntl, "lockf", another_run_ends_first)
        storage.RunLock(tmp_path / "x.pt")
    storage.RunLock(tmp_path / "x.pt").close()
    assert not list(tmp_path.iterdir())


def test_a_file_of_the_longest_name_is_written(tmp_path):
    """A temporary name is no longer than the file's own may be."""
    for letter in "xä":
        path = tmp_path / (letter * (255 // len(letter.encode())))
        storage.atomic_write(path, lambda temporary: temporary.write_text("whole"))
        assert path.read_text() == "whole" and list(tmp_path.iterdir()) == [path]
        path.unlink()


# Data loading

class Dataset(PatchDataset):
    def __init__(self, path, count=64):
        super().__init__([PatchImage(str(path), None, [0])] * count, ["class"])


@pytest.fixture
def picture(tmp_path):
    Image.new("RGB", (20, 20), (10, 20, 30)).save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


def test_no_more_workers_than_shared_memory_has_room_for(picture, monkeypatch):
    """A group is 16 patches of 224 x 224 x 3 bytes, 2.4 MB; a worker holds two, and one is in use."""
    lines, started, loader = [], [], patches.DataLoader
    monkeypatch.setattr(ending, "log", lines.append)
    monkeypatch.setattr(patches, "DataLoader", lambda groups, size, num_workers, collate_fn, **more: started.append(
        num_workers) or loader(groups, size, collate_fn=collate_fn))
    for megabytes, processes, workers in ((64, 1, 10), (64, 2, 4), (3, 1, 0), (1000, 1, 16)):
        monkeypatch.setattr(os, "statvfs", lambda path, room=megabytes: SimpleNamespace(f_bavail=room, f_frsize=10**6))
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
        batches = list(Dataset(picture).batches(range(64), 10, 16))
        assert sum(len(ids) for _, ids in batches) == 64 and started.pop() == workers
        assert len([line for line in lines if f"has room for {workers} of 16 data" in line]) == (workers < 16)


def test_a_real_run_in_little_shared_memory(picture, tmp_path):
    """64 MB, the default of containers; in a mount namespace of its own, where that is allowed."""
    code = ("import sys; sys.path[:0] = ['.', 'tests']\nfrom pathlib import Path; from test_endings import Dataset\n"
            "print(sum(len(ids) for _, ids in Dataset(Path(sys.argv[1]), 800).batches(range(800), 200, 24)))")
    command = ["unshare", "-m", "sh", "-c", 'mount -t tmpfs -o size=64m tmpfs /dev/shm && exec "$@"', "sh"]
    if subprocess.run([*command, "true"], capture_output=True).returncode:
        pytest.skip("no mount namespaces here")
    found = subprocess.run([*command, sys.executable, "-c", code, picture], cwd=ROOT, capture_output=True, text=True,
                           timeout=120)
    assert found.stdout.splitlines()[-1] == "800", found.stderr
    assert "has room for 10 of 24 data loading processes" in found.stdout


@pytest.mark.parametrize("phase", ["between batches", "stuck", "in a call of ours", "at the end"])
def test_a_worker_that_the_system_kills_is_one_line(picture, capsys, monkeypatch, phase):
    """PyTorch raises it in whatever the main process does at that moment."""
    def main():
        dataset = Dataset(picture, 2000)
        if phase == "stuck":
            dataset.load = lambda path: time.sleep(3600)
        iterator = dataset.batches(range(2000), 16, 2)
        next(iterator)
        victim = multiprocessing.active_children()[0]
        if phase == "in a call of ours":
            signal.signal(signal.SIGALRM, lambda *_: os.kill(victim.pid, signal.SIGKILL))
            signal.setitimer(signal.ITIMER_REAL, 0.1)
            for _ in range(1000):
                time.sleep(0.01)
        os.kill(victim.pid, signal.SIGKILL)
        if phase == "between batches":
            torch.randn(300, 300) @ torch.randn(300, 300)
        if phase == "at the end":
            time.sleep(0.5)
        for _ in iterator:
            pass

    monkeypatch.setattr(patches, "PATIENCE", 2)
    assert ended(main) == 2
    assert not multiprocessing.active_children()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: a data loading process was killed or is stuck"), lines


@pytest.mark.parametrize("error", [ConnectionResetError(104, "Connection reset by peer"),
                                   RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")])
def test_a_worker_that_is_killed_while_it_sends_is_the_same_line(error):
    def loader():
        yield 1
        raise error

    items = patches.received(loader())
    assert next(items) == 1
    with pytest.raises(UserError, match="a data loading process was killed or is stuck"):
        next(items)


# Several processes

def write_script(tmp_path, body):
    script = tmp_path / "script.py"
    script.write_text(f"import os, sys, time\nsys.path.insert(0, {str(ROOT)!r})\n"
                      "from utils import UserError, distributed\nfrom utils.distributed import *\n"
                      "from utils.ending import exit_with_one_line_errors\ndef main():\n    init_processes('cpu')\n"
                      + "".join(f"    {line}\n" for line in body.splitlines()) + "exit_with_one_line_errors(main)\n")
    return script


def run_processes(body, tmp_path, count=2, **variables):
    """[(exit status, lines on standard error), ...] of processes with this main."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        return [outcome(process) for process in start(write_script(tmp_path, body), [], count)]


def run_torchrun(body, tmp_path):
    """(exit status, standard error, seconds) of two processes of torchrun."""
    started, command = time.monotonic(), [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    found = subprocess.run([*command, "--nproc-per-node", "2", write_script(tmp_path, body)], capture_output=True,
                           env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True, timeout=90)
    return found.returncode, found.stderr, time.monotonic() - started


def test_a_slow_process_ends_nobody(tmp_path):
    assert run_processes("if is_main(): time.sleep(5)\nbarrier()", tmp_path) == [(0, []), (0, [])]


def test_a_dead_process_ends_the_others_at_their_next_collective_with_one_line(tmp_path):
    alive, dead = run_processes("if rank(): os.kill(os.getpid(), 9)\ntime.sleep(1)\nbarrier()", tmp_path)
    assert dead[0] == -9 and alive[0] == 2
    assert len(alive[1]) == 1 and "gloo/" not in alive[1][0]
    assert alive[1][0].startswith("error: another process of this run has ended or is stuck (")


@pytest.mark.parametrize(("victim", "at", "lines"), [(0, "time.sleep(50)", 0), (1, "barrier()", 1)])
def test_torchrun_ends_the_others_of_a_dead_process(tmp_path, victim, at, lines):
    """Its report names the signal; the main process may speak first."""
    body = f"from utils import ending\nending.PATIENCE = 2\nif rank() == {victim}: os.kill(os.getpid(), 9)\n{at}"
    status, err, seconds = run_torchrun(body, tmp_path)
    assert status == 1 and seconds < 30 and "Signal 9 (SIGKILL)" in err and 'script.py", line' not in err
    assert len([line for line in err.splitlines() if line.startswith(("error: ", "stopped by "))]) == lines, err


def test_torchrun_shows_the_mistake_of_one_process_as_one_line(tmp_path):
    status, err, seconds = run_torchrun("if rank() == 1: raise UserError('wrong')\ntime.sleep(50)", tmp_path)
    assert status == 1 and seconds < 30 and err.splitlines().count("error: wrong") == 1
    assert "stopped by" not in err and 'script.py", line' not in err and "traceback : error: wrong" in err, err


def test_the_mistake_of_one_process_is_one_line_and_ends_all(tmp_path):
    ends = run_processes("if rank() == 1: raise UserError('wrong')\nbarrier()", tmp_path, 3)
    assert [code for code, _ in ends] == [2] * 3
    assert sum((lines for _, lines in ends), []) == ["error: wrong"]
    ends = run_processes("raise UserError('wrong')", tmp_path)
    assert [code for code, _ in ends] == [2] * 2 and sum((lines for _, lines in ends), []) == ["error: wrong"]


@pytest.mark.parametrize(("variables", "message"), [
    ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 in the environment promises 2 processes, but MASTER_ADDR and RANK are not set"),
    ({"WORLD_SIZE": "2", "RANK": "2", "MASTER_ADDR": "localhost"}, "RANK=2 .* must be below WORLD_SIZE=2"),
    ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two in the environment is not a whole number from 1; unset it"),
    ({"LOCAL_WORLD_SIZE": "0"}, "LOCAL_WORLD_SIZE=0 in the environment is not a whole number from 1")])
def test_left_over_variables_of_torchrun(monkeypatch, variables, message, tmp_path):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        run.add_common_arguments(run.OneLineParser(), (), (), 1)
        init_processes("cpu")


def test_one_process_that_is_called_one_of_one_runs_alone(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert init_processes("cpu") == torch.device("cpu") and not torch.distributed.is_initialized()


def test_memory_that_runs_out_is_one_line(tmp_path):
    body = ("import resource, torch\nresource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))\n"
            "torch.empty(1 << 40, dtype=torch.uint8)")
    (code, lines), = run_processes(body, tmp_path, 1)
    assert code == 2 and len(lines) == 1
    assert lines[0].startswith("error: memory ran out (") and "use a smaller --batch-size, fewer --workers" in lines[0]
    (code, lines), = run_processes("bytearray(1 << 60)", tmp_path, 1)
    assert code == 2 and lines == ["error: memory ran out (): use a smaller --batch-size, fewer --workers"]


def test_damaged_test_images_show_before_training(launch, tmp_path):
    data = draw_lip(tmp_path / "data")
    words = [*WORDS, "--dataset", "lip", "--data-path", data, "--layers", 0, "--output-dir", tmp_path / "out"]
    (data / "img" / "val" / "3.jpg").write_bytes(b"none")
    out, err = launch(segment.main, words, status=2)
    assert "3.jpg cannot be decoded (not an image)" in err and "loss" not in out and "decoding" not in err


def test_two_processes_stop_at_a_signal_and_resume_to_the_same_bits(lip, tmp_path):
    words = [*lip, "--iterations", 150, "--output-dir"]
    whole, stopped = (start("segment.py", [*words, tmp_path / name], 2) for name in ("whole", "2"))
    wait_for(stopped[0], "iteration 50")
    for process in reversed(stopped):
        os.kill(process.pid, signal.SIGTERM)
    ends = [outcome(process) for process in stopped]
    assert [code for code, _ in ends] == [143, 143] and ends[1][1] == []
    assert len(ends[0][1]) == 1 and "stopped by SIGTERM: iteration " in ends[0][1][0] and "--resume" in ends[0][1][0]
    again = start("segment.py", [*words, tmp_path / "2", "--resume"], 2)
    assert [outcome(process) for process in (*whole, *again)] == [(0, [])] * 4
    heads = [torch.load(tmp_path / side / "ibot_lip_segment.pt", weights_only=True)["head"] for side in ("whole", "2")]
    assert all(torch.equal(value, heads[1][key]) for key, value in heads[0].items())


@pytest.mark.parametrize("rank, lines", [("0", 1), ("1", 0)])
def test_a_mistake_in_torchruns_command_line_is_said_once(monkeypatch, capsys, tmp_path, rank, lines):
    for name, value in {"RANK": rank, "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "x",
                        "TORCHELASTIC_ERROR_FILE": str(tmp_path / "error.json")}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["classify.py", "--epochs", "nan"])
    with pytest.raises(SystemExit) as stop:
        exit_with_one_line_errors(classify.main)
    assert stop.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == lines
    assert "--epochs" in json.loads((tmp_path / "error.json").read_text())["message"]["message"]
