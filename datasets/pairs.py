"""Pairs of images with matched keypoints: SPair-71k, pairs of CUB-200-2011 birds, pairs of synthetic figures.

SPair-71k: Min et al. 2019 (arXiv:1908.10543; https://cvlab.postech.ac.kr/research/SPair-71k). CUB has no pairs of its
own: those here are ours, drawn by a seed, and their results compare with nothing published.
"""

import json
import random
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import permutations
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torchvision import transforms
from torchvision.datasets.folder import pil_loader
from torchvision.transforms import InterpolationMode

from utils import UserError

from . import check_data_path
from .cub import check_complete, read_rows
from .patches import BAD_IMAGE, PatchDataset, PatchImage, reason
from .synthetic import OBJECT_NAMES, compose, draw_image, image_seeds

PAIR_DATASETS = ("spair", "cub-pairs", "synthetic-pairs")
# Pairs drawn where a data set has no list of its own: about as many as the test split of SPair-71k has.
NUM_PAIRS = 10000
# SPair-71k's annotations: by key of a pair's file, our name and what the values 0, 1, ... mean.
LEVELS, WHICH = ("easy", "medium", "hard"), ("none", "source", "target", "both")
ATTRIBUTES = {"viewpoint_variation": ("viewpoint", LEVELS), "scale_variation": ("scale", LEVELS),
              "truncation": ("truncation", WHICH), "occlusion": ("occlusion", WHICH)}


class Pair(NamedTuple):
    """Two images of one category; plain values, which JSON can hold. All coordinates are pixels of the original images.

    source, target: the images' paths (synthetic: seeds). source_points, target_points: the matched keypoints, (x, y),
    in the same order. box: of the target's object, (x1, y1, x2, y2). attributes: by name, the level the pair has."""

    name: str
    category: str
    source: str | int
    target: str | int
    source_points: Sequence[Sequence[float]]
    target_points: Sequence[Sequence[float]]
    box: Sequence[float]
    attributes: dict[str, str]


class PairDataset:
    """Pairs sorted by category, and their images, each once, squashed to image_size x image_size (bilinear,
    antialiased); an image's number is its place in images.images, and the images of a category are neighbours.

    pairs: Pairs. image_size: of what the encoder gets. load: path -> PIL RGB image. size: path -> (width, height).

    Attributes: pairs, image_size, images (a PatchDataset of whole images), categories (names), and as tensors: of the
    images, sizes float64 [I, 2], (width, height); of the pairs, source, target and category, int64 [P], and box_side
    float64 [P], max(w, h) of the target's box; of the points of all pairs, pair int64 [n], which each belongs to, and
    source_points and target_points, float64 [n, 2]. num_outside counts the points that lie outside of the source or of
    the target; they are kept, as published evaluations keep them.

    Raises UserError, naming the pair, for an image that is missing or cannot be read, a box of no size, and keypoints
    that do not match or are none; and where there is no pair.
    """

    def __init__(self, pairs: Iterable[Pair], image_size: int, load: Callable | None = None,
                 size: Callable | None = None):
        self.pairs, self.image_size = sorted(pairs, key=lambda pair: pair.category), image_size
        if not self.pairs:
            raise UserError("there is no pair of images that share keypoints; check the data set and the split")
        self.categories = list(dict.fromkeys(pair.category for pair in self.pairs))
        numbers, sizes = {}, []
        for pair in self.pairs:
            for path in (pair.source, pair.target):
                if path not in numbers:
                    numbers[path] = len(numbers)
                    try:
                        sizes.append((size or image_size_of)(path))
                    except BAD_IMAGE as error:
                        raise UserError(f"pair {pair.name}: its image {path} cannot be read ({reason(error)}); "
                                        "restore the file") from None
            x1, y1, x2, y2 = pair.box
            if not (x2 > x1 and y2 > y1):
                raise UserError(f"pair {pair.name}: the target's box {tuple(pair.box)} has no size; "
                                "restore the annotation")
            if not len(pair.source_points) == len(pair.target_points) > 0:
                raise UserError(f"pair {pair.name}: {len(pair.source_points)} keypoints in the source, "
                                f"{len(pair.target_points)} in the target; restore the annotation")
        squash = transforms.Compose([transforms.Resize((image_size, image_size), InterpolationMode.BILINEAR),
                                     transforms.PILToTensor()])
        self.images = PatchDataset([PatchImage(path, None, [0]) for path in numbers], ["image"], squash,
                                   load or load_image)
        self.sizes = torch.tensor(sizes, dtype=torch.float64)
        self.source = torch.tensor([numbers[pair.source] for pair in self.pairs])
        self.target = torch.tensor([numbers[pair.target] for pair in self.pairs])
        self.category = torch.tensor([self.categories.index(pair.category) for pair in self.pairs])
        self.box_side = torch.tensor([max(x2 - x1, y2 - y1) for x1, y1, x2, y2 in (pair.box for pair in self.pairs)],
                                     dtype=torch.float64)
        counts = torch.tensor([len(pair.source_points) for pair in self.pairs])
        self.pair = torch.repeat_interleave(counts)
        self.source_points, self.target_points = (
            torch.tensor(np.concatenate(points), dtype=torch.float64)
            for points in ([pair.source_points for pair in self.pairs], [pair.target_points for pair in self.pairs]))
        outside = [((points < 0) | (points > self.sizes[image[self.pair]])).any(1)
                   for points, image in ((self.source_points, self.source), (self.target_points, self.target))]
        self.num_outside = int((outside[0] | outside[1]).sum())

    def rows(self) -> list[dict]:
        """The list of pairs as plain values, one dictionary per pair, to be written beside the result."""
        return [pair._asdict() for pair in self.pairs]


