"""classify.py from the command line's side, on a small CUB that is drawn here, with a small real encoder file."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

import classify
import models
import models.features as feature_cache
from datasets import synthetic
from datasets.classification import hold_out, open_classification
from datasets.patches import RandomViews, random_crop_flip
from models import build_model
from models.features import encode_features, encode_tokens
from models.probe_training import Probe, Recipe
from models.probes import load_head
from utils import UserError, storage
from utils.ending import Checkpoint
from utils.provenance import digest
from utils.run import autocast

ROOT = Path(__file__).parents[1]
WEIGHTS = ROOT / "tests" / "golden" / "ibot" / "checkpoint.pth"
COLOURS = {9: (190, 60, 60), 11: (60, 190, 60), 12: (60, 60, 190), 14: (190, 190, 190)}
PLACES = {9: (60, 60), 11: (140, 60), 12: (60, 140), 14: (140, 140)}


@pytest.fixture(scope="session")
def cub(tmp_path_factory):
    """24 birds of nothing but parts, a shape and colour each, on noise: 4 patches an image, 16 images for training."""
    root = tmp_path_factory.mktemp("birds") / "CUB_200_2011"
    (root / "parts").mkdir(parents=True)
    (root / "images" / "001.Bird").mkdir(parents=True)
    chance = np.random.default_rng(0)
    rows = []
    for image in range(1, 25):
        picture = Image.fromarray(chance.integers(0, 255, (200, 200, 3), dtype=np.uint8))
        draw = ImageDraw.Draw(picture)
        for part, (x, y) in PLACES.items():
            x, y = x + int(chance.integers(-4, 5)), y + int(chance.integers(-4, 5))
            colour = tuple(int(value) for value in np.array(COLOURS[part]) + chance.integers(-40, 41, 3))
            shape = draw.ellipse if part in (9, 14) else draw.rectangle
            shape((x - 18, y - 18, x + 18, y + 18), fill=colour)
            rows.append(f"{image} {part} {x}.0 {y}.0 1")
        picture.save(root / "images" / "001.Bird" / f"{image}.jpg", quality=90)
    (root / "images.txt").write_text("".join(f"{i} 001.Bird/{i}.jpg\n" for i in range(1, 25)))
    (root / "train_test_split.txt").write_text("".join(f"{i} {int(i <= 16)}\n" for i in range(1, 25)))
    (root / "parts" / "parts.txt").write_text("9 left wing\n11 right eye\n12 right leg\n14 tail\n")
    (root / "parts" / "part_locs.txt").write_text("\n".join(rows) + "\n")
    return root


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """24 + 9 images of three classes in class folders."""
    root = tmp_path_factory.mktemp("folder")
    chance = np.random.default_rng(1)
    for split, count in (("train", 8), ("val", 3)):
        for label, name in enumerate(("cats", "dogs", "emus")):
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = chance.integers(0, 200, (40, 50, 3), dtype=np.uint8)
                pixels[..., label] += 55
                Image.fromarray(pixels).save(root / split / name / f"{index}.png")
    return root


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def common(dataset, root, output, weights=WEIGHTS):
    return ["--model", "ibot", "--weights", str(weights), "--num-heads", "3", "--dataset", dataset, "--data-path",
            str(root), "--output-dir", str(output), "--workers", "0", "--device", "cpu"]


def run(monkeypatch, *words):
    """Runs main in this process; returns the results it appended, by probe."""
    monkeypatch.setattr(sys, "argv", ["classify.py", *map(str, words)])
    output = Path(words[words.index("--output-dir") + 1])
    before = len(results(output))
    classify.main()
    return {result["probe"]: result for result in results(output)[before:]}


def results(output):
    path = output / "results.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def count_encoded(monkeypatch):
    """Counts the images that are encoded from now on."""
    seen = []

    def counting(encoder, images, precision):
        seen.append(len(images))
        return encode_tokens(encoder, images, precision)

    monkeypatch.setattr(feature_cache, "encode_tokens", counting)
    monkeypatch.setattr(classify, "encode_tokens", counting)
    return seen


def test_one_run_all_probes_and_the_saved_heads(monkeypatch, cub, tmp_path, capsys):
    encoded, encoders = count_encoded(monkeypatch), []

    def build(*arguments, **options):
        encoder = build_model(*arguments, **options)
        encoders.append((encoder, {name: tensor.clone() for name, tensor in encoder.state_dict().items()}))
        return encoder

    monkeypatch.setattr(models, "build_model", build)
    found = run(monkeypatch, *common("cub", cub, tmp_path), "--probe", "linear", "attentive", "knn", "--batch-size", 32,
                "--epochs", 12, "--lr", 0.1, 0.02, "--seeds", 2, "--save-plots")
    assert set(found) == {"linear", "attentive", "knn"}
    # 12 epochs, 3 probes, 4 heads each: every patch once, 64 for training and 32 for test.
    assert sum(encoded) == 96
    [(encoder, before)] = encoders
    after = encoder.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)

    for kind in ("linear", "attentive"):
        result = found[kind]
        assert (result["task"], result["dataset"]) == ("classify", "cub")
        assert (result["num_train"], result["num_test"]) == (64, 32)
        assert len(result["sha256"]) == 64 and result["args"]["epochs"] == 12 and result["world_size"] == 1
        matrix = np.array(result["confusion"])
        assert matrix.sum() == 32 and len(result["heads"]) == 4
        chosen = [head for head in result["heads"] if head["lr"] == result["lr"]]
        assert result["best_acc1"] == pytest.approx(np.mean([head["best_acc1"] for head in chosen]))
        assert result["best_acc1_std"] == pytest.approx(np.std([head["best_acc1"] for head in chosen], ddof=1))
        # The saved head is the best of those, and gives its accuracy again.
        best = max(head["best_acc1"] for head in chosen)
        assert 100 * np.trace(matrix) / 32 == pytest.approx(best)
        assert best > 60, "chance is 25"
        path = tmp_path / f"ibot_cub_{kind}_head.pth"
        again = run(monkeypatch, *common("cub", cub, tmp_path), "--evaluate", path)[kind]
        assert again["acc1"] == pytest.approx(best) and again["confusion"] == result["confusion"]
        largest = 100 * np.max(np.sum(result["confusion"], axis=1)) / np.sum(result["confusion"])
        assert again["chance"] == pytest.approx(largest) == result["chance"]
        assert again["best_acc1"] == again["acc1"] and again["best_epoch"] == result["best_epoch"]
        assert (again["num_train"], again["num_test"]) == (64, 32)
        assert Image.open(tmp_path / f"ibot_cub_{kind}_accuracy.png").size == (960, 560)
        assert Image.open(tmp_path / f"ibot_cub_{kind}_confusion.png").width > 200
        assert load_head(path).info["classes"] == ["right eye", "right leg", "left wing", "tail"]
    assert set(found["knn"]["acc1_by_k"]) == {"10", "20", "100", "200"}
    assert found["knn"]["best_acc1"] == max(found["knn"]["acc1_by_k"].values())
    printed = capsys.readouterr().out
    assert "chosen on the test set" in printed and "tokens of 64 patches, 197 x 48 fp32 each: 0.00 GB" in printed
    assert not list(tmp_path.glob("*checkpoint*"))


def test_heads_of_a_grid_are_those_of_single_runs(monkeypatch, cub, tmp_path):
    words = ["--probe", "linear", "attentive", "--batch-size", 24, "--epochs", 4]
    grid = run(monkeypatch, *common("cub", cub, tmp_path / "grid"), *words, "--lr", 0.3, 0.05, "--seeds", 2)
    single = run(monkeypatch, *common("cub", cub, tmp_path / "single"), *words, "--lr", 0.05)
    for kind in ("linear", "attentive"):
        [head] = [head for head in grid[kind]["heads"] if head["lr"] == 0.05 and head["seed"] == 0]
        assert head["acc1"] == pytest.approx(single[kind]["acc1"])
        assert head["best_acc1"] == pytest.approx(single[kind]["best_acc1"])


def small_encoder():
    return build_model("ibot", str(WEIGHTS), 3, projector=False)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_cached_features_are_bit_equal_to_encoding_again(cub, tmp_path, precision, monkeypatch):
    encoder = small_encoder()
    train, _ = open_classification("cub", cub)
    lines = []

    def features(place, keep):
        return encode_features(encoder, train, "train", True, precision, 0, place, tmp_path / "files", keep,
                               lines.append)

    images = torch.cat([train[index][0] for index in range(len(train))])
    cls, direct = (torch.cat(parts) for parts in zip(
        *(encode_tokens(encoder, part, precision) for part in images.split(16)), strict=True))
    with autocast(images.device, precision):
        tokens = torch.cat([encoder(encoder.preprocess(part)) for part in images.split(16)]).float()
    variance = tokens.double().var(2, unbiased=False, keepdim=True)
    expected = (tokens.double() - tokens.double().mean(2, keepdim=True)) / (variance + 1e-6).sqrt()
    torch.testing.assert_close(direct.double(), expected, **(
        {"rtol": 1e-4, "atol": 1e-5} if precision == "fp32" else {"rtol": 2**-8, "atol": 1e-3}))
    kept = tmp_path / "kept"
    for place, keep in (("cpu", None), ("disk", None), ("cpu", kept), ("disk", kept)):
        one = features(place, keep)
        assert one.tokens.dtype == feature_cache.DTYPES[precision]
        assert torch.equal(one.tokens, direct) and torch.equal(one.cls, cls)
        tokens, rows, labels = next(one.batches([torch.tensor([50, 3, 3 + 40])], True))
        assert torch.equal(tokens[rows], direct[[3, 43, 50]]) and torch.equal(labels, train.labels[[3, 43, 50]])
        tokens, rows, labels = next(one.batches([torch.tensor([8, 7, 6])], True))
        assert rows is None and torch.equal(tokens, direct[6:9]) and torch.equal(labels, train.labels[6:9])
    assert [line for line in lines if "come from the cache" in line] == lines[-1:]
    assert not list((tmp_path / "files").iterdir()), "a mapped file of this process alone is already unlinked"

    def refuse(*_):
        raise AssertionError("encoded again")

    with monkeypatch.context() as patched:
        patched.setattr(feature_cache, "encode_tokens", refuse)
        again = features("auto", kept)
        assert torch.equal(again.tokens, direct)


def test_a_kept_cache_of_other_inputs_or_half_written_is_not_used(cub, tmp_path, monkeypatch):
    encoder, lines = small_encoder(), []
    train, test = open_classification("cub", cub)
    encoded = count_encoded(monkeypatch)

    def features(encoder=encoder, dataset=train, precision="fp32"):
        encoded.clear()
        one = encode_features(encoder, dataset, "train", True, precision, 0, "auto", tmp_path, tmp_path, lines.append)
        return sum(encoded), one

    count, first = features()
    assert count == 64 and features()[0] == 0
    assert features(precision="bf16")[0] == 64
    other = small_encoder()
    other.vit.norm.bias.data[0] += 1e-6
    assert features(encoder=other)[0] == 64
    assert features(dataset=test)[0] == 32
    six_heads = build_model("ibot", str(WEIGHTS), 6, projector=False)
    assert features(encoder=six_heads)[0] == 64, "the same weights with other heads give other features"
    changed, _ = open_classification("cub", cub)
    changed.transform.transforms[0].size = 257
    assert features(dataset=changed)[0] == 64
    assert features()[0] == 0

    name = digest(feature_cache.fingerprint(encoder, train, "fp32", True))[:20]
    path = tmp_path / f"{name}-tokens"
    with open(path / "tokens", "rb+") as file:
        file.truncate(1000)
    lines.clear()
    count, again = features()
    assert count == 64 and torch.equal(again.tokens, first.tokens)
    assert any("half-written: refused" in line for line in lines)
    path.rename(path.with_name(path.name + ".partial"))  # as a killed run leaves it
    lines.clear()
    assert features()[0] == 64 and any("half-written: refused" in line for line in lines)
    assert features()[0] == 0


def test_a_fingerprint_holds_the_code_that_features_depend_on_and_no_other(cub):
    train, _ = open_classification("cub", cub)
    encoder = small_encoder()
    names = {Path(path).name for path in feature_cache.source_files(encoder, encoder.position_embedding, train)}
    assert names == {"encoder.py", "patches.py", "files.py"} and Path(encoder.method).name == "ibot.py"
    for drawn in (synthetic.load_synthetic_patches("test", 1), synthetic.load_synthetic_species("test", 1)):
        names = {Path(path).name for path in feature_cache.source_files(drawn, drawn.load)}
        assert names == {"files.py", "patches.py", "synthetic.py", "synthetic_figures.py"}, "what draws the images"


def test_a_patch_token_that_is_not_finite_is_said_and_nothing_is_kept(cub, tmp_path, monkeypatch):
    encoder, (_, test) = small_encoder(), open_classification("cub", cub)
    forward = encoder.forward

    def one_nan(images):
        tokens = forward(images)
        tokens[3, 5, 7] = float("nan")
        return tokens

    def features(with_tokens):
        return encode_features(encoder, test, "test", with_tokens, "fp32", 0, "auto", tmp_path, tmp_path / "kept",
                               lambda line: None)

    monkeypatch.setattr(encoder, "forward", one_nan)
    with pytest.raises(UserError, match="test: the encoder gave features that are not finite at --precision fp32"):
        features(True)
    assert not list((tmp_path / "kept").glob("*/complete.json"))
    assert features(False).cls.isfinite().all(), "the class tokens are"


def test_class_tokens_do_not_keep_the_others_alive(cub):
    """ImageNet's batches of 16,384 class tokens wait for each other."""
    for precision in ("fp32", "bf16"):
        cls, _ = encode_tokens(small_encoder(), torch.zeros(2, 3, 224, 224, dtype=torch.uint8), precision)
        assert cls.untyped_storage().nbytes() == cls.numel() * cls.itemsize


