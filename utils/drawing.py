"""Pictures: plots for a paper's column by matplotlib (PNG or PDF)."""

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch

from . import UserError
from .storage import atomic_write

COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22")
# A paper's column and its whole width, in inches; dots per inch of a PNG.
COLUMN, PAGE, DPI = 3.2, 6.9, 300
# Text is literal, as names may hold "$". Type 42: fonts in a PDF stay text, as publishers ask.
STYLE = {"font.size": 6, "axes.axisbelow": True, "axes.linewidth": 0.5, "grid.color": "#dddddd", "grid.linewidth": 0.5,
         "lines.linewidth": 1, "lines.markersize": 3, "legend.frameon": False, "text.parse_math": False,
         "pdf.fonttype": 42}


def require_matplotlib() -> None:
    """Raises UserError where matplotlib is missing: to be called before any work whose end is a plot."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UserError("plots need matplotlib, which is not installed; run pip install matplotlib") from None


@contextmanager
def plot(path: Path, width: float, height: float) -> Iterator:
    """The body draws on a matplotlib Figure of these inches; then path is written, PNG or PDF by its suffix, with no
    display, no global state and nothing of the user's matplotlibrc. Raises UserError for another suffix and without
    matplotlib."""
    if path.suffix not in (".png", ".pdf"):
        raise UserError(f"{path} cannot be written as a plot; use a name that ends in .png or .pdf")
    require_matplotlib()
    from matplotlib import rc_context, rcdefaults, rcParams
    from matplotlib.figure import Figure

    with rc_context():
        rcdefaults()
        rcParams.update(STYLE)
        figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
        yield figure
        atomic_write(path, partial(figure.savefig, format=path.suffix[1:]))


def draw_curves(path: Path, title: str, curves: Mapping[str, Sequence],
                chosen: tuple[str, Sequence[int], Sequence[float]] | None = None,
                first: int = 1, xlabel: str = "epoch", ylabel: str = "accuracy, percent") -> None:
    """Plots curves by name: [epochs], or [seeds, epochs], whose mean is a line in a band from the least to the largest;
    epochs (or layers) are counted from first. chosen: a curve's name, and the epoch and value of each seed's best."""
    # Room for a legend of any length.
    with plot(path, COLUMN, max(1.9, 0.85 + 0.125 * len(curves))) as figure:
        figure.suptitle(textwrap.fill(title, 60), x=0.01, ha="left")
        axes = figure.add_subplot(xlabel=xlabel, ylabel=ylabel)
        axes.grid(axis="y")
        axes.xaxis.get_major_locator().set_params(integer=True)
        for number, (name, values) in enumerate(curves.items()):
            values, colour = np.atleast_2d(values), COLOURS[number % len(COLOURS)]
            numbers = range(first, values.shape[1] + first)
            axes.fill_between(numbers, values.min(0), values.max(0), color=colour, alpha=0.2, linewidth=0)
            axes.plot(numbers, values.mean(0), ".-", label=name, color=colour)
        if chosen:
            name, epochs, values = chosen
            axes.plot(epochs, values, "o", color=COLOURS[list(curves).index(name) % len(COLOURS)],
                      markeredgecolor="black", label=f"best of each seed,\nmean {np.mean(values):.2f}")
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1))


def draw_confusion(path: Path, title: str, matrix: torch.Tensor, classes: Sequence[str]) -> None:
    """Plots a confusion matrix [C, C] (row = label), shaded by the share of the label's row. Up to 30 classes have
    names and percentages; above, shades alone."""
    share = 100 * matrix.double() / matrix.sum(1, keepdim=True).clamp(min=1)
    with plot(path, PAGE, 0.92 * PAGE) as figure:
        axes = figure.add_subplot(xlabel="prediction", ylabel="label")
        figure.suptitle(textwrap.fill(title, 130), x=0.01, ha="left")
        image = axes.imshow(share.numpy(), cmap="Blues", vmin=0, vmax=100)
        figure.colorbar(image, shrink=0.6, label="percent of the label's row")
        if len(classes) <= 30:
            # Names of folders that are no UTF-8 cannot be drawn as they are.
            names = [name.encode(errors="replace").decode() for name in classes]
            names = [textwrap.shorten(name, 22, placeholder="...") for name in names]
            axes.set_xticks(range(len(names)), names, rotation=90)
            axes.set_yticks(range(len(names)), names)
            for row, column in np.ndindex(share.shape):
                axes.text(column, row, f"{share[row, column]:.0f}", ha="center", va="center",
                          color="white" if share[row, column] > 60 else "black")


def draw_figure6(path: Path, panels: Mapping[str, Sequence[tuple[str, Sequence[float | None]]]]) -> None:
    """Plots object and part segmentation as grouped bars. panels: from utils.tables.figure6_panels."""
    kinds = {"object, published": "#9ecae1", "object, ours": "#2171b5", "part, published": "#fdd0a2",
             "part, ours": "#d94801"}
    most = max(7, *map(len, panels.values()))
    with plot(path, most, 2 * len(panels)) as figure:
        for axes, (title, rows) in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels.items(), strict=True):
            axes.set(title=title, ylabel="mIoU, percent", ylim=(0, 100), xlim=(-0.6, most - 0.4))
            axes.grid(axis="y")
            for kind, (label, colour) in enumerate(kinds.items()):
                heights = np.array([values[kind] for _, values in rows], dtype=float)
                bars = axes.bar(np.arange(len(rows)) + 0.2 * kind - 0.3, heights, 0.19, color=colour, label=label)
                axes.bar_label(bars, fmt="%.0f", padding=1)
            # An inch a group of bars.
            axes.set_xticks(range(len(rows)), [textwrap.fill(name, 16) for name, _ in rows])
        figure.legend(*axes.get_legend_handles_labels(), ncols=4, loc="outside upper center")
