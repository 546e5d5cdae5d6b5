"""Pairs of images with matched keypoints: SPair-71k, pairs of CUB-200-2011 birds, pairs of synthetic figures.

SPair-71k: Min et al. 2019 (arXiv:1908.10543; https://cvlab.postech.ac.kr/research/SPair-71k). The pairs of CUB are
ours, drawn by a seed: their results compare with nothing published.
"""

import json
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image

from utils import UserError

from . import check_data_path
from .cub import read_cub, read_table
from .files import picture_size, read_lines, read_rgb
from .patches import PatchDataset, PatchImage, count_outside
from .synthetic import OBJECT_NAMES, draw_figure, draw_image, image_seeds

PAIR_DATASETS = ("spair", "cub-pairs", "synthetic-pairs")
# Drawn where a data set has no list of pairs: about as many as the test split of SPair-71k has.
NUM_PAIRS = 10000
# SPair-71k's annotations: by key of a pair's file, our name and what the values mean.
LEVELS = {0: "easy", 1: "medium", 2: "hard"}
WHICH = {0: "none", 1: "source", 2: "target", 3: "both"}
ATTRIBUTES = {"viewpoint_variation": ("viewpoint", LEVELS), "scale_variation": ("scale", LEVELS),
              "truncation": ("truncation", WHICH), "occlusion": ("occlusion", WHICH)}


class Pair(NamedTuple):
    """Two images of one category, as plain values for JSON; coordinates are pixels of the original images.

    source, target: the images' paths (synthetic: seeds). source_points, target_points: the matched keypoints, (x, y).
    box: of the target's object, (x1, y1, x2, y2). attributes: by name, the pair's level."""

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
    antialiased). load: path -> PIL RGB image. size: path -> (width, height). stated: by path, the (width, height) that
    annotations give, in place of size; the picture must have it (read_rgb), which shows when it is decoded.

    Attributes: pairs, image_size, images (a PatchDataset of whole images), categories (names), and as tensors: sizes
    float64 [I, 2], (width, height) of the images; of the pairs, source and target (places in images), category, int64
    [P], and box_side float64 [P], max(w, h) of the target's box; of all points, pair int64 [n], and source_points and
    target_points, float64 [n, 2]. num_outside: of these points, those outside of their images, which are kept, as
    published evaluations keep them. Raises UserError without any pair, and as check_pair and count_outside.
    """

    def __init__(self, pairs: Iterable[Pair], image_size: int, load: Callable = read_rgb,
                 size: Callable = picture_size, stated: Mapping[str, tuple[int, int]] | None = None):
        from torchvision import transforms  # as in patches.py
        self.pairs, self.image_size = sorted(pairs, key=lambda pair: pair.category), image_size
        if not self.pairs:
            raise UserError("there is no pair of images that share keypoints; check the data set and the split")
        stated, sizes = stated or {}, {}
        for pair in self.pairs:
            for path in (pair.source, pair.target):
                if path not in sizes:
                    sizes[path] = stated[path] if path in stated else size(path)
            check_pair(pair, sizes[pair.target])
        squash = transforms.Compose([transforms.Resize((image_size, image_size), Image.BILINEAR),
                                     transforms.PILToTensor()])
        images = [PatchImage(path, None, [0], stated.get(path)) for path in sizes]
        self.images = PatchDataset(images, ["image"], squash, load)

        def floats(rows):
            return torch.tensor(rows, dtype=torch.float64)

        numbers = {path: number for number, path in enumerate(sizes)}
        self.categories = list(dict.fromkeys(pair.category for pair in self.pairs))
        self.category = torch.tensor([self.categories.index(pair.category) for pair in self.pairs])
        self.source = torch.tensor([numbers[pair.source] for pair in self.pairs])
        self.target = torch.tensor([numbers[pair.target] for pair in self.pairs])
        self.pair = torch.repeat_interleave(torch.tensor([len(pair.source_points) for pair in self.pairs]))
        self.source_points = floats([point for pair in self.pairs for point in pair.source_points])
        self.target_points = floats([point for pair in self.pairs for point in pair.target_points])
        self.sizes, boxes = floats(list(sizes.values())), floats([pair.box for pair in self.pairs])
        self.box_side = (boxes[:, 2:] - boxes[:, :2]).amax(1)
        points, ends = torch.cat([self.source_points, self.target_points]), torch.cat([self.source, self.target])
        pair = torch.cat([self.pair, self.pair + len(self.pairs)])
        self.num_outside, _ = count_outside(points, self.sizes[ends[pair]], lambda number: (
            f"pair {self.pairs[self.pair[number % len(self.pair)]].name}"))


def check_pair(pair: Pair, target_size: tuple[int, int]) -> None:
    """Raises UserError where a pair has no keypoints or they do not match, and where the target's box has no size or
    reaches further out of its image, of (width, height), than that is large."""
    x1, y1, x2, y2 = pair.box
    width, height = target_size
    if not len(pair.source_points) == len(pair.target_points) > 0:
        raise UserError(f"pair {pair.name}: {len(pair.source_points)} keypoints in the source, "
                        f"{len(pair.target_points)} in the target")
    if not (-width <= x1 < x2 <= 2 * width and -height <= y1 < y2 <= 2 * height):
        raise UserError(f"pair {pair.name}: the target's box {tuple(pair.box)} has no size or is far outside of its "
                        f"picture of {width} x {height} pixels")


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


def draw_matches(points: Mapping, categories: Mapping, count: int, seed: int) -> Iterator[tuple]:
    """Ordered pairs of images of one category that share keypoints, drawn: (source, target, the shared points in each).
    points: by image, (x, y) of its visible keypoints by name. categories: of the images to pair."""
    members = {}
    for image, category in categories.items():
        members.setdefault(category, []).append(image)
    candidates = [(source, target) for source, category in categories.items() for target in members[category]
                  if source != target and points[source].keys() & points[target].keys()]
    for source, target in draw(candidates, count, seed):
        shared = sorted(points[source].keys() & points[target].keys())
        yield source, target, *([points[image][name] for name in shared] for image in (source, target))


def load_spair(root: str | Path, image_size: int, split: str = "test", num_pairs: int | None = None,
               seed: int = 0) -> PairDataset:
    """The pairs of a folder SPair-71k: those of Layout/large/{split}.txt, or without that file all of
    PairAnnotation/{split}; 12,234 of test. Files may have "_" in their names for ":". Raises UserError."""
    root = Path(root)
    annotations, layout = root / "PairAnnotation" / split, root / "Layout" / "large" / f"{split}.txt"
    if not annotations.is_dir():
        raise UserError(f"{annotations} does not exist; --data-path must be a folder SPair-71k/{{JPEGImages, "
                        "PairAnnotation/{trn,val,test}} and --split one of trn, val, test")
    names = [name for line in read_lines(layout) for name in line.split()] if layout.is_file() else sorted(
        path.stem for path in annotations.glob("[!.]*.json"))
    pairs, stated = [], {}
    for name in draw(names, num_pairs, seed):
        path = annotations / f"{name}.json"
        if not path.is_file():
            path = annotations / f"{name.replace(':', '_')}.json"
        pair, sizes = read_spair(name, path, root / "JPEGImages")
        pairs.append(pair)
        for image, size in sizes.items():
            if stated.setdefault(image, size) != size:
                raise UserError(f"{path}: {image} has size {size}, in another pair {stated[image]}; correct one")
    return PairDataset(pairs, image_size, stated=stated)


def read_spair(name: str, path: Path, images: Path) -> tuple[Pair, dict[str, tuple[int, int]]]:
    """A pair from its annotation, and by path the (width, height) that it states. Raises UserError for a file that is
    none, OSError for a missing one."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        source, target = (str(images / found["category"] / found[key]) for key in ("src_imname", "trg_imname"))
        points = [[(float(x), float(y)) for x, y in found[key]] for key in ("src_kps", "trg_kps")]
        x1, y1, x2, y2 = map(float, found["trg_bndbox"])
        attributes = {ours: values[found[key]] for key, (ours, values) in ATTRIBUTES.items() if key in found}
        sizes = {image: (int(width), int(height)) for image, (width, height, *_) in (
            (source, found["src_imsize"]), (target, found["trg_imsize"]))}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"pair {name}: {path} is not a pair's annotation ({type(error).__name__}: {error})") from None
    return Pair(name, found["category"], source, target, *points, (x1, y1, x2, y2), attributes), sizes


