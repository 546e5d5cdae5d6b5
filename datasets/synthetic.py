"""The data set that needs no files: articulated figures drawn by code, with part keypoints and part and object masks.

draw_figure(seed) is one picture: one or two jointed figures of four species, in random pose, build, colour, texture,
size and place, on a cluttered background. The parts of a figure share its palette, and the clutter is made of the same
primitive in the same colours, so that a part is told by its shape and its place in the figure, not by its colour.

The same on every machine for a seed: chance comes from Python's random.Random alone, vertices are rounded to 1/8 pixel,
and shapes are filled here in integers, because Pillow fills polygons with sharp corners differently from version 11 on.
The geometry is apart from the painting, and cheap: the keypoints of a whole split are known without painting it.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from utils import UserError

from .patches import PatchDataset, PatchImage, patch_image
from .synthetic_figures import PART_NAMES, SPECIES, Dice, Shape, fan, limb, oval, tube, walk

OBJECT_NAMES = tuple(SPECIES)
KEYPOINT_NAMES = ("eye", "hand", "foot", "tail", "mouth", "ear", "knee")
DEFAULT_KEYPOINTS = KEYPOINT_NAMES[:4]
NUM_IMAGES = {"train": 400, "test": 200, "val": 200}
SIDES = (256, 288, 320, 352, 384)
SUBPIXELS = 8
EYE = PART_NAMES.index("eye") + 1
STYLES = ("plain", "belly", "lines", "stripes", "stripes", "spots", "spots")
CIRCLE = ((1, 0), (0.7, 0.7), (0, 1), (-0.7, 0.7), (-1, 0), (-0.7, -0.7), (0, -1), (0.7, -0.7))


class Keypoint(NamedTuple):
    name: str  # one of KEYPOINT_NAMES; "hand" is also the tip of a wing or of a breast fin, as the hand of its species
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


class Spans(NamedTuple):
    """Pixels begin[i] to end[i] - 1 of row[i] are covered by polygon owner[i]. int64 [n] each, in the owners' order."""
    owner: np.ndarray
    row: np.ndarray
    begin: np.ndarray
    end: np.ndarray


class Scene(NamedTuple):
    size: tuple[int, int]  # width, height
    species: list[int]  # of each figure: its label in object_mask
    shapes: list[Shape]  # in pixels, in the order of painting
    spans: Spans  # the pixels of the shapes; those of later shapes hide those of earlier ones
    keypoints: list[Keypoint]


def draw_figure(seed: int, size: tuple[int, int] | None = None, num_figures: int | None = None) -> Picture:
    """One picture with its masks and keypoints.

    size: (width, height), or None to draw each from SIDES. num_figures: 1, 2, or None to draw one of them.
    """
    scene = compose(seed, size, num_figures)
    shape_map = visible_shapes(scene)
    parts, objects = np.zeros((2, 256), np.uint8)
    for label, shape in enumerate(scene.shapes, 1):
        if shape.part:
            parts[label], objects[label] = shape.part, scene.species[shape.figure]
    return Picture(paint(seed, scene, shape_map), scene.keypoints, parts[shape_map], objects[shape_map])


def draw_image(seed: int, num_figures: int | None = None) -> Image.Image:
    """The image of draw_figure alone."""
    scene = compose(seed, num_figures=num_figures)
    return paint(seed, scene, visible_shapes(scene))


def compose(seed: int, size: tuple[int, int] | None = None, num_figures: int | None = None) -> Scene:
    """The geometry of draw_figure's picture: what is where, and where the keypoints are. Nothing is painted."""
    dice = Dice(2 * seed)
    width, height = size = size or (dice.pick(SIDES), dice.pick(SIDES))
    count = num_figures or (2 if dice.chance(0.4) else 1)
    shapes = [shape for _ in range(dice.whole(5, 14)) for shape in clutter(dice, size)]
    species = [dice.whole(1, len(SPECIES)) for _ in range(count)]
    for figure, label in enumerate(species):
        extent = min(width, height) * (dice.between(0.7, 1.0) if count == 1 else dice.between(0.6, 0.8))
        column = 0.5 if count == 1 else 0.3 + 0.4 * figure
        centre = (width * (column + dice.between(-0.1, 0.1)), height * dice.between(0.4, 0.6))
        body = SPECIES[OBJECT_NAMES[label - 1]](dice)
        shapes += [shape._replace(figure=figure) for shape in place(body, centre, extent, dice)]
    if dice.chance(0.5):  # something in front of the figures
        shapes += [shape for _ in range(dice.whole(1, 2)) for shape in clutter(dice, size)]
    spans = scan(size, [outline(shape) for shape in shapes])
    keypoints = []
    for number, shape in enumerate(shapes):
        if shape.keypoint:
            x, y = map(math.floor, point(shape, shape.at, 0))
            owners = spans.owner[(spans.row == y) & (spans.begin <= x) & (x < spans.end)]
            visible = len(owners) > 0 and int(owners[-1]) == number
            keypoints.append(Keypoint(shape.keypoint, x, y, visible, shape.part, shape.figure))
    return Scene(size, species, shapes, spans, keypoints)