def test_a_cache_folder_that_is_full_or_not_writable_is_said_and_done_without(cub, tmp_path, monkeypatch):
    encoder, lines = small_encoder(), []
    _, test = open_classification("cub", cub)
    (tmp_path / "file").write_text("")

    def features(place, folder, keep):
        return encode_features(encoder, test, "test", True, "fp32", 0, place, folder, keep, lines.append)

    expected = features("cpu", tmp_path, None).tokens
    assert torch.equal(features("auto", tmp_path, tmp_path / "file" / "kept").tokens, expected)
    assert any("not kept" in line and "Not a directory" in line for line in lines)
    lines.clear()
    assert torch.equal(features("disk", tmp_path / "file", None).tokens, expected)
    assert "in memory" in lines[-2] and "cannot take the file" in lines[-2]

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    lines.clear()
    assert torch.equal(features("disk", tmp_path / "disk", tmp_path / "kept").tokens, expected)
    assert any("not kept" in line and "No space left" in line for line in lines) and "in memory" in lines[-2]
    monkeypatch.setattr(storage, "free_memory", lambda device: 1000)
    with pytest.raises(UserError, match=r"0.00 GB fit nowhere: only 0.00 GB are free in memory, .*No space left"):
        features("auto", tmp_path / "disk", None)


