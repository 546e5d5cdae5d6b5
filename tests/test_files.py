"""A user's files as they may come: pictures of every kind and frame, images of two sets, lists."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from datasets.classification import hold_out, open_classification
from datasets.files import picture_size, read_rgb, shared_images
from datasets.pairs import load_spair
from datasets.patches import PatchDataset, PatchImage
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


@pytest.mark.parametrize("values", [np.float32, np.int32])
def test_pictures_whose_white_is_not_known_are_refused(tmp_path, values):
    Image.fromarray(np.linspace(0, 1000, 64).reshape(8, 8).astype(values)).save(tmp_path / "depth.tif")
    one = PatchDataset([PatchImage(str(tmp_path / "depth.tif"), None, [0])], ["x"])
    refused(["depth.tif cannot be decoded", "32 bits", "save it with 8 bits"], one.__getitem__, 0)


@pytest.mark.filterwarnings("error")
def test_pictures_of_which_pillow_warns(tmp_path):
    """A palette with a transparency for each colour is read in silence; under -W error a warning is a UserError."""
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    palette.save(tmp_path / "palette.png", transparency=bytes([0, 128]))
    assert read_rgb(tmp_path / "palette.png").getpixel((0, 0)) == (10, 20, 30)
    Image.new("RGB", (8, 8)).save(tmp_path / "exif.jpg", exif=b"Exif\0\0II*\0\x08\0\0\0\x05\0\x12\x01")
    refused(["exif.jpg cannot be decoded", "EXIF"], read_rgb, tmp_path / "exif.jpg", None, True)


# Frames

def save_turned(path, orientation, width=30, height=20):
    """A picture with an EXIF orientation: its pixels as stored."""
    pixels = np.random.default_rng(orientation).integers(0, 256, (height, width, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(path, exif=exif)
    return pixels


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_orientation_is_obeyed_where_upright_says_so(tmp_path, orientation):
    path = tmp_path / "a.png"
    stored = save_turned(path, orientation)
    with Image.open(path) as image:
        upright = np.asarray(ImageOps.exif_transpose(image))
    assert (np.asarray(read_rgb(path)) == stored).all()
    assert (np.asarray(read_rgb(path, upright=True)) == upright).all()
    assert picture_size(path) == (30, 20) and picture_size(path, upright=True) == upright.shape[1::-1]


@pytest.mark.parametrize("orientation", range(5, 9))
@pytest.mark.parametrize("upright", [False, True])
def test_the_stated_size_decides_before_upright(tmp_path, orientation, upright):
    path = tmp_path / "a.png"
    stored = save_turned(path, orientation)
    assert (np.asarray(read_rgb(path, (30, 20), upright)) == stored).all()
    assert (np.asarray(read_rgb(path, (20, 30), upright)) == np.asarray(read_rgb(path, upright=True))).all()


@pytest.mark.parametrize("orientation, width", [(2, 30), (3, 30), (4, 30), (6, 20)])
def test_upright_decides_where_both_frames_have_the_stated_size(tmp_path, orientation, width):
    """A mirrored picture, half a turn, a square."""
    path = tmp_path / "a.png"
    save_turned(path, orientation, width)
    for upright in (False, True):
        found = read_rgb(path, (width, 20), upright)
        assert found.tobytes() == read_rgb(path, upright=upright).tobytes()
    assert read_rgb(path).tobytes() != read_rgb(path, upright=True).tobytes()


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_picture_of_another_size_is_refused(tmp_path, orientation):
    save_turned(tmp_path / "a.png", orientation)
    for size in ((60, 40), (15, 10), (30, 21)):
        refused(["a.png has 30 x 20 pixels, its annotation says", "{} x {}".format(*size)],
                read_rgb, tmp_path / "a.png", size)


def test_own_pictures_are_upright_and_those_of_imagenet_as_stored(tmp_path):
    for name in ("train/cat/0.png", "val/cat/0.png"):
        (tmp_path / name).parent.mkdir(parents=True)
        save_turned(tmp_path / name, 6)
    for name, upright in (("folder", True), ("imagenet", False)):
        for dataset in open_classification(name, tmp_path):
            image = read_rgb(dataset.images[0].path, upright=upright)
            assert torch.equal(dataset[0][0][0], dataset.transform(image))


# Images of two sets

def test_test_images_that_are_training_images_are_counted(tmp_path):
    """The same file through a link, a hard link, another name; a copy, by content only."""
    for split, names in (("train", "abcde"), ("val", "fg")):
        (tmp_path / split / "cat").mkdir(parents=True)
        for name in names:
            Image.new("RGB", (8, 8), (ord(name), 0, 0)).save(tmp_path / split / "cat" / f"{name}.bmp")
    train, val = tmp_path / "train/cat", tmp_path / "val/cat"
    assert shared_images(*open_classification("folder", tmp_path), by_content=True) == 0
    (val / "linked.bmp").symlink_to(train / "a.bmp")
    (val / "hard.bmp").hardlink_to(train / "b.bmp")
    (val / "copy.bmp").write_bytes((train / "c.bmp").read_bytes())
    sets = open_classification("folder", tmp_path)
    assert (shared_images(*sets), shared_images(*sets, by_content=True)) == (2, 3)
    one, other = (PatchDataset([PatchImage(path, None, [0])], ["x"]) for path in (
        f"{train}/a.bmp", f"{train}/./a.bmp"))
    assert shared_images(one, other) == 1


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

@pytest.mark.parametrize("change, words", [
    ({"src_kps": None}, ["a.json", "TypeError"]), ({"src_kps": [["left", 2]]}, ["a.json", "'left'"]),
    ({"src_imname": None}, ["a.json", "TypeError"]), ({"trg_kps": []}, ["pair a", "0 in the target"]),
    ({"src_kps": [[float("nan"), 2]]}, ["1 of 2 visible keypoints", "pair a", "(nan, 2)"]),
    ({"trg_bndbox": [9, 0, 9, 40]}, ["pair a", "has no size"]),
])
def test_wrong_annotations_of_spair(tmp_path, change, words):
    (tmp_path / "JPEGImages/cat").mkdir(parents=True)
    (tmp_path / "PairAnnotation/test").mkdir(parents=True)
    for name in "ab":
        Image.new("RGB", (50, 50)).save(tmp_path / f"JPEGImages/cat/{name}.jpg")
    pair = {"category": "cat", "src_imname": "a.jpg", "trg_imname": "b.jpg", "src_kps": [[1, 2]], "trg_kps": [[3, 4]],
            "src_imsize": [50, 50, 3], "trg_imsize": [50, 50, 3], "trg_bndbox": [0, 0, 40, 40]}
    path = tmp_path / "PairAnnotation/test/a.json"
    path.write_text(json.dumps(pair))
    assert len(load_spair(tmp_path, 32).pairs) == 1
    path.write_text(json.dumps(pair | change))
    refused(words, load_spair, tmp_path, 32)


def test_lists_of_names_are_utf8(tmp_path):
    path = tmp_path / "names.txt"
    path.write_bytes("\ufeffTür\r\nhat\n".encode())
    assert read_names(path) == ("Tür", "hat")
    path.write_bytes("hat\nTür\n".encode("latin-1"))
    refused(["names.txt is not UTF-8 text"], read_names, path)
