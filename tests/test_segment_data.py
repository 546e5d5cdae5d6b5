"""The segmentation data sets: folders, label files, what is kept in memory, batches."""

import os
import shutil
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_label_maps import write_folder, write_pair

from datasets import segmentation_store
from datasets.files import shared_images
from datasets.segmentation import PAPER_PROTOCOLS as PROTOCOLS
from datasets.segmentation import default_iterations, in_order, open_segmentation
from datasets.segmentation_store import PixelStore, training_batches
from datasets.segmentation_transforms import rescale_size, resize_image
from datasets.synthetic import OBJECT_NAMES, PART_NAMES
from utils import UserError
from utils.storage import prefetched

REAL = Path(__file__).parents[2] / "shared" / "real"
needs_real_data = pytest.mark.skipif(not REAL.is_dir(), reason="../shared/real is not on this machine")
CPU = torch.device("cpu")
MEAN, STD = torch.full((1, 3, 1, 1), 0.5), torch.full((1, 3, 1, 1), 0.25)


def test_protocols_are_those_of_the_paper():
    """The published numbers: base scale, crop, test scale, stride, number of classes."""
    ade, pascal = ((2048, 512), 512, (2048, 512), 341), ((520, 520), 480, (3840, 480), 161)
    assert {name: tuple(PROTOCOLS[name]) for name in PROTOCOLS if "synthetic" not in name} == {
        "ade20k": ade, "ade20k-object": ade, "ade20k-part": ade, "pascal-object": pascal, "pascal-part": pascal,
        "lip": ((1024, 320), 320, (4096, 320), 161)}


def test_folders_of_ones_own(tmp_path):
    """Labels 1, 2, ... are those of the lines of names.txt; with a first line "0 NAME" 0 is a class as well."""
    for split, label in (("train", 1), ("val", 2)):
        write_pair(tmp_path / f"images/{split}", tmp_path / f"labels/{split}", label=label)
    with pytest.raises(UserError, match=r"names.txt does not exist; it is a text file of class names, one a line"):
        open_segmentation("folder", tmp_path, "val")
    raw = np.array([[0, 1, 2, 255]], np.uint8)
    for text, names, expected in (("left\nright\n", ("left", "right"), [255, 0, 1, 255]),
                                  ("0 sky\nleft\nright\n", ("sky", "left", "right"), [0, 1, 2, 255])):
        (tmp_path / "names.txt").write_text(text)
        Image.fromarray(raw).save(tmp_path / "labels/val/a.png")
        Image.new("RGB", (4, 1)).save(tmp_path / "images/val/a.jpg")
        split = open_segmentation("folder", tmp_path, "val")
        assert split.names == names and split.load(0)[1].tolist() == [expected]
        Image.fromarray(raw + np.uint8(1)).save(tmp_path / "labels/val/a.png")  # 1, 2, 3, 0
        with pytest.raises(UserError, match="label 3 is above the class count 2"):
            split.load(0)
    for text in ("left\nright\n", "0 sky\nleft\nright\n"):
        (tmp_path / "names.txt").write_text(text)
        store = PixelStore(open_segmentation("folder", tmp_path, "train"), (32, 32), CPU, tmp_path, "disk")
        assert store.pixels[0] >> 24 & 255 == len(text.split("\n")) - 3, "label 1 is class 0, or 1"
    with pytest.raises(UserError, match="does not hold .* --dataset folder: expected images/val and labels/val"):
        open_segmentation("folder", tmp_path / "labels", "val")


@pytest.mark.parametrize(("dataset", "images", "labels", "classes"), [
    ("ade20k", "ADEChallengeData2016/images/validation", "ADEChallengeData2016/annotations/validation", 150),
    ("ade20k", "images/validation", "annotations/validation", 150),
    ("ade20k-object", "ade_59object/ADEChallengeData2016/images/validation",
     "ade_59object/ADEChallengeData2016/annotations/validation", 59),
    ("ade20k-part", "ADE20K_Part/img/val", "ADE20K_Part/ann/val", 209),
    ("pascal-object", "pascal_semantic/img/val", "pascal_semantic/ann/val", 16),
    ("pascal-part", "pascal_part/img/val", "pascal_part/ann/val", 193),
    ("pascal-part", "img/val", "ann/val", 193),
    ("lip", "LIP/img/val", "LIP/ann/val", 19),
    ("lip", "TrainVal_images/val_images", "TrainVal_parsing_annotations/val_segmentations", 19),
    ("lip", "TrainVal_images/TrainVal_images/val_images",
     "TrainVal_parsing_annotations/TrainVal_parsing_annotations/val_segmentations", 19),
    ("lip", "val_images", "val_segmentations", 19),
])
def test_layouts(tmp_path, dataset, images, labels, classes):
    write_pair(tmp_path / images, tmp_path / labels, label=classes)
    split = open_segmentation(dataset, tmp_path, "val")
    assert len(split) == 1
    assert split.num_classes == classes
    image, label = split.load(0)
    assert image.shape == (16, 24, 3)
    assert (label == classes - 1).all()


