"""Pictures: plots for a paper's column by matplotlib (PNG or PDF), sheets of patches and label maps by Pillow."""

import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from . import UserError
from .storage import atomic_write

COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22")
# A paper's column and its whole width, in inches; dots per inch of a PNG.
COLUMN, PAGE, DPI = 3.2, 6.9, 300
# Type 42: fonts in a PDF stay text, as publishers ask.
STYLE = {"font.size": 7, "axes.titlesize": 7, "axes.titlelocation": "left", "axes.axisbelow": True,
         "axes.linewidth": 0.5, "xtick.labelsize": 6, "ytick.labelsize": 6, "grid.color": "#dddddd",
         "grid.linewidth": 0.5, "lines.linewidth": 1, "legend.fontsize": 6, "legend.frameon": False, "pdf.fonttype": 42}
# Of the sheets, in pixels.
CELL, GAP, MARGIN, TITLE = 96, 4, 16, 24
UNLABELLED, MARK = (225, 225, 225), (255, 140, 0)


def require_matplotlib() -> None:
    """Raises UserError where matplotlib is missing: to be called before any work whose end is a plot."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UserError("plots need matplotlib, which is not installed; run pip install matplotlib") from None


@contextmanager
def plot(path: Path, width: float, height: float) -> Iterator:
    """The body draws on a matplotlib Figure of these inches; then path is written, PNG or PDF by its suffix, with no
    display and no global state. Raises UserError for another suffix, without matplotlib, and if it cannot write."""
    if path.suffix not in (".png", ".pdf"):
        raise UserError(f"{path} cannot be written as a plot; use a name that ends in .png or .pdf")
    require_matplotlib()
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
        yield figure
        try:
            atomic_write(path, partial(figure.savefig, format=path.suffix[1:]))
        except OSError as error:
            raise UserError(f"{path} cannot be written ({error.strerror or error}); name another file") from None


def draw_curves(path: Path, title: str, curves: Mapping[str, Sequence], chosen: tuple[str, int] | None = None,
                first: int = 1, xlabel: str = "epoch", ylabel: str = "accuracy, percent") -> None:
    """Plots curves by name: [epochs], or [seeds, epochs], whose mean is a line in a band from the least to the largest;
    epochs (or layers) are counted from first. chosen: a curve's name and its epoch."""
    # Room for a legend of any length.
    with plot(path, COLUMN, max(28 / 15, 0.7 + 0.125 * len(curves))) as figure:
        figure.suptitle(textwrap.fill(title, 60), x=0.01, ha="left", fontsize=7)
        axes = figure.add_subplot(xlabel=xlabel, ylabel=ylabel)
        axes.grid(axis="y")
        axes.locator_params(steps=(1, 2, 5, 10))
        axes.xaxis.get_major_locator().set_params(integer=True)
        for number, (name, values) in enumerate(curves.items()):
            values, colour = np.atleast_2d(values), COLOURS[number % 10]
            numbers = range(first, values.shape[1] + first)
            axes.fill_between(numbers, values.min(0), values.max(0), color=colour, alpha=0.2, linewidth=0)
            axes.plot(numbers, values.mean(0), label=name, color=colour, markersize=3,
                      linestyle=("-", "--", ":")[number // 10 % 3], marker="." if len(numbers) < 30 else "")
        if chosen:
            name, epoch = chosen
            axes.plot(epoch, np.atleast_2d(curves[name])[:, epoch - first].mean(), "o", markersize=6, fillstyle="none",
                      color="black", label=f"epoch {epoch}, chosen")
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1))