def image_size_of(path: str) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


def load_image(path: str) -> Image.Image:
    try:
        return pil_loader(path)
    except BAD_IMAGE as error:
        raise UserError(f"{path} cannot be decoded ({reason(error)}); restore the file") from None


def load_pairs(name: str, root: Path | None, image_size: int, split: str = "test", num_pairs: int | None = None,
               seed: int = 0, num_images: int | None = None) -> PairDataset:
    """The pairs of a data set of PAIR_DATASETS. split: spair has trn, val and test, the others test. num_pairs: that
    many, drawn by the seed (default: all of spair, NUM_PAIRS of the others). num_images: of synthetic-pairs. Raises
    UserError."""
    check_data_path(name, root)
    if name == "spair":
        return load_spair(root, image_size, split, num_pairs, seed)
    if split != "test":
        raise UserError(f"{name} has no split {split!r}, only test; leave --split out")
    if name == "cub-pairs":
        return load_cub_pairs(root, image_size, num_pairs or NUM_PAIRS, seed)
    return load_synthetic_pairs(image_size, num_pairs or NUM_PAIRS, seed, num_images or 60)


def draw(candidates: Sequence, count: int | None, seed: int) -> list:
    """That many of the candidates, drawn by the seed without replacement, in their order; all where count is None."""
    count = min(len(candidates), count or len(candidates))
    return [candidates[index] for index in sorted(random.Random(seed).sample(range(len(candidates)), count))]


def load_spair(root: str | Path, image_size: int, split: str = "test", num_pairs: int | None = None,
               seed: int = 0) -> PairDataset:
    """The pairs of a folder SPair-71k: those of Layout/large/{split}.txt, or without that file all of
    PairAnnotation/{split}; 12,234 of test. Files may have "_" in their names for ":". Raises UserError."""
    root = Path(root)
    annotations, layout = root / "PairAnnotation" / split, root / "Layout" / "large" / f"{split}.txt"
    if not annotations.is_dir():
        raise UserError(f"{annotations} does not exist; --data-path must be a folder SPair-71k/{{JPEGImages, "
                        "PairAnnotation/{trn,val,test}} and --split one of trn, val, test")
    names = layout.read_text().split() if layout.is_file() else sorted(path.stem for path in annotations.glob("*.json"))
    pairs = []
    for name in draw(names, num_pairs, seed):
        path = annotations / f"{name}.json"
        if not path.is_file():
            path = annotations / f"{name.replace(':', '_')}.json"
        try:
            found = json.loads(path.read_text())
            folder = root / "JPEGImages" / found["category"]
            attributes = {ours: levels[found[key]] for key, (ours, levels) in ATTRIBUTES.items() if key in found}
            points = [[(float(x), float(y)) for x, y in found[key]] for key in ("src_kps", "trg_kps")]
            x1, y1, x2, y2 = map(float, found["trg_bndbox"])
            pairs.append(Pair(name, found["category"], str(folder / found["src_imname"]),
                              str(folder / found["trg_imname"]), *points, (x1, y1, x2, y2), attributes))
        except FileNotFoundError:
            raise UserError(f"pair {name}: its annotation {path} does not exist; unpack the data set again") from None
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise UserError(f"pair {name}: {path} is not a pair's annotation ({type(error).__name__}: {error}); "
                            "unpack the data set again") from None
    return PairDataset(pairs, image_size)