def test_a_cache_that_not_every_process_can_map_leaves_no_files(cub, tmp_path, monkeypatch):
    """As on several machines without a common folder."""
    encoder, lines = small_encoder(), []
    _, test = open_classification("cub", cub)

    def elsewhere(*_, **__):
        raise RuntimeError("unable to open file: No such file or directory")

    monkeypatch.setattr(feature_cache, "map_file", elsewhere)
    found = encode_features(encoder, test, "test", True, "fp32", 0, "cpu", tmp_path, tmp_path / "kept", lines.append)
    assert found.tokens.isfinite().all() and any("is not seen by every process" in line for line in lines)
    assert not list((tmp_path / "kept").iterdir())


class Killed(Exception):
    pass


@pytest.mark.parametrize("dataset", ["cub", "folder"])
def test_a_run_that_was_killed_resumes_to_the_same_result(monkeypatch, cub, folder, tmp_path, dataset):
    root = cub if dataset == "cub" else folder
    words = ["--probe", "linear", "attentive", "--batch-size", 12, "--epochs", 5, "--seeds", 2,
             "--checkpoint-seconds", 0]
    whole = run(monkeypatch, *common(dataset, root, tmp_path / "whole"), *words)
    parts = common(dataset, root, tmp_path / "parts")
    save = Checkpoint.save

    def save_and_die(checkpoint, epoch, content):
        save(checkpoint, epoch, content)
        if epoch == 3:
            raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(Checkpoint, "save", save_and_die)
        with pytest.raises(Killed):
            run(monkeypatch, *parts, *words)
    assert not results(tmp_path / "parts")
    with pytest.raises(UserError, match="--resume: epochs was 5 .* and is 6 now"):
        run(monkeypatch, *parts, *words, "--epochs", 6, "--resume")
    with pytest.raises(UserError, match="--resume: lr was None"):
        run(monkeypatch, *parts, *words, "--lr", 0.1, "--resume")
    resumed = run(monkeypatch, *parts, *words, "--resume")
    for kind in ("linear", "attentive"):
        for key in ("acc1", "best_acc1", "best_epoch", "heads", "confusion"):
            assert resumed[kind][key] == whole[kind][key]
        one, other = (load_head(tmp_path / name / f"ibot_{dataset}_{kind}_head.pth").state_dict()
                      for name in ("whole", "parts"))
        assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(("dataset", "batch"), [("cub", 20), ("folder", 12)])
