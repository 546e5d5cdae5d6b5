"""A campaign of faults, by hand, not collected by pytest: hostile command lines, damaged files, kills, processes.

    python tests/faults.py                                    all of it: about an hour on two quiet cores
    python tests/faults.py --only files --count 500 --seed 7
    python tests/faults.py --only arguments --case 123        one case again, with what it printed

Every case is a function of --seed and its number. It runs in a process forked from this one, which has imported torch
and nothing else has happened in it. Outcomes: "ran" (exit status 0, and the figures of the undamaged run where they can
be known), "one line" (exit status 2, one line of error, no result), "traceback", "hang", "wrong" (exit status 0 with
other figures, a result after an error, a file outside of the output folder) and "other" (another exit status, a
line that is no error). Offending cases are printed, with the command of the first of each kind, and kept in --report.
"""

import argparse
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from contextlib import suppress
from pathlib import Path

import numpy as np
import timm  # noqa: F401  imported once, for all processes forked from this one
import torch
import torchvision  # noqa: F401
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import classify  # noqa: E402
import datasets.prepare.__main__ as prepare  # noqa: E402
import models.attention.__main__ as attention  # noqa: E402
import retrieval  # noqa: E402
import segment  # noqa: E402
from utils import provenance  # noqa: E402
from utils.ending import Checkpoint, exit_with_one_line_errors  # noqa: E402
from utils.run import OneLineParser  # noqa: E402

GOLDEN = ROOT / "tests" / "golden"
SCRIPTS = {"retrieval": retrieval.main, "classify": classify.main, "segment": segment.main,
           "attention": attention.main, "prepare": prepare.main}
COUNTS = {"arguments": 900, "files": 4200, "kills": 90, "processes": 20}
OUTCOMES = ("ran", "one line", "traceback", "hang", "wrong", "other")
COMMON = ["--device", "cpu", "--workers", "0"]
IBOT = ["--model", "ibot", "--weights", str(GOLDEN / "ibot" / "checkpoint.pth"), "--num-heads", "3"]
MAE = ["--model", "mae", "--weights", str(GOLDEN / "mae" / "checkpoint_full.pth"), "--num-heads", "3"]
# What differs between two runs that give the same figures.
NO_FIGURES = ("run", "date", "revision", "versions", "args", "world_size", "weights", "sha256", "name")


# Data, drawn once

def draw_data(root):
    chance = np.random.default_rng(0)

    def picture(path, side=(48, 56)):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(chance.integers(0, 255, (*side, 3), dtype=np.uint8)).save(path)

    cub = root / "cub"
    (cub / "parts").mkdir(parents=True)
    rows = []
    for image in range(1, 13):
        picture(cub / "images" / "001.Bird" / f"{image}.jpg", (120, 124))
        places = (9, 30, 30), (11, 90, 30), (12, 30, 90), (14, 90, 90)
        rows += [f"{image} {part} {x + image % 5}.0 {y}.0 1" for part, x, y in places]
    (cub / "images.txt").write_text("".join(f"{i} 001.Bird/{i}.jpg\n" for i in range(1, 13)))
    (cub / "train_test_split.txt").write_text("".join(f"{i} {int(i <= 8)}\n" for i in range(1, 13)))
    (cub / "bounding_boxes.txt").write_text("".join(f"{i} 5.0 5.0 110.0 110.0\n" for i in range(1, 13)))
    (cub / "parts" / "parts.txt").write_text("9 left wing\n11 right eye\n12 right leg\n14 tail\n")
    (cub / "parts" / "part_locs.txt").write_text("\n".join(rows) + "\n")

    coco = root / "coco"
    (coco / "annotations").mkdir(parents=True)
    names = ["nose", "left_eye", "right_eye", "left_ear", "right_ear", "left_shoulder", "right_shoulder", "left_elbow",
             "right_elbow", "left_wrist", "right_wrist", "left_hip", "right_hip", "left_knee", "right_knee",
             "left_ankle", "right_ankle"]
    for split, count in (("train", 6), ("val", 4)):
        images, annotations = [], []
        for i in range(count):
            picture(coco / "images" / f"{split}2017" / f"{i}.jpg", (200, 200))
            images.append({"id": i, "file_name": f"{i}.jpg", "width": 200, "height": 200})
            points = [value for k in range(17) for value in (10 + 10 * k, 20 + (70 * k + i) % 170, 2)]
            annotations.append({"id": 100 + i, "image_id": i, "category_id": 1, "keypoints": points,
                                "num_keypoints": 17, "bbox": [0, 0, 190, 190], "segmentation": [[1, 2, 3, 4]]})
        content = {"images": images, "annotations": annotations,
                   "categories": [{"id": 1, "name": "person", "keypoints": names}]}
        (coco / "annotations" / f"person_keypoints_{split}2017.json").write_text(json.dumps(content))

    for split, count in (("train", 4), ("val", 2)):
        for name in ("cats", "dogs", "emus"):
            for i in range(count):
                picture(root / "folder" / split / name / f"{i}.png")
    for split, count in (("train", 4), ("val", 3)):
        for i in range(count):
            picture(root / "lip" / "img" / split / f"{i}.jpg", (40 + i, 50))
            label = root / "lip" / "ann" / split / f"{i}.png"
            label.parent.mkdir(parents=True, exist_ok=True)
            small = chance.integers(0, 20, (2, 3), dtype=np.uint8)
            Image.fromarray(small).resize((50, 40 + i), Image.Resampling.NEAREST).save(label)


