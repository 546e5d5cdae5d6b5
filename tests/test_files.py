"""A user's files as they may come: pictures of every kind, folders that hold themselves, lists with wrong lines."""

import json
import os
import re
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder

from datasets.classification import hold_out
from datasets.coco import load_coco
from datasets.cub import load_cub
from datasets.files import path_below, read_lines, read_rgb
from datasets.imagenet import list_images, load_image_folder
from datasets.pairs import load_cub_pairs, load_spair
from datasets.patches import PatchDataset, PatchImage, resize_center_crop
from datasets.prepare.__main__ import main as prepare_main
from datasets.segmentation import read_image, read_label
from datasets.segmentation_classes import read_names
from utils import UserError


def refused(words, function, *arguments):
    """The call raises a UserError of one line that holds the words in this order."""
    with pytest.raises(UserError) as caught:
        function(*arguments)
    assert re.search(".*".join(map(re.escape, words)), str(caught.value)), caught.value
    assert "\n" not in str(caught.value)


# Pictures

def test_a_16_bit_picture_is_scaled_to_8_bits(tmp_path):
    """v * 257 is the 16-bit form of the 8-bit value v, of black to white."""
    grey = np.arange(256, dtype=np.uint16).reshape(16, 16)
    for name in ("grey.png", "grey.tif"):
        Image.fromarray(grey * 257).save(tmp_path / name)
    # Pillow 10.1 reads this form and does not write it.
    (tmp_path / "grey.pgm").write_bytes(b"P5 16 16 65535\n" + (grey * 257).astype(">u2").tobytes())
    for name in ("grey.png", "grey.tif", "grey.pgm"):
        assert (np.asarray(read_rgb(tmp_path / name)) == grey[..., None]).all()
        assert (read_image(tmp_path / name) == grey[..., None]).all()


@pytest.mark.parametrize("values", [np.float32, np.int32])
def test_pictures_whose_white_is_not_known_are_refused(tmp_path, values):
    Image.fromarray(np.linspace(0, 1000, 64).reshape(8, 8).astype(values)).save(tmp_path / "depth.tif")
    one = PatchDataset([PatchImage(str(tmp_path / "depth.tif"), None, [0])], ["x"])
    refused(["depth.tif cannot be decoded", "32 bits", "--skip-bad-images"], one.__getitem__, 0)
    refused(["depth.tif cannot be decoded", "save it with 8 bits"], read_image, tmp_path / "depth.tif")


def make_special(path, kind):
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(str(path))
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/null")


@pytest.mark.parametrize("kind", ["pipe", "socket", "folder", "device"])
def test_only_regular_files_are_pictures_and_lists(tmp_path, kind):
    make_special(tmp_path / "a.png", kind)
    one = PatchDataset([PatchImage(str(tmp_path / "a.png"), None, [0])], ["x"])
    refused(["a.png cannot be decoded (not a regular file)"], one.__getitem__, 0)
    for function, options in ((read_image, ()), (read_label, (5,))):
        refused(["a.png cannot be decoded (not a regular file)"], function, tmp_path / "a.png", *options)
    refused(["a.png", "not a regular file"], read_lines, tmp_path / "a.png")


@pytest.mark.parametrize("size", [(1, 30000), (30000, 1)])
def test_absurd_shapes_are_skippable(tmp_path, size):
    """Resized to a short side of 256 it would take 5.9 GB."""
    Image.new("RGB", size).save(tmp_path / "long.png")
    Image.new("RGB", (300, 300)).save(tmp_path / "b.png")
    images = [PatchImage(str(tmp_path / name), None, [0]) for name in ("long.png", "b.png")]
    refused(["long.png cannot be decoded", f"{size[0]} x {size[1]} pixels", "--skip-bad-images"],
            PatchDataset(images, ["x"], resize_center_crop()).__getitem__, 0)
    skipping = PatchDataset(images, ["x"], resize_center_crop(), skip_bad_images=True)
    assert [ids.tolist() for _, ids in skipping.batches(range(2), 4, 0)] == [[1]]
    refused(["long.png cannot be decoded"], read_image, tmp_path / "long.png")


@pytest.mark.parametrize("box", [(0, 0, 10**6, 10**6), (10**12, 0, 10**12 + 20, 20)])
def test_crops_that_cannot_be_are_skippable(tmp_path, box):
    Image.new("RGB", (30, 30)).save(tmp_path / "a.png")
    images = [PatchImage(str(tmp_path / "a.png"), [box], [0])]
    refused(["a.png cannot be decoded", "--skip-bad-images"], PatchDataset(images, ["x"]).__getitem__, 0)
    assert len(PatchDataset(images, ["x"], skip_bad_images=True)[0][1]) == 0


