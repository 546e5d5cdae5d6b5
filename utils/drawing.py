"""Two plots as PNG, drawn with Pillow: accuracy over epochs, and a confusion matrix."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from .storage import atomic_write

COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22")


def draw_curves(path: Path, title: str, curves: Mapping[str, Sequence[float]]) -> None:
    """Writes a PNG of curves by name, in percent, one value per epoch."""
    width, height, left, right, top, bottom = 960, 560, 70, 220, 50, 50
    image = Image.new("RGB", (width, height), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(16)
    values = [value for curve in curves.values() for value in curve]
    low, high = 5 * (int(min(values)) // 5), min(100, 5 * (int(max(values)) // 5 + 1))
    epochs = max(len(curve) for curve in curves.values())

    def place(epoch, value):
        across = (epoch - 1) / max(1, epochs - 1)
        up = (value - low) / max(1, high - low)
        return left + across * (width - left - right), height - bottom - up * (height - top - bottom)

    draw.text((left, 14), title, fill="black", font=font)
    step = max(1, (high - low) // 5)
    for value in range(low, high + 1, step):
        x, y = place(1, value)
        draw.line((x, y, width - right, y), fill="#dddddd")
        draw.text((x - 10, y), f"{value}%", fill="black", font=font, anchor="rm")
    for epoch in sorted({1, epochs, *range(10, epochs, 10 * max(1, epochs // 100))}):
        x, y = place(epoch, low)
        draw.text((x, y + 10), str(epoch), fill="black", font=font, anchor="mt")
    for number, (name, curve) in enumerate(curves.items()):
        colour = COLOURS[number % len(COLOURS)]
        points = [place(epoch, value) for epoch, value in enumerate(curve, 1)]
        draw.line(points, fill=colour, width=2)
        for x, y in points if len(points) < 30 else ():
            draw.ellipse((x - 2, y - 2, x + 2, y + 2), fill=colour)
        if number < 20:
            draw.text((width - right + 12, top + 22 * number), name, fill=colour, font=font)
    atomic_write(path, lambda temporary: image.save(temporary, format="PNG"))


def draw_confusion(path: Path, title: str, matrix: torch.Tensor, classes: Sequence[str]) -> None:
    """Writes a PNG of a confusion matrix [C, C] (row = label), shaded by the share of the label's row. Up to 30 classes
    with names and percentages; above, shades alone."""
    count, named = len(classes), len(classes) <= 30
    cell = 64 if count <= 12 else 40 if named else max(1, 1000 // count)
    margin, top = (170 if named else 20), 50
    size = cell * count
    image = Image.new("RGB", (margin + size + 20, top + size + margin), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(14)
    draw.text((10, 14), f"{title}; rows: label, columns: prediction", fill="black", font=font)
    share = matrix.double() / matrix.sum(1, keepdim=True).clamp(min=1)
    for row in range(count):
        for column in range(count):
            value = share[row, column].item()
            x, y = margin + column * cell, top + row * cell
            shade = int(255 * (1 - value))
            draw.rectangle((x, y, x + cell - 1, y + cell - 1), fill=(shade, int(shade * 0.8 + 51), 255))
            if named:
                draw.text((x + cell / 2, y + cell / 2), f"{100 * value:.0f}", font=font, anchor="mm",
                          fill="white" if value > 0.6 else "black")
    for index, name in enumerate(classes if named else ()):
        name = name if len(name) <= 22 else name[:21] + "~"
        draw.text((margin - 8, top + (index + 0.5) * cell), name, fill="black", font=font, anchor="rm")
        label = Image.new("RGB", (margin, 20), "white")
        ImageDraw.Draw(label).text((margin - 2, 10), name, fill="black", font=font, anchor="rm")
        image.paste(label.rotate(90, expand=True), (int(margin + (index + 0.5) * cell - 10), top + size + 6))
    atomic_write(path, lambda temporary: image.save(temporary, format="PNG"))