def commands(data):
    """{name: (script, words)}: one small run of everything there is."""
    part, small = [*COMMON, *IBOT, "--image-size", "32"], ["--base-scale", "64", "32", "--test-scale", "64", "32"]
    lip = [*COMMON, *IBOT, "--dataset", "lip", "--data-path", str(data / "lip"), *small, "--crop-size", "32",
           "--stride", "16", "--batch-size", "3", "--layers", "1", "3"]
    parts = ["--dataset", "cub", "--data-path", str(data / "cub")]
    pictures = ["--dataset", "imagenet", "--data-path", str(data / "folder")]
    return {
        "ap": ("retrieval", [*part, *parts, "--batch-size", "16"]),
        "ap-coco": ("retrieval", [*part, "--dataset", "coco", "--data-path", str(data / "coco")]),
        "sheets": ("retrieval", [*part, *pictures, "--num-images", "4", "--queries", "1", "--top", "3"]),
        "pca": ("retrieval", [*part[:-1], "64", *pictures, "--num-images", "3", "--pca", "none"]),
        "pairs": ("retrieval", [*part[:-1], "64", "--dataset", "synthetic-pairs", "--num-images", "4", "--num-pairs",
                                "6"]),
        "cub-pairs": ("retrieval", [*part[:-1], "64", "--dataset", "cub-pairs", "--data-path", str(data / "cub"),
                                    "--num-pairs", "6"]),
        "probes": ("classify", [*part, *parts, "--probe", "linear", "attentive", "knn", "--epochs", "3"]),
        "probes-folder": ("classify", [*part, "--dataset", "folder", "--data-path", str(data / "folder"), "--epochs",
                                       "2", "--probe", "linear", "attentive"]),
        "linear": ("segment", [*lip, "--iterations", "4", "--lr", "0.05", "--checkpoint-every", "1"]),
        "knn": ("segment", [*lip[:-3], "--probe", "knn", "--memory-size", "60", "--passes", "1"]),
        "attention": ("attention", [*COMMON, *MAE, *pictures, "--num-images", "3", "--mask-ratios", "0", "0.5"]),
        "lip": ("prepare", ["lip", "--source", str(data / "lip"), "--workers", "1"]),
    }


# One case in a process of its own

def start(script, words, folder, environment=(), limit=None, before=None):
    """Forks a process that runs a script in folder; its output goes to folder/out and folder/err. Returns its id.
    before: called in the process first."""
    folder.mkdir(parents=True, exist_ok=True)
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        os.setpgid(0, 0)
        for name, number in (("out", 1), ("err", 2)):
            os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))  # noqa: SIM115
        if limit:
            resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        os.chdir(folder)
        os.environ.update(environment)
        os.environ["TORCH_HOME"], os.environ["HF_HUB_OFFLINE"] = str(folder / "hub"), "1"
        provenance.revision = lambda: "faults"
        sys.argv = [f"{script}.py", *map(str, words)]
        if before:
            before()
        exit_with_one_line_errors(SCRIPTS[script])
        status = 0
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 1
    except KeyboardInterrupt:
        status = 130
        traceback.print_exc()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def wait(pid, seconds):
    """The exit status of a process (negative: the signal), or None if it had to be killed."""
    end, pause = time.monotonic() + seconds, 0.002
    while time.monotonic() < end:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(pause)
        pause = min(pause * 1.5, 0.05)
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


def lines_of(path):
    try:
        return [line for line in path.read_text(errors="replace").splitlines() if line.strip()]
    except OSError:
        return []


def strict(text):
    def refuse(name):
        raise ValueError(name)
    return json.loads(text, parse_constant=refuse)


def figures(folder):
    """The results lines of a run without what may differ; None where a line is no strict JSON."""
    try:
        results = [strict(line) for line in lines_of(folder / "output" / "results.jsonl")]
        return [{key: value for key, value in result.items()
                 if key not in NO_FIGURES and not key.startswith(("seconds", "features_made_by"))}
                for result in results if isinstance(result, dict)]
    except ValueError:
        return None


