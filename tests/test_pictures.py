"""Pictures of label maps, and sheets of patches and what is on them."""

import re

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont

from datasets.segmentation_pictures import UNLABELLED, class_colours, save_picture
from datasets.sheets import MARK, draw_sheet, find_query, nearest_patches
from utils import UserError


def test_classes_near_in_number_look_different():
    colours = class_colours(254).astype(int)
    distances = np.linalg.norm(colours[:, None] - colours, axis=2)
    apart = np.subtract.outer(np.arange(254), np.arange(254))
    assert distances[apart > 0].min() > 5 and distances[(apart > 0) & (apart < 5)].min() > 40


def picture(folder, names, first_label):
    truth = np.full((40, 60), 255, np.uint8)
    truth[:, :30] = 1
    pred = np.zeros((40, 60), np.int64)
    pred[:, 20:40] = 2
    save_picture(folder / "a.png", np.zeros((40, 60, 3), np.uint8), truth, pred, names, first_label)
    with Image.open(folder / "a.png") as sheet, Image.open(folder / "a_labels.png") as labels:
        assert labels.mode == "P"
        return np.asarray(sheet), np.asarray(labels), np.asarray(labels.convert("RGB")), pred


@pytest.mark.parametrize("first_label", [0, 1])
def test_the_predicted_label_map_has_the_labels_of_the_data_set(tmp_path, first_label):
    _, labels, shown, pred = picture(tmp_path, ["head", "torso", "tail"], first_label)
    assert (labels == pred + first_label).all()
    assert (shown == class_colours(3)[pred]).all()


def test_predictions_where_nothing_is_labelled_are_pale(tmp_path):
    sheet, *_ = picture(tmp_path, ["head", "torso", "tail"], 1)
    colours = class_colours(3).astype(int)
    # 512 pixels to 60: panels of 512 x 341 from row 24 on, 522 apart.
    row, scale = sheet[200].astype(int), 512 / 60
    assert (row[522 + int(10 * scale)] == colours[1]).all() and (row[522 + int(50 * scale)] == UNLABELLED).all()
    assert (row[1044 + int(10 * scale)] == colours[0]).all()
    for column, label in ((35, 2), (50, 0)):
        pale = row[1044 + int(column * scale)]
        assert abs(pale - (0.2 * colours[label] + 204)).max() <= 1


def test_no_legend_is_cut(tmp_path):
    """The ink of the longest name is as long as the font makes it, and the right margin is white."""
    name = "a class whose name is longer than all three panels together, " * 5
    sheet, *_ = picture(tmp_path, ["head", name, "tail"], 1)
    legend = sheet[24 + 341 + 2:]
    ink = np.flatnonzero((legend[:, 20:] < 200).any((0, 2)))
    assert ink[-1] - ink[0] > ImageFont.load_default(13).getlength(name) - 16 > 1600
    assert (legend[:, -3:] == 255).all()


def test_a_sheet_marks_the_patches_that_overlap_the_query_and_cuts_no_title(tmp_path):
    patches = [(Image.new("RGB", (112, 112), (20 * number + 9, 0, 9)), number == 4) for number in range(6)]
    name = "timm/vit_base_patch16_clip_224.laion2b_ft_in12k_in1k (random weights)"
    query, path = Image.new("RGB", (452, 224), "blue"), tmp_path / "sheet.png"
    draw_sheet(path, query, [[(f"{name}: cls", patches)]], columns=3)
    sheet = np.asarray(Image.open(path))
    for number in range(6):
        cell = (sheet == (20 * number + 9, 0, 9)).all(2)
        assert cell.sum() == (88 * 88 if number == 4 else 96 * 96)
    # The border, and what it means in words, in the same colour.
    marked = (sheet == MARK).all(2)
    assert marked[:, 16 + 452:].sum() == 96 * 96 - 88 * 88 and marked[:, :16 + 452].any()
    # Ink up to the end of the title, and a white margin.
    ink = np.flatnonzero((sheet < 128).any((0, 2)))
    assert ink[-1] - (16 + 452 + 32) > ImageFont.load_default(14).getlength(f"{name}: cls") - 9 > 3 * 100
    assert (sheet[:, -8:] == 255).all()
    draw_sheet(path, query, [[("m: cls", patches[:2])]])
    assert not (np.asarray(Image.open(path)) == MARK).all(2).any()


def test_nearest_patches_against_a_plain_sort():
    features = torch.randn(60, 8, generator=torch.Generator().manual_seed(0))
    queries = torch.tensor([5, 59])
    similarity = torch.nn.functional.cosine_similarity(features[queries][:, None], features[None], dim=2)
    similarity[[0, 1], queries] = -2
    assert torch.equal(nearest_patches(features, torch.arange(60), queries, 7), similarity.topk(7).indices)
    # A query is in no list, however long.
    assert nearest_patches(features, torch.arange(60), queries, 60).shape == (len(queries), 59)
    # Rows 0 to 9 are of one image, and so on.
    same = torch.arange(60) // 10 == queries[:, None] // 10
    similarity[same] = -2
    others = nearest_patches(features, torch.arange(60), queries, 60, leave_out=10)
    assert torch.equal(others, similarity.topk(50).indices)


def test_queries_by_name():
    paths = ["/data/a/one.jpg", "/data/b/one.jpg", "/data/b/two.png"]
    assert find_query("b/one.jpg:48", paths) == 49 + 48
    for text in ("one.jpg:3", "two.png:49", "two.png", "three.jpg:0"):
        with pytest.raises(UserError, match=re.escape(f"--query {text}: ")):
            find_query(text, paths)
