"""The training and test transforms of linear segmentation, on batches of tensors, on any device.

Order and distributions are those of the authors' configurations: resize, crop, flip, photometric distortion, normalise,
pad. The integer arithmetic is OpenCV's (fixed-point bilinear resize, 8-bit HSV), so that pixels equal the authors' on
every device. Only the crop is computed, never the whole resized image. A pixel and its label are one int32: red, green,
blue, label, from the lowest byte up (pack_pixels); the images of a batch are concatenated in one flat tensor.
"""

from functools import cache
from typing import NamedTuple

import numpy as np
import torch

IGNORE = 255
CROP_DRAWS = 10


class Augmentation(NamedTuple):
    """The random parameters of one training sample. The defaults apply no distortion; None for saturation and hue,
    because even their neutral values would go through 8-bit HSV."""
    ratio: float  # of the base scale, [0.5, 2)
    offsets: np.ndarray  # [11, 2], offsets (y, x) of the crops to try, as fractions of the largest offset
    flip: bool
    brightness: float = 0.0
    contrast: float = 1.0
    contrast_first: bool = False
    saturation: float | None = None
    hue: int | None = None


class Packed(NamedTuple):
    """A batch of images in flat storage: pixels int32 [P]; starts, heights, widths int64 [B], on the same device."""
    pixels: torch.Tensor
    starts: torch.Tensor
    heights: torch.Tensor
    widths: torch.Tensor


class Crops(NamedTuple):
    """Crops of resized images: where each source image begins in flat storage, its height and width, those of the
    resized image, all int64 [B], and rows int64 [B, h] and columns [B, w] of the resized image."""
    starts: torch.Tensor
    heights: torch.Tensor
    widths: torch.Tensor
    out_heights: torch.Tensor
    out_widths: torch.Tensor
    rows: torch.Tensor
    columns: torch.Tensor

    def inside(self) -> torch.Tensor:
        """Which pixels of the crops lie in the resized images, bool [B, h, w]."""
        rows, columns = (torch.arange(index.shape[1], device=index.device) < size[:, None]
                         for index, size in ((self.rows, self.out_heights), (self.columns, self.out_widths)))
        return rows[:, :, None] & columns[:, None]


def draw_augmentation(seed: int, iteration: int, position: int) -> Augmentation:
    """The parameters for one position in the global batch of one iteration: a pure function of the three numbers."""
    uniform = np.random.default_rng((seed, iteration, position)).random(11 + 2 * (CROP_DRAWS + 1))
    switches, values = uniform[:6] < 0.5, uniform[6:11]
    return Augmentation(
        ratio=0.5 + 1.5 * values[0],
        offsets=uniform[11:].reshape(-1, 2),
        flip=bool(switches[0]),
        brightness=64 * values[1] - 32 if switches[1] else 0.0,
        contrast=0.5 + values[2] if switches[2] else 1.0,
        contrast_first=bool(switches[3]),
        saturation=0.5 + values[3] if switches[4] else None,
        hue=int(36 * values[4]) - 18 if switches[5] else None)


def rescale_size(height: int, width: int, scale: tuple[int, int]) -> tuple[int, int]:
    """The largest size of the same aspect ratio that fits into scale, larger side to larger side."""
    factor = min(max(scale) / max(height, width), min(scale) / min(height, width))
    return max(int(height * factor + 0.5), 1), max(int(width * factor + 0.5), 1)


def pack_pixels(image: np.ndarray, label: np.ndarray) -> torch.Tensor:
    """uint8 [H, W, 3] and uint8 [H, W] -> int32 [H, W]."""
    packed = np.ascontiguousarray(np.dstack([image, label]))
    return torch.from_numpy(packed).view(torch.int32).squeeze(-1)


