"""segment.py: metrics, sliding windows and schedule against the reference pipeline; runs from the command line's own
main(), in one process, on several, killed and resumed, and with what users get wrong."""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import PROCESSES
from PIL import Image
from sklearn.metrics import confusion_matrix as sklearn_confusion_matrix

import models
import segment
from datasets import segmentation, segmentation_store
from datasets.segmentation import reduce_label
from datasets.segmentation_store import batch_indices
from models import segmentation_probe
from models.encoder import Encoder
from utils import UserError, storage
from utils.drawing import draw_figure6
from utils.ending import exit_with_one_line_errors
from utils.tables import figure6_panels, paper_tables

GOLDEN = Path(__file__).parent / "golden" / "segmentation"
NUM_CLASSES = 19  # LIP's
TRAIN_SIZES = [(40, 56), (64, 48), (33, 90), (50, 50), (20, 24)]
TEST_SIZES = [(45, 60), (64, 31), (12, 200), (52, 52), (40, 41), (48, 70), (61, 50)]


def golden(name):
    return torch.load(GOLDEN / f"{name}.pt", weights_only=True)


# Against the reference pipeline

@pytest.mark.parametrize("case", golden("metrics")["cases"], ids=lambda case: case["name"])
def test_metrics(case):
    classes, quirk = case["num_classes"], case["name"].startswith("quirk")
    bins = classes + 2 * quirk
    confusion = torch.zeros(bins, bins, dtype=torch.int64)
    for pred, label in zip(case["pred"], case["label"], strict=True):
        if case["reduce_zero_label"]:
            label = torch.from_numpy(reduce_label(label.numpy()))
        confusion += segment.confusion_matrix(pred, label, bins)
    metrics = segment.segmentation_metrics(confusion, classes if quirk else None)
    if not quirk:
        assert torch.equal(confusion.diag(), case["intersect"])
        assert torch.equal(confusion.sum(0), case["pred_area"])
        assert torch.equal(confusion.sum(1), case["label_area"])
    for name in ("mIoU", "mAcc", "aAcc"):
        assert metrics[name] == pytest.approx(100 * case[name], rel=1e-12, nan_ok=True)
    assert torch.allclose(metrics["iou_per_class"], 100 * case["class_iou"], rtol=1e-12, equal_nan=True)
    assert torch.allclose(metrics["acc_per_class"], 100 * case["class_acc"], rtol=1e-12, equal_nan=True)


def test_confusion_matrix_against_scikit_learn():
    generator = torch.Generator().manual_seed(0)
    label = torch.randint(0, 7, (90, 110), generator=generator)
    pred = torch.randint(0, 7, (90, 110), generator=generator)
    label[10:30] = 255
    ours = segment.confusion_matrix(pred, label.to(torch.uint8), 7)
    kept = label != 255
    assert np.array_equal(ours.numpy(), sklearn_confusion_matrix(label[kept], pred[kept], labels=range(7)))


def toy_model(data, name):
    def conv3(images):
        return F.conv2d(images, data["conv3_weight"], data["conv3_bias"], padding=1)

    def patch4(images):
        logits = F.conv2d(images, data["patch4_weight"], data["patch4_bias"], stride=4)
        return F.interpolate(logits, size=images.shape[2:], mode="bilinear", align_corners=False)
    return {"conv3": conv3, "patch4": patch4}[name]


@pytest.mark.parametrize("window_batch", [1, 5])
def test_sliding_windows(window_batch):
    data = golden("slide")
    for case in data["cases"]:
        image, sizes = case["input"].float() * data["input_scale"], []
        model = toy_model(data, case["model"])

        def watched(windows, model=model, sizes=sizes):
            sizes.extend([list(windows.shape[2:])] * len(windows))
            return model(windows)

        logits = segment.slide_inference(watched, image, case["crop"], case["stride"], window_batch)
        assert len(sizes) == case["windows"]
        assert sizes == case["window_sizes"]
        assert torch.allclose(logits[0], case["logits"], atol=1e-5)
        for limit in (1, 256 << 20):
            pred = segment.upsampled_argmax(logits[0], tuple(case["out_size"]), limit)
            assert (pred != case["pred"]).sum() <= case["near_ties"]


