"""The data set that needs no files: articulated figures drawn by code, with part keypoints and part and object masks.

A figure is a list of tapered bones in the order of painting. All its parts take their colours from one palette, and
clutter before and behind it is made of the same shapes in the same colours: a part is told by its shape and its place,
not by its colour. A seed gives the same picture on one machine with one version of Pillow.

Bodies are built of complex numbers, x + 1j * y; y points down; angles are in degrees, 0 to the right and 90 down.
"""

import cmath
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from .patches import PatchDataset, PatchImage, Transform, choose_keypoints, keypoint_patches

PART_NAMES = ("head", "eye", "ear", "mouth", "neck", "torso", "arm", "hand", "wing", "leg", "foot", "tail")
OBJECT_NAMES = ("biped", "quadruped", "bird")
KEYPOINT_NAMES = ("eye", "hand", "foot", "tail", "mouth", "ear", "knee")  # the tip of a wing is a "hand"
DEFAULT_KEYPOINTS = KEYPOINT_NAMES[:4]
LEG = ("leg", 0.055, 0.038, "knee"), ("leg", 0.038, 0.026), ("foot", 0.035, 0.028, "foot")  # of bipeds and quadrupeds
NUM_IMAGES = {"train": 400, "test": 200, "val": 200}


class Shape(NamedTuple):
    part: str  # one of PART_NAMES, "" for clutter
    outline: np.ndarray  # complex [n], the corners of its polygon
    tip: complex  # where its keypoint is
    keypoint: str = ""  # one of KEYPOINT_NAMES, or ""; of those of a figure with one name the last painted counts
    dark: bool = False  # painted darker: the far side of the body, and pupils
    owner: int = 0  # number of its figure; pieces of clutter are counted on from the figures


class Keypoint(NamedTuple):
    name: str  # one of KEYPOINT_NAMES; a figure has each at most once
    x: int  # column and row of its pixel, perhaps outside the image
    y: int
    visible: bool  # inside the image and not covered by what is painted later


@dataclass
class Picture:
    seed: int
    species: list[int]  # of each figure: its label in object_mask
    shapes: list[Shape]  # in the order of painting
    shape_map: np.ndarray  # uint8 [H, W]: i + 1 where shapes[i] is seen, 0 for the background
    keypoints: list[Keypoint]
    part_mask: np.ndarray  # uint8 [H, W]: 0 = other, i + 1 = PART_NAMES[i]
    object_mask: np.ndarray  # uint8 [H, W]: 0 = other, i + 1 = OBJECT_NAMES[i]

    @cached_property
    def image(self) -> Image.Image:
        """RGB; painted when first asked for, since lists of patches and pairs need the keypoints alone."""
        dice = np.random.RandomState(random.Random(2 * self.seed + 1).getrandbits(32))
        num_figures, num_things = len(self.species), max(shape.owner for shape in self.shapes) + 1
        owner = np.array([0, *(shape.owner for shape in self.shapes)])[self.shape_map]
        shade = np.array([1, *(0.5 if shape.dark else 1 for shape in self.shapes)], np.float32)[self.shape_map]
        # A palette for each figure and two more; clutter has any of them.
        palettes = np.array([*range(num_figures), *dice.randint(num_figures + 2, size=num_things - num_figures)])
        palettes = dice.randint(15, 241, (num_figures + 2, 3, 3))[palettes]
        # Each part has two colours near those of the palette, the same on both sides of the body.
        chosen = dice.randint(3, size=(num_things, len(PART_NAMES) + 1, 2))
        colours = palettes[np.arange(num_things)[:, None, None], chosen] + dice.randint(-25, 26, (*chosen.shape, 3))

        # Textures lie in any direction; position: in periods of 6 to 18 pixels.
        waves = np.exp(2j * math.pi * dice.rand(num_things)) / dice.uniform(6, 18, num_things)
        rows, columns = np.indices(owner.shape, np.float32)
        position = (columns + 1j * rows) * waves.astype(np.complex64)[owner]
        along, across = position.real % 1 - 0.5, position.imag % 1 - 0.5
        textures = (False, False, along > 0, along ** 2 + across ** 2 < 0.1)
        second = np.choose(dice.randint(4, size=num_things)[owner], textures).astype(np.uint8)
        figures = colours[owner, self.part_mask, second] * shade[..., None]

        # The background is a gradient, stripes, squares or clouds, from a grid of colours that is enlarged.
        low, grid = dice.randint(0, 110), ((2, 2), (3, 1), (5, 5), (9, 9), (30, 30))[dice.randint(5)]
        cells = Image.fromarray(dice.randint(low, low + dice.randint(60, 140), (*grid, 3), np.uint8))
        image = cells.resize(owner.shape[::-1], (Image.BILINEAR, Image.NEAREST)[dice.randint(2)])
        image.paste(Image.fromarray(figures.clip(0, 255).astype(np.uint8)), mask=Image.fromarray(self.shape_map > 0))
        cells = Image.fromarray(dice.randint(100, 156, (3, 3), np.uint8))
        light = np.asarray(cells.resize(image.size, Image.BILINEAR), np.float32)[..., None] / 128
        grain = dice.randint(-10, 11, light.shape, np.int8) * np.float32(dice.rand())
        image = np.asarray(image.filter(ImageFilter.GaussianBlur(0.6))) * light + grain
        return Image.fromarray(image.clip(0, 255).astype(np.uint8))


