"""CUB and COCO part patches: the real samples against plain loops over the rule, and every error line."""

import collections
import json
import math
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import classify
import retrieval
from datasets.classification import CLASSIFICATION_IMAGES, CLASSIFICATION_PARTS, open_classification
from datasets.coco import load_coco, read_keypoints
from datasets.cub import load_cub
from datasets.retrieval import RETRIEVAL_DATASETS, open_retrieval
from datasets.segmentation import PROTOCOLS, open_segmentation
from utils import UserError

REAL = Path(__file__).parents[2] / "shared/real"
CUB, COCO = REAL / "CUB_200_2011", REAL / "coco"
needs_cub = pytest.mark.skipif(not CUB.is_dir(), reason=f"needs the sample {CUB}")
needs_coco = pytest.mark.skipif(not COCO.is_dir(), reason=f"needs the sample {COCO}")
ALL_PARTS, ALL_KEYPOINTS = tuple(range(1, 16)), tuple(range(1, 18))


def slow_patches(keypoints, crop_scale=0.5):
    """keypoints: [(class, coordinates)] of one image -> {(class, box)}, by plain loops from the protocol's text."""
    found = set()
    for i, (label, point) in enumerate(keypoints):
        distances = []
        for j, (_, other) in enumerate(keypoints):
            if j != i and math.dist(point, other) > 0:
                distances.append(math.dist(point, other))
        if not distances or not 20 < min(distances) / 2 < 1000:
            continue
        half = round(min(distances) / 4) if crop_scale == 0.5 else round(min(distances) / 2)
        x, y = point[:2]
        found.add((label, (x - half, y - half, x + half, y + half)))
    return found


def patches_by_image(dataset):
    return {image.path: set(zip(image.labels, image.boxes, strict=True)) for image in dataset.images}


def slow_cub(root, parts, crop_scale=0.5, split=None):
    names = dict(line.split() for line in (root / "images.txt").read_text().splitlines())
    train = dict(line.split() for line in (root / "train_test_split.txt").read_text().splitlines())
    keypoints = collections.defaultdict(list)
    for line in (root / "parts/part_locs.txt").read_text().splitlines():
        image, part, x, y, visible = line.split()
        if visible == "1" and int(part) in parts and (split is None or train[image] == str(int(split == "train"))):
            keypoints[image].append((parts.index(int(part)), (float(x), float(y))))
    patches = {str(root / "images" / names[image]): slow_patches(points, crop_scale)
               for image, points in keypoints.items()}
    return {path: found for path, found in patches.items() if found}


def slow_coco(root, split, keypoints, crop_scale=0.5):
    content = json.loads((root / f"annotations/person_keypoints_{split}2017.json").read_text())
    pooled = collections.defaultdict(list)
    for annotation in content["annotations"]:
        triples = [annotation["keypoints"][i:i + 3] for i in range(0, 51, 3)]
        chosen = [(label, *triples[number - 1]) for label, number in enumerate(keypoints)]
        visible = [(label, (x, y, annotation["id"])) for label, x, y, visibility in chosen if visibility == 2]
        if len(visible) >= 2:
            pooled[annotation["image_id"]] += visible
    patches = {str(root / "images" / f"{split}2017" / image["file_name"]): slow_patches(pooled[image["id"]], crop_scale)
               for image in content["images"]}
    return {path: found for path, found in patches.items() if found}


@needs_cub
def test_cub_known_counts():
    dataset = load_cub(CUB)
    assert dataset.classes == ["right eye", "right leg", "left wing", "tail"]
    assert dataset.num_patches == 914 and len(dataset) == 338
    assert dataset.labels.bincount().tolist() == [173, 231, 199, 311]
    assert load_cub(CUB, "train").num_patches == 467 and load_cub(CUB, "test").num_patches == 447


@needs_cub
@pytest.mark.parametrize("parts", [(11, 12, 9, 14), (14, 2), ALL_PARTS])
@pytest.mark.parametrize("crop_scale", [0.5, 1.0])
@pytest.mark.parametrize("split", [None, "train", "test"])
def test_cub_boxes_equal_plain_loops(parts, crop_scale, split):
    dataset = load_cub(CUB, split, parts, crop_scale)
    expected = slow_cub(CUB, parts, crop_scale, split)
    assert patches_by_image(dataset) == expected
    assert dataset.num_patches == sum(map(len, expected.values())) > 200