def same(a, b, tolerance=0.0):
    """Whether two results hold the same; numbers up to a tolerance."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key], tolerance) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same, a, b, [tolerance] * len(a)))
    if isinstance(a, float) and isinstance(b, (int, float)):
        return abs(a - b) <= tolerance
    return a == b


def undefined(result):
    """The names of main figures of a result that are missing or not finite."""
    names = {"retrieval": ["ap_cls"], "segment": ["mIoU"], "classify": ["acc1"]}.get(result.get("task"), [])
    return [name for name in names if not isinstance(result.get(name, 0.0), (int, float))
            or not math.isfinite(result.get(name, 0.0))]


def judge(status, folder, expected=None, tolerance=0.0, before=0):
    """(outcome, remark) of a run in folder. expected: the results it may have, None for any. before: results lines that
    were there before it."""
    err, found = lines_of(folder / "err"), figures(folder)
    text = "\n".join(err)
    if status is None:
        return "hang", (err or [""])[-1]
    if "Traceback (most recent call last)" in text or status in (1, -signal.SIGSEGV, -signal.SIGABRT, -signal.SIGBUS):
        return "traceback", (err or ["status 1 without a word"])[-1]
    if found is None:
        return "wrong", "a results line is not strict JSON"
    found = found[before:]
    stray = [path.name for path in folder.iterdir() if path.name not in ("out", "err", "output", "hub", "copy")]
    if stray:
        return "wrong", f"files outside of the output folder: {stray[:3]}"
    if status == 2:
        errors = [line for line in err if "error: " in line]
        if found:
            return "wrong", "a result although it ended in an error"
        if len(errors) != 1 or errors[0] != err[-1]:
            return "other", f"{len(errors)} lines of error, last: {(err or [''])[-1][:80]}"
        return "one line", err[-1]
    if status == 0:
        if bad := [name for result in found for name in undefined(result)]:
            return "wrong", f"{bad[0]} is not a number"
        if expected is not None and not any(same(found, one, tolerance) for one in expected):
            return "wrong", "other figures than the undamaged run"
        return "ran", ""
    return "other", f"exit status {status}: {(err or [''])[-1][:80]}"


# Hostile command lines

WORDS = ["", " ", "nan", "-1", "²", "../../evil", "a/b", "a\nb", "x" * 300, "x" * 5000, "é\udcff", "timm/",
         "timm/resnet18", "timm/nothing", ".py:", "x.py:f", ":", "%s{}", "last", "all", "0", "999", "random", "None"]
PATHS = ["", ".", "/", "/dev/null", "/dev/zero", "/etc/passwd", "/etc", "nowhere", "x" * 300, "/proc/self/mem",
         "a\nb", "é\udcff", "fifo", "{data}/folder/train/cats/0.png", "{data}/cub", "{data}/cub/images.txt",
         "{golden}/dino/checkpoint.pth", "{golden}/segmentation/head.pt", "{data}/fifo", "{data}/empty", "/root/x"]
# For options that write: nothing that another case, or the machine, needs.
WRITTEN = ["", ".", "nowhere/x", "x" * 300, "a\nb", "é\udcff", "fifo", "written", "written.png"]
NUMBERS = ["nan", "inf", "-inf", "-1", "0", "-0", "1e400", "1" + 40 * "0", "x", "", " ", "1.5", "0x10", "1e3", "²",
           "１", "1_0", "+3", "-3", "3", "1", "2", "7", "16", "48", "1000", "100000", "0.5", "1e-20", "1e20"]
# --debug shows tracebacks on purpose; the compiler starts threads, which a forked process does not have.
SKIP = {"--help", "-h", "--table", "--device", "--target", "--output-dir", "--debug", "--compile"}
# Long work is not what is looked for.
SMALL = {"--epochs", "--iterations", "--passes", "--num-pairs", "--num-images", "--test-scale", "--base-scale"}


def actions():
    """{script: the argparse actions of its options}."""
    found = {}
    parse = OneLineParser.parse_args

    def stop(parser, words=None, namespace=None):
        found[stop.script] = parser
        raise InterruptedError

    OneLineParser.parse_args = stop
    for name, main in SCRIPTS.items():
        stop.script = name
        module = sys.modules[main.__module__]
        with suppress(InterruptedError):
            getattr(module, "parse_arguments", main)()
    OneLineParser.parse_args = parse
    found["prepare"] = found["prepare"]._subparsers._group_actions[0].choices["lip"]
    return {name: [action for action in parser._actions if action.option_strings
                   and action.option_strings[0] not in SKIP] for name, parser in found.items()}


def hostile_words(chance, action, data):
    option = action.option_strings[0]
    if action.nargs == 0:
        return [option]
    kind = "number" if getattr(action.type, "__module__", "") == "utils.run" or action.type in (int, float) else (
        "path" if "Path" in str(action.type) else "choice" if action.choices else "word")
    pool = {"number": NUMBERS, "path": PATHS, "choice": [*(action.choices or ()), "", "nothing"], "word": WORDS}[kind]
    if option == "--dataset":
        pool = [*action.choices]
    if option in ("--save-features", "--cache-dir", "--figure6"):
        pool = WRITTEN
    if option in SMALL:
        pool = [value for value in pool if not value.isdecimal() or len(value) > 10 or int(value) < 20]
        pool = [value for value in pool if value not in ("1_0",)]
    if option == "--model":
        pool = [*WORDS, "ibot", "mae", "dino", "timm/vit_tiny_patch16_224", "{data}/own.py:make"]
    count = 1 if action.nargs in (None, "?") else 2 if action.nargs == 2 else chance.choice((0, 1, 1, 1, 2, 2, 3))
    values = [chance.choice(pool) for _ in range(count)]
    if count == 2 and chance.random() < 0.2:
        values[1] = values[0]
    return [option, *(value.replace("{data}", str(data)).replace("{golden}", str(GOLDEN)) for value in values)]


class Arguments:
    """Small runs with one to three options of any kind put at the end of the command."""

    def __init__(self, data, work):
        self.data, self.commands, self.actions = data, commands(data), actions()
        self.commands["evaluate"] = ("classify", [*self.commands["probes"][1], "--evaluate", str(data / "head.pth")])
        self.commands["evaluate-segment"] = (
            "segment", [*self.commands["linear"][1], "--evaluate", str(data / "head.pt")])
        self.commands["load"] = ("retrieval", [*COMMON, "--load-features", str(data / "features.pt")])

    def case(self, chance, folder):
        name = chance.choice(list(self.commands))
        script, words = self.commands[name]
        words = list(words)
        for action in chance.choices(self.actions[script], k=chance.choice((1, 1, 2, 3))):
            words += hostile_words(chance, action, self.data)
        words += ["--target" if script == "prepare" else "--output-dir", "output"]
        words = [word.replace("\0", "") for word in words]
        environment = {}
        if chance.random() < 0.03:
            environment = chance.choice(({"WORLD_SIZE": "2"}, {"WORLD_SIZE": "x", "RANK": "0"}, {"RANK": "1"},
                                         {"LOCAL_RANK": "3"}, {"WORLD_SIZE": "1"}, {"LOCAL_WORLD_SIZE": "0"}))
        return script, words, environment

    def run(self, chance, folder, seconds):
        script, words, environment = self.case(chance, folder)
        status = wait(start(script, words, folder, environment, limit=8 << 30), seconds)
        command = f"{' '.join(f'{k}={v}' for k, v in environment.items())} {script} {' '.join(map(repr, words))}"
        outcome, remark = judge(status, folder)
        if outcome == "wrong" and "outside" in remark and any(
                option in words for option in ("--save-features", "--cache-dir", "--figure6")):
            outcome = "ran"
        return [(outcome, f"{script}: {remark}", command)]


# Damaged files

def damage_bytes(chance, path):
    """Changes a file's bytes; returns what was done."""
    data = bytearray(path.read_bytes())
    kind = chance.choice(("cut", "cut", "flip", "flip", "flips", "zeros", "insert", "swap", "empty", "text", "tail"))
    at = chance.randrange(max(1, len(data)))
    if kind == "cut":
        data = data[:at]
    elif kind == "flip":
        data[at] ^= 1 << chance.randrange(8)
    elif kind == "flips":
        for _ in range(20):
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    elif kind == "zeros":
        length = chance.choice((1, 64, 4096))
        data[at:at + length] = bytes(len(data[at:at + length]))
    elif kind == "insert":
        data[at:at] = chance.randbytes(chance.choice((1, 7, 512)))
    elif kind == "swap":
        other, length = chance.randrange(len(data)), chance.choice((8, 512))
        data[at:at + length], data[other:other + length] = data[other:other + length], data[at:at + length]
    elif kind == "empty":
        data = bytearray()
    elif kind == "text":
        data = bytearray(chance.choice((b"not a checkpoint\n", b"<html>404</html>", b"\x80\x02", b"PK\x03\x04", b"{}")))
    else:
        data = data[at:]
    path.write_bytes(data)
    return kind