def test_windows_of_several_images_go_through_the_model_together():
    data = golden("slide")
    cases = [case for case in data["cases"] if case["model"] == "conv3" and case["crop"] == 40]
    images = [case["input"][0].float() * data["input_scale"] for case in cases]
    counts = []

    def model(windows):
        counts.append(len(windows))
        return toy_model(data, "conv3")(windows)

    together = segment.slide_inference(model, images, 40, 20, window_batch=4)
    assert max(counts) > 1
    assert sum(counts) == sum(case["windows"] for case in cases)
    for logits, case in zip(together, cases, strict=True):
        assert torch.allclose(logits, case["logits"], atol=1e-5)


def test_learning_rate():
    for setting in golden("lr")["settings"]:
        assert setting["power"] == 1
        ours = [segmentation_probe.linear_learning_rate(iteration, setting["lr"], setting["total"], setting["warmup"],
                                      setting["warmup_ratio"]) for iteration in setting["iterations"]]
        assert ours == pytest.approx(setting["values"].tolist(), rel=1e-12)


def test_every_image_once_an_epoch():
    """Batches that do not divide the data set run on into the next epoch, which has another order."""
    places = [index for iteration in range(21) for index in batch_indices(3, iteration, 4, 12)]
    epochs = [places[i:i + 12] for i in range(0, 84, 12)]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 7
    assert batch_indices(3, 8, 4, 12) == places[32:36]
    assert batch_indices(4, 0, 4, 12) != places[:4]


# Whole runs on a small encoder and a made-up LIP

class Block(torch.nn.Module):
    def __init__(self, width):
        super().__init__()
        self.linear = torch.nn.Linear(width, width)

    def forward(self, tokens):
        return tokens + torch.tanh(self.linear(tokens))


class SmallVit(torch.nn.Module):
    """What Encoder wants of timm's VisionTransformer, with blocks that look at no neighbours."""

    def __init__(self, width=24, depth=4):
        super().__init__()
        self.patch_embed = PatchEmbed(width)
        self.cls_token = torch.nn.Parameter(torch.zeros(1, 1, width))
        self.blocks = torch.nn.ModuleList(Block(width) for _ in range(depth))
        for block in self.blocks:
            block.attn = torch.nn.Identity()
            block.attn.num_heads = 1
        self.embed_dim, self.num_prefix_tokens, self.norm = width, 1, torch.nn.LayerNorm(width)


class PatchEmbed(torch.nn.Module):
    patch_size = (16, 16)

    def __init__(self, width):
        super().__init__()
        self.proj = torch.nn.Conv2d(3, width, 16, 16)

    def forward(self, images):
        return self.proj(images).flatten(2).transpose(1, 2)


def small_encoder(*args, **kwargs):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoder = Encoder(SmallVit(), None)
    encoder.weights, encoder.sha256 = "random", None
    return encoder


def draw_lip(root, largest=NUM_CLASSES):
    """Blobs of colour and their labels, in the authors' folders."""
    generator = np.random.default_rng(0)
    palette = generator.integers(0, 256, (NUM_CLASSES + 1, 3), dtype=np.uint8)
    for split, sizes in (("train", TRAIN_SIZES), ("val", TEST_SIZES)):
        for folder in ("img", "ann"):
            (root / folder / split).mkdir(parents=True)
        for i, (height, width) in enumerate(sizes):
            small = generator.integers(0, largest + 1, (2, 3), dtype=np.uint8)
            label = Image.fromarray(small).resize((width, height), Image.Resampling.NEAREST)
            noise = generator.integers(-20, 20, (height, width, 3))
            image = np.clip(palette[np.asarray(label)] + noise, 0, 255).astype(np.uint8)
            Image.fromarray(image).save(root / "img" / split / f"{i}.jpg", quality=95)
            label.save(root / "ann" / split / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def lip(tmp_path_factory):
    return draw_lip(tmp_path_factory.mktemp("lip"))


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    monkeypatch.setattr(models, "build_model", small_encoder)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def arguments(data, output, *more):
    return ["--model", "mae", "--weights", "random", "--dataset", "lip", "--data-path", str(data), "--device", "cpu",
            "--output-dir", str(output), "--layers", "0", "3", "--batch-size", "3", "--workers", "0",
            "--base-scale", "128", "48", "--crop-size", "48", "--test-scale", "128", "48", "--stride", "32",
            "--iterations", "8", "--lr", "0.05", "--warmup-iterations", "2", "--checkpoint-every", "2", *map(str, more)]


def run(monkeypatch, data, output, *more):
    """main() in this process; returns the last line of results.jsonl."""
    monkeypatch.setattr(sys, "argv", ["segment.py", *arguments(data, output, *more)])
    segment.main()
    return json.loads((output / "results.jsonl").read_text().splitlines()[-1])


def fails(monkeypatch, capsys, data, output, *more):
    """The one line that a user's mistake ends with."""
    monkeypatch.setattr(sys, "argv", ["segment.py", *arguments(data, output, *more)])
    with pytest.raises(SystemExit) as exit_info:
        exit_with_one_line_errors(segment.main)
    assert exit_info.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("error: ")
    return lines[-1]


def saved_head(output):
    return torch.load(output / "mae_lip_segment.pt", weights_only=True)["head"]


@pytest.fixture(scope="module")
def finished(lip, tmp_path_factory):
    """An uninterrupted run: its folder and its results line."""
    output = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "build_model", small_encoder)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        result = run(patch, lip, output, "--save-pictures", 2, "--eval-every", 4)
        torch.set_num_threads(threads)
    return output, result


