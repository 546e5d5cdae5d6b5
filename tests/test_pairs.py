"""Keypoint pairs: which frame an annotation is in, and points and boxes outside of their pictures."""

import json

import numpy as np
import pytest
from PIL import Image

from datasets.pairs import Pair, PairDataset, load_spair
from utils import UserError

PIXELS = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)


def write_spair(root, size=(60, 40), points=((10, 20),), orientation=None):
    """A pair of an image and itself, of which the annotation says that it has this size."""
    folder = root / "JPEGImages/cat"
    folder.mkdir(parents=True)
    exif = Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    Image.fromarray(PIXELS).save(folder / "a.jpg", "PNG", exif=exif)
    pair = {"category": "cat", "src_imname": "a.jpg", "trg_imname": "a.jpg", "src_imsize": [*size, 3],
            "trg_imsize": [*size, 3], "trg_bndbox": [1, 2, 30, 35], "src_kps": points, "trg_kps": points}
    (root / "PairAnnotation/test").mkdir(parents=True)
    (root / "PairAnnotation/test/a.json").write_text(json.dumps(pair))
    return load_spair(root, 32)


@pytest.mark.parametrize(("size", "orientation", "quarter_turns"), [
    ((60, 40), None, 0), ((60, 40), 6, 0), ((40, 60), 6, -1), ((60, 40), 3, 0)])
def test_the_stated_size_says_whether_a_picture_is_turned(tmp_path, size, orientation, quarter_turns):
    pairs = write_spair(tmp_path, size, orientation=orientation)
    assert pairs.sizes.tolist() == [list(size)]
    expected = Image.fromarray(np.rot90(PIXELS, quarter_turns)).resize((32, 32), Image.BILINEAR)
    assert np.array_equal(pairs.images[0][0][0].permute(1, 2, 0), np.array(expected))


def test_a_picture_of_another_size_than_stated_is_named(tmp_path):
    pairs = write_spair(tmp_path, (120, 80))
    with pytest.raises(UserError, match="a.jpg has 60 x 40 pixels, its annotation says 120 x 80"):
        pairs.images[0]


def test_two_stated_sizes_of_one_picture_are_refused_and_hidden_files_passed_over(tmp_path):
    write_spair(tmp_path)
    first = tmp_path / "PairAnnotation/test/a.json"
    (tmp_path / "PairAnnotation/test/._a.json").write_bytes(b"\xff")
    assert len(load_spair(tmp_path, 32).pairs) == 1
    first.with_name("b.json").write_text(first.read_text().replace("[60, 40, 3]", "[120, 80, 3]"))
    with pytest.raises(UserError, match=r"b.json: .*a.jpg has size \(120, 80\), in another pair \(60, 40\)"):
        load_spair(tmp_path, 32)


def pairs_of(tmp_path, points, box=(0, 0, 60, 40)):
    Image.fromarray(PIXELS).save(tmp_path / "a.png")
    inside = [(1, 1)] * len(points)
    return PairDataset([Pair("first", "x", *[str(tmp_path / "a.png")] * 2, inside, inside, (0, 0, 9, 9)),
                        Pair("second", "x", *[str(tmp_path / "a.png")] * 2, inside, points, box)], 32)


def test_more_than_one_point_in_a_hundred_outside_is_refused(tmp_path):
    assert pairs_of(tmp_path, [(1, 1)] * 24 + [(60, 41)]).num_outside == 1
    with pytest.raises(UserError, match=r"1 of 96 visible keypoints .*pair second\) at \(60, 41\) of 60 x 40 pixels"):
        pairs_of(tmp_path, [(1, 1)] * 23 + [(60, 41)])


@pytest.mark.parametrize("box", [(0, 0, 9e9, 40), (-61, 0, 60, 40), (0, -41, 60, 40), (0, 0, 60, 81)])
def test_a_box_far_outside_is_refused(tmp_path, box):
    pairs_of(tmp_path, [(1, 1)], (-60, -40, 120, 80))
    with pytest.raises(UserError, match="pair second: the target's box .* is far outside of its picture of 60 x 40"):
        pairs_of(tmp_path, [(1, 1)], box)
