"""What made a result and the files that later runs use: recorded whole, and compared whole."""

import json
import os
import random
import re
import shutil
import subprocess
import time
from copy import deepcopy
from datetime import datetime, timedelta, timezone
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import classify
import retrieval
from datasets.classification import open_classification
from models import build_model
from models.attention.__main__ import main as attention
from models.features import encode_features, encoder_identity, start_files
from utils import UserError, storage
from utils.ending import Checkpoint
from utils.provenance import check_same, digest
from utils.storage import load_checked, save_checked

ROOT = Path(__file__).parents[1]
IBOT = ("--model", "ibot", "--weights", ROOT / "tests/golden/ibot/checkpoint.pth", "--num-heads", 3)


def test_every_results_line_says_which_run_it_is_of(launch, tmp_path):
    words = (*IBOT, "--device", "cpu", "--workers", 0, "--output-dir", tmp_path)
    started = datetime.now(timezone.utc) - timedelta(seconds=1)
    for main, more in ((retrieval.main, ("--num-images", 2)),
                       (retrieval.main, ("--dataset", "synthetic-pairs", "--num-pairs", 2)),
                       (attention, ("--dataset", "synthetic", "--queries", 0, "--num-images", 2))):
        launch(main, [*words, *more])
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [line["task"] for line in lines] == ["retrieval", "transfer", "attention"]
    assert len({line["run"] for line in lines}) == 3
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    for line in lines:
        assert started <= datetime.fromisoformat(line["date"]) <= datetime.now(timezone.utc)
        assert line["revision"].removesuffix("+changes") == (head.strip() or "unknown")
        assert line["versions"] == {name: metadata.version(name) for name in
                                    ("torch", "torchvision", "timm", "numpy", "pillow")}
        assert re.search(f"run {line['run']}, ", (tmp_path / "log.txt").read_text())