def places(content, path=()):
    """All (path, value) within nested dictionaries and lists."""
    yield path, content
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in list(items):
        yield from places(value, (*path, key))


def damage_content(chance, content, tensors):
    """Changes one value somewhere within nested dictionaries and lists; returns the content."""
    path, value = chance.choice(list(places(content)))
    odd = [None, "x", -1, 0, 2**70, math.nan, [], {}, [[]], True, "", 1e308, {"a": 1}]
    if isinstance(value, torch.Tensor):
        new = chance.choice((
            lambda: value[..., :-1] if value.ndim else value, lambda: value.flatten(), lambda: value[None],
            lambda: value.to(torch.int64) if value.is_floating_point() else value.float(),
            lambda: torch.full_like(value, math.nan) if value.is_floating_point() else value - 10**6,
            lambda: torch.full_like(value, math.inf) if value.is_floating_point() else value + 10**6,
            lambda: value.to_sparse() if value.ndim else None, lambda: value.new_empty(0), lambda: None,
            lambda: "tensor", lambda: value.tolist(), lambda: value.to(torch.complex64),
            lambda: torch.empty(value.shape, device="meta"), lambda: value.bool()))()
    elif isinstance(value, dict) and value and chance.random() < 0.6:
        new = dict(value)
        key = chance.choice(list(new))
        if chance.random() < 0.5:
            del new[key]
        else:
            new[chance.choice(("other", 7, None) if tensors else ("other",))] = new.pop(key)
    elif isinstance(value, list) and value and chance.random() < 0.6:
        new = chance.choice((value[:-1], value + value[-1:], value[::-1], value * 2))
    else:
        new = chance.choice(odd)
    if not path:
        return new
    holder = content
    for key in path[:-1]:
        holder = holder[key]
    holder[path[-1]] = new
    return content


def damage_torch(chance, path):
    content = torch.load(path, weights_only=False)
    path.unlink()
    torch.save(damage_content(chance, content, True), path)
    return "content"


