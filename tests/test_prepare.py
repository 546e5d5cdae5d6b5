"""datasets.prepare against slow, independent readers of the real samples, and its behaviour on broken sources."""

import errno
import json
import os
import pickle
import re
import shutil
import signal
import sys
import tracemalloc
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datasets import segmentation_classes
from datasets.prepare import common as prepare_common
from datasets.prepare.__main__ import main
from datasets.prepare.ade20k_part import IndexUnpickler, part_instances, read_classes, read_index
from datasets.prepare.common import read_index_map
from utils import UserError
from utils.ending import exit_with_one_line_errors

REAL = Path(__file__).parents[2] / "shared" / "real"
PASCAL = REAL / "pascal_part_sample"
STREET = REAL / "ade20k_full_sample" / "ADE20K_2021_17_01" / "images" / "ADE" / "training" / "urban" / "street"
CHALLENGE = REAL / "ADEChallengeData2016"
needs_real_data = pytest.mark.skipif(not REAL.is_dir(), reason=f"{REAL} is absent")

TRAIN = ["2008_000008", "2008_000009", "2008_000026", "2008_000652", "2008_000700", "2008_000726", "2008_006462"]
VAL = ["2008_000019", "2008_000939", "2009_001103", "2010_000145", "2010_001199", "2010_002065"]


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# Class lists.


@pytest.mark.parametrize(("name", "count"), [("ade20k", 150), ("ade20k-object", 59), ("ade20k-part", 209),
                                             ("pascal-object", 16), ("pascal-part", 193), ("lip", 19)])
def test_class_lists_have_the_paper_s_lengths_and_no_duplicates(name, count):
    names = segmentation_classes.class_names(name)
    assert len(names) == len(set(names)) == count
    assert all(name == name.strip() for name in names)


def test_pascal_parts_per_class():
    counts = {name: len(parts) for name, parts in segmentation_classes.PASCAL_PARTS.items()}
    assert list(counts.values()) == [7, 6, 13, 2, 13, 13, 17, 19, 18, 21, 5, 24, 2, 19, 13, 1]


@needs_real_data
def test_ade20k_names_are_those_of_object_info():
    rows = [line.split("\t") for line in (CHALLENGE / "objectInfo150.txt").read_text().splitlines()[1:]]
    assert tuple(row[4].split(",")[0].strip() for row in rows) == segmentation_classes.ADE20K_150
    assert set(segmentation_classes.ADE20K_OBJECT_59) <= set(segmentation_classes.ADE20K_150)


def test_names_beside_the_maps_go_first(tmp_path):
    assert segmentation_classes.class_names("lip", tmp_path) == segmentation_classes.LIP_19
    (tmp_path / "names.txt").write_text("car wheel\nbed leg\n")
    assert segmentation_classes.class_names("ade20k-part", tmp_path) == ("car wheel", "bed leg")
    (tmp_path / "names.txt").write_text("car wheel\ncar wheel\n")
    with pytest.raises(UserError, match="twice"):
        segmentation_classes.class_names("ade20k-part", tmp_path)


# Pascal-Part.


@pytest.fixture
def voc(tmp_path):
    """A folder as VOC 2010 with Pascal-Part unpacked into it; one of the 14 images is in no list."""
    source = tmp_path / "VOC2010"
    shutil.copytree(PASCAL, source)
    (source / "ImageSets" / "Main").mkdir(parents=True)
    for split, names in (("train", TRAIN), ("val", VAL)):
        (source / "ImageSets" / "Main" / f"{split}.txt").write_text("".join(f"{name}\n" for name in names))
    return source


def run(name: str, source: Path, target: Path, *more: str) -> None:
    main([name, "--source", str(source), "--target", str(target), "--workers", "1", *more])


def slow_pascal(name: str, parts: bool) -> dict[tuple[int, int], str]:
    """Class name at every labelled pixel, pixel by pixel, from the last mask to the first: the first to claim wins."""
    from scipy.io import loadmat
    path = PASCAL / "Annotations_Part" / f"{name}.mat"
    things = loadmat(path, squeeze_me=True, struct_as_record=False)["anno"].objects
    layers = []
    for thing in np.atleast_1d(things):
        kind = getattr(thing, "class")
        if not parts:
            layers.append((None if kind in ("boat", "chair", "table", "sofa") else kind, thing.mask))
        else:
            layers += [(f"{kind} {re.sub('_[0-9]+$', '', part.part_name)}", part.mask)
                       for part in np.atleast_1d(thing.parts)]
    claimed = {}
    for what, mask in reversed(layers):
        for y, x in np.argwhere(mask).tolist():
            claimed.setdefault((y, x), what)
    return {pixel: what for pixel, what in claimed.items() if what is not None}