def test_two_and_three_processes_agree_with_one(launch, monkeypatch, cub, folder, tmp_path, dataset, batch):
    root = cub if dataset == "cub" else folder
    words = ["--batch-size", batch, "--epochs", 6, "--probe", "linear", "attentive", "knn", "--lr", 0.1]
    expected = run(monkeypatch, *common(dataset, root, tmp_path / "1"), *words)
    for processes in (2, 3):
        output = tmp_path / str(processes)
        # Two processes write one kept cache, three read it.
        launch(classify.main, [*common(dataset, root, output), *words, "--cache-dir", tmp_path / "kept"], processes)
        found = {result["probe"]: result for result in results(output)}
        assert found["linear"]["world_size"] == processes
        for kind in ("linear", "attentive", "knn"):
            assert found[kind]["acc1"] == pytest.approx(expected[kind]["acc1"], abs=0.1)
            assert found[kind]["best_acc1"] == pytest.approx(expected[kind]["best_acc1"], abs=0.1)
        for kind in ("linear", "attentive"):
            assert np.array(found[kind]["confusion"]).sum() == expected[kind]["num_test"]
            one, other = (load_head(tmp_path / name / f"ibot_{dataset}_{kind}_head.pth").state_dict()
                          for name in ("1", str(processes)))
            for name in one:
                torch.testing.assert_close(other[name], one[name], rtol=1e-3, atol=1e-4, msg=f"{kind} {name}")


