"""Pictures of segmentation: image, ground truth and prediction side by side, and the paper's figure 6."""

import colorsys
import re
import textwrap
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from utils.drawing import image_rows, plot
from utils.storage import atomic_write
from utils.tables import PAPER, runs_of

UNLABELLED = (225, 225, 225)


def class_colours(count: int) -> np.ndarray:
    """uint8 [count, 3], all different: the points of a sequence that fills hue, saturation and value evenly, so that
    labels near in number, as the parts of an object are, look different."""
    hue, saturation, value = (np.arange(count)[:, None] * (0.81917, 0.67104, 0.54970) % 1).T
    colours = [colorsys.hsv_to_rgb(*one) for one in zip(hue, 0.5 + saturation / 2, 0.45 + value / 2, strict=True)]
    return np.rint(255 * np.array(colours)).astype(np.uint8)


def save_picture(path: Path, image: np.ndarray, truth: np.ndarray, pred: np.ndarray, names: Sequence[str],
                 first_label: int = 1) -> None:
    """Writes image, ground truth and prediction side by side, the predicted pixels pale where nothing is labelled, and
    below them the names of the classes that occur; and beside it NAME_labels.png, the prediction as a label map with a
    palette, classes counted from first_label.

    image: uint8 [H, W, 3]; truth: [H, W], 255 = not labelled; pred: [H, W]. Long sides are brought to 512 pixels.
    """
    colours = class_colours(len(names))
    labels = Image.fromarray((pred + first_label).astype(np.uint8))
    palette = np.vstack([[UNLABELLED], colours]) if first_label else colours
    labels.putpalette(palette.astype(np.uint8).tobytes())
    present = sorted(np.union1d(truth[truth < len(names)], pred).tolist(), key=lambda label: -(truth == label).sum())
    legend = [(names[label] + " (predicted only)" * (label not in truth), colours[label]) for label in present]
    if (truth == 255).any():
        legend.append(("not labelled (pale)", UNLABELLED))
    size = [max(1, round(side * 512 / max(truth.shape))) for side in truth.shape]
    pred = colours[pred]
    pred[truth == 255] = 0.2 * pred[truth == 255] + 0.8 * 255
    truth = np.vstack([colours, [UNLABELLED]]).astype(np.uint8)[np.minimum(truth, len(names))]
    path.parent.mkdir(parents=True, exist_ok=True)
    with image_rows(path, [[("image", image), ("ground truth", truth), ("prediction", pred)]], size) as [axes]:
        for one in axes[1:]:
            one.images[0].set_interpolation("nearest")
        for text, colour in legend:  # a space first, as matplotlib leaves out labels that begin with "_"
            axes[0].plot([], [], "s", color=np.divide(colour, 255), markersize=5, markeredgecolor="grey",
                         label=" " + textwrap.fill(text, 24))
        axes[0].legend(loc="upper left", bbox_to_anchor=(0, 0), ncols=max(1, size[1] // 120), borderpad=0,
                       handlelength=1)
    atomic_write(path.with_name(f"{path.stem}_labels.png"), partial(labels.save, format="PNG"))


def figure6_panels(folder: Path) -> dict[str, list[tuple[str, list[float | None]]]]:
    """{title: [(row, [objects published, ours, parts published, ours]), ...]} of figure 6, which draw_figure6 draws:
    mIoU of linear segmentation in percent, None where there is none, of the paper's object and part data sets and of
    all others. Raises UserError where there is no results.jsonl."""
    bars = [(dataset, model, "", 0, figure) for dataset, paper in PAPER["segment"].items()
            for model, figure in paper["figures"]["linear mIoU"].items()]
    bars += [(run.dataset, run.name, run.marks, 1, run.figures["linear mIoU"]) for run in runs_of(folder, ["segment"])
             if "linear mIoU" in run.figures]
    panels = defaultdict(lambda: defaultdict(lambda: [None] * 4))
    for dataset, name, marks, column, figure in bars:
        title, kind, where = re.fullmatch(r"(\S+?)(-object|-part)?( in .*)?", dataset).groups("")
        if kind or dataset not in PAPER["segment"]:
            row = PAPER["models"].get(name, name) + (f" ({marks})" if marks else "")
            panels[title + where][row][column if kind == "-object" else column + 2] = figure
    return {title: [*rows.items()] for title, rows in panels.items()}


def draw_figure6(path: Path, panels: Mapping[str, Sequence[tuple[str, Sequence[float | None]]]]) -> None:
    """Plots object and part segmentation as grouped bars. panels: from figure6_panels."""
    kinds = {"object, published": "#9ecae1", "object, ours": "#2171b5", "part, published": "#fdd0a2",
             "part, ours": "#d94801"}
    most = max(7, *map(len, panels.values()))
    with plot(path, most, 2 * len(panels)) as figure:
        for axes, (title, rows) in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels.items(), strict=True):
            axes.set(title=title, ylabel="mIoU, percent", ylim=(0, 105), xlim=(-0.6, most - 0.4))
            axes.grid(axis="y")
            for kind, (label, colour) in enumerate(kinds.items()):
                heights = np.array([values[kind] for _, values in rows], dtype=float)
                bars = axes.bar(np.arange(len(rows)) + 0.2 * kind - 0.3, heights, 0.19, color=colour, label=label)
                axes.bar_label(bars, fmt="%.0f", padding=1)
            # An inch a group of bars.
            axes.set_xticks(range(len(rows)), [textwrap.fill(name, 16) for name, _ in rows])
        figure.legend(*axes.get_legend_handles_labels(), ncols=4, loc="outside upper center")
