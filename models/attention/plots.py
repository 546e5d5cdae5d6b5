"""Table and plots of attention results; the docstring of models/attention/__main__.py defines the figures."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from utils.drawing import COLOURS, COLUMN, PAGE, plot
from utils.results import caveats, with_marks


def latest(results: Sequence[dict]) -> dict[tuple, dict]:
    """The last result of each (name, part, mask ratio). The name is the run's, with the file and its folder where a
    name stands there with several weights, and with marks for random weights and synthetic data."""
    names = [name for name, _ in {(result.get("name", result["model"]), result["weights"]) for result in results}]
    chosen = {}
    for result in results:
        name = result.get("name", result["model"])
        if names.count(name) > 1 and result["weights"] != "random":
            name += f" {'/'.join(Path(result['weights']).parts[-2:])}"
        chosen[with_marks(name, caveats(result)), result["part"], result["mask_ratio"]] = result
    return chosen


def summary_table(results: Sequence[dict]) -> tuple:
    """(title, header, rows) of the last result of each model, part and mask ratio: attention distance of the first and
    the last layer and the mean over layers, radii of the receptive field, similarity of maps in the last layer."""
    def show(value, digits=1):
        return "-" if value is None or math.isnan(value) else f"{value:.{digits}f}"

    rows = []
    for (name, part, ratio), result in latest(results).items():
        title = f"{name}, encoder" if part == "encoder" else f"{name}, decoder, mask ratio {ratio:g}"
        layers = np.array(result["distance_pixels"], dtype=float).mean(1)
        radii = [result.get(f"{field}_radius{share}_pixels")
                 for field in ("receptive_field", "receptive_field_tokens") for share in (50, 90)]
        rows.append([title, str(result["num_images"]), *map(show, [layers[0], layers[-1], layers.mean(), *radii]),
                     show(result["map_similarity"][-1], 3)])
    header = ["model", "images", "distance, first layer", "last layer", "mean", "receptive field, 50%", "90%",
              "of the decoder alone, 50%", "90%", "map similarity, last layer"]
    return "Attention, distances and radii in pixels", header, rows


def write_plots(results: Sequence[dict], folder: Path) -> list[str]:
    """Writes the plots of the last result of each model, part and mask ratio; returns the files' names.
    attention_distance_encoders.png: a line per model. attention_distance_decoder.png (of a second model, _2, and so
    on): a line per mask ratio, mask tokens and visible tokens apart. attention_fields.png: every receptive field."""
    chosen, names = latest(results), []
    encoders = {name: result for (name, part, _), result in chosen.items() if part == "encoder"}
    fields = [[(f"{name}, encoder", result, "receptive_field") for name, result in encoders.items()]]
    if encoders:
        names.append("attention_distance_encoders.png")
        draw_distances(folder / names[-1], {"Encoders, whole images": encoders}, ["distance_pixels"])
    for number, model in enumerate(dict.fromkeys(name for name, part, _ in chosen if part == "decoder")):
        decoders = {f"mask ratio {key[2]:g}": chosen[key] for key in sorted(chosen) if key[:2] == (model, "decoder")}
        names.append(f"attention_distance_decoder{f'_{number + 1}' if number else ''}.png")
        draw_distances(folder / names[-1], {f"{model}, decoder: {queries} as queries": decoders
                                            for queries in ("mask tokens", "visible tokens")},
                       ["distance_pixels_masked", "distance_pixels_visible"])
        fields += [[(f"{model}, decoder, {ratio}, from {source}", result, field) for ratio, result in decoders.items()]
                   for field, source in (("receptive_field", "visible pixels"),
                                         ("receptive_field_tokens", "the encoder's output"))]
    # Without --queries, and at mask ratio 0, there is no field.
    fields = [kept for row in fields if (kept := [entry for entry in row if entry[1][entry[2]]])]
    if fields:
        names.append("attention_fields.png")
        draw_fields(folder / names[-1], fields)
    return names


def draw_distances(path: Path, panels: Mapping[str, Mapping[str, dict]], figures: Sequence[str]) -> None:
    """Plots attention distance by layer: in each panel, {title: {name: result}}, a line per name of the means over
    heads, and a dot per head, of that panel's figure in the results. Lines without values, as of mask tokens at mask
    ratio 0, are left out. Grey lines: equal weights. Results of one patch size get a second scale, in patches."""
    results = {name: result for curves in panels.values() for name, result in curves.items()}
    patch, *others = {result["patch_size"] for result in results.values()}
    names = [*results, "equal weights"]
    columns = 2 if len(panels) > 1 or max(map(len, names)) < 24 else 1
    lines = sum(len(textwrap.wrap(name, 54)) for name in names) / columns
    with plot(path, COLUMN if len(panels) == 1 else PAGE, 2.2 + 0.13 * math.ceil(lines)) as figure:
        handles = {}
        for axes, (title, curves), key in zip(figure.subplots(1, len(panels), sharey=True, squeeze=False)[0],
                                              panels.items(), figures, strict=True):
            axes.set(title=textwrap.fill(title, 56), xlabel="layer (line: mean over heads; dots: heads)",
                     ylabel="attention distance, pixels")
            axes.grid(axis="y")
            for value in {result["distance_pixels_uniform"] for result in curves.values()}:
                handles["equal weights"] = axes.axhline(value, color="#999999")
            for number, (name, result) in enumerate(curves.items()):
                layers = np.array(result[key], dtype=float)
                if np.isnan(layers[0]).any():
                    continue
                numbers, colour = np.arange(1, len(layers) + 1), COLOURS[number % len(COLOURS)]
                # Dots of different lines stand side by side.
                shifted = numbers + (number - (len(curves) - 1) / 2) * 0.6 / len(curves)
                axes.plot(shifted, layers, ".", color=colour, markersize=2.2, markeredgewidth=0)
                handles[name], = axes.plot(numbers, layers.mean(1), "o-", color=colour, markersize=2)
                axes.set_xticks(numbers[::1 + len(layers) // 13])
            axes.set_ylim(bottom=0)
            if not others:
                scale = axes.secondary_yaxis("right", functions=(lambda x: x / patch, lambda x: x * patch))
                scale.set_ylabel("patches")
        names = [name for name in names if name in handles]
        figure.legend([handles[name] for name in names], [textwrap.fill(name, 54) for name in names],
                      loc="outside lower center", ncols=columns)


def draw_fields(path: Path, rows: Sequence[Sequence[tuple[str, dict, str]]], columns: int = 5) -> None:
    """Plots receptive fields, row by row, (title, result, name of the field in the result) each; rows longer than
    `columns` go on in the next. Coloured by the logarithm of value over the field's largest value, with circles of the
    radii that hold 50% and 90%."""
    rows = [row[start:start + columns] for row in rows for start in range(0, len(row), columns)]
    across = max(2, *map(len, rows))
    lines = sum(max(len(textwrap.wrap(title, 28)) + 1 for title, *_ in row) for row in rows)
    with plot(path, PAGE * across / 5, 1.5 * len(rows) + 0.11 * lines + 0.6) as figure:
        from matplotlib import colormaps
        from matplotlib.colors import LogNorm
        from matplotlib.patches import Circle
        grid = figure.subplots(len(rows), across, squeeze=False)
        colours = colormaps["magma_r"].with_extremes(bad="#cdcdcd")
        for axes in grid.flat:
            axes.set_axis_off()
        for down, row in enumerate(rows):
            for axes, (title, result, name) in zip(grid[down], row, strict=False):
                field = np.array(result[name], dtype=float)
                largest, middle = np.nanmax(field) or 1, len(field) // 2
                image = axes.imshow(np.clip(field / largest, 1e-3, 1), norm=LogNorm(1e-3, 1), cmap=colours)
                pixels, patches = ([result[f"{name}_radius{share}_{unit}"] for share in (50, 90)]
                                   for unit in ("pixels", "patches"))
                radii = "50%: {:.0f}, 90%: {:.0f} pixels".format(*pixels)
                axes.set_title(f"{textwrap.fill(title, 28)}\n{radii}", fontsize=6)
                for radius in patches:
                    axes.add_patch(Circle((middle, middle), radius, fill=False, color="#0050ff"))
        figure.colorbar(image, ax=grid, location="bottom", aspect=40, shrink=0.8, pad=0.03 / len(rows),
                        label="share of the largest value; grey: no pair\ncircles: radii that hold 50% and 90%")
