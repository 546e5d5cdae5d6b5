"""datasets.prepare against slow, independent readers of the real samples, and its behaviour on broken sources."""

import io
import json
import os
import pickle
import re
import shutil
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datasets import segmentation_classes
from datasets.prepare import __main__ as prepare
from datasets.prepare.ade20k_part import IndexUnpickler, name_pairs, part_instances, read_classes, read_index
from utils import UserError

REAL = Path(__file__).parents[2] / "shared" / "real"
PASCAL = REAL / "pascal_part_sample"
STREET = REAL / "ade20k_full_sample" / "ADE20K_2021_17_01" / "images" / "ADE" / "training" / "urban" / "street"
CHALLENGE = REAL / "ADEChallengeData2016"
needs_real_data = pytest.mark.skipif(not REAL.is_dir(), reason=f"{REAL} is absent")

TRAIN = ["2008_000008", "2008_000009", "2008_000026", "2008_000652", "2008_000700", "2008_000726", "2008_006462"]
VAL = ["2008_000019", "2008_000939", "2009_001103", "2010_000145", "2010_001199", "2010_002065"]


def run(name: str, source: Path, target: Path, *more: str) -> None:
    prepare.main([name, "--source", str(source), "--target", str(target), "--workers", "1", *more])


def read_map(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.mode == "L"
        return np.asarray(image)


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize(("name", "count"), [("ade20k", 150), ("ade20k-object", 59), ("ade20k-part", 209),
                                             ("pascal-object", 16), ("pascal-part", 193), ("lip", 19)])
def test_class_lists_have_the_paper_s_lengths_and_no_duplicates(name, count):
    names = segmentation_classes.class_names(name)
    assert len(names) == len({name.strip() for name in names}) == count


@needs_real_data
def test_ade20k_names_are_those_of_object_info():
    rows = [line.split("\t") for line in (CHALLENGE / "objectInfo150.txt").read_text().splitlines()[1:]]
    assert tuple(row[4].split(",")[0].strip() for row in rows) == segmentation_classes.ADE20K_150


def test_names_beside_the_maps_go_first(tmp_path):
    (tmp_path / "names.txt").write_text("car wheel\nbed leg\n")
    assert segmentation_classes.class_names("ade20k-part", tmp_path) == ("car wheel", "bed leg")
    (tmp_path / "names.txt").write_text("car wheel\ncar wheel\n")
    with pytest.raises(UserError, match="twice"):
        segmentation_classes.class_names("ade20k-part", tmp_path)


@pytest.fixture
def voc(tmp_path):
    """A folder as VOC 2010 with Pascal-Part unpacked into it; one of the 14 images is in no list."""
    source = tmp_path / "VOC2010"
    shutil.copytree(PASCAL, source)
    (source / "ImageSets" / "Main").mkdir(parents=True)
    for split, names in (("train", TRAIN), ("val", VAL)):
        (source / "ImageSets" / "Main" / f"{split}.txt").write_text("".join(f"{name}\n" for name in names))
    return source


def slow_pascal(name: str, parts: bool) -> dict[tuple[int, int], str]:
    """Class name at every labelled pixel, pixel by pixel, from the last mask to the first: the first to claim wins."""
    from scipy.io import loadmat
    content = loadmat(PASCAL / "Annotations_Part" / f"{name}.mat", squeeze_me=True, struct_as_record=False)
    layers = []
    for thing in np.atleast_1d(content["anno"].objects):
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
    root = tmp_path / folder
    run(dataset, voc, tmp_path)
    names = (root / "names.txt").read_text().splitlines()
    assert len(names) == (193 if parts else 16)
    for split, listed in (("train", TRAIN), ("val", VAL)):
        assert sorted(path.stem for path in (root / "ann" / split).iterdir()) == sorted(listed)
        for name in listed:
            image = (root / "img" / split / f"{name}.jpg").read_bytes()
            assert image == (PASCAL / "JPEGImages" / f"{name}.jpg").read_bytes()
            # For brevity the maps of the objects are compared in one split only.
            if parts or split == "val":
                labels = read_map(root / "ann" / split / f"{name}.png")
                ours = {(y, x): names[labels[y, x] - 1] for y, x in np.argwhere(labels).tolist()}
                assert ours == slow_pascal(name, parts)
    assert "7 images for training, 6 for validation" in capsys.readouterr().out


@needs_real_data
@pytest.mark.parametrize("workers", ["1", "2"])
def test_the_first_failure_is_named_and_the_next_run_goes_on(voc, tmp_path, capsys, workers):
    image, matrix = voc / "JPEGImages" / f"{TRAIN[2]}.jpg", voc / "Annotations_Part" / f"{TRAIN[2]}.mat"
    other, root = voc / "JPEGImages" / f"{TRAIN[3]}.jpg", tmp_path / "pascal_part"
    for path, content, error in ((image, image.read_bytes()[:3000], "truncated"), (image, other.read_bytes(), "320 x"),
                                 (matrix, b"not a mat file" * 20, "cannot be read")):
        whole = path.read_bytes()
        path.write_bytes(content)
        with pytest.raises(UserError, match=f"{path.name} .*{error}"):
            run("pascal-part", voc, tmp_path, "--workers", workers)
        path.write_bytes(whole)
    finished = {path: path.stat().st_mtime_ns for path in (root / "ann").rglob("*.png")}
    run("pascal-part", voc, tmp_path, "--workers", workers)
    assert f"{len(finished)} of them finished earlier" in capsys.readouterr().out
    assert all(path.stat().st_mtime_ns == time for path, time in finished.items())
    run("pascal-part", voc, tmp_path / "straight")
    assert files_of(tmp_path / "straight" / "pascal_part") == files_of(root)


def names_by_index() -> list[str]:
    """All names in the json files, that of index k at position k."""
    things = [thing for path in STREET.glob("*.json") for thing in json.loads(path.read_text())["annotation"]["object"]]
    names = {thing["name_ndx"]: thing["name"] for thing in things}
    return [names.get(index, "") for index in range(max(names) + 1)]


@pytest.fixture(scope="module")
def release_2021(tmp_path_factory):
    """The three real images at a quarter of their size; one of them again, and another, make the validation split. The
    index holds the names in their json files."""
    release = tmp_path_factory.mktemp("ade") / "ADE20K_2021_17_01"
    for name, number in (("train_00016869", 16869), ("train_00016900", 16900), ("train_00020211", 16964),
                         ("frame_00000007", 16964), ("val_00000001", 16900), ("val_00000002", 16964)):
        folder = release / "images" / "ADE" / ("validation" if "val" in name else "training") / "street"
        (folder / f"ADE_{name}").mkdir(parents=True)
        (folder / f"ADE_{name}" / f"instance_000_ADE_{name}_seg.png").write_bytes(b"an instance mask, not to be read")
        for ending in (".jpg", "_seg.png", "_parts_1.png"):
            with Image.open(STREET / f"ADE_train_000{number}{ending}") as image:
                size = (image.width // 4, image.height // 4)
                image.resize(size, Image.Resampling.NEAREST).save(folder / f"ADE_{name}{ending}")
    content = {"objectnames": names_by_index()[1:], "objectPresence": np.ones((3, 4)), "filename": np.array(["a", "b"])}
    (release / "index_ade20k.pkl").write_bytes(pickle.dumps(content))
    return release


def json_pairs(name: str) -> set[str]:
    things = json.loads((STREET / f"{name}.json").read_text())["annotation"]["object"]
    by_id = {thing["id"]: thing for thing in things}
    first = {thing["id"]: thing["name"].split(",")[0] for thing in things}
    return {f"{first[by_id[thing['parts']['ispartof']]['id']]} {first[thing['id']]}" for thing in things
            if thing["parts"]["part_level"] == 1}


def slow_ade20k_part(stem: Path) -> list[str]:
    """"object part" or "" for each pixel in reading order, in plain Python."""
    def classes(path):
        with Image.open(path) as image:
            return [(red // 10 * 256 + green, blue) for row in np.asarray(image).tolist() for red, green, blue in row]

    objects, parts = classes(f"{stem}_seg.png"), classes(f"{stem}_parts_1.png")
    votes = defaultdict(Counter)
    for (thing, _), part in zip(objects, parts, strict=True):
        if part[0] and thing:
            votes[part][thing] += 1
    first = [name.split(",")[0] for name in names_by_index()]
    names = {part: f"{first[counts.most_common(1)[0][0]]} {first[part[0]]}" for part, counts in votes.items()}
    return [names.get(part, "") for part in parts]


@needs_real_data
def test_ade20k_part_keeps_the_pairs_of_both_splits(release_2021, tmp_path, capsys):
    run("ade20k-part", release_2021, tmp_path)
    out = capsys.readouterr().out
    root = tmp_path / "ADE20K_Part"
    images = [json_pairs(f"ADE_train_000{number}") for number in (16869, 16900, 16964)]
    names = (root / "names.txt").read_text().splitlines()
    assert names == sorted((images[0] | images[1]) & (images[1] | images[2])) and len(names) == 4
    assert "4 with their objects" in out and "2 images for training, 2 for validation" in out
    for split, folder, name in (("train", "training", "ADE_train_00016869"),
                                ("val", "validation", "ADE_val_00000002")):
        stem = release_2021 / "images" / "ADE" / folder / "street" / name
        labels = read_map(root / "ann" / split / f"{name}.png").ravel().tolist()
        expected = [pair if pair in names else "" for pair in slow_ade20k_part(stem)]
        assert [names[label - 1] if label else "" for label in labels] == expected
        assert any(expected)
        assert (root / "img" / split / f"{name}.jpg").read_bytes() == stem.with_suffix(".jpg").read_bytes()


@needs_real_data
def test_parts_get_the_object_that_the_json_names():
    """At full size: the majority's pairs are those of ispartof, also where single pixels lie on another object."""
    names, false_pairs = names_by_index(), 0
    for path in STREET.glob("*_seg.png"):
        instance, pairs = part_instances(path)
        ours = {f"{names[thing].split(',')[0]} {names[part].split(',')[0]}" for thing, part in pairs}
        assert ours == json_pairs(path.name.removesuffix("_seg.png"))
        things = json.loads(path.with_name(path.name.replace("_seg.png", ".json")).read_text())["annotation"]["object"]
        assert len(pairs) == sum(thing["parts"]["part_level"] == 1 for thing in things)
        objects, parts = read_classes(path)[0], np.array(pairs)[instance[instance > 0] - 1]
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
    official = read_map(folder / "ADE_train_00000970_challenge.png")
    ours = Image.fromarray(table[classes]).resize(official.shape[::-1], Image.Resampling.NEAREST)
    assert len(np.unique(official)) > 3 and np.array_equal(np.asarray(ours), official)


def test_more_pairs_than_labels_and_parts_without_an_object(tmp_path):
    """300 parts of object 5, parts 400 to 440 in two training images, part 900 on no object, part 901 on half of 7; in
    the layout of 2016 with an index of MATLAB's."""
    savemat = pytest.importorskip("scipy.io").savemat
    release, root = tmp_path / "ADE20K_2016_07_26", tmp_path / "ADE20K_Part"
    for split, name in (("training", "ADE_train_00000001"), ("training", "ADE_train_00000002"),
                        ("training", "ADE_train_00000003"), ("validation", "ADE_val_00000001")):
        folder = release / "images" / split / "a"
        folder.mkdir(parents=True, exist_ok=True)
        objects = np.full((4, 302), 5)
        objects[:, 300] = 0
        objects[:, 301] = [0, 0, 0, 7]
        parts = np.concatenate([np.arange(400, 700), [900, 901]])[None].repeat(4, axis=0)
        if name.endswith("2"):
            parts[:, 41:300] = 0
        for ending, classes in (("seg", objects), ("parts_1", parts)):
            pixels = np.stack([classes // 256 * 10, classes % 256, np.ones_like(classes)], axis=-1).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{name}_{ending}.png")
        Image.new("RGB", (302, 4)).save(folder / f"{name}.jpg")
    with pytest.raises(UserError, match="index_ade20k.mat cannot be read"):
        run("ade20k-part", release, tmp_path)
    names = np.array([f"n{index}" for index in range(1, 902)], dtype=object)
    savemat(release / "index_ade20k.mat", {"index": {"objectnames": names}})
    damaged = release / "images" / "training" / "a" / "ADE_train_00000003_parts_1.png"
    whole = damaged.read_bytes()
    Image.open(damaged).save(damaged, "JPEG")
    with pytest.raises(UserError, match="ADE_train_00000003_parts_1.png is a JPEG file"):
        run("ade20k-part", release, tmp_path)
    damaged.write_bytes(whole)
    damaged.write_bytes(b"no PNG")
    with pytest.raises(UserError, match="ADE_train_00000003_parts_1.png cannot be decoded"):
        run("ade20k-part", release, tmp_path)
    assert not root.exists()
    damaged.unlink()
    run("ade20k-part", release, tmp_path)
    assert not read_map(root / "ann" / "train" / "ADE_train_00000003.png").any()
    names = (root / "names.txt").read_text().splitlines()
    assert len(names) == 254 and {f"n5 n{index}" for index in range(400, 441)} | {"n7 n901"} <= set(names)
    labels = read_map(root / "ann" / "val" / "ADE_val_00000001.png")
    assert labels.max() == 254 and not labels[:, 300].any()
    assert (labels[:, [7, 301]] == [names.index("n5 n407") + 1, names.index("n7 n901") + 1]).all()


def test_parts_that_would_share_a_name_have_all_synonyms():
    names = ["", "door, a", "door, b", "knob"]
    assert name_pairs([(3, 1), (1, 3), (2, 3)], names) == {
        "door, a / knob [1, 3]": (1, 3), "door, b / knob [2, 3]": (2, 3), "knob door": (3, 1)}


class RunsCode:
    def __reduce__(self):
        return os.mkdir, ("made by a pickle",)


@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_the_index_is_unpickled_without_running_code(tmp_path, protocol, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content = {"objectnames": ["wall", "building, edifice"], "objectPresence": np.arange(6).reshape(2, 3),
               "scene": np.array(["/a", "/b"], dtype=object), "count": np.float64(2), "folder": ("x", None, b"y", 1.5)}
    loaded = IndexUnpickler(io.BytesIO(pickle.dumps(content, protocol=protocol))).load()
    assert np.array_equal(loaded["objectPresence"], content["objectPresence"]) and loaded["count"] == 2
    assert loaded["scene"].tolist() == ["/a", "/b"] and loaded["folder"] == content["folder"]
    for bad in (RunsCode(), print, Path("x"), eval, np.load):
        (tmp_path / "index_ade20k.pkl").write_bytes(pickle.dumps({**content, "extra": bad}, protocol=protocol))
        with pytest.raises(UserError, match="index_ade20k.pkl cannot be read .*refers to"):
            read_index(tmp_path)
    assert not Path("made by a pickle").exists()


@needs_real_data
def test_ade20k_object_renumbers_by_name(tmp_path):
    run("ade20k-object", CHALLENGE, tmp_path)
    root = tmp_path / "ade_59object" / "ADEChallengeData2016"
    kept = (root / "names.txt").read_text().splitlines()
    assert kept == list(segmentation_classes.ADE20K_OBJECT_59)
    by_label = {row.split("\t")[0].strip(): row.split("\t")[4].split(",")[0].strip()
                for row in (CHALLENGE / "objectInfo150.txt").read_text().splitlines()[1:]}
    files = sorted((root / "annotations").rglob("*.png"))
    assert len(files) == 7 and all(read_map(path).any() for path in files[:4])
    for path in files:
        official = [by_label.get(str(label), "") for label in read_map(CHALLENGE / path.relative_to(root)).flat]
        ours = [kept[label - 1] if label else "" for label in read_map(path).ravel().tolist()]
        assert ours == [name if name in kept else "" for name in official]
        assert (root / "images" / path.parent.name / f"{path.stem}.jpg").is_file()


@needs_real_data
def test_lip_keeps_its_labels(tmp_path):
    run("lip", REAL / "lip_sample", tmp_path)
    for source in (REAL / "lip_sample").glob("*_segmentations/*.png"):
        ours = read_map(tmp_path / "LIP" / "ann" / source.parent.name.split("_")[0] / source.name)
        assert np.array_equal(ours, read_map(source)) and ours.any()


@pytest.fixture
def made_lip(tmp_path):
    """LIP as its archives unpack, with one image in each split; one label map has a palette."""
    for split, mode, label in (("train", "P", 3), ("val", "L", 19)):
        images = tmp_path / "LIP" / "TrainVal_images" / f"{split}_images"
        labels = tmp_path / "LIP" / "TrainVal_parsing_annotations" / f"{split}_segmentations"
        images.mkdir(parents=True)
        labels.mkdir(parents=True)
        Image.new("RGB", (6, 5)).save(images / "a.jpg")
        label_map = Image.new(mode, (6, 5), label)
        if mode == "P":
            label_map.putpalette([200, 10, 10] * 256)
        label_map.save(labels / "a.png")
    return tmp_path / "LIP"


def test_lip_with_bad_labels_and_into_its_own_folder(made_lip, tmp_path):
    bad = made_lip / "TrainVal_parsing_annotations" / "train_segmentations" / "b.png"
    Image.new("RGB", (6, 5)).save(made_lip / "TrainVal_images" / "train_images" / "b.jpg")
    for picture, why in ((Image.new("L", (6, 5), 20), "b.png: label 20 is above"),
                         (Image.new("RGB", (6, 5)), "b.png .*mode RGB"), (Image.new("L", (6, 4)), "b.jpg .*6 x 5")):
        picture.save(bad)
        with pytest.raises(UserError, match=why):
            run("lip", made_lip, tmp_path)
    Image.new("1", (6, 5), 1).save(bad)
    run("lip", made_lip, tmp_path)
    for path, label in (("train/a.png", 3), ("train/b.png", 1), ("val/a.png", 19)):
        assert (read_map(made_lip / "ann" / path) == label).all()
    (made_lip / "names.txt").unlink()  # as if the maps were another's
    with pytest.raises(UserError, match="another class list"):
        run("lip", made_lip, tmp_path)


@pytest.mark.parametrize(("words", "error"), [
    (["lipp"], "invalid choice"), (["lip"], "train_images"), (["pascal-part"], "train.txt"),
    (["ade20k-part"], "index_ade20k"), (["ade20k-object"], "training")])
def test_a_mistake_is_one_line(tmp_path, words, error, launch):
    _, err = launch(lambda: run(words[0], tmp_path, tmp_path / "out", *words[1:]), [], 1, 2)
    assert err.count("\n") == 1 and error in err
