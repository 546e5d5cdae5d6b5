"""What is not finite gives one line and no figure, on all processes, wherever it arises."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import classify
import retrieval
import segment
from models.attention.__main__ import main as attention_main
from utils import UserError
from utils.results import append_result
from utils.storage import load_checked, save_checked

GOLDEN = Path(__file__).parent / "golden"
IBOT = ["--model", "ibot", "--weights", GOLDEN / "ibot" / "checkpoint_teacher.pth", "--num-heads", 3]
COMMON = ["--device", "cpu", "--workers", 0]
# White images give tokens that are not finite, so of two processes one sees them.
NETWORK = """
import torch


class Network(torch.nn.Module):
    patch_size = 16

    def __init__(self):
        super().__init__()
        self.project = torch.nn.Conv2d(3, 8, 16, 16)
        self.blocks = torch.nn.ModuleList([torch.nn.Identity()])

    def forward(self, images):
        tokens = self.project(images).flatten(2).transpose(1, 2)
        tokens = torch.where(images.mean((1, 2, 3))[:, None, None] > 2, torch.inf, tokens)
        return self.blocks[0](torch.cat([tokens.mean(1, keepdim=True), tokens], dim=1))


def make(weights):
    return Network()
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Images, the last one white, in folders of retrieval.py, classify.py and segment.py."""
    root, chance = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for split in ("train", "val"):
        for number in range(4):
            pixels = chance.integers(0, 200, (48, 48, 3), dtype=np.uint8)
            if (split, number) == ("val", 3):
                pixels[:] = 255
            for folder in (root / "folder" / split / f"class{number % 2}", root / "lip" / "img" / split):
                folder.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(folder / f"{number}.png")
            (root / "lip" / "ann" / split).mkdir(parents=True, exist_ok=True)
            Image.fromarray(chance.integers(1, 20, (48, 48), dtype=np.uint8)).save(
                root / "lip" / "ann" / split / f"{number}.png")
    (root / "own.py").write_text(NETWORK)
    return root


def words_of(script, data):
    folder = ["--dataset", "folder", "--data-path", data / "folder", "--image-size", 48]
    return COMMON + {
        "retrieval": ["--dataset", "imagenet", "--data-path", data / "folder" / "val", "--image-size", 48],
        "classify": [*folder, "--no-augment", "--epochs", 2],
        "segment": ["--dataset", "lip", "--data-path", data / "lip", "--base-scale", 48, 48, "--test-scale", 48, 48,
                    "--crop-size", 48, "--stride", 32, "--layers", 0, "--batch-size", 2, "--iterations", 2],
        "attention": ["--dataset", "imagenet", "--data-path", data / "folder", "--num-images", 2]}[script]


MAINS = {"retrieval": retrieval.main, "classify": classify.main, "segment": segment.main, "attention": attention_main}


def refused(launch, script, words, out, *parts, processes=1):
    _, err = launch(MAINS[script], [*words, "--output-dir", out], processes, status=2)
    lines = [line for line in err.splitlines() if " elapsed, " not in line]
    assert len(lines) == 1 and all(part in lines[0] for part in parts), err
    assert not (out / "results.jsonl").exists()


@pytest.mark.parametrize("script", MAINS)
def test_weights(launch, data, tmp_path, script):
    content = torch.load(IBOT[3], weights_only=True)
    state = content[next(name for name in ("state_dict", "teacher", "student") if name in content)]
    key = next(key for key in state if "blocks.2.mlp.fc1.weight" in key)
    state[key] = state[key].clone()  # the tensors of these files share their numbers
    state[key][0, 0] = float("nan")
    torch.save(content, tmp_path / "bad.pth")
    words = ["--model", "ibot", "--weights", tmp_path / "bad.pth", "--num-heads", 3]
    refused(launch, script, [*words, *words_of(script, data)], tmp_path / "out", "blocks.2.mlp.fc1.weight of",
            "not finite")


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("script", ["retrieval", "classify", "segment"])
def test_features_of_one_image(launch, data, tmp_path, script, processes):
    words = ["--model", f"{data}/own.py:make", *words_of(script, data)]
    refused(launch, script, words, tmp_path, "not finite", "--precision fp32" if script != "classify" else "fp32",
            processes=processes)


@pytest.mark.parametrize("processes", [1, 2])
def test_learning_rates_that_diverge(launch, data, tmp_path, processes):
    words = [*IBOT, *words_of("classify", data), "--probe", "attentive", "--lr", "0.1", "1e30"]
    refused(launch, "classify", words, tmp_path, "attentive head (lr 1e+30, seed 0): its logits are not finite", "--lr",
            processes=processes)


def test_heads(launch, data, tmp_path):
    for script, name, key in (("classify", "ibot_folder_linear_head.pth", "weight"),
                              ("segment", "ibot_lip_segment.pt", "bias")):
        words = [*IBOT, *words_of(script, data)]
        launch(MAINS[script], [*words, "--output-dir", tmp_path / script])
        content = load_checked(tmp_path / script / name, "a head", ("head",))
        content["head"][key].flatten()[1] = float("nan")
        save_checked(tmp_path / name, content)
        refused(launch, script, [*words, "--evaluate", tmp_path / name], tmp_path / "out", "not finite", "head")


def test_results_lines(tmp_path):
    with pytest.raises(UserError, match="ap_cls of the result is not finite"):
        append_result(tmp_path, {"task": "retrieval", "map_cls": 1.0, "ap_cls": float("nan")})
    assert not list(tmp_path.iterdir())
    append_result(tmp_path, {"task": "retrieval", "ap_cls": 1.0})
    json.loads((tmp_path / "results.jsonl").read_text(), parse_constant=partial(pytest.fail))