# Folders

@pytest.fixture
def linked(tmp_path):
    """train/{cat,dog}, an image store behind a link, and links that lead back up."""
    for name, count in (("train/cat", 2), ("train/dog/deep", 3), ("store", 2)):
        (tmp_path / name).mkdir(parents=True)
        for number in range(count):
            Image.new("RGB", (8, 8)).save(tmp_path / name / f"{Path(name).name}{number}.png")
    (tmp_path / "train/bird").symlink_to(tmp_path / "store")
    plain = ImageFolder(tmp_path / "train").samples
    (tmp_path / "train/cat/again").symlink_to(tmp_path / "train")
    (tmp_path / "train/dog/deep/up").symlink_to("..")
    return tmp_path, plain


def test_links_that_lead_back_multiply_no_image(linked):
    root, plain = linked
    dataset = load_image_folder(root, "train", resize_center_crop())
    assert [(image.path, *image.labels) for image in dataset.images] == plain and len(plain) == 7
    assert list_images(root / "train") == sorted(path for path, _ in plain)


def test_two_classes_of_one_folder(linked):
    root, _ = linked
    (root / "train/crow").symlink_to(root / "store")
    refused(["crow holds no image (1 of 4 class folders", "links to others"], load_image_folder, root, "train", None)


# Held-out images

def test_held_out_images_leave_every_class_some_training():
    def dataset(*counts):
        return PatchDataset([PatchImage("", None, [label]) for label, count in enumerate(counts) for _ in range(count)],
                            [f"class {label}" for label in range(len(counts))])
    refused(["held out by --seed 0 are all that 1 classes have to train on", "class 0"], hold_out, dataset(1), 0)
    left = torch.randperm(20, generator=torch.Generator().manual_seed(0))[:2]
    counts = [1] * 20
    refused(["all that 2 classes have", f"class {int(left.min())}"], hold_out, dataset(*counts), 0)
    assert hold_out(dataset(30, 30), 0).sum() == 6


# Lists

@pytest.fixture
def cub(tmp_path):
    root = tmp_path / "CUB_200_2011"
    (root / "parts").mkdir(parents=True)
    (root / "images/001.Bird").mkdir(parents=True)
    (root / "images.txt").write_text("".join(f"{i} 001.Bird/{i}.jpg\n" for i in (1, 2, 3)))
    (root / "train_test_split.txt").write_text("1 1\n2 0\n3 0\n")
    (root / "bounding_boxes.txt").write_text("".join(f"{i} 5 5 100 100\n" for i in (1, 2, 3)))
    (root / "parts/parts.txt").write_text("1 left eye\n2 beak\n")
    (root / "parts/part_locs.txt").write_text("".join(f"{i} 1 10 10 1\n{i} 2 110 10 1\n" for i in (1, 2, 3)))
    for i in (1, 2, 3):
        Image.new("RGB", (150, 150)).save(root / f"images/001.Bird/{i}.jpg")
    return root


@pytest.mark.parametrize("name, line, bad, words", [
    ("parts/part_locs.txt", 3, b"2 1 nan 10 1", ["line 3", "'2 1 nan 10 1' instead of 'image_id part_id x y visible'"]),
    ("parts/part_locs.txt", 3, b"2 1 10 -inf 1", ["line 3", "-inf"]),
    ("parts/part_locs.txt", 3, b"2 1 10 10 2", ["line 3", "'2 1 10 10 2'"]),
    ("parts/part_locs.txt", 3, b"1 2 90 10 1", ["line 3: (1, 2) is on line 2 already"]),
    ("parts/parts.txt", 2, b"1 beak", ["line 2: 1 is on line 1 already"]),
    ("images.txt", 2, b"1 001.Bird/2.jpg", ["line 2: 1 is on line 1 already"]),
    ("images.txt", 2, b"2 001.Bird/1.jpg", ["line 2: 001.Bird/1.jpg is on line 1 already"]),
    ("images.txt", 2, b"2 001.B\xefrd/2.jpg", ["line 2: it is not UTF-8"]),
    ("images.txt", 2, b"2 ../../evil.jpg", ["line 2: '../../evil.jpg' is not the name of a file in"]),
    ("images.txt", 2, b"2 /etc/passwd", ["line 2: '/etc/passwd' is not the name"]),
    ("train_test_split.txt", 2, b"1 0", ["line 2: 1 is on line 1 already"]),
    ("train_test_split.txt", 2, b"2 2", ["line 2", "'2 2'"]),
])
def test_wrong_lines_of_cub(cub, name, line, bad, words):
    assert load_cub(cub, "train", (1, 2)).num_patches == 2
    lines = (cub / name).read_bytes().split(b"\n")
    lines[line - 1] = bad
    (cub / name).write_bytes(b"\n".join(lines))
    refused([name, *words], load_cub, cub, "train", (1, 2))
    refused([name, *words], load_cub_pairs, cub, 32, 10)


