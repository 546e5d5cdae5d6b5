"""Patches of images: which keypoints give one, how it is cut, and how patches travel in batches.

Source of the rule and of the transforms: the authors' code of part retrieval (paper, section 4.2, appendix A.4). Its
patches have sides of about d / 2, where the paper's text says d: crop_scale 0.5 and 1.0.
"""

import os
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from utils import UserError
from utils.distributed import environment
from utils.ending import WORKER_LOST, WORKER_STOPPED, ending
from utils.provenance import digest, files_digest

from .files import BAD_IMAGE, read_rgb, reason

Transform = Callable[[Image.Image], torch.Tensor]  # PIL RGB image -> uint8 [3, h, w]
# Workers send groups of at most about this many patches: the cost of a transfer hardly depends on its size (64 cost the
# receiving process a fifth less than 16).
PATCHES_PER_GROUP = 64
# Groups that a worker may have made before one is taken, and the seconds that one may take.
PREFETCH, PATIENCE = 2, 600


def select_keypoints(points, crop_scale: float = 0.5, minimum: float = 20.0,
                     maximum: float = 1000.0) -> tuple[np.ndarray, np.ndarray]:
    """Chooses the keypoints of one image that give a patch, and the sizes of the patches.

    points: [n, 2] (x, y) in pixels, or [n, 3] with a third coordinate that separates groups. d is a point's L2 distance
    to the nearest other point that does not coincide with it. A point is kept if minimum < d / 2 < maximum, at any
    crop_scale; its patch spans (x - h, y - h, x + h, y + h) with h = round(d * crop_scale / 2), half to even.
    Returns (indices kept [m], half sides h [m]), int64. Raises UserError where crop_scale makes a patch empty.
    """
    points = np.asarray(points, dtype=np.float64)
    if len(points) < 2:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    distances = np.sqrt(((points[:, None] - points[None]) ** 2).sum(-1))
    distances[distances == 0] = np.inf
    nearest = distances.min(1)
    kept = np.flatnonzero((nearest / 2 > minimum) & (nearest / 2 < maximum))
    half_sides = np.rint(nearest[kept] * crop_scale / 2)
    if not (half_sides >= 1).all():
        raise UserError(f"crop scale {crop_scale} makes patches empty; use a larger one (published: 0.5)")
    return kept, half_sides.astype(np.int64)


class PatchImage(NamedTuple):
    path: str  # what the data set's load takes
    boxes: Sequence[tuple[float, float, float, float]] | None  # left, upper, right, lower, in pixels; None: all of it
    labels: Sequence[int]  # a class index for each patch


def patch_image(path: str, points: Sequence[Sequence[float]], labels: Sequence[int], crop_scale: float) -> PatchImage:
    """The image with the patches of the keypoints that select_keypoints keeps, in the order of the keypoints."""
    kept, half_sides = (array.tolist() for array in select_keypoints(points, crop_scale))
    boxes = []
    for index, half in zip(kept, half_sides, strict=True):
        x, y = points[index][:2]
        boxes.append((x - half, y - half, x + half, y + half))
    return PatchImage(path, boxes, [labels[index] for index in kept])


# torchvision is imported where it is used: it takes longer than all else that a script's --help needs.
def resize_square(size: int = 224) -> Transform:
    """The published transform of part patches, which are square: bicubic (Pillow). PIL -> uint8 [3, size, size]."""
    from torchvision import transforms
    return transforms.Compose([transforms.Resize(size, Image.BICUBIC), transforms.PILToTensor()])


def resize_center_crop(resize: int = 256, crop: int = 224) -> Transform:
    """Bicubic (Pillow) to a short side of resize, then the central crop. PIL image -> uint8 [3, crop, crop]."""
    from torchvision import transforms
    return transforms.Compose([transforms.Resize(resize, Image.BICUBIC), transforms.CenterCrop(crop),
                               transforms.PILToTensor()])


def random_crop_flip(size: int = 224) -> Transform:
    """RandomResizedCrop (bicubic) and horizontal flip. PIL image -> uint8 [3, size, size]."""
    from torchvision import transforms
    crop = transforms.RandomResizedCrop(size, interpolation=Image.BICUBIC)
    return transforms.Compose([crop, transforms.RandomHorizontalFlip(), transforms.PILToTensor()])


