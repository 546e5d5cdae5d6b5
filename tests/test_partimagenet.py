"""PartImageNet_Seg: classes count from 0, the last label is the background, parts and objects share their images."""

import numpy as np
import pytest
from PIL import Image

from datasets.label_maps import reduce_label
from datasets.segmentation import PROTOCOLS, open_segmentation
from utils import UserError

SETS = [("partimagenet-part", "", 40), ("partimagenet-object", "_whole", 158)]


@pytest.fixture
def tree(tmp_path):
    """Two training images and one of each other split, with the labels 0, the last class, background and 255."""
    root = tmp_path / "PartImageNet_Seg"
    for split, names in (("train", ("n01440764_10029", "n01440764_1009")), ("val", ("n02101006_5",)), ("test", ("x",))):
        for folder in (f"images/{split}", f"annotations/{split}", f"annotations/{split}_whole"):
            (root / folder).mkdir(parents=True)
        for name in names:
            Image.new("RGB", (6, 4), "red").save(root / "images" / split / f"{name}.JPEG", "JPEG")
            for _, suffix, background in SETS:
                label = np.full((4, 6), background, np.uint8)
                label[0, :3] = 0, background - 1, 255
                Image.fromarray(label).save(root / f"annotations/{split}{suffix}" / f"{name}.png")
    return root


@pytest.mark.parametrize(("dataset", "suffix", "classes"), SETS)
@pytest.mark.parametrize("inside", [True, False])
def test_splits(tree, dataset, suffix, classes, inside):
    train, val = (open_segmentation(dataset, tree if inside else tree.parent, split) for split in ("train", "val"))
    assert (len(train), len(val), train.num_classes) == (2, 1, classes)
    assert (train.name(1), val.name(0)) == ("n01440764_1009", "n02101006_5")
    assert train.sizes(0) == [(4, 6)] * 2
    image, label = val.load(0)
    assert image.shape == (4, 6, 3)
    assert label[0].tolist() == [0, classes - 1, 255, 255, 255, 255]
    assert (label[1:] == 255).all()


@pytest.mark.parametrize(("dataset", "suffix", "classes"), SETS)
def test_a_label_beyond_the_background_names_the_file(tree, dataset, suffix, classes):
    path = tree / f"annotations/val{suffix}/n02101006_5.png"
    Image.new("L", (6, 4), classes + 1).save(path)
    with pytest.raises(UserError, match=f"n02101006_5.png: label {classes + 1} is above") as error:
        open_segmentation(dataset, tree, "val").load(0)
    assert str(path) in str(error.value)


def test_labels_one_by_one():
    raw = np.arange(256, dtype=np.int32)
    assert reduce_label(raw, 40).tolist() == [255 if label in (40, 255) else label for label in range(256)]
    assert reduce_label(raw).tolist() == [255 if label in (0, 255) else label - 1 for label in range(256)]


def test_names(tree):
    names = open_segmentation("partimagenet-part", tree, "val").names
    assert len(set(names)) == 40
    assert [names[i] for i in (0, 3, 4, 6, 11, 15, 18, 20, 24, 27, 31, 33, 39)] == [
        "quadruped head", "quadruped tail", "biped head", "biped hand", "fish fin", "bird wing", "snake head",
        "reptile head", "car body", "bicycle head", "boat body", "aeroplane head", "bottle mouth"]
    assert open_segmentation("partimagenet-object", tree, "val").names[157] == "class 157"
    (tree / "names.txt").write_text("".join(f"object {i}\n" for i in range(158)))
    assert open_segmentation("partimagenet-object", tree, "val").names[157] == "object 157"
    assert open_segmentation("partimagenet-part", tree, "val").names == names


def test_another_folder(tree, tmp_path):
    with pytest.raises(UserError, match="expected images/val and annotations/val_whole"):
        open_segmentation("partimagenet-object", tmp_path / "PartImageNet_Seg" / "images", "val")
    (tree / "annotations/train/n01440764_1009.png").unlink()
    with pytest.raises(UserError, match="1 images have no label map.*n01440764_1009"):
        open_segmentation("partimagenet-part", tree, "train")
    assert len(open_segmentation("partimagenet-object", tree, "train")) == 2


def test_sizes_are_those_of_ade20k():
    assert PROTOCOLS["partimagenet-part"] == PROTOCOLS["partimagenet-object"] == ((2048, 512), 512, (2048, 512), 341)
