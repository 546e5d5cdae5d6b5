"""classify.py from the command line's side, on a small CUB that is drawn here, with a small real encoder file."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

import classify
import models
import models.features
from datasets.classification import hold_out, open_classification
from datasets.patches import RandomViews, random_crop_flip
from models import build_model
from models.features import encode_features, encode_tokens
from models.probe_training import Probe, Recipe, confusion_of_heads
from models.probes import build_heads, load_head
from utils import UserError, drawing
from utils.run import DTYPES, autocast

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

    monkeypatch.setattr(models.features, "encode_tokens", counting)
    monkeypatch.setattr(classify, "encode_tokens", counting)
    return seen


def same_heads(one, other, names, **tolerance):
    """Compares the heads that two runs saved."""
    for name in names:
        states = [load_head(folder / name).state_dict() for folder in (one, other)]
        for key in states[0]:
            torch.testing.assert_close(states[1][key], states[0][key], msg=f"{name} {key}", **tolerance)


def test_one_run_all_probes_and_the_saved_heads(monkeypatch, cub, tmp_path, capsys):
    encoded, encoders = count_encoded(monkeypatch), []

    def build(*arguments, **options):
        encoder = build_model(*arguments, **options)
        encoders.append((encoder, {name: tensor.clone() for name, tensor in encoder.state_dict().items()}))
        return encoder

    def draw_curves(*arguments):
        assert (tmp_path / "results.jsonl").exists(), "results are written before their plots"
        return drawing.draw_curves(*arguments)

    monkeypatch.setattr(models, "build_model", build)
    monkeypatch.setattr(classify, "draw_curves", draw_curves)
    found = run(monkeypatch, *common("cub", cub, tmp_path), "--probe", "linear", "attentive", "knn", "--batch-size", 32,
                "--epochs", 12, "--lr", 0.1, 0.02, "--seeds", 2, "--save-plots")
    assert set(found) == {"linear", "attentive", "knn"}
    # 12 epochs, 4 heads each: 64 patches for training and 32 for test once; neighbours see the former under the test
    # transform.
    assert sum(encoded) == 64 + 32 + 64
    [(encoder, before)] = encoders
    after = encoder.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)

    for kind in ("linear", "attentive"):
        result = found[kind]
        assert (result["task"], result["dataset"], result["recipe"]) == ("classify", "cub", "published")
        assert (result["num_train"], result["num_test"]) == (64, 32)
        assert len(result["sha256"]) == 64 and result["epochs"] == 12 and result["world_size"] == 1
        matrix = np.array(result["confusion"])
        assert matrix.sum() == 32 and len(result["heads"]) == 4
        chosen = [head for head in result["heads"] if head["lr"] == result["lr"]]
        assert result["best_acc1"] == pytest.approx(np.mean([head["best_acc1"] for head in chosen]))
        assert result["best_acc1_std"] == pytest.approx(np.std([head["best_acc1"] for head in chosen], ddof=1))
        # The saved head is the best of those, and gives its accuracy again.
        best = max(head["best_acc1"] for head in chosen)
        assert 100 * np.trace(matrix) / 32 == pytest.approx(best)
        assert best > 60 and "undertrained" not in result, "chance is 25"
        path = tmp_path / f"ibot_cub_{kind}_head.pth"
        again = run(monkeypatch, *common("cub", cub, tmp_path), "--evaluate", path)[kind]
        assert again["acc1"] == pytest.approx(best) and again["confusion"] == result["confusion"]
        assert again["chance"] == pytest.approx(100 * matrix.sum(1).max() / 32) == result["chance"]
        assert again["best_epoch"] == result["best_epoch"] and again["num_train"] == 64
        assert Image.open(tmp_path / f"ibot_cub_{kind}_accuracy.png").width == 960
        assert load_head(path)(torch.zeros(2, 5, 48)).shape == (1, 2, 4)
    assert set(found["knn"]["acc1_by_k"]) == {"10", "20", "100", "200"}
    assert found["knn"]["best_acc1"] == max(found["knn"]["acc1_by_k"].values())
    printed = capsys.readouterr().out
    assert "chosen on the test set" in printed and "training set, 64 patches: 0.00 GB, in memory" in printed
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
def test_features_are_bit_equal_to_encoding_again(cub, tmp_path, precision):
    encoder, (train, _) = small_encoder(), open_classification("cub", cub)
    images = torch.cat([train[index][0] for index in range(len(train))])
    cls, direct = (torch.cat(parts) for parts in zip(
        *(encode_tokens(encoder, part, precision) for part in images.split(16)), strict=True))
    with autocast(images.device, precision):
        tokens = torch.cat([encoder(encoder.preprocess(part)) for part in images.split(16)]).float()
    variance = tokens.double().var(2, unbiased=False, keepdim=True)
    expected = (tokens.double() - tokens.double().mean(2, keepdim=True)) / (variance + 1e-6).sqrt()
    torch.testing.assert_close(direct.double(), expected, **(
        {"rtol": 1e-4, "atol": 1e-5} if precision == "fp32" else {"rtol": 2**-8, "atol": 1e-3}))
    for tier in ("cpu", "disk"):
        one = encode_features(encoder, train, "train", True, precision, 0, tier, tmp_path, lambda line: None)
        assert one.tokens.dtype == DTYPES[precision]
        assert torch.equal(one.tokens, direct) and torch.equal(one.cls, cls)
        tokens, rows, labels = next(one.batches([torch.tensor([50, 3, 3 + 40])], True))
        assert torch.equal(tokens[rows], direct[[3, 43, 50]]) and torch.equal(labels, train.labels[[3, 43, 50]])
        tokens, rows, labels = next(one.batches([torch.tensor([8, 7, 6])], True))
        assert rows is None and torch.equal(tokens, direct[6:9]) and torch.equal(labels, train.labels[6:9])
    assert not list(tmp_path.iterdir()), "the mapped file vanishes with the process"


def test_class_tokens_do_not_keep_the_others_alive():
    """ImageNet's batches of 16,384 class tokens wait for each other."""
    for precision in ("fp32", "bf16"):
        cls, _ = encode_tokens(small_encoder(), torch.zeros(2, 3, 224, 224, dtype=torch.uint8), precision)
        assert cls.untyped_storage().nbytes() == cls.numel() * cls.itemsize