def damage_json(chance, path):
    content = json.loads(path.read_text())
    path.write_text(json.dumps(damage_content(chance, content, False)))
    return "content"


def damage_lines(chance, path):
    """Changes a text file in ways that a reader can notice."""
    lines = path.read_bytes().split(b"\n")
    at = chance.randrange(max(1, len(lines) - 1))
    words = lines[at].split(b" ")
    kind = chance.choice(("latin", "word", "drop word", "double", "nul", "number", "cut", "empty", "bom"))
    if kind == "latin":
        lines[at] += b"\xff"
    elif kind == "word":
        words[0] = b"x"
        lines[at] = b" ".join(words)
    elif kind == "drop word":
        lines[at] = b" ".join(words[:-1])
    elif kind == "double":
        lines.insert(at, lines[at])
    elif kind == "nul":
        lines[at] += b"\0"
    elif kind == "number":
        words[chance.randrange(len(words))] = chance.choice((b"nan", b"inf", b"-1", b"1e400", b"9" * 30, b"../x"))
        lines[at] = b" ".join(words)
    elif kind == "cut":
        lines = lines[:at]
    elif kind == "empty":
        lines = []
    else:
        lines[0] = b"\xef\xbb\xbf" + lines[0]
    path.write_bytes(b"\n".join(lines))
    return kind


class Files:
    """A run that reads a file, after the file was damaged. Each target: (name, how to run it, file, damages, whether
    other figures than the undamaged run's are an error)."""

    def __init__(self, data, work):
        self.data, self.commands = data, commands(data)
        self.expected, self.folders = {}, {}
        self.targets = []
        for path in sorted(GOLDEN.glob("*/checkpoint*.pth")):
            words = ["--model", path.parent.name, "--weights", "copy/" + path.name, "--num-heads", "3"]
            rest = [*COMMON, "--image-size", "32", "--dataset", "cub", "--data-path", str(data / "cub")]
            self.add(f"weights {path.parent.name}/{path.stem}", "retrieval", [*rest, *words], {path: path.name},
                     path.name, (damage_bytes, damage_bytes, damage_torch), True)
        state = data / "timm.pth"
        self.add("weights timm", "retrieval", [
            *COMMON, "--image-size", "32", "--dataset", "cub", "--data-path", str(data / "cub"), "--model",
            "timm/test_vit", "--weights", "copy/timm.pth"], {state: "timm.pth"}, "timm.pth",
            (damage_bytes, damage_torch), True)
        self.add("features", "retrieval", [*COMMON, "--load-features", "copy/features.pt"],
                 {data / "features.pt": "features.pt"}, "features.pt", (damage_bytes, damage_torch, damage_torch), True)
        self.add("head", "classify", [*self.commands["probes"][1][:-6], "--evaluate", "copy/head.pth"],
                 {data / "head.pth": "head.pth"}, "head.pth", (damage_bytes, damage_torch, damage_torch), True)
        self.add("segment head", "segment", [*self.commands["linear"][1], "--evaluate", "copy/head.pt"],
                 {data / "head.pt": "head.pt"}, "head.pt", (damage_bytes, damage_torch, damage_torch), True)
        for name in ("probes", "linear"):
            script, words = self.commands[name]
            saved = data / f"stopped-{name}"
            for path in sorted(saved.iterdir()):
                if path.suffix in (".pt", ".pth"):
                    self.add(f"checkpoint {name}", script, [*words, "--resume"], {saved: "../output"},
                             f"../output/{path.name}", (damage_bytes, damage_torch, damage_torch), True)
        for name in ("probes", "linear"):
            script, words = self.commands[name]
            more = ["--cache-dir", "copy"] if name == "probes" else ["--cache", "disk"]
            saved = data / f"cache-{name}"
            for path in sorted(one for one in saved.rglob("*") if one.is_file()):
                where = path.relative_to(saved)
                if name == "linear" and path.suffix != ".int32" and "pixels" not in path.name:
                    continue
                target = "../output" if name == "linear" else "."
                self.add(f"cache {name} {path.suffix or path.name}", script, [*words, *more], {saved: target},
                         f"{target}/{where}", (damage_bytes, damage_bytes), True)
        for name, file in (("ap", "images.txt"), ("ap", "parts/parts.txt"), ("ap", "parts/part_locs.txt"),
                           ("probes", "train_test_split.txt"), ("cub-pairs", "bounding_boxes.txt")):
            script, words = self.commands[name]
            words = [word.replace(str(data / "cub"), "copy/cub") for word in words]
            self.add(f"annotations {file}", script, words, {data / "cub": "cub"}, f"cub/{file}", (damage_lines,), False)
        script, words = self.commands["ap-coco"]
        words = [word.replace(str(data / "coco"), "copy/coco") for word in words]
        file = "annotations/person_keypoints_train2017.json"
        self.add("annotations coco", script, words, {data / "coco": "coco"}, f"coco/{file}",
                 (damage_json, damage_json, damage_lines), False)
        for name, file, root in (("ap", "images/001.Bird/3.jpg", "cub"), ("linear", "img/train/1.jpg", "lip"),
                                 ("linear", "ann/val/1.png", "lip"), ("probes-folder", "train/cats/1.png", "folder")):
            script, words = self.commands[name]
            words = [word.replace(str(data / root), f"copy/{root}") for word in words]
            self.add(f"picture {file}", script, words, {data / root: root}, f"{root}/{file}", (damage_bytes,), False)
        for name in ("ap", "probes", "linear"):
            script = self.commands[name][0]
            self.add(f"results {script}", script, ["--table"], {data / f"done-{name}": "../output"},
                     "../output/results.jsonl", (damage_bytes, damage_lines, damage_json_line), False)

    def add(self, *target):
        self.targets.append(target)

    def prepare(self, folder, target):
        _, script, words, copies, *_ = target
        (folder / "copy").mkdir(parents=True)
        for source, name in copies.items():
            place = (folder / "copy" / name).resolve()
            if source.is_dir():
                shutil.copytree(source, place, dirs_exist_ok=True)
            else:
                shutil.copy(source, place)
        return script, [*words, "--output-dir", "output"]

    def reference(self, target, work, seconds):
        """What the undamaged run gives."""
        name = target[0] + target[4]
        if name not in self.expected:
            folder = work / f"reference-{len(self.expected)}"
            script, words = self.prepare(folder, target)
            before = len(lines_of(folder / "output" / "results.jsonl"))
            status = wait(start(script, words, folder), 4 * seconds)
            if status:
                raise SystemExit(f"the undamaged run of {name} fails: {script} {' '.join(words)}: "
                                 f"{(folder / 'err').read_text()[-2000:]}")
            self.expected[name] = figures(folder)[before:]
            shutil.rmtree(folder)
        return self.expected[name]

    def run(self, chance, folder, seconds):
        # Targets by name: as many cases for the weights of one form as for all pictures.
        names = list(dict.fromkeys(target[0] for target in self.targets))
        name = chance.choice(names)
        target = chance.choice([target for target in self.targets if target[0] == name])
        _, _, _, _, file, damages, exact = target
        script, words = self.prepare(folder, target)
        damage, path = chance.choice(damages), (folder / "copy" / file).resolve()
        done = []
        # In a process: torch may start threads.
        pid = start(script, words, folder, limit=8 << 30, before=lambda: done.append(damage(chance, path)))
        before = len(lines_of(folder / "output" / "results.jsonl"))
        status = wait(pid, seconds)
        # Other figures from a damaged list or picture may be what it says now.
        outcome, remark = judge(status, folder, [self.expected[target[0] + target[4]]] if exact else None, 0.02, 0)
        if before and outcome == "wrong" and "--table" in words:
            outcome = "one line" if status == 2 else "ran"
        return [(outcome, f"{target[0]} by {damage.__name__}: {remark}", f"{script} {' '.join(words)}")]


