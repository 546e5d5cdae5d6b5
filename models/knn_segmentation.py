"""Dense nearest-neighbour segmentation (Balazevic et al. 2023, arXiv 2306.01667), without training: the labels of a
patch are mixed from those of the most similar patches of the training images.
"""

from collections.abc import Callable, Iterable

import numpy as np
import torch
import torch.nn.functional as F

from utils import UserError
from utils.distributed import gather_rows, shard
from utils.run import DTYPES, Progress, autocast

from .encoder import Encoder
from .segmentation_head import PatchSegmenter

NEIGHBOURS, TEMPERATURE = 30, 0.02
# Queries and rows of the memory in one matrix product.
CHUNK = {"cuda": (16384, 16384), "cpu": (256, 16384)}
# Keeps the random numbers of this choice apart from others drawn from the same seed.
CHOICE = 0x6B6E6E


class KNNSegmenter(PatchSegmenter):
    """Frozen encoder and memory: normalised images [B, 3, h, w] -> class probabilities [B, K, h, w], any h and w.
    memory [M, D], rows of length 1, and labels float32 [M, K], rows that sum to 1: see fill_memory."""

    def __init__(self, encoder: Encoder, memory: torch.Tensor, labels: torch.Tensor, precision: str,
                 neighbours: int = NEIGHBOURS):
        super().__init__(encoder)
        self.memory, self.labels, self.precision, self.neighbours = memory, labels, precision, neighbours

    @torch.inference_mode()
    def patch_logits(self, images: torch.Tensor) -> torch.Tensor:
        """[B, 3, h, w], divisible by the patch size -> probabilities float32 [B, K, h/p, w/p]."""
        tokens, grid = patch_tokens(self.encoder, images, self.precision), self.encoder.grid(images)
        similarity, index = nearest(tokens.flatten(0, 1), self.memory, self.neighbours)
        weights = (similarity.float() / TEMPERATURE).softmax(1)
        mixed = F.embedding_bag(index, self.labels, per_sample_weights=weights, mode="sum")
        return mixed.view(len(images), *grid, -1).permute(0, 3, 1, 2).contiguous()


def patch_tokens(encoder: Encoder, images: torch.Tensor, precision: str) -> torch.Tensor:
    """Normalised images [B, 3, h, w] -> final patch tokens of length 1, [B, N, D]: float32 on a CPU, where products of
    shorter types may be slower, in the type of the precision on CUDA."""
    with autocast(images.device, precision):
        tokens = encoder(images)[:, 1:]
    return F.normalize(tokens.float(), dim=-1).to(DTYPES[precision] if images.is_cuda else torch.float32)


def nearest(queries: torch.Tensor, memory: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k rows of memory with the largest inner products with each query, best first; all rows where there are fewer.

    queries [Q, D] and memory [M, D] of one type. Returns the products, of that type [Q, k], and the row numbers, int64
    [Q, k]; which of equal products come first is open.
    """
    together, step = CHUNK[queries.device.type]
    found = []
    for part in queries.split(together):
        best = [(part @ rows.T).topk(min(k, len(rows)), dim=1) for rows in memory.split(step)]
        products = torch.cat([values for values, _ in best], 1)
        numbers = torch.cat([index + place * step for place, (_, index) in enumerate(best)], 1)
        products, order = products.topk(min(k, products.shape[1]), dim=1)
        found.append((products, numbers.gather(1, order)))
    products, numbers = map(torch.cat, zip(*found, strict=True))
    return products, numbers


def label_histograms(labels: torch.Tensor, patch_size: int, num_classes: int) -> torch.Tensor:
    """uint8 [B, h, w], divisible by the patch size -> pixels of each class in each patch, float32 [B, N, K]. Labels
    that are no class (255, ignored) are not counted."""
    batch, height, width = labels.shape
    patches = labels.view(batch, height // patch_size, patch_size, width // patch_size, patch_size)
    patches = patches.transpose(2, 3).reshape(-1, patch_size ** 2).long().clamp_(max=num_classes)
    bins = torch.arange(len(patches), device=labels.device)[:, None] * (num_classes + 1) + patches
    counts = torch.bincount(bins.flatten(), minlength=len(patches) * (num_classes + 1))
    return counts.view(batch, -1, num_classes + 1)[:, :, :-1].float()


def choose_patches(histograms: torch.Tensor, count: int, uniform: torch.Tensor) -> torch.Tensor:
    """The patches of each image that go into the memory, bool [B, N]: up to count with the smallest (sum over the
    patch's classes of how many of the image's patches hold the class) * uniform, so that rare classes are not crowded
    out; never one without labels. histograms [B, N, K]; uniform [B, N], random numbers from 0 to 1."""
    present = (histograms > 0).double()
    score = torch.bmm(present, present.sum(1)[:, :, None])[:, :, 0]
    labelled = score > 0
    order = (score * uniform).masked_fill_(~labelled, torch.inf).sort(dim=1, stable=True).indices[:, :count]
    return torch.zeros_like(labelled).scatter_(1, order, True) & labelled


@torch.inference_mode()
def fill_memory(encoder: Encoder, batches: Iterable[tuple[torch.Tensor, torch.Tensor]], num_crops: int, batch_size: int,
                per_crop: int, num_classes: int, seed: int, precision: str,
                log: Callable[[str], None]) -> tuple[torch.Tensor, torch.Tensor]:
    """Patch tokens of training crops [M, D] (see patch_tokens) and their label histograms, float32 [M, K], whole on
    every process.

    batches: this process's share (utils.distributed.shard) of each global batch of batch_size: normalised crops float32
    [b, 3, c, c] and labels uint8 [b, c, c]. num_crops: how many are used; each gives up to per_crop patches
    (choose_patches), which follow from the seed, its place and its labels, however many processes there are. Raises
    UserError for tokens that are not finite.
    """
    share, progress = shard(batch_size), Progress(num_crops, "filling the memory", "crops")
    memory, labels = [], []
    for iteration, (images, label) in enumerate(batches):
        places = iteration * batch_size + np.arange(share.start, share.stop)
        histograms = label_histograms(label, encoder.patch_size, num_classes)
        histograms[int((places < num_crops).sum()):] = 0
        uniform = [np.random.default_rng((seed, place, CHOICE)).random(histograms.shape[1]) for place in places]
        uniform = torch.from_numpy(np.reshape(uniform, histograms.shape[:2])).to(label.device)
        chosen = choose_patches(histograms, per_crop, uniform)
        # In rank order, which is the order of the places in the batch.
        memory.append(gather_rows(patch_tokens(encoder, images, precision)[chosen]))
        labels.append(gather_rows(F.normalize(histograms[chosen], p=1, dim=1)))
        progress.update(min(batch_size, num_crops - iteration * batch_size))
    memory, labels = torch.cat(memory), torch.cat(labels)
    if not len(memory):
        raise UserError("no training crop has a labelled pixel; check the label maps")
    if not memory.isfinite().all():
        raise UserError(f"the encoder gave tokens that are not finite at --precision {precision}; use bf16 or fp32")
    log(f"a memory of {len(memory)} patches of {num_crops} crops: {(memory.nbytes + labels.nbytes) / 1e9:.2f} GB")
    return memory, labels
