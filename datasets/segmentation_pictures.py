"""Pictures of label maps: image, ground truth and prediction side by side, and the prediction as a label map."""

import colorsys
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from utils.storage import atomic_write

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