def test_object_maps_go_before_the_original_of_the_same_parent(tmp_path):
    for root in ("ADEChallengeData2016", "ade_59object/ADEChallengeData2016"):
        write_pair(tmp_path / root / "images/training", tmp_path / root / "annotations/training", name=root[:3])
    assert open_segmentation("ade20k-object", tmp_path, "train").name(0) == "ade"
    assert open_segmentation("ade20k", tmp_path, "train").name(0) == "ADE"


def test_names_beside_the_maps_decide_the_class_count(tmp_path):
    write_pair(tmp_path / "img/val", tmp_path / "ann/val", label=3)
    (tmp_path / "names.txt").write_text("car wheel\ncar door\nchair leg\n")
    split = open_segmentation("ade20k-part", tmp_path, "val")
    assert split.names == ("car wheel", "car door", "chair leg")
    (tmp_path / "names.txt").write_text("car wheel\ncar door\n")
    with pytest.raises(UserError, match="label 3 is above the class count 2"):
        open_segmentation("ade20k-part", tmp_path, "val").load(0)


def test_test_images_that_are_training_images_are_counted(tmp_path):
    train, val = write_folder(tmp_path, [[1]] * 4, [[1]] * 6)
    for split, name in (("train", 0), ("train", 1), ("train", 2), ("train", 3), ("val", 4), ("val", 5)):
        Image.effect_noise((24, 16), 50).save(tmp_path / f"images/{split}/{name}.jpg")
    images = tmp_path / "images"
    for number, how in ((0, os.symlink), (1, os.link), (2, shutil.copy)):
        (images / f"val/{number}.jpg").unlink()
        how(images / f"train/{number}.jpg", images / f"val/{number}.jpg")
    data = bytearray((images / "train/3.jpg").read_bytes())
    data[-10] ^= 1
    (images / "val/3.jpg").write_bytes(data)  # of equal size, another picture
    assert shared_images(train, val, by_content=False) == 2
    assert shared_images(train, val, by_content=True) == 3
    assert shared_images(train, train, by_content=False) == 4
    synthetic = [open_segmentation("synthetic", None, split) for split in ("train", "val")]
    assert shared_images(*synthetic, by_content=True) == 0


def test_some_images_of_a_split(tmp_path):
    train, _ = write_folder(tmp_path, [[1]] * 12, [[1]])
    names = [train.name(i) for i in range(12)]
    some = open_segmentation("folder", tmp_path, "train", 5, seed=1)
    drawn = [some.name(i) for i in range(5)]
    assert some.sampled and len(some) == 5 and drawn == sorted(drawn) and {*drawn} < {*names} and drawn != names[:5]
    again, other = (open_segmentation("folder", tmp_path, "train", 5, seed) for seed in (1, 2))
    assert again.identity("data") == some.identity("data") != other.identity("data")
    assert len(open_segmentation("folder", tmp_path, "train", 99)) == 12 and not train.sampled
    assert len(open_segmentation("synthetic", None, "val", 7)) == 7


def test_iterations_of_ones_own_label_maps():
    assert [default_iterations(count) for count in (1, 14, 1000, 20_210, 10**6)] == [2000, 2000, 7938, 160_000, 160_000]
    assert default_iterations(1000, 32) == 3969


