"""Label maps: files of every kind, pairs with images, and what is refused before anything is trained on them."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from datasets.label_maps import check_labels, pair_files, read_label_map, reduce_label, require_labelled
from datasets.segmentation import open_segmentation
from datasets.segmentation_store import PixelStore
from utils import UserError

CPU = torch.device("cpu")


def read_label(path, largest):
    return reduce_label(read_label_map(path, largest))


def write_pair(images, labels, name="a", size=(24, 16), label=1):
    for folder in (images, labels):
        folder.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, "red").save(images / f"{name}.jpg")
    Image.new("L", size, label).save(labels / f"{name}.png")


def write_folder(root, train, val, names="left\nright\n"):
    """Label maps whose pixels have the given numbers in turn."""
    for split, maps in (("train", train), ("val", val)):
        for i, values in enumerate(maps):
            write_pair(root / f"images/{split}", root / f"labels/{split}", str(i))
            label = np.resize(np.array(values, np.uint8), (16, 24))
            Image.fromarray(label).save(root / f"labels/{split}/{i}.png")
    (root / "names.txt").write_text(names)
    return [open_segmentation("folder", root, split) for split in ("train", "val")]


def test_reduced_labels_are_those_of_the_reference():
    cases = torch.load(Path(__file__).parent / "golden/segmentation/labels.pt", weights_only=True)["cases"]
    for case in cases:
        assert np.array_equal(reduce_label(case["raw"].numpy()), case["reduced"].numpy())


def test_kinds_of_label_files(tmp_path):
    """Palette, 16-bit and 1-bit files give their numbers; colours and JPEG are refused."""
    values = np.array([[0, 1, 2], [3, 255, 5]], dtype=np.uint8)
    expected = np.array([[255, 0, 1], [2, 255, 4]], dtype=np.uint8)
    palette = Image.fromarray(values).convert("P")
    palette.putdata(values.ravel().tolist())
    palette.putpalette(np.random.default_rng(0).integers(0, 256, 768, dtype=np.uint8).tobytes())
    files = {"grey": Image.fromarray(values), "palette": palette, "16": Image.fromarray(values.astype(np.uint16))}
    for name, image in files.items():
        image.save(tmp_path / f"{name}.png")
        assert np.array_equal(read_label(tmp_path / f"{name}.png", 5), expected), name
    Image.fromarray(values > 2).save(tmp_path / "bits.png")
    assert np.array_equal(read_label(tmp_path / "bits.png", 5), np.where(values > 2, 0, 255))
    Image.fromarray(values.astype(np.uint16) * 200).save(tmp_path / "large.png")
    with pytest.raises(UserError, match="label 51000 is above"):
        read_label(tmp_path / "large.png", 5)
    Image.new("RGB", (3, 2)).save(tmp_path / "colour.png")
    with pytest.raises(UserError, match="colour.png is a picture of mode RGB"):
        read_label(tmp_path / "colour.png", 5)
    Image.new("L", (3, 2), 1).save(tmp_path / "a.png", "JPEG")
    with pytest.raises(UserError, match="a.png is a JPEG file; save the label map as PNG"):
        read_label(tmp_path / "a.png", 5)


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
def test_grey_files_of_few_bits_give_their_numbers(tmp_path, depth):
    """Pillow scales 2 and 4 bits to 0 to 255; it cannot write them, so the file is put together here."""
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    largest = min(2**depth - 1, 20)
    values = np.arange(16 * 3).reshape(3, 16) % (largest + 1)
    bits = (values[..., None] >> np.arange(depth)[::-1] & 1).astype(np.uint8).reshape(3, -1)
    rows = b"".join(b"\0" + np.packbits(row).tobytes() for row in bits)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 16, 3, depth, 0, 0, 0, 0))
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows))
                                     + chunk(b"IEND", b""))
    assert np.array_equal(read_label(tmp_path / "a.png", 20), np.where(values == 0, 255, values - 1))


@pytest.mark.parametrize(("label_size", "turned"), [((16, 24), True), ((24, 16), False)])
def test_the_label_map_says_whether_an_image_is_turned(tmp_path, label_size, turned):
    pixels = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)
    exif = Image.Exif()
    for orientation, expected in ((6, np.rot90(pixels, -1) if turned else pixels), (3, np.rot90(pixels, 2))):
        folder = tmp_path / str(orientation)
        write_pair(folder / "img/val", folder / "ann/val", size=label_size if orientation == 6 else (24, 16))
        (folder / "img/val/a.jpg").unlink()
        exif[0x0112] = orientation
        Image.fromarray(pixels).save(folder / "img/val/a.png", exif=exif)
        split = open_segmentation("lip", folder, "val")
        image, label = split.load(0)
        assert np.array_equal(image, expected) and split.sizes(0) == [label.shape] == [image.shape[:2]]


def test_an_image_of_another_size_than_its_label_map_is_named(tmp_path):
    write_pair(tmp_path / "img/val", tmp_path / "ann/val")
    Image.new("RGB", (12, 8)).save(tmp_path / "img/val/a.jpg")
    split = open_segmentation("lip", tmp_path, "val")
    with pytest.raises(UserError, match="img/val/a.jpg has 12 x 8 pixels, its label map .*ann/val/a.png 24 x 16"):
        split.sizes(0)
    with pytest.raises(UserError, match="a.jpg has 12 x 8 pixels, its annotation says 24 x 16"):
        split.load(0)


def test_files_without_a_partner(tmp_path):
    write_pair(tmp_path / "a", tmp_path / "b", name="x")
    write_pair(tmp_path / "c", tmp_path / "d", name="y")
    with pytest.raises(UserError, match="1 images have no label map in .*, the first x"):
        pair_files(tmp_path / "a", tmp_path / "d")
    Image.new("RGB", (24, 16)).save(tmp_path / "a/x.png")
    with pytest.raises(UserError, match="a holds 2 files .* of 1 names"):
        pair_files(tmp_path / "a", tmp_path / "b")


def test_files_that_are_no_images(tmp_path):
    """Hidden ones are passed over, those of other suffixes are counted."""
    write_pair(tmp_path / "a", tmp_path / "b")
    for name in ("a/.hidden.jpg", "a/._a.jpg", "a/b.bmp", "a/c.tif", "a/d.tif", "b/._a.png"):
        (tmp_path / name).touch()
    for name in ("a/__MACOSX", "a/.ipynb_checkpoints"):
        (tmp_path / name).mkdir()
    pairs, notes = pair_files(tmp_path / "a", tmp_path / "b")
    assert [image.name for image, _ in pairs] == ["a.jpg"]
    assert notes == [f"3 files were not read (another suffix), the first {tmp_path / 'a/b.bmp'}"]


@pytest.mark.parametrize("line", ["0 the sky", "0\tthe sky", "0: the sky", "0 : the sky", "0:the sky"])
def test_label_0_is_named_with_a_space_or_a_colon(tmp_path, line):
    train, _ = write_folder(tmp_path, [[0, 1]], [[0, 1]], f"{line}\nleft\n")
    assert train.names == ("the sky", "left") and np.unique(train.load(0)[1]).tolist() == [0, 1]


def test_names_one_line_off_are_refused(tmp_path):
    lines = []
    with pytest.raises(UserError, match=r"label 0 occurs .* label 2, right, never: .* \"0 NAME\""):
        check_labels(*write_folder(tmp_path / "off", [[0, 1]], [[1, 1]]), 0, lines.append)
    for name, train, val, names in (("zero", [[1, 0]], [[0, 0]], "0 left\nright\ntop\n"),
                                    ("last", [[0, 1]], [[2]], "left\nright\n"),
                                    ("none", [[1, 1]], [[1, 255]], "left\nright\n")):
        check_labels(*write_folder(tmp_path / name, train, val, names), 0, lines.append)
    assert not lines
    _, val = write_folder(tmp_path / "test", [[0, 2]], [[0, 1]])
    check_labels(None, val, 0, lines.append)  # the last label may be in the training maps
    assert "label 0 occurs" in lines.pop()
    write_folder(tmp_path / "drawn", [[0, 1]] * 3, [[0, 1]] * 3)
    drawn = [open_segmentation("folder", tmp_path / "drawn", part, 2) for part in ("train", "val")]
    check_labels(*drawn, 0, lines.append)
    assert "label 0 occurs" in lines.pop()


def test_label_maps_without_a_label_are_refused(tmp_path):
    for name, train, val, what in (("a", [[0], [255]], [[1]], "training"), ("b", [[1, 2]], [[0, 255]], "test")):
        train, val = write_folder(tmp_path / name, train, val)
        with pytest.raises(UserError, match=f"no pixel of the {what} label maps has a class"):
            check_labels(train, val, 2, print)
    with pytest.raises(UserError, match="no pixel of the training label maps"):
        PixelStore(open_segmentation("folder", tmp_path / "a", "train"), (32, 32), CPU, tmp_path)
    train, val = write_folder(tmp_path / "held", [[1, 2], [255]], [[1, 2]])
    with pytest.raises(UserError, match="no pixel of the held-out label maps has a class"):
        check_labels(train.subset([0]), val, 0, print, train.subset([1]))
    require_labelled(torch.tensor([0, 3]), "test")
    lines = []
    train, _ = write_folder(tmp_path / "c", [[0, 3], [3, 255]], [[1]], "left\nright\ntop\n")
    store = PixelStore(train, (32, 32), CPU, tmp_path, log=lines.append)
    assert store.label_counts.tolist() == [0, 0, 2 * 16 * 12]
    assert lines[1:] == ["2 of 3 classes are in no training label map: left, right"]