@needs_cub
def test_cub_order_is_that_of_images_then_parts(tmp_path):
    dataset = load_cub(CUB)
    listed = [str(CUB / "images" / line.split()[1]) for line in (CUB / "images.txt").read_text().splitlines()]
    positions = [listed.index(image.path) for image in dataset.images]
    assert positions == sorted(positions)
    assert all(list(image.labels) == sorted(image.labels) for image in dataset.images)

    for name in ("images.txt", "parts/parts.txt", "parts/part_locs.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text((CUB / name).read_text())
    (tmp_path / "images").symlink_to(CUB / "images")
    rows = (CUB / "parts/part_locs.txt").read_text().splitlines()
    (tmp_path / "parts/part_locs.txt").write_text("\r\n".join(reversed(rows)) + "\r\n\r\n")
    shuffled = load_cub(tmp_path)
    assert [image[1:] for image in shuffled.images] == [image[1:] for image in dataset.images]


@needs_cub
def test_cub_patches_of_real_images():
    """A batch that begins and ends within images, against Pillow on the boxes of the plain loops."""
    dataset = load_cub(CUB, "test")
    indices = range(3, 9)
    batches = list(dataset.batches(indices, 4, 0))
    patches, ids = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert ids.tolist() == [i for i in range(dataset.num_patches) if int(dataset.image_index[i]) in indices]
    expected = slow_cub(CUB, (11, 12, 9, 14), 0.5, "test")
    for patch, index in zip(patches, ids, strict=True):
        path = dataset.images[int(dataset.image_index[index])].path
        boxes = [box for label, box in expected[path] if label == int(dataset.labels[index])]
        with Image.open(path) as image:
            plain = image.convert("RGB").crop(boxes[0]).resize((224, 224), Image.Resampling.BICUBIC)
        assert np.array_equal(patch.numpy(), np.asarray(plain).transpose(2, 0, 1))


@needs_coco
@pytest.mark.parametrize("split, count", [("train", 79), ("val", 72)])
def test_coco_known_counts(split, count):
    dataset = load_coco(COCO, split)
    assert dataset.classes == ["nose", "right_wrist", "left_ankle"]
    assert dataset.num_patches == count
    assert all(Path(image.path).is_file() for image in dataset.images)


@needs_coco
@pytest.mark.parametrize("keypoints", [(1, 11, 16), (17, 6), ALL_KEYPOINTS])
@pytest.mark.parametrize("crop_scale", [0.5, 1.0])
@pytest.mark.parametrize("split", ["train", "val"])
def test_coco_boxes_equal_plain_loops(split, keypoints, crop_scale):
    dataset = load_coco(COCO, split, keypoints, crop_scale)
    expected = slow_coco(COCO, split, keypoints, crop_scale)
    assert patches_by_image(dataset) == expected
    # In a set two patches of one class and box would be one.
    assert dataset.num_patches == sum(map(len, expected.values())) > 20


@needs_coco
def test_coco_images_beside_the_annotations(tmp_path):
    (tmp_path / "annotations").symlink_to(COCO / "annotations")
    shutil.copytree(COCO / "images/val2017", tmp_path / "val2017")
    dataset = load_coco(tmp_path, "val")
    assert dataset.num_patches == 72 and dataset[0][0].shape[1:] == (3, 224, 224)


@pytest.mark.parametrize("names, factory, arguments", [
    (RETRIEVAL_DATASETS, open_retrieval, (None, 0.5, 3, 0, False)),
    (CLASSIFICATION_PARTS + CLASSIFICATION_IMAGES, open_classification, ()),
    (tuple(PROTOCOLS), open_segmentation, ("val",)),
])
def test_data_sets_without_a_data_path(names, factory, arguments):
    """The synthetic ones open, the others give the same line."""
    for name in names:
        if name.startswith("synthetic"):
            opened = factory(name, None, *arguments)
            assert all(len(part) for part in (opened if isinstance(opened, tuple) else (opened,)))
        else:
            with pytest.raises(UserError) as error:
                factory(name, None, *arguments)
            needs = ("--annotations FILE (COCO keypoints, JSON) and --images DIR" if name == "keypoints" else
                     "--data-path DIR; --dataset synthetic needs no files")
            assert str(error.value) == f"--dataset {name} needs {needs}"


@needs_cub
@needs_coco
def test_keypoints_of_retrieval():
    def classes(name, path, keypoints):
        return open_retrieval(name, path, keypoints, 0.5, None, 0, False).classes
    assert classes("cub", CUB, None) == load_cub(CUB).classes
    assert classes("cub", CUB, ["all"]) == load_cub(CUB, parts=ALL_PARTS).classes
    assert classes("coco", COCO, ["all"]) == load_coco(COCO, keypoints=ALL_KEYPOINTS).classes
    assert classes("coco", COCO, ["17", "6"]) == ["right_ankle", "left_shoulder"]
    assert classes("coco", COCO, ["right_ankle", "6"]) == ["right_ankle", "left_shoulder"]
    assert classes("cub", CUB, ["tail", "left wing"]) == ["tail", "left wing"]
    expect_line(["keypoint snout", "1 nose, 2 left_eye"], classes, "coco", COCO, ["snout", "nose"])
    expect_line(["named twice", "1, nose"], classes, "coco", COCO, ["1", "nose"])
    expect_line(["keypoint 18"], classes, "coco", COCO, ["1", "18"])


@pytest.fixture
def cub(tmp_path):
    """A CUB folder of three images, two of them with patches; the parts 1, 2 and 3."""
    root = tmp_path / "CUB_200_2011"
    (root / "parts").mkdir(parents=True)
    (root / "images/001.Bird").mkdir(parents=True)
    (root / "images.txt").write_text("".join(f"{i} 001.Bird/{i}.jpg\n" for i in (1, 2, 3)))
    (root / "train_test_split.txt").write_text("1 1\n2 0\n3 1\n")
    (root / "parts/parts.txt").write_text("1 left eye\n2 beak\n3 tail\n")
    (root / "parts/part_locs.txt").write_text(
        "1 1 10.0 10.0 1\n1 2 110.0 10.0 1\n1 3 10.0 12.0 0\n"
        "2 1 10.0 10.0 1\n2 2 0.0 0.0 0\n2 3 0.0 0.0 0\n"
        "3 1 10.0 10.0 0\n3 2 60.0 10.0 1\n3 3 60.0 110.0 1\n")
    for i in (1, 2, 3):
        Image.new("RGB", (150, 150), (80 * i, 0, 0)).save(root / f"images/001.Bird/{i}.jpg")
    return root


def test_small_cub(cub):
    """Invisible parts count in no distance, and images without patches are left out."""
    dataset = load_cub(cub, parts=(3, 1, 2))
    assert dataset.classes == ["tail", "left eye", "beak"]
    assert [(Path(image.path).name, image.boxes, image.labels) for image in dataset.images] == [
        ("1.jpg", [(-15, -15, 35, 35), (85, -15, 135, 35)], [1, 2]),
        ("3.jpg", [(35, 85, 85, 135), (35, -15, 85, 35)], [0, 2])]
    assert len(load_cub(cub, "train", (1, 2))) == 1
    with pytest.raises(UserError, match="no patch of the parts 1, 2 is left"):
        load_cub(cub, "test", (1, 2))


def replace(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


@pytest.mark.parametrize("name, old, new, words", [
    ("parts/part_locs.txt", "1 3 10.0 12.0 0", "1 3 10.0 0", ["part_locs.txt", "line 3", "'1 3 10.0 0'"]),
    ("parts/part_locs.txt", "2 1 10.0 10.0 1", "2 1 10.0 ten 1", ["part_locs.txt", "line 4", "'2 1 10.0 ten 1'"]),
    ("parts/part_locs.txt", "2 1 10.0 10.0 1", "2 1 10.0 10.0 1 1", ["part_locs.txt", "line 4"]),
    ("parts/part_locs.txt", "3 2 60.0", "9 2 60.0", ["part_locs.txt", "line 8", "image 9", "images.txt"]),
    ("parts/part_locs.txt", "3 2 60.0", "3 8 60.0", ["part_locs.txt", "line 8", "part 8", "parts.txt"]),
    ("parts/part_locs.txt", "3 1 10.0 10.0 0\n3 2 60.0 10.0 1\n3 3 60.0 110.0 1\n", "", ["part_locs.txt", "image 3"]),
    ("parts/parts.txt", "2 beak", "beak", ["parts.txt", "line 2", "'beak'"]),
    ("images.txt", "2 001.Bird/2.jpg", "2", ["images.txt", "line 2", "'2'"]),
    ("train_test_split.txt", "3 1", "3 x", ["train_test_split.txt", "line 3", "'3 x'"]),
    ("train_test_split.txt", "3 1\n", "", ["train_test_split.txt", "image 3"]),
])
def test_cub_bad_lines(cub, name, old, new, words):
    replace(cub / name, old, new)
    expect_line(words, load_cub, cub, "train", (1, 2, 3))


def expect_line(words, function, *arguments):
    with pytest.raises(UserError) as error:
        function(*arguments)
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize("name", ["images.txt", "parts/parts.txt", "parts/part_locs.txt", "train_test_split.txt",
                                  "images"])
def test_cub_missing_files(cub, name):
    shutil.rmtree(cub / name) if name == "images" else (cub / name).unlink()
    expect_line([str(cub / name), "--data-path", "parts/part_locs.txt", "images/CLASS/*.jpg"],
                load_cub, cub, "train", (1, 2))


def test_cub_wrong_root_and_parts(cub, tmp_path):
    expect_line([str(tmp_path / "nowhere"), "--data-path"], load_cub, tmp_path / "nowhere")
    expect_line(["part 11", "1 left eye, 2 beak, 3 tail"], load_cub, cub)
    expect_line(["named twice", "1, 2, 1"], load_cub, cub, None, (1, 2, 1))
    # One part alone has no distance to another.
    expect_line(["parts 1 ", "two or more"], load_cub, cub, None, (1,))


def test_cub_without_a_split_file(cub):
    (cub / "train_test_split.txt").unlink()
    assert load_cub(cub, parts=(1, 2, 3)).num_patches == 4


def test_cub_missing_image(cub):
    (cub / "images/001.Bird/3.jpg").unlink()
    dataset = load_cub(cub, parts=(1, 2, 3))
    assert dataset[0][0].shape == (2, 3, 224, 224)
    expect_line(["3.jpg", "--skip-bad-images"], dataset.__getitem__, 1)
    skipping = load_cub(cub, parts=(1, 2, 3), skip_bad_images=True)
    assert torch.cat([ids for _, ids in skipping.batches(range(2), 8, 0)]).tolist() == [0, 1]


def person(image, annotation, segmentation=(), **keypoints):
    """An annotation; keypoints: k7=(x, y, visibility)."""
    values = [0] * 51
    for name, triple in keypoints.items():
        values[3 * int(name[1:]) - 3:3 * int(name[1:])] = triple
    return {"segmentation": list(segmentation), "num_keypoints": len(keypoints), "iscrowd": 0, "keypoints": values,
            "image_id": image, "category_id": 1, "id": annotation}


@pytest.fixture
def coco(tmp_path):
    """(root, content of the annotation file, function that writes it)."""
    content = {
        "info": {"description": "test"}, "licenses": [{"id": 1, "url": "", "name": ""}],
        "images": [{"id": number, "file_name": f"{number}.jpg"} for number in (30, 20, 10)],
        "annotations": [
            person(10, 1, k1=(10, 10, 2), k11=(110, 10, 2), k16=(10, 20, 1)),  # the ankle is hidden
            person(10, 2000, k1=(12, 10, 2), k16=(12, 130, 2)),                # apart by its id only
            person(20, 3, k1=(10, 10, 2), k11=(90, 10, 1)),                    # one visible keypoint: does not count
            person(20, 4, k1=(10, 40, 2), k16=(10, 100, 2)),
            person(30, 5) | {"iscrowd": 1, "segmentation": {"counts": [1, 2], "size": [3, 1]}}],
        "categories": [{"id": 1, "name": "person", "keypoints": [f"joint{i}" for i in range(1, 18)],
                        "skeleton": [[1, 2]]}]}
    (tmp_path / "annotations").mkdir()
    (tmp_path / "images/train2017").mkdir(parents=True)
    path = tmp_path / "annotations/person_keypoints_train2017.json"

    def write(content):
        path.write_text(json.dumps(content))
    write(content)
    return tmp_path, content, write


def test_small_coco(coco):
    dataset = load_coco(coco[0])
    assert dataset.classes == ["joint1", "joint11", "joint16"]
    assert [(Path(image.path).name, image.boxes, image.labels) for image in dataset.images] == [
        ("20.jpg", [(-5, 25, 25, 55), (-5, 85, 25, 115)], [0, 2]),
        ("10.jpg", [(-15, -15, 35, 35), (85, -15, 135, 35), (-18, -20, 42, 40), (-18, 100, 42, 160)], [0, 1, 0, 2])]


def test_coco_annotations_with_close_ids_share_distances(coco):
    """The third coordinate is all that keeps persons apart: noses 2 pixels and 6 ids away lose their patches."""
    root, content, write = coco
    content["annotations"][1]["id"] = 7
    write(content)
    assert load_coco(root).images[1].labels == [1, 2]


def test_coco_malformed_json_names_the_line(coco):
    path = coco[0] / "annotations/person_keypoints_train2017.json"
    path.write_text('{"info": {},\n "images": [,],\n "annotations": []}')
    expect_line([str(path), "line 2", "column 13"], load_coco, coco[0])
    path.write_text('{"images": [{"id": 1}')
    expect_line([str(path), "line 1"], load_coco, coco[0])
    path.write_bytes(b"\x1f\x8b\xff\x00")
    expect_line([str(path), "not a COCO keypoints file"], load_coco, coco[0])


@pytest.mark.parametrize("spoil, words", [
    (lambda c: c["annotations"][0].pop("keypoints"), ["annotation 1 has 0 keypoint values", "expected 51"]),
    (lambda c: c["annotations"][0].pop("image_id"), ["not a COCO keypoints file"]),
    (lambda c: c["annotations"][0].update(keypoints="many"), ["not a COCO keypoints file"]),
    (lambda c: c["annotations"][0]["keypoints"].pop(), ["annotation 1 has 50 keypoint values", "expected 51"]),
    (lambda c: c["annotations"][0].update(image_id=99), ["annotation 1", "image 99"]),
    (lambda c: c.pop("images"), ["not a COCO keypoints file", "'images'"]),
    (lambda c: c["categories"].append({"id": 2, "name": "bicycle"}), ["person and bicycle", "different keypoints"]),
    (lambda c: c["categories"][0].pop("keypoints"), ["not a COCO keypoints file", "'keypoints'"]),
    (lambda c: c["annotations"][0].update(category_id=5), ["annotation 1 is of category 5", "not listed once"]),
    (lambda c: c["categories"].append(c["categories"][0] | {"id": 2}), ["is of category 1", "not listed once"]),
    (lambda c: c["categories"][0]["keypoints"].__setitem__(0, "joint2"), ["names of its keypoints"]),
    (lambda c: c.update(annotations=[]), ["no patch of the keypoints 1, 11, 16 is left"]),
])
def test_coco_other_json(coco, spoil, words):
    root, content, write = coco
    spoil(content)
    write(content)
    expect_line(words, load_coco, root)


def test_coco_wrong_root_and_keypoints(coco):
    root = coco[0]
    expect_line(["keypoint 18", "1 joint1, 2 joint2", "17 joint17"], load_coco, root, "train", (1, 18))
    expect_line(["keypoint 0"], load_coco, root, "train", (0, 1))
    expect_line(["named twice"], load_coco, root, "train", (1, 1))
    expect_line(["val2017", "--data-path", "annotations/person_keypoints_val2017.json"], load_coco, root, "val")
    (root / "images/val2017").mkdir()
    expect_line(["person_keypoints_val2017.json does not exist"], load_coco, root, "val")


def test_coco_outlines_are_dropped_while_reading(coco):
    """The official file has 240 MB, most of it outlines: memory stays near the text's own size."""
    root, content, write = coco
    polygon = [number + 0.25 for number in range(300)]
    content["annotations"] = [person(10, number, [polygon], k1=(1, 1, 2)) for number in range(1, 1001)]
    write(content)
    path = root / "annotations/person_keypoints_train2017.json"
    tracemalloc.start()
    _, _, persons = read_keypoints(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(persons) == 1000 and persons[0][:2] == (10, 1)
    assert peak < 3 * path.stat().st_size


def own_files(annotations=None, images=None, category=None):
    return annotations, images, category


@needs_coco
def test_the_person_file_as_ones_own_gives_the_patches_of_coco():
    files = [COCO / f"annotations/person_keypoints_{split}2017.json" for split in ("train", "val")]
    folders = [COCO / f"images/{split}2017" for split in ("train", "val")]
    ours = open_retrieval("keypoints", None, ["nose", "11", "left_ankle"], 0.5, None, 0, False,
                          files=own_files(files[:1], folders[:1]))
    official = load_coco(COCO)
    assert ours.images == official.images and ours.classes == official.classes == ["nose", "right_wrist", "left_ankle"]
    both = open_classification("keypoints", None, keypoints=["1", "11", "16"], files=own_files(files, folders))
    for found, expected in zip(both, open_classification("coco", COCO), strict=True):
        assert found.images == expected.images and torch.equal(found.labels, expected.labels)
        assert repr(found.transform) == repr(expected.transform)


@pytest.fixture
def zoo(tmp_path):
    """A file of three categories, two of which share their keypoints, and its images: (file, folder)."""
    def animal(image, category, x):
        points = {"eye": (x, 20), "tail": (x + 100, 20), "paw": (x + 50, 110)}
        return {"image_id": image, "id": 1000 * image + x, "category_id": category,
                "keypoints": [value for point in points.values() for value in (*point, 2)]}
    content = {
        "categories": [{"id": 4, "name": "cat", "keypoints": ["eye", "tail", "paw"]},
                       {"id": 7, "name": "dog", "keypoints": ["eye", "tail", "paw"]},
                       {"id": 9, "name": "fish", "keypoints": ["fin", "gill", "eye"]}],
        "images": [{"id": number, "file_name": f"{number}.png"} for number in range(1, 11)],
        "annotations": [animal(number, 4 if number % 2 else 7, 30) for number in range(1, 10)] + [animal(10, 9, 40)]}
    for number in range(1, 11):
        Image.new("RGB", (180, 160), (20 * number, 90, 200)).save(tmp_path / f"{number}.png")
    (tmp_path / "zoo.json").write_text(json.dumps(content))
    return tmp_path / "zoo.json", tmp_path


def test_several_categories(zoo):
    """Those that share their keypoints are pooled by the keypoint's name; others are an error until one is chosen."""
    def dataset(categories, keypoints=None):
        return open_retrieval("keypoints", None, keypoints, 0.5, None, 0, False,
                              files=own_files(zoo[:1], zoo[1:], categories))
    pooled = dataset(["cat", "dog"])
    assert pooled.classes == ["eye", "tail", "paw"] and len(pooled) == 9 and pooled.num_patches == 27
    assert [Path(image.path).name for image in dataset(["dog"]).images] == ["2.png", "4.png", "6.png", "8.png"]
    assert dataset(["cat"], ["paw", "1"]).classes == ["paw", "eye"]
    assert dataset(["fish"]).classes == ["fin", "gill", "eye"]
    expect_line(["cat and fish have different keypoints", "--category from cat, dog, fish"], dataset, None)
    expect_line(["no category 'cow'", "cat, dog, fish"], dataset, ["cow"])
    zoo[0].write_text(zoo[0].read_text().replace('"gill"', '"1"'))
    expect_line(["keypoint 1 is the number of one and the name of another"], dataset, ["fish"], ["1"])
    assert dataset(["fish"], ["2", "fin"]).classes == ["1", "fin"]


def test_one_file_is_split_by_image(zoo):
    def split(seed, **options):
        files = own_files(zoo[:1], zoo[1:], ["cat", "dog"])
        return [[image.path for image in part.images]
                for part in open_classification("keypoints", None, files=files, seed=seed, **options)]
    train, test = split(0)
    assert len(test) == 1 and len(train) == 8 and not set(train) & set(test)
    assert split(0) == [train, test] and any(split(seed)[1] != test for seed in range(1, 5))
    expect_line(["--keypoints", "imagenet"], open_classification, "imagenet", zoo[1], 0.5, False, 224, ["eye"])


def test_files_that_do_not_fit_are_one_line(zoo, tmp_path):
    def opened(*files):
        return open_retrieval("keypoints", None, None, 0.5, None, 0, False, files=own_files(*files))
    expect_line(["--annotations takes one FILE", "2 and 1 were given"], opened, [zoo[0]] * 2, zoo[1:])
    expect_line(["none.json does not exist"], opened, [tmp_path / "none.json"], zoo[1:])
    expect_line(["nowhere does not exist"], opened, zoo[:1], [tmp_path / "nowhere"])


def test_own_keypoints_through_both_scripts(zoo, tmp_path, launch):
    options = ["--model", "timm/vit_tiny_patch16_224", "--weights", "random", "--workers", 0, "--output-dir", tmp_path,
               "--dataset", "keypoints", "--annotations", zoo[0], "--images", zoo[1], "--category", "cat", "dog"]
    launch(retrieval.main, [*options, "--keypoints", "eye", "paw"])
    launch(classify.main, [*options, "--epochs", 1])
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [line["dataset"] for line in lines] == ["keypoints"] * 2
    assert lines[0]["patches_per_class"] == {"eye": 9, "paw": 9}
    assert lines[1]["classes"] == ["eye", "tail", "paw"] and (lines[1]["num_train"], lines[1]["num_test"]) == (24, 3)
    for main in (retrieval.main, classify.main):
        assert "have different keypoints; choose --category" in launch(main, options[:-3], status=2)[1]
        assert "are for --dataset keypoints, not for synthetic" in launch(main, ["--images", tmp_path], status=2)[1]