def place(body, centre, extent, dice):
    """A body in pixels: turned, squeezed, perhaps mirrored; its bounding box has that centre and that longer side."""
    angle, squeeze, mirror = math.radians(dice.between(-22, 22)), dice.between(0.8, 1.1), dice.pick((-1, 1))
    cos, sin, flip = math.cos(angle), math.sin(angle), mirror * squeeze

    def turn(x, y):
        return flip * cos * x - sin * y, flip * sin * x + cos * y
    turned = [[(*turn(x, y), *turn(nx, ny)) for x, y, nx, ny in shape.sections] for shape in body]
    xs, ys = ([section[axis] for sections in turned for section in sections] for axis in (0, 1))
    scale = extent / max(max(xs) - min(xs), max(ys) - min(ys))
    x0, y0 = centre[0] - scale * (max(xs) + min(xs)) / 2, centre[1] - scale * (max(ys) + min(ys)) / 2

    def grow(x, y, nx, ny):
        # At least 1.3 pixels to each side: no part of a tube may fall between the pixels.
        widen = max(scale, 1.3 / math.sqrt(nx * nx + ny * ny))
        return x0 + scale * x, y0 + scale * y, widen * nx, widen * ny
    return [shape._replace(sections=[grow(*section) for section in sections])
            for shape, sections in zip(body, turned, strict=True)]


def clutter(dice, size):
    """One thing that belongs to no figure: a blob, a bar, a cone, a bent branch or a bundle of rays. In pixels."""
    start = (dice.between(0, size[0]), dice.between(0, size[1]))
    angle, length, radius = dice.between(0, 360), dice.between(15, 110), dice.between(2, 16)
    kind = dice.pick(("blob", "bar", "cone", "branch", "rays"))
    if kind == "blob":
        return [oval("", start, angle, length, dice.between(0.2, 0.5) * length)]
    if kind == "bar":
        return [tube("", walk(start, angle, (length, 0)), (radius, dice.between(0.1, 1) * radius))]
    if kind == "cone":
        return [tube("", walk(start, angle, (length, 0)), (0.4 * length, 1.5))]
    if kind == "branch":
        bones = [(0.6 * length, 0, radius, radius), (0.5 * length, dice.between(-120, 120), radius, 2)]
        return limb("", start, angle, bones)[0]
    return fan("", start, [angle + bend for bend in (-40, -12, 14, 38)], [0.6 * length] * 4, (3, 4, 2))


def point(shape, along, across):
    """The point at a share `along` (0 to 1) of the cross-sections and `across` (-1 to 1) of the width."""
    position = along * (len(shape.sections) - 1)
    i = min(int(position), len(shape.sections) - 2)
    share = position - i
    (x0, y0, nx0, ny0), (x1, y1, nx1, ny1) = shape.sections[i:i + 2]
    return (x0 + across * nx0 + share * (x1 - x0 + across * (nx1 - nx0)),
            y0 + across * ny0 + share * (y1 - y0 + across * (ny1 - ny0)))


def outline(shape):
    """The polygon of a shape; three more points at each end make it round."""
    there = shape.sections
    back = [(x, y, -nx, -ny) for x, y, nx, ny in reversed(there)]
    polygon = []
    for way in (there, back):
        polygon += [(x + nx, y + ny) for x, y, nx, ny in way]
        (x0, y0, _, _), (x, y, nx, ny) = way[-2:]
        scale = math.sqrt((nx * nx + ny * ny) / ((x - x0) ** 2 + (y - y0) ** 2))
        dx, dy = scale * (x - x0), scale * (y - y0)
        polygon += [(x + p * nx + q * dx, y + p * ny + q * dy) for p, q in ((0.7, 0.7), (0, 1), (-0.7, 0.7))]
    return polygon