@pytest.mark.parametrize(("num_train", "probe", "batch"), [(2, "attentive", 8), (23, "linear", 20)])
def test_more_processes_than_images(launch, monkeypatch, cub, tmp_path, num_train, probe, batch):
    """Some processes hold nothing of the training set, or of the test set."""
    root = tmp_path / "CUB_200_2011"
    root.mkdir()
    for path in cub.iterdir():
        (root / path.name).symlink_to(path)
    (root / "train_test_split.txt").unlink()
    (root / "train_test_split.txt").write_text("".join(f"{i} {int(i <= num_train)}\n" for i in range(1, 25)))
    words = ["--probe", probe, "--batch-size", batch, "--epochs", 3, "--lr", 0.05]
    expected = run(monkeypatch, *common("cub", root, tmp_path / "1"), *words)[probe]
    launch(classify.main, [*common("cub", root, tmp_path / "3"), *words], 3)
    [found] = results(tmp_path / "3")
    assert (found["num_train"], found["num_test"]) == (4 * num_train, 96 - 4 * num_train)
    assert np.array(found["confusion"]).sum() == found["num_test"]
    assert found["acc1"] == pytest.approx(expected["acc1"], abs=0.1)


def test_held_out_images_choose_and_are_not_trained_on(monkeypatch, cub, folder, tmp_path, capsys):
    train, _ = open_classification("cub", cub)
    held_out = hold_out(train, 0)
    assert 0 < held_out.sum() < 10 and not set(train.image_index[held_out].tolist()) & set(
        train.image_index[~held_out].tolist())
    seen = []
    steps = Probe.steps
    monkeypatch.setattr(Probe, "steps", lambda self, ids: seen.append(ids) or steps(self, ids))
    words = ["--select", "held-out", "--epochs", 3, "--batch-size", 16]
    found = run(monkeypatch, *common("cub", cub, tmp_path), *words, "--probe", "linear", "knn", "--lr", 0.1, 0.5)
    assert all(set(ids.tolist()) == set((~held_out).nonzero().flatten().tolist()) for ids in seen)
    assert found["linear"]["num_train"] == 60 and found["linear"]["num_held_out"] == 4
    assert "chosen on a held-out tenth" in capsys.readouterr().out
    chosen = [head for head in found["linear"]["heads"] if head["lr"] == found["linear"]["lr"]]
    assert chosen[0]["best_score"] == max(head["best_score"] for head in found["linear"]["heads"])
    augmented = run(monkeypatch, *common("folder", folder, tmp_path), *words, "--probe", "attentive", "--lr", 0.1)
    assert augmented["attentive"]["num_held_out"] == 2 and augmented["attentive"]["num_train"] == 22