def load_cub_pairs(root: str | Path, image_size: int, num_pairs: int, seed: int = 0) -> PairDataset:
    """Ordered pairs of test images of one species of CUB_200_2011 that share at least one visible part, of all 15; the
    category is the species, the points are all parts visible in both. Raises UserError."""
    root = Path(root)
    paths, points, _ = read_cub(root)
    is_train = dict(read_table(root, "train_test_split.txt", (int, int), paths))
    boxes = {image: (x, y, x + width, y + height) for image, x, y, width, height in read_table(
        root, "bounding_boxes.txt", (int, float, float, float, float), paths)}
    names = {image: str(Path(path).relative_to(root / "images")) for image, path in paths.items()}
    species = {image: name.split("/")[0] for image, name in names.items() if not is_train[image] and points[image]}
    pairs = [Pair(f"{names[source]} to {names[target]}", species[source],
                  paths[source], paths[target], *matched, boxes[target], {})
             for source, target, *matched in draw_matches(points, species, num_pairs, seed)]
    return PairDataset(pairs, image_size)


def load_synthetic_pairs(image_size: int, num_pairs: int, seed: int = 0, num_images: int = 60) -> PairDataset:
    """Ordered pairs of synthetic test pictures with one figure each, of one species; the points are the keypoints
    visible in both, at the centres of their pixels, the box is that of the figure's visible pixels."""
    pictures = {number: draw_figure(number, num_figures=1) for number in image_seeds("test", num_images, seed)}
    points = {number: {point.name: (point.x + 0.5, point.y + 0.5) for point in picture.keypoints if point.visible}
              for number, picture in pictures.items()}
    species = {number: OBJECT_NAMES[picture.species[0] - 1] for number, picture in pictures.items()}
    boxes = {number: Image.fromarray(picture.object_mask).getbbox() for number, picture in pictures.items()}
    pairs = [Pair(f"{source} to {target}", species[source], source, target, *matched, boxes[target], {})
             for source, target, *matched in draw_matches(points, species, num_pairs, seed)]
    return PairDataset(pairs, image_size, partial(draw_image, num_figures=1),
                       lambda number: pictures[number].object_mask.shape[::-1])