def draw_figure(seed: int, num_figures: int | None = None) -> Picture:
    """One picture, of sides of 256 to 384, with its masks and keypoints. num_figures: 1, 2, or None to draw it too."""
    dice = random.Random(2 * seed)
    size = dice.randrange(256, 385, 32), dice.randrange(256, 385, 32)
    num_figures = num_figures or dice.choice((1, 1, 1, 2, 2))
    species = [dice.randint(1, len(OBJECT_NAMES)) for _ in range(num_figures)]
    bodies = [(biped, quadruped, bird)[label - 1](dice) for label in species]
    things = [place(dice, body, size, number, num_figures) for number, body in enumerate(bodies)]
    things += [clutter(dice, size) for _ in range(dice.randint(4, 10))]
    # All but the last pieces of clutter lie behind the figures.
    last = len(things) - dice.choice((0, 0, 1, 2))
    order = [*range(num_figures, last), *range(num_figures), *range(last, len(things))]
    shapes = [shape._replace(owner=owner) for owner in order for shape in things[owner]]

    canvas = Image.new("L", size)
    parts, objects = np.zeros((2, len(shapes) + 1), np.uint8)
    for label, shape in enumerate(shapes, 1):
        ImageDraw.Draw(canvas).polygon(shape.outline.view(float).round().tolist(), fill=label)
        if shape.part:
            parts[label], objects[label] = PART_NAMES.index(shape.part) + 1, species[shape.owner]
    shape_map = np.asarray(canvas)
    keypoints = []
    named = {(shape.owner, shape.keypoint): (label, shape) for label, shape in enumerate(shapes, 1) if shape.keypoint}
    for label, shape in named.values():
        x, y = round(shape.tip.real), round(shape.tip.imag)
        visible = 0 <= x < size[0] and 0 <= y < size[1] and bool(shape_map[y, x] == label)
        keypoints.append(Keypoint(shape.keypoint, x, y, visible))
    return Picture(seed, species, shapes, shape_map, keypoints, parts[shape_map], objects[shape_map])


def draw_image(seed: int, num_figures: int | None = None) -> Image.Image:
    """The image of draw_figure alone."""
    return draw_figure(seed, num_figures=num_figures).image


def walk(start, angle, lengths, bends):
    """The joints of a chain of bones, start included. Each bone is bent from the one before, the first from angle."""
    joints = [start]
    for length, bend in zip(lengths, bends, strict=True):
        angle += bend
        joints.append(joints[-1] + cmath.rect(length, math.radians(angle)))
    return joints


def bone(part, start, end, start_radius, end_radius, keypoint=""):
    """The shape from start to end with these half widths, round at both ends."""
    ahead = (end - start) / abs(end - start)
    arc = ahead * np.exp(1j * np.linspace(-math.pi / 2, math.pi / 2, 7))
    return Shape(part, np.concatenate([end + end_radius * arc, start - start_radius * arc]), end, keypoint)


def limb(joints, width, *bones):
    """The bones (part, half width where it begins, where it ends, keypoint) between joints, width times as wide. The
    first is painted last: the end of a bone, where its keypoint is (the knee of a thigh), covers the next one's."""
    return [bone(part, joints[i], joints[i + 1], width * start_radius, width * end_radius, *keypoint)
            for i, (part, start_radius, end_radius, *keypoint) in enumerate(bones)][::-1]


def fan(part, base, tip, spread, count, radius, keypoint=""):
    """Feathers, toes or fingers: count bones from -spread to spread degrees around the way from base to tip."""
    ways = (tip - base) * np.exp(1j * np.radians(np.linspace(-spread, spread, count)))
    rays = [bone(part, base, base + way, 0.7 * radius, radius, keypoint) for way in ways]
    return [ray._replace(tip=base + 0.65 * (ray.tip - base)) for ray in rays]


def dark(shapes):
    return [shape._replace(dark=True) for shape in shapes]


