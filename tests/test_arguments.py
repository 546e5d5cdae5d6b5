"""What the command lines of all scripts refuse, in one line that names the option."""

import importlib
import json
from functools import partial
from pathlib import Path

import pytest
import torch

import segment
from datasets.synthetic import NUM_IMAGES
from utils import storage
from utils.run import OneLineParser
from utils.tables import paper_tables

IBOT = Path(__file__).parent / "golden" / "ibot" / "checkpoint.pth"
SCRIPTS = {"retrieval": [], "classify": [], "segment": [], "models.attention.__main__": [],
           "datasets.prepare.__main__": ["lip", "--source", ".", "--target", "x"]}
SENSELESS = ("nan", "inf", "-inf", "-1", "1e400", "1" + 40 * "0", "x", "", "0x10")


def parse(name):
    """The function of a script that reads its command line."""
    module = importlib.import_module(name)
    return getattr(module, "parse_arguments", module.main)


def parser_of(name):
    """The parser that a script's main makes."""
    found = []
    with pytest.MonkeyPatch.context() as patch:
        def stop(parser, words=None, namespace=None):
            found.append(parser)
            raise InterruptedError
        patch.setattr(OneLineParser, "parse_args", stop)
        with pytest.raises(InterruptedError):
            parse(name)()
    parser = found[0]
    return parser._subparsers._group_actions[0].choices["lip"] if "prepare" in name else parser


def numeric_options(name):
    return [(name, action.option_strings[0], action.nargs) for action in parser_of(name)._actions
            if action.type not in (None, str) and "Path" not in str(action.type)]


@pytest.mark.parametrize(("script", "option", "nargs"), [
    found for name in SCRIPTS for found in numeric_options(name)])
def test_numbers_that_cannot_be(launch, monkeypatch, tmp_path, script, option, nargs):
    monkeypatch.chdir(tmp_path)
    for value in SENSELESS:
        words = [f"{option}={value}"] if nargs is None else [option, *[value] * 2] if nargs == 2 else [option, value]
        out, err = launch(parse(script), [*SCRIPTS[script], *words], status=2)
        assert len(err.splitlines()) == 1 and option in err and "Traceback" not in err, (words, err)
    assert not list(tmp_path.rglob("*"))


@pytest.mark.parametrize(("script", "words"), [
    ("retrieval", ["--features", "cls", "cls"]), ("retrieval", ["--layers", "3", "3"]),
    ("classify", ["--probe", "knn", "knn"]), ("classify", ["--lr", "0.1", "1e-1"]),
    ("segment", ["--layers", "3", "3"]), ("segment", ["--lr", "0.1", "0.10"]), ("segment", ["--probe", "knn", "knn"]),
    ("segment", ["--weight-decay", "0", "0"]), ("models.attention.__main__", ["--mask-ratios", "0.5", "0.5"])])
def test_a_value_given_twice(launch, tmp_path, script, words):
    out, err = launch(parse(script), [*words, "--output-dir", tmp_path / "out"], status=2)
    assert len(err.splitlines()) == 1 and words[0] in err and "differ" in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("script", "words"), [
    ("segment", ["--workers", "100000"]), ("classify", ["--seed", "-1"]), ("retrieval", ["--image-size", "0"]),
    ("classify", ["--lr", "0"]), ("segment", ["--stride", "0"]), ("retrieval", ["--crop-scale", "0"])])
def test_numbers_out_of_range(launch, script, words):
    err = launch(parse(script), words, status=2)[1]
    assert len(err.splitlines()) == 1 and words[0] in err and "is not a" in err


def test_a_stride_above_the_crop(launch, tmp_path):

    words = ["--crop-size", "64", "--stride", "65", "--output-dir", tmp_path / "out"]
    err = launch(parse("segment"), words, status=2)[1]
    assert len(err.splitlines()) == 1 and "--stride 65 is above --crop-size 64" in err and "--stride 42" in err
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="stride 65"):
        segment.slide_inference(lambda windows: windows, torch.zeros(1, 3, 128, 128), 64, 65)


@pytest.mark.parametrize(("script", "words", "options", "mode"), [
    ("classify", ["--evaluate", "x", "--resume", "--select", "held-out"], "--resume --select", "--evaluate"),
    ("classify", ["--probe", "knn", "--save-plots"], "--save-plots", "--probe knn"),
    ("classify", ["--dataset", "folder", "--crop-scale", "1"], "--crop-scale", "--dataset folder"),
    ("segment", ["--evaluate", "x", "--resume"], "--resume", "--evaluate"),
    ("segment", ["--evaluate", "x", "--probe", "knn"], "--probe", "--evaluate"),
    ("segment", ["--memory-size", "7"], "--memory-size", "--probe linear"),
    ("segment", ["--probe", "knn", "--norm"], "--norm", "--probe knn"),
    ("retrieval", ["--query", "a:3"], "--query", "--dataset synthetic"),
    ("retrieval", ["--dataset", "imagenet", "--num-queries", "3"], "--num-queries", "picture sheets"),
    ("retrieval", ["--load-features", "x", "--model", "mae", "--features", "cls"], "--model --features",
     "--load-features"),
    ("retrieval", ["--dataset", "spair", "--save-features", "x"], "--save-features", "--dataset spair"),
    ("retrieval", ["--dataset", "imagenet", "--pca", "--top", "3"], "--top", "--pca"),
    ("retrieval", ["--dataset", "cub", "--no-norm"], "--norm", "--dataset cub"),
    ("models.attention.__main__", ["--model", "ibot", "--mask-ratios", "0.5"], "--mask-ratios", "--model ibot")])