def damage_json_line(chance, path):
    lines = path.read_text().splitlines()
    at = chance.randrange(len(lines))
    lines[at] = json.dumps(damage_content(chance, json.loads(lines[at]), False))
    path.write_text("\n".join(lines) + "\n")
    return "content"


# Kills

class Kills:
    """A run killed at a random moment, then resumed: the same bits as the run that was not killed."""

    def __init__(self, data, work):
        made = commands(data)
        longer = {"--epochs": "30", "--iterations": "40"}
        self.commands = {name: (made[name][0], [longer.get(before, word) for before, word in zip(
            ["", *made[name][1]], made[name][1], strict=False)]) for name in ("ap", "probes", "probes-folder", "linear",
                                                                              "knn")}
        for name, more in (("probes", ["--checkpoint-seconds", "0", "--resume"]), ("linear", ["--resume"]),
                           ("probes-folder", ["--checkpoint-seconds", "0", "--resume"])):
            self.commands[name][1].extend(more)
        self.expected, self.seconds = {}, {}

    def references(self, work, seconds):
        for name, (script, words) in self.commands.items():
            started, folder = time.monotonic(), work / f"reference-{name}"
            status = wait(start(script, [*words, "--output-dir", "output"], folder), 4 * seconds)
            if status:
                raise SystemExit(f"the run that is to be killed, {name}, fails: {(folder / 'err').read_text()[-2000:]}")
            self.expected[name], self.seconds[name] = self.all_of(folder), time.monotonic() - started
            shutil.rmtree(folder)

    def all_of(self, folder):
        """Figures and, of heads, the bits."""
        tensors = {}
        for path in sorted((folder / "output").glob("*.pt*")):
            content = torch.load(path, weights_only=True)
            tensors[path.name] = {key: value.tolist() for key, value in content.get("head", {}).items()}
        return {"figures": figures(folder), "heads": tensors}

    def run(self, chance, folder, seconds):
        name = chance.choice(list(self.commands))
        script, words = self.commands[name]
        words, found = [*words, "--output-dir", "output"], []
        for _ in range(chance.choice((1, 1, 2))):
            number = chance.choice((signal.SIGKILL, signal.SIGTERM, signal.SIGINT))
            pid = start(script, words, folder)
            delay, started = chance.random() * self.seconds[name], time.monotonic()
            status = "running"
            while time.monotonic() - started < delay:
                done, code = os.waitpid(pid, os.WNOHANG)
                if done:
                    status = os.waitstatus_to_exitcode(code)
                    break
                time.sleep(0.002)
            if status != "running":
                break
            os.kill(pid, number)
            status = wait(pid, seconds)
            text = (folder / "err").read_text()
            err = [line for line in lines_of(folder / "err") if " elapsed, " not in line]
            command = f"{script} {' '.join(words)}; {number.name} after {delay:.2f} s"
            if status is None:
                found.append(("hang", f"{name}: does not end after {number.name}", command))
            elif "Traceback" in text:
                found.append(("traceback", f"{name}: {number.name}: {text.splitlines()[-1]}", command))
            elif number != signal.SIGKILL and status != 0 and len(err) > 1:
                found.append(("other", f"{name}: {number.name} ends in {len(err)} lines", command))
            else:
                found.append(("one line" if err else "ran", "", command))
            if status == 0:
                break
        if figures(folder):
            return found
        status = wait(start(script, words, folder), 2 * seconds)
        outcome, remark = judge(status, folder)
        if outcome == "ran" and self.all_of(folder) != self.expected[name]:
            outcome, remark = "wrong", "other figures or heads than the run that was not killed"
        leftovers = [path.name for path in (folder / "output").rglob(".*")]
        if outcome == "ran" and leftovers:
            outcome, remark = "other", f"leftovers: {leftovers[:3]}"
        return [*found, (outcome, f"{name} resumed: {remark}", f"{script} {' '.join(words)}")]