class Killed(Exception):
    pass


@pytest.mark.parametrize(("dataset", "recipe"), [("cub", "published"), ("imagenet", "published"), ("folder", "ours")])
def test_a_run_that_was_killed_resumes_to_the_same_result(monkeypatch, cub, folder, tmp_path, dataset, recipe):
    root = cub if dataset == "cub" else folder
    words = ["--probe", "linear", "attentive", "--batch-size", 12, "--epochs", 5, "--seeds", 2]
    monkeypatch.setattr(classify, "CHECKPOINT_SECONDS", 0)
    whole = run(monkeypatch, *common(dataset, root, tmp_path / "whole"), *words)
    parts = common(dataset, root, tmp_path / "parts")
    save = classify.save

    def save_and_die(path, content):
        save(path, content)
        if content.get("epoch") == 3:
            raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(classify, "save", save_and_die)
        with pytest.raises(Killed):
            run(monkeypatch, *parts, *words)
    assert not results(tmp_path / "parts")
    with pytest.raises(UserError, match="--resume: epochs was 5 .* and is 6 now"):
        run(monkeypatch, *parts, *words, "--epochs", 6, "--resume")
    with pytest.raises(UserError, match="--resume: lr was None"):
        run(monkeypatch, *parts, *words, "--lr", 0.1, "--resume")
    resumed = run(monkeypatch, *parts, *words, "--resume")
    for kind in ("linear", "attentive"):
        assert resumed[kind]["recipe"] == recipe
        for key in ("acc1", "best_acc1", "best_epoch", "train_acc1", "heads", "confusion"):
            assert resumed[kind][key] == whole[kind][key]
    same_heads(tmp_path / "whole", tmp_path / "parts",
               [f"ibot_{dataset}_{kind}_head.pth" for kind in ("linear", "attentive")], rtol=0, atol=0)
    monkeypatch.setattr(Probe, "step", None)
    assert run(monkeypatch, *parts, *words, "--resume") == {}, "finished: no step, no line"


@pytest.mark.parametrize(("dataset", "batch", "rate"), [
    ("cub", 20, 0.1), ("imagenet", 12, 0.1), ("imagenet", 2, 1e-4), ("folder", 12, 0.1)])