@pytest.mark.parametrize("bad, words", [("2 5 nan 100 100", ["line 2", "nan"]), ("2 5 5 inf 100", ["line 2", "inf"]),
                                        ("1 5 5 100 100", ["line 2: 1 is on line 1 already"])])
def test_wrong_boxes_of_cub(cub, bad, words):
    assert len(load_cub_pairs(cub, 32, 10).pairs) == 2
    (cub / "bounding_boxes.txt").write_text(f"1 5 5 100 100\n{bad}\n3 5 5 100 100\n")
    refused(["bounding_boxes.txt", *words], load_cub_pairs, cub, 32, 10)


@pytest.fixture
def coco(tmp_path):
    """(root, content, function that writes it and loads it)."""
    points = [0, 0, 0] * 17
    points[:3], points[30:33] = [10, 10, 2], [110, 10, 2]
    content = {"images": [{"id": 1, "file_name": "1.jpg"}, {"id": 2, "file_name": "2.jpg"}],
               "annotations": [{"id": 10 + i, "image_id": i, "category_id": 1, "keypoints": list(points)}
                               for i in (1, 2)],
               "categories": [{"id": 1, "name": "person", "keypoints": [f"joint{i}" for i in range(1, 18)]}]}
    (tmp_path / "annotations").mkdir()
    (tmp_path / "images/train2017").mkdir(parents=True)

    def load():
        (tmp_path / "annotations/person_keypoints_train2017.json").write_text(json.dumps(content))
        return load_coco(tmp_path)
    return content, load


@pytest.mark.parametrize("spoil, words", [
    (lambda c: c["annotations"][1]["keypoints"].__setitem__(0, float("nan")), ["annotation 12", "not finite"]),
    (lambda c: c["annotations"][1]["keypoints"].__setitem__(1, float("inf")), ["annotation 12", "not finite"]),
    (lambda c: c["annotations"][1]["keypoints"].__setitem__(0, None), ["annotation 12"]),
    (lambda c: c["annotations"][1]["keypoints"].__setitem__(0, [1, 2]), ["annotation 12"]),
    (lambda c: c["annotations"][1]["keypoints"].__setitem__(0, 10**400), ["annotation 12"]),
    (lambda c: c["annotations"][1].update(keypoints=None), ["annotation 12"]),
    (lambda c: c["annotations"][1].update(id=11), ["annotation 11", "id is used twice"]),
    (lambda c: c["annotations"][1].update(id="a"), ["annotation a", "whole number"]),
    (lambda c: c["annotations"][1].update(id=None), ["annotation None", "whole number"]),
    (lambda c: c["annotations"][1].update(image_id=[1]), ["not a COCO keypoints file"]),
    (lambda c: c["annotations"].append(None), ["not a COCO keypoints file"]),
    (lambda c: c.update(annotations=None), ["not a COCO keypoints file"]),
    (lambda c: c.update(images=[None]), ["not a COCO keypoints file"]),
    (lambda c: c["images"][1].update(id=1), ["image 1 is listed twice"]),
    (lambda c: c["images"][1].update(file_name="1.jpg"), ["two images have one file_name"]),
    (lambda c: c["images"][1].update(file_name=None), ["image 2: None is not the name of a file"]),
    (lambda c: c["images"][1].update(file_name="../val2017/2.jpg"), ["image 2: '../val2017/2.jpg' is not the name"]),
    (lambda c: c["images"][1].update(file_name="/etc/passwd"), ["image 2: '/etc/passwd' is not the name"]),
    (lambda c: c["categories"][0].update(keypoints=[None] * 17), ["names of its keypoints"]),
    (lambda c: c["categories"][0].update(keypoints=None), ["not a COCO keypoints file"]),
    (lambda c: c.update(categories=None), ["not a COCO keypoints file"]),
])
def test_wrong_entries_of_coco(coco, spoil, words):
    content, load = coco
    assert load().num_patches == 4
    spoil(content)
    refused(["person_keypoints_train2017.json", *words], load)