def test_results_line_and_pictures(finished):
    output, result = finished
    assert result["task"] == "segment"
    assert result["num_images"] == len(TEST_SIZES)
    assert result["iterations"] == 8
    assert len(result["iou_per_class"]) == NUM_CLASSES
    assert result["args"]["lr"] == [0.05] and result["lr"] == 0.05
    assert 0 <= result["mIoU"] <= 100
    for i in range(2):
        with Image.open(output / "mae_lip_pictures" / f"{i}.png") as picture:
            assert picture.width >= 3 * 512 * TEST_SIZES[i][1] // max(TEST_SIZES[i])
        with Image.open(output / "mae_lip_pictures" / f"{i}_labels.png") as labels:
            assert labels.mode == "P" and labels.size == TEST_SIZES[i][::-1]
            assert np.min(labels) >= 1 and np.max(labels) <= NUM_CLASSES
    assert (output / "log.txt").read_text().count("mIoU") >= 2
    assert not list(output.glob(".*"))


def test_training_learns_the_colours(monkeypatch, tmp_path):
    """Twice as good as always answering with the class that is best to answer with."""
    data = draw_lip(tmp_path / "data", largest=5)
    result = run(monkeypatch, data, tmp_path, "--iterations", 100)
    labels = [np.asarray(Image.open(path)) for path in sorted((data / "ann" / "val").iterdir())]
    counts = np.bincount(np.concatenate([label.ravel() for label in labels]), minlength=NUM_CLASSES + 1)[1:]
    share = 100 * counts.max() / counts.sum()
    assert result["mIoU"] > 2 * share / (counts > 0).sum()
    assert result["aAcc"] > 2 * share
    classes = (counts > 0).sum()
    assert result["chance"] == pytest.approx({"mIoU": share / classes, "mAcc": 100 / classes, "aAcc": share})


def killed_in_iteration_six(lines):
    calls, loss = [], segmentation_probe.upsampled_cross_entropy

    def dies(*args, **kwargs):
        calls.append(1)
        if len(calls) == 6:
            os.kill(os.getpid(), signal.SIGKILL)
        return loss(*args, **kwargs)

    torch.set_num_threads(1)
    segmentation_probe.upsampled_cross_entropy, models.build_model = dies, small_encoder
    sys.argv = ["segment.py", *lines]
    segment.main()


def test_a_killed_run_resumes_to_the_same_bits(finished, monkeypatch, lip, tmp_path):
    """The last checkpoint before the kill is that of iteration 4. --resume without one starts from the beginning."""
    process = PROCESSES.Process(target=killed_in_iteration_six, args=(arguments(lip, tmp_path, "--resume"),))
    process.start()
    process.join(240)
    assert process.exitcode == -signal.SIGKILL
    assert torch.load(tmp_path / "mae_lip_segment.pt", weights_only=True)["iteration"] == 4
    assert not (tmp_path / "results.jsonl").exists()
    result = run(monkeypatch, lip, tmp_path, "--resume")
    output, expected = finished
    for name, value in saved_head(output).items():
        assert torch.equal(saved_head(tmp_path)[name], value)
    assert result["iou_per_class"] == expected["iou_per_class"]


