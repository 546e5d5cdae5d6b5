"""The head of linear segmentation, one 1 x 1 convolution, and its loss at full resolution without the full-resolution
logits: at 209 classes and 16 crops of 512 x 512 these are 3.5 GB in float32, and reading and writing them several times
costs more than the encoder."""

import shutil
import warnings
from collections.abc import Sequence
from functools import cache

import torch
import torch.nn as nn
import torch.nn.functional as F

try:
    if not any(map(shutil.which, ("cc", "gcc", "clang"))):
        raise ImportError("Triton needs a C compiler")
    import triton
    import triton.language as tl
except ImportError:  # builds of PyTorch without CUDA, machines without compiler: the plain way
    triton = None

STRIP_BYTES = {"cpu": 16 << 20, "cuda": 512 << 20}


class LinearHead(nn.Conv2d):
    """1 x 1 convolution over concatenated block features; weights N(0, 0.01), bias 0 (the authors' linear head)."""

    def __init__(self, in_channels: int, num_classes: int, generator: torch.Generator | None = None):
        super().__init__(in_channels, num_classes, 1)
        nn.init.normal_(self.weight, std=0.01, generator=generator)
        nn.init.zeros_(self.bias)

    def forward(self, blocks: Sequence[torch.Tensor]) -> torch.Tensor:
        """List of [B, D, h, w] -> logits float32 [B, K, h, w]. Always in float32: it costs little."""
        with torch.autocast(blocks[0].device.type, enabled=False):
            # Outside inference mode cat makes an ordinary tensor of the encoder's inference tensors.
            return super().forward(torch.cat(list(blocks), dim=1).float())


def upsampled_cross_entropy(logits: torch.Tensor, label: torch.Tensor, ignore_index: int = 255,
                            total_pixels: int | None = None) -> torch.Tensor:
    """Cross-entropy of logits, upsampled bilinearly (align_corners False) to the label's size.

    logits: float32 [B, K, h, w]; label: uint8 [B, H, W], each below K or ignore_index. Returns the sum over the
    labelled pixels divided by total_pixels, by default all of them, ignored ones included (as mmsegmentation does).
    Memory beside the arguments: fused, five numbers per logit; else twice the logits and two strips of STRIP_BYTES.
    """
    return _UpsampledCrossEntropy.apply(logits, label, ignore_index, total_pixels or label.numel())


class _UpsampledCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, label, ignore_index, total_pixels):
        loss_and_gradient = fused_loss_and_gradient if _can_fuse(logits, label) else strip_loss_and_gradient
        loss, gradient = loss_and_gradient(logits, label, ignore_index)
        ctx.save_for_backward(gradient.div_(total_pixels))
        return loss / total_pixels

    @staticmethod
    def backward(ctx, grad_loss):
        return ctx.saved_tensors[0] * grad_loss, None, None, None


def interpolation_matrix(out_size: int, in_size: int, device: torch.device) -> torch.Tensor:
    """Bilinear interpolation (align_corners False) along one axis as a float32 matrix [out_size, in_size]."""
    return F.interpolate(torch.eye(in_size, device=device)[None, None], size=(out_size, in_size), mode="bilinear")[0, 0]