def test_json_without_end(tmp_path, coco):
    content, load = coco
    load()
    (tmp_path / "annotations/person_keypoints_train2017.json").write_text("[" * 100_000)
    refused(["person_keypoints_train2017.json", "not a COCO keypoints file"], load_coco, tmp_path)


@pytest.mark.parametrize("change, words", [
    ({"src_kps": [[float("nan"), 2]]}, ["nan is not finite"]),
    ({"trg_bndbox": [0, 0, 9, float("inf")]}, ["inf is not finite"]),
    ({"src_kps": [[10**400, 2]]}, ["int too large"]), ({"src_kps": None}, ["TypeError"]),
    ({"truncation": -1}, ["KeyError: -1"]), ({"truncation": None}, ["KeyError"]),
    ({"category": 3}, ["3 is not the name"]), ({"category": "../cat"}, ["'../cat' is not the name"]),
    ({"src_imname": "../../a.jpg"}, ["is not the name of a file"]),
    ({"trg_imname": "/etc/passwd"}, ["'/etc/passwd' is not the name"]), ({"trg_imname": ""}, ["'' is not the name"]),
])
def test_wrong_annotations_of_spair(tmp_path, change, words):
    (tmp_path / "JPEGImages/cat").mkdir(parents=True)
    (tmp_path / "PairAnnotation/test").mkdir(parents=True)
    for name in "ab":
        Image.new("RGB", (50, 50)).save(tmp_path / f"JPEGImages/cat/{name}.jpg")
    pair = {"category": "cat", "src_imname": "a.jpg", "trg_imname": "b.jpg", "src_kps": [[1, 2]], "trg_kps": [[3, 4]],
            "trg_bndbox": [0, 0, 40, 40], "truncation": 1}
    path = tmp_path / "PairAnnotation/test/1-a-b_cat.json"
    path.write_text(json.dumps(pair))
    assert len(load_spair(tmp_path, 32).pairs) == 1
    path.write_text(json.dumps(pair | change))
    refused([path.name, *words], load_spair, tmp_path, 32)


def test_wrong_lines_of_spair(tmp_path):
    (tmp_path / "PairAnnotation/test").mkdir(parents=True)
    layout = tmp_path / "Layout/large/test.txt"
    layout.parent.mkdir(parents=True)
    for text, words in ((b"a\na\n", ["pair a is listed twice"]), (b"ok\n\xff\n", ["line 2: it is not UTF-8"]),
                        (b"../../evil\n", ["'../../evil.json' is not the name"])):
        layout.write_bytes(text)
        refused(["test.txt", *words], load_spair, tmp_path, 32)


def test_lists_of_names_are_utf8(tmp_path):
    path = tmp_path / "names.txt"
    path.write_bytes("\ufeffTür\r\nhat\n".encode())
    assert read_names(path) == ("Tür", "hat")
    path.write_bytes("hat\nTür\n".encode("latin-1"))
    refused(["names.txt, line 2: it is not UTF-8 text"], read_names, path)


@pytest.mark.parametrize("name", ["../evil", "/tmp/evil", "a/b", "..\\evil"])
def test_prepared_files_stay_in_their_folder(tmp_path, name, launch):
    pytest.importorskip("scipy")
    source, target = tmp_path / "VOC2010", tmp_path / "out"
    for folder in ("Annotations_Part", "JPEGImages", "ImageSets/Main"):
        (source / folder).mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(source / "evil.jpg")
    (source / "ImageSets/Main/train.txt").write_text(f"{name}\n")
    (source / "ImageSets/Main/val.txt").write_text("b\n")
    _, err = launch(lambda: prepare_main(["pascal-part", "--source", str(source), "--target", str(target)]), [], 1, 2)
    assert err.count("\n") == 1 and "train.txt" in err and repr(name) in err and not target.exists()


def test_links_out_of_the_data_set_are_followed_and_names_are_not(tmp_path):
    """A link to a store of images is common; a name that leaves the folder is not."""
    (tmp_path / "store").mkdir()
    (tmp_path / "data").mkdir()
    (tmp_path / "data/images").symlink_to(tmp_path / "store")
    Image.new("RGB", (8, 8)).save(tmp_path / "store/a.png")
    assert read_rgb(path_below(tmp_path / "data", "images/a.png", "list")).size == (8, 8)
    for name in ("../store/a.png", "images/../../a.png", str(tmp_path / "store/a.png"), "", ".", "a\0b", None, 3):
        refused(["list", repr(name)], path_below, tmp_path / "data", name, "list")