def test_images_from_a_file_give_the_same(finished, monkeypatch, lip, tmp_path):
    run(monkeypatch, lip, tmp_path, "--cache", "disk")
    store = list(tmp_path.glob("pixels-*.int32"))
    assert len(store) == 1
    assert store[0].stat().st_size == 4 * sum(height * width for height, width in TRAIN_SIZES)
    written = store[0].stat().st_mtime_ns
    run(monkeypatch, lip, tmp_path, "--cache", "disk")
    assert store[0].stat().st_mtime_ns == written
    for name, value in saved_head(finished[0]).items():
        assert torch.equal(saved_head(tmp_path)[name], value)


def test_evaluate_a_head(finished, monkeypatch, lip, tmp_path):
    output, expected = finished
    head = output / "mae_lip_segment.pt"
    result = run(monkeypatch, lip, tmp_path, "--evaluate", head)
    assert result["iou_per_class"] == expected["iou_per_class"]
    assert result["iterations"] == 8
    # From Python, in the words of the README.
    loaded = segmentation_probe.LinearHead(2 * 24, NUM_CLASSES)
    loaded.load_state_dict(torch.load(head, weights_only=True)["head"])


# Recipes beyond the paper's

def test_heads_trained_together_are_those_trained_alone(finished, monkeypatch, lip, tmp_path):
    passes, evaluate = [], segment.evaluate
    monkeypatch.setattr(segment, "evaluate", lambda *given, **more: passes.append(more) or evaluate(*given, **more))
    result = run(monkeypatch, lip, tmp_path, "--lr", 0.1, 0.05, "--weight-decay", 0.05, 0.2)
    assert len(passes) == 2, "one pass over the test images chooses among the four heads"
    content = torch.load(tmp_path / "mae_lip_segment.pt", weights_only=True)
    assert [(head["lr"], head["weight_decay"]) for head in result["heads"]] == [
        (0.1, 0.05), (0.1, 0.2), (0.05, 0.05), (0.05, 0.2)]
    alone = saved_head(finished[0])
    assert torch.equal(content["heads"]["2.weight"], alone["weight"])
    assert torch.equal(content["heads"]["2.bias"], alone["bias"])
    assert not torch.equal(content["heads"]["3.weight"], alone["weight"])
    scores = [head["mIoU"] for head in result["heads"]]
    assert result["mIoU"] == pytest.approx(max(scores)) and scores[2] == pytest.approx(finished[1]["mIoU"])
    best = scores.index(max(scores))
    assert {name: result[name] for name in ("lr", "weight_decay")}.items() <= result["heads"][best].items()
    assert torch.equal(content["head"]["weight"], content["heads"][f"{best}.weight"])


def test_figures_name_their_head_and_a_table_ends_the_run(monkeypatch, lip, tmp_path, capsys):
    run(monkeypatch, lip, tmp_path, "--lr", 0.1, 0.001, "--eval-every", 4)
    printed = capsys.readouterr().out
    for head in ("lr 0.1, weight decay 0.05, seed 0", "lr 0.001, weight decay 0.05, seed 0"):
        assert f"({head})" in printed and f"(7 images), {head}" in printed and f"{head}: mIoU" in printed
    table = printed[printed.rindex("percent"):].splitlines()
    result = json.loads((tmp_path / "results.jsonl").read_text())
    assert table[2].split() == ["mean", "of", "the", "classes", f"{result['mIoU']:.2f}", f"{result['mAcc']:.2f}"]
    assert table[3].split() == ["all", "pixels", f"{result['aAcc']:.2f}"]
    known = {name: value for name, value in result["iou_per_class"].items() if value is not None}
    extremes = table[4].split()[-2], table[-1].split()[-2]
    assert extremes == (f"{max(known.values()):.2f}", f"{min(known.values()):.2f}")
    assert len({len(line) for line in table[1:] if "all pixels" not in line}) == 1 and "null" not in printed


