"""results.jsonl: what a line says, when a run is finished, and what must be equal where a file is used again."""

import shutil
import subprocess
from argparse import Namespace
from datetime import datetime, timedelta, timezone
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import classify
from utils import UserError
from utils.results import (
    NO_EFFECT,
    append_result,
    args_to_json,
    check_same,
    digest,
    is_finished,
    read_results,
    resume_from,
    settings_of,
)
from utils.run import OneLineParser
from utils.storage import save

GOLDEN = Path(__file__).parent / "golden"
LINE = {"task": "classify", "name": "m", "made_with": "a", "signature": [1.0, -2.0]}


def model(name):
    return ["--model", name, "--weights", GOLDEN / name / "checkpoint.pth", "--num-heads", 3]


@pytest.fixture
def folder(tmp_path):
    """A command line of classify.py on 12 + 3 images of three classes."""
    chance = np.random.default_rng(1)
    for split, count in (("train", 4), ("val", 1)):
        for name in ("cats", "dogs", "emus"):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = chance.integers(0, 255, (64, 64, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "data" / split / name / f"{index}.png")
    return ["--dataset", "folder", "--data-path", tmp_path / "data", "--image-size", 64, "--epochs", 3,
            "--device", "cpu", "--workers", 0, "--output-dir", tmp_path / "out"]


# Lines

def test_lines_are_written_and_read_with_the_run_that_they_are_of(tmp_path):
    append_result(tmp_path, LINE, LINE | {"task": "segment"})
    append_result(tmp_path, LINE | {"name": "猫"})
    first, second, third = read_results(tmp_path)
    assert first | LINE == first and third["name"] == "猫" and read_results(tmp_path, "segment") == [second]
    assert first["run"] == second["run"] and first["versions"]["torch"] == metadata.version("torch")
    assert timedelta(0) <= datetime.now(timezone.utc) - datetime.fromisoformat(first["date"]) < timedelta(days=1)
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=GOLDEN, capture_output=True, text=True).stdout
    assert first["revision"].removesuffix("-dirty") == (head.strip() or "unknown")


@pytest.mark.parametrize(("value", "name"), [
    (float("nan"), "ap_avg"), ([{"lr": 1.0}, {"acc1": float("inf")}], "heads")])
def test_a_figure_that_is_not_finite_is_refused(tmp_path, value, name):
    with pytest.raises(UserError, match="a figure of the result is not finite; no line is written"):
        append_result(tmp_path, LINE, LINE | {name: value})
    assert not list(tmp_path.iterdir())


def test_lines_that_cannot_be_read_are_said(tmp_path):
    with pytest.raises(UserError, match="results.jsonl does not exist; name the folder of a finished run"):
        read_results(tmp_path)
    append_result(tmp_path, LINE)
    (tmp_path / "results.jsonl").open("a").write('{"task": "retr')
    with pytest.raises(UserError, match="results.jsonl, line 2, is not whole; remove it"):
        read_results(tmp_path)


def test_what_differs_from_a_default_is_recorded_whatever_its_name():
    parser = OneLineParser()
    parser.add_argument("--rate", type=float, default=0.1)
    parser.add_argument("--option-of-tomorrow", type=int, default=3)
    assert parser.parse_args([]).changed == [] == parser.parse_args(["--rate", "0.1"]).changed
    assert parser.parse_args(["--option-of-tomorrow", "4"]).changed == ["option_of_tomorrow"]
    args = classify.parse_arguments(["--epochs", "10", "--workers", "1", "--lr", "0.1"])
    assert {"epochs", "lr", "workers"} == {*args.changed} and {"workers"} == {*args.changed} & NO_EFFECT


def test_arguments_as_json_and_those_that_a_resumed_run_must_share():
    args = Namespace(lr=[0.1, float("inf")], output_dir=Path("a/b"), base_scale=(3, 4), weights="official", epochs=None)
    assert args_to_json(args) == {"lr": [0.1, "Infinity"], "output_dir": "a/b", "base_scale": [3, 4],
                                  "weights": "official", "epochs": None}
    assert settings_of(args) == {"lr": [0.1, "Infinity"], "base_scale": [3, 4], "epochs": None}


# What is compared

@pytest.mark.parametrize(("change", "finished"), [
    ({}, True), ({"signature": [1.0005, -2.0005]}, True), ({"signature": [1.1, -2.0]}, False),
    ({"made_with": "b"}, False), ({"name": "n"}, False), ({"task": "segment"}, False), ({"seconds": 3}, True)])
