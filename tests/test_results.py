"""Tables of the three scripts and their plots, from results lines made here."""

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import classify
from models.attention.plots import write_plots
from utils import UserError
from utils.drawing import draw_confusion, draw_curves, draw_figure6, require_matplotlib
from utils.results import figure6_panels, paper_tables

OURS = "timm/vit_small_patch16_224"
LINES = {
    "retrieval": {"dataset": "cub", "ap_cls": 40.0, "ap_avg": 51.25, "best": "avg", "num_queries": 30543,
                  "num_patches": 30543, "crop_scale": 0.5, "keypoints": None, "authors_defects": False,
                  "args": {"exclude_query": False}},
    "classify": {"dataset": "cub", "probe": "linear", "best_acc1": 51.25, "select": "test", "num_train": 9,
                 "args": {"authors_defects": False, "crop_scale": 0.5}},
    "segment": {"dataset": "ade20k-part", "iterations": 160_000, "mIoU": 51.25, "mAcc": 60.0, "aAcc": 70.0,
                "args": {"authors_defects": False}},
}


def write(folder, task, *changes):
    folder.mkdir(exist_ok=True)
    lines = [{"task": task, "model": OURS, "weights": "x.pth", **LINES[task], **change} for change in changes]
    (folder / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def rows(text):
    return [line.split(" | ") for line in text.splitlines() if line.startswith("| ")]


@pytest.mark.parametrize("task", LINES)
def test_models_outside_the_paper_have_rows_after_the_papers_seven(tmp_path, task):
    write(tmp_path, task, {}, {"model": "ibot"}, {"model": "ibot", "dataset": "synthetic"},
          {"model": "own.py:build", "name": "mine"}, {"model": "mae", "weights": "random"})
    text = paper_tables(task, tmp_path)
    models = [row[0].removeprefix("| ") for row in rows(text)]
    start = models.index("deit")
    assert models[start:start + 7] == ["deit", "mocov3", "dino", "beit", "mae", "cae", "ibot"]
    if task == "segment":
        start = models.index("deit", start + 7)
    assert models[start + 7:start + 10] == ["mae (random weights)", "mine", OURS]
    mine, ibot = rows(text)[start + 9], rows(text)[start + 6]
    assert mine[1:4] == ["-", "51.2", "-"] and ibot[2] == "51.2"
    published = float(ibot[1])
    assert float(ibot[3]) == pytest.approx(51.25 - published, abs=0.051)
    # Synthetic figures never stand beside the paper's.
    assert ("1 results with other data" in text) == (task != "segment")
    assert ("Synthetic data (not in the paper)" in text) == (task == "segment")


def test_the_last_run_counts_as_a_whole(tmp_path):
    write(tmp_path, "retrieval", {"model": "ibot", "ap_projected": 33.3}, {"model": "ibot"})
    ibot = next(row for row in rows(paper_tables("retrieval", tmp_path)) if row[0] == "| ibot")
    assert ibot[1:8] == ["49.3", "51.2", "+2.0", "avg", "31.2", "-", "-"]


def test_segmentation_by_other_recipes_has_rows_of_its_own(tmp_path):
    write(tmp_path, "segment", {"model": "dino"}, {"model": "dino", "probe": "knn", "iterations": 0, "mIoU": 20.0},
          {"model": "dino", "layers": [10, 11], "norm": True, "batch_norm": True, "heads": [1, 2], "mIoU": 30.0,
           "args": {"authors_defects": False, "select": "held-out"}})
    text = paper_tables("segment", tmp_path)
    assert "| dino | 28.9 | 51.2 |" in text and "| dino (nearest neighbours) | 28.9 | 20.0 | -8.9 |" in text
    marks = "blocks 10 11, final norm, batch norm, best of 2 heads, chosen held out"
    assert f"| dino ({marks}) | 28.9 | 30.0 | +1.1 |" in text


def test_plots_are_png_or_pdf_by_their_suffix(tmp_path):
    curves = {"lr 0.1, seed 0": [50.0, 60.0, 55.0], "lr 0.2, seed 0": [40.0, 70.0, 65.0]}
    for suffix, start in ((".png", b"\x89PNG"), (".pdf", b"%PDF")):
        draw_curves(tmp_path / f"curves{suffix}", "title", curves, ("lr 0.2, seed 0", 2))
        draw_confusion(tmp_path / f"confusion{suffix}", "title", torch.eye(3).long(), ["a", "b", "c"])
        for name in ("curves", "confusion"):
            assert (tmp_path / f"{name}{suffix}").read_bytes().startswith(start)
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".pdf", ".pdf", ".png", ".png"]
    with pytest.raises(UserError, match=r"curves.txt cannot be written as a plot; use .* ends in .png or .pdf"):
        draw_curves(tmp_path / "curves.txt", "title", curves, ("lr 0.2, seed 0", 2))


def test_no_picture_of_a_plot_is_cut(tmp_path):
    """Long titles, names and legends: the margin all around stays white."""
    long = "timm/vit_base_patch16_clip_224.laion2b on partimagenet-part (random weights, synthetic data), attentive"
    draw_curves(tmp_path / "curves.png", f"{long}: test accuracy by epoch",
                {f"lr {rate}, seed {seed}": [10.0, 20.0] for rate in range(6) for seed in range(5)},
                ("lr 0, seed 0", 1))
    names = [f"class {number} of a long name that goes on" for number in range(30)]
    draw_confusion(tmp_path / "confusion.png", long, torch.eye(30).long(), names)
    write(tmp_path, "segment", *({"model": f"timm/vit_base_patch16_clip_224.laion2b_{number}"} for number in range(6)))
    draw_figure6(tmp_path / "figure6.png", figure6_panels(tmp_path))
    field = {"receptive_field": [[0.1, None, 0.0]] * 3, "distance_pixels": [[3.0, 9.0]] * 24, "patch_size": 16,
             "distance_pixels_uniform": 20.0, "part": "encoder", "mask_ratio": 0.0, "dataset": "synthetic",
             **{f"receptive_field_radius{share}_{unit}": 1.0 for share in (50, 90) for unit in ("pixels", "patches")}}
    for count in (1, 12):
        write_plots([field | {"model": f"{long}_{number}", "weights": "x.pth"} for number in range(count)], tmp_path)
        (tmp_path / "attention_fields.png").rename(tmp_path / f"fields{count}.png")
        (tmp_path / "attention_distance_encoders.png").rename(tmp_path / f"distances{count}.png")
    for name in ("curves", "confusion", "figure6", "fields1", "fields12", "distances1", "distances12"):
        pixels = np.asarray(Image.open(tmp_path / f"{name}.png"))
        for edge in (pixels[:3], pixels[-3:], pixels[:, :3], pixels[:, -3:]):
            assert (edge == 255).all(), name


def test_without_matplotlib_a_run_that_asks_for_plots_stops_at_its_start(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match="pip install matplotlib"):
        require_matplotlib()
    with pytest.raises(UserError, match="pip install matplotlib"):
        classify.parse_arguments(["--save-plots"])
    assert not classify.parse_arguments([]).save_plots