def test_held_out_images_choose_and_are_not_trained_on(monkeypatch, lip, tmp_path, capsys):
    result = run(monkeypatch, lip, tmp_path, "--lr", 0.1, 0.001, "--select", "held-out")
    printed = capsys.readouterr().out
    assert f"{len(TRAIN_SIZES) - 1} training images" in printed and "chosen on a held-out tenth" in printed
    assert "(1 images)" in printed and result["num_images"] == len(TEST_SIZES)


def test_batch_norm_is_pytorchs_over_the_features():
    encoder = small_encoder()
    head = segmentation_probe.LinearHead(48, NUM_CLASSES)
    segmenter = segment.Segmenter(encoder, head, (0, 3), "fp32", norm=True, batch_norm=True).train()
    reference = torch.nn.BatchNorm2d(48, affine=False).train()
    for seed in range(3):
        images = torch.randn(2, 3, 48, 64, generator=torch.Generator().manual_seed(seed))
        plain = torch.cat(encoder.get_intermediate_layers(images, n=(0, 3), norm=True), dim=1)
        [features] = segmenter.features(images)
        torch.testing.assert_close(features, reference(plain), rtol=1e-4, atol=1e-5)
    [features] = segmenter.eval().features(images)
    torch.testing.assert_close(features, reference.eval()(plain), rtol=1e-4, atol=1e-5)


def test_a_head_behind_batch_norm_resumes_and_evaluates(monkeypatch, lip, tmp_path):
    words = ("--layers", "last4", "--norm", "--batch-norm")
    result = run(monkeypatch, lip, tmp_path, *words)
    assert result["args"]["layers"] == [0, 1, 2, 3]
    assert run(monkeypatch, lip, tmp_path, *words, "--resume")["iou_per_class"] == result["iou_per_class"]
    tested = run(monkeypatch, lip, tmp_path / "again", "--evaluate", tmp_path / "mae_lip_segment.pt")
    assert tested["iou_per_class"] == result["iou_per_class"] and tested["batch_norm"]


def test_both_probes_in_one_run(finished, monkeypatch, lip, tmp_path):
    run(monkeypatch, lip, tmp_path, "--probe", "knn", "linear", "--memory-size", 60, "--save-pictures", 1)
    knn, linear = map(json.loads, (tmp_path / "results.jsonl").read_text().splitlines())
    assert (knn["probe"], linear["probe"]) == ("knn", "linear")
    assert linear["iou_per_class"] == finished[1]["iou_per_class"]
    assert 0 < knn["memory"] <= 60 and knn["num_images"] == len(TEST_SIZES)
    run(monkeypatch, lip, tmp_path, "--probe", "knn", "--memory-size", 60, "--resume")
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 2, "the finished run is not repeated"
    assert (tmp_path / "mae_lip_knn_pictures" / "0.png").exists() and (tmp_path / "mae_lip_pictures").exists()


@pytest.mark.parametrize(("words", "depth", "layers"), [
    (None, 12, [3, 5, 7, 11]), (None, 24, [7, 11, 15, 23]), (["last"], 12, [11]), (["last4"], 24, [20, 21, 22, 23]),
    (["2", "0"], 4, [2, 0])])
def test_layers_by_share_of_depth(words, depth, layers):
    assert models.choose_layers(words, depth) == layers


def segment_with_small_encoder():
    models.build_model = small_encoder
    segment.main()


@pytest.mark.parametrize("world", [2, 3])
def test_the_number_of_processes_changes_nothing(launch, finished, lip, tmp_path, world):
    """Batch 3 and 7 test images over 2 and 3 processes: uneven shares of both."""
    launch(segment_with_small_encoder, arguments(lip, tmp_path, "--save-pictures", 7), world)
    lines = (tmp_path / "results.jsonl").read_text().splitlines()
    assert len(lines) == 1
    result, (output, expected) = json.loads(lines[0]), finished
    assert result["world_size"] == world
    assert result["num_images"] == len(TEST_SIZES)
    for name, value in saved_head(output).items():
        assert torch.allclose(saved_head(tmp_path)[name], value, atol=1e-5)
    assert result["mIoU"] == pytest.approx(expected["mIoU"], abs=0.1)
    assert result["aAcc"] == pytest.approx(expected["aAcc"], abs=0.1)
    assert {path.name for path in (tmp_path / "mae_lip_pictures").iterdir()} == {
        f"{i}{ending}.png" for i in range(len(TEST_SIZES)) for ending in ("", "_labels")}