def test_authors_defects_use_and_move_the_statistics_at_test_time(cub):
    encoder = small_encoder()
    train, _ = open_classification("cub", cub)
    features = encode_features(encoder, train, "train", True, "fp32", 0, "auto", Path(), None, lambda line: None)
    ids = torch.arange(64)
    probe = Probe("attentive", Recipe(0.1, 32), 32, [0.1], [0], 5, 48, 4, 3, torch.device("cpu"))
    classify.train_on_features(probe, features, ids, 0)
    before = probe.heads.norm.running_mean.clone()
    right = classify.confusion_of_heads(probe.heads, features, ids, 4)
    assert torch.equal(probe.heads.norm.running_mean, before)
    wrong = classify.confusion_of_heads(probe.heads, features, ids, 4, authors_defects=True)
    assert not torch.equal(probe.heads.norm.running_mean, before)
    assert right.sum() == wrong.sum() == 64
    # Running statistics that are far off ruin the one and do not matter to the other.
    probe.heads.norm.running_mean[:, ::2] += 100
    assert torch.equal(classify.confusion_of_heads(probe.heads, features, ids, 4, authors_defects=True), wrong)
    assert not torch.equal(classify.confusion_of_heads(probe.heads, features, ids, 4), right)


def test_batches_of_views_are_those_of_one_process(folder, monkeypatch):
    train, _ = open_classification("folder", folder)
    encoder = small_encoder()
    views = RandomViews(train, random_crop_flip(), 0)
    steps = []
    probes = [Probe(kind, Recipe(0.1, size, every_step=True), size, [0.1], [0], 4, 48, 3, 3, torch.device("cpu"))
              for kind, size in (("linear", 16), ("attentive", 8))]
    for probe in probes:
        probe.step = lambda batch, epoch, probe=probe: steps.append(
            (probe.kind, tuple(batch.tokens.shape), batch.labels.tolist(), epoch))
    order = classify.shuffled(torch.arange(24), 0, 1)
    assert sorted(order.tolist()) == list(range(24)) and order.tolist() != list(range(24))
    classify.train_on_views(probes, encoder, views, order, 1, "fp32", 0)
    labels = train.labels[order].tolist()
    assert steps == [("attentive", (8, 197, 48), labels[:8], 1), ("linear", (16, 1, 48), labels[:16], 1),
                     ("attentive", (8, 197, 48), labels[8:16], 1 + 1 / 3),
                     ("attentive", (8, 197, 48), labels[16:], 1 + 2 / 3)] or steps == [
        ("attentive", (8, 197, 48), labels[:8], 1), ("attentive", (8, 197, 48), labels[8:16], 1 + 1 / 3),
        ("linear", (16, 1, 48), labels[:16], 1), ("attentive", (8, 197, 48), labels[16:], 1 + 2 / 3)]


def test_views_depend_on_image_and_epoch_alone(folder):
    train, _ = open_classification("folder", folder)
    one, other = (RandomViews(train, random_crop_flip(), 0) for _ in range(2))
    state = torch.get_rng_state()
    first = one[5][0]
    assert torch.equal(torch.get_rng_state(), state)
    other[3]
    assert torch.equal(first, other[5][0]) and first.shape == (1, 3, 224, 224) and first.dtype == torch.uint8
    other.epoch = 1
    assert not torch.equal(first, other[5][0])
    assert not torch.equal(first, RandomViews(train, random_crop_flip(), 1)[5][0])


def test_images_without_augmentation_are_encoded_once(monkeypatch, folder, tmp_path):
    encoded = count_encoded(monkeypatch)
    run(monkeypatch, *common("folder", folder, tmp_path), "--no-augment", "--epochs", 3, "--batch-size", 12, "--probe",
        "linear", "attentive")
    assert sum(encoded) == 24 + 9
    encoded.clear()
    run(monkeypatch, *common("folder", folder, tmp_path), "--epochs", 3, "--batch-size", 12, "--probe", "linear")
    assert sum(encoded) == 3 * 24 + 9