@needs_real_data
@pytest.mark.parametrize(("dataset", "folder", "parts"), [("pascal-part", "pascal_part", True),
                                                          ("pascal-object", "pascal_semantic", False)])
def test_pascal_maps_equal_a_slow_reader(voc, tmp_path, capsys, dataset, folder, parts):
    run(dataset, voc, tmp_path)
    root = tmp_path / folder
    names = (root / "names.txt").read_text().splitlines()
    assert len(names) == (193 if parts else 16)
    for split, listed in (("train", TRAIN), ("val", VAL)):
        assert sorted(path.stem for path in (root / "ann" / split).iterdir()) == sorted(listed)
        assert sorted(path.stem for path in (root / "img" / split).iterdir()) == sorted(listed)
        for name in listed:
            image = (root / "img" / split / f"{name}.jpg").read_bytes()
            assert image == (PASCAL / "JPEGImages" / f"{name}.jpg").read_bytes()
            with Image.open(root / "ann" / split / f"{name}.png") as file:
                assert file.mode == "L" and file.size == Image.open(PASCAL / "JPEGImages" / f"{name}.jpg").size
                labels = np.asarray(file)
            # Every map of the parts, and for brevity those of the objects in one split, is compared at each pixel.
            if parts or split == "val":
                ours = {(y, x): names[labels[y, x] - 1] for y, x in np.argwhere(labels).tolist()}
                assert ours == slow_pascal(name, parts)
    out = capsys.readouterr().out
    assert "7 images for training, 6 for validation" in out
    assert "1 left out: annotated, but neither in train.txt nor in val.txt" in out


@needs_real_data
def test_every_part_name_of_the_sample_is_known_and_families_are_merged(voc, tmp_path):
    """The names in all 14 files, numbers cut, are in the list; the aeroplane has two engines and five wheels."""
    from scipy.io import loadmat
    seen = set()
    for path in (PASCAL / "Annotations_Part").glob("*.mat"):
        for thing in loadmat(path)["anno"][0, 0]["objects"].ravel():
            seen |= {f"{thing['class'][0]} {part['part_name'][0]}" for part in thing["parts"].ravel()}
    assert {"aeroplane engine_1", "aeroplane engine_2", "aeroplane wheel_5", "car door_1"} <= seen
    merged = {re.sub(r"_\d+$", "", name) for name in seen}
    assert len(merged) > 80
    assert merged <= set(segmentation_classes.PASCAL_PART_193)


@needs_real_data
def test_two_processes_write_the_same_files_as_one(voc, tmp_path):
    run("pascal-part", voc, tmp_path / "one")
    run("pascal-part", voc, tmp_path / "two", "--workers", "2")
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")


@needs_real_data
def test_an_interrupted_run_is_resumed_and_complete_files_are_kept(voc, tmp_path, monkeypatch, capsys):
    run("pascal-part", voc, tmp_path / "straight")
    count, real_load = 0, Image.Image.load

    def interrupt(image):
        nonlocal count
        count += 1
        if count > 12:
            raise KeyboardInterrupt
        return real_load(image)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Image.Image, "load", interrupt)
        run("pascal-part", voc, tmp_path / "resumed")
    root = tmp_path / "resumed" / "pascal_part"
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*.png")}
    assert 0 < len(before) < 13
    removed = next(iter(before))
    removed.unlink()
    capsys.readouterr()
    run("pascal-part", voc, tmp_path / "resumed")
    assert f"{len(before) - 1} complete already" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in before if path != removed} == {
        path: time for path, time in before.items() if path != removed}
    assert files_of(tmp_path / "resumed") == files_of(tmp_path / "straight")


