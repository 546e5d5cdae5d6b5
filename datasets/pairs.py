"""Pairs of images with matched keypoints: SPair-71k, pairs of CUB-200-2011 birds, pairs of synthetic figures.

SPair-71k: Min et al. 2019 (arXiv:1908.10543; https://cvlab.postech.ac.kr/research/SPair-71k). The pairs of CUB are
ours, drawn by a seed: their results compare with nothing published.
"""

import json
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image

from utils import UserError

from .cub import read_cub, read_table
from .files import picture_size, read_rgb
from .patches import PatchDataset, PatchImage, count_outside
from .synthetic import OBJECT_NAMES, draw_figure, draw_image, image_seeds

PAIR_DATASETS = ("spair", "cub-pairs", "synthetic-pairs")
# Drawn where a data set has no list of pairs: about as many as the test split of SPair-71k has.
NUM_PAIRS = 10000


class Pair(NamedTuple):
    """Two images of one category, as plain values for JSON; coordinates are pixels of the original images.

    source, target: the images' paths (synthetic: seeds). source_points, target_points: the matched keypoints, (x, y).
    box: of the target's object, (x1, y1, x2, y2)."""

    name: str
    category: str
    source: str | int
    target: str | int
    source_points: Sequence[Sequence[float]]
    target_points: Sequence[Sequence[float]]
    box: Sequence[float]


class PairDataset:
    """Pairs sorted by category, and their images, each once, squashed to image_size x image_size (bilinear,
    antialiased). size: path -> (width, height), as annotations state it or of the header. load: path and that size, or
    a seed alone, -> PIL RGB image; read_rgb raises UserError for a picture of another size, when it is decoded.

    Attributes: pairs, image_size, images (a PatchDataset of whole images) and, as tensors, sizes float64 [I, 2] of the
    images, (width, height); of the pairs, source and target (places in images), int64 [P], and box_side float64 [P],
    max(w, h) of the target's box; of all points, pair int64 [n], and source_points and target_points, float64 [n, 2].
    num_outside: points outside of their images; they are kept, as in published evaluations. Raises UserError as
    count_outside, without any pair, and for a pair without keypoints, whose keypoints do not match, or whose target's
    box has no size or reaches further out of its image than that is large.
    """

    def __init__(self, pairs: Iterable[Pair], image_size: int, size: Callable = picture_size,
                 load: Callable = read_rgb):
        from torchvision import transforms  # as in patches.py
        self.pairs, self.image_size = sorted(pairs, key=lambda pair: pair.category), image_size
        if not self.pairs:
            raise UserError("there is no pair of images that share keypoints; check the data set and the split")
        paths = dict.fromkeys(path for pair in self.pairs for path in (pair.source, pair.target))
        sizes = {path: size(path) for path in paths}
        for pair in self.pairs:
            (width, height), (x1, y1, x2, y2) = sizes[pair.target], pair.box
            if not len(pair.source_points) == len(pair.target_points) > 0:
                raise UserError(f"pair {pair.name}: {len(pair.source_points)} keypoints in the source, "
                                f"{len(pair.target_points)} in the target")
            if not (-width <= x1 < x2 <= 2 * width and -height <= y1 < y2 <= 2 * height):
                raise UserError(f"pair {pair.name}: the target's box {tuple(pair.box)} has no size or is far outside "
                                f"of its picture of {width} x {height} pixels")
        squash = transforms.Compose([transforms.Resize((image_size, image_size), Image.BILINEAR),
                                     transforms.PILToTensor()])
        images = [PatchImage(path, None, [0], size if isinstance(path, str) else None) for path, size in sizes.items()]
        self.images = PatchDataset(images, ["image"], squash, load)

        numbers = {path: number for number, path in enumerate(sizes)}
        self.source = torch.tensor([numbers[pair.source] for pair in self.pairs])
        self.target = torch.tensor([numbers[pair.target] for pair in self.pairs])
        self.pair = torch.tensor([number for number, pair in enumerate(self.pairs) for _ in pair.source_points])
        points = torch.tensor([(*start, *end) for pair in self.pairs for start, end in
                               zip(pair.source_points, pair.target_points, strict=True)], dtype=torch.float64)
        self.source_points, self.target_points = points.split(2, dim=1)
        self.sizes = torch.tensor([*sizes.values()], dtype=torch.float64)
        boxes = torch.tensor([pair.box for pair in self.pairs], dtype=torch.float64)
        self.box_side = (boxes[:, 2:] - boxes[:, :2]).amax(1)
        self.num_outside, _ = count_outside(
            torch.cat([self.source_points, self.target_points]),
            self.sizes[torch.cat([self.source[self.pair], self.target[self.pair]])],
            lambda number: f"pair {self.pairs[self.pair[number % len(self.pair)]].name}")