def head(neck, face, size, snout, root, tip):
    """Mouth, head and eye. face: where it looks; size: half its height; snout, root, tip: the mouth's measures."""
    centre, lip, end = walk(neck, face, (0.3 * size, 0.7 * size, 0.3 * size + snout), (-90, 120, -25))[1:]
    brow, eye = walk(centre, face, (0.4 * size, 0.25 * size), (0, -90))[1:]
    return [bone("mouth", lip, end, root, tip, "mouth"), bone("head", centre, brow, size, 0.8 * size),
            *limb([brow, eye], size, ("eye", 0.3, 0.4)), *dark(limb([brow, eye], size, ("eye", 0.1, 0.2, "eye")))]


def biped(dice):
    """Like a person: upright, two arms with fingers, two legs, a round head with an ear and lips."""
    u = dice.uniform
    up, tilt, build, size = u(245, 300), u(-25, 25), u(0.75, 1.35), u(0.065, 0.085)
    spine = walk(0, up, (0.15, 0.17, 0.11), (0, u(-15, 15), tilt))
    ear = walk(spine[3], up + tilt, (0.5 * size, 0.5 * size), (-30, u(-30, 30)))
    arms, legs = [], []
    for side in (0.03, -0.03):
        arm = walk(spine[2] + side, up - 180, (0.17, 0.15, 0.04, 0.1), (u(-150, 60), u(-125, 0), u(-20, 20), 0))
        leg = walk(spine[0] + side, 90, (0.23, 0.22, 0.12), (u(-65, 35), u(0, 85), -u(75, 105)))
        arms.append(fan("hand", *arm[3:], u(25, 50), dice.randint(3, 4), 0.02) + limb(
            arm, build, ("arm", 0.04, 0.032), ("arm", 0.032, 0.024), ("hand", 0.024, 0.03, "hand")))
        legs.append(limb(leg, build, *LEG))
    return [*dark(arms[0] + legs[0]),
            *limb(spine, build, ("torso", 0.07, 0.065), ("torso", 0.065, 0.085), ("neck", 0.04, 0.035)), *legs[1],
            *head(spine[3], up + tilt + 90, size, u(0.01, 0.03), 0.025, 0.018),
            bone("ear", *ear[1:], 0.015, 0.02, "ear"), *arms[1]]


def quadruped(dice):
    """Like a dog: level body, four legs, neck, snout, two ears, tail."""
    u = dice.uniform
    length, tall, build, belly, size = u(0.21, 0.31), u(0.13, 0.24), u(0.75, 1.3), u(0.08, 0.16), u(0.07, 0.09)
    spine = walk(0, u(-10, 10), (length, length, u(0.16, 0.4)), (0, u(-20, 20), -u(20, 70)))
    tail = walk(spine[0] - 0.05j, u(130, 230), [u(0.07, 0.13)] * 4, [u(-35, 35)] * 4)
    ear, legs = walk(spine[3], -u(60, 200), [size + u(0.06, 0.15)], [0]), []
    for hip, way in ((spine[0] + 0.06, 1), (spine[2], -1), (spine[0], 1), (spine[2] - 0.06, -1)):
        leg = walk(hip, 90, (tall, tall, 0.09), (way * u(-40, 25), way * u(5, 60), -u(50, 80)))
        legs.append(limb(leg, build, *LEG))
    return [*dark([*legs[0], *legs[1], bone("ear", ear[0], ear[1] + 0.05, 0.04, 0.012)]),
            *limb(tail, build, *[("tail", 0.03, 0.03)] * 3, ("tail", 0.03, u(0.012, 0.05), "tail")),
            *limb(spine, belly, ("torso", 1, 0.9), ("torso", 0.9, 1.05), ("neck", 0.8, 0.5)), *legs[2], *legs[3],
            bone("ear", *ear, 0.04, 0.012, "ear"), *head(spine[3], u(-10, 50), size, u(0.05, 0.12), 0.05, 0.03)]


def bird(dice):
    """Raised or folded wings of feathers, two legs with toes, a beak, a fan of tail feathers."""
    u = dice.uniform
    tilt, build, length, size, breadth = -u(5, 60), u(0.8, 1.25), u(0.13, 0.18), u(0.06, 0.075), u(0.09, 0.15)
    spine = walk(0, tilt, (length, length, u(0.08, 0.2)), (0, 0, -u(0, 40)))
    tail = walk(spine[0], tilt + 180, (0.05, u(0.2, 0.32)), (0, u(-20, 20)))
    rise, fold, reach = dice.choice(((-u(20, 110), -u(10, 70), u(0.8, 1.2)), (tilt + u(160, 190), u(10, 25), 0.6)))
    wings, legs = [], []
    for side in (0.04, 0):
        wing = walk(spine[1] + side - 0.05j, rise, (0.14 * reach, 0.14 * reach, 0.28 * reach), (0, fold, -u(10, 20)))
        leg = walk(spine[1] + side, 90, (u(0.15, 0.2), u(0.1, 0.2), 0.11), (u(-15, 45), -u(10, 80), -u(0, 30)))
        wings.append(fan("wing", *wing[2:], 28, dice.randint(4, 6), 0.03, "hand")
                     + limb(wing, 1, ("wing", 0.05, 0.04), ("wing", 0.04, 0.03)))
        legs.append(fan("foot", *leg[2:], 32, 3, 0.02, "foot")
                    + limb(leg, build, ("leg", 0.05, 0.025, "knee"), ("leg", 0.025, 0.02)))
    return [*dark(wings[0] + legs[0]), *fan("tail", *tail[1:], u(8, 35), dice.randint(3, 5), 0.034, "tail"),
            *legs[1], *limb(spine, breadth, ("torso", 0.6, 1), ("torso", 1, 0.7), ("neck", 0.6, 0.4)),
            *head(spine[3], u(-20, 30), size, u(0.05, 0.14), 0.028, 0.006), *wings[1]]


