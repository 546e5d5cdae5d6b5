"""segment.py: metrics, sliding windows, schedule and training against the reference pipeline and plain code; whole runs
in one process, on several, killed and resumed, and with what users get wrong."""

import json
import os
import shutil
import signal
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import PROCESSES, call_main
from PIL import Image
from sklearn.metrics import confusion_matrix as sklearn_confusion_matrix

import segment
from datasets import segmentation
from datasets.label_maps import reduce_label
from datasets.segmentation_store import batch_indices
from models import build_model, segmentation_probe
from models.segmentation_head import LinearHead
from models.segmentation_probe import LinearProbe, Segmenter, linear_learning_rate

GOLDEN = Path(__file__).parent / "golden"
NUM_CLASSES = 19  # LIP's
TRAIN_SIZES = [(40, 56), (64, 48), (33, 90), (50, 50), (20, 24)]
TEST_SIZES = [(45, 60), (64, 31), (12, 200), (52, 52), (40, 41), (48, 70), (61, 50)]


def golden(name):
    return torch.load(GOLDEN / "segmentation" / f"{name}.pt", weights_only=True)


def small_encoder():
    return build_model("dino", str(GOLDEN / "dino" / "checkpoint.pth"), num_heads=3, projector=False)


# Against the reference pipeline

@pytest.mark.parametrize("case", [case for case in golden("metrics")["cases"] if not case["name"].startswith("quirk")],
                         ids=lambda case: case["name"])
def test_metrics(case):
    classes = case["num_classes"]
    confusion = torch.zeros(classes, classes, dtype=torch.int64)
    for pred, label in zip(case["pred"], case["label"], strict=True):
        if case["reduce_zero_label"]:
            label = torch.from_numpy(reduce_label(label.numpy()))
        confusion += segment.confusion_matrix(pred, label, classes)
    metrics = segment.segmentation_metrics(confusion)
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
        assert len(sizes) == case["windows"] and sizes == case["window_sizes"]
        assert torch.allclose(logits[0], case["logits"], atol=1e-5)
        for together in (1, 32):
            pred = segment.upsampled_argmax(logits[0], tuple(case["out_size"]), together)
            assert (pred != case["pred"]).sum() <= case["near_ties"]


def test_windows_of_several_images_of_one_size():
    data, images = golden("slide"), torch.randn(3, 3, 50, 70, generator=torch.Generator().manual_seed(0))
    together, *alone = (segment.slide_inference(toy_model(data, "conv3"), some, 40, 20, 4)
                        for some in (images, *images.split(1)))
    assert torch.allclose(together, torch.cat(alone), atol=1e-5)


def test_learning_rate():
    for setting in golden("lr")["settings"]:
        ours = [linear_learning_rate(iteration, setting["total"], setting["warmup"], setting["lr"],
                                     setting["warmup_ratio"]) for iteration in setting["iterations"]]
        assert ours == pytest.approx(setting["values"].tolist(), rel=1e-12)


def test_every_image_once_an_epoch():
    """Batches that do not divide the data set run on into the next epoch, which has another order."""
    places = [index for iteration in range(21) for index in batch_indices(3, iteration, 4, 12)]
    epochs = [places[i:i + 12] for i in range(0, 84, 12)]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 7
    assert batch_indices(3, 8, 4, 12) == places[32:36]


# Training

