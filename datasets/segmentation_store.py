"""Decoded images of a segmentation split, kept in one tensor, and the training batches made from them.

Nothing is decoded twice, and the batches of a run are a pure function of seed, iteration and place in the batch.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from utils.distributed import shard
from utils.run import Progress
from utils.storage import allocate

from . import segmentation_transforms as transforms
from .label_maps import require_labelled
from .segmentation import Split, in_order

LARGEST_RATIO = 2.0  # of the base scale


class PixelStore:
    """All images of a split, decoded once, as int32 pixels (colour and label) in one flat tensor.

    Images larger than what the largest training scale needs are kept at that size. tier: "gpu", "cpu", "disk" (a mapped
    temporary file in folder) or "auto": the first of these that has room. label_counts: pixels of each class in the
    files' label maps, int64 [num_classes]. Raises UserError where no pixel has a class.
    """

    def __init__(self, split: Split, base_scale: tuple[int, int], device: torch.device, folder: Path,
                 tier: str = "auto", workers: int = 0, log: Callable[[str], None] = print):
        self.split, self.sizes = split, split.sizes(workers)
        largest = tuple(int(side * LARGEST_RATIO) for side in base_scale)
        self.stored = [min(size, transforms.rescale_size(*size, largest)) for size in self.sizes]
        self.starts = torch.tensor([0, *(height * width for height, width in self.stored)]).cumsum(0)
        self.pixels = allocate((int(self.starts[-1]),), torch.int32, device, tier, folder,
                               f"{len(split)} training images, decoded", log, pin=False)
        self.label_counts = np.zeros(split.num_classes, np.int64)
        progress = Progress(len(split), "decoding", "images")
        for index, (pixels, counts) in enumerate(in_order(self._packed, range(len(split)), workers)):
            self.pixels[self.starts[index]:self.starts[index + 1]] = pixels
            self.label_counts += counts
            progress.update()
        if shrunk := sum(size != stored for size, stored in zip(self.sizes, self.stored, strict=True)):
            log(f"{shrunk} of {len(split)} training images are larger than twice the base scale and were shrunk once")
        require_labelled(self.label_counts, "training")
        if absent := [split.names[index] for index in np.flatnonzero(self.label_counts == 0)]:
            log(f"{len(absent)} of {split.num_classes} classes are in no training label map: {', '.join(absent)}")

    def _packed(self, index: int) -> tuple[torch.Tensor, np.ndarray]:
        image, label = self.split.load(index)
        counts = np.bincount(label.ravel(), minlength=256)[:self.split.num_classes]
        if label.shape != self.stored[index]:
            height, width = self.stored[index]
            image = transforms.resize_image(torch.from_numpy(image), height, width).permute(1, 2, 0).numpy()
            rows, columns = (transforms.nearest_taps(torch.arange(new)[None], torch.tensor([new]), torch.tensor([old]))
                             for new, old in zip((height, width), label.shape, strict=True))
            label = label[rows[0].numpy()][:, columns[0].numpy()]
        return transforms.pack_pixels(image, label).flatten(), counts

    def batch(self, indices: Sequence[int], device: torch.device) -> tuple[transforms.Packed, list[tuple[int, int]]]:
        """Some images on the device, and their original sizes."""
        parts = [self.pixels[self.starts[index]:self.starts[index + 1]] for index in indices]
        pixels, starts = torch.cat(parts), torch.tensor([0, *map(len, parts)]).cumsum(0)[:-1]
        if pixels.device != device:
            pixels = transforms.to_device(pixels, device)
        numbers = torch.stack([starts, *torch.tensor([self.stored[index] for index in indices]).T])
        batch = transforms.Packed(pixels, *transforms.to_device(numbers, device))
        return batch, [self.sizes[index] for index in indices]


def batch_indices(seed: int, iteration: int, batch_size: int, num_images: int) -> list[int]:
    """The images of one global batch: epochs are permutations, laid end to end and cut into batches."""
    places = range(iteration * batch_size, (iteration + 1) * batch_size)
    epochs = {epoch: np.random.default_rng((seed, epoch)).permutation(num_images)
              for epoch in {place // num_images for place in places}}
    return [int(epochs[place // num_images][place % num_images]) for place in places]


def training_batches(store: PixelStore, iterations: range, batch_size: int, base_scale: tuple[int, int], crop_size: int,
                     mean: torch.Tensor, std: torch.Tensor, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """This process's share of each global batch: images float32 [b, 3, c, c] and labels uint8 [b, c, c]."""
    share = shard(batch_size)
    for iteration in iterations:
        indices = batch_indices(seed, iteration, batch_size, len(store.sizes))[share.start:share.stop]
        augmentations = [transforms.draw_augmentation(seed, iteration, position) for position in share]
        batch, sizes = store.batch(indices, mean.device)
        yield transforms.training_batch(batch, sizes, augmentations, base_scale, crop_size, mean, std)
