"""retrieval.py on whole images: keypoint transfer and principal components, from the command line's side."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import retrieval
from datasets.pairs import load_pairs
from models import build_model

GOLDEN = Path(__file__).parent / "golden"
IBOT = ["--model", "ibot", "--weights", GOLDEN / "ibot" / "checkpoint.pth", "--num-heads", 3]


@pytest.fixture
def run(launch, tmp_path):
    def run_retrieval(*words, status=0, processes=1):
        common = ["--device", "cpu", "--workers", 0, "--output-dir", tmp_path / "out"]
        return launch(retrieval.main, [*common, *words], processes, status)
    return run_retrieval


def results(folder):
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def test_transfer_agrees_with_a_loop_over_pairs(run, tmp_path):
    words = [*IBOT, "--dataset", "synthetic-pairs", "--num-images", 8, "--num-pairs", 12, "--image-size", 96]
    out, _ = run(*words, "--layers", "all", "--pictures", 3)
    [result] = results(tmp_path / "out")
    pairs = load_pairs("synthetic-pairs", None, 96, num_pairs=12, num_images=8)
    encoder = build_model("ibot", str(IBOT[3]), 3, projector=False)
    right = []
    for number, pair in enumerate(pairs.pairs):
        tokens = []
        for index in (pairs.source[number], pairs.target[number]):
            image = encoder.preprocess(pairs.images[int(index)][0])
            with torch.inference_mode():
                tokens.append(encoder.get_intermediate_layers(image, n=[3], norm=True)[0][0])
        points = torch.tensor(pair.source_points, dtype=torch.float64) / pairs.sizes[pairs.source[number]]
        found = retrieval.transfer_keypoints(*tokens, points) * pairs.sizes[pairs.target[number]]
        distance = (found - torch.tensor(pair.target_points, dtype=torch.float64)).norm(dim=1)
        right.append((distance <= 0.1 * pairs.box_side[number]).double().mean().item())
    assert result["task"] == "transfer" and result["num_pairs"] == 12
    assert result["pck_image"]["0.1"] == pytest.approx(100 * np.mean(right))
    assert set(result["by_layer"]) == {"0", "1", "2", "3"}
    assert result["by_layer"]["3"]["pck_image"] == result["pck_image"]
    assert len(json.loads((tmp_path / "out" / "ibot_synthetic-pairs_pairs.json").read_text())) == 12
    for name in ("pairs", "layers"):
        assert Image.open(tmp_path / "out" / f"ibot_synthetic-pairs_{name}.png").width > 600
    assert "protocol: images squashed to 96 x 96" in out and "synthetic data" in out
    # All blocks one by one are not "all", for which alone matplotlib is asked for at the start.
    run(*words, "--layers", 0, 1, 2, 3, "--name", "two", processes=2)
    assert not (tmp_path / "out" / "two_synthetic-pairs_layers.png").exists()
    assert results(tmp_path / "out")[1]["pck_point"] == pytest.approx(result["pck_point"])


def test_pca_puts_the_models_of_a_folder_on_one_sheet(run, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for number in range(3):
        pixels = generator.integers(0, 60, (80, 80, 3), dtype=np.uint8)
        pixels[20:60, 20:60] += 180
        Image.fromarray(pixels).save(folder / f"{number}.png")
    words = ["--dataset", "imagenet", "--data-path", folder, "--pca", "none", "--image-size", 64]
    run(*IBOT, *words)
    run("--model", "mae", "--weights", GOLDEN / "mae" / "checkpoint.pth", "--num-heads", 3, *words)
    one, both = results(tmp_path / "out")
    assert one["rows"] == ["ibot"] and both["rows"] == ["ibot", "mae"] and both["num_images"] == 3
    with Image.open(tmp_path / "out" / "pca.png") as sheet:
        assert sheet.height >= 3 * 64 and sheet.width >= 3 * 64
    run(*IBOT, *words, "--num-images", 2)
    assert results(tmp_path / "out")[2]["rows"] == ["ibot"], "other images make another sheet"


@pytest.mark.parametrize(("words", "message"), [
    (("--dataset", "spair"), "--data-path"), (("--dataset", "cub-pairs", "--data-path", "nowhere"), "nowhere"),
    (("--dataset", "synthetic-pairs", "--image-size", 100), "--image-size 100 is not divisible"),
    (("--dataset", "synthetic-pairs", "--layers", "9"), "blocks 0 to 3"),
    (("--image-size", 100), "--image-size 100 is not divisible by the patch size 16; use 96"),
    (("--weights", "/etc/passwd"), "truncated or no PyTorch checkpoint"),
    (("--dataset", "cub", "--pca"), "--pca has no effect with --dataset cub"),
])
def test_mistakes_are_one_line(run, tmp_path, words, message):
    _, error = run(*IBOT, *words, status=2)
    assert message in error.splitlines()[-1] and error.splitlines()[-1].startswith("error: ")
    assert not (tmp_path / "out" / "results.jsonl").exists()