def test_two_and_three_processes_agree_with_one(launch, monkeypatch, cub, folder, tmp_path, dataset, batch, rate):
    root = cub if dataset == "cub" else folder
    words = ["--batch-size", batch, "--epochs", 6, "--probe", "linear", "attentive", "knn", "--lr", rate]
    expected = run(monkeypatch, *common(dataset, root, tmp_path / "1"), *words)
    for processes in (2, 3):
        output = tmp_path / str(processes)
        launch(classify.main, [*common(dataset, root, output), *words], processes)
        found = {result["probe"]: result for result in results(output)}
        assert found["linear"]["world_size"] == processes
        for kind in ("linear", "attentive", "knn"):
            assert found[kind]["acc1"] == pytest.approx(expected[kind]["acc1"], abs=0.1)
            assert found[kind]["best_acc1"] == pytest.approx(expected[kind]["best_acc1"], abs=0.1)
        for kind in ("linear", "attentive"):
            assert np.array(found[kind]["confusion"]).sum() == expected[kind]["num_test"]
        same_heads(tmp_path / "1", output, [f"ibot_{dataset}_{kind}_head.pth" for kind in ("linear", "attentive")],
                   rtol=1e-3, atol=1e-4)


def linked(cub, root, *without):
    """The files and folders of cub, but those named, as links in root."""
    root.mkdir()
    for path in cub.iterdir():
        if path.name not in without:
            (root / path.name).symlink_to(path)
    return root


@pytest.mark.parametrize(("num_train", "probe", "batch"), [(2, "attentive", 8), (23, "linear", 20)])
def test_more_processes_than_images(launch, monkeypatch, cub, tmp_path, num_train, probe, batch):
    """Some processes hold nothing of the training set, or of the test set."""
    root = linked(cub, tmp_path / "CUB_200_2011", "train_test_split.txt")
    (root / "train_test_split.txt").write_text("".join(f"{i} {int(i <= num_train)}\n" for i in range(1, 25)))
    words = ["--probe", probe, "knn", "--batch-size", batch, "--epochs", 3, "--lr", 0.05]
    expected = run(monkeypatch, *common("cub", root, tmp_path / "1"), *words)
    launch(classify.main, [*common("cub", root, tmp_path / "3"), *words], 3)
    found = {result["probe"]: result for result in results(tmp_path / "3")}
    assert (found[probe]["num_train"], found[probe]["num_test"]) == (4 * num_train, 96 - 4 * num_train)
    assert np.array(found[probe]["confusion"]).sum() == found[probe]["num_test"]
    for kind in (probe, "knn"):
        assert found[kind]["acc1"] == pytest.approx(expected[kind]["acc1"], abs=0.1)


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
    out = capsys.readouterr().out
    assert "chosen on a held-out tenth" in out and "training set is encoded under the test transform" in out
    chosen = [head for head in found["linear"]["heads"] if head["lr"] == found["linear"]["lr"]]
    assert chosen[0]["best_score"] == max(head["best_score"] for head in found["linear"]["heads"])
    # Of class folders, with random crops (six of 22 fill no batch and are not encoded) and without: by default a tenth
    # is held out.
    encoded = count_encoded(monkeypatch)
    for option, images in (("--augment", 3 * 16 + 2 + 9), ("--no-augment", 24 + 9)):
        encoded.clear()
        found = run(monkeypatch, *common("folder", folder, tmp_path), *words[2:], option, "--probe", "attentive")
        assert found["attentive"]["num_held_out"] == 2 and found["attentive"]["num_train"] == 22
        assert sum(encoded) == images


def test_authors_defects_use_and_move_the_statistics_at_test_time(cub):
    encoder = small_encoder()
    train, _ = open_classification("cub", cub)
    features = encode_features(encoder, train, "train", True, "fp32", 0, "auto", Path(), lambda line: None)
    probe = Probe(build_heads("attentive", 1, 48, 4, 3, False), Recipe((0.1,), 32), 32, [0.1], [0], 5)
    probe.train(features, features.ids, 0)

    def confusion(authors_defects=False):
        return confusion_of_heads(probe.heads, features, probe.names, authors_defects)

    before = probe.heads.norm.running_mean.clone()
    right = confusion()
    assert torch.equal(probe.heads.norm.running_mean, before)
    wrong = confusion(authors_defects=True)
    assert not torch.equal(probe.heads.norm.running_mean, before)
    assert right.sum() == wrong.sum() == 64
    # Running statistics that are far off ruin the one and do not matter to the other.
    probe.heads.norm.running_mean[:, ::2] += 100
    assert torch.equal(confusion(authors_defects=True), wrong)
    assert not torch.equal(confusion(), right)