def strip_loss_and_gradient(logits: torch.Tensor, label: torch.Tensor, ignore_index: int) -> tuple:
    """Summed cross-entropy (scalar) and its gradient with respect to logits [B, K, h, w], strip by strip of rows.

    Interpolation down is a matrix A, across C: strip = A_rows (logits C^T); and back, gradient = A^T G C.
    """
    classes, (height, width) = logits.shape[1], label.shape[1:]
    down = interpolation_matrix(height, logits.shape[2], logits.device)
    across = interpolation_matrix(width, logits.shape[3], logits.device)
    rows = max(1, STRIP_BYTES[logits.device.type] // (4 * classes * width))
    loss, gradient = logits.new_zeros(()), torch.zeros_like(logits)
    for image, target, image_gradient in zip(logits, label, gradient, strict=True):
        wide = image @ across.T
        for start in range(0, height, rows):
            weights = down[start:start + rows]
            index = target[None, start:start + rows].long()
            valid = index != ignore_index
            index = index.masked_fill(~valid, 0)
            # [K, rows, width], turned in place from logits into the gradient.
            strip = weights @ wide
            loss_of_pixel = -strip.gather(0, index)
            peak = strip.amax(0, keepdim=True)
            strip.sub_(peak).exp_()
            total = strip.sum(0, keepdim=True)
            loss += (loss_of_pixel.add_(peak).add_(total.log()) * valid).sum()
            strip.mul_(valid / total).scatter_add_(0, index, -valid.float())
            image_gradient += weights.T @ (strip @ across)
    return loss, gradient


def _can_fuse(logits: torch.Tensor, label: torch.Tensor) -> bool:
    scale, rest = divmod(label.shape[1], logits.shape[2])
    return (triton is not None and logits.is_cuda and rest == 0 and scale % 2 == 0
            and label.shape[2] == scale * logits.shape[3] and logits.shape[1] <= 1024
            and kernel_is_right(logits.device))


@cache
def kernel_is_right(device: torch.device) -> bool:
    """Whether the kernel compiles on this device and gives what the plain way gives; asked once, on a small example,
    because a wrong loss would not show in training. Warns where it does not."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, 3, 4, generator=generator).to(device)
    label = torch.randint(0, 6, (2, 12, 16), generator=generator, dtype=torch.uint8).to(device)
    plain = strip_loss_and_gradient(logits, label, 5)
    try:
        fused = fused_loss_and_gradient(logits, label, 5)
        if all(torch.allclose(a, b, rtol=1e-3, atol=1e-3) for a, b in zip(fused, plain, strict=True)):
            return True
        reason = "it disagrees with the plain way"
    except Exception as error:  # of Triton, its compiler or the driver
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    warnings.warn(f"the fused loss kernel cannot be used on {device} ({reason}); the plain way is slower", stacklevel=2)
    return False


def fused_loss_and_gradient(logits: torch.Tensor, label: torch.Tensor, ignore_index: int) -> tuple:
    """What strip_loss_and_gradient returns, by one kernel that never writes the upsampled logits.

    The label is an even multiple of the logits' size. The pixels between four neighbouring logit vectors, a cell, are
    weighted means of these four: a program takes one cell, makes its pixels' logits in registers, and writes four rows
    of gradient [K], one for each neighbour, which are added up afterwards in a fixed order: deterministic.
    """
    batch, classes, height, width = logits.shape
    scale = label.shape[1] // height
    cells = (batch, height + 1, width + 1)
    losses = torch.empty(cells, device=logits.device)
    corners = torch.empty(*cells, 2, 2, classes, device=logits.device)
    vectors = logits.permute(0, 2, 3, 1).contiguous()
    # 2,048 logits at a time over 128 threads: 128 registers at 256 classes and none spilled (ptxas for sm_90).
    block = triton.next_power_of_2(classes)
    _cell_kernel[(losses.numel(),)](
        vectors, label.contiguous(), losses, corners, height, width, classes, ignore_index,
        SCALE=scale, CLASSES=block, PIXELS=min(64, 2048 // block), num_warps=4)
    # Beyond the edge the neighbour is the edge itself.
    gradient = logits.new_zeros(batch, height + 2, width + 2, classes)
    for down in range(2):
        for right in range(2):
            gradient[:, down:down + height + 1, right:right + width + 1] += corners[:, :, :, down, right]
    gradient[:, 1] += gradient[:, 0]
    gradient[:, height] += gradient[:, height + 1]
    gradient[:, :, 1] += gradient[:, :, 0]
    gradient[:, :, width] += gradient[:, :, width + 1]
    return losses.sum(), gradient[:, 1:-1, 1:-1].permute(0, 3, 1, 2).contiguous()


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
            place = (image * height * SCALE + y) * width * SCALE + x
            target = tl.load(labels + place, mask=inside, other=ignore_index).to(tl.int32)
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
        # 16 crops at 1,024 classes pass 2^31 numbers.
        cell_corners = corners + program.to(tl.int64) * 4 * classes + k
        tl.store(cell_corners, g00, mask=real)
        tl.store(cell_corners + classes, g01, mask=real)
        tl.store(cell_corners + 2 * classes, g10, mask=real)
        tl.store(cell_corners + 3 * classes, g11, mask=real)
