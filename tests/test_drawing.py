"""Plots and sheets: curves, figure 6, rows of images."""

import sys

import matplotlib
import numpy as np
import pytest
from PIL import Image

import classify
import retrieval
import segment
from datasets.segmentation_pictures import draw_figure6
from utils import UserError
from utils.drawing import draw_curves, image_rows


def test_accuracy_curves_are_a_colour_for_each_rate_a_band_over_seeds_and_each_seeds_best(figures, tmp_path):
    seeds = np.random.default_rng(0).uniform(61, 68, (2, 3, 90))
    epochs, best = seeds[1].argmax(1) + 1, seeds[1].max(1)
    draw_curves(tmp_path / "a.png", "title", {"lr 0.1": seeds[0], "lr 0.2": seeds[1].tolist()},
                ("lr 0.2", epochs.tolist(), best.tolist()))
    axes, = figures[0].axes
    *lines, marks = axes.lines
    assert len({line.get_color() for line in lines}) == 2
    for line, band, values in zip(lines, axes.collections, seeds, strict=True):
        assert np.allclose(line.get_ydata(), values.mean(0)) and list(line.get_xdata()) == list(range(1, 91))
        low, high = band.get_paths()[0].get_extents().intervaly
        assert np.allclose((low, high), (values.min(), values.max()))
    assert np.allclose(marks.get_xydata(), np.column_stack([epochs, best])) and len(set(epochs)) == 3
    assert marks.get_color() == lines[1].get_color()
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        "lr 0.1", "lr 0.2", f"best of each seed,\nmean {best.mean():.2f}"]
    for ticks in (axes.get_xticks(), axes.get_yticks()):
        step = np.diff(ticks)[0]
        assert round(step / 10 ** np.floor(np.log10(step)), 6) in (1, 2, 2.5, 5)


def test_plots_are_png_or_pdf_by_their_suffix(tmp_path):
    curves = {"lr 0.1": [50.0, 60.0, 55.0], "lr 0.2": [40.0, 70.0, 65.0]}
    for suffix, start in ((".png", b"\x89PNG"), (".pdf", b"%PDF")):
        draw_curves(tmp_path / f"curves{suffix}", "title", curves, ("lr 0.2", [2], [70.0]))
        assert (tmp_path / f"curves{suffix}").read_bytes().startswith(start)
    with pytest.raises(UserError, match=r"curves.txt cannot be written as a plot; use .* ends in .png or .pdf"):
        draw_curves(tmp_path / "curves.txt", "title", curves)
    with pytest.raises(OSError, match="No such file.*no/curves.png"):
        draw_curves(tmp_path / "no" / "curves.png", "title", curves)


def test_text_is_literal_and_no_matplotlibrc_matters(tmp_path):
    """What would be a formula, and one that cannot be set, is drawn as it stands; LaTeX and a colour of the user's are
    not taken, nor changed."""
    def drawn(name):
        draw_curves(tmp_path / "a.png", "a $\\frac$ of {x_1}^2", {name: [1.0, 2.0]})
        return (tmp_path / "a.png").read_bytes()

    literal = drawn("$\\frac")
    assert literal != drawn("frac") and drawn("$\\frac$") not in (literal, drawn("frac"))
    with matplotlib.rc_context({"text.usetex": True, "figure.facecolor": "red"}):
        assert drawn("$\\frac") == literal and matplotlib.rcParams["text.usetex"]


def test_no_picture_of_a_plot_is_cut(tmp_path):
    """Long titles, names and legends: the margin all around stays white."""
    long = "timm/vit_base_patch16_clip_224.laion2b on partimagenet-part (random weights, synthetic data), attentive"
    draw_curves(tmp_path / "curves.png", f"{long}: test accuracy by epoch",
                {f"lr {rate}, seed {seed}": [10.0, 20.0] for rate in range(6) for seed in range(5)},
                ("lr 0, seed 0", [1], [10.0]))
    rows = [(f"timm/vit_base_patch16_clip_224.laion2b_{number}\n(epochs 3, lr 0.1)", [None, 50.0, 40.0, None])
            for number in range(6)]
    draw_figure6(tmp_path / "figure6.png", {"ade20k": rows, "pascal": rows * 2})
    for name in ("curves", "figure6"):
        pixels = np.asarray(Image.open(tmp_path / f"{name}.png"))
        for edge in (pixels[:3], pixels[-3:], pixels[:, :3], pixels[:, -3:]):
            assert (edge == 255).all(), name


@pytest.mark.parametrize(("script", "words"), [
    (classify, "--save-plots"), (segment, "--save-pictures 1"), (segment, "--figure6 a.png"),
    (retrieval, "--dataset imagenet --data-path ."), (retrieval, "--dataset imagenet --data-path . --pca"),
    (retrieval, "--dataset synthetic-pairs --pictures 2"), (retrieval, "--dataset synthetic-pairs --layers all")])
def test_without_matplotlib_pictures_are_refused_at_the_start(launch, monkeypatch, tmp_path, script, words):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    out, error = launch(script.main, [*words.split(), "--output-dir", tmp_path / "out"], status=2)
    assert "pip install matplotlib" in error and not out and not (tmp_path / "out").exists()


@pytest.mark.parametrize("size", [None, (60, 80)])
def test_rows_of_images_are_as_large_as_said_and_no_word_is_cut(tmp_path, size):
    """Images of their own size or of a given one; what stands beside them makes the file larger."""
    images = {colour: np.full((height, 50, 3), colour, np.uint8) for colour, height in (
        ((250, 0, 9), 20), ((9, 250, 0), 30), ((9, 0, 250), 40))}
    one, two, three = images.values()
    with image_rows(tmp_path / "a.png", [[("one", one), ("$\\frac", two)], [("猫\n3", three)]], size) as axes:
        axes[0, 0].text(-5, 10, "a long text on its left", ha="right")
    pixels = np.asarray(Image.open(tmp_path / "a.png").convert("RGB"))
    for colour, image in images.items():
        places = np.argwhere((pixels == colour).all(2))
        assert (abs(np.ptp(places, axis=0) + 1 - (size or image.shape[:2])) <= 1).all() and places[:, 1].min() > 250
    assert all((edge == 255).all() for edge in (pixels[:3], pixels[-3:], pixels[:, :3], pixels[:, -3:]))


@pytest.mark.filterwarnings("error")
def test_a_name_that_the_font_lacks(tmp_path):
    draw_curves(tmp_path / "a.png", "猫$x on folder", {"$\\frac": [1, 2]})
    assert (tmp_path / "a.png").stat().st_size > 1000