def load_cub_pairs(root: str | Path, image_size: int, num_pairs: int, seed: int = 0) -> PairDataset:
    """Ordered pairs of test images of one species of CUB_200_2011 that share at least one visible part, of all 15; the
    category is the species, the points are all parts visible in both. Raises UserError."""
    root = Path(root)
    columns = {"images.txt": {"image": int, "name": str}, "train_test_split.txt": {"image": int, "training": int},
               "bounding_boxes.txt": {"image": int, "x": float, "y": float, "width": float, "height": float},
               "parts/part_locs.txt": {"image": int, "part": int, "x": float, "y": float, "visible": int}}
    for name in columns:
        if not (root / name).is_file():
            raise UserError(f"{root / name} does not exist; --data-path must be a folder CUB_200_2011/{{"
                            f"{', '.join(columns)}, images/CLASS/*.jpg}}")
    names, split, boxes, parts = ([row[1:] for row in read_rows(root / name, **kinds)]
                                  for name, kinds in columns.items())
    names, split, boxes = dict(names), dict(split), {image: box for image, *box in boxes}
    for name, found in (("train_test_split.txt", split), ("bounding_boxes.txt", boxes)):
        check_complete(root / name, names, found)
    points, by_species = {}, {}
    for image, part, x, y, visible in parts:
        if visible == 1:
            points.setdefault(image, {})[part] = (x, y)
    for image, name in names.items():
        if not split[image] and image in points:
            by_species.setdefault(name.split("/")[0], []).append(image)
    candidates = [(species, source, target) for species, images in by_species.items()
                  for source, target in permutations(images, 2) if points[source].keys() & points[target].keys()]
    pairs = []
    for species, source, target in draw(candidates, num_pairs, seed):
        shared, (x, y, width, height) = sorted(points[source].keys() & points[target].keys()), boxes[target]
        pairs.append(Pair(f"{names[source]} to {names[target]}", species,
                          *(str(root / "images" / names[image]) for image in (source, target)),
                          *([points[image][part] for part in shared] for image in (source, target)),
                          (x, y, x + width, y + height), {}))
    return PairDataset(pairs, image_size)


def load_synthetic_pairs(image_size: int, num_pairs: int, seed: int = 0, num_images: int = 60) -> PairDataset:
    """Ordered pairs of synthetic test pictures with one figure each, of one species; the points are the keypoints
    visible in both, at the centres of their pixels, the box is the figure's extent, hidden pixels included."""
    scenes = {number: compose(number, num_figures=1) for number in image_seeds("test", num_images, seed)}
    points = {number: {point.name: (point.x + 0.5, point.y + 0.5) for point in scene.keypoints if point.visible}
              for number, scene in scenes.items()}
    candidates = [(source, target) for source, target in permutations(scenes, 2)
                  if scenes[source].species == scenes[target].species and points[source].keys() & points[target].keys()]
    pairs = []
    for source, target in draw(candidates, num_pairs, seed):
        spans, shared = scenes[target].spans, sorted(points[source].keys() & points[target].keys())
        figure = np.array([shape.part > 0 for shape in scenes[target].shapes])[spans.owner]
        box = (spans.begin[figure].min(), spans.row[figure].min(), spans.end[figure].max(), spans.row[figure].max() + 1)
        pairs.append(Pair(f"{source} to {target}", OBJECT_NAMES[scenes[target].species[0] - 1], source, target,
                          [points[source][name] for name in shared], [points[target][name] for name in shared],
                          tuple(map(int, box)), {}))
    return PairDataset(pairs, image_size, partial(draw_image, num_figures=1), lambda number: scenes[number].size)