def clutter(dice, size):
    """One thing that belongs to no figure, in pixels: a bent branch, a blob or cone, a bundle of rays."""
    u = dice.uniform
    joints = walk(complex(u(0, size[0]), u(0, size[1])), u(0, 360), (u(10, 60), u(10, 60)), (0, u(-120, 120)))
    return dice.choice((limb(joints, u(2, 16), ("", 1, 1), ("", 1, 0.5)), limb(joints, 1, ("", u(2, 30), u(2, 30))),
                        fan("", *joints[:2], u(15, 40), dice.randint(3, 5), u(3, 6))))


def place(dice, shapes, size, number, num_figures):
    """The shapes of a figure in pixels: perhaps mirrored, turned, enlarged and moved to its place."""
    if dice.random() < 0.5:
        shapes = [shape._replace(outline=-shape.outline.conj(), tip=-shape.tip.conjugate()) for shape in shapes]
    turn = cmath.rect(1, math.radians(dice.uniform(-22, 22)))
    corners = (turn * np.concatenate([shape.outline for shape in shapes])).view(float).reshape(-1, 2)
    low, high = corners.min(0), corners.max(0)
    # Two figures are smaller than one and side by side.
    extent, column = (dice.uniform(0.7, 1), 0.5) if num_figures == 1 else (dice.uniform(0.6, 0.8), 0.3 + 0.4 * number)
    scale = extent * min(size) / (high - low).max()
    centre = (column + dice.uniform(-0.1, 0.1), dice.uniform(0.4, 0.6)) * np.array(size)
    shift = complex(*(centre - scale * (low + high) / 2))
    return [shape._replace(outline=scale * turn * shape.outline + shift, tip=scale * turn * shape.tip + shift)
            for shape in shapes]


def image_seeds(split: str, num_images: int | None = None, seed: int = 0) -> range:
    """The seeds of a split's pictures. "train" and "test" share none, whatever their own seeds; "val" is "test"."""
    first = 2 * seed * 10**9 + {"train": 0, "test": 1, "val": 1}[split]
    return range(first, first + 2 * (num_images or NUM_IMAGES[split]), 2)


def load_synthetic_patches(split: str, num_images: int | None = None, seed: int = 0,
                           keypoints: Sequence[int | str] | None = None, crop_scale: float = 0.5,
                           transform: Transform | None = None) -> PatchDataset:
    """The part patches of a split's pictures (select_keypoints has the rule; all figures of a picture count together).

    num_images: pictures drawn (default NUM_IMAGES). keypoints: numbers from 1 or names of KEYPOINT_NAMES, or ["all"];
    class k is the k-th. The `path` of an image is its seed. Raises UserError for an unknown keypoint, or no patch.
    """
    names = dict(enumerate(KEYPOINT_NAMES, 1))
    chosen = choose_keypoints(keypoints or DEFAULT_KEYPOINTS, names, "keypoint", "the synthetic figures")
    classes = {names[number]: label for label, number in enumerate(chosen)}
    points = ((number, [(classes[k.name], (k.x, k.y)) for k in draw_figure(number).keypoints
                        if k.visible and k.name in classes]) for number in image_seeds(split, num_images, seed))
    return keypoint_patches(points, chosen, names, "keypoint", crop_scale, transform, draw_image)


def load_synthetic_species(split: str, num_images: int | None = None, seed: int = 0,
                           transform: Transform | None = None) -> PatchDataset:
    """Whole pictures of one figure each, to be classified by its species (classes: OBJECT_NAMES)."""
    images = [PatchImage(number, None, [draw_figure(number, num_figures=1).species[0] - 1])
              for number in image_seeds(split, num_images, seed)]
    return PatchDataset(images, OBJECT_NAMES, transform, partial(draw_image, num_figures=1))