@pytest.mark.parametrize("decay_bias", [False, True])
def test_heads_are_trained_as_by_a_plain_loop(decay_bias):
    """Each of several at once: convolution, upsampling, cross-entropy over all pixels, AdamW, the schedule."""
    encoder, rates, layers, classes = small_encoder(), (0.05, 0.01), (1, 3), 5
    generator = torch.Generator().manual_seed(1)
    probe = LinearProbe(Segmenter(encoder, LinearHead(2 * 48, classes), layers, "fp32"), rates, [0.3], decay_bias, 0)
    plain = [torch.nn.Conv2d(2 * 48, classes, 1) for _ in rates]
    optimizers = []
    for head, ours in zip(plain, probe.heads, strict=True):
        head.load_state_dict(ours.state_dict())
        optimizers.append(torch.optim.AdamW([{"params": [head.weight], "weight_decay": 0.3},
                                             {"params": [head.bias], "weight_decay": 0.3 * decay_bias}]))
    for iteration in range(6):
        images = torch.randn(3, 3, 48, 64, generator=generator)
        labels = torch.randint(0, classes, (3, 48, 64), generator=generator)
        labels[:, :20] = 255
        losses = probe.step(images, labels.to(torch.uint8), 3, partial(linear_learning_rate, iteration, 6, 2))
        tokens = torch.cat(encoder.get_intermediate_layers(images, layers), dim=1)
        for lr, head, optimizer, found in zip(rates, plain, optimizers, losses, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = linear_learning_rate(iteration, 6, 2, lr)
            logits = F.interpolate(head(tokens), size=(48, 64), mode="bilinear", align_corners=False)
            loss = F.cross_entropy(logits, labels, ignore_index=255, reduction="none").mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            assert found == pytest.approx(loss.item(), rel=1e-4)
    for ours, head in zip(probe.heads, plain, strict=True):
        for name, value in head.state_dict().items():
            torch.testing.assert_close(ours.state_dict()[name], value, rtol=1e-3, atol=1e-4)
    assert all(parameter.grad is None for parameter in encoder.parameters())


def test_batch_norm_is_pytorchs_over_the_features():
    segmenter = Segmenter(small_encoder(), LinearHead(2 * 48, 5), (0, 3), "fp32", norm=True, batch_norm=True).train()
    reference = torch.nn.BatchNorm2d(2 * 48, affine=False).train()
    for seed in range(3):
        images = torch.randn(2, 3, 48, 64, generator=torch.Generator().manual_seed(seed))
        plain = torch.cat(segmenter.encoder.get_intermediate_layers(images, n=(0, 3), norm=True), dim=1)
        [features] = segmenter.features(images)
        torch.testing.assert_close(features, reference(plain), rtol=1e-4, atol=1e-5)
    [features] = segmenter.eval().features(images)
    torch.testing.assert_close(features, reference.eval()(plain), rtol=1e-4, atol=1e-5)


# Whole runs on a small encoder and a made-up LIP

def draw_lip(root, largest=NUM_CLASSES, folders=("img", "ann")):
    """Blobs of colour and their labels, in the authors' folders."""
    generator = np.random.default_rng(0)
    palette = generator.integers(0, 256, (NUM_CLASSES + 1, 3), dtype=np.uint8)
    for split, sizes in (("train", TRAIN_SIZES), ("val", TEST_SIZES)):
        for folder in folders:
            (root / folder / split).mkdir(parents=True)
        for i, (height, width) in enumerate(sizes):
            small = generator.integers(0, largest + 1, (2, 3), dtype=np.uint8)
            label = Image.fromarray(small).resize((width, height), Image.Resampling.NEAREST)
            noise = generator.integers(-20, 20, (height, width, 3))
            image = np.clip(palette[np.asarray(label)] + noise, 0, 255).astype(np.uint8)
            Image.fromarray(image).save(root / folders[0] / split / f"{i}.jpg", quality=95)
            label.save(root / folders[1] / split / f"{i}.png")
    return root


def pixels_by_class(root):
    """Of each class in the files of the test images."""
    labels = [np.asarray(Image.open(path)).ravel() for path in sorted((root / "ann" / "val").iterdir())]
    return np.bincount(np.concatenate(labels), minlength=NUM_CLASSES + 1)[1:]


@pytest.fixture(scope="module")
def lip(tmp_path_factory):
    return draw_lip(tmp_path_factory.mktemp("lip"))


def arguments(data, output, *more):
    return ["--model", "dino", "--weights", GOLDEN / "dino" / "checkpoint.pth", "--num-heads", 3, "--dataset", "lip",
            "--data-path", data, "--device", "cpu", "--output-dir", output, "--layers", 0, 3, "--batch-size", 3,
            "--workers", 0, "--base-scale", 128, 48, "--crop-size", 48, "--test-scale", 128, 48, "--stride", 32,
            "--iterations", 8, "--lr", 0.05, "--warmup-iterations", 2, "--checkpoint-every", 2, *more]


def run(data, output, *more):
    """What is printed, and the last line of results.jsonl."""
    status, out, err = call_main(segment.main, arguments(data, output, *more))
    assert status == 0, out + err
    return out, json.loads((output / "results.jsonl").read_text().splitlines()[-1])


def fails(data, output, *more):
    """The one line that a user's mistake ends with."""
    status, _, err = call_main(segment.main, arguments(data, output, *more))
    line = err.strip().splitlines()[-1]
    assert status == 2 and line.startswith("error: "), err
    return line


def checkpoint(output):
    return torch.load(output / "dino_lip_segment.pt", weights_only=True)


@pytest.fixture(scope="module")
def finished(lip, tmp_path_factory):
    """An uninterrupted run: its folder and its results line."""
    output = tmp_path_factory.mktemp("finished")
    return output, run(lip, output, "--save-pictures", 2)[1]


def test_results_line_and_pictures(finished):
    output, result = finished
    assert result["task"] == "segment" and result["probe"] == "linear" and result["num_test_in_training"] == 0
    assert result["num_images"] == len(TEST_SIZES) and result["iterations"] == 8 and result["lr"] == 0.05
    assert len(result["iou_per_class"]) == NUM_CLASSES and 0 <= result["mIoU"] <= 100
    for i in range(2):
        assert Image.open(output / "dino_lip_pictures" / f"{i}.png").height > 24
        with Image.open(output / "dino_lip_pictures" / f"{i}_labels.png") as labels:
            assert labels.mode == "P" and labels.size == TEST_SIZES[i][::-1]
            assert np.min(labels) >= 1 and np.max(labels) <= NUM_CLASSES
    assert not list(output.glob(".*"))


def test_training_learns_the_colours(tmp_path):
    """Twice as good as always answering with the class that is best to answer with."""
    data = draw_lip(tmp_path / "data", largest=5)
    _, result = run(data, tmp_path, "--iterations", 100)
    counts = pixels_by_class(data)
    share, classes = 100 * counts.max() / counts.sum(), (counts > 0).sum()
    assert result["mIoU"] > 2 * share / classes and result["aAcc"] > 2 * share
    assert result["chance"] == pytest.approx({"mIoU": share / classes, "mAcc": 100 / classes, "aAcc": share})


def test_each_test_pixel_is_counted_once(monkeypatch, lip):
    """The confusion matrix holds as many pixels as the label files have labelled ones, at full resolution."""
    seen, metrics = [], segment.segmentation_metrics
    monkeypatch.setattr(segment, "segmentation_metrics", lambda given: seen.append(given) or metrics(given))
    segmenter = Segmenter(small_encoder(), LinearHead(2 * 48, NUM_CLASSES), (0, 3), "fp32")
    segment.evaluate(segmenter, segmentation.open_segmentation("lip", lip, "val"), (128, 48), 48, 32, workers=2)
    assert all(confusion.sum(1).tolist() == pixels_by_class(lip).tolist() for confusion in seen)


def killed_in_iteration_three(words):
    calls, loss = [], segmentation_probe.upsampled_cross_entropy

    def dies(*args, **kwargs):
        calls.append(1)
        if len(calls) == 6:  # of two heads
            os.kill(os.getpid(), signal.SIGKILL)
        return loss(*args, **kwargs)

    torch.set_num_threads(1)
    segmentation_probe.upsampled_cross_entropy = dies
    sys.argv = ["segment.py", *map(str, words)]
    segment.main()


def test_a_killed_run_resumes_to_the_same_bits(lip, tmp_path):
    """The last checkpoint before the kill is that of iteration 2. --resume without one starts from the beginning."""
    whole, stopped, words = tmp_path / "whole", tmp_path / "stopped", ("--batch-norm", "--lr", 0.05, 0.01)
    _, expected = run(lip, whole, *words)
    process = PROCESSES.Process(target=killed_in_iteration_three, args=(arguments(lip, stopped, "--resume", *words),))
    process.start()
    process.join(240)
    assert process.exitcode == -signal.SIGKILL
    assert checkpoint(stopped)["iteration"] == 2 and not (stopped / "results.jsonl").exists()
    out, result = run(lip, stopped, "--resume", *words)
    assert "resumed after iteration 2" in out and result["iou_per_class"] == expected["iou_per_class"]
    for part in ("heads", "batch_norm"):
        assert all(map(torch.equal, checkpoint(stopped)[part].values(), checkpoint(whole)[part].values()))
    assert "finished already" in run(lip, stopped, "--resume", *words)[0]


@pytest.mark.parametrize("processes", [2, 3])
def test_the_number_of_processes_changes_nothing(launch, finished, lip, tmp_path, processes):
    """Batch 3 and 7 test images over 2 and 3 processes: uneven shares of both. Pixels lie in files."""
    launch(segment.main, arguments(lip, tmp_path, "--save-pictures", 7, "--cache", "disk"), processes)
    [line] = (tmp_path / "results.jsonl").read_text().splitlines()
    result, (output, expected) = json.loads(line), finished
    assert result["world_size"] == processes and result["num_images"] == len(TEST_SIZES)
    for name, value in checkpoint(output)["head"].items():
        assert torch.allclose(checkpoint(tmp_path)["head"][name], value, atol=1e-5)
    assert result["mIoU"] == pytest.approx(expected["mIoU"], abs=0.1)
    assert result["aAcc"] == pytest.approx(expected["aAcc"], abs=0.1)
    assert {path.name for path in (tmp_path / "dino_lip_pictures").iterdir()} == {
        f"{i}{ending}.png" for i in range(len(TEST_SIZES)) for ending in ("", "_labels")}


def test_heads_trained_together_are_those_trained_alone(finished, lip, tmp_path):
    out, result = run(lip, tmp_path, "--lr", 0.1, 0.05, "--weight-decay", 0.05, 0.2)
    content, alone = checkpoint(tmp_path), checkpoint(finished[0])["head"]
    assert [(head["lr"], head["weight_decay"]) for head in result["heads"]] == [
        (0.1, 0.05), (0.1, 0.2), (0.05, 0.05), (0.05, 0.2)]
    assert torch.equal(content["heads"]["2.weight"], alone["weight"])
    assert not torch.equal(content["heads"]["3.weight"], alone["weight"])
    scores = [head["mIoU"] for head in result["heads"]]
    assert result["mIoU"] == pytest.approx(max(scores)) and scores[2] == pytest.approx(finished[1]["mIoU"])
    best = scores.index(max(scores))
    assert {name: result[name] for name in ("lr", "weight_decay")}.items() <= result["heads"][best].items()
    assert torch.equal(content["head"]["weight"], content["heads"][f"{best}.weight"])
    assert "(lr 0.1, weight decay 0.2)" in out and "chosen on the test images" in out


def test_held_out_images_of_a_sample_choose_and_are_not_trained_on(lip, tmp_path):
    out, result = run(lip, tmp_path, "--lr", 0.1, 0.001, "--select", "held-out", "--num-images", 3)
    assert "2 training and 3 test images" in out and "chosen on the held-out images" in out
    assert result["num_images"] == 3 and len(result["heads"]) == 2 and "num_images" in result["args"]["changed"]


@pytest.mark.parametrize("words", [(), ("--layers", "last4", "--norm", "--batch-norm")])
def test_a_head_is_evaluated(lip, tmp_path, words):
    _, result = run(lip, tmp_path, *words)
    _, tested = run(lip, tmp_path / "again", "--evaluate", tmp_path / "dino_lip_segment.pt")
    for name in ("iou_per_class", "iterations", "layers", "norm", "batch_norm"):
        assert tested[name] == result[name]
    assert tested["num_test_in_training"] is None, "the training images are not known"


def test_both_probes_in_one_run(finished, lip, tmp_path):
    run(lip, tmp_path, "--probe", "knn", "linear", "--memory-size", 60, "--save-pictures", 1)
    knn, linear = map(json.loads, (tmp_path / "results.jsonl").read_text().splitlines())
    assert (knn["probe"], linear["probe"]) == ("knn", "linear")
    assert linear["iou_per_class"] == finished[1]["iou_per_class"]
    assert 0 < knn["memory"] <= 60 and knn["num_images"] == len(TEST_SIZES)
    assert (tmp_path / "dino_lip_knn_pictures" / "0.png").exists() and (tmp_path / "dino_lip_pictures").exists()


def test_label_maps_of_ones_own(tmp_path):
    """Labels are checked first, the number of images gives the iterations, copies of training images are counted."""
    data = draw_lip(tmp_path / "data", 5, ("images", "labels"))
    for folder, suffix in (("images", "jpg"), ("labels", "png")):
        shutil.copy(data / folder / "train" / f"2.{suffix}", data / folder / "val" / f"copy.{suffix}")
    words = arguments(data, tmp_path / "out", "--dataset", "folder", "--probe", "knn", "--memory-size", 60)
    at = words.index("--iterations")
    words[at:at + 2] = []
    (data / "names.txt").write_text("\n".join("abcdef"))
    assert "label 6, f, never" in call_main(segment.main, words)[2]
    (data / "names.txt").write_text("\n".join(["0 background", *"abcde"]))
    _, out, _ = call_main(segment.main, words)
    assert "2000 iterations, for 5 training images" in out and "1 of 8 test images are training images too" in out
    result = json.loads((tmp_path / "out" / "results.jsonl").read_text())
    assert result["num_test_in_training"] == 1 and set(result["iou_per_class"]) == {"background", *"abcde"}
    assert result["args"]["iterations"] == 2000 and "iterations" in result["args"]["changed"], "tables mark it"


# What users get wrong

@pytest.mark.parametrize(("more", "words"), [
    (("--layers", "9"), "blocks 0 to 3"),
    (("--crop-size", "50"), "patch size 16"),
    (("--stride", "49"), "--stride 49 is above --crop-size 48"),
    (("--data-path", "nowhere"), "nowhere does not hold"),
    (("--evaluate", __file__), "is not a checkpoint of segment.py"),
    (("--lr", "1e30"), "the loss is"),
    (("--probe", "knn", "--memory-size", "4"), "--memory-size 4: use one patch for each of 10"),
    (("--probe", "knn", "--batch-norm"), "--batch-norm has no effect with --probe knn"),
])
def test_mistakes_are_one_line(lip, tmp_path, more, words):
    assert words in fails(lip, tmp_path / "out", *more)
    assert not (tmp_path / "out" / "results.jsonl").exists()


def test_an_image_that_is_cut_short_is_named(lip, tmp_path):
    data = shutil.copytree(lip, tmp_path / "data")
    path = data / "img" / "train" / "3.jpg"
    path.write_bytes(path.read_bytes()[:-300])
    assert str(path) in fails(data, tmp_path / "out")


def test_a_head_of_another_encoder_or_of_other_classes(finished, lip, tmp_path):
    """Also of another number of attention heads, which no weight shows; nor is a run of another encoder resumed."""
    head = shutil.copy(finished[0] / "dino_lip_segment.pt", tmp_path)
    mae = ("--model", "mae", "--weights", GOLDEN / "mae" / "checkpoint.pth", "--name", "dino")
    for option in (("--evaluate", head), ("--resume",)):
        for other in (("--num-heads", 4), mae):
            line = fails(lip, tmp_path, *option, *other)
            assert option[0] in line and "the encoder" in line
    assert "the list of classes" in fails(lip, tmp_path, "--evaluate", head, "--dataset", "pascal-object")


def test_resuming_with_other_settings_or_data(finished, lip, tmp_path):
    shutil.copy(finished[0] / "dino_lip_segment.pt", tmp_path)
    assert "lr was [0.05] when" in fails(lip, tmp_path, "--resume", "--lr", "0.1")
    fewer = shutil.copytree(lip, tmp_path / "fewer")
    run(fewer, tmp_path, "--resume", "--workers", 1)  # the same data elsewhere
    for folder, suffix in (("img", "jpg"), ("ann", "png")):
        (fewer / folder / "train" / f"4.{suffix}").unlink()
    line = fails(fewer, tmp_path, "--resume")
    assert "the number of images of the training set was 5 when" in line and "and is 4 now" in line


@pytest.mark.parametrize(("given", "patch", "windows"), [
    ((None, None), 16, (512, 341)), ((None, None), 14, (518, 336)), ((448, 100), 14, (448, 100))])
def test_windows_that_the_patch_divides(given, patch, windows):
    assert segmentation.fit_windows(*given, segmentation.PROTOCOLS["ade20k"], patch) == windows
