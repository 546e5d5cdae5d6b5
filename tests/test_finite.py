"""What is not finite gives one line and no figure, on all processes, wherever it arises."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import classify
import retrieval
import segment
from utils.storage import load, save

GOLDEN = Path(__file__).parent / "golden"
IBOT = ["--model", "ibot", "--weights", GOLDEN / "ibot" / "checkpoint_teacher.pth", "--num-heads", 3]
# White images give tokens that are not finite, so of two processes one sees them.
NETWORK = """
import torch


class Network(torch.nn.Module):
    patch_size = 16

    def __init__(self):
        super().__init__()
        self.project = torch.nn.Conv2d(3, 8, 16, 16)

    def forward(self, images):
        return torch.where(images.mean((1, 2, 3), keepdim=True) > 2, torch.inf, self.project(images))


def make(weights):
    return Network()
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Images, the last one white, in folders of retrieval.py, classify.py and segment.py."""
    root, chance = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for split, number in itertools.product(("train", "val"), range(4)):
        pixels = chance.integers(0, 200, (48, 48, 3), dtype=np.uint8)
        if (split, number) == ("val", 3):
            pixels[:] = 255
        for path, content in ((f"folder/{split}/class{number % 2}", pixels), (f"lip/img/{split}", pixels),
                              (f"lip/ann/{split}", pixels[..., 0] % 19 + 1)):
            (root / path).mkdir(parents=True, exist_ok=True)
            Image.fromarray(content).save(root / path / f"{number}.png")
    (root / "own.py").write_text(NETWORK)
    return root


MAINS = {"retrieval": retrieval.main, "classify": classify.main, "segment": segment.main}
WORDS = {
    "retrieval": ["--dataset", "imagenet", "--data-path", "folder/val", "--image-size", 48],
    "classify": ["--dataset", "folder", "--data-path", "folder", "--image-size", 48, "--epochs", 2],
    "segment": ["--dataset", "lip", "--data-path", "lip", "--base-scale", 48, 48, "--test-scale", 48, 48, "--crop-size",
                48, "--stride", 32, "--layers", "last", "--batch-size", 2, "--iterations", 2]}


def words_of(script, data, *more):
    words = [*more, *WORDS[script], "--device", "cpu", "--workers", 0]
    words[words.index("--data-path") + 1] = data / words[words.index("--data-path") + 1]
    return words


def refused(launch, script, words, out, *parts, processes=1):
    _, err = launch(MAINS[script], [*words, "--output-dir", out], processes, status=2)
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert lines and all(part in line for part in parts for line in lines) and "Traceback" not in err, err
    assert not (out / "results.jsonl").exists()


@pytest.mark.parametrize("script", MAINS)
def test_weights(launch, data, tmp_path, script):
    content = torch.load(IBOT[3], weights_only=True)
    state = content[next(name for name in ("state_dict", "teacher", "student") if name in content)]
    key = next(key for key in state if "blocks.2.mlp.fc1.weight" in key)
    state[key] = state[key].clone()  # the tensors of these files share their numbers
    state[key][0, 0] = float("nan")
    torch.save(content, tmp_path / "bad.pth")
    words = words_of(script, data, "--model", "ibot", "--weights", tmp_path / "bad.pth", "--num-heads", 3)
    refused(launch, script, words, tmp_path / "out", "blocks.2.mlp.fc1.weight", "not finite")


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("script", MAINS)
def test_features_of_one_image(launch, data, tmp_path, script, processes):
    words = words_of(script, data, "--model", f"{data}/own.py:make")
    refused(launch, script, words, tmp_path, "not finite", "fp32", processes=processes)


def test_learning_rates_that_diverge(launch, data, tmp_path):
    words = words_of("classify", data, *IBOT, "--probe", "attentive", "--lr", "0.1", "1e30")
    refused(launch, "classify", words, tmp_path, "attentive head (lr 1e+30, seed 0): its logits are not finite", "--lr")


@pytest.mark.parametrize(("script", "name"), [("classify", "ibot_folder_linear_head.pth"),
                                              ("segment", "ibot_lip_segment.pt")])
def test_heads(launch, data, tmp_path, script, name):
    words = words_of(script, data, *IBOT)
    launch(MAINS[script], [*words, "--output-dir", tmp_path])
    content = load(tmp_path / name, "a head", ("head",))
    next(iter(content["head"].values())).flatten()[1] = float("nan")
    save(tmp_path / "bad.pth", content)
    refused(launch, script, [*words, "--evaluate", tmp_path / "bad.pth"], tmp_path / "out", "not finite", "head")