def scan(size: tuple[int, int], polygons) -> Spans:
    """Which pixels of a picture (width, height) the polygons, lists of (x, y) in pixels, cover.

    A pixel is a polygon's where its centre is inside by the non-zero winding rule. Exact: integers only.
    """
    width, height = size
    counts = np.array([len(polygon) for polygon in polygons])
    x, y = np.rint(SUBPIXELS * np.array([vertex for polygon in polygons for vertex in polygon])).astype(np.int64).T
    following = np.arange(1, len(x) + 1)
    following[np.cumsum(counts) - 1] -= counts
    rise, run = y[following] - y, x[following] - x
    # An edge crosses the centre lines of the rows first to last - 1; the line of row r is at SUBPIXELS * r + half.
    half = SUBPIXELS // 2
    first, last = (np.clip(-((half - end) // SUBPIXELS), 0, height)
                   for end in (np.minimum(y, y[following]), np.maximum(y, y[following])))
    crossings = last - first
    edge = np.repeat(np.arange(len(x)), crossings)
    row = np.arange(len(edge)) - np.repeat(np.cumsum(crossings) - crossings - first, crossings)
    rise = rise[edge]
    across = (x[edge] - half) * rise + (SUBPIXELS * row + half - y[edge]) * run[edge]
    column = np.clip(-(-across // (SUBPIXELS * rise)), 0, width)
    line = np.repeat(np.arange(len(polygons)), counts)[edge] * height + row
    key = np.sort((line * (width + 1) + column) * 2 + (rise > 0))
    inside = np.cumsum(key % 2 * 2 - 1) != 0
    before = np.roll(inside, 1)
    line, begin = np.divmod(key[inside & ~before] // 2, width + 1)
    return Spans(*np.divmod(line, height), begin, key[before & ~inside] // 2 % (width + 1))


def fill(size: tuple[int, int], spans: Spans, values) -> np.ndarray:
    """Paints the polygons over one another, each with its value: uint8 [H, W], 0 where there is none."""
    canvas = np.zeros(size[0] * size[1], np.uint8)
    length = spans.end - spans.begin
    offset = spans.row * size[0] + spans.begin - (np.cumsum(length) - length)
    # Where places repeat, numpy keeps the value given last.
    colours = np.array(values, np.uint8)[spans.owner]
    canvas[np.repeat(offset, length) + np.arange(length.sum())] = np.repeat(colours, length)
    return canvas.reshape(size[1], size[0])


def visible_shapes(scene: Scene) -> np.ndarray:
    """uint8 [H, W]: i + 1 where shapes[i] is seen, 0 for the background."""
    return fill(scene.size, scene.spans, range(1, len(scene.shapes) + 1))


def texture(shape, style, period, dice):
    """Polygons of a shape's second colour, which may stick out of it; period: of stripes and spots, in pixels."""
    sections = shape.sections
    if style == "pupil":
        x, y, nx, ny = sections[len(sections) // 2]
        return [[(x + 0.5 * (c * nx - s * ny), y + 0.5 * (c * ny + s * nx)) for c, s in CIRCLE]]
    if style in ("belly", "lines"):
        bands = ((0.15, 1),) if style == "belly" else ((-0.7, -0.3), (0.2, 0.6))
        return [[(x + low * nx, y + low * ny) for x, y, nx, ny in sections]
                + [(x + high * nx, y + high * ny) for x, y, nx, ny in reversed(sections)] for low, high in bands]
    length = math.sqrt((sections[-1][0] - sections[0][0]) ** 2 + (sections[-1][1] - sections[0][1]) ** 2)
    count = min(12, round(length / period))
    if style == "stripes":
        return [[point(shape, (i + along) / count, across) for along, across in ((0, -1), (0, 1), (0.5, 1), (0.5, -1))]
                for i in range(count)]
    spots = []
    for i in range(count if style == "spots" else 0):
        x, y = point(shape, (i + dice.random()) / count, dice.between(-0.8, 0.8))
        radius = period * dice.between(0.2, 0.45)
        spots.append([(x + radius * c, y + radius * s) for c, s in CIRCLE])
    return spots


def paint(seed: int, scene: Scene, shape_map: np.ndarray) -> Image.Image:
    """The image of a scene: colours, textures, contours, background, light, grain. shape_map: visible_shapes(scene)."""
    dice = Dice(2 * seed + 1)
    palettes = [[colour(dice), colour(dice)] for _ in scene.species]
    palettes = [[first, second, near(dice, first, 50)] for first, second in palettes]
    manners = [(dice.pick(STYLES), dice.between(6, 18), dice.chance(0.5)) for _ in palettes]
    pairs = {}  # the two colours of a part, the same on the left and on the right
    colours, contour = np.zeros((3, 3, 256), np.uint8), np.zeros(256, bool)
    polygons, values = [], []
    for label, shape in enumerate(scene.shapes, 1):
        if shape.part == EYE:
            style, period, pair = "pupil", 1, (colour(dice), colour(dice))
        elif shape.part:
            style, period, contour[label] = manners[shape.figure]
            if (shape.figure, shape.part) not in pairs:
                pairs[shape.figure, shape.part] = [near(dice, dice.pick(palettes[shape.figure]), 25) for _ in "ab"]
            pair = pairs[shape.figure, shape.part]
        else:
            style, period, contour[label] = dice.pick(STYLES), dice.between(6, 18), dice.chance(0.5)
            pair = [near(dice, dice.pick(dice.pick(palettes)), 25) if dice.chance(0.5) else colour(dice) for _ in "ab"]
        rows = (*pair, [channel // 3 for channel in pair[0]])
        colours[:, :, label] = np.array(rows).T * (7 if shape.far else 10) // 10
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
    np.copyto(planes, background(dice, scene.size), where=shape_map == 0)
    light = cells(dice, 1, scene.size, (3, 3), 85, 165, Image.BILINEAR).astype(np.uint16)
    strength = dice.whole(2, 40)
    grain = np.frombuffer(dice.bytes(shape_map.size), np.uint8).reshape(shape_map.shape)
    grain = grain.astype(np.uint16) * strength >> 8
    planes = (planes * light >> 7) + grain
    planes = (planes.clip(strength // 2, 255 + strength // 2) - strength // 2).astype(np.uint8)
    return Image.merge("RGB", [Image.fromarray(plane) for plane in planes])


def colour(dice):
    return [dice.whole(15, 240) for _ in range(3)]


def near(dice, base, amount):
    return [min(255, max(0, channel + dice.whole(-amount, amount))) for channel in base]


def cells(dice, planes, size, grid, low, high, resample) -> np.ndarray:
    """Values from low to high drawn for a grid (columns, rows) and enlarged: uint8 [planes, H, W]."""
    columns, rows = grid
    values = np.frombuffer(dice.bytes(planes * rows * columns), np.uint8).astype(np.uint32) * (high - low) // 255 + low
    values = values.astype(np.uint8).reshape(planes, rows, columns)
    return np.stack([np.asarray(Image.fromarray(plane).resize(size, resample)) for plane in values])


def background(dice, size) -> np.ndarray:
    """A gradient, clouds, stripes or squares of random colours: uint8 [3, H, W]."""
    low, grid = dice.whole(0, 110), dice.pick(((2, 2), (2, 2), (1, 3), (5, 5), (9, 9), (30, 30)))
    resample = dice.pick((Image.BILINEAR, Image.BILINEAR, Image.NEAREST))
    return cells(dice, 3, size, grid, low, low + dice.whole(60, 140), resample)


def image_seeds(split: str, num_images: int | None = None, seed: int = 0) -> range:
    """The seeds of a split's pictures. "train" and "test" share none, whatever their own seeds; "val" is "test"."""
    first = 2 * seed * 10**9 + {"train": 0, "test": 1, "val": 1}[split]
    return range(first, first + 2 * (num_images or NUM_IMAGES[split]), 2)


def load_synthetic_patches(split: str, num_images: int | None = None, seed: int = 0,
                           keypoints: Sequence[str] | None = None, crop_scale: float = 0.5,
                           transform: Callable[[Image.Image], torch.Tensor] | None = None,
                           skip_bad_images: bool = False) -> PatchDataset:
    """The part patches of a split's pictures (select_keypoints has the rule; all figures of a picture count together).

    split: "train", "test" or "val" (the same as "test"). num_images: pictures drawn (default NUM_IMAGES); those without
    a patch are left out. keypoints: names of KEYPOINT_NAMES (default the first four), class k is the k-th of them. The
    `path` of an image is its seed. Raises UserError for an unknown keypoint.
    """
    names = list(keypoints or DEFAULT_KEYPOINTS)
    unknown = set(names) - set(KEYPOINT_NAMES)
    if unknown:
        raise UserError(f"synthetic figures have no keypoint {min(unknown)}; choose from {', '.join(KEYPOINT_NAMES)}")
    images = []
    for number in image_seeds(split, num_images, seed):
        chosen = [k for k in compose(number).keypoints if k.visible and k.name in names]
        labels = [names.index(k.name) for k in chosen]
        images.append(patch_image(number, [(k.x, k.y) for k in chosen], labels, crop_scale))
    return PatchDataset([image for image in images if image.boxes], names, transform, draw_image, skip_bad_images)


def load_synthetic_species(split: str, num_images: int | None = None, seed: int = 0,
                           transform: Callable[[Image.Image], torch.Tensor] | None = None,
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