def test_options_that_this_mode_does_not_read(launch, script, words, options, mode):
    err = launch(parse(script), words, status=2)[1]
    assert err == f"error: {options} has no effect with {mode}; leave one of them out\n" or mode == "picture sheets"
    assert len(err.splitlines()) == 1 and f"{options} has no effect with {mode}" in err
    launch(parse(script), [*words, "--table"])


@pytest.mark.parametrize(("words", "named"), [
    (["--data-path", ""], "argument --data-path: ''"), (["--weights="], "argument : '--weights='"),
    (["--name", "x" * 300], "argument --name: 'xxx"), (["--name", "\u00e4" * 101], "argument --name: '\\xe4"),
    (["--output-dir", "a/" + "x" * 201], "argument --output-dir: "),
    (["--name", "\udcff"], "argument --name: '\\udcff'")])
def test_words_that_no_file_can_have_as_a_name(launch, words, named):
    err = launch(parse("retrieval"), words, status=2)[1]
    assert len(err.splitlines()) == 1 and named in err and "is empty, longer than file names are, or not UTF-8" in err


def test_a_folder_of_data_without_a_name_of_the_data_set(launch, tmp_path):
    words = ["--weights", "random", "--data-path", tmp_path, "--output-dir", tmp_path / "out"]
    for script in ("retrieval", "classify", "segment"):
        err = launch(importlib.import_module(script).main, words, status=2)[1]
        assert len(err.splitlines()) == 1 and f"--data-path {tmp_path}" in err and "name another data set" in err
    assert not (tmp_path / "out").exists()


OWN = """
import timm
import torch


class Own(torch.nn.Module):
    patch_size = 14

    def __init__(self):
        super().__init__()
        self.vit = timm.create_model("vit_tiny_patch16_224", num_classes=0, patch_size=14, img_size=56, embed_dim=32,
                                     depth=1, num_heads=2, dynamic_img_size=True)
        self.blocks = self.vit.blocks

    def forward(self, images):
        return self.vit.forward_features(images)


def make(weights):
    return Own()
"""


def test_a_patch_that_does_not_divide_the_usual_crop(launch, monkeypatch, tmp_path):
    """timm's ViT with patches of 14 pixels: the nearest sizes are taken and said; a given crop is refused."""
    monkeypatch.setitem(NUM_IMAGES, "val", 3)
    (tmp_path / "own.py").write_text(OWN)
    words = ["--model", f"{tmp_path}/own.py:make", "--weights", "random", "--layers", "0", "--iterations", 1,
             "--batch-size", 1, "--device", "cpu", "--workers", 0, "--output-dir", tmp_path]
    err = launch(segment.main, [*words, "--crop-size", 255, "--stride", 100], status=2)[1]
    assert "--crop-size 255 is not divisible by the patch size 14; use --crop-size 252" in err
    out, _ = launch(segment.main, [*words, "--test-scale", 64, 32])
    result = json.loads((tmp_path / "results.jsonl").read_text())
    assert result["args"]["crop_size"] == 252 and result["args"]["stride"] == 168
    assert "crop size 252, the nearest to 256 that patches of 14 divide" in out and "stride 168, the" in out
    assert {"crop_size", "stride"} <= {*result["args"]["changed"]}
    assert "crop size 252" in (table := paper_tables(["segment"], tmp_path, "csv")) and "stride 168" in table


@pytest.mark.parametrize(("script", "words", "parts"), [
    ("classify", ["--seeds", 1000], ["1000 attentive heads", "or fewer, by --seeds and --lr"]),
    ("segment", ["--crop-size", 16000], ["batches of 16 images of 16000 x 16000", "--batch-size 1 and --crop-size"]),
    ("segment", ["--batch-size", 100000], ["batches of 100000 images of 256 x 256", "--batch-size"]),
    ("segment", ["--probe", "knn", "--passes", 90, "--memory-size", 10**8], ["memory of up to", "--memory-size"]),
    ("retrieval", ["--image-size", 8000, "--num-images", 4], ["images of 8000 x 8000", "--image-size"]),
    ("retrieval", ["--dataset", "synthetic-pairs", "--image-size", 8000, "--num-images", 4], ["--image-size"])])
@pytest.mark.parametrize("processes", [1, 2])
def test_what_does_not_fit_is_refused_before_work_starts(launch, tmp_path, script, words, parts, processes):
    """With a gigabyte free; the need, what is free and what would fit are said."""
    common = ["--model", "ibot", "--weights", IBOT, "--num-heads", 3, "--device", "cpu", "--workers", 0]
    common += {"classify": ["--probe", "attentive"], "segment": ["--layers", "3"]}.get(script, [])
    main = partial(with_a_gigabyte, importlib.import_module(script).main)
    _, err = launch(main, [*common, *words, "--output-dir", tmp_path], processes, status=2)
    assert len(err.splitlines()) == 1 and all(part in err for part in [*parts, " GB"]), err
    assert not (tmp_path / "results.jsonl").exists()


def with_a_gigabyte(main):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "free_memory", lambda device: 10**9)
        main()
