"""Patches of images: which keypoints give one, how it is cut, and how patches travel in batches.

Source of the rule and of the transforms: the authors' code of part retrieval (paper, section 4.2, appendix A.4). Its
patches have sides of about d / 2, where the paper's text says d: crop_scale 0.5 and 1.0.
"""

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader

from utils import UserError
from utils.results import digest

from .files import read_rgb

Transform = Callable[[Image.Image], torch.Tensor]  # PIL RGB image -> uint8 [3, h, w]


def select_keypoints(points, crop_scale: float = 0.5) -> tuple[np.ndarray, np.ndarray]:
    """Which keypoints of one image give a patch, and the sizes of the patches.

    points: [n, 2] (x, y) in pixels, or [n, 3] with a third coordinate that separates groups. d is a point's L2 distance
    to the nearest other point that does not coincide with it. A point is kept if 20 < d / 2 < 1000, at any
    crop_scale; its patch spans (x - h, y - h, x + h, y + h) with h = round(d * crop_scale / 2), half to even.
    Returns (indices kept [m], half sides h [m]), int64. Raises UserError where crop_scale makes a patch empty.
    """
    points = np.asarray(points, dtype=np.float64)
    if len(points) < 2:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    distances = np.sqrt(((points[:, None] - points[None]) ** 2).sum(-1))
    distances[distances == 0] = np.inf
    nearest = distances.min(1)
    kept = np.flatnonzero((nearest / 2 > 20) & (nearest / 2 < 1000))
    half_sides = np.rint(nearest[kept] * crop_scale / 2)
    if not (half_sides >= 1).all():
        raise UserError(f"crop scale {crop_scale} makes patches empty; use a larger one (published: 0.5)")
    return kept, half_sides.astype(np.int64)


class PatchImage(NamedTuple):
    path: str  # what the data set's load takes
    boxes: Sequence[tuple[float, float, float, float]] | None  # left, upper, right, lower, in pixels; None: all of it
    labels: Sequence[int]  # a class index for each patch
    size: tuple[int, int] | None = None  # (width, height) that the annotation states, if it does


# torchvision is imported where it is used: it takes longer than all else that a script's --help needs.
def resize_center_crop(size: int = 224, short_side: int | None = None) -> Transform:
    """Bicubic (Pillow) to a short side, by default of size * 256 / 224, then the central crop. Part patches are square,
    so short_side = size shows the whole patch. PIL image -> uint8 [3, size, size]."""
    from torchvision import transforms
    resize = transforms.Resize(short_side or round(size * 256 / 224), Image.BICUBIC)
    return transforms.Compose([resize, transforms.CenterCrop(size), transforms.PILToTensor()])


def random_crop_flip(size: int = 224) -> Transform:
    """RandomResizedCrop (bicubic) and horizontal flip. PIL image -> uint8 [3, size, size]."""
    from torchvision import transforms
    crop = transforms.RandomResizedCrop(size, interpolation=Image.BICUBIC)
    return transforms.Compose([crop, transforms.RandomHorizontalFlip(), transforms.PILToTensor()])