@pytest.mark.parametrize(("place", "count", "sizes"), [(0, 1, (16, 8)), (2, 3, (16, 2))])
def test_batches_of_views_are_those_of_one_process(monkeypatch, folder, place, count, sizes):
    """Every batch, or the share of it of one process of three, which may be no image."""
    monkeypatch.setattr(classify, "rank", lambda: place)
    monkeypatch.setattr(classify, "world_size", lambda: count)
    train, _ = open_classification("folder", folder)
    encoder = small_encoder()
    views = RandomViews(train, random_crop_flip(), 0)
    steps = []
    probes = [Probe(build_heads(kind, 1, 48, 3, 3, False), Recipe((0.1,), size, every_step=True), size, [0.1], [0], 4)
              for kind, size in zip(("linear", "attentive"), sizes, strict=True)]
    for probe in probes:
        probe.step = lambda tokens, rows, labels, epoch, probe=probe: steps.append(
            (probe.kind, len(tokens) and tuple(tokens.shape), labels.tolist(), epoch))
    order = classify.shuffled(torch.arange(24), 0, 1)
    assert sorted(order.tolist()) == list(range(24)) and order.tolist() != list(range(24))
    classify.train_on_views(probes, encoder, views, order, 1, "fp32", 0)
    # Linear and attentive batches may end at one image; which comes first then does not matter.
    for kind, size, shape in (("linear", sizes[0], (1, 48)), ("attentive", sizes[1], (197, 48))):
        batches = [train.labels[order[at:at + size][(place - at) % count::count]].tolist()
                   for at in range(0, 24 // size * size, size)]
        assert [step for step in steps if step[0] == kind] == [
            (kind, len(labels) and (len(labels), *shape), labels, 1 + step / len(batches))
            for step, labels in enumerate(batches)]


def test_views_depend_on_image_and_epoch_alone(folder):
    train, _ = open_classification("folder", folder)
    one, other = (RandomViews(train, random_crop_flip(), 0) for _ in range(2))
    state = torch.get_rng_state()
    first = one[5][0]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, other[5][0]) and first.shape == (1, 3, 224, 224) and first.dtype == torch.uint8
    other.epoch = 1
    assert not torch.equal(first, other[5][0])


def test_an_image_that_cannot_be_decoded_is_named(monkeypatch, cub, tmp_path):
    root = linked(cub, tmp_path / "CUB_200_2011", "images")
    (root / "images" / "001.Bird").mkdir(parents=True)
    for path in (cub / "images" / "001.Bird").iterdir():
        (root / "images" / "001.Bird" / path.name).symlink_to(path)
    bad = root / "images" / "001.Bird" / "3.jpg"
    bad.unlink()
    bad.write_bytes(b"no image")
    with pytest.raises(UserError, match=r"3\.jpg cannot be decoded"):
        run(monkeypatch, *common("cub", root, tmp_path), "--epochs", 1, "--probe", "linear", "attentive", "knn")
    assert not results(tmp_path)


@pytest.mark.parametrize(("words", "message"), [
    (["--no-augment"], "--augment has no effect with --dataset cub"),
    (["--evaluate", "nothing.pth"], "--evaluate nothing.pth does not exist"),
    (["--evaluate", str(WEIGHTS)], "is not a head that classify.py saved"),
])
def test_mistakes_in_arguments(monkeypatch, cub, tmp_path, words, message):
    with pytest.raises(UserError, match=message):
        run(monkeypatch, *common("cub", cub, tmp_path), *words)
    assert not results(tmp_path)


def test_a_head_of_another_encoder_or_other_classes_is_refused(monkeypatch, cub, folder, tmp_path):
    run(monkeypatch, *common("folder", folder, tmp_path), "--epochs", 1)
    head = tmp_path / "ibot_folder_linear_head.pth"
    with pytest.raises(UserError, match=r"list of classes was \['cats', 'dogs', 'emus'\] when .* and is \['right eye', "
                                        r".*use those that it was trained on, ibot and folder"):
        run(monkeypatch, *common("cub", cub, tmp_path), "--evaluate", head)
    # The same weights with another number of attention heads are another encoder.
    with pytest.raises(UserError, match="--evaluate: the encoder differs from when .*head.pth was written"):
        run(monkeypatch, *common("folder", folder, tmp_path), "--num-heads", 6, "--evaluate", head)


def test_class_folders_that_do_not_fit(folder, tmp_path):
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
    (root / "val").rmdir()
    with pytest.raises(UserError, match="data/test has no class folders"):
        open_classification("folder", root)