def test_each_test_pixel_is_counted_once(finished, lip):
    """The confusion matrix holds as many pixels as the label files have labelled ones, at full resolution."""
    seen = []
    split = segmentation.open_segmentation("lip", lip, "val")
    segmenter = segment.Segmenter(small_encoder(), segmentation_probe.LinearHead(48, NUM_CLASSES), (0, 3), "fp32")
    metrics = segment.segmentation_metrics
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(segment, "segmentation_metrics", lambda *given: seen.append(given[0]) or metrics(*given))
        segment.evaluate(segmenter, split, (128, 48), 48, 32, workers=2)
    labels = [np.asarray(Image.open(path)) for path in sorted((lip / "ann" / "val").iterdir())]
    expected = np.bincount(np.concatenate([label.ravel() for label in labels]), minlength=NUM_CLASSES + 1)[1:]
    assert seen[0].sum(1).tolist() == expected.tolist()


def test_frozen_encoder_gets_no_gradient(lip):
    encoder = small_encoder()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    segmenter = segment.Segmenter(encoder, segmentation_probe.LinearHead(48, NUM_CLASSES), (0, 3), "fp32")
    logits = segmenter.patch_logits(torch.randn(2, 3, 48, 48))
    segmentation_probe.upsampled_cross_entropy(logits, torch.zeros(2, 48, 48, dtype=torch.uint8)).backward()
    assert all(parameter.grad is None for parameter in encoder.parameters())
    assert all(parameter.grad.abs().sum() > 0 for parameter in segmenter.head.parameters())
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())


def test_the_authors_small_windows_repeat_the_window_before(lip):
    def model(windows):
        return windows[:, :1] * 2

    repeats = segment.RepeatsSmallWindows(model, 4, 1)
    small = torch.ones(1, 3, 2, 4)
    assert (repeats(small) == 0).all()
    large = torch.arange(96.0).view(2, 3, 4, 4)
    assert torch.equal(repeats(large), 2 * large[:, :1])
    assert torch.equal(repeats(torch.cat([small, small])), (2 * large[1:, :1, :2]).expand(2, -1, -1, -1))


# What users get wrong

@pytest.fixture
def broken(lip, tmp_path):
    return shutil.copytree(lip, tmp_path / "data")


def test_files_without_partner(monkeypatch, capsys, broken, tmp_path):
    (broken / "ann" / "train" / "1.png").unlink()
    (broken / "ann" / "train" / "3.png").unlink()
    line = fails(monkeypatch, capsys, broken, tmp_path / "out")
    assert "2 images have no label map" in line
    assert ": 1, 3;" in line
    (broken / "img" / "val" / "6.jpg").unlink()
    line = fails(monkeypatch, capsys, broken, tmp_path / "out")
    assert "1 label maps have no image" in line
    assert ": 6;" in line


def test_sizes_that_differ(monkeypatch, capsys, broken, tmp_path):
    for number in (0, 4):
        Image.new("L", (7, 9)).save(broken / "ann" / "train" / f"{number}.png")
    line = fails(monkeypatch, capsys, broken, tmp_path / "out")
    assert "2 images differ in size" in line
    assert "0 (56 x 40 / 7 x 9), 4 (24 x 20 / 7 x 9)" in line


def test_a_label_above_the_class_count(monkeypatch, capsys, broken, tmp_path):
    path = broken / "ann" / "train" / "2.png"
    label = np.array(Image.open(path))
    label[3, 5] = 20
    Image.fromarray(label).save(path)
    line = fails(monkeypatch, capsys, broken, tmp_path / "out")
    assert str(path) in line
    assert "label 20" in line


def test_the_authors_metrics_take_a_label_equal_to_the_class_count(monkeypatch, finished, broken, tmp_path):
    path = broken / "ann" / "val" / "2.png"
    label = np.array(Image.open(path))
    label[label == 19] = 0
    label[:10] = 20
    Image.fromarray(label).save(path)
    head = finished[0] / "mae_lip_segment.pt"
    result = run(monkeypatch, broken, tmp_path / "out", "--evaluate", head, "--authors-defects")
    assert result["num_images"] == len(TEST_SIZES)