@needs_real_data
def test_what_fails_is_reported_by_name_and_repaired_by_running_again(voc, tmp_path, capsys):
    annotations, images = voc / "Annotations_Part", voc / "JPEGImages"
    (annotations / f"{TRAIN[0]}.mat").write_bytes(b"not a mat file" * 20)
    (images / f"{TRAIN[1]}.jpg").unlink()
    whole = (images / f"{TRAIN[2]}.jpg").read_bytes()
    (images / f"{TRAIN[2]}.jpg").write_bytes(whole[: len(whole) // 2])
    shutil.copyfile(images / f"{TRAIN[3]}.jpg", images / f"{VAL[0]}.jpg")
    (annotations / f"{VAL[1]}.mat").unlink()
    with pytest.raises(SystemExit) as stop:
        exit_with_one_line_errors(lambda: run("pascal-part", voc, tmp_path))
    assert stop.value.code == 2
    out, error = capsys.readouterr()
    assert "6 made\n" in out and "2 made, with no labelled pixel\n" in out and "5 failed\n" in out
    error = [line for line in error.splitlines() if line.startswith("error:")]
    assert len(error) == 1 and "5 of 13 images could not be prepared" in error[0] and "failed.txt" in error[0]
    report = (tmp_path / "pascal_part" / "failed.txt").read_text().splitlines()
    reasons = {Path(line.split("\t")[0]).stem: line.split("\t")[1] for line in report}
    assert set(reasons) == {*TRAIN[:3], *VAL[:2]}
    assert f"{TRAIN[1]}.jpg is missing" in reasons[TRAIN[1]] and f"{VAL[1]}.mat is missing" in reasons[VAL[1]]
    assert "truncated" in reasons[TRAIN[2]] and "(320, 213)" in reasons[VAL[0]]
    assert not list((tmp_path / "pascal_part").rglob(f"{TRAIN[2]}.*"))
    for folder in ("Annotations_Part", "JPEGImages"):
        shutil.copytree(PASCAL / folder, voc / folder, dirs_exist_ok=True)
    run("pascal-part", voc, tmp_path)
    assert "8 complete already" in capsys.readouterr().out
    assert not (tmp_path / "pascal_part" / "failed.txt").exists()


@needs_real_data
def test_a_full_disk_leaves_no_partial_file(voc, tmp_path, monkeypatch):
    def full(source, target):
        Path(target).write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))

    monkeypatch.setattr(prepare_common.shutil, "copyfile", full)
    with pytest.raises(UserError, match="No space left"):
        run("pascal-part", voc, tmp_path)
    assert not [path for path in (tmp_path / "pascal_part" / "img").rglob("*") if path.is_file()]


@needs_real_data
def test_pascal_mistakes_are_one_line(voc, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="Annotations_Part/.*JPEGImages/.*ImageSets/Main"):
        run("pascal-part", voc / "JPEGImages", tmp_path)
    with pytest.raises(UserError, match="is not a folder"):
        run("pascal-part", voc / "nowhere", tmp_path)
    (voc / "ImageSets" / "Main" / "val.txt").rename(tmp_path / "val.txt")
    with pytest.raises(UserError, match=r"val\.txt does not exist.*--lists"):
        run("pascal-part", voc, tmp_path)
    shutil.copyfile(voc / "ImageSets" / "Main" / "train.txt", tmp_path / "train.txt")
    run("pascal-object", voc, tmp_path / "listed", "--lists", str(tmp_path))
    assert len(list((tmp_path / "listed" / "pascal_semantic" / "ann" / "val").iterdir())) == len(VAL)
    (tmp_path / "val.txt").write_text(TRAIN[0])
    with pytest.raises(UserError, match=f"{TRAIN[0]} is in train.txt and in val.txt"):
        run("pascal-part", voc, tmp_path, "--lists", str(tmp_path))
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(UserError, match="pip install scipy"):
        run("pascal-part", voc, tmp_path)
    assert not (tmp_path / "pascal_part").exists()


# ADE20K parts.


