"""The data set that needs no files: articulated figures drawn by code, with part keypoints and part and object masks.

draw_figure(seed) is one picture: one or two jointed figures of four species, in random pose, build, colour, texture,
size and place, on a cluttered background. The parts of a figure share its palette, and the clutter is made of the same
primitive in the same colours, so that a part is told by its shape and its place in the figure, not by its colour.

The same on every machine for a seed: random numbers come from Python's random.Random alone, vertices are rounded to 1/8
pixel, and shapes are filled here in integers, because Pillow fills polygons with sharp corners differently from version
11 on. Geometry is separate from painting, and cheap: the keypoints of a whole split are known without painting it.
Points are complex numbers, x + 1j * y in pixels, with y pointing down.
"""

import cmath
import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
from PIL import Image

from .patches import PatchDataset, PatchImage, Transform, choose_keypoints, keypoint_patches
from .synthetic_figures import PART_NAMES, SPECIES, Dice, Shape, fan, limb, oval, squared, step, tube

OBJECT_NAMES = tuple(SPECIES)
KEYPOINT_NAMES = ("eye", "hand", "foot", "tail", "mouth", "ear", "knee")
DEFAULT_KEYPOINTS = KEYPOINT_NAMES[:4]
# The keypoints that do not have the name of their part.
RENAMED = {"leg": "knee", "wing": "hand", "fin": "hand"}
NUM_IMAGES = {"train": 400, "test": 200, "val": 200}
SIDES = (256, 288, 320, 352, 384)
SUBPIXELS = 8
BANDS = {"belly": ((0.15, 1),), "lines": ((-0.7, -0.3), (0.2, 0.6))}  # where across the width they begin and end
STYLES = ("plain", "belly", "lines", "stripes", "stripes", "spots", "spots")
CIRCLE = (1, 0.7 + 0.7j, 1j, -0.7 + 0.7j, -1, -0.7 - 0.7j, -1j, 0.7 - 0.7j)


class Keypoint(NamedTuple):
    name: str  # one of KEYPOINT_NAMES; "hand" is also the tip of a wing or of a breast fin
    x: int  # column and row of its pixel, perhaps outside the image
    y: int
    visible: bool  # inside the image and not covered by what is painted later
    part: int  # its label in part_mask
    figure: int  # which figure of the picture, counted from 0


class Picture(NamedTuple):
    image: Image.Image  # RGB
    keypoints: list[Keypoint]
    part_mask: np.ndarray  # uint8 [H, W]: 0 = other, i + 1 = PART_NAMES[i]
    object_mask: np.ndarray  # uint8 [H, W]: 0 = other, i + 1 = OBJECT_NAMES[i]


class Scene(NamedTuple):
    size: tuple[int, int]  # width, height
    species: list[int]  # of each figure: its label in object_mask
    shapes: list[Shape]  # in pixels, in the order of painting
    spans: np.ndarray  # scan() of the shapes
    keypoints: list[Keypoint]


def draw_figure(seed: int, size: tuple[int, int] | None = None, num_figures: int | None = None) -> Picture:
    """One picture with its masks and keypoints.

    size: (width, height), or None to draw each from SIDES. num_figures: 1, 2, or None to draw one of them.
    """
    scene = compose(seed, size, num_figures)
    # i + 1 where shapes[i] is seen, 0 for the background.
    shape_map = fill(scene.size, scene.spans, range(1, len(scene.shapes) + 1))
    labels = [(shape.part, scene.species[shape.figure] if shape.part else 0) for shape in scene.shapes]
    masks = np.take(np.array([(0, 0), *labels], np.uint8).T, shape_map, axis=1)
    return Picture(paint(seed, scene, shape_map), scene.keypoints, *masks)


def draw_image(seed: int, num_figures: int | None = None) -> Image.Image:
    """The image of draw_figure alone."""
    return draw_figure(seed, num_figures=num_figures).image


def compose(seed: int, size: tuple[int, int] | None = None, num_figures: int | None = None) -> Scene:
    """The geometry of draw_figure's picture: what is where, and where the keypoints are. Nothing is painted."""
    dice = Dice(2 * seed)
    size = size or (dice.pick(SIDES), dice.pick(SIDES))
    count = num_figures or (2 if dice.random() < 0.4 else 1)
    shapes = [shape for _ in range(dice.whole(5, 14)) for shape in clutter(dice, size)]
    species = [dice.whole(1, len(SPECIES)) for _ in range(count)]
    for figure in range(count):
        shapes += place(dice, size, species, figure)
    if dice.random() < 0.5:  # something in front of the figures
        shapes += [shape for _ in range(dice.whole(1, 2)) for shape in clutter(dice, size)]
    owner, row, begin, end = spans = scan(size, [outline(shape) for shape in shapes])
    keypoints = []
    for number, shape in enumerate(shapes):
        if shape.at is not None:
            name, where = PART_NAMES[shape.part - 1], point(shape, shape.at, 0)
            x, y = math.floor(where.real), math.floor(where.imag)
            painted = owner[(row == y) & (begin <= x) & (x < end)]
            visible = painted[-1:].tolist() == [number]  # the last shape painted there, if there is one
            keypoints.append(Keypoint(RENAMED.get(name, name), x, y, visible, shape.part, shape.figure))
    return Scene(size, species, shapes, spans, keypoints)


