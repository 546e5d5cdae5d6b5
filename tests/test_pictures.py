"""Pictures of label maps, and sheets of patches and what is on them."""

import re

import numpy as np
import pytest
import torch
from PIL import Image

from datasets.segmentation_pictures import UNLABELLED, class_colours, save_picture
from datasets.sheets import find_query, nearest_patches
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
        return np.asarray(sheet.convert("RGB")), np.asarray(labels), np.asarray(labels.convert("RGB")), pred


@pytest.mark.parametrize("first_label", [0, 1])
def test_the_predicted_label_map_has_the_labels_of_the_data_set(tmp_path, first_label):
    _, labels, shown, pred = picture(tmp_path, ["head", "torso", "tail"], first_label)
    assert (labels == pred + first_label).all() and (shown == class_colours(3)[pred]).all()


def test_predictions_where_nothing_is_labelled_are_pale_and_no_colour_is_between_two(tmp_path):
    """Every colour has its share of panels of 512 x 341 pixels; the legend has little."""
    sheet, *_ = picture(tmp_path, ["head", "torso", "tail"], 1)
    colours = class_colours(3)
    shown = [UNLABELLED, *colours, *np.uint8(0.2 * colours + 204)]
    for colour, sixths in zip(shown, (3, 2, 3, 1, 2, 0, 1), strict=True):
        assert (sheet == colour).all(2).sum() == pytest.approx(512 * 341 * sixths / 6, rel=0.02)


def test_the_legend_names_what_occurs(figures, tmp_path):
    name = "a class whose name is longer than all three panels together, " * 5
    sheet, *_ = picture(tmp_path, ["$\\head$", name, "_tail_", "of another picture"], 1)
    texts = [" ".join(text.get_text().split()) for text in figures[0].axes[0].get_legend().get_texts()]
    assert texts == [name.strip(), "$\\head$ (predicted only)", "_tail_ (predicted only)",
                     "not labelled (pale)"]
    assert all((edge == 255).all() for edge in (sheet[-3:], sheet[:, :3], sheet[:, -3:]))


def test_nearest_patches_against_a_plain_sort():
    features = torch.randn(60, 8, generator=torch.Generator().manual_seed(0))
    queries = torch.tensor([5, 59])
    similarity = torch.nn.functional.cosine_similarity(features[queries][:, None], features[None], dim=2)
    similarity[[0, 1], queries] = -2
    assert torch.equal(nearest_patches(features, queries, 7), similarity.topk(7).indices)
    # A query is in no list, however long.
    assert nearest_patches(features, queries, 60).shape == (len(queries), 59)
    # Rows 0 to 9 are of one image, and so on.
    same = torch.arange(60) // 10 == queries[:, None] // 10
    similarity[same] = -2
    others = nearest_patches(features, queries, 60, leave_out=10)
    assert torch.equal(others, similarity.topk(50).indices)


def test_queries_by_name():
    paths = ["/data/a/one.jpg", "/data/b/one.jpg", "/data/b/two.png"]
    assert find_query("b/one.jpg:48", paths) == 49 + 48
    for text in ("one.jpg:3", "two.png:49", "two.png", "three.jpg:0"):
        with pytest.raises(UserError, match=re.escape(f"--query {text}: ")):
            find_query(text, paths)