# Numbers of processes

class Processes:
    """One command on one, two and three processes joined by gloo: every number in the results, to rounding."""

    def __init__(self, data, work):
        self.commands = commands(data)
        del self.commands["lip"]

    def run(self, chance, folder, seconds):
        name = chance.choice(list(self.commands))
        script, words = self.commands[name]
        words, results = list(words), {}
        if name in ("probes", "probes-folder", "linear", "knn"):
            words += ["--seed", str(chance.randrange(100))]
        if name in ("ap", "linear", "pairs", "attention"):
            words += ["--batch-size", str(chance.randrange(3, 20))]
        words += ["--precision", "fp32", "--output-dir", "output"]
        for world in (1, 2, 3):
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = str(free.getsockname()[1])
            place, pids = folder / str(world), []
            for number in range(world):
                environment = {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(world),
                               "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
                place.mkdir(parents=True, exist_ok=True)
                inner = place if number == 0 else place / f"rank{number}"
                pids.append(start(script, words if number == 0 else [*words[:-1], "../output"], inner,
                                  environment if world > 1 else {}))
            statuses = [wait(pid, seconds) for pid in pids]
            for number in range(1, world):
                shutil.rmtree(place / f"rank{number}")
            outcome, remark = judge(max(statuses, key=lambda one: (one is None, one)), place)
            command = f"{script} {' '.join(words)} on {world} processes"
            if outcome != "ran":
                return [(outcome, f"{name} on {world} processes: {remark}", command)]
            results[world] = figures(place)
        found = []
        for world in (2, 3):
            numbers = [dict(numbers_of(results[one])) for one in (1, world)]
            for key in numbers[0] | numbers[1]:
                a, b = (some.get(key) for some in numbers)
                # Percent; rounding may move a pixel or a rank.
                near = a is not None and b is not None and abs(a - b) <= 0.02 + 1e-4 * abs(a)
                found.append(("ran" if near else "wrong", f"{name}: {key} is {a} on one process, {b} on {world}",
                              f"{script} {' '.join(words)} on {world} processes"))
        return found


def numbers_of(results):
    """(name, number) of the main figures of results lines."""
    for line, result in enumerate(results):
        for path, value in places(result):
            if isinstance(value, (int, float)) and not isinstance(value, bool) and len(path) <= 2 and not any(
                    str(part).startswith(("confusion", "per_class", "receptive", "heads", "seed")) for part in path):
                yield f"{line} {' '.join(map(str, path))}", value


# The campaign

def draw_artefacts(data, seconds):
    """Features, heads, checkpoints of stopped runs, caches and results, by the commands themselves."""
    made = commands(data)

    def run(name, place, *more, stop_at=None):
        script, words = made[name]
        folder = data / f"made-{place}"
        before = None
        if stop_at:
            def before():
                original = Checkpoint.save

                def save(*args, **options):
                    original(*args, **options)
                    if stop_at in args:
                        os.kill(os.getpid(), signal.SIGKILL)
                Checkpoint.save = save
        status = wait(start(script, [*words, *more, "--output-dir", "output"], folder, before=before), 4 * seconds)
        if status != (-signal.SIGKILL if stop_at else 0):
            raise SystemExit(f"{name} {more} ended in {status}: {(folder / 'err').read_text()[-2000:]}")
        return folder

    shutil.copy(run("ap", "features", "--save-features", "features.pt") / "features.pt", data / "features.pt")
    shutil.copytree(data / "made-features" / "output", data / "done-ap")
    folder = run("probes", "cache", "--cache-dir", "kept")
    shutil.copytree(folder / "kept", data / "cache-probes")
    shutil.copytree(folder / "output", data / "done-probes")
    shutil.copy(folder / "output" / "ibot_cub_linear_head.pth", data / "head.pth")
    folder = run("linear", "store", "--cache", "disk")
    shutil.copytree(folder / "output", data / "done-linear")
    (data / "cache-linear").mkdir()
    for path in (folder / "output").glob("*pixels*"):
        shutil.copy(path, data / "cache-linear")
    shutil.copy(next((folder / "output").glob("*segment.pt")), data / "head.pt")
    shutil.copytree(run("probes", "stop", "--checkpoint-seconds", "0", stop_at=2) / "output", data / "stopped-probes")
    shutil.copytree(run("linear", "stop2", stop_at=2) / "output", data / "stopped-linear")
    pid = os.fork()
    if not pid:
        torch.save(timm.create_model("test_vit", num_classes=0).state_dict(), data / "timm.pth")
        os._exit(0)
    wait(pid, seconds)
    os.mkfifo(data / "fifo")
    (data / "empty").mkdir()
    (data / "own.py").write_text("import torch\n\n\ndef make(weights):\n    return torch.nn.Identity()\n")


def campaign(kind, source, count, seed, seconds, jobs, end, work, report, only_case):
    """Runs cases 0 to count - 1, some at a time; returns counts by outcome."""
    counts, kinds, running, number, started = dict.fromkeys(OUTCOMES, 0), {}, {}, only_case or 0, time.monotonic()
    last = count if only_case is None else only_case + 1
    while number < last or running:
        while number < last and len(running) < jobs and time.monotonic() < end:
            folder = work / f"{kind}-{number}"
            pid = os.fork()
            if not pid:
                try:
                    found = source.run(random.Random(f"{seed} {kind} {number}"), folder, seconds)
                except BaseException as error:
                                found = [("other", f"the campaign itself: {error!r}", traceback.format_exc())]
                (work / f"{kind}-{number}.json").write_text(json.dumps(found))
                os._exit(0)
            running[pid] = number
            number += 1
        if not running:
            break
        pid, _ = os.wait()
        if pid not in running:
            continue
        done = running.pop(pid)
        path = work / f"{kind}-{done}.json"
        for outcome, remark, command in json.loads(path.read_text()):
            counts[outcome] += 1
            if outcome in ("traceback", "hang", "wrong", "other"):
                with open(report, "a") as file:
                    file.write(json.dumps({"kind": kind, "seed": seed, "case": done, "outcome": outcome,
                                           "remark": remark, "command": command}) + "\n")
                # Of one kind: the same words but for numbers and paths.
                short = outcome, re.sub(r"0x[0-9a-f]+|[\d.]+|'[^']*'|\S*/\S*", "#", remark)[:100]
                kinds.setdefault(short, []).append((len(command), done, remark, command))
        if only_case is not None:
            for name in ("out", "err"):
                for file in sorted((work / f"{kind}-{done}").rglob(name)):
                    print(f"--- {file}\n{file.read_text(errors='replace')}")
            print(path.read_text())
        path.unlink()
        shutil.rmtree(work / f"{kind}-{done}", ignore_errors=True)
        if sum(counts.values()) % 200 < 2:
            print(f"{kind}: {done + 1} of {count}, {counts}, {time.monotonic() - started:.0f} s", file=sys.stderr)
    for (outcome, _), cases in sorted(kinds.items(), key=lambda item: -len(item[1])):
        _, case, remark, command = min(cases)
        print(f"\n{outcome}, {len(cases)} times: {remark[:300]}\n  --only {kind} --seed {seed} --case {case}\n"
              f"  {command[:600]}")
    return counts


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=1e6, help="stop after so many")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=tuple(COUNTS), action="append")
    parser.add_argument("--count", type=int, help="cases of each kind")
    parser.add_argument("--case", type=int, help="this one alone")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--timeout", type=float, default=60, help="seconds after which a run hangs")
    parser.add_argument("--report", type=Path, default=Path(tempfile.gettempdir()) / "faults.jsonl")
    args = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    work = Path(tempfile.mkdtemp(prefix="faults-"))
    end, table = time.monotonic() + 60 * args.minutes, {}
    try:
        data = work / "data"
        draw_data(data)
        draw_artefacts(data, args.timeout)
        for kind in args.only or COUNTS:
            source = {"arguments": Arguments, "files": Files, "kills": Kills, "processes": Processes}[kind](data, work)
            if kind == "files":
                for target in source.targets:
                    source.reference(target, work, args.timeout)
            if kind == "kills":
                source.references(work, args.timeout)
            print(f"{kind}: {args.count or COUNTS[kind]} cases", file=sys.stderr)
            table[kind] = campaign(kind, source, args.count or COUNTS[kind], args.seed, args.timeout, args.jobs, end,
                                   work, args.report, args.case)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    print(f"\n{'':>10}  {'tried':>6}" + "".join(f"  {name:>9}" for name in OUTCOMES))
    for kind, counts in table.items():
        print(f"{kind:>10}  {sum(counts.values()):>6}" + "".join(f"  {counts[name]:>9}" for name in OUTCOMES))


if __name__ == "__main__":
    main()
