"""The loss of segmentation_head.py and its gradient in one Triton kernel that never writes the upsampled logits.

Optional: without this file or Triton, strip_loss_and_gradient of segmentation_head.py runs. Bounds for an H200 (16
crops of 512 x 512, 209 classes), counted and not measured: the code compiled for sm_90 takes 17,424 cells x 128 turns
of its loop x 630 = 1.4e9 warp instructions, 1.5 ms at 4 x 132 a clock of 1.76 GHz. The upsampled logits in float32 are
3.5 GB; the strips read or write as much ten times, 7.7 ms at 4.8 TB/s, and what torch.compile could fuse five times,
3.6 ms.
"""

import shutil
import warnings
from functools import cache

import torch

from .segmentation_head import strip_loss_and_gradient

try:
    if not any(map(shutil.which, ("cc", "gcc", "clang"))):
        raise ImportError("Triton needs a C compiler")
    import triton
    import triton.language as tl
except ImportError:  # PyTorch built without CUDA, or no compiler
    triton = None


def can_fuse(logits: torch.Tensor, label: torch.Tensor) -> bool:
    """Whether the kernel can be used for logits [B, K, h, w] and label [B, H, W] on their device."""
    scale, rest = divmod(label.shape[1], logits.shape[2])
    return (triton is not None and logits.is_cuda and rest == 0 and scale % 2 == 0
            and label.shape[2] == scale * logits.shape[3] and logits.shape[1] <= 512
            and kernel_is_right(logits.device))