def place(dice, size, species, figure):
    """The shapes of one figure in pixels: built, turned, squeezed, perhaps mirrored, enlarged and moved to its place.
    Two figures are smaller than one and side by side."""
    alone = len(species) == 1
    extent = min(size) * (dice(0.7, 1.0) if alone else dice(0.6, 0.8))  # the longer side of its bounding box
    column = 0.5 if alone else 0.3 + 0.4 * figure
    centre = complex(size[0] * (column + dice(-0.1, 0.1)), size[1] * dice(0.4, 0.6))
    body = SPECIES[OBJECT_NAMES[species[figure] - 1]](dice)
    angle, squeeze, mirror = math.radians(dice(-22, 22)), dice(0.8, 1.1), dice.pick((-1, 1))
    right, down = cmath.rect(mirror * squeeze, angle), cmath.rect(1, angle) * 1j
    turned = [[[v.real * right + v.imag * down for v in section] for section in shape.sections] for shape in body]
    xs, ys = zip(*[(c.real, c.imag) for sections in turned for c, _ in sections], strict=True)
    scale = extent / max(max(xs) - min(xs), max(ys) - min(ys))
    shift = centre - scale * complex(max(xs) + min(xs), max(ys) + min(ys)) / 2
    # At least 1.3 pixels to each side: no part of a tube may fall between the pixels.
    moved = [[(shift + scale * c, max(scale, 1.3 / math.sqrt(squared(n))) * n) for c, n in sections]
             for sections in turned]
    return [shape._replace(sections=sections, figure=figure) for shape, sections in zip(body, moved, strict=True)]


def clutter(dice, size):
    """One thing that belongs to no figure: a blob, a bar, a cone, a bent branch or a bundle of rays. In pixels."""
    start = complex(dice(0, size[0]), dice(0, size[1]))
    angle, length, radius = dice(0, 360), dice(15, 110), dice(2, 16)
    ends = (start, step(start, angle, length))
    return dice.pick((
        lambda: [oval("", start, angle, length, dice(0.2, 0.5) * length)],
        lambda: [tube("", ends, (radius, dice(0.1, 1) * radius))],
        lambda: [tube("", ends, (0.4 * length, 1.5))],
        lambda: limb("", start, angle, (0.6 * length, 0, radius, radius),
                     (0.5 * length, dice(-120, 120), radius, 2))[0],
        lambda: fan("", start, angle, (-40, -12, 14, 38), [0.6 * length] * 4, (3, 4, 2)),
    ))()


def point(shape, along, across):
    """The point at a share `along` (0 to 1) of the cross-sections and `across` (-1 to 1) of the width."""
    position = along * (len(shape.sections) - 1)
    i = min(int(position), len(shape.sections) - 2)
    (c0, n0), (c1, n1) = shape.sections[i:i + 2]
    return c0 + across * n0 + (position - i) * (c1 - c0 + across * (n1 - n0))


def outline(shape):
    """The polygon of a shape; three more points at each end make it round."""
    polygon = []
    for way in (shape.sections, [(c, -n) for c, n in reversed(shape.sections)]):
        (before, _), (c, n) = way[-2:]
        ahead = math.sqrt(squared(n) / squared(c - before)) * (c - before)
        polygon += [c + n for c, n in way]
        polygon += [c + 0.7 * n + 0.7 * ahead, c + ahead, c - 0.7 * n + 0.7 * ahead]
    return polygon


