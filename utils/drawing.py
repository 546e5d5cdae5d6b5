"""Plots for a paper's column and sheets of images, by matplotlib (PNG or PDF)."""

import textwrap
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np

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
    """Raises UserError where matplotlib is missing: to be called before any work whose end is a picture."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UserError("pictures need matplotlib, which is not installed; run pip install matplotlib") from None


@contextmanager
def plot(path: Path, width: float, height: float, grow: bool = False) -> Iterator:
    """The body draws on a matplotlib Figure of these inches; then path is written, PNG or PDF by its suffix, with no
    display, no global state and nothing of the user's matplotlibrc. grow: nothing is moved, and what stands over the
    figure's edges makes the file larger. Raises UserError for another suffix and without matplotlib."""
    if path.suffix not in (".png", ".pdf"):
        raise UserError(f"{path} cannot be written as a plot; use a name that ends in .png or .pdf")
    require_matplotlib()
    from matplotlib import rc_context, rcdefaults, rcParams
    from matplotlib.figure import Figure

    with rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # of a name may be missing from the font
        rcdefaults()
        rcParams.update(STYLE)
        figure = Figure(figsize=(width, height), dpi=DPI, layout="none" if grow else "constrained")
        yield figure
        atomic_write(path, partial(figure.savefig, format=path.suffix[1:], bbox_inches="tight" if grow else None))


@contextmanager
def image_rows(path: Path, rows: Sequence[Sequence[tuple]], size: Sequence[int] | None = None,
               gap: int = 10) -> Iterator[np.ndarray]:
    """Draws rows of (title, image [H, W, 3]), each image of this size (height, width) or of its own, in pixels. The
    body may draw more, on matplotlib Axes [rows, columns] in these pixels from the image's upper left corner, and over
    their edges. Then path is written as by plot."""
    sizes = [[size or np.shape(image)[:2] for _, image in row] for row in rows]
    # A line of a title takes 35 pixels.
    room = gap + 35 * max(len(title.splitlines()) for row in rows for title, _ in row)
    heights, widths = [max(row)[0] + room for row in sizes], [width + gap for _, width in max(sizes, key=len)]
    with plot(path, sum(widths) / DPI, sum(heights) / DPI, grow=True) as figure:
        figure.subplots_adjust(0, 0, 1, 1, 0, 0)
        axes = figure.subplots(len(rows), len(widths), squeeze=False, height_ratios=heights, width_ratios=widths)
        for (row, column), one in np.ndenumerate(axes):
            one.set_axis_off()
            one.set(xlim=(0, widths[column]), ylim=(heights[row] - room, -room))
            for title, image in rows[row][column:column + 1]:
                height, width = sizes[row][column]
                one.imshow(np.asarray(image), extent=(0, width, height, 0), aspect="auto")
                one.text(0, -gap, title, va="bottom")
        yield axes


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
