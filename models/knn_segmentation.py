"""Dense nearest-neighbour segmentation (Balazevic et al. 2023, arXiv 2306.01667), without training: the labels of a
patch are mixed from those of the most similar patches of the training images.

The search is exact: float32 matrix products, in chunks, find candidates, which are then compared in float64.
"""

from collections.abc import Callable, Iterable

import numpy as np
import torch
import torch.nn.functional as F

from utils import UserError
from utils.distributed import gather_rows, shard
from utils.run import Progress, autocast
from utils.storage import require_room

from .encoder import Encoder
from .segmentation_head import PatchSegmenter

NEIGHBOURS, TEMPERATURE = 30, 0.02
# Of similarities or candidates' rows at a time, in bytes; and the queries in one matrix product.
CHUNK_BYTES = {"cuda": 1 << 30, "cpu": 64 << 20}
CHUNK_QUERIES = {"cuda": 16384, "cpu": 1024}
# A search holds one such chunk, and as much for the values and numbers of the candidates.
SEARCH_BYTES = {device: 2 * size for device, size in CHUNK_BYTES.items()}
# Keeps the random numbers of this choice apart from others drawn from the same seed.
CHOICE = 0x6B6E6E


class KNNSegmenter(PatchSegmenter):
    """Frozen encoder and memory: normalised images [B, 3, h, w] -> class probabilities [B, K, h, w], any h and w.

    memory float32 [M, D], rows of length 1, and labels float32 [M, K], rows that sum to 1: see fill_memory.
    """

    def __init__(self, encoder: Encoder, memory: torch.Tensor, labels: torch.Tensor, precision: str,
                 neighbours: int = NEIGHBOURS, temperature: float = TEMPERATURE):
        super().__init__(encoder)
        self.memory, self.labels, self.precision = memory, labels, precision
        self.neighbours, self.temperature = neighbours, temperature

    @torch.inference_mode()
    def patch_logits(self, images: torch.Tensor) -> torch.Tensor:
        """[B, 3, h, w], divisible by the patch size -> probabilities float32 [B, K, h/p, w/p]."""
        tokens, grid = patch_tokens(self.encoder, images, self.precision), self.encoder.grid(images)
        similarity, index = nearest(tokens.flatten(0, 1), self.memory, self.neighbours)
        weights = (similarity / self.temperature).softmax(1)
        mixed = F.embedding_bag(index, self.labels, per_sample_weights=weights, mode="sum")
        return mixed.view(len(images), *grid, -1).permute(0, 3, 1, 2).contiguous()


def patch_tokens(encoder: Encoder, images: torch.Tensor, precision: str) -> torch.Tensor:
    """Normalised images [B, 3, h, w] -> final patch tokens of length 1, float32 [B, N, D]."""
    with autocast(images.device, precision):
        tokens = encoder(images)[:, 1:]
    return F.normalize(tokens.float(), dim=-1)