@cache
def kernel_is_right(device: torch.device) -> bool:
    """Whether the kernel compiles on this device and agrees with strip_loss_and_gradient on a small example (a wrong
    loss would not show in training). Warns where it does not."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, 3, 4, generator=generator).to(device)
    label = torch.randint(0, 6, (2, 12, 16), generator=generator, dtype=torch.uint8).to(device)
    plain = strip_loss_and_gradient(logits, label, 5)
    try:
        fused = fused_loss_and_gradient(logits, label, 5)
        if all(torch.allclose(a, b, rtol=1e-3, atol=1e-3) for a, b in zip(fused, plain, strict=True)):
            return True
        reason = "it disagrees with the loss in strips"
    except Exception as error:  # of Triton, its compiler or the driver
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    warnings.warn(f"the fused loss kernel cannot be used on {device} ({reason}); using the slower loss in strips",
                  stacklevel=2)
    return False


def fused_loss_and_gradient(logits: torch.Tensor, label: torch.Tensor, ignore_index: int) -> tuple:
    """The summed loss and gradient of strip_loss_and_gradient; the label's size is an even multiple of the logits'.

    A cell is the pixels between four neighbouring logit vectors, of which each pixel is a weighted mean. One program
    per cell computes its pixels' logits in registers and writes a gradient [K] for each of the four; these are added
    afterwards in a fixed order, so the result is deterministic.
    """
    batch, classes, height, width = logits.shape
    scale = label.shape[1] // height
    cells = (batch, height + 1, width + 1)
    losses = torch.empty(cells, device=logits.device)
    corners = torch.empty(*cells, 2, 2, classes, device=logits.device)
    vectors = logits.permute(0, 2, 3, 1).contiguous()
    # One warp adds up without barriers. 512 logits at a time: at 256 classes 143 registers, at 512 168, none spilled.
    block = triton.next_power_of_2(classes)
    _cell_kernel[(losses.numel(),)](
        vectors, label.contiguous(), losses, corners, height, width, classes, ignore_index,
        SCALE=scale, CLASSES=block, PIXELS=min(16, 512 // block), num_warps=1)
    # Outside the image the neighbour is the edge itself.
    gradient = logits.new_zeros(batch, height + 2, width + 2, classes)
    for down, right in ((0, 0), (0, 1), (1, 0), (1, 1)):
        gradient[:, down:down + height + 1, right:right + width + 1] += corners[:, :, :, down, right]
    for axis, last in ((1, height), (2, width)):
        gradient.select(axis, 1).add_(gradient.select(axis, 0))
        gradient.select(axis, last).add_(gradient.select(axis, last + 1))
    return losses.sum(), gradient[:, 1:-1, 1:-1].contiguous().permute(0, 3, 1, 2)


if triton is not None:
    @triton.jit
    def _cell_kernel(logits, labels, losses, corners, height, width, classes, ignore_index,
                     SCALE: tl.constexpr, CLASSES: tl.constexpr, PIXELS: tl.constexpr):
        program = tl.program_id(0)
        cell_x = program % (width + 1)
        cell_y = program // (width + 1) % (height + 1)
        image = program // ((width + 1) * (height + 1))
        k = tl.arange(0, CLASSES)
        real = k < classes
        # The four neighbours, [K] each.
        above, below = tl.maximum(cell_y - 1, 0), tl.minimum(cell_y, height - 1)
        before, after = tl.maximum(cell_x - 1, 0), tl.minimum(cell_x, width - 1)
        image_logits = logits + image * height * width * classes + k
        row_above, row_below = above * width, below * width
        l00 = tl.load(image_logits + (row_above + before) * classes, mask=real, other=0.0)
        l01 = tl.load(image_logits + (row_above + after) * classes, mask=real, other=0.0)
        l10 = tl.load(image_logits + (row_below + before) * classes, mask=real, other=0.0)
        l11 = tl.load(image_logits + (row_below + after) * classes, mask=real, other=0.0)
        g00 = tl.zeros([CLASSES], tl.float32)
        g01 = tl.zeros([CLASSES], tl.float32)
        g10 = tl.zeros([CLASSES], tl.float32)
        g11 = tl.zeros([CLASSES], tl.float32)
        loss = tl.zeros([PIXELS], tl.float32)
        for first in range(0, SCALE * SCALE, PIXELS):
            pixel = first + tl.arange(0, PIXELS)
            row, column = pixel // SCALE, pixel % SCALE
            y, x = cell_y * SCALE - SCALE // 2 + row, cell_x * SCALE - SCALE // 2 + column
            inside = (pixel < SCALE * SCALE) & (y >= 0) & (y < height * SCALE) & (x >= 0) & (x < width * SCALE)
            position = (image * height * SCALE + y) * width * SCALE + x
            target = tl.load(labels + position, mask=inside, other=ignore_index).to(tl.int32)
            valid = inside & (target != ignore_index)
            down, right = (row + 0.5) / SCALE, (column + 0.5) / SCALE
            w00, w01 = (1 - down) * (1 - right), (1 - down) * right
            w10, w11 = down * (1 - right), down * right
            mixed = (w00[:, None] * l00[None, :] + w01[:, None] * l01[None, :]
                     + w10[:, None] * l10[None, :] + w11[:, None] * l11[None, :])
            mixed = tl.where(real[None, :], mixed, float("-inf"))
            peak = tl.max(mixed, 1)
            is_target = k[None, :] == target[:, None]
            at_target = tl.sum(tl.where(is_target, mixed, 0.0), 1)
            share = tl.exp(mixed - peak[:, None])
            total = tl.sum(share, 1)
            loss += tl.where(valid, peak + tl.log(total) - at_target, 0.0)
            slope = tl.where(valid[:, None], share / total[:, None] - is_target.to(tl.float32), 0.0)
            g00 += tl.sum(w00[:, None] * slope, 0)
            g01 += tl.sum(w01[:, None] * slope, 0)
            g10 += tl.sum(w10[:, None] * slope, 0)
            g11 += tl.sum(w11[:, None] * slope, 0)
        tl.store(losses + program, tl.sum(loss, 0))
        # Many crops of many classes exceed 2^31 elements.
        cell_corners = corners + program.to(tl.int64) * 4 * classes + k
        tl.store(cell_corners, g00, mask=real)
        tl.store(cell_corners + classes, g01, mask=real)
        tl.store(cell_corners + 2 * classes, g10, mask=real)
        tl.store(cell_corners + 3 * classes, g11, mask=real)
