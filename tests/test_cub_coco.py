"""CUB and COCO part patches: the real samples against plain loops over the rule, and files that do not fit."""

import collections
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from datasets import cub as cub_module
from datasets.classification import open_classification
from datasets.coco import load_coco, load_keypoints
from datasets.cub import load_cub
from datasets.retrieval import open_retrieval
from utils import UserError

REAL = Path(__file__).parents[2] / "shared/real"
CUB, CUB_LISTS, COCO = REAL / "CUB_200_2011", REAL / "CUB_200_2011_lists", REAL / "coco"
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


@pytest.mark.skipif(not CUB_LISTS.is_dir(), reason=f"needs the lists {CUB_LISTS}")
def test_cub_whole_has_one_part_outside_of_its_picture(tmp_path, monkeypatch):
    """The lists of all 11,788 images, and their sizes from a list, in place of the pictures' headers."""
    for name in ("images.txt", "train_test_split.txt", "parts"):
        (tmp_path / name).symlink_to(CUB_LISTS / name)
    (tmp_path / "images").mkdir()
    rows = [line.rsplit(None, 2) for line in (CUB_LISTS / "image_sizes.txt").read_text().splitlines()]
    sizes = {str(tmp_path / "images" / name): (int(width), int(height)) for name, width, height in rows}
    monkeypatch.setattr(cub_module, "picture_size", sizes.__getitem__)
    dataset = load_cub(tmp_path)
    assert (dataset.num_patches, len(dataset), dataset.num_outside) == (30543, 11231, 1)
    assert "1 of 141407 visible keypoints" in dataset.notes[0] and ", part 4) at" in dataset.notes[0]
    monkeypatch.setattr(cub_module, "picture_size", lambda path: (sizes[path][0] // 2, sizes[path][1] // 2))
    expect_line(["of 141407 visible keypoints lie outside", "part_locs.txt, image 1, part "], load_cub, tmp_path)


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
def test_cub_order_is_that_of_images_then_parts():
    dataset = load_cub(CUB)
    listed = [str(CUB / "images" / line.split()[1]) for line in (CUB / "images.txt").read_text().splitlines()]
    positions = [listed.index(image.path) for image in dataset.images]
    assert positions == sorted(positions)
    assert all(list(image.labels) == sorted(image.labels) for image in dataset.images)


@needs_coco
@pytest.mark.parametrize("split, count", [("train", 79), ("val", 72)])
def test_coco_known_counts(split, count):
    dataset = load_coco(COCO, split)
    assert dataset.classes == ["nose", "right_wrist", "left_ankle"]
    assert dataset.num_patches == count
    assert dataset.num_outside == 0 and dataset[0][0].shape[1:] == (3, 224, 224)


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


@needs_cub
@needs_coco
def test_keypoints_of_retrieval():
    def classes(name, path, keypoints):
        return open_retrieval(name, path, keypoints, 0.5, None, 0).classes
    assert classes("cub", CUB, None) == load_cub(CUB).classes
    assert classes("cub", CUB, ["all"]) == load_cub(CUB, keypoints=ALL_PARTS).classes
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
    dataset = load_cub(cub, keypoints=(3, 1, 2))
    assert dataset.classes == ["tail", "left eye", "beak"]
    assert [(Path(image.path).name, image.boxes, image.labels) for image in dataset.images] == [
        ("1.jpg", [(-15, -15, 35, 35), (85, -15, 135, 35)], [1, 2]),
        ("3.jpg", [(35, 85, 85, 135), (35, -15, 85, 35)], [0, 2])]
    assert len(load_cub(cub, "train", (1, 2))) == 1
    with pytest.raises(UserError, match="no patch of the parts 1, 2 is left"):
        load_cub(cub, "test", (1, 2))


@pytest.mark.parametrize("name, line, bad, words", [
    ("parts/part_locs.txt", 4, b"2 1 10.0 ten 1", ["line 4: '2 1 10.0 ten 1' is not a line"]),
    ("parts/part_locs.txt", 2, b"1 2 nan 10 1", ["1 of 4 visible keypoints", "image 1, part 2", "(nan, 10)"]),
    ("images.txt", 3, b"", ["image 3 is in one of", "images.txt and", "part_locs.txt only", "both shortened"]),
    ("images.txt", 2, b"2 001.B\xefrd/2.jpg", ["images.txt is not UTF-8"]),
    ("parts/part_locs.txt", 9, b"", ["part_locs.txt has 8 rows, not 3 x 3"]),
    ("train_test_split.txt", 3, b"", ["image 3 is in one of", "train_test_split.txt only"]),
])
def test_cub_bad_lines(cub, name, line, bad, words):
    lines = (cub / name).read_bytes().split(b"\n")
    lines[line - 1] = bad
    (cub / name).write_bytes(b"\n".join(lines))
    expect_line(words, load_cub, cub, "train", (1, 2, 3))


def expect_line(words, function, *arguments):
    with pytest.raises(UserError) as error:
        function(*arguments)
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize("name", ["images.txt", "parts/part_locs.txt", "train_test_split.txt", "images"])
def test_cub_missing_files(cub, name):
    shutil.rmtree(cub / name) if name == "images" else (cub / name).unlink()
    expect_line([str(cub / name), "--data-path", "parts/part_locs.txt", "images/CLASS/*.jpg"],
                load_cub, cub, "train", (1, 2))


def test_cub_parts_that_do_not_fit(cub):
    expect_line(["part 11", "1 left eye, 2 beak, 3 tail"], load_cub, cub)
    expect_line(["named twice", "1, 2, 1"], load_cub, cub, None, (1, 2, 1))
    # One part alone has no distance to another.
    expect_line(["parts 1 ", "two or more"], load_cub, cub, None, (1,))


def test_cub_without_a_split_file_or_an_image(cub):
    (cub / "train_test_split.txt").unlink()
    assert load_cub(cub, keypoints=(1, 2, 3)).num_patches == 4
    (cub / "images/001.Bird/3.jpg").unlink()
    expect_line(["3.jpg cannot be decoded (No such file"], load_cub, cub, None, (1, 2, 3))


def test_cub_cropped_to_boxes_is_refused(cub):
    """Sizes are those of the split's own pictures."""
    Image.new("RGB", (100, 80)).save(cub / "images/001.Bird/3.jpg")
    expect_line(["1 of 5 visible keypoints", "image 3, part 3", "(60, 110) of 100 x 80 pixels", "resized, cropped"],
                load_cub, cub, None, (1, 2, 3))
    expect_line(["1 of 4 visible"], load_cub, cub, "train", (1, 2))
    Image.new("RGB", (150, 150)).save(cub / "images/001.Bird/3.jpg")
    assert load_cub(cub, keypoints=(1, 2)).num_outside == 0


def test_samples_of_images(cub, zoo):
    def opened(num_images, seed):
        return [image.path for image in open_retrieval("cub", cub, ["1", "2", "3"], 0.5, num_images, seed).images]
    assert len(opened(None, 0)) == len(opened(9, 0)) == 2
    assert {*opened(1, 0), *opened(1, 1), *opened(1, 2), *opened(1, 3)} == {*opened(None, 0)}
    files = [zoo[0]], [zoo[1]], ["cat", "dog"]
    sets = open_classification("keypoints", None, files=files, num_images=3)
    assert [len(dataset) for dataset in sets] == [3, 1] and sets[0].classes == ["eye", "tail", "paw"]


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
        "images": [{"id": number, "file_name": f"{number}.jpg", "width": 150, "height": 150}
                   for number in (30, 20, 10)],
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
    expect_line([str(path), "not a COCO keypoints file", "line 2 column 13"], load_coco, coco[0])
    path.write_bytes(b"\x1f\x8b\xff\x00")
    expect_line([str(path), "not a COCO keypoints file"], load_coco, coco[0])


@pytest.mark.parametrize("spoil, words", [
    (lambda c: c["annotations"][0]["keypoints"].pop(), ["annotation 1 has 50 keypoint values", "expected 51"]),
    (lambda c: c["annotations"][0]["keypoints"].__setitem__(1, float("inf")), ["1 of 7 visible", "(10, inf)"]),
    (lambda c: c["annotations"][0].update(image_id=99), ["annotation 1", "image 99"]),
    (lambda c: c["images"].append(c["images"][0]), ["two of its images have the same id"]),
    (lambda c: c.pop("images"), ["not a COCO keypoints file", "'images'"]),
    (lambda c: c["categories"].append({"id": 2, "name": "bicycle"}), ["category bicycle has no keypoints",
                                                                      "choose --category from person"]),
    (lambda c: c["annotations"][0]["keypoints"].__setitem__(0, 5010), ["1 of 7 visible keypoints lie outside",
                                                                       "annotation 1, keypoint joint1", "150 x 150"]),
    (lambda c: [a.update(keypoints=[1 if i % 3 == 2 else v for i, v in enumerate(a["keypoints"])])
                for a in c["annotations"]], ["none of its keypoints has visibility 2", "85 have another"]),
    (lambda c: [a.update(keypoints=[v if i % 3 == 2 else v / 150 for i, v in enumerate(a["keypoints"])])
                for a in c["annotations"]], ["the largest coordinate of a visible keypoint is 0.866667", "in pixels"]),
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
    expect_line(["val2017", "--data-path", "annotations/person_keypoints_val2017.json"], load_coco, root, "val")


@needs_coco
def test_the_person_file_as_ones_own_gives_the_patches_of_coco():
    files = [COCO / f"annotations/person_keypoints_{split}2017.json" for split in ("train", "val")]
    folders = [COCO / f"images/{split}2017" for split in ("train", "val")]
    ours = open_retrieval("keypoints", None, ["nose", "11", "left_ankle"], 0.5, None, 0,
                          files=(files[:1], folders[:1], None))
    official = load_coco(COCO)
    assert ours.images == official.images and ours.classes == official.classes == ["nose", "right_wrist", "left_ankle"]
    assert ours.load.keywords == {"upright": True} and official.load.keywords == {"upright": False}
    both = open_classification("keypoints", None, keypoints=["1", "11", "16"], files=(files, folders, None))
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
        return open_retrieval("keypoints", None, keypoints, 0.5, None, 0, files=(zoo[:1], zoo[1:], categories))
    pooled = dataset(["cat", "dog"])
    assert pooled.classes == ["eye", "tail", "paw"] and len(pooled) == 9 and pooled.num_patches == 27
    assert [Path(image.path).name for image in dataset(["dog"]).images] == ["2.png", "4.png", "6.png", "8.png"]
    assert dataset(["cat"], ["paw", "1"]).classes == ["paw", "eye"]
    assert dataset(["fish"]).classes == ["fin", "gill", "eye"]
    expect_line(["cat and fish have different keypoints", "--category from cat, dog, fish"], dataset, None)
    expect_line(["no category 'cow'", "cat, dog, fish"], dataset, ["cow"])


def test_one_file_is_split_by_image(zoo):
    def split(seed, **options):
        files = zoo[:1], zoo[1:], ["cat", "dog"]
        return [part.files() for part in open_classification("keypoints", None, files=files, seed=seed, **options)]
    train, test = split(0)
    assert len(test) == 1 and len(train) == 8 and not set(train) & set(test)
    assert split(0) == [train, test] and any(split(seed)[1] != test for seed in range(1, 5))
    expect_line(["--keypoints", "imagenet"], open_classification, "imagenet", zoo[1], 0.5, 224, ["eye"])


def change(path, function):
    content = json.loads(path.read_text())
    function(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("number", [1, 2])
def test_own_objects_are_apart_whatever_their_ids(zoo, number):
    """Two animals 3 pixels apart with the ids 1 and 2, or both 1: each has its patches."""
    def add(content):
        first = content["annotations"][0]
        near = [value + 3 * (place % 3 == 0) for place, value in enumerate(first["keypoints"])]
        content["annotations"][:1] = [first | {"id": 1}, first | {"id": number, "keypoints": near}]
    change(zoo[0], add)
    image = load_keypoints(*zoo, ["cat"]).images[0]
    assert image.labels == [0, 1, 2] * 2 and image.boxes[0][0] + 3 == image.boxes[3][0]


def test_a_visible_keypoint_at_the_corner_is_a_missing_one(zoo):
    change(zoo[0], lambda content: content["annotations"][2]["keypoints"].__setitem__(slice(3, 5), (0, 0)))
    expect_line(["annotation 3030, keypoint tail", "visible at (0, 0)", "a missing point has visibility 0"],
                load_keypoints, *zoo, ["cat"])
    assert load_keypoints(*zoo, ["dog"]).num_patches == 12


def test_own_sizes_come_from_the_file_else_from_the_upright_picture(zoo):
    """A stated size that no frame of the picture has shows when it is decoded."""
    def state(width, height):
        return lambda content: [image.update(width=width, height=height) for image in content["images"]]
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (160, 180)).save(zoo[1] / "1.png", exif=exif)  # upright 180 x 160
    plain = load_keypoints(*zoo, ["cat"])
    assert plain.images[0].size is None and plain.load(plain.images[0].path).size == (180, 160)
    change(zoo[0], state(180, 160))
    stated = load_keypoints(*zoo, ["cat"])
    assert stated.images[0].size == (180, 160) and torch.equal(stated[0][0], plain[0][0])
    change(zoo[0], state(360, 320))
    expect_line(["1.png has 160 x 180 pixels, its annotation says 360 x 320"],
                load_keypoints(*zoo, ["cat"]).__getitem__, 0)
    change(zoo[0], state(120, 110))
    expect_line(["5 of 15 visible keypoints", "annotation 1030, keypoint tail", "(130, 20) of 120 x 110"],
                load_keypoints, *zoo, ["cat"])


def test_up_to_one_in_a_hundred_keypoints_outside_are_counted(zoo):
    def add(content):
        first = content["annotations"][0]
        outside = first | {"id": 30, "keypoints": [-1, *first["keypoints"][1:]]}
        content["annotations"] += [outside, *(first | {"id": number} for number in range(1, 29))]
    change(zoo[0], add)
    assert load_keypoints(*zoo, ["cat", "dog"]).num_outside == 1
    parts = open_classification("keypoints", None, files=([zoo[0]], [zoo[1]], ["cat", "dog"]))
    assert [(part.num_outside, len(part.notes)) for part in parts] == [(1, 1), (0, 0)]
    assert "visible keypoints lie outside of their pictures, the first" in parts[0].notes[0]


def test_as_many_files_as_the_task_takes(zoo):
    expect_line(["--annotations takes one FILE", "2 and 1 were given"],
                open_retrieval, "keypoints", None, None, 0.5, None, 0, 224, ([zoo[0]] * 2, zoo[1:], None))


def test_own_keypoints_through_both_scripts(zoo, tmp_path, launch):
    import classify
    import retrieval
    options = ["--model", "timm/vit_tiny_patch16_224", "--weights", "random", "--workers", 0, "--output-dir", tmp_path,
               "--dataset", "keypoints", "--annotations", zoo[0], "--images", zoo[1], "--category", "cat", "dog"]
    launch(retrieval.main, [*options, "--keypoints", "eye", "paw"])
    launch(classify.main, [*options, "--epochs", 1])
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [line["dataset"] for line in lines] == ["keypoints"] * 2
    assert lines[0]["patches_per_class"] == {"eye": 9, "paw": 9}
    assert lines[1]["classes"] == ["eye", "tail", "paw"] and (lines[1]["num_train"], lines[1]["num_test"]) == (21, 3)
    for main in (retrieval.main, classify.main):
        assert "have different keypoints; choose --category" in launch(main, options[:-3], status=2)[1]
        assert "are for --dataset keypoints, not for synthetic" in launch(main, ["--images", tmp_path], status=2)[1]