@pytest.fixture
def folder(tmp_path):
    """12 + 3 images of three classes in class folders."""
    chance = np.random.default_rng(1)
    for split, count in (("train", 4), ("val", 1)):
        for name in ("cats", "dogs", "emus"):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = chance.integers(0, 255, (30, 40, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "data" / split / name / f"{index}.png")
    return tmp_path / "data"


def probing(root, output, *more):
    return [*IBOT, "--dataset", "folder", "--data-path", root, "--no-augment", "--batch-size", 6, "--epochs", 3,
            "--output-dir", output, "--workers", 0, "--device", "cpu", "--checkpoint-seconds", 0, *more]


@pytest.fixture
def stopped(launch, folder, tmp_path, monkeypatch):
    """The folder of a run that ended after its second checkpoint."""
    def stop(*given):
        save(*given)
        if given[1] == 2:
            raise UserError("stop")

    save = Checkpoint.save
    with monkeypatch.context() as patched:
        patched.setattr(Checkpoint, "save", stop)
        launch(classify.main, probing(folder, tmp_path / "out"), status=2)
    return tmp_path / "out"


TRAINING, CATS = "of the training set", "train/cats/0.png"


@pytest.mark.parametrize(("change", "words"), [
    (lambda root: (root / CATS).unlink(), f"the number of images {TRAINING} was 12"),
    (lambda root: (root / CATS).rename(root / "train/cats/9.png"), f"the list of images {TRAINING} differs"),
    (lambda root: os.utime(root / "val/emus/0.png", ns=(1, 1)), "the list of images of the test set"),
    (lambda root: (root / CATS).rename(root / "train/dogs/9.png"), f"the list of labels {TRAINING} differs"),
    (lambda root: [(root / split / "cats").rename(root / split / "eels") for split in ("train", "val")],
     f"the list of classes {TRAINING} was ['cats', 'dogs', 'emus'] when"),
])
def test_a_run_is_not_resumed_on_other_images(launch, folder, stopped, change, words):
    change(folder)
    _, err = launch(classify.main, probing(folder, stopped, "--resume"), status=2)
    assert len(err.splitlines()) == 1 and err.startswith("error: --resume: ") and words in err
    assert not (stopped / "results.jsonl").exists()


def test_a_run_is_resumed_with_all_that_changes_no_figure(launch, folder, stopped, tmp_path):
    """The data set and the weights in other places, another name for the same weights."""
    moved = shutil.copytree(folder, tmp_path / "moved")
    weights = shutil.copy(IBOT[3], tmp_path / "renamed.pth")
    words = probing(moved, stopped, "--resume", "--cache", "disk", "--debug", "--weights", weights, "--save-plots")
    out, _ = launch(classify.main, words)
    assert "resumed after epoch 2" in out and (stopped / "results.jsonl").exists()


def test_a_head_is_for_the_encoder_that_it_was_trained_on(launch, folder, tmp_path):
    launch(classify.main, probing(folder, tmp_path))
    head = tmp_path / "ibot_folder_linear_head.pth"
    trained = json.loads((tmp_path / "results.jsonl").read_text())
    # The teacher's backbone alone is the same encoder; the golden files of other methods are of its width.
    golden = ROOT / "tests/golden"
    for more, words in ((("--weights", golden / "ibot/checkpoint_teacher.pth"), ""),
                        (("--num-heads", 6), "the number of heads was 3 when"),
                        (("--model", "mae", "--weights", golden / "mae/checkpoint.pth"),
                         "the content of the encoder's weights differs now from when")):
        _, err = launch(classify.main, probing(folder, tmp_path / "two", *more, "--evaluate", head),
                          status=2 if words else 0)
        assert not words or err.startswith(f"error: --evaluate: {words}") and len(err.splitlines()) == 1
    [tested] = map(json.loads, (tmp_path / "two/results.jsonl").read_text().splitlines())
    assert tested["acc1"] == trained["acc1"]


def test_the_identity_of_an_encoder_is_what_its_tokens_depend_on():
    golden = ROOT / "tests/golden"
    def of(model, form="checkpoint", heads=3, **options):
        return encoder_identity(build_model(model, str(golden / model / f"{form}.pth"), heads, **options))
    # Projector and decoder give no token; the code may be edited.
    assert of("ibot") == of("ibot", "checkpoint_teacher") == of("ibot", projector=False)
    assert of("mae") == of("mae", "checkpoint_full")
    different = [of("dino"), of("dino", branch="student"), of("mae"), of("mae", shuffle_patches=True), of("ibot"),
                 of("ibot", heads=6)]
    assert len({digest(one) for one in different}) == len(different)
    encoder = build_model("deit", str(golden / "deit/checkpoint.pth"), 3)
    encoder.mean += 0.01
    assert encoder_identity(encoder) != of("deit")
    assert all(encoder_identity(encoder)[name] == value for name, value in of("deit").items() if "weights" not in name)


@pytest.mark.parametrize(("name", "damage"), [
    ("tokens", lambda content: bytes(len(content))), ("cls", lambda content: content[:100] + b"x" + content[101:]),
    ("decoded", lambda content: bytes(len(content)))])
def test_a_kept_cache_with_other_bytes_of_the_same_size_is_written_anew(folder, tmp_path, name, damage):
    encoder, (train, _), lines = build_model("ibot", str(IBOT[3]), 3), open_classification("folder", folder), []

    def features():
        lines.clear()
        return encode_features(encoder, train, "train", True, "fp32", 0, "auto", tmp_path, tmp_path, lines.append)

    first = features()
    [path] = tmp_path.glob("*-tokens")
    record = json.loads((path / "complete.json").read_text())
    assert record["made_with"]["the number of heads"] == 3
    assert record["made_with"]["the list of classes of the data set"] == ["cats", "dogs", "emus"]
    (path / name).write_bytes(damage((path / name).read_bytes()))
    again = features()
    assert any(line == f"{path} is damaged or half-written: refused, it is written anew" for line in lines)
    assert torch.equal(again.tokens, first.tokens) and torch.equal(again.cls, first.cls) and not len(again.missing)
    assert features() and any("come from the cache" in line for line in lines)


def kept(launch, path, *words):
    launch(retrieval.main, [*IBOT, "--device", "cpu", "--workers", 0, "--output-dir", path.parent, "--save-features",
                            path, *words])
    return path


def test_features_of_other_data_do_not_stand_side_by_side(launch, folder, tmp_path):
    parts = kept(launch, tmp_path / "parts.pt", "--num-images", 1)
    wider = kept(launch, tmp_path / "wider.pt", "--num-images", 1, "--crop-scale", 1)
    larger = kept(launch, tmp_path / "larger.pt", "--num-images", 1, "--image-size", 256)
    sheets = "--dataset", "imagenet", "--queries", 1, "--data-path"
    grid = kept(launch, tmp_path / "grid.pt", *sheets, folder / "val/cats")
    moved = kept(launch, tmp_path / "again.pt", *sheets, shutil.copytree(folder / "val/cats", tmp_path / "moved"))
    os.utime(folder / "val/cats/0.png", ns=(1, 1))
    touched = kept(launch, tmp_path / "touched.pt", *sheets, folder / "val/cats")
    before = len((tmp_path / "results.jsonl").read_text().splitlines())
    words = ["--device", "cpu", "--output-dir", tmp_path, "--queries", 1, "--load-features"]
    for files, message in (((parts, grid), "the kind of patches of the data set was GridDataset when"),
                           ((grid, parts), "the kind of patches of the data set was PatchDataset when"),
                           ((parts, wider), "the list of boxes of the data set differs"),
                           ((grid, touched), "the list of images of the data set differs")):
        _, err = launch(retrieval.main, [*words, *files], status=2)
        assert len(err.splitlines()) == 1 and message in err and str(files[0]) in err and str(files[1]) in err
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == before
    launch(retrieval.main, [*words, grid, moved])
    launch(retrieval.main, [*words, parts, larger])
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert lines[-1]["features_made_by"]["run"] == lines[2]["run"] != lines[-1]["run"]


def test_all_differences_are_named_in_one_line():
    classes = [f"a class of a long name, number {number}" for number in range(9)]
    saved = {"the number of heads": 3, "lr": [0.1], "the list of classes": classes, "the list of images": "a" * 64,
             "gone": 1}
    now = {"the number of heads": 6, "lr": [0.2], "the list of classes": [*classes[:4], "other", *classes[5:]],
           "the list of images": "b" * 64, "new": 2}
    check_same(Path("x.pt"), saved, deepcopy(saved), "--resume", "mend")
    with pytest.raises(UserError) as caught:
        check_same(Path("x.pt"), saved, now, "--resume", "mend")
    message = str(caught.value)
    assert message.startswith("--resume: the number of heads was 3 when x.pt was written and is 6 now; lr was [0.1]")
    for part in ("the list of images differs now from when x.pt was written; ", "gone was 1", "new was None", "; mend",
                 "the list of classes, from number 5 on,"):
        assert part in message
    assert "\n" not in message and "a" * 64 not in message


# Damage by chance

def places(content, path=()):
    """The paths of all that can be replaced in nested dictionaries and lists."""
    yield from [path] if path else []
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in items:
        yield from places(value, (*path, key))


def damaged_content(content, chance):
    """A copy with something taken out or replaced by another kind, shape or value."""
    content = deepcopy(content)
    *path, last = chance.choice(list(places(content)))
    inside = content
    for key in path:
        inside = inside[key]
    value = inside[last]
    how = chance.choice(["remove", None, "text", [], {}, 7, float("nan"), torch.zeros(2, 3), "change"])
    if how == "remove":
        del inside[last]
    elif how == "change" and isinstance(value, torch.Tensor):
        inside[last] = chance.choice([value[None], value.flatten()[:0], value.double(), value + 1])
    else:
        inside[last] = how
    return content


def damaged_bytes(content, chance):
    content = bytearray(content)
    if chance.random() < 0.3:
        return content[:chance.randrange(len(content))]
    for _ in range(chance.choice([1, 1, 1, 30])):
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    return content


def test_a_damaged_file_is_one_line_or_gives_what_was_written(launch, folder, stopped, tmp_path):
    """Bits, lengths, keys, kinds, shapes, of a checkpoint, a head and kept features."""
    launch(classify.main, probing(folder, tmp_path, "--probe", "attentive"))
    files = {kept(launch, tmp_path / "features.pt", "--num-images", 1): retrieval.FEATURE_FILE,
             stopped / "ibot_folder_checkpoint.pth": ("settings", "epoch", "probes"),
             tmp_path / "ibot_folder_attentive_head.pth": ("head", "kind", "num_heads", "classes", "encoder")}
    chance, refused, same = random.Random(0), 0, 0
    for path, keys in files.items():
        expected, whole = digest(load_checked(path, "a file", keys)), path.read_bytes()
        content = torch.load(path, weights_only=True)
        for trial in range(120):
            if trial % 2:
                torch.save(damaged_content(content, chance), path)
            else:
                path.write_bytes(damaged_bytes(whole, chance))
            try:
                assert digest(load_checked(path, "a file", keys)) == expected
                same += 1
            except UserError as error:
                assert "\n" not in str(error) and str(path) in str(error)
                refused += 1
        path.write_bytes(whole)
    print(f"{refused} refused, {same} unchanged")
    assert refused > 250

    # And the scripts say it in one line.
    for path, main, words in zip(files, (retrieval.main, classify.main, classify.main), (
            ["--load-features", tmp_path / "features.pt"], probing(folder, stopped, "--resume"),
            probing(folder, tmp_path, "--evaluate", tmp_path / "ibot_folder_attentive_head.pth")), strict=True):
        content = torch.load(path, weights_only=True)
        torch.save({**content, "head": None, "probes": None, "features": {"cls": None}}, path)
        _, err = launch(main, [*words, "--output-dir", path.parent], status=2)
        assert len(err.splitlines()) == 1 and f"{path} is not a" in err and "or not as it was written" in err


def test_a_damaged_cache_gives_what_the_encoder_gives(folder, tmp_path):
    encoder, (train, _) = build_model("ibot", str(IBOT[3]), 3), open_classification("folder", folder)
    chance, lines = random.Random(0), []

    def features():
        found = encode_features(encoder, train, "train", False, "fp32", 0, "auto", tmp_path, tmp_path, lines.append)
        return digest([found.cls, found.missing])

    expected = features()
    [path] = tmp_path.glob("*-cls")
    for _ in range(25):
        file = path / chance.choice(["cls", "decoded", "complete.json"])
        file.write_bytes(damaged_bytes(file.read_bytes(), chance))
        assert features() == expected
    assert sum("refused" in line for line in lines) >= 20


def components_saved_slowly():
    write = storage.atomic_write
    storage.atomic_write = lambda path, content: (time.sleep(1), write(path, content))
    retrieval.main()


def test_processes_read_the_file_that_the_first_one_writes(launch, folder, tmp_path):
    words = [*IBOT, "--dataset", "imagenet", "--data-path", folder / "val", "--pca", "--num-images", 2, "--device",
             "cpu", "--workers", 0, "--output-dir", tmp_path]
    launch(components_saved_slowly, words, processes=2)
    content = torch.load(tmp_path / "pca_ibot.pt", weights_only=True)
    save_checked(tmp_path / "pca_ibot.pt", {name: value for name, value in content.items() if name != "digest"})
    torch.save(content | {"colours": None}, tmp_path / "pca_mae.pt")
    _, err = launch(retrieval.main, words, status=2)
    assert len(err.splitlines()) == 1 and f"{tmp_path / 'pca_mae.pt'} is not a row of principal components" in err


def test_processes_agree_on_a_damaged_cache_and_on_refusals(launch, folder, tmp_path):
    words = probing(folder, tmp_path, "--cache-dir", tmp_path / "kept", "--probe", "attentive")
    launch(classify.main, words)
    for tokens in (tmp_path / "kept").glob("*/tokens"):
        tokens.write_bytes(bytes(tokens.stat().st_size))
    out, _ = launch(classify.main, words, processes=2)
    assert out.count("damaged or half-written: refused") == 2
    first, second = map(json.loads, (tmp_path / "results.jsonl").read_text().splitlines())
    assert second["best_acc1"] == pytest.approx(first["best_acc1"], abs=0.1)
    head = tmp_path / "ibot_folder_attentive_head.pth"
    _, err = launch(classify.main, [*words, "--evaluate", head, "--num-heads", 6], processes=2, status=2)
    assert "error: --evaluate: the number of heads was 3 when" in err


def test_a_new_cache_removes_half_written_ones_and_no_folder_of_the_user(tmp_path):
    left, own = tmp_path / f"{'a' * 20}-tokens.partial", tmp_path / "download.partial"
    for folder in (left, own):
        folder.mkdir()
        (folder / "file").write_text("x")
    start_files(tmp_path / f"{'b' * 20}-cls", {"cls": ((2, 3), torch.float32)}, print)
    assert not left.exists() and (own / "file").read_text() == "x"