class PatchDataset:
    """The patches of a list of images, one item per image, so that each image is decoded once.

    dataset[i] -> (patches uint8 [n, 3, h, w], ids int64 [n]). Ids number the patches of the whole data set, image by
    image in the order of the boxes; labels and image_index, int64 [num_patches], are by id.

    images: each gives at least one patch. classes: names, by class index. transform: PIL patch -> uint8 [3, h, w]
    (default: all of a square patch, at 224 x 224); the encoder normalises on its device. load: path, and the stated
    size where there is one -> PIL RGB image. notes: for the log. num_outside: visible keypoints out of their pictures.
    """

    def __init__(self, images: Sequence[PatchImage], classes: Sequence[str], transform: Transform | None = None,
                 load: Callable[..., Image.Image] = read_rgb, notes: Sequence[str] = (), num_outside: int = 0):
        self.images, self.classes = images, list(classes)
        self.transform, self.load = transform or resize_center_crop(short_side=224), load
        self.labels = torch.tensor([label for image in images for label in image.labels], dtype=torch.int64)
        self.num_patches = len(self.labels)
        self.first_id = torch.tensor([0, *(len(image.labels) for image in images)]).cumsum(0)
        self.image_index = torch.repeat_interleave(self.first_id.diff())
        self.notes, self.num_outside = list(notes), num_outside

    def __len__(self) -> int:
        return len(self.images)

    def subset(self, indices: Sequence[int]) -> "PatchDataset":
        """Some images of this data set as a data set of their own."""
        images = [self.images[index] for index in indices]
        return PatchDataset(images, self.classes, self.transform, self.load, self.notes, self.num_outside)

    def files(self) -> list[str]:
        """The paths of the images; none of synthetic ones, which are known by a number."""
        return [image.path for image in self.images if isinstance(image.path, str)]

    def identity(self, what: str) -> dict:
        """What tells this data set from another, by name in words. what: this data set in these words."""
        return {f"the number of images of the {what}": len(self.images),
                f"the list of classes of the {what}": self.classes,
                f"the labels and boxes of the {what}": digest(self.labels, [image.boxes for image in self.images])}

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        path, boxes, _, size = self.images[index]
        patches = self.cut(self.load(path) if size is None else self.load(path, size), boxes)
        return patches, torch.arange(int(self.first_id[index]), int(self.first_id[index + 1]))

    def cut(self, image: Image.Image, boxes: Sequence[tuple] | None) -> torch.Tensor:
        """uint8 [n, 3, h, w]. Pillow rounds the boxes; outside the image is black."""
        patches = [image] if boxes is None else [image.crop(box) for box in boxes]
        return torch.stack([self.transform(patch) for patch in patches])

    def batches(self, image_indices: Sequence[int], batch_size: int, workers: int,
                pin_memory: bool = False) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yields the patches of the given images in order, (uint8 [b, 3, h, w], ids int64 [b]). A batch has all patches
        of as many images as give at most batch_size, of one at least, and is made by one worker process (0 workers: by
        this one). pin_memory: patches in page-locked memory. Raises UserError for an image that cannot be decoded."""
        groups, room = [], 0
        for index in image_indices:
            count = len(self.images[index].labels)
            if count > room:
                groups.append([])
                room = batch_size
            groups[-1].append(index)
            room -= count
        for batch in DataLoader(groups, None, num_workers=workers, collate_fn=self._load_batch, pin_memory=pin_memory):
            if isinstance(batch, UserError):
                raise batch
            yield batch

    def _load_batch(self, image_indices: list[int]) -> tuple[torch.Tensor, torch.Tensor] | UserError:
        """What a worker runs. An error is returned: the DataLoader turns a raised one into a message of many lines."""
        try:
            patches, ids = zip(*(self[index] for index in image_indices), strict=True)
        except UserError as error:
            return error
        return torch.cat(patches), torch.cat(ids)


def choose_keypoints(chosen: Sequence[int | str], names: dict[int, str], word: str, source: str | Path) -> list[int]:
    """The numbers of keypoints that are given by number or name, or by ["all"]. names: of all, by number. word: for a
    keypoint in messages; source: of the names. Raises UserError for an unknown or a repeated one."""
    if [*chosen] == ["all"]:
        return [*names]
    numbers = {name: number for number, name in names.items()} | {str(number): number for number in names}
    for keypoint in map(str, chosen):
        if keypoint not in numbers:
            known = ", ".join(f"{number} {name}" for number, name in names.items())
            raise UserError(f"{word} {keypoint} is not in {source}; choose from {known}")
    found = [numbers[str(keypoint)] for keypoint in chosen]
    if len(set(found)) < len(found):
        raise UserError(f"a {word} is named twice: {', '.join(map(str, chosen))}; name each once")
    return found


def keypoint_patches(points: Iterable[tuple], chosen: Sequence[int], names: dict[int, str], word: str,
                     crop_scale: float, transform: Transform | None,
                     load: Callable[..., Image.Image] = read_rgb) -> PatchDataset:
    """The patches of the chosen keypoints; class k is the k-th of them. Images without a patch are left out.

    points: of every image (path, [(class, point), ...]), only visible ones, or with the stated (width, height) as a
    third. chosen, names, word: as of choose_keypoints. Raises UserError where no patch is left.
    """
    images = []
    for path, pairs, *size in points:
        kept, half_sides = select_keypoints([point for _, point in pairs], crop_scale)
        if len(kept):
            labels, centres = zip(*(pairs[index] for index in kept), strict=True)
            boxes = [(x - half, y - half, x + half, y + half)
                     for (x, y, *_), half in zip(centres, half_sides.tolist(), strict=True)]
            images.append(PatchImage(path, boxes, [*labels], *size))
    if not images:
        raise UserError(f"no patch of the {word}s {', '.join(map(str, chosen))} is left; use two or more, of which an "
                        "object shows at least two, over 40 pixels apart")
    return PatchDataset(images, [names[keypoint] for keypoint in chosen], transform, load)


def count_outside(points: Sequence[Sequence[float]], sizes: Sequence[tuple[int, int]],
                  where: Callable[[int], str]) -> tuple[int, list[str]]:
    """How many keypoints lie outside of their pictures, a mistake or two of the annotators or pictures of another size,
    and what the log says of them. points: visible ones, (x, y) in pixels; sizes: (width, height) of the picture of
    each; where: its number in the list -> where it stands. Raises UserError where they are more than one in a hundred,
    or one is not finite."""
    points, sizes = (np.asarray(values, dtype=np.float64).reshape(-1, 2) for values in (points, sizes))
    outside = np.flatnonzero(~((points >= 0) & (points <= sizes)).all(1))
    if len(outside) == 0:
        return 0, []
    (x, y), (width, height) = points[outside[0]], sizes[outside[0]]
    note = (f"{len(outside)} of {len(points)} visible keypoints lie outside of their pictures, the first "
            f"({where(outside[0])}) at ({x:g}, {y:g}) of {width:g} x {height:g} pixels")
    if 100 * len(outside) > len(points) or not np.isfinite(points).all():
        raise UserError(f"{note}; the pictures are mostly resized, cropped or of another release: use those that were "
                        "annotated")
    return len(outside), [note]


def draw_numbers(count: int, num: int | None, seed: int) -> list[int]:
    """num of the numbers below count (None, or more than there are: all), drawn by the seed, ascending."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:num].sort().values.tolist()


class RandomViews(PatchDataset):
    """The images of another data set under a random transform (of PyTorch's generator), drawn anew for every epoch; set
    epoch before every pass."""

    def __init__(self, dataset: PatchDataset, transform: Transform, seed: int):
        super().__init__(dataset.images, dataset.classes, transform, dataset.load)
        self.seed, self.epoch = seed, 0

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(random.Random(f"{self.seed} {self.epoch} {index}").getrandbits(63))
            return super().__getitem__(index)