@pytest.mark.parametrize(("more", "words"), [
    (("--layers", "9"), "blocks 0 to 3"),
    (("--crop-size", "50"), "patch size 16"),
    (("--dataset", "ade20k"), "does not hold ade20k"),
    (("--data-path", "nowhere"), "nowhere is not a folder"),
    (("--evaluate", "nothing.pt"), "nothing.pt does not exist"),
    (("--evaluate", __file__), "is not a checkpoint of segment.py"),
    (("--cache", "gpu"), "no GPU"),
    (("--lr", "1e30"), "the loss is"),
    (("--probe", "knn", "--memory-size", "4"), "--memory-size 4 is less than one patch"),
    (("--layers", "first"), "use last, last4"),
])
def test_mistakes_are_one_line(monkeypatch, capsys, lip, tmp_path, more, words):
    data = tmp_path if more == ("--dataset", "ade20k") else lip
    assert words in fails(monkeypatch, capsys, data, tmp_path / "out", *more)


def test_a_head_of_another_class_count(monkeypatch, capsys, finished, lip, tmp_path):
    head = finished[0] / "mae_lip_segment.pt"
    line = fails(monkeypatch, capsys, lip, tmp_path, "--evaluate", head, "--dataset", "pascal-object")
    assert "the list of classes, from number 1 on, was ['hat', 'hair'] when" in line
    assert "and is ['aeroplane', 'bicycle'] now; use the encoder and the classes it was trained on, mae and lip" in line


@pytest.mark.parametrize(("given", "patch", "windows"), [
    ((None, None), 16, (512, 341)), ((None, None), 14, (518, 336)), ((None, 100), 14, (518, 100)),
    ((448, 300), 14, (448, 300)), ((None, None), 8, (512, 341))])
def test_windows_that_the_patch_divides(given, patch, windows):
    assert segment.fit_windows(*given, segment.PROTOCOLS["ade20k"], patch) == windows


def test_resuming_another_run(monkeypatch, capsys, finished, lip, tmp_path):
    shutil.copy(finished[0] / "mae_lip_segment.pt", tmp_path)
    assert "lr was [0.05] when" in fails(monkeypatch, capsys, lip, tmp_path, "--resume", "--lr", "0.1")


def test_another_encoder_or_other_data_do_not_take_a_head_or_go_on(monkeypatch, capsys, finished, lip, tmp_path):
    """The number of heads, which no weight shows, and label maps that were changed, moved, or are fewer."""
    head = tmp_path / "mae_lip_segment.pt"
    shutil.copy(finished[0] / head.name, head)

    def two_heads(*args, **kwargs):
        encoder = small_encoder()
        encoder.num_heads = 2
        return encoder

    with monkeypatch.context() as patched:
        patched.setattr(models, "build_model", two_heads)
        for option in (("--evaluate", head), ("--resume",)):
            line = fails(patched, capsys, lip, tmp_path, *option)
            assert f"{option[0]}: the number of heads was 1 when {head} was written and is 2 now; " in line
    names = ["hair", "hat", *segmentation.class_names("lip", lip)[2:]]
    with pytest.raises(UserError, match=r"classes, from number 1 on, was \['hat', 'hair'\] when .* is \['hair', 'hat'"):
        segmentation_probe.load_segmenter(head, small_encoder(), names, "fp32")

    moved = shutil.copytree(lip, tmp_path / "elsewhere")  # with the files' times
    run(monkeypatch, moved, tmp_path, "--resume", "--workers", 1)
    os.utime(moved / "ann" / "train" / "2.png", ns=(1, 1))
    line = fails(monkeypatch, capsys, moved, tmp_path, "--resume")
    assert "--resume: the list of images and label maps of the training set differs now from when" in line
    for folder, suffix in (("img", "jpg"), ("ann", "png")):
        (moved / folder / "train" / f"4.{suffix}").unlink()
    line = fails(monkeypatch, capsys, moved, tmp_path, "--resume")
    assert "the number of images of the training set was 5 when" in line and "and is 4 now" in line


