"""The head of linear segmentation, one 1 x 1 convolution, and its loss at full resolution, strip by strip."""

from collections.abc import Callable, Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F

# Of a strip's logits.
STRIP_BYTES = {"cpu": 16 << 20, "cuda": 512 << 20}


class LinearHead(nn.Conv2d):
    """1 x 1 convolution over concatenated block features; weights N(0, 0.01), bias 0 (the authors' linear head)."""

    def __init__(self, in_channels: int, num_classes: int, generator: torch.Generator | None = None):
        super().__init__(in_channels, num_classes, 1)
        nn.init.normal_(self.weight, std=0.01, generator=generator)
        nn.init.zeros_(self.bias)

    def forward(self, blocks: Sequence[torch.Tensor]) -> torch.Tensor:
        """List of [B, D, h, w] -> logits [B, K, h, w], float32 also under autocast."""
        with torch.autocast(blocks[0].device.type, enabled=False):
            # cat turns the encoder's inference tensors into an ordinary tensor, which training needs. The product is a
            # linear layer's: cudnn's convolutions have TF32 of their own, and blocks are views of tokens [B, h w, D].
            tokens = torch.cat([block.movedim(1, -1) for block in blocks], dim=-1).float()
            return F.linear(tokens, self.weight.flatten(1), self.bias).movedim(-1, 1)


class PatchSegmenter(nn.Module):
    """Frozen encoder, and logits of its patches: normalised images [B, 3, h, w] -> [B, K, h, w], any h and w.

    Subclasses have patch_logits: [B, 3, h, w], divisible by the patch size -> [B, K, h/p, w/p].
    """

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.encoder = encoder

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        (height, width), patch = images.shape[2:], self.encoder.patch_size
        # As training pads: zeros, after normalisation, to the right and below.
        padded = F.pad(images, (0, -width % patch, 0, -height % patch))
        logits = F.interpolate(self.patch_logits(padded), size=padded.shape[2:], mode="bilinear", align_corners=False)
        return logits[:, :, :height, :width]


def upsampled_cross_entropy(logits: torch.Tensor, label: torch.Tensor, ignore_index: int = 255,
                            total_pixels: int | None = None, dtype: torch.dtype = torch.float32,
                            strip: Callable | None = None) -> torch.Tensor:
    """Cross-entropy of logits upsampled bilinearly (align_corners False) to the label's size.

    logits: float32 [B, K, h, w]; label: uint8 [B, H, W], each below K or ignore_index. dtype: of the upsampled logits;
    sums are float32. strip: torch.compile of strip_loss_and_gradient, in place of it. Returns the sum over the labelled
    pixels divided by total_pixels, by default all of them, ignored ones included (as mmsegmentation does).
    """
    return _UpsampledCrossEntropy.apply(logits, label, ignore_index, total_pixels or label.numel(), dtype,
                                        strip or strip_loss_and_gradient)


class _UpsampledCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, label, ignore_index, total_pixels, dtype, strip):
        classes, (height, width) = logits.shape[1], label.shape[1:]
        down = interpolation_matrix(height, logits.shape[2], logits.device).to(dtype)
        across = interpolation_matrix(width, logits.shape[3], logits.device).to(dtype)
        rows = max(1, STRIP_BYTES[logits.device.type] // (dtype.itemsize * classes * width))
        loss, gradient = logits.new_zeros(()), torch.zeros_like(logits)
        for image, target, image_gradient in zip(logits.to(dtype), label, gradient, strict=True):
            wide = image @ across.T
            for start in range(0, height, rows):
                there = slice(start, start + rows)
                strip_loss, strip_gradient = strip(wide, target[there], down[there], across, ignore_index)
                loss += strip_loss
                image_gradient += strip_gradient
        ctx.save_for_backward(gradient.div_(total_pixels))
        return loss / total_pixels

    @staticmethod
    def backward(ctx, grad_loss):
        return ctx.saved_tensors[0] * grad_loss, None, None, None, None, None


def interpolation_matrix(out_size: int, in_size: int, device: torch.device) -> torch.Tensor:
    """Bilinear interpolation (align_corners False) along one axis as a float32 matrix [out_size, in_size]."""
    return F.interpolate(torch.eye(in_size, device=device)[None, None], size=(out_size, in_size), mode="bilinear")[0, 0]


def strip_loss_and_gradient(wide: torch.Tensor, target: torch.Tensor, down: torch.Tensor, across: torch.Tensor,
                            ignore_index: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed cross-entropy of some rows of an image, and its gradient with respect to the image's logits X [K, h, w].

    Interpolation is a matrix A vertically (down: its rows [r, h]) and C horizontally (across [W, w]): the upsampled
    logits are A X C^T, the gradient is A^T G C. wide: X C^T, [K, h, W]; target: labels [r, W].
    """
    index = target[None].long()
    valid = index != ignore_index
    index = index.masked_fill(~valid, 0)
    # [K, r, W]: the logits, converted in place to the gradient.
    strip = down @ wide
    loss_of_pixel = -strip.gather(0, index).float()
    peak = strip.amax(0, keepdim=True)
    strip.sub_(peak).exp_()
    total = strip.sum(0, keepdim=True, dtype=torch.float32)
    loss = (loss_of_pixel.add_(peak).add_(total.log()) * valid).sum()
    strip.mul_((valid / total).to(strip.dtype)).scatter_add_(0, index, -valid.to(strip.dtype))
    return loss, down.T @ (strip @ across)
