"""The README to the letter: pieces copied into an empty folder and run there, additions made in a copy of the code."""

import ast
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import average_precision_score

import segment
from models import build_model
from models.probes import build_heads

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = [re.sub("(?m)^  ", "", block) if indent else block
          for indent, block in re.findall(r"(?ms)^( *)```python\n(.*?)^ *```", README)]


def block(words):
    found, = [block for block in BLOCKS if words in block]
    return found


def block_line(words):
    """What the README gives as a line to add, between backticks."""
    found, = [found for found in re.findall("`([^`\n]+)`", README) if words in found]
    return found


def run(folder, code):
    """Runs the code in the folder, with packages alone on the path."""
    (folder / "run.py").write_text(code)
    done = subprocess.run([sys.executable, "run.py"], cwd=folder, capture_output=True, text=True,
                          env={"PATH": "/usr/bin:/bin", "HOME": str(folder), "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return done.stdout


def extract(path, *names):
    """The named functions and classes of a file, after the imports of packages at its top."""
    text = (ROOT / path).read_text()
    tree = ast.parse(text)
    ours = {"utils", "datasets", "models"}
    imports = [node for node in tree.body if isinstance(node, ast.Import) or isinstance(node, ast.ImportFrom)
               and node.level == 0 and node.module.split(".")[0] not in ours]
    pieces = [node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name in names]
    assert len(pieces) == len(names)
    bullets = README[README.index("## Copying a piece out"):README.index("## Adding to it")]
    assert all(f"`{name}`" in bullets for name in (path, *names))
    return "\n".join(ast.get_source_segment(text, node) for node in imports + pieces) + "\n"


def test_average_precision_alone(tmp_path):
    features = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    torch.save((features, torch.arange(40) % 3), tmp_path / "data.pt")
    found = run(tmp_path, extract("utils/storage.py", "free_memory") + extract(
        "retrieval.py", "average_precision", "rows_per_chunk", "ranked_precision", "ranked_precision_cpu") + """
features, labels = torch.load("data.pt")
print(average_precision(features, labels).tolist())
similarity = torch.nn.functional.normalize(features) @ torch.nn.functional.normalize(features[:1]).T
positive = (labels == 0).nonzero().flatten()
order = torch.cat([positive, (labels != 0).nonzero().flatten()])
print(ranked_precision(similarity[order].T, 0, len(positive), 0).item())
""").splitlines()
    similarity = torch.nn.functional.normalize(features) @ torch.nn.functional.normalize(features).T
    labels = np.arange(40) % 3
    expected = [average_precision_score(labels == labels[i], similarity[i].numpy()) for i in range(40)]
    np.testing.assert_allclose(json.loads(found[0]), expected, atol=1e-6)
    assert float(found[1]) == pytest.approx(expected[0], abs=1e-6)


def test_segmentation_metrics_and_windows_alone(tmp_path):
    found = run(tmp_path, extract("segment.py", "confusion_matrix", "segmentation_metrics", "window_boxes",
                                  "slide_inference") + """
print(segmentation_metrics(confusion_matrix(torch.tensor([0, 1, 1]), torch.tensor([0, 1, 255]), 2))["mIoU"])
print(slide_inference(lambda windows: windows * 2, torch.ones(1, 3, 40, 50), 32, 16).unique().item())
""")
    assert found == "100.0\n2.0\n"


def test_the_crop_rule_alone(tmp_path):
    found = run(tmp_path, extract("utils/__init__.py", "UserError") + extract("datasets/patches.py", "select_keypoints")
                + "print(select_keypoints([(0, 0), (41, 0), (300, 0)])[1].tolist())\n"
                "try:\n    select_keypoints([(0, 0), (41, 0)], 0)\nexcept UserError as error:\n    print(error)\n")
    assert found.startswith("[10, 10, 65]\ncrop scale 0")


def test_a_method_alone(tmp_path):
    """Every official form of file, each method in a folder of its own with encoder.py."""
    forms, code = sorted((ROOT / "tests/golden").glob("*/checkpoint*.pth")), ""
    for form in forms:
        method = form.parent.name
        (tmp_path / f"vits_{method}").mkdir(exist_ok=True)
        for name in (f"{method}.py", "encoder.py"):
            shutil.copy(ROOT / "models" / name, tmp_path / f"vits_{method}")
        text = block("from vits.dino import").replace("vits.dino", f"vits_{method}.{method}")
        text = text.replace('"checkpoint.pth"', repr(str(form))).replace("224", "32")
        code += text.replace("weights_only=True))", "weights_only=True), num_heads=3)") + "print(tokens.shape[1])\n"
    assert code.count("num_heads=3") == len(forms) > 12
    assert run(tmp_path, code) == "5\n" * len(forms)


def test_heads_alone(tmp_path, launch):
    shutil.copytree(ROOT / "utils", tmp_path / "utils")
    (tmp_path / "models").mkdir()
    (tmp_path / "outputs").mkdir()
    for name in ("probes.py", "segmentation_head.py"):
        shutil.copy(ROOT / "models" / name, tmp_path / "models")
    heads = build_heads("attentive", 1, 192, 4, 3, True)
    torch.save({"kind": "attentive", "num_heads": 3, "head": heads.state_dict()},
               tmp_path / "outputs/ibot_cub_attentive_head.pth")
    own_label_maps(tmp_path / "data", 48)
    launch(segment.main, ["--model", "timm/test_vit", "--weights", "random", "--dataset", "folder", "--data-path",
                          tmp_path / "data", "--base-scale", 48, 48, "--crop-size", 32, "--test-scale", 48, 48,
                          "--stride", 16, "--iterations", 2, "--batch-size", 1, "--workers", 0, "--name", "own",
                          "--output-dir", tmp_path / "out"])
    code = """
class Encoder:
    embed_dim = 64
    def __call__(self, images):
        return torch.randn(2, 5, 192)
    def get_intermediate_layers(self, images, n):
        return [torch.randn(2, 64, 2, 2) for _ in n]
import torch
encoder, images = Encoder(), None
""" + block("load_head") + "print(list(logits.shape))\n" + block("segmentation_head import").replace(
        "outputs/ibot_ade20k-part_segment.pt", str(tmp_path / "out/own_folder_segment.pt"))
    assert run(tmp_path, code + "print(list(logits.shape))") == "[2, 4]\n[2, 2, 2, 2]\n"


def own_label_maps(root, side):
    for split, count in (("train", 2), ("val", 1)):
        for folder in ("images", "labels"):
            (root / folder / split).mkdir(parents=True)
        for number in range(count):
            label = np.zeros((side, side), np.uint8)
            label[:side // 2], label[side // 2:, :side // 2] = 1, 2
            Image.fromarray(label).save(root / f"labels/{split}/{number}.png")
            Image.fromarray(np.dstack([label * 90] * 3)).save(root / f"images/{split}/{number}.jpg")
    (root / "names.txt").write_text("left\nright\n")


def test_a_model_of_timm_trained_at_home(tmp_path):
    import timm
    model = timm.create_model("vit_small_patch16_224", num_classes=7)
    torch.save({"state_dict": model.state_dict(), "epoch": 3}, tmp_path / "last.pth.tar")
    (tmp_path / "my.py").write_text(block("def mine(weights)"))
    own = build_model(f"{tmp_path}/my.py:mine", str(tmp_path / "last.pth.tar"))
    named = build_model("timm/vit_small_patch16_224", str(tmp_path / "last.pth.tar"))
    images = torch.randn(1, 3, 64, 96)
    with torch.inference_mode():
        torch.testing.assert_close(own(images), named(images))
        for found, expected in zip(own.get_intermediate_layers(images), named.get_intermediate_layers(images),
                                   strict=True):
            torch.testing.assert_close(found, expected)


def test_additions(tmp_path):
    """A method, a data set and a probe, added as the README says, through the scripts and their tables."""
    copy = tmp_path / "copy"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", "tests", "outputs", "__pycache__", ".*_cache"))

    def edit(path, old, new):
        text = (copy / path).read_text()
        assert text.count(old) == 1, f"{path}: {old}"
        (copy / path).write_text(text.replace(old, new))
    (copy / "models/mine.py").write_text(block("# models/mine.py"))
    edit("models/__init__.py", 'METHODS = (', 'METHODS = ("mine", ')
    (copy / "datasets/mine.py").write_text(block("# datasets/mine.py"))
    edit("datasets/retrieval.py", 'LOADERS = {', 'LOADERS = {"mine": load_mine, ')
    edit("datasets/retrieval.py", "from .patches", "from .mine import load_mine\nfrom .patches")
    edit("datasets/classification.py", 'CLASSIFICATION_PARTS = (', 'CLASSIFICATION_PARTS = ("mine", ')
    entry = block_line('"mine": (partial')
    edit("datasets/classification.py", '"cub": (partial', f'{entry} "cub": (partial')
    edit("datasets/classification.py", "from .patches", "from .mine import load_mine\nfrom .patches")
    edit("models/probes.py", "HEADS = {", block("class MeanHeads") + "\n\nHEADS = {")
    edit("models/probes.py", "(LinearHeads, AttentiveHeads)}", "(LinearHeads, AttentiveHeads, MeanHeads)}")
    text = (copy / "models/probe_training.py").read_text()
    for old in ('{"linear": Recipe(0.4, 1024)', '{"linear": Recipe(6.4'):
        assert text.count(old) == 1
        text = text.replace(old, old.replace("{", '{"mean": Recipe(0.4, 1024), '))
    (copy / "models/probe_training.py").write_text(text)
    for split in ("train", "test"):
        Image.new("RGB", (200, 120), "red").save(tmp_path / f"{split}.png")
    words = ["--model", "mine", "--num-heads", "3", "--weights", str(ROOT / "tests/golden/mae/checkpoint.pth"),
             "--dataset", "mine", "--data-path", str(tmp_path), "--workers", "0", "--output-dir", str(tmp_path / "out")]

    table = ["--table", "--output-dir", str(tmp_path / "out")]
    calls = [("retrieval", words), ("classify", [*words, "--probe", "mean", "--epochs", "2"]), ("retrieval", table),
             ("classify", table)]
    run(copy, "import classify, retrieval, sys\n" + "".join(
        f"sys.argv = {['script.py', *given]!r}; {main}.main()\n" for main, given in calls))
    lines = [json.loads(line) for line in (tmp_path / "out/results.jsonl").read_text().splitlines()]
    assert [line["model"] for line in lines] == ["mine", "mine"] and lines[1]["probe"] == "mean"
    assert lines[0]["num_patches"] == 2 and lines[1]["feature"] == "all tokens"
