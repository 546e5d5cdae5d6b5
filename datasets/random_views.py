"""Random views of whole images for training, the same for an image and epoch whichever process or worker draws them."""

import random
from collections.abc import Callable

import torch
from PIL import Image
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from .patches import PatchDataset


def random_crop_flip(size: int = 224) -> transforms.Compose:
    """RandomResizedCrop (bicubic) and horizontal flip. PIL image -> uint8 [3, size, size]."""
    return transforms.Compose([transforms.RandomResizedCrop(size, interpolation=InterpolationMode.BICUBIC),
                               transforms.RandomHorizontalFlip(), transforms.PILToTensor()])


class RandomViews(PatchDataset):
    """The images of another data set under a random transform, drawn anew for every epoch.

    Set epoch before every pass over the images. transform: draws its chance from PyTorch's generator.
    """

    def __init__(self, dataset: PatchDataset, transform: Callable[[Image.Image], torch.Tensor], seed: int):
        super().__init__(dataset.images, dataset.classes, transform, dataset.load, dataset.skip_bad_images)
        self.seed, self.epoch = seed, 0

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(random.Random(f"{self.seed} {self.epoch} {index}").getrandbits(63))
            return super().__getitem__(index)