def draw_confusion(path: Path, title: str, matrix: torch.Tensor, classes: Sequence[str]) -> None:
    """Plots a confusion matrix [C, C] (row = label), shaded by the share of the label's row. Up to 30 classes have
    names and percentages; above, shades alone."""
    share = 100 * matrix.double() / matrix.sum(1, keepdim=True).clamp(min=1)
    side = COLUMN if len(classes) <= 8 else PAGE
    with plot(path, side, 0.92 * side) as figure:
        axes = figure.add_subplot(xlabel="prediction", ylabel="label")
        figure.suptitle(textwrap.fill(title, int(19 * side)), x=0.01, ha="left", fontsize=7)
        image = axes.imshow(share.numpy(), cmap="Blues", vmin=0, vmax=100)
        figure.colorbar(image, shrink=0.6, label="percent of the label's row")
        if len(classes) <= 30:
            names = [textwrap.shorten(name, 22, placeholder="...") for name in classes]
            axes.set_xticks(range(len(names)), names, rotation=90)
            axes.set_yticks(range(len(names)), names)
            for row, column in np.ndindex(share.shape):
                axes.text(column, row, f"{share[row, column]:.0f}", ha="center", va="center_baseline",
                          fontsize=5, color="white" if share[row, column] > 60 else "black")