def test_untrained_encoder_beats_chance_on_synthetic_parts(monkeypatch, tmp_path, capsys):
    """The file is of CAE's form, 48 wide, with random weights. Four classes; the largest has a third of the patches."""
    monkeypatch.setattr(synthetic, "NUM_IMAGES", {"train": 150, "test": 75, "val": 75})
    found = run(monkeypatch, "--model", "cae", "--weights", ROOT / "tests" / "golden" / "cae" / "checkpoint.pth",
                "--num-heads", 3, "--output-dir", tmp_path, "--workers", 0, "--device", "cpu", "--batch-size", 64,
                "--probe", "linear", "attentive", "--epochs", 40, "--lr", 0.03, "--seeds", 2)
    matrix = np.array(found["linear"]["confusion"])
    largest = 100 * matrix.sum(1).max() / matrix.sum()
    with capsys.disabled():
        print(f"\nuntrained encoder on synthetic parts: largest class {largest:.1f}%, " + ", ".join(
            f"{kind} {result['acc1']:.1f}%" for kind, result in found.items()) + " (last epoch, mean of two seeds)")
    for result in found.values():
        assert result["acc1"] > largest + 7
        assert result["dataset"] == "synthetic" and len(result["heads"]) == 2


def test_an_image_that_cannot_be_decoded(monkeypatch, cub, tmp_path, capsys):
    root = tmp_path / "CUB_200_2011"
    (root / "images" / "001.Bird").mkdir(parents=True)
    for path in cub.iterdir():
        if path.name != "images":
            (root / path.name).symlink_to(path)
    for path in (cub / "images" / "001.Bird").iterdir():
        (root / "images" / "001.Bird" / path.name).symlink_to(path)
    bad = root / "images" / "001.Bird" / "3.jpg"
    bad.unlink()
    bad.write_bytes(b"no image")
    words = [*common("cub", root, tmp_path), "--epochs", 1, "--probe", "linear", "attentive", "knn"]
    with pytest.raises(UserError, match=r"3\.jpg cannot be decoded .*--skip-bad-images"):
        run(monkeypatch, *words)
    assert not results(tmp_path)
    found = run(monkeypatch, *words, "--skip-bad-images")
    assert found["attentive"]["num_train"] == found["knn"]["num_train"] == 60
    assert "training set: 4 patches are left out" in capsys.readouterr().out


@pytest.mark.parametrize("processes", [1, 2])
def test_images_left_out_of_augmented_runs_are_counted(launch, folder, tmp_path, processes):
    root = tmp_path / "folder"
    shutil.copytree(folder, root)
    for path in sorted((root / "train").rglob("*.*"))[::5]:
        path.write_text("no image")
    bad, total = len(sorted((root / "train").rglob("*.*"))[::5]), len(sorted((root / "train").rglob("*.*")))
    words = [*common("folder", root, tmp_path), "--epochs", 2, "--probe", "linear", "--skip-bad-images"]
    out, _ = launch(classify.main, words, processes)
    assert out.count(f"training set: {bad} images are left out, they could not be decoded") == 1
    [line] = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert line["num_train"] == total - bad
    for path in (root / "train").rglob("*.*"):
        path.write_text("no image")
    _, err = launch(classify.main, words, processes, 2)
    assert "no training image could be decoded" in err
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 1


def test_images_left_out_are_counted_by_a_run_that_goes_on_after_its_last_epoch(monkeypatch, folder, tmp_path):
    root = shutil.copytree(folder, tmp_path / "folder")
    (root / "train" / "cats" / "3.png").write_text("no image")
    words = [*common("folder", root, tmp_path), "--epochs", 1, "--skip-bad-images", "--resume"]

    def stop(*lines):
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(classify, "append_result", stop)
        with pytest.raises(Killed):
            run(monkeypatch, *words)
    monkeypatch.setattr(Probe, "step", stop)
    assert run(monkeypatch, *words)["linear"]["num_train"] == 23


@pytest.mark.parametrize(("words", "message"), [
    (["--batch-size", "65"], r"--batch-size 65 is larger than the training set \(64 patches\)"),
    (["--cache", "gpu"], "--cache gpu: this run has no GPU"),
    (["--lr", "0.1", "0.1"], "the values must differ"),
    (["--no-augment"], "--no-augment is for whole images"),
    (["--evaluate", "nothing.pth"], "--evaluate nothing.pth does not exist"),
    (["--evaluate", str(WEIGHTS)], "is not a head that classify.py saved"),
])
def test_mistakes_in_arguments(monkeypatch, cub, tmp_path, words, message):
    with pytest.raises(UserError, match=message):
        run(monkeypatch, *common("cub", cub, tmp_path), *words)
    assert not results(tmp_path)