def take(pixels: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """pixels[index] for flat pixels; on a CPU index_select is several times faster than indexing."""
    return pixels.index_select(0, index.flatten()).view(index.shape)


def unpack(pixels: torch.Tensor) -> torch.Tensor:
    """int32 [B, H, W] -> red, green, blue as int32 [B, 3, H, W]."""
    shifts = torch.arange(0, 24, 8, dtype=torch.int32, device=pixels.device)[:, None, None]
    return (pixels[:, None] >> shifts).bitwise_and_(255)


def _steps(out_size: torch.Tensor, in_size: torch.Tensor) -> torch.Tensor:
    return (1 / (out_size.double() / in_size.double()))[:, None]


def linear_taps(index: torch.Tensor, out_size: torch.Tensor, in_size: torch.Tensor, across: bool) -> tuple:
    """Bilinear interpolation along one axis, as OpenCV 4 does it for 8 bits (resize, INTER_LINEAR): the two source rows
    or columns of each output one, int64 [B, n], and their weights in 1/2048, int32 [B, n].

    index: output rows or columns, int64 [B, n]; out_size, in_size: [B]. across: of columns, where a tap outside the
    image gives the edge full weight; taps of rows are clamped and keep their weights.
    """
    position = ((index + 0.5) * _steps(out_size, in_size) - 0.5).float()
    lower, last = position.floor().long(), (in_size - 1)[:, None]
    weight = position - lower
    if across:
        weight = torch.where((lower < 0) | (lower >= last), 0.0, weight)
    upper = torch.minimum((lower + 1).clamp(min=0), last)
    lower = torch.minimum(lower.clamp(min=0), last)
    return lower, upper, torch.round(2048 * (1 - weight)).int(), torch.round(2048 * weight).int()


def nearest_taps(index: torch.Tensor, out_size: torch.Tensor, in_size: torch.Tensor) -> torch.Tensor:
    """The source row or column of each output one, int64 [B, n] (OpenCV's INTER_NEAREST)."""
    return torch.minimum((index * _steps(out_size, in_size)).floor().long(), (in_size - 1)[:, None])


def resized_labels(pixels: torch.Tensor, crops: Crops) -> torch.Tensor:
    """Labels of crops of resized maps: uint8 [B, h, w]."""
    rows = nearest_taps(crops.rows, crops.out_heights, crops.heights)
    columns = nearest_taps(crops.columns, crops.out_widths, crops.widths)
    starts = crops.starts[:, None] + rows * crops.widths[:, None]
    # The label is the highest byte; the cast drops the copies of the sign bit.
    return take(pixels, starts[:, :, None] + columns[:, None]).bitwise_right_shift_(24).to(torch.uint8)


def resized_pixels(pixels: torch.Tensor, crops: Crops) -> torch.Tensor:
    """Colours of crops of resized images: int32 [B, 3, h, w], 0 to 255."""
    above, below, above_weight, below_weight = linear_taps(crops.rows, crops.out_heights, crops.heights, across=False)
    left, right, left_weight, right_weight = linear_taps(crops.columns, crops.out_widths, crops.widths, across=True)
    # Columns first, on the source rows that are needed, each once.
    first = above.amin(1, keepdim=True)
    count = int((below.amax(1, keepdim=True) - first).max()) + 1
    needed = torch.minimum(first + torch.arange(count, device=first.device), crops.heights[:, None] - 1)
    starts = (crops.starts[:, None] + needed * crops.widths[:, None])[:, :, None]
    lines = unpack(take(pixels, starts + left[:, None])).mul_(left_weight[:, None, None])
    lines += unpack(take(pixels, starts + right[:, None])).mul_(right_weight[:, None, None])
    lines.bitwise_right_shift_(4)

    def weighted(row, weight):
        index = row - first
        chosen = (lines.index_select(2, index[0]) if len(lines) == 1 else
                  lines.gather(2, index[:, None, :, None].expand(-1, 3, -1, lines.shape[3])))
        return chosen.mul_(weight[:, None, :, None]).bitwise_right_shift_(16)

    return weighted(above, above_weight).add_(weighted(below, below_weight)).add_(2).bitwise_right_shift_(2)


def resize_image(image: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """uint8 [H, W, 3] -> uint8 [3, height, width], bilinear, on the image's device."""
    device = image.device
    padded = torch.cat([image, image.new_zeros(*image.shape[:2], 1)], dim=2)
    sizes = torch.tensor([0, *image.shape[:2], height, width], device=device)
    rows, columns = torch.arange(height, device=device)[None], torch.arange(width, device=device)[None]
    return resized_pixels(padded.view(torch.int32).flatten(), Crops(*sizes[:, None], rows, columns))[0].to(torch.uint8)


def accept_crops(labels: torch.Tensor, max_share: float = 0.75) -> torch.Tensor:
    """uint8 [B, h, w] -> bool [B]: more than one class, the largest on less than max_share of the labelled pixels."""
    count = len(labels)
    bins = labels.flatten(1).int().add_(256 * torch.arange(count, dtype=torch.int32, device=labels.device)[:, None])
    # Not bincount, in which the host waits for a GPU twice.
    counts = torch.zeros(256 * count, dtype=torch.int32, device=labels.device)
    counts.index_add_(0, bins.flatten(), torch.ones_like(counts[:1]).expand(bins.numel()))
    counts = counts.view(count, 256)[:, :IGNORE]
    return (counts.count_nonzero(1) > 1) & (counts.amax(1) < max_share * counts.sum(1))


def choose_crops(cut, offsets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The first crop that is accepted; after ten failures the eleventh, unchecked: its index int64 [B] and its labels
    [B, h, w]. cut: maps sample numbers [n] and their offsets [n, 2] to labels [n, h, w]. offsets: [B, 11, 2]."""
    samples, unchecked = torch.arange(len(offsets), device=offsets.device), offsets.shape[1] - 1
    chosen, labels = torch.zeros_like(samples), cut(samples, offsets[:, 0])
    redrawn = samples[~accept_crops(labels)]
    if len(redrawn):
        # All further crops are judged together: the host waits for a GPU once in a batch and not after every draw.
        numbers = torch.arange(1, unchecked, device=offsets.device)
        further = offsets[redrawn, 1:unchecked].flatten(0, 1)
        accepted = accept_crops(cut(redrawn.repeat_interleave(len(numbers)), further)).view(len(redrawn), -1)
        chosen[redrawn] = torch.where(accepted, numbers, unchecked).amin(1)
        labels[redrawn] = cut(redrawn, offsets[redrawn, chosen[redrawn]])
    return chosen, labels


def choose_crop_region(batch: Packed, augmentations: list[Augmentation], out_sizes: list[tuple[int, int]],
                       crop_size: tuple[int, int]) -> tuple[Crops, torch.Tensor]:
    """Resize, random crop and flip: the source of each pixel of the crops, and their labels uint8 [B, h, w], 255
    outside the image. out_sizes: of the resized images."""
    device, room = batch.pixels.device, np.maximum(np.subtract(out_sizes, crop_size), 0) + 1
    offsets = (np.stack([one.offsets for one in augmentations]) * room[:, None]).astype(np.int64)
    flips = [[one.flip] for one in augmentations]
    # All parameters in one transfer to the device.
    numbers = to_device(torch.from_numpy(np.hstack([out_sizes, flips, offsets.reshape(len(flips), -1)])), device)
    sizes, flip, offsets = (*batch[1:], *numbers[:, :2].T), numbers[:, 2:3].bool(), numbers[:, 3:].unflatten(1, (-1, 2))

    def crops_at(samples, offset):
        *source, out_heights, out_widths = (size[samples] for size in sizes)
        # Where an image is smaller than the crop its edge is repeated, which costs resized_pixels no source rows.
        rows, columns = (torch.minimum(torch.arange(side, device=device), size[:, None] - 1)
                         for side, size in zip(crop_size, (out_heights, out_widths), strict=True))
        columns = torch.where(flip[samples], columns[:, -1:] - columns, columns)
        return Crops(*source, out_heights, out_widths, offset[:, :1] + rows, offset[:, 1:] + columns)

    def cut(samples, offset):
        crops = crops_at(samples, offset)
        return resized_labels(batch.pixels, crops).masked_fill_(~crops.inside(), IGNORE)

    chosen, labels = choose_crops(cut, offsets)
    samples = torch.arange(len(chosen), device=device)
    return crops_at(samples, offsets[samples, chosen]), labels


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on the device; a copy to CUDA does not block the host."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


@cache
def colour_tables(device: torch.device) -> tuple[torch.Tensor, ...]:
    """int32 [256] and [256], round(255 * 4096 / i) and round(30 * 4096 / i) with 0 for 0; and float32 [3, 180 * 256]:
    red, green and blue at value 1, by hue and saturation."""
    quotients = [torch.tensor([0, *(round(numerator / i) for i in range(1, 256))], dtype=torch.int32)
                 for numerator in (255 * 4096, 30 * 4096)]
    hue = torch.arange(180, dtype=torch.float32)[:, None] * torch.tensor(6 / 180, dtype=torch.float32)
    saturation = torch.arange(256, dtype=torch.float32) * torch.tensor(1 / 255, dtype=torch.float32)
    sector = hue.floor().long()
    fraction = hue - sector
    # float64 gives the single rounding of a fused multiply-add.
    falling = (1 - saturation.double() * fraction.double()).float()
    rising = (1 - saturation.double() * (1 - fraction).double()).float()
    low, full = (1 - saturation).expand(180, 256), torch.ones(180, 256)
    by_sector = torch.stack([torch.stack(colours) for colours in (
        (full, rising, low), (falling, full, low), (low, full, rising),
        (low, falling, full), (rising, low, full), (full, low, falling))])
    factors = by_sector.gather(0, sector.view(1, 1, 180, 1).expand(1, 3, 180, 256)).view(3, -1)
    return tuple(table.to(device) for table in (*quotients, factors))


def rgb_to_hsv(rgb: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """int32 [B, 3, H, W], 0 to 255 -> hue 0 to 179, saturation and value 0 to 255, int32 [B, H, W] (OpenCV, 8 bits)."""
    per_value, per_spread, _ = colour_tables(rgb.device)
    red, green, blue = rgb.unbind(1)
    value = torch.maximum(torch.maximum(red, green), blue)
    spread = value - torch.minimum(torch.minimum(red, green), blue)
    saturation = take(per_value, value).mul_(spread).add_(2048).bitwise_right_shift_(12)
    if_green, if_blue = (blue - red).add_(spread, alpha=2), (red - green).add_(spread, alpha=4)
    numerator = torch.where(value == red, green - blue, torch.where(value == green, if_green, if_blue))
    hue = numerator.mul_(take(per_spread, spread)).add_(2048).bitwise_right_shift_(12)
    return hue.remainder_(180), saturation, value


def hsv_to_rgb(hue: torch.Tensor, saturation: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """int32 [B, H, W] each, ranges as in rgb_to_hsv -> int32 [B, 3, H, W] (OpenCV, 8 bits, fractions dropped)."""
    index = (hue * 256).add_(saturation)
    scaled = value.float().mul_(torch.tensor(1 / 255, dtype=torch.float32))
    colours = torch.empty(len(hue), 3, *hue.shape[1:], dtype=torch.int32, device=hue.device)
    for channel, factors in enumerate(colour_tables(hue.device)[2]):
        colours[:, channel] = take(factors, index).mul_(scaled).mul_(255)
    return colours


def photometric_distortion(images: torch.Tensor, augmentations: list[Augmentation]) -> torch.Tensor:
    """Brightness, contrast (first or last), saturation, hue, each clipped and cut to 8 bits: int32 [B, 3, H, W]."""
    def per_sample(values):
        return to_device(torch.tensor(values, dtype=torch.float32), images.device).view(-1, 1, 1, 1)

    def cut(values):
        return values.clamp_(0, 255).int()

    def contrast(images, first):
        factors = [one.contrast if one.contrast_first == first else 1.0 for one in augmentations]
        return images if set(factors) == {1.0} else cut(images * per_sample(factors))

    if any(one.brightness for one in augmentations):
        images = cut(images.float() + per_sample([one.brightness for one in augmentations]))
    images = contrast(images, first=True)
    for name in ("saturation", "hue"):
        chosen = [i for i, one in enumerate(augmentations) if getattr(one, name) is not None]
        if not chosen:
            continue
        amount = per_sample([getattr(augmentations[i], name) for i in chosen])[:, 0]
        index = to_device(torch.tensor(chosen), images.device)
        hue, saturation, value = rgb_to_hsv(images[index])
        if name == "saturation":
            saturation = cut(saturation * amount)
        else:
            hue = hue.add_(amount.int()).remainder_(180)
        images = images.index_copy_(0, index, hsv_to_rgb(hue, saturation, value))
    return contrast(images, first=False)


def training_batch(batch: Packed, sizes: list[tuple[int, int]], augmentations: list[Augmentation],
                   base_scale: tuple[int, int], crop_size: int, mean: torch.Tensor, std: torch.Tensor) -> tuple:
    """All training transforms: images float32 [B, 3, c, c], padded with 0, and labels uint8 [B, c, c], padded with 255.

    sizes: (height, width) of the original images, which determine the resized ones. mean, std: [1, 3, 1, 1], of colours
    from 0 to 1. A CPU computes sample by sample, twice as fast as a batch, for its caches; others the whole batch.
    """
    scales = [tuple(int(side * one.ratio) for side in base_scale) for one in augmentations]
    out_sizes = [rescale_size(*size, scale) for size, scale in zip(sizes, scales, strict=True)]
    crops, labels = choose_crop_region(batch, augmentations, out_sizes, (crop_size, crop_size))
    samples = 1 if labels.device.type == "cpu" else len(sizes)
    images = torch.empty(len(sizes), 3, crop_size, crop_size, device=labels.device)
    for i in range(0, len(sizes), samples):
        part = slice(i, i + samples)
        colours = resized_pixels(batch.pixels, Crops(*(field[part] for field in crops)))
        images[part] = photometric_distortion(colours, augmentations[part])
    images.sub_(255 * mean).mul_(1 / (255 * std))
    if any(min(size) < crop_size for size in out_sizes):
        images *= crops.inside()[:, None]
    return images, labels
