"""What segment.py shows: pictures of predictions, the paper's tables with our results beside them, and figure 6."""

import colorsys
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from models import METHODS
from utils import UserError
from utils.results import PAPER_TABLES, beside_published, caveats, markdown_table, read_results
from utils.storage import atomic_write

METRICS = ("mIoU", "mAcc", "aAcc")
# Title, data sets, where paper_tables.json has them; a key is looked up below the model where there is one.
TABLES = (
    ("Table 2: ADE20K, 150 classes", {"ade20k": ("table2_ade20k_150", None)}),
    ("Table 4: parts", {name: ("table4_part_segmentation", name) for name in ("ade20k-part", "pascal-part", "lip")}),
    ("Table 5: ADE20K-Object, 59 classes", {"ade20k-object": ("table5_ade20k_object_59", None)}),
    ("Table 6: Pascal-Object, 16 classes", {"pascal-object": ("table6_pascal_object_16", None)}),
)
SYNTHETIC = ("synthetic-object", "synthetic-part")
FIGURE6 = (("ADE20K", "ade20k-object", "ade20k-part"), ("Pascal", "pascal-object", "pascal-part"),
           ("Synthetic data (not in the paper)", *SYNTHETIC))
PUBLISHED6 = ("ADE20K", "Pascal")
NAMES = {"deit": "DeiT", "mocov3": "MoCo v3", "dino": "DINO", "beit": "BEiT", "mae": "MAE", "cae": "CAE",
         "ibot": "iBOT"}


def class_colours(count: int) -> np.ndarray:
    """uint8 [count + 1, 3]: hues a golden section apart in three shades; the last one, black, is for no class."""
    colours = [colorsys.hsv_to_rgb(i * 0.618034 % 1, 0.45 + 0.5 * (i % 2), (0.95, 0.75, 0.55)[i % 3])
               for i in range(count)]
    return np.round(255 * np.array([*colours, (0, 0, 0)])).astype(np.uint8)