def load_pairs(name: str, root: Path | None, image_size: int, split: str = "test", num_pairs: int | None = None,
               seed: int = 0, num_images: int | None = None) -> PairDataset:
    """The pairs of a data set of PAIR_DATASETS. split: spair has trn, val and test, the others test. num_pairs: that
    many, drawn by the seed (default: all of spair, NUM_PAIRS of the others). num_images: of synthetic-pairs. Raises
    UserError."""
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


def draw_matches(points: Mapping, categories: Mapping, boxes: Mapping, count: int, seed: int) -> list[Pair]:
    """Ordered pairs of images of one category that share keypoints, drawn. By image (a path or a seed): points, (x, y)
    of its visible keypoints by name; categories, of the images to pair; boxes, (x1, y1, x2, y2)."""
    members, pairs = {}, []
    for image, category in categories.items():
        members.setdefault(category, []).append(image)
    candidates = [(source, target) for source, category in categories.items() for target in members[category]
                  if source != target and points[source].keys() & points[target].keys()]
    for source, target in draw(candidates, count, seed):
        shared = sorted(points[source].keys() & points[target].keys())
        pairs.append(Pair(f"{source} to {target}", categories[source], source, target,
                          [points[source][name] for name in shared], [points[target][name] for name in shared],
                          boxes[target]))
    return pairs


def load_spair(root: str | Path, image_size: int, split: str = "test", num_pairs: int | None = None,
               seed: int = 0) -> PairDataset:
    """The pairs of a folder SPair-71k, all of PairAnnotation/{split}, or num_pairs of them drawn by the seed; 12,234 of
    test. Raises UserError."""
    root = Path(root)
    annotations = root / "PairAnnotation" / split
    if not annotations.is_dir():
        raise UserError(f"{annotations} does not exist; --data-path must be a folder SPair-71k/{{JPEGImages, "
                        "PairAnnotation/{trn,val,test}} and --split one of trn, val, test")
    pairs, sizes = [], {}
    for path in draw(sorted(annotations.glob("[!.]*.json")), num_pairs, seed):
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            category = found["category"]
            images = [str(root / "JPEGImages" / category / found[key]) for key in ("src_imname", "trg_imname")]
            points = [[(float(x), float(y)) for x, y in found[key]] for key in ("src_kps", "trg_kps")]
            x1, y1, x2, y2 = map(float, found["trg_bndbox"])
            stated = [(int(width), int(height)) for width, height, *_ in (found["src_imsize"], found["trg_imsize"])]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is not a pair's annotation ({type(error).__name__}: {error})") from None
        for image, size in zip(images, stated, strict=True):
            if sizes.setdefault(image, size) != size:
                raise UserError(f"{path}: {image} has size {size}, in another pair {sizes[image]}; correct one")
        pairs.append(Pair(path.stem, category, *images, *points, (x1, y1, x2, y2)))
    return PairDataset(pairs, image_size, sizes.get)


def load_cub_pairs(root: str | Path, image_size: int, num_pairs: int, seed: int = 0) -> PairDataset:
    """Ordered pairs of test images of one species of CUB_200_2011 that share at least one visible part, of all 15; the
    category is the species, the points are all parts visible in both. Raises UserError."""
    root = Path(root)
    paths, parts, _ = read_cub(root)
    is_train = dict(read_table(root, "train_test_split.txt", (int, int), paths))
    boxes = {paths[image]: (x, y, x + width, y + height) for image, x, y, width, height in read_table(
        root, "bounding_boxes.txt", (int, float, float, float, float), paths)}
    points = {path: parts[image] for image, path in paths.items() if not is_train[image] and parts[image]}
    species = {path: Path(path).parent.name for path in points}
    return PairDataset(draw_matches(points, species, boxes, num_pairs, seed), image_size)


def load_synthetic_pairs(image_size: int, num_pairs: int, seed: int = 0, num_images: int = 60) -> PairDataset:
    """Ordered pairs of synthetic test pictures with one figure each, of one species; the points are the keypoints
    visible in both, at the centres of their pixels, the box is that of the figure's visible pixels."""
    pictures = {number: draw_figure(number, num_figures=1) for number in image_seeds("test", num_images, seed)}
    points = {number: {point.name: (point.x + 0.5, point.y + 0.5) for point in picture.keypoints if point.visible}
              for number, picture in pictures.items()}
    species = {number: OBJECT_NAMES[picture.species[0] - 1] for number, picture in pictures.items()}
    boxes = {number: Image.fromarray(picture.object_mask).getbbox() for number, picture in pictures.items()}
    return PairDataset(draw_matches(points, species, boxes, num_pairs, seed), image_size,
                       lambda number: pictures[number].object_mask.shape[::-1], partial(draw_image, num_figures=1))
