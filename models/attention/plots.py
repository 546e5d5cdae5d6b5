"""Table and plots of attention results (models/attention.py defines the figures), drawn with Pillow."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from utils.drawing import COLOURS
from utils.results import caveats, markdown_table
from utils.storage import atomic_write

CELL, MARGIN = 260, 20
# Colours of a receptive field from 1/1000 of its largest value to that value, as red, green, blue.
RAMP = ((255, 255, 255), (253, 208, 120), (240, 110, 60), (160, 25, 80), (40, 0, 60))
NO_PAIR = (205, 205, 205)


def latest(results: Sequence[dict]) -> dict[tuple, dict]:
    """The last result of each (name, part, mask ratio). The name is the model's, with the file and its folder where a
    model stands there with several weights, and with marks for random weights and synthetic data."""
    files = {}
    for result in results:
        files.setdefault(result["model"], set()).add(result["weights"])
    chosen = {}
    for result in results:
        name = result["model"]
        if len(files[name]) > 1 and result["weights"] != "random":
            name += f" {'/'.join(Path(result['weights']).parts[-2:])}"
        marks = caveats(result)
        name += f" ({marks})" if marks else ""
        chosen[name, result["part"], result["mask_ratio"]] = result
    return chosen


def title_of(key: tuple) -> str:
    name, part, ratio = key
    return f"{name}, encoder" if part == "encoder" else f"{name}, decoder, mask ratio {ratio:g}"


def mean(values: Sequence[float | None]) -> float:
    """NaN where a value is absent."""
    return math.nan if None in values else sum(values) / len(values)


def summary_table(results: Sequence[dict]) -> str:
    """A Markdown table of the last result of each model, part and mask ratio: attention distance of the first and the
    last layer and the mean over layers, radii of the receptive field, likeness of maps in the last layer."""
    def show(value, digits=1):
        return "-" if value is None or math.isnan(value) else f"{value:.{digits}f}"

    rows = []
    for key, result in latest(results).items():
        layers = [mean(heads) for heads in result["distance_pixels"]]
        radii = [show(result.get(f"{field}_radius{share}_pixels"))
                 for field in ("receptive_field", "receptive_field_tokens") for share in (50, 90)]
        rows.append([title_of(key), str(result["num_images"]), show(layers[0]), show(layers[-1]), show(mean(layers)),
                     *radii, show(result["map_similarity"][-1], 3)])
    header = ["model", "images", "distance, first layer", "last layer", "mean", "receptive field, 50%", "90%",
              "of the decoder alone, 50%", "90%", "map similarity, last layer"]
    return "Attention, distances and radii in pixels\n\n" + markdown_table(header, rows)


def write_plots(results: Sequence[dict], folder: Path) -> list[str]:
    """Writes the plots of the last result of each model, part and mask ratio; returns the files' names.

    attention_distance_encoders.png: a line per model. attention_distance_decoder.png (of a second model, _2, and so
    on): a line per mask ratio, mask tokens and visible tokens apart. attention_fields.png: every receptive field.
    """
    chosen, images = latest(results), {}
    encoders = {key: result for key, result in chosen.items() if key[1] == "encoder"}
    if encoders:
        curves = {key[0]: result["distance_pixels"] for key, result in encoders.items()}
        images["encoders"] = draw_distances([("Encoders, whole images", curves)], *scales(encoders))
    for number, name in enumerate(dict.fromkeys(key[0] for key in chosen if key[1] == "decoder")):
        decoders = {key: chosen[key] for key in sorted(key for key in chosen if key[:2] == (name, "decoder"))}
        panels = [(f"{name}, decoder: {queries} as queries",
                   {f"mask ratio {key[2]:g}": result[f"distance_pixels_{group}"] for key, result in decoders.items()})
                  for group, queries in (("masked", "mask tokens"), ("visible", "visible tokens"))]
        images[f"decoder{f'_{number + 1}' if number else ''}"] = draw_distances(panels, *scales(decoders))
    files = {f"attention_distance_{name}.png": image for name, image in images.items()}
    rows = [[(title_of(key), "token, from pixels", result, "receptive_field") for key, result in encoders.items()]]
    for name in dict.fromkeys(key[0] for key in chosen if key[1] == "decoder"):
        for field, source in (("receptive_field", "visible pixels"), ("receptive_field_tokens", "encoder's output")):
            rows.append([(f"{name}, decoder", f"mask ratio {key[2]:g}, from {source}", chosen[key], field)
                         for key in sorted(key for key in chosen if key[:2] == (name, "decoder"))])
    # Without --queries, and at mask ratio 0, there is no field.
    rows = [kept for row in rows if (kept := [entry for entry in row if entry[2][entry[3]]])]
    if rows:
        files["attention_fields.png"] = draw_fields(rows)
    for name, image in files.items():
        atomic_write(folder / name, lambda temporary, image=image: image.save(temporary, format="PNG"))
    return list(files)


def scales(results: Mapping[tuple, dict]) -> tuple[int | None, list[float]]:
    """The one patch size of all results, or None, and the distances that equal weights give, in pixels."""
    sizes = {result["patch_size"] for result in results.values()}
    uniform = {result["distance_pixels_uniform"] for result in results.values()}
    return sizes.pop() if len(sizes) == 1 else None, sorted(uniform)


def draw_distances(panels: Sequence[tuple[str, Mapping[str, Sequence[Sequence[float | None]]]]],
                   patch: int | None, uniform: Sequence[float]) -> Image.Image:
    """Attention distance by layer: in each panel (title, {name: [layers][heads] in pixels}) a line per name of the
    means over heads, and a dot per head. patch: its side in pixels, for a second scale on the right, or None. uniform:
    distances of equal weights, grey lines. Lines without values, as of mask tokens at mask ratio 0, are left out."""
    width, height, left, right, top, bottom = 660, 460, 60, 60, 50, 50
    key = 24 * max(len(curves) for _, curves in panels) + MARGIN
    image = Image.new("RGB", (width * len(panels), height + key), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(14)
    values = [value for _, curves in panels for layers in curves.values() for heads in layers for value in heads
              if value is not None] + uniform
    step = nice_step(max(values) / 6)
    high = step * max(1, math.ceil(max(values) / step))
    depth = max(len(layers) for _, curves in panels for layers in curves.values())
    for panel, (title, curves) in enumerate(panels):
        start = panel * width

        def place(layer, value, start=start):
            across = (layer - 0.5) / depth
            return (start + left + across * (width - left - right),
                    height - bottom - value / high * (height - top - bottom))

        draw.text((start + left, 6), title, fill="black", font=font)
        for tick in range(round(high / step) + 1):
            y = place(1, tick * step)[1]
            draw.line((start + left, y, start + width - right, y), fill="#dddddd")
            draw.text((start + left - 8, y), f"{tick * step:g}", fill="black", font=font, anchor="rm")
            if patch:
                draw.text((start + width - right + 8, y), f"{tick * step / patch:.1f}", fill="black", font=font,
                          anchor="lm")
        draw.text((start + 8, 24), "pixels", fill="black", font=font)
        if patch:
            draw.text((start + width - 8, 24), "patches", fill="black", font=font, anchor="ra")
        for value in uniform:
            y = place(1, value)[1]
            draw.line((start + left, y, start + width - right, y), fill="#999999", width=2)
            draw.text((start + width - right, y + 2), "equal weights", fill="#999999", font=font, anchor="ra")
        for layer in range(1, depth + 1):
            draw.text((place(layer, 0)[0], height - bottom + 8), str(layer), fill="black", font=font, anchor="mt")
        draw.text((start + width / 2, height - 22), "layer (line: mean over heads; dots: heads)", fill="black",
                  font=font, anchor="mt")
        for number, (name, layers) in enumerate(curves.items()):
            if None in layers[0]:
                continue
            colour = COLOURS[number % len(COLOURS)]
            # Dots of different lines stand side by side.
            shift = (number - (len(curves) - 1) / 2) * 4
            for layer, heads in enumerate(layers, 1):
                for value in heads:
                    x, y = place(layer, value)
                    draw.ellipse((x + shift - 1, y - 1, x + shift + 1, y + 1), fill=colour)
            points = [place(layer, mean(heads)) for layer, heads in enumerate(layers, 1)]
            draw.line(points, fill=colour, width=2)
            for x, y in points:
                draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill=colour)
            draw.text((start + left, height + 24 * number), name, fill=colour, font=font)
    return image


def nice_step(least: float) -> float:
    """The smallest of 1, 2, 5, 10, 20, ... (and 0.5, 0.2, ...) that is not below `least`."""
    power = 10 ** math.floor(math.log10(max(least, 1e-9)))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least * (1 - 1e-9))


def field_colour(value: float | None, largest: float) -> tuple[int, int, int]:
    """By the logarithm, over three powers of ten below the largest value."""
    if value is None:
        return NO_PAIR
    level = (1 + math.log10(max(value / largest, 1e-3)) / 3 if largest else 0) * (len(RAMP) - 1)
    low = min(int(level), len(RAMP) - 2)
    return tuple(round(a + (b - a) * (level - low)) for a, b in zip(RAMP[low], RAMP[low + 1], strict=True))


def draw_fields(rows: Sequence[Sequence[tuple[str, str, dict, str]]], columns: int = 5) -> Image.Image:
    """A sheet of receptive fields, row by row, (title, second line, result, name of the field in the result) each; rows
    longer than `columns` go on in the next. Coloured by the logarithm of value over the field's largest value, with
    circles of the radii that hold 50% and 90%."""
    rows = [row[start:start + columns] for row in rows for start in range(0, len(row), columns)]
    block = CELL + 3 * MARGIN + 34
    image = Image.new("RGB", (max(map(len, rows)) * (CELL + MARGIN) + MARGIN, len(rows) * block + 70), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(12)
    for down, row in enumerate(rows):
        for across, (title, label, result, name) in enumerate(row):
            x, y = MARGIN + across * (CELL + MARGIN), MARGIN + down * block
            for line, text in enumerate((title, label)):
                while draw.textlength(text, font=font) > CELL:
                    text = text[:-2] + "~"
                draw.text((x, y + 16 * line), text, fill="black", font=font)
            radii = [result[f"{name}_radius{share}_patches"] for share in (50, 90)]
            image.paste(field_picture(result[name], radii), (x, y + 34))
            pixels = [result[f"{name}_radius{share}_pixels"] for share in (50, 90)]
            draw.text((x, y + 38 + CELL), f"50% within {pixels[0]:.0f}, 90% within {pixels[1]:.0f} pixels",
                      fill="black", font=font)
    y = image.height - 50
    for step in range(200):
        draw.line((MARGIN + step, y, MARGIN + step, y + 12), fill=field_colour(10 ** (3 * step / 199 - 3), 1))
    draw.text((MARGIN, y + 16), "1/1000 to 1 of the largest; grey: no pair", fill="black", font=font)
    return image


def field_picture(field: Sequence[Sequence[float | None]], radii: Sequence[float]) -> Image.Image:
    """CELL x CELL pixels; radii in patches."""
    largest = max(value for row in field for value in row if value is not None)
    picture = Image.new("RGB", (len(field[0]), len(field)))
    picture.putdata([field_colour(value, largest) for row in field for value in row])
    picture = picture.resize((CELL, CELL), Image.Resampling.NEAREST)
    for radius in radii:
        low, high = (CELL / 2 + sign * radius * CELL / len(field) for sign in (-1, 1))
        ImageDraw.Draw(picture).ellipse((low, low, high, high), outline="#0050ff", width=2)
    return picture