def test_a_mistake_is_one_line_and_status_2(cub, tmp_path):
    done = subprocess.run([sys.executable, "classify.py", "--dataset", "cub", "--output-dir", str(tmp_path)], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "error: --dataset cub needs --data-path DIR; --dataset synthetic needs no files\n"


def test_a_head_of_another_width_or_other_classes_is_refused(monkeypatch, cub, folder, tmp_path):
    run(monkeypatch, *common("folder", folder, tmp_path), "--no-augment", "--epochs", 1, "--batch-size", 12)
    head = tmp_path / "ibot_folder_linear_head.pth"
    with pytest.raises(UserError, match=r"list of classes was \['cats', 'dogs', 'emus'\] when .* and is \['right eye', "
                                        r".*use the encoder and the data set it was trained on, ibot and folder"):
        run(monkeypatch, *common("cub", cub, tmp_path), "--evaluate", head)
    with pytest.raises(UserError, match="the content of the encoder's weights differs now from when .*head.pth was"):
        run(monkeypatch, *common("folder", folder, tmp_path, "random"), "--model", "timm/vit_tiny_patch16_224",
            "--num-heads", 3, "--evaluate", head)


def test_class_folders_that_do_not_fit(monkeypatch, folder, tmp_path):
    root = tmp_path / "data"
    (root / "train").mkdir(parents=True)
    (root / "val").mkdir()
    for name in ("cats", "emus"):
        (root / "train" / name).symlink_to(folder / "train" / name)
    for name in ("emus", "dogs"):
        (root / "val" / name).symlink_to(folder / "val" / name)
    with pytest.raises(UserError, match="class dogs is in the test set and has no training patch"):
        open_classification("folder", root)
    (root / "val" / "dogs").unlink()
    train, test = open_classification("folder", root)
    assert train.classes == test.classes == ["cats", "emus"] and test.labels.tolist() == [1, 1, 1]
    (root / "val" / "emus").unlink()
    with pytest.raises(UserError, match="val"):
        open_classification("folder", root)
    (root / "val").rmdir()
    with pytest.raises(UserError, match="has no folder val or test"):
        open_classification("folder", root)


def test_table_puts_published_and_ours_side_by_side(monkeypatch, tmp_path, capsys):
    line = {"task": "classify", "model": "ibot", "weights": "checkpoint.pth", "dataset": "cub", "probe": "attentive",
            "best_acc1": 96.04, "select": "test", "num_train": 15000,
            "args": {"changed": ["crop_scale", "workers"], "crop_scale": 1.0, "workers": 3}}
    other = line | {"model": "mae", "dataset": "imagenet", "probe": "linear", "best_acc1": 12.0, "weights": "random"}
    (tmp_path / "results.jsonl").write_text(json.dumps(line) + "\n" + json.dumps(other) + "\n")
    monkeypatch.setattr(sys, "argv", ["classify.py", "--table", "--format", "md", "--output-dir", str(tmp_path)])
    classify.main()
    printed = capsys.readouterr().out
    assert "| ibot | 93.8 | - | - | 95.8 | - | - | - |" in printed
    assert "| ibot | 92.1 | - | - | 95.1 | - | - |" in printed
    assert "| ibot (crop scale 1.0, 15000 of 30543 patches) | 93.8 | - | - | 95.8 | 96.0 | +0.2 | 15000 |" in printed
    assert "| mae | 67.8 | - | - | 74.2 | - | - | - |" in printed
    assert "| mae (random weights, crop scale 1.0, 15000 of 1331167 images) | 67.8 | 12.0 | -55.8 | 74.2 |" in printed


def test_real_cub_sample(monkeypatch, tmp_path):
    root = ROOT.parent / "shared" / "real" / "CUB_200_2011"
    if not root.is_dir():
        pytest.skip(f"the real CUB sample is not at {root}")
    words = [*common("cub", root, tmp_path), "--epochs", 2, "--probe", "linear", "knn"]
    found = run(monkeypatch, *words)
    assert found["linear"]["num_train"] == 467 and found["linear"]["num_test"] == 447
    assert found["linear"]["batch_size"] == 467, "the default batch shrinks to the training set"
    assert found["linear"]["lr"] == pytest.approx(0.4 * 467 / 1024)