def test_in_order_keeps_order_and_raises():
    assert list(in_order(lambda x: x * x, range(50), 4)) == [x * x for x in range(50)]
    with pytest.raises(ZeroDivisionError):
        list(in_order(lambda x: 1 // (x - 9), range(50), 3))


def test_large_images_are_kept_at_the_largest_size_that_is_needed(tmp_path):
    """What is kept is the image resized as at ratio 2; sizes of the crops still follow from the original."""
    generator = np.random.default_rng(0)
    (tmp_path / "img/train").mkdir(parents=True)
    (tmp_path / "ann/train").mkdir(parents=True)
    for name, (height, width) in (("large", (300, 420)), ("small", (60, 50))):
        Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(
            tmp_path / "img/train" / f"{name}.png")
        Image.fromarray(generator.integers(0, 20, (height, width), dtype=np.uint8)).save(
            tmp_path / "ann/train" / f"{name}.png")
    split, lines = open_segmentation("lip", tmp_path, "train"), []
    store = PixelStore(split, (128, 48), CPU, tmp_path, "cpu", 0, lines.append)
    size = rescale_size(300, 420, (256, 96))
    assert store.stored == [size, (60, 50)]
    batch, sizes = store.batch([0, 1], CPU)
    assert sizes == [(300, 420), (60, 50)]
    kept = batch.pixels[:size[0] * size[1]].view(torch.uint8).view(*size, 4)
    image, label = split.load(0)
    assert torch.equal(kept[..., :3].permute(2, 0, 1), resize_image(torch.from_numpy(image), *size))
    assert set(kept[..., 3].unique().tolist()) <= set(np.unique(label).tolist())
    assert f"{4 * (size[0] * size[1] + 3000) / 1e9:.2f} GB" in lines[0]
    assert lines[1] == "1 of 2 training images are larger than twice the base scale and were shrunk once"
    for images, labels in training_batches(store, range(3), 4, (128, 48), 48, MEAN, STD, seed=0):
        assert images.shape == (4, 3, 48, 48)
        assert labels.shape == (4, 48, 48)


def test_batches_start_anywhere(tmp_path):
    """A stream that starts at iteration 5 is the rest of the stream that starts at 0."""
    for i in range(3):
        write_pair(tmp_path / "img/train", tmp_path / "ann/train", name=str(i), size=(40 + i, 30), label=i + 1)
    split = open_segmentation("lip", tmp_path, "train")
    store = PixelStore(split, (64, 32), CPU, tmp_path, "cpu", 0, lambda line: None)
    streams = [training_batches(store, range(first, 7), 2, (64, 32), 32, MEAN, STD, seed=1) for first in (0, 5)]
    whole, rest = (list(stream) for stream in streams)
    for expected, ours in zip(whole[5:], rest, strict=True):
        assert torch.equal(expected[0], ours[0])
        assert torch.equal(expected[1], ours[1])


class FakeCuda:
    """The part of torch.cuda that prefetched uses; notes what is waited for."""

    def __init__(self):
        self.log = []

    def Stream(self, device, priority=0):
        return self

    current_stream = Stream

    def device(self, device):
        return nullcontext()

    def stream(self, stream):
        return nullcontext()

    def wait_stream(self, stream):
        self.log.append("wait_stream")

    def record_event(self):
        return "event"

    def wait_event(self, event):
        self.log.append(event)


class FakeTensor:
    def __init__(self, value):
        self.value, self.recorded = value, 0

    def record_stream(self, stream):
        self.recorded += 1


def test_the_prefetching_thread(monkeypatch):
    """Order, waiting, the end, and an error of the thread, without a GPU."""
    cuda = FakeCuda()
    monkeypatch.setattr(segmentation_store.torch, "cuda", cuda)
    batches = list(prefetched(((FakeTensor(i), FakeTensor(-i)) for i in range(9)), torch.device("cuda", 0)))
    assert [(image.value, label.value) for image, label in batches] == [(i, -i) for i in range(9)]
    assert all(tensor.recorded == 1 for batch in batches for tensor in batch)
    assert cuda.log == ["wait_stream"] + ["event"] * 9

    def failing():
        yield FakeTensor(0), FakeTensor(0)
        raise UserError("a file that cannot be read")

    stream = prefetched(failing(), torch.device("cuda", 0))
    next(stream)
    with pytest.raises(UserError, match="cannot be read"):
        next(stream)


def test_synthetic():
    kinds = {"synthetic": PART_NAMES, "synthetic-part": PART_NAMES, "synthetic-object": OBJECT_NAMES}
    for dataset, names in kinds.items():
        split = open_segmentation(dataset, None, "val")
        assert split.names == names
        image, label = split.load(3)
        assert image.shape == (*label.shape, 3)
        values = np.unique(label)
        assert len(values) > 1
        assert all(value < len(names) or value == 255 for value in values)


@needs_real_data
def test_real_ade20k():
    """Counts of labels against the files themselves."""
    split = open_segmentation("ade20k", REAL / "ADEChallengeData2016", "val")
    assert [split.name(i) for i in range(3)] == [f"ADE_val_0000000{i}" for i in (1, 2, 3)]
    assert split.names[0] == "wall"
    for i, (height, width) in enumerate(split.sizes(2)):
        image, label = split.load(i)
        raw = np.asarray(Image.open(split.items[i][1]))
        assert image.shape[:2] == label.shape == (height, width)
        for k in range(1, 151):
            assert (label == k - 1).sum() == (raw == k).sum()
        assert (label == 255).sum() == (raw == 0).sum()
    assert len(open_segmentation("ade20k", REAL, "train")) == 4


@needs_real_data
def test_real_lip():
    """mmsegmentation's folders; the validation image is grey."""
    expected = {"train": {0, 2, 5, 13, 14, 15}, "val": {0, 1, 5, 9, 13, 15}}
    for part, values in expected.items():
        split = open_segmentation("lip", REAL / "lip_sample", part)
        image, label = split.load(0)
        assert image.shape == (*label.shape, 3)
        assert set(np.unique(label)) == {255 if value == 0 else value - 1 for value in values}