@pytest.fixture(scope="module")
def release_2021(tmp_path_factory):
    """The three real images at a quarter of their size; one of them again, and another, make the validation split."""
    release = tmp_path_factory.mktemp("ade") / "ADE20K_2021_17_01"
    for split, name, new_name in (("training", "ADE_train_00016869", "ADE_train_00016869"),
                                  ("training", "ADE_train_00016900", "ADE_train_00016900"),
                                  ("training", "ADE_train_00016964", "ADE_train_00020211"),
                                  ("training", "ADE_train_00016964", "ADE_frame_00000007"),
                                  ("validation", "ADE_train_00016900", "ADE_val_00000001"),
                                  ("validation", "ADE_train_00016964", "ADE_val_00000002")):
        folder = release / "images" / "ADE" / split / "urban" / "street"
        (folder / new_name).mkdir(parents=True)
        (folder / new_name / f"instance_000_{new_name}_seg.png").write_bytes(b"an instance mask, not to be read")
        shutil.copyfile(STREET / f"{name}.json", folder / f"{new_name}.json")
        for ending in (".jpg", "_seg.png", "_parts_1.png"):
            with Image.open(STREET / f"{name}{ending}") as image:
                size = (image.width // 4, image.height // 4)
                image.resize(size, Image.Resampling.NEAREST).save(folder / f"{new_name}{ending}")
    return release


def json_pairs(name: str) -> set[str]:
    things = json.loads((STREET / f"{name}.json").read_text())["annotation"]["object"]
    by_id = {thing["id"]: thing for thing in things}
    first = {thing["id"]: thing["name"].split(",")[0] for thing in things}
    return {f"{first[by_id[thing['parts']['ispartof']]['id']]} {first[thing['id']]}" for thing in things
            if thing["parts"]["part_level"] == 1}


def slow_ade20k_part(stem: Path, names_by_index: dict[int, str]) -> list[str]:
    """"object part" or "" for each pixel in reading order, in plain Python."""
    def classes(path):
        with Image.open(path) as image:
            return [(red // 10 * 256 + green, blue) for row in np.asarray(image).tolist() for red, green, blue in row]

    objects, parts = classes(f"{stem}_seg.png"), classes(f"{stem}_parts_1.png")
    votes = defaultdict(Counter)
    for (thing, _), part in zip(objects, parts, strict=True):
        if part[0] and thing:
            votes[part][thing] += 1
    first = {index: name.split(",")[0] for index, name in names_by_index.items()}
    names = {part: f"{first[counts.most_common(1)[0][0]]} {first[part[0]]}" for part, counts in votes.items()}
    return [names.get(part, "") for part in parts]


def all_names() -> dict[int, str]:
    return {thing["name_ndx"]: thing["name"] for path in STREET.glob("*.json")
            for thing in json.loads(path.read_text())["annotation"]["object"]}


@needs_real_data
def test_ade20k_part_keeps_the_pairs_of_both_splits(release_2021, tmp_path, capsys):
    run("ade20k-part", release_2021, tmp_path)
    out = capsys.readouterr().out
    root = tmp_path / "ADE20K_Part"
    train = json_pairs("ADE_train_00016869") | json_pairs("ADE_train_00016900")
    val = json_pairs("ADE_train_00016900") | json_pairs("ADE_train_00016964")
    names = (root / "names.txt").read_text().splitlines()
    assert names == sorted(train & val) and len(names) == 4
    assert "4 with their objects" in out and "the paper: 209" in out
    assert "2 images for training, 2 for validation" in out and "2 left out: not among the 20210" in out
    known = json.loads((root / "parts.json").read_text())
    assert {f"{part['object'].split(',')[0]} {part['part'].split(',')[0]}" for part in known["parts"]} == train | val
    for split, folder, name in (("train", "training", "ADE_train_00016869"),
                                ("val", "validation", "ADE_val_00000002")):
        stem = release_2021 / "images" / "ADE" / folder / "urban" / "street" / name
        labels = read_index_map(root / "ann" / split / f"{name}.png").ravel().tolist()
        expected = [pair if pair in names else "" for pair in slow_ade20k_part(stem, all_names())]
        assert [names[label - 1] if label else "" for label in labels] == expected
        assert any(expected)
        assert (root / "img" / split / f"{name}.jpg").read_bytes() == stem.with_suffix(".jpg").read_bytes()


@needs_real_data
def test_parts_get_the_object_that_the_json_names():
    """At full size: the majority's pairs are those of ispartof, also where single pixels lie on another object."""
    names, false_pairs = all_names(), 0
    for path in STREET.glob("*_seg.png"):
        instance, pairs = part_instances(path)
        ours = {f"{names[thing].split(',')[0]} {names[part].split(',')[0]}" for thing, part in pairs.tolist()}
        assert ours == json_pairs(path.name.removesuffix("_seg.png"))
        things = json.loads(path.with_name(path.name.replace("_seg.png", ".json")).read_text())["annotation"]["object"]
        assert len(pairs) == sum(thing["parts"]["part_level"] == 1 for thing in things)
        objects, parts = read_classes(path)[0], pairs[instance[instance > 0] - 1]
        false_pairs += np.count_nonzero(objects[instance > 0] != parts[:, 0])
    assert false_pairs == 331


@needs_real_data
def test_the_2016_encoding_is_read_as_the_official_conversion_reads_it():
    folder = REAL / "ade20k_full_sample" / "sceneparsing_info"
    classes, _ = read_classes(folder / "ADE_train_00000970_raw.png")
    table = np.zeros(classes.max() + 1, dtype=np.uint8)
    for line in (folder / "mapFromADE.txt").read_text().splitlines():
        label, index = map(int, line.split())
        if index < len(table):
            table[index] = label
    official = read_index_map(folder / "ADE_train_00000970_challenge.png")
    ours = Image.fromarray(table[classes]).resize(official.shape[::-1], Image.Resampling.NEAREST)
    assert len(np.unique(official)) > 3
    assert np.array_equal(np.asarray(ours), official)


@pytest.fixture
def release_2016(release_2021, tmp_path):
    """The layout of 2016 without an index: no folder ADE, no json."""
    release = tmp_path / "ADE20K_2016_07_26"
    shutil.copytree(release_2021 / "images" / "ADE", release / "images", ignore=shutil.ignore_patterns("*.json"))
    return release


def object_names() -> list[str]:
    names = all_names()
    return [names.get(index, f"unused {index}") for index in range(1, max(names) + 1)]


@needs_real_data
@pytest.mark.parametrize("index", ["mat", "pkl"])
def test_the_2016_layout_with_an_index_gives_the_same_maps(release_2016, release_2021, tmp_path, index):
    with pytest.raises(UserError, match="neither index_ade20k.mat nor index_ade20k.pkl"):
        run("ade20k-part", release_2016, tmp_path / "none")
    if index == "mat":
        from scipy.io import savemat
        savemat(release_2016 / "index_ade20k.mat", {"index": {"objectnames": np.array(object_names(), dtype=object)}})
    else:
        content = {"objectnames": object_names(), "objectPresence": np.ones((3, 4)), "filename": np.array(["a", "b"])}
        (release_2016 / "index_ade20k.pkl").write_bytes(pickle.dumps(content))
    run("ade20k-part", tmp_path, tmp_path / "2016")
    run("ade20k-part", release_2021, tmp_path / "2021")
    ours, other = files_of(tmp_path / "2016"), files_of(tmp_path / "2021")
    for files in (ours, other):
        files.pop("ADE20K_Part/parts.json")
    assert ours == other


@needs_real_data
def test_a_second_ade20k_run_reads_no_part_twice(release_2021, tmp_path, monkeypatch, capsys):
    run("ade20k-part", release_2021, tmp_path)
    first = files_of(tmp_path)
    capsys.readouterr()
    monkeypatch.setattr("datasets.prepare.ade20k_part.read_classes", lambda path: pytest.fail(f"{path} was read again"))
    run("ade20k-part", release_2021, tmp_path)
    assert "4 complete already" in capsys.readouterr().out
    assert files_of(tmp_path) == first


@needs_real_data
def test_a_damaged_ade20k_file_is_named_before_the_class_list_is_made(release_2021, tmp_path):
    release = tmp_path / "ADE20K_2021_17_01"
    shutil.copytree(release_2021, release)
    train, val = (release / "images" / "ADE" / split / "urban" / "street" for split in ("training", "validation"))
    (train / "ADE_train_00016869_parts_1.png").write_bytes(b"no PNG")
    (val / "ADE_val_00000001.json").write_text("{")
    with pytest.raises(UserError, match="2 of 4 images could not be prepared"):
        run("ade20k-part", release, tmp_path)
    root = tmp_path / "ADE20K_Part"
    report = (root / "failed.txt").read_text()
    assert "ADE_train_00016869_seg.png\t" in report and "ADE_val_00000001_seg.png\tJSONDecodeError" in report
    assert not (root / "names.txt").exists() and not (root / "parts.json").exists()
    (train / "ADE_train_00016869_parts_1.png").unlink()
    shutil.copyfile(STREET / "ADE_train_00016900.json", val / "ADE_val_00000001.json")
    run("ade20k-part", release, tmp_path)
    assert not read_index_map(root / "ann" / "train" / "ADE_train_00016869.png").any()
    assert not (root / "failed.txt").exists()


@needs_real_data
def test_ade20k_part_with_a_list_of_classes(release_2021, tmp_path):
    classes = tmp_path / "classes.txt"
    classes.write_text("car license plate\ncar headlight\n")
    run("ade20k-part", release_2021, tmp_path, "--classes", str(classes))
    root = tmp_path / "ADE20K_Part"
    assert (root / "names.txt").read_text() == classes.read_text()
    labels = read_index_map(root / "ann" / "val" / "ADE_val_00000001.png")
    stem = release_2021 / "images" / "ADE" / "validation" / "urban" / "street" / "ADE_val_00000001"
    pixels = Counter(slow_ade20k_part(stem, all_names()))
    assert np.bincount(labels.ravel()).tolist()[1:] == [pixels["car license plate"], pixels["car headlight"]]
    with pytest.raises(UserError, match="differs from this one's"):
        run("ade20k-part", release_2021, tmp_path)
    classes.write_text("car unicorn\n")
    with pytest.raises(UserError, match="car unicorn is not a part that occurs in both splits"):
        run("ade20k-part", release_2021, tmp_path, "--classes", str(classes))


def write_encoded(path: Path, classes: np.ndarray, codes: np.ndarray | int = 1) -> None:
    Image.fromarray(np.stack([classes // 256 * 10, classes % 256, codes + 0 * classes], -1).astype(np.uint8)).save(path)


def test_more_pairs_than_labels_and_parts_without_an_object(tmp_path):
    """300 parts of object 5, parts 400 to 440 in two training images, part 900 on no object, part 901 on half of 7."""
    release = tmp_path / "ADE20K_2016_07_26"
    for split, name in (("training", "ADE_train_00000001"), ("training", "ADE_train_00000002"),
                        ("validation", "ADE_val_00000001")):
        folder = release / "images" / split / "a"
        folder.mkdir(parents=True, exist_ok=True)
        objects = np.full((4, 302), 5)
        objects[:, 300] = 0
        objects[:3, 301] = 0
        objects[3, 301] = 7
        parts = np.concatenate([np.arange(400, 700), [900, 901]])[None].repeat(4, axis=0)
        if name.endswith("2"):
            parts[:, 41:300] = 0
        write_encoded(folder / f"{name}_seg.png", objects)
        write_encoded(folder / f"{name}_parts_1.png", parts)
        Image.new("RGB", (302, 4)).save(folder / f"{name}.jpg")
    (release / "index_ade20k.pkl").write_bytes(pickle.dumps({"objectnames": [f"n{index}" for index in range(1, 902)]}))
    run("ade20k-part", release, tmp_path)
    root = tmp_path / "ADE20K_Part"
    names = (root / "names.txt").read_text().splitlines()
    assert len(names) == 254 and {f"n5 n{index}" for index in range(400, 441)} | {"n7 n901"} <= set(names)
    labels = read_index_map(root / "ann" / "val" / "ADE_val_00000001.png")
    assert labels.max() == 254 and not labels[:, 300].any()
    assert (labels[:, 301] == names.index("n7 n901") + 1).all()
    assert (labels[:, 7] == names.index("n5 n407") + 1).all()


class RunsCode:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("protocol", range(6))
def test_the_index_is_unpickled_without_running_code(tmp_path, protocol):
    content = {"objectnames": ["wall", "building, edifice"], "objectPresence": np.arange(6).reshape(2, 3),
               "scene": np.array(["/a", "/b"], dtype=object), "count": np.float64(2), "folder": ("x", None, b"y", 1.5)}
    path = tmp_path / "index_ade20k.pkl"
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    assert read_index(tmp_path) == {1: "wall", 2: "building, edifice"}
    with open(path, "rb") as file:
        loaded = IndexUnpickler(file).load()
    assert np.array_equal(loaded["objectPresence"], content["objectPresence"]) and loaded["count"] == 2
    assert loaded["scene"].tolist() == ["/a", "/b"] and loaded["folder"] == content["folder"]
    for bad in (RunsCode(tmp_path / "made"), print, Path("x"), eval, np.load):
        path.write_bytes(pickle.dumps({"objectnames": ["wall"], "extra": bad}, protocol=protocol))
        with pytest.raises(UserError, match="more than plain data .*refers to"):
            read_index(tmp_path)
    assert not (tmp_path / "made").exists()
    path.write_bytes(b"no pickle")
    with pytest.raises(UserError, match="damaged"):
        read_index(tmp_path)
    path.unlink()
    (tmp_path / "index_ade20k.mat").write_bytes(b"no matrices")
    with pytest.raises(UserError, match="index_ade20k.mat is no index of ADE20K"):
        read_index(tmp_path)


class Declares:
    """Pickles as a call of a function, with a state."""

    def __init__(self, function, arguments, state=None):
        self.parts = function, arguments, state

    def __reduce__(self):
        return self.parts


def test_an_index_that_declares_more_than_it_holds_takes_no_memory(tmp_path):
    empty, (reconstruct, arguments, _) = np.empty(0), np.empty(0).__reduce__()
    scalar, huge = np.float64().__reduce__()[0], (10**13,)
    contents = {
        "an array of objects": pickle.dumps(Declares(reconstruct, arguments, (1, huge, np.dtype("O"), False, []))),
        "an array of a buffer": pickle.dumps(Declares(empty.__reduce_ex__(5)[0], (b"1", np.dtype("i1"), (1,), "C"),
                                                      (1, huge, np.dtype("O"), False, []))),
        "a shape": pickle.dumps(Declares(reconstruct, (np.ndarray, huge, b"b"))) + b"0",
        "an array by its class": pickle.dumps(Declares(np.ndarray, (huge,))),
        "a scalar without value": pickle.dumps(Declares(scalar, (np.dtype("V2147483647"),))),
        "bytes": b"\x80\x04\x8e" + (2**42).to_bytes(8, "little") + b"x.",
        "text": b"\x80\x04\x8d" + (2**42).to_bytes(8, "little") + b"x.",
        "writable bytes": b"\x80\x05\x96" + (2**42).to_bytes(8, "little") + b"x.",
        "a frame": b"\x80\x04\x95" + (2**42).to_bytes(8, "little") + b"].",
        "an object's number": b"\x80\x02]r\xff\xff\xff\xff.",
        "names that are no text": pickle.dumps({"objectnames": [["a"] * 3]}), "no names": pickle.dumps([1]),
    }
    tracemalloc.start()
    for what, content in contents.items():
        (tmp_path / "index_ade20k.pkl").write_bytes(content)
        with pytest.raises(UserError, match="index_ade20k.pkl is damaged or holds more than plain data"):
            read_index(tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 2**24, what
    tracemalloc.stop()


# ADE20K objects and LIP.


@needs_real_data
def test_ade20k_object_renumbers_by_name(tmp_path):
    run("ade20k-object", CHALLENGE, tmp_path)
    root = tmp_path / "ade_59object" / "ADEChallengeData2016"
    kept = (root / "names.txt").read_text().splitlines()
    assert len(kept) == 59
    by_label = {row.split("\t")[0].strip(): row.split("\t")[4].split(",")[0].strip()
                for row in (CHALLENGE / "objectInfo150.txt").read_text().splitlines()[1:]}
    for split, count in (("training", 4), ("validation", 3)):
        files = sorted((root / "annotations" / split).iterdir())
        assert len(files) == count
        for path in files:
            with Image.open(CHALLENGE / "annotations" / split / path.name) as image:
                expected = [by_label.get(str(label), "") for row in np.asarray(image).tolist() for label in row]
            ours = [kept[label - 1] if label else "" for label in read_index_map(path).ravel().tolist()]
            assert ours == [name if name in kept else "" for name in expected]
            assert any(ours)
            assert (root / "images" / split / f"{path.stem}.jpg").is_file()


@needs_real_data
def test_ade20k_object_with_other_classes(tmp_path):
    (tmp_path / "classes.txt").write_text("wall\n\nsky\n")
    run("ade20k-object", CHALLENGE, tmp_path, "--classes", str(tmp_path / "classes.txt"))
    path = Path("annotations", "training", "ADE_train_00000036.png")
    ours = read_index_map(tmp_path / "ade_59object" / "ADEChallengeData2016" / path)
    official = read_index_map(CHALLENGE / path)
    assert np.array_equal(ours == 1, official == 1) and np.array_equal(ours == 2, official == 3) and ours.max() <= 2
    (tmp_path / "classes.txt").write_text("wall\nunicorn\n")
    with pytest.raises(UserError, match="unicorn is not one of the 150"):
        run("ade20k-object", CHALLENGE, tmp_path / "other", "--classes", str(tmp_path / "classes.txt"))


@needs_real_data
def test_lip_from_both_layouts(tmp_path, capsys):
    sample = REAL / "lip_sample"
    for split in ("train", "val"):
        shutil.copytree(sample / f"{split}_images", tmp_path / "LIP" / "TrainVal_images" / f"{split}_images")
        shutil.copytree(sample / f"{split}_segmentations",
                        tmp_path / "LIP" / "TrainVal_parsing_annotations" / f"{split}_segmentations")
    run("lip", sample, tmp_path / "a")
    run("lip", tmp_path / "LIP", tmp_path / "b")
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    for split in ("train", "val"):
        source = next((sample / f"{split}_segmentations").iterdir())
        ours = read_index_map(tmp_path / "a" / "LIP" / "ann" / split / source.name)
        assert np.array_equal(ours, read_index_map(source)) and ours.any()
    assert (tmp_path / "a" / "LIP" / "names.txt").read_text().splitlines()[0] == "hat"


def test_lip_with_bad_labels(tmp_path):
    """A label of 20, a colour PNG, an image without labels, labels without an image: each is named."""
    images, labels = tmp_path / "LIP" / "train_images", tmp_path / "LIP" / "train_segmentations"
    for folder in (images, labels, tmp_path / "LIP" / "val_images", tmp_path / "LIP" / "val_segmentations"):
        folder.mkdir(parents=True)
    with pytest.raises(UserError, match="no images for the split train"):
        run("lip", tmp_path / "LIP", tmp_path)
    for name in ("good", "above", "colour", "alone"):
        Image.new("RGB", (6, 5)).save(images / f"{name}.jpg")
    Image.new("L", (6, 5), 19).save(labels / "good.png")
    Image.new("L", (6, 5), 20).save(labels / "above.png")
    Image.new("RGB", (6, 5)).save(labels / "colour.png")
    Image.new("L", (6, 5)).save(labels / "orphan.png")
    with pytest.raises(UserError, match="no images for the split val"):
        run("lip", tmp_path / "LIP", tmp_path)
    Image.new("RGB", (6, 5)).save(tmp_path / "LIP" / "val_images" / "v.jpg")
    indexed = Image.new("P", (6, 5), 3)
    indexed.putpalette([200, 10, 10] * 256)
    indexed.save(tmp_path / "LIP" / "val_segmentations" / "v.png")
    with pytest.raises(UserError, match="4 of 6"):
        run("lip", tmp_path / "LIP", tmp_path)
    report = dict(line.split("\t") for line in (tmp_path / "LIP" / "failed.txt").read_text().splitlines())
    reasons = {Path(path).stem: reason for path, reason in report.items()}
    assert "label 20 is above 19" in reasons["above"] and "mode RGB" in reasons["colour"]
    assert "alone.png is missing" in reasons["alone"] and "orphan.jpg is missing" in reasons["orphan"]
    assert (read_index_map(tmp_path / "LIP" / "ann" / "val" / "v.png") == 3).all()
    assert (read_index_map(tmp_path / "LIP" / "ann" / "train" / "good.png") == 19).all()


def test_maps_of_unknown_origin_are_not_mixed_with_ours(tmp_path):
    for split in ("train", "val"):
        for folder in (f"source/{split}_images", f"source/{split}_segmentations", f"LIP/ann/{split}"):
            (tmp_path / folder).mkdir(parents=True)
        Image.new("RGB", (6, 5)).save(tmp_path / "source" / f"{split}_images" / "a.jpg")
        Image.new("L", (6, 5), 1).save(tmp_path / "source" / f"{split}_segmentations" / "a.png")
    Image.new("L", (6, 5), 1).save(tmp_path / "LIP" / "ann" / "train" / "theirs.png")
    with pytest.raises(UserError, match="without names.txt"):
        run("lip", tmp_path / "source", tmp_path)


def test_ctrl_c_says_what_is_kept(tmp_path, monkeypatch, capsys):
    for split in ("train", "val"):
        for folder, mode in ((f"{split}_images", "RGB"), (f"{split}_segmentations", "L")):
            (tmp_path / "source" / folder).mkdir(parents=True)
            Image.new(mode, (6, 5)).save(tmp_path / "source" / folder / ("a.jpg" if mode == "RGB" else "a.png"))
    monkeypatch.setattr(prepare_common, "prepare_one", lambda *_, **__: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(SystemExit) as stop:
        exit_with_one_line_errors(lambda: run("lip", tmp_path / "source", tmp_path))
    assert stop.value.code == 130
    assert capsys.readouterr().err == "stopped by Ctrl-C: finished files are kept; run again for the others\n"


def test_unknown_data_set_is_one_line(capsys):
    with pytest.raises(SystemExit) as stop:
        exit_with_one_line_errors(lambda: main(["lipp", "--source", ".", "--target", "."]))
    assert stop.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