@pytest.mark.parametrize("damage", [lambda pixels: pixels[:-4000], lambda pixels: pixels[:-4000] + bytes(4000)])
def test_a_store_of_images_that_was_cut_or_zeroed_is_written_anew(finished, monkeypatch, capsys, lip, tmp_path, damage):
    run(monkeypatch, lip, tmp_path, "--cache", "disk")
    [store] = tmp_path.glob("pixels-*.int32")
    pixels = store.read_bytes()
    store.write_bytes(damage(pixels))
    capsys.readouterr()
    run(monkeypatch, lip, tmp_path, "--cache", "disk")
    assert f"{store} is damaged or half-written: refused, it is written anew" in capsys.readouterr().out
    assert store.read_bytes() == pixels
    for name, value in saved_head(finished[0]).items():
        assert torch.equal(saved_head(tmp_path)[name], value)


def test_disk_full_leaves_the_checkpoint_before(monkeypatch, capsys, finished, lip, tmp_path):
    shutil.copy(finished[0] / "mae_lip_segment.pt", tmp_path)
    good = (tmp_path / "mae_lip_segment.pt").read_bytes()

    def full(content, path):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    line = fails(monkeypatch, capsys, lip, tmp_path)
    assert "No space left" in line
    assert (tmp_path / "mae_lip_segment.pt").read_bytes() == good
    assert not list(tmp_path.glob(".*"))
    assert not (tmp_path / "results.jsonl").exists()


# Tables and figure

def fake_result(model, dataset, iou, **more):
    return {"task": "segment", "model": model, "weights": "x.pth", "dataset": dataset, "iterations": 160_000,
            "mIoU": iou, "mAcc": iou + 1, "aAcc": iou + 2, "args": {"changed": []}} | more


def test_tables_and_figure(tmp_path):
    results = [fake_result("ibot", "ade20k-part", 30.0), fake_result("ibot", "ade20k-part", 33.2),
               fake_result("ibot", "ade20k-part", 1.0, weights="random"), fake_result("cae", "lip", 43.7),
               fake_result("mae", "ade20k", 27.0, args={"changed": ["iterations"], "iterations": 300}),
               fake_result("dino", "synthetic", 50.0)]
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(result) + "\n" for result in results))
    text = paper_tables(["segment"], tmp_path, "md")
    for title in ("Table 2", "Table 4", "Table 5", "Table 6", "synthetic-part (not in the paper)"):
        assert title in text
    assert "| ibot | 32.2 | 33.2 | +1.0 | 40.0 | 34.2 | -5.8 | 73.4 | 35.2 | -38.2 |" in text
    assert "| ibot (random weights) | 32.2 | 1.0 | -31.2 |" in text
    assert "| mae (iterations 300) | 27.1 | 27.0 | -0.1 |" in text
    assert "| mae | 27.1 | - | - |" in text
    assert "| deit | 92.2 | - | - | 95.3 | - | - | 96.8 | - | - |" in text
    assert "| dino | 50.0 | 51.0 | 52.0 |" in text
    draw_figure6(tmp_path / "figure.png", figure6_panels(tmp_path))
    with Image.open(tmp_path / "figure.png") as figure:
        assert figure.width > 800
        colours = {colour for _, colour in figure.convert("RGB").getcolors(1 << 20)}
    assert {(0x9e, 0xca, 0xe1), (0xd9, 0x48, 0x01)} <= colours
    with pytest.raises(UserError, match="cannot be written"):
        draw_figure6(tmp_path / "no" / "figure.png", figure6_panels(tmp_path))


def test_where_images_are_kept(monkeypatch):
    gib, gpu, cpu = 1 << 30, torch.device("cuda", 0), torch.device("cpu")
    monkeypatch.setattr(storage, "free_memory", lambda device: (40 if device.type == "cuda" else 100) * gib)

    def first_tier(need, device):
        tiers = ("gpu", "cpu") if device.type == "cuda" else ("cpu",)
        return next((tier for tier in tiers if storage.has_room(
            need, gpu if tier == "gpu" else cpu, segmentation_store.RESERVED_BYTES[tier])[0]), "disk")
    assert first_tier(20 * gib, gpu) == "gpu"
    assert first_tier(30 * gib, gpu) == "cpu"
    assert first_tier(20 * gib, cpu) == "cpu"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert first_tier(30 * gib, gpu) == "disk"
