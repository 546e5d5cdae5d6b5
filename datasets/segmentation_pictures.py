"""Pictures of label maps: image, ground truth and prediction side by side, and the prediction as a label map."""

import math
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from utils.storage import atomic_write

UNLABELLED = (225, 225, 225)


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