class PatchDataset(Dataset):
    """The patches of a list of images, one item per image, so that each image is decoded once.

    dataset[i] -> (patches uint8 [n, 3, h, w], ids int64 [n]). Ids number the patches of the whole data set, image by
    image in the order of the boxes; labels and image_index, int64 [num_patches], are by id.

    classes: names, by class index. transform: PIL patch -> uint8 [3, h, w] (default resize_square()); the encoder
    normalises on its device. load: path -> PIL RGB image. An image that cannot be decoded or cut raises UserError; with
    skip_bad_images its item is empty, and its ids never appear.
    """

    def __init__(self, images: Sequence[PatchImage], classes: Sequence[str], transform: Transform | None = None,
                 load: Callable[[str], Image.Image] = read_rgb, skip_bad_images: bool = False):
        self.images, self.classes = images, list(classes)
        self.transform, self.load, self.skip_bad_images = transform or resize_square(), load, skip_bad_images
        self.labels = torch.tensor([label for image in images for label in image.labels], dtype=torch.int64)
        self.num_patches = len(self.labels)
        self.first_id = torch.tensor([0, *(len(image.labels) for image in images)]).cumsum(0)
        self.image_index = torch.repeat_interleave(self.first_id.diff())

    def __len__(self) -> int:
        return len(self.images)

    def identity(self, what: str) -> dict:
        """All that the patches depend on but the code, by name in words. what: this data set in these words."""
        return {f"the number of images of the {what}": len(self.images),
                f"the list of images of the {what}": files_digest([image.path for image in self.images]),
                f"the list of classes of the {what}": self.classes,
                f"the list of labels of the {what}": digest(self.labels),
                f"the list of boxes of the {what}": digest([image.boxes for image in self.images if image.boxes]),
                f"the kind of patches of the {what}": type(self).__name__,
                f"the transform of the {what}": str(self.transform)}

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        entry = self.images[index]
        ids = torch.arange(int(self.first_id[index]), int(self.first_id[index + 1]))
        nothing = torch.empty(0, 3, 0, 0, dtype=torch.uint8)
        if len(ids) == 0:
            return nothing, ids
        try:
            return self.cut(self.load(entry.path), entry.boxes), ids
        except BAD_IMAGE as error:
            if self.skip_bad_images:
                return nothing, ids[:0]
            raise UserError(f"{entry.path} cannot be decoded ({reason(error)}); restore the file, "
                            "or leave such images out with --skip-bad-images") from None

    def cut(self, image: Image.Image, boxes: Sequence[tuple] | None) -> torch.Tensor:
        """uint8 [n, 3, h, w]. Pillow rounds the boxes; outside the image is black."""
        patches = [image] if boxes is None else [image.crop(box) for box in boxes]
        return torch.stack([self.transform(patch) for patch in patches])

    def batches(self, image_indices: Sequence[int], batch_size: int, workers: int,
                    pin_memory: bool = False) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yields the patches of the given images in order, (uint8 [b, 3, h, w], ids int64 [b]), b = batch_size except
        in the last batch. Every image is decoded once, by a worker process (0: by this process). pin_memory: patches in
        page-locked memory. Raises UserError for an image that cannot be decoded and for a worker that was killed.
        """
        indices = torch.tensor(image_indices, dtype=torch.int64)
        counts = self.first_id.diff()[indices]
        # Four groups at least for each worker, where that leaves 16 patches in one.
        size = min(PATCHES_PER_GROUP, max(16, int(counts.sum()) // (4 * max(1, workers))))
        lengths = ((counts.cumsum(0) - counts) // size).unique_consecutive(return_counts=True)[1].tolist()
        groups = [group.tolist() for group in indices.split(lengths)]
        if workers:
            largest = max((int(group.sum()) for group in counts.split(lengths)), default=0)
            with torch.random.fork_rng(devices=[]):
                workers = workers_with_room(workers, largest * self.cut(Image.new("RGB", (64, 64)), None)[0].nbytes)
        loader = DataLoader(groups, None, num_workers=workers, collate_fn=self._load_group,
                            prefetch_factor=PREFETCH if workers else None, timeout=PATIENCE if workers else 0)
        filled = 0
        for patches, ids in received(loader):
            while len(ids):
                if filled == 0:
                    batch = patches.new_empty((batch_size, *patches.shape[1:]), pin_memory=pin_memory)
                    batch_ids = ids.new_empty(batch_size)
                count = min(batch_size - filled, len(ids))
                batch[filled:filled + count], batch_ids[filled:filled + count] = patches[:count], ids[:count]
                patches, ids, filled = patches[count:], ids[count:], filled + count
                if filled == batch_size:
                    yield batch, batch_ids
                    filled = 0
        if filled:
            yield batch[:filled], batch_ids[:filled]

    def _load_group(self, image_indices: list[int]) -> tuple[torch.Tensor, torch.Tensor] | UserError:
        """What a worker runs. An error is returned: the DataLoader turns a raised one into a message of many lines."""
        try:
            items = [self[index] for index in image_indices]
        except UserError as error:
            return error
        items = [item for item in items if len(item[1])] or items[:1]
        return torch.cat([patches for patches, _ in items]), torch.cat([ids for _, ids in items])


def choose_keypoints(chosen: Sequence[int | str], names: dict[int, str], word: str, source: str | Path) -> list[int]:
    """The numbers of keypoints that are given by number or name, or by ["all"]. names: of all, by number. word: for a
    keypoint in messages; source: of the names. Raises UserError for an unknown, ambiguous or repeated one."""
    if [*chosen] == ["all"]:
        return [*names]
    found = []
    for keypoint in map(str, chosen):
        meant = [number for number, name in names.items() if keypoint in (str(number), name)]
        if not meant:
            known = ", ".join(f"{number} {name}" for number, name in names.items())
            raise UserError(f"{word} {keypoint} is not in {source}; choose from {known}")
        if len(meant) > 1:
            raise UserError(f"{word} {keypoint} is the number of one and the name of another in {source}; rename it")
        found += meant
    if len(set(found)) < len(found):
        raise UserError(f"a {word} is named twice: {', '.join(map(str, chosen))}; name each once")
    return found


def keypoint_patches(points: Iterable[tuple[str, list[tuple[int, Sequence[float]]]]], chosen: Sequence[int],
                     names: dict[int, str], word: str, crop_scale: float, transform: Transform | None,
                     skip_bad_images: bool, load: Callable[[str], Image.Image] = read_rgb) -> PatchDataset:
    """The patches of the chosen keypoints; class k is the k-th of them. Images without a patch are left out.

    points: (path, [(class, point), ...]) of every image, only visible ones. chosen: numbers. names, word: as of
    choose_keypoints. The other parameters: as of PatchDataset. Raises UserError where no patch is left.
    """
    images = [patch_image(path, [point for _, point in pairs], [label for label, _ in pairs], crop_scale)
              for path, pairs in points]
    images = [image for image in images if image.boxes]
    if not images:
        raise UserError(f"no patch of the {word}s {', '.join(map(str, chosen))} is left; use two or more, of which an "
                        "object shows at least two, over 40 pixels apart")
    return PatchDataset(images, [names[keypoint] for keypoint in chosen], transform, load, skip_bad_images)


def workers_with_room(workers: int, group_bytes: int) -> int:
    """As many of the workers as shared memory has room for what they hold, also for this machine's other processes: a
    worker whose group does not fit would be killed, or wait for ever. What is too many is logged."""
    try:
        room = os.statvfs("/dev/shm")
    except OSError:
        return workers
    free = 0.8 * room.f_bavail * room.f_frsize / environment("LOCAL_WORLD_SIZE", 1, 1)
    groups = int(free / (group_bytes + 8192))  # each takes whole pages, and a page for its ids
    fitting = max(0, min(workers, (groups - 1) // PREFETCH))  # one more group is being used
    if fitting < workers:
        ending.log_once(f"shared memory (/dev/shm) has room for {fitting} of {workers} data loading processes; where "
                        "it is a container's, start it with more (docker run --shm-size 8g)")
    return fitting


def received(loader: DataLoader) -> Iterator:
    """The loader's items. Raises the UserError that is one of them, or one that says that a worker was killed."""
    try:
        for item in loader:
            if isinstance(item, UserError):
                raise item
            yield item
    except (RuntimeError, ConnectionError) as error:
        # The connection breaks where a worker is killed while it sends.
        lost = isinstance(error, ConnectionError) or str(error).startswith("DataLoader")
        if not lost or WORKER_STOPPED.match(str(error)):
            raise
        raise UserError(WORKER_LOST) from None


class RandomViews(PatchDataset):
    """The images of another data set under a random transform, drawn anew for every epoch.

    Set epoch before every pass over the images. transform: takes its random numbers from PyTorch's generator.
    """

    def __init__(self, dataset: PatchDataset, transform: Transform, seed: int):
        super().__init__(dataset.images, dataset.classes, transform, dataset.load, dataset.skip_bad_images)
        self.seed, self.epoch = seed, 0

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(random.Random(f"{self.seed} {self.epoch} {index}").getrandbits(63))
            return super().__getitem__(index)
