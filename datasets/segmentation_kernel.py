"""The colours of a training batch by one GPU kernel: resize, photometric distortion, normalisation and padding of
segmentation_transforms.py, to the bit, with every pixel read and written once instead of some sixty times."""

import shutil
from collections.abc import Sequence

import torch

try:
    if not any(map(shutil.which, ("cc", "gcc", "clang"))):
        raise ImportError("Triton needs a C compiler")
    import triton
    import triton.language as tl
except ImportError:  # builds of PyTorch without CUDA, machines without compiler: the plain way
    triton = None


def render_crops(pixels: torch.Tensor, starts: torch.Tensor, widths: torch.Tensor, rows: Sequence[torch.Tensor],
                 columns: Sequence[torch.Tensor], inside_rows: torch.Tensor, inside_columns: torch.Tensor,
                 distortions: torch.Tensor, tables: Sequence[torch.Tensor], mean: torch.Tensor,
                 std: torch.Tensor) -> torch.Tensor:
    """float32 [B, 3, h, w]. pixels: int32 [P]; starts, widths: int64 [B]; rows, columns: Taps of [B, h] and [B, w];
    inside_*: bool, same sizes; distortions: float32 [B, 7], brightness, contrast first, saturation and whether it is
    applied, hue and whether it is, contrast last; tables: colour_tables(); mean, std: [1, 3, 1, 1]."""
    batch, height = rows[0].shape
    width = columns[0].shape[1]
    out = torch.empty(batch, 3, height, width, device=pixels.device)
    block = 512
    _render_kernel[(triton.cdiv(height * width, block), batch)](
        pixels, *(tensor.contiguous() for tensor in (starts, widths, *rows, *columns, inside_rows, inside_columns,
                                                     distortions, *tables)),
        (255 * mean).flatten(), (1 / (255 * std)).flatten(), out, height, width, BLOCK=block, num_warps=4)
    return out


if triton is not None:
    @triton.jit
    def _cut(value):
        return tl.minimum(tl.maximum(value, 0.0), 255.0).to(tl.int32)

    @triton.jit
    def _mixed(top_left, top_right, bottom_left, bottom_right, left, right, top, bottom, SHIFT: tl.constexpr):
        above = (((top_left >> SHIFT) & 255) * left + ((top_right >> SHIFT) & 255) * right) >> 4
        below = (((bottom_left >> SHIFT) & 255) * left + ((bottom_right >> SHIFT) & 255) * right) >> 4
        return (((above * top) >> 16) + ((below * bottom) >> 16) + 2) >> 2

    @triton.jit
    def _through_hsv(red, green, blue, factor, shift, per_value, per_spread, factors):
        value = tl.maximum(tl.maximum(red, green), blue)
        spread = value - tl.minimum(tl.minimum(red, green), blue)
        saturation = (spread * tl.load(per_value + value) + 2048) >> 12
        numerator = tl.where(value == red, green - blue,
                             tl.where(value == green, blue - red + 2 * spread, red - green + 4 * spread))
        hue = (numerator * tl.load(per_spread + spread) + 2048) >> 12
        hue = tl.where(hue < 0, hue + 180, hue) + shift.to(tl.int32)
        hue = tl.where(hue < 0, hue + 180, tl.where(hue >= 180, hue - 180, hue))
        index = hue * 256 + _cut(saturation.to(tl.float32) * factor)
        scaled = value.to(tl.float32) * 0.00392156862745098
        red = (tl.load(factors + index) * scaled * 255.0).to(tl.int32)
        green = (tl.load(factors + 46080 + index) * scaled * 255.0).to(tl.int32)
        blue = (tl.load(factors + 92160 + index) * scaled * 255.0).to(tl.int32)
        return red, green, blue

    @triton.jit
    def _render_kernel(pixels, starts, widths, row_lower, row_upper, row_lower_weight, row_upper_weight,
                       column_lower, column_upper, column_lower_weight, column_upper_weight,
                       inside_rows, inside_columns, distortions, per_value, per_spread, factors, means, inverse_stds,
                       out, height, width, BLOCK: tl.constexpr):
        sample = tl.program_id(1)
        place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        real = place < height * width
        row, column = sample * height + place // width, sample * width + place % width
        start, source_width = tl.load(starts + sample), tl.load(widths + sample)
        above = pixels + start + tl.load(row_lower + row, mask=real, other=0) * source_width
        below = pixels + start + tl.load(row_upper + row, mask=real, other=0) * source_width
        before = tl.load(column_lower + column, mask=real, other=0)
        after = tl.load(column_upper + column, mask=real, other=0)
        top_left, top_right = tl.load(above + before, mask=real, other=0), tl.load(above + after, mask=real, other=0)
        bottom_left = tl.load(below + before, mask=real, other=0)
        bottom_right = tl.load(below + after, mask=real, other=0)
        left = tl.load(column_lower_weight + column, mask=real, other=0)
        right = tl.load(column_upper_weight + column, mask=real, other=0)
        top = tl.load(row_lower_weight + row, mask=real, other=0)
        bottom = tl.load(row_upper_weight + row, mask=real, other=0)
        red = _mixed(top_left, top_right, bottom_left, bottom_right, left, right, top, bottom, 0)
        green = _mixed(top_left, top_right, bottom_left, bottom_right, left, right, top, bottom, 8)
        blue = _mixed(top_left, top_right, bottom_left, bottom_right, left, right, top, bottom, 16)

        # A neutral brightness or contrast changes nothing.
        distortion = distortions + sample * 7
        brightness, contrast_first = tl.load(distortion), tl.load(distortion + 1)
        red = _cut(_cut(red.to(tl.float32) + brightness).to(tl.float32) * contrast_first)
        green = _cut(_cut(green.to(tl.float32) + brightness).to(tl.float32) * contrast_first)
        blue = _cut(_cut(blue.to(tl.float32) + brightness).to(tl.float32) * contrast_first)
        if tl.load(distortion + 3) > 0:
            red, green, blue = _through_hsv(red, green, blue, tl.load(distortion + 2), 0.0 * brightness,
                                            per_value, per_spread, factors)
        if tl.load(distortion + 5) > 0:
            red, green, blue = _through_hsv(red, green, blue, 1.0, tl.load(distortion + 4),
                                            per_value, per_spread, factors)
        contrast_last = tl.load(distortion + 6)
        inside = tl.load(inside_rows + row, mask=real, other=0) & tl.load(inside_columns + column, mask=real, other=0)
        inside = inside != 0
        to = out + sample.to(tl.int64) * 3 * height * width + place
        red = _cut(red.to(tl.float32) * contrast_last).to(tl.float32)
        green = _cut(green.to(tl.float32) * contrast_last).to(tl.float32)
        blue = _cut(blue.to(tl.float32) * contrast_last).to(tl.float32)
        red = (red - tl.load(means)) * tl.load(inverse_stds)
        green = (green - tl.load(means + 1)) * tl.load(inverse_stds + 1)
        blue = (blue - tl.load(means + 2)) * tl.load(inverse_stds + 2)
        tl.store(to, tl.where(inside, red, 0.0), mask=real)
        tl.store(to + height * width, tl.where(inside, green, 0.0), mask=real)
        tl.store(to + 2 * height * width, tl.where(inside, blue, 0.0), mask=real)