def test_a_run_is_finished_where_its_line_has_the_same_settings_and_encoder(tmp_path, change, finished):
    assert not is_finished(tmp_path, "linear", LINE)
    append_result(tmp_path, LINE | {"probe": "linear"})
    assert is_finished(tmp_path, "linear", LINE | change) == finished
    assert not is_finished(tmp_path, "knn", LINE | change)


def test_all_differences_are_named_in_one_line():
    classes = [f"a class of a long name, number {number}" for number in range(9)]
    saved = {"lr": [0.1], "the list of classes": classes, "the encoder": torch.tensor([1.0, 2.0]), "gone": 1, "one": 1}
    check_same(Path("x.pt"), saved, saved | {"the encoder": torch.tensor([1.0, 2.001])})
    now = {"lr": [0.2], "the list of classes": classes[1:], "the encoder": torch.tensor([1.0, 2.1]), "one": True}
    with pytest.raises(UserError) as caught:
        check_same(Path("x.pt"), saved, now, "--evaluate", "mend it")
    assert str(caught.value) == "; ".join((
        "--evaluate: lr was [0.1] when x.pt was written and is [0.2] now",
        "the list of classes differs from when x.pt was written", "the encoder differs from when x.pt was written",
        "gone was 1 when x.pt was written and is None now", "one was 1 when x.pt was written and is True now",
        "mend it"))


def test_a_checkpoint_is_of_the_same_settings_or_refused(tmp_path):
    path, lines = tmp_path / "checkpoint.pth", []
    assert resume_from(path, {"lr": 0.1}, ["epoch"], lines.append) == {}
    assert lines == [f"{path} does not exist: starting from the beginning"]
    save(path, {"settings": {"lr": 0.1}, "epoch": 3})
    assert resume_from(path, {"lr": 0.1}, ["epoch"], lines.append)["epoch"] == 3
    with pytest.raises(UserError, match="--resume: lr was 0.1 when .* and is 0.2 now; give the same arguments"):
        resume_from(path, {"lr": 0.2}, ["epoch"], lines.append)
    with pytest.raises(UserError, match="--resume: .*checkpoint.pth is not a checkpoint, or is damaged"):
        resume_from(path, {"lr": 0.1}, ["iteration"], lines.append)


def test_a_digest_is_of_type_shape_and_content():
    tensor = torch.arange(6.0)
    values = [(tensor,), (tensor.view(2, 3),), (tensor.double(),), (tensor + 1,), ([tensor],), ({"a": tensor},), (1, 2),
              ((1, 2),), ("12",), (None,), (), ([], []), ([[]],)]
    assert len({digest(*value) for value in values}) == len(values)
    assert digest(torch.arange(12.0)[::2] / 2, {"x": [1]}) == digest(tensor, {"x": [1]})


# In the scripts

def test_a_finished_run_is_repeated_only_with_other_settings_data_or_encoder(launch, folder, tmp_path):
    moved = shutil.copytree(tmp_path / "data", tmp_path / "moved")
    words, count = [*folder, "--resume", "--probe", "linear", "knn", "--name", "x"], 0
    for more, new in ((model("dino"), True), (model("dino"), False), ([*model("dino"), "--data-path", moved], False),
                      ([*model("dino"), "--epochs", 4], True), (model("mae"), True)):
        said, _ = launch(classify.main, [*words, *more])
        count += 2 * new
        assert ("finished already" in said) != new and len(read_results(tmp_path / "out")) == count
    (moved / "train/cats/0.png").rename(moved / "train/dogs/9.png")
    launch(classify.main, [*words, *model("mae"), "--data-path", moved])
    assert len(read_results(tmp_path / "out")) == count + 2


def test_a_head_is_for_the_encoder_and_the_classes_that_it_was_trained_on(launch, folder, tmp_path):
    launch(classify.main, [*folder, *model("ibot")])
    words = [*folder, "--evaluate", tmp_path / "out" / "ibot_folder_linear_head.pth"]
    # The teacher's backbone alone is the same encoder.
    launch(classify.main, [*words, *model("ibot")[:3], GOLDEN / "ibot/checkpoint_teacher.pth", *model("ibot")[4:]])
    trained, tested = read_results(tmp_path / "out")
    assert tested["acc1"] == trained["acc1"]
    for other in (model("dino"), [*model("ibot")[:-1], 6]):
        _, err = launch(classify.main, [*words, *other], status=2)
        assert err.startswith("error: --evaluate: the encoder differs from when") and len(err.splitlines()) == 1
    for split in ("train", "val"):
        (tmp_path / "data" / split / "cats").rename(tmp_path / "data" / split / "eels")
    _, err = launch(classify.main, [*words, *model("ibot")], status=2)
    assert "the list of classes was ['cats', 'dogs', 'emus'] when" in err and len(err.splitlines()) == 1