def save_picture(path: Path, image: np.ndarray, truth: np.ndarray, pred: np.ndarray, names: Sequence[str]) -> None:
    """Image, ground truth and prediction side by side, and below them the names of the classes that occur.

    image: uint8 [H, W, 3]; truth: [H, W], 255 = ignored, black; pred: [H, W]. Long sides are brought to 512 pixels.
    """
    colours = class_colours(len(names))
    panels = [image, *(colours[np.minimum(labels, len(names))] for labels in (truth, pred))]
    scale = 512 / max(truth.shape)
    height, width = (max(1, round(side * scale)) for side in truth.shape)
    panels = [Image.fromarray(panels[0]).resize((width, height), Image.Resampling.BICUBIC),
              *(Image.fromarray(panel).resize((width, height), Image.Resampling.NEAREST) for panel in panels[1:])]
    present = [label for label in np.union1d(truth, pred).tolist() if label < len(names)]
    pixels = {label: int((truth == label).sum()) for label in present}
    font, line, column = ImageFont.load_default(13), 18, 230
    columns = max(1, (3 * width + 20) // column)
    rows = -(-(len(present) + 1) // columns)
    sheet = Image.new("RGB", (max(3 * width + 20, column), height + 24 + line * rows + 6), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (panel, title) in enumerate(zip(panels, ("image", "ground truth", "prediction"), strict=True)):
        draw.text((i * (width + 10) + 4, 4), title, fill="black", font=font)
        sheet.paste(panel, (i * (width + 10), 24))
    legend = [(names[label] + ("" if pixels[label] else " (predicted only)"), tuple(colours[label].tolist()))
              for label in sorted(present, key=lambda label: -pixels[label])] + [("not labelled", (0, 0, 0))]
    for i, (text, colour) in enumerate(legend):
        x, y = i % columns * column + 4, height + 28 + i // columns * line
        draw.rectangle((x, y + 2, x + 12, y + 14), fill=colour, outline="grey")
        draw.text((x + 18, y), text[:32], fill="black", font=font)
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, lambda temporary: sheet.save(temporary, "PNG"))


def published(dataset: str, model: str) -> list[float | None]:
    """mIoU, mAcc and aAcc of the paper, None where it has none."""
    paper = json.loads(PAPER_TABLES.read_text())
    for _, datasets in TABLES:
        if dataset in datasets:
            table, key = datasets[dataset]
            row = paper[table].get(model, [None] * 3) if model != "columns" else [None] * 3
            row = row[key] if key and isinstance(row, dict) else row
            return [row[name] for name in METRICS] if isinstance(row, dict) else row
    return [None] * 3


def latest_results(folder: Path) -> dict[tuple[str, str], dict]:
    """The last result of every (row, data set). Row: the model, with what sets the run apart from the paper's."""
    results = {}
    for result in read_results(folder, "segment"):
        marks = [caveats(result).replace(", synthetic data", "").replace("synthetic data", "")]
        if result["iterations"] != 160_000:
            marks.append(f"{result['iterations']} iterations")
        if result["args"]["authors_defects"]:
            marks.append("authors' defects")
        marks = ", ".join(mark for mark in marks if mark)
        dataset = "synthetic-part" if result["dataset"] == "synthetic" else result["dataset"]
        results[f"{result['model']} ({marks})" if marks else result["model"], dataset] = result
    return results


def tables(folder: Path) -> str:
    """Tables 2, 4, 5 and 6 in Markdown: published, ours, difference; and ours on synthetic data, where there is any."""
    results = latest_results(folder)
    texts = []
    for title, datasets in TABLES:
        rows = [*METHODS, *sorted({row for row, dataset in results if dataset in datasets and row not in METHODS})]
        header = ["model"] + [text for dataset in datasets for metric in METRICS
                              for text in (f"{dataset} {metric}, paper", "ours", "difference")]
        lines = []
        for row in rows:
            cells = [row]
            for dataset in datasets:
                ours = results.get((row, dataset), {})
                for metric, paper in zip(METRICS, published(dataset, row.split(" (")[0]), strict=True):
                    cells += beside_published(paper, ours.get(metric))
            lines.append(cells)
        texts.append(f"{title}\n\n{markdown_table(header, lines)}")
    rows = sorted({row for row, dataset in results if dataset in SYNTHETIC})
    if rows:
        header = ["model", *(f"{dataset} {metric}" for dataset in SYNTHETIC for metric in METRICS)]
        lines = [[row, *(beside_published(None, results.get((row, dataset), {}).get(metric))[1]
                         for dataset in SYNTHETIC for metric in METRICS)] for row in rows]
        texts.append(f"Synthetic data (not in the paper)\n\n{markdown_table(header, lines)}")
    return "\n\n".join(texts)


def figure6(path: Path, folder: Path) -> None:
    """Object against part segmentation, mIoU, as grouped bars: published and ours. Writes a PNG."""
    results = latest_results(folder)
    panels = []
    for title, *datasets in FIGURE6:
        ours = {row for row, dataset in results if dataset in datasets}
        rows = [row for row in METHODS if row in ours or title in PUBLISHED6] + sorted(ours - set(METHODS))
        if rows:
            panels.append((title, datasets, rows))
    bar, gap, left, top, height = 22, 26, 60, 60, 240
    group = 4 * bar + gap
    panel_height = top + height + 50
    width = left + group * max(len(rows) for *_, rows in panels) + 20
    canvas = Image.new("RGB", (width, panel_height * len(panels)), "white")
    draw, font, small = ImageDraw.Draw(canvas), ImageFont.load_default(14), ImageFont.load_default(10)
    kinds = (("object, published", "#9ecae1"), ("object, ours", "#2171b5"),
             ("part, published", "#fdd0a2"), ("part, ours", "#d94801"))
    for number, (title, datasets, rows) in enumerate(panels):
        base = number * panel_height + top + height
        draw.text((left, base - height - 54), f"{title}: mIoU in percent", fill="black", font=font)
        for i, (text, colour) in enumerate(kinds):
            x = left + 150 * i
            draw.rectangle((x, base - height - 30, x + 12, base - height - 18), fill=colour)
            draw.text((x + 18, base - height - 32), text, fill="black", font=font)
        for tick in range(0, 101, 20):
            y = base - height * tick / 100
            draw.line((left, y, canvas.width - 10, y), fill="#dddddd")
            draw.text((left - 8, y), str(tick), fill="black", font=font, anchor="rm")
        for i, row in enumerate(rows):
            x = left + gap / 2 + i * group
            values = [value for dataset in datasets for value in
                      (published(dataset, row)[0], results.get((row, dataset), {}).get("mIoU"))]
            for k, value in enumerate(values):
                if value is not None:
                    y = base - height * value / 100
                    draw.rectangle((x + k * bar, y, x + (k + 1) * bar - 3, base), fill=kinds[k][1])
                    draw.text((x + (k + 0.45) * bar, y - 2), f"{value:.0f}", fill="black", font=small, anchor="mb")
            name, _, marks = row.partition(" (")
            draw.text((x + 2 * bar, base + 6), NAMES.get(name, name)[:16], fill="black", font=font, anchor="mt")
            draw.text((x + 2 * bar, base + 24), marks.rstrip(")")[:24], fill="black", font=small, anchor="mt")
        draw.line((left, base, canvas.width - 10, base), fill="black")
    try:
        atomic_write(path, lambda temporary: canvas.save(temporary, "PNG"))
    except OSError as error:
        raise UserError(f"--figure6 {path} cannot be written ({error.strerror or error}); name another file") from None
