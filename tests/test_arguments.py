"""What the command lines of all scripts refuse, in one line that names the option."""

import importlib
from pathlib import Path

import pytest
import torch
from conftest import call_main

import classify
import retrieval
import segment
from datasets.classification import CLASSIFICATION_IMAGES, CLASSIFICATION_PARTS
from datasets.pairs import PAIR_DATASETS
from datasets.retrieval import RETRIEVAL_DATASETS
from datasets.segmentation import PROTOCOLS
from utils import run

SCRIPTS = {"retrieval": retrieval, "classify": classify, "segment": segment,
           "attention": importlib.import_module("models.attention")}
SENSELESS = ("nan", "inf", "-inf", "-1", "1e400", "1" + 40 * "0", "x", "", "0x10")


def parse(script):
    """The function of a script that reads its command line."""
    return getattr(SCRIPTS[script], "parse_arguments", SCRIPTS[script].main)


def refused(main, words):
    """The one line that main ends with."""
    status, out, err = call_main(main, words)
    assert status == 2 and not out and len(err.splitlines()) == 1 and err.startswith("error: "), (words, out, err)
    return err


def numeric_options(script):
    """(option, how many values) of all that are numbers."""
    found = []
    with pytest.MonkeyPatch.context() as patch:
        def stop(parser, words=None, namespace=None):
            found.append(parser)
            raise InterruptedError
        patch.setattr(run.OneLineParser, "parse_args", stop)
        with pytest.raises(InterruptedError):
            parse(script)()
    return [(action.option_strings[0], action.nargs) for action in found[0]._actions
            if action.type not in (None, str, Path)]


@pytest.mark.parametrize("script", SCRIPTS)
def test_numbers_that_cannot_be(monkeypatch, tmp_path, script):
    monkeypatch.chdir(tmp_path)
    options = numeric_options(script)
    assert len(options) > 5
    for option, nargs in options:
        for value in SENSELESS:
            words = [f"{option}={value}"] if nargs is None else [option, *[value] * (nargs if nargs == 2 else 1)]
            assert option in refused(parse(script), words)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("script", "words"), [
    ("classify", ["--seed", "-1"]), ("retrieval", ["--image-size", "0"]), ("classify", ["--lr", "0"]),
    ("segment", ["--stride", "0"]), ("retrieval", ["--crop-scale", "0"]), ("segment", ["--weight-decay", "-0.1"])])
def test_numbers_out_of_range(script, words):
    err = refused(parse(script), words)
    assert words[0] in err and "is not from" in err and ".0 (" not in err and ".py --help)" in err


def test_numbers_that_can_be():
    assert run.positive_int("7") == 7 and run.non_negative_int("0") == 0 and run.positive_float("1e-3") == 0.001
    assert run.non_negative_float("0") == 0 and run.number(float, 0, 1)("0.5") == 0.5


def test_a_stride_above_the_crop():
    err = refused(segment.parse_arguments, ["--crop-size", "64", "--stride", "65"])
    assert "--stride 65 is above --crop-size 64" in err and "--stride 42" in err
    with pytest.raises(ValueError, match="stride 65"):
        segment.slide_inference(lambda windows: windows, torch.zeros(1, 3, 128, 128), 64, 65)


@pytest.mark.parametrize(("script", "words", "options", "mode"), [
    ("classify", ["--evaluate", "x", "--resume", "--select", "held-out"], "--resume --select", "--evaluate"),
    ("classify", ["--probe", "knn", "--save-plots"], "--save-plots", "--probe knn"),
    ("classify", ["--dataset", "folder", "--crop-scale", "1"], "--crop-scale", "--dataset folder"),
    ("classify", ["--num-images", "9", "--save-plots"], "--save-plots",
     "--num-images, whose recipe measures the last epoch alone"),
    ("segment", ["--evaluate", "x", "--resume"], "--resume", "--evaluate"),
    ("segment", ["--evaluate", "x", "--probe", "knn"], "--probe", "--evaluate"),
    ("segment", ["--memory-size", "7"], "--memory-size", "--probe linear"),
    ("segment", ["--probe", "knn", "--norm"], "--norm", "--probe knn"),
    ("retrieval", ["--query", "a:3"], "--query", "--dataset synthetic"),
    ("retrieval", ["--load-features", "x", "--model", "mae", "--features", "cls"], "--model --features",
     "--load-features"),
    ("retrieval", ["--dataset", "spair", "--save-features", "x"], "--save-features", "--dataset spair"),
    ("retrieval", ["--dataset", "imagenet", "--pca", "--top", "3"], "--top", "--pca"),
    ("retrieval", ["--dataset", "cub", "--no-norm"], "--norm", "--dataset cub"),
    ("retrieval", ["--dataset", "spair", "--num-images", "9"], "--num-images", "--dataset spair"),
    ("attention", ["--model", "ibot", "--mask-ratios", "0.5"], "--mask-ratios", "--model ibot")])
def test_options_that_this_mode_does_not_read(tmp_path, script, words, options, mode):
    err = refused(parse(script), [*words, "--output-dir", tmp_path / "out"])
    assert err == f"error: {options} has no effect with {mode}; leave one of them out\n"


@pytest.mark.parametrize(("words", "parts"), [
    (["--data-path", "x"], ["--data-path x: --dataset synthetic reads no files; name another data set"]),
    (["--dataset", "none"], ["--dataset", "'none'"]),
    (["--wieghts", "random"], ["--wieghts random"])])
@pytest.mark.parametrize("script", ["retrieval", "classify", "segment"])
def test_what_no_run_starts_with(tmp_path, script, words, parts):
    status, _, err = call_main(SCRIPTS[script].main, [*words, "--output-dir", tmp_path / "out", "--workers", 0])
    assert status == 2 and len(err.splitlines()) == 1 and all(part in err for part in parts), err
    assert not (tmp_path / "out" / "results.jsonl").exists()


@pytest.mark.parametrize(("script", "names"), [
    ("retrieval", RETRIEVAL_DATASETS + PAIR_DATASETS), ("segment", tuple(PROTOCOLS)),
    ("classify", CLASSIFICATION_PARTS + CLASSIFICATION_IMAGES)])
def test_data_sets_without_a_data_path(tmp_path, script, names):
    for name in names:
        if not name.startswith("synthetic"):
            status, _, err = call_main(SCRIPTS[script].main, ["--dataset", name, "--output-dir", tmp_path])
            needed = "annotations" if name == "keypoints" else "data-path"
            assert status == 2 and err.startswith(f"error: --dataset {name} needs --{needed} "), err