def draw_figure6(path: Path, panels: Mapping[str, Sequence[tuple[str, Sequence[float | None]]]]) -> None:
    """Plots object and part segmentation as grouped bars. panels: from utils.tables.figure6_panels."""
    kinds = {"object, published": "#9ecae1", "object, ours": "#2171b5", "part, published": "#fdd0a2",
             "part, ours": "#d94801"}
    most = max(7, *map(len, panels.values()))
    with plot(path, PAGE * max(1, most / 10), 1.9 * len(panels) + 0.2) as figure:
        for axes, (title, rows) in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels.items(), strict=True):
            axes.set(title=title, ylabel="percent" if ":" in title else "mIoU, percent", ylim=(0, 100),
                     xlim=(-0.6, most - 0.4))
            axes.grid(axis="y")
            for kind, (label, colour) in enumerate(kinds.items()):
                heights = np.array([values[kind] for _, values in rows], dtype=float)
                bars = axes.bar(np.arange(len(rows)) + 0.2 * kind - 0.3, heights, 0.19, color=colour, label=label)
                axes.bar_label(bars, fmt="%.0f", fontsize=5, padding=1)
            # A long name is broken where its group of bars ends.
            names = ["\n".join(textwrap.fill(line, 115 // min(10, most)) for line in name.split("\n"))
                     for name, _ in rows]
            axes.set_xticks(range(len(rows)), names)
        figure.legend(*axes.get_legend_handles_labels(), ncols=4, loc="outside upper center")


def draw_sheet(path: Path, query: Image.Image,
               rows: Sequence[tuple[str, Sequence[tuple[str, Sequence[tuple[Image.Image, bool]]]]]],
               columns: int = 6) -> None:
    """Writes a PNG: the query image on the left, then a row for each model, in it a block of patches for each feature.
    rows: (model, [(feature, [(patch, whether it overlaps the query), ...]), ...]). columns: of patches in a block."""
    deep = math.ceil(max(len(patches) for _, blocks in rows for _, patches in blocks) / columns)
    font, block_height = ImageFont.load_default(14), TITLE + deep * (CELL + GAP) - GAP
    widest = max(font.getlength(f"{model}: {feature}") for model, blocks in rows for feature, _ in blocks)
    block_width = max(columns * (CELL + GAP) - GAP, math.ceil(widest))
    across = max(len(blocks) for _, blocks in rows)
    left = MARGIN + query.width + 2 * MARGIN
    size = (left + across * (block_width + 2 * MARGIN) - MARGIN,
            MARGIN + max(len(rows) * (block_height + MARGIN), 2 * TITLE + query.height + MARGIN))
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, MARGIN), "query", fill="black", font=font)
    sheet.paste(query, (MARGIN, MARGIN + TITLE))
    if any(overlaps for _, blocks in rows for _, patches in blocks for _, overlaps in patches):
        draw.text((MARGIN, MARGIN + TITLE + query.height + GAP), "orange: overlaps the query", fill=MARK, font=font)
    for row, (model, blocks) in enumerate(rows):
        top = MARGIN + row * (block_height + MARGIN)
        for block, (feature, patches) in enumerate(blocks):
            x = left + block * (block_width + 2 * MARGIN)
            draw.text((x, top), f"{model}: {feature}", fill="black", font=font)
            for number, (patch, overlaps) in enumerate(patches):
                cell = (x + number % columns * (CELL + GAP), top + TITLE + number // columns * (CELL + GAP))
                sheet.paste(patch.resize((CELL, CELL), Image.Resampling.BICUBIC), cell)
                if overlaps:
                    draw.rectangle((*cell, cell[0] + CELL - 1, cell[1] + CELL - 1), outline=MARK, width=4)
    atomic_write(path, lambda temporary: sheet.save(temporary, "PNG"))


@cache
def class_colours(count: int) -> np.ndarray:
    """uint8 [count, 3]: each colour the farthest in CIELAB from those before it, the last 40 counted at half their
    distance: labels that are near in number, as the parts of an object are, mostly stand side by side in a picture."""
    candidates = np.stack(np.meshgrid(*[np.arange(0, 256, 17)] * 3, indexing="ij"), axis=-1).reshape(-1, 3)
    linear = np.where(candidates <= 10, candidates / 255 / 12.92, ((candidates / 255 + 0.055) / 1.055) ** 2.4)
    # sRGB's primaries, columns X, Y and Z, each divided by its value of white.
    x, y, z = np.cbrt(linear @ [[0.4340, 0.2127, 0.0178], [0.3762, 0.7152, 0.1095], [0.1898, 0.0722, 0.8728]]).T
    # Rounded: the same colours on every machine.
    lab = np.round([116 * y - 16, 500 * (x - y), 200 * (y - z)]).T
    # Neither dark, grey nor glaring, and darker than all that is pale in save_picture.
    chroma = np.hypot(lab[:, 1], lab[:, 2])
    usable = (lab[:, 0] > 30) & (lab[:, 0] < 80) & (chroma > 20) & (chroma < 80)
    candidates, lab = candidates[usable], lab[usable]
    chosen, squares = [], np.full((count, len(lab)), np.inf)
    for number in range(count):
        recent = squares[max(0, number - 40):number].min(0, initial=np.inf)
        chosen.append(np.minimum(squares.min(0), recent / 4).argmax())
        squares[number] = ((lab - lab[chosen[-1]]) ** 2).sum(1)
    return candidates[chosen].astype(np.uint8)


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
    scale = 512 / max(truth.shape)
    height, width = (max(1, round(side * scale)) for side in truth.shape)
    present = sorted(np.union1d(truth[truth < len(names)], pred).tolist(), key=lambda label: -(truth == label).sum())
    legend = [(names[label] if label in truth else f"{names[label]} (predicted only)", tuple(colours[label].tolist()))
              for label in present]
    if (truth == 255).any():
        legend.append(("not labelled; predictions there are pale", UNLABELLED))
    font, line = ImageFont.load_default(13), 18
    column = 30 + math.ceil(max(font.getlength(text) for text, _ in legend))
    sheet_width = max(3 * width + 20, column)
    columns = sheet_width // column
    sheet = Image.new("RGB", (sheet_width, height + 24 + line * math.ceil(len(legend) / columns) + 6), "white")
    draw = ImageDraw.Draw(sheet)
    pred = colours[pred]
    pred[truth == 255] = 0.2 * pred[truth == 255] + 0.8 * 255
    truth = np.vstack([colours, [UNLABELLED]]).astype(np.uint8)[np.minimum(truth, len(names))]
    for i, (title, panel) in enumerate({"image": image, "ground truth": truth, "prediction": pred}.items()):
        sampling = Image.Resampling.NEAREST if i else Image.Resampling.BICUBIC
        draw.text((i * (width + 10) + 4, 4), title, fill="black", font=font)
        sheet.paste(Image.fromarray(panel).resize((width, height), sampling), (i * (width + 10), 24))
    for i, (text, colour) in enumerate(legend):
        x, y = i % columns * column + 4, height + 28 + i // columns * line
        draw.rectangle((x, y + 2, x + 12, y + 14), fill=colour, outline="grey")
        draw.text((x + 18, y), text, fill="black", font=font)
    path.parent.mkdir(parents=True, exist_ok=True)
    for where, picture in ((path, sheet), (path.with_name(f"{path.stem}_labels.png"), labels)):
        atomic_write(where, partial(picture.save, format="PNG"))
