"""The README to the letter: pieces copied into an empty folder and run there, its code run as it stands."""

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

import classify
from models import build_model

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = [re.sub("(?m)^  ", "", block) if indent else block
          for indent, block in re.findall(r"(?ms)^( *)```python\n(.*?)^ *```", README)]


def block(words):
    found, = [block for block in BLOCKS if words in block]
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
    said = README[README.index("Copying a piece out"):README.index("## Protocol")]
    assert all(f"`{name}`" in said for name in (path, *names))
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
    forms, code = sorted((ROOT / "tests/golden").glob("*/checkpoint*.pth")), "import argparse, torch\n"
    assert "`from vits.dino import from_checkpoint`" in README
    for form in forms:
        method = form.parent.name
        (tmp_path / f"vits_{method}").mkdir(exist_ok=True)
        for name in (f"{method}.py", "encoder.py", *(["dino.py"] if method == "ibot" else [])):
            shutil.copy(ROOT / "models" / name, tmp_path / f"vits_{method}")
        code += f"""
from vits_{method}.{method} import from_checkpoint
with torch.serialization.safe_globals([argparse.Namespace]):
    encoder = from_checkpoint(torch.load({str(form)!r}, map_location="cpu", weights_only=True), num_heads=3)
print(encoder(encoder.preprocess(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))).shape[1])
"""
    assert len(forms) > 12 and run(tmp_path, code) == "5\n" * len(forms)


def test_the_segmentation_head_alone(tmp_path):
    shutil.copy(ROOT / "models/segmentation_head.py", tmp_path / "segmentation_head.py")
    found = run(tmp_path, """
import torch
from segmentation_head import LinearHead, upsampled_cross_entropy
head, label = LinearHead(8, 3), torch.zeros(1, 4, 4, dtype=torch.uint8)
upsampled_cross_entropy(head([torch.randn(1, 8, 2, 2)]), label).backward()
print(list(head.weight.grad.shape))
""")
    assert found == "[3, 8, 1, 1]\n"


def test_from_python(tmp_path, launch):
    """The README's section, with a small encoder in place of iBOT's ViT-B/16."""
    launch(classify.main, ["--model", "timm/test_vit", "--weights", "random", "--dataset", "synthetic", "--num-images",
                           12, "--image-size", 160, "--workers", 0, "--name", "ibot", "--output-dir",
                           tmp_path / "outputs"])
    Image.new("RGB", (200, 120), "red").save(tmp_path / "photo.jpg")
    text, = [one for one in BLOCKS if "load_head" in one]
    for ours, theirs in (('"ibot", "random"', '"timm/test_vit", "random"'), ("(224, 224)", "(160, 160)"),
                         ("n=[3, 11]", "n=[0, 1]")):
        assert ours in text
        text = text.replace(ours, theirs)
    code = text + "\nprint(tokens.shape[1:], blocks[1].shape[1:], logits.shape)"
    ap, knn, linear, pck, shapes = run(tmp_path, f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n" + code).splitlines()
    assert 25 < float(ap) < 50 and 0 <= float(knn) <= 1 and 0 <= float(linear) <= 100 and 0 <= float(pck) < 100
    assert "[101, 64]" in shapes and "[64, 10, 10]" in shapes


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