def nearest(queries: torch.Tensor, memory: torch.Tensor, k: int,
            candidates: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """The k rows of memory with the largest inner products with each query, best first; all rows where there are fewer.

    queries [Q, D], memory [M, D], float32, rows of length 1 at most. Returns the products, of float64 rounded to
    float32 [Q, k], and the row numbers, int64 [Q, k]; of equal products the lower row is nearer, so that neither chunks
    nor device change the result. candidates: rows compared in float64; a query that they do not decide is searched
    again with eight times as many. Extra memory: SEARCH_BYTES.
    """
    k, candidates = min(k, len(memory)), min(max(candidates, 2 * k), len(memory))
    values, indices = queries.new_empty(len(queries), k), queries.new_empty(len(queries), k, dtype=torch.int64)
    limit = CHUNK_BYTES[queries.device.type]
    # Values and numbers of a candidate take 12 bytes, and up to eight copies exist: best so far, new, joined, sorted.
    together = max(1, min(CHUNK_QUERIES[queries.device.type], limit // (96 * candidates)))
    for first in range(0, len(queries), together):
        part = queries[first:first + together]
        best, index = best_in_chunks(part, memory, candidates, max(1, limit // (4 * len(part))))
        # In the order of the rows, which a stable sort keeps among equal products.
        index = index.sort(1).values
        exact, order = exact_products(part, memory, index, limit).sort(dim=1, descending=True, stable=True)
        there = slice(first, first + len(part))
        values[there], indices[there] = exact[:, :k], index.gather(1, order[:, :k])
        if candidates < len(memory):
            # A float32 product of vectors of length 1 is off by no more than D / 2^24, in whatever order it is summed.
            undecided = (best[:, -1] + (memory.shape[1] + 8) * 2.0 ** -24 >= exact[:, k - 1]).nonzero()[:, 0]
            if len(undecided):
                again = nearest(part[undecided], memory, k, 8 * candidates)
                values[first + undecided], indices[first + undecided] = again
    return values, indices


def exact_products(queries: torch.Tensor, memory: torch.Tensor, index: torch.Tensor, limit: int) -> torch.Tensor:
    """Inner products of each query with its rows of memory, index [Q, c], in float64, rounded to float32 [Q, c]."""
    size = 12 * memory.shape[1]
    columns = max(1, min(index.shape[1], limit // size))
    rows = max(1, limit // (size * columns))
    return torch.cat([
        torch.cat([torch.bmm(memory[numbers].double(), part.double()[:, :, None])[:, :, 0].float()
                   for numbers in some.split(columns, dim=1)], dim=1)
        for part, some in zip(queries.split(rows), index.split(rows), strict=True)])


def best_in_chunks(queries: torch.Tensor, memory: torch.Tensor, k: int,
                   step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest inner products [Q, k], as float32 gives them, best first, and their rows, step rows at a time."""
    best, index = queries.new_empty(len(queries), 0), queries.new_empty(len(queries), 0, dtype=torch.int64)
    for start in range(0, len(memory), step):
        part = memory[start:start + step]
        # The similarities get no name: one would keep them beside those of the next chunk.
        value, row = (queries @ part.T).topk(min(k, len(part)), dim=1)
        best, row = torch.cat([best, value], 1), torch.cat([index, row + start], 1)
        best, order = best.topk(min(k, best.shape[1]), dim=1)
        index = row.gather(1, order)
    return best, index


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


def plan_memory(encoder: Encoder, num_crops: int, crop_size: int, num_classes: int,
                memory_size: int) -> tuple[int, str]:
    """(patches from each crop, what the memory takes, for the log) of fill_memory. Raises UserError for a memory
    smaller than num_crops or, on all processes, too large for the machine."""
    device = encoder.mean.device
    per_crop = min(memory_size // num_crops, (crop_size // encoder.patch_size) ** 2)
    if per_crop == 0:
        raise UserError(f"--memory-size {memory_size} is less than one patch for each of the {num_crops} training "
                        f"crops; use --memory-size {num_crops} or more")
    size, each = per_crop * num_crops, 4 * (encoder.embed_dim + num_classes)
    search = SEARCH_BYTES[device.type]
    need = size * each + search
    what = f"a search and a memory of up to {size} patches ({per_crop} from each of {num_crops} crops)"
    require_room(need, device, what, lambda share:
                 f"--memory-size {max(0, int(share * need - search) // each)} or less")
    return per_crop, f"{what}: {search / 1e9:.2f} GB and {size * each / 1e9:.2f} GB on {device}"


@torch.inference_mode()
def fill_memory(encoder: Encoder, batches: Iterable[tuple[torch.Tensor, torch.Tensor]], num_crops: int, batch_size: int,
                crop_size: int, num_classes: int, memory_size: int, seed: int, precision: str,
                log: Callable[[str], None]) -> tuple[torch.Tensor, torch.Tensor]:
    """Patch tokens of training crops, float32 [M, D], and their label histograms [M, K], whole on every process.

    batches: this process's share (utils.distributed.shard) of each global batch of batch_size: normalised crops float32
    [b, 3, c, c] and labels uint8 [b, c, c], c = crop_size. num_crops: how many are used; each gives up to memory_size
    // num_crops patches (choose_patches), which follow from the seed, its place and its labels, however many processes
    there are. Raises UserError for a memory smaller than num_crops or too large for the machine, for no labels at all,
    and for tokens that are not finite.
    """
    device, patches, share = encoder.mean.device, (crop_size // encoder.patch_size) ** 2, shard(batch_size)
    per_crop, what = plan_memory(encoder, num_crops, crop_size, num_classes, memory_size)
    log(what)
    size = per_crop * num_crops

    # One piece, filled from the front: joining parts at the end would take it twice.
    memory, labels = torch.empty(size, encoder.embed_dim, device=device), torch.empty(size, num_classes, device=device)
    filled, progress = 0, Progress(num_crops, "filling the memory", "crops")
    finite = torch.ones((), dtype=torch.bool, device=device)
    for iteration, (images, label) in enumerate(batches):
        places = iteration * batch_size + np.arange(share.start, share.stop)
        histograms = label_histograms(label, encoder.patch_size, num_classes)
        histograms[int((places < num_crops).sum()):] = 0
        uniform = np.array([np.random.default_rng((seed, place, CHOICE)).random(patches) for place in places])
        uniform = torch.from_numpy(uniform.reshape(len(places), patches)).to(device)
        chosen = choose_patches(histograms, per_crop, uniform)
        tokens, histograms = patch_tokens(encoder, images, precision)[chosen], histograms[chosen]
        # In rank order, which is the order of the places in the batch.
        rows = gather_rows(torch.cat([tokens, histograms / histograms.sum(1, keepdim=True)], dim=1))
        finite &= rows.isfinite().all()
        memory[filled:filled + len(rows)], labels[filled:filled + len(rows)] = rows.split(
            [encoder.embed_dim, num_classes], dim=1)
        filled += len(rows)
        progress.update(min(batch_size, num_crops - iteration * batch_size))
    if not filled:
        raise UserError("no training crop has a labelled pixel; check the label maps")
    if not finite:
        raise UserError(f"the encoder gave tokens that are not finite at --precision {precision}; use bf16 or fp32")
    log(f"{filled} patches in memory")
    return memory[:filled], labels[:filled]