def scan(size: tuple[int, int], polygons) -> np.ndarray:
    """Which pixels of a picture (width, height) the polygons, lists of points, cover.

    A pixel is a polygon's where its centre is inside by the non-zero winding rule. Exact: integers only.

    Returns spans, int64 [4, n] (owner, row, begin, end), in the polygons' order: polygon `owner` covers the pixels
    begin to end - 1 of the row.
    """
    width, height = size
    # Where the edges begin and where they end: x and y are int64 [2, n].
    edges = np.array([[vertex for polygon in polygons for vertex in polygon],
                      [vertex for polygon in polygons for vertex in polygon[1:] + polygon[:1]]])
    x, y = (np.rint(SUBPIXELS * part).astype(np.int64) for part in (edges.real, edges.imag))
    owner = np.repeat(np.arange(len(polygons)), [len(polygon) for polygon in polygons])
    # An edge crosses the centre lines of the rows first to last - 1; the line of row r is at SUBPIXELS * r + half.
    half = SUBPIXELS // 2
    first, last = np.clip((np.sort(y, axis=0) + half - 1) // SUBPIXELS, 0, height)
    crossings = last - first
    row = np.arange(crossings.sum()) - np.repeat(np.cumsum(crossings) - crossings - first, crossings)
    line = np.repeat(owner, crossings) * height + row
    (x, x1), (y, y1) = np.repeat(x, crossings, axis=1), np.repeat(y, crossings, axis=1)
    rise = y1 - y
    column = np.clip(-(-((x - half) * rise + (SUBPIXELS * row + half - y) * (x1 - x)) // (SUBPIXELS * rise)), 0, width)
    key = np.sort((line * (width + 1) + column) * 2 + (rise > 0))
    inside = np.cumsum(key % 2 * 2 - 1) != 0
    before = np.roll(inside, 1)
    line, begin = np.divmod(key[inside & ~before] // 2, width + 1)
    return np.stack([*np.divmod(line, height), begin, key[before & ~inside] // 2 % (width + 1)])


def fill(size: tuple[int, int], spans: np.ndarray, values) -> np.ndarray:
    """Paints the polygons over one another, each with its value: uint8 [H, W], 0 where there is none."""
    owner, row, begin, end = spans
    length = end - begin
    offset = row * size[0] + begin - (np.cumsum(length) - length)
    canvas = np.zeros(size[0] * size[1], np.uint8)
    # Where places repeat, numpy keeps the value given last.
    canvas[np.repeat(offset, length) + np.arange(length.sum())] = np.repeat(np.array(values, np.uint8)[owner], length)
    return canvas.reshape(size[1], size[0])


def texture(shape, style, period, dice):
    """Polygons of a shape's second colour, which may stick out of it; period: of stripes and spots, in pixels."""
    sections = shape.sections
    if style == "pupil":
        c, n = sections[len(sections) // 2]
        return [[c + 0.5 * corner * n for corner in CIRCLE]]
    if style in BANDS:
        return [[c + low * n for c, n in sections] + [c + high * n for c, n in reversed(sections)]
                for low, high in BANDS[style]]
    count = min(12, round(math.sqrt(squared(sections[-1][0] - sections[0][0])) / period))
    if style == "stripes":
        return [[point(shape, (i + along) / count, across) for along, across in ((0, -1), (0, 1), (0.5, 1), (0.5, -1))]
                for i in range(count)]
    spots = []
    for i in range(count if style == "spots" else 0):
        centre = point(shape, (i + dice.random()) / count, dice(-0.8, 0.8))
        radius = period * dice(0.2, 0.45)
        spots.append([centre + radius * corner for corner in CIRCLE])
    return spots


def paint(seed: int, scene: Scene, shape_map: np.ndarray) -> Image.Image:
    """The image of a scene: colours, textures, contours, background, light, grain.

    shape_map: uint8 [H, W], i + 1 where scene.shapes[i] is seen, 0 for the background."""
    dice = Dice(2 * seed + 1)
    palettes = [[colour(dice), colour(dice)] for _ in scene.species]
    palettes = [[first, second, near(dice, first, 50)] for first, second in palettes]
    manners = [(dice.pick(STYLES), dice(6, 18), dice.random() < 0.5) for _ in palettes]
    pairs = {}  # the two colours of a part, the same on the left and on the right
    colours, contour = np.zeros((3, 3, 256), np.uint8), np.zeros(256, bool)
    polygons, values = [], []
    for label, shape in enumerate(scene.shapes, 1):
        if not shape.part:
            style, period, contour[label] = dice.pick(STYLES), dice(6, 18), dice.random() < 0.5
            pair = [near(dice, dice.pick(dice.pick(palettes)), 25) if dice.random() < 0.5 else colour(dice)
                    for _ in range(2)]
        elif PART_NAMES[shape.part - 1] == "eye":
            style, period, pair = "pupil", 1, (colour(dice), colour(dice))
        else:
            style, period, contour[label] = manners[shape.figure]
            pair = pairs.get((shape.figure, shape.part)) or [
                near(dice, dice.pick(palettes[shape.figure]), 25) for _ in range(2)]
            pairs[shape.figure, shape.part] = pair
        dark = [channel // 3 for channel in pair[0]]
        colours[:, :, label] = np.array([*pair, dark]).T * (7 if shape.far else 10) // 10
        patterns = texture(shape, style, period, dice)
        polygons += patterns
        values += [label] * len(patterns)
    # Which of the three rows of colours a pixel takes: first colour, second colour, contour.
    kind = (fill(scene.size, scan(scene.size, polygons), values) == shape_map).astype(np.uint16)
    edge = np.zeros(shape_map.shape, bool)
    edge[1:] = shape_map[1:] != shape_map[:-1]
    edge[:, 1:] |= shape_map[:, 1:] != shape_map[:, :-1]
    kind[edge & contour[shape_map]] = 2
    planes = np.take(colours.reshape(3, 3 * 256), shape_map + 256 * kind, axis=1)
    # The background is a gradient, clouds, stripes or squares of random colours.
    low, grid = dice.whole(0, 110), dice.pick(((2, 2), (2, 2), (1, 3), (5, 5), (9, 9), (30, 30)))
    resample = dice.pick((Image.BILINEAR, Image.BILINEAR, Image.NEAREST))
    background = cells(dice, 3, scene.size, grid, low, low + dice.whole(60, 140), resample)
    np.copyto(planes, background, where=shape_map == 0)
    light = cells(dice, 1, scene.size, (3, 3), 85, 165, Image.BILINEAR).astype(np.uint16)
    strength = dice.whole(2, 40)
    grain = np.frombuffer(dice.randbytes(shape_map.size), np.uint8).reshape(shape_map.shape).astype(np.uint16)
    planes = (planes * light >> 7) + (grain * strength >> 8)
    planes = (planes.clip(strength // 2, 255 + strength // 2) - strength // 2).astype(np.uint8)
    return Image.merge("RGB", [Image.fromarray(plane) for plane in planes])


def colour(dice):
    return [dice.whole(15, 240) for _ in range(3)]


def near(dice, base, amount):
    return [min(255, max(0, channel + dice.whole(-amount, amount))) for channel in base]


def cells(dice, planes, size, grid, low, high, resample) -> np.ndarray:
    """Values from low to high drawn for a grid (columns, rows) and enlarged: uint8 [planes, H, W]."""
    columns, rows = grid
    values = np.frombuffer(dice.randbytes(planes * rows * columns), np.uint8).astype(np.uint32)
    values = (values * (high - low) // 255 + low).astype(np.uint8).reshape(planes, rows, columns)
    return np.stack([np.asarray(Image.fromarray(plane).resize(size, resample)) for plane in values])


def image_seeds(split: str, num_images: int | None = None, seed: int = 0) -> range:
    """The seeds of a split's pictures. "train" and "test" share none, whatever their own seeds; "val" is "test"."""
    first = 2 * seed * 10**9 + {"train": 0, "test": 1, "val": 1}[split]
    return range(first, first + 2 * (num_images or NUM_IMAGES[split]), 2)


def load_synthetic_patches(split: str, num_images: int | None = None, seed: int = 0,
                           keypoints: Sequence[int | str] | None = None, crop_scale: float = 0.5,
                           transform: Transform | None = None, skip_bad_images: bool = False) -> PatchDataset:
    """The part patches of a split's pictures (select_keypoints has the rule; all figures of a picture count together).

    split: "train", "test" or "val" (the same as "test"). num_images: pictures drawn (default NUM_IMAGES); those without
    a patch are left out. keypoints: numbers from 1 or names of KEYPOINT_NAMES, or ["all"] (default the first four),
    class k is the k-th. The `path` of an image is its seed. Raises UserError for an unknown keypoint, and where no
    patch is left.
    """
    names = dict(enumerate(KEYPOINT_NAMES, 1))
    chosen = choose_keypoints(keypoints or DEFAULT_KEYPOINTS, names, "keypoint", "the synthetic figures")
    classes = {names[number]: label for label, number in enumerate(chosen)}
    points = ((number, [(classes[k.name], (k.x, k.y)) for k in compose(number).keypoints
                        if k.visible and k.name in classes]) for number in image_seeds(split, num_images, seed))
    return keypoint_patches(points, chosen, names, "keypoint", crop_scale, transform, skip_bad_images, draw_image)


def load_synthetic_species(split: str, num_images: int | None = None, seed: int = 0, transform: Transform | None = None,
                           skip_bad_images: bool = False) -> PatchDataset:
    """Whole pictures of one figure each, to be classified by its species (classes: OBJECT_NAMES)."""
    images = [PatchImage(number, None, [compose(number, num_figures=1).species[0] - 1])
              for number in image_seeds(split, num_images, seed)]
    return PatchDataset(images, OBJECT_NAMES, transform, partial(draw_image, num_figures=1), skip_bad_images)


def synthetic_segmentation(index: int, split: str, kind: str = "object",
                           seed: int = 0) -> tuple[Image.Image, np.ndarray]:
    """The index-th picture of a split and its label map, uint8 [H, W]: 0 = other, i + 1 = OBJECT_NAMES[i] where kind is
    "object", PART_NAMES[i] where it is "part"."""
    picture = draw_figure(image_seeds(split, index + 1, seed)[index])
    return picture.image, {"object": picture.object_mask, "part": picture.part_mask}[kind]
