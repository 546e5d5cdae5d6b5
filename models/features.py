"""Final tokens of a datasets.patches.PatchDataset, each image encoded once: on the GPU, in memory, or in a mapped file.

Every process holds the features of its own contiguous share of the images, in the type of the run's precision: tokens
layer-normalised, as attentive heads use them, class tokens as the encoder gives them.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image

from utils import UserError
from utils.distributed import all_reduce, shard
from utils.run import DTYPES, Progress, autocast
from utils.storage import allocate, prefetched

from .encoder import Encoder
from .probes import normalise

# Images in one pass of the encoder, and in what a worker sends through shared memory at a time (10 MB for 64).
ENCODE_BATCH = {"cuda": 64, "cpu": 16}


class Features(NamedTuple):
    """Features of the patches with these ids, of which this process holds first_id, first_id + 1, and so on.

    labels int64 [n] and cls [n, D] lie on the device, tokens ([n, N, D] or None) where they have room. ids, the same on
    every process, may leave out some of the n.
    """

    ids: torch.Tensor
    first_id: int
    labels: torch.Tensor
    cls: torch.Tensor
    tokens: torch.Tensor | None = None

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """Sorted row numbers, on the CPU, of those ids that this process holds."""
        rows = ids - self.first_id
        return rows[(rows >= 0) & (rows < len(self.labels))].sort().values

    def batches(self, steps: Sequence[torch.Tensor], with_tokens: bool) -> Iterator[tuple]:
        """This process's part of each global batch of ids, as (tokens, rows, labels): it is tokens[rows], or all tokens
        where rows is None. with_tokens: all normalised [n, N, D], else the class token as it is [n, 1, D]. Tokens that
        do not lie on the device are copied there by a thread, ahead of the steps."""
        device = self.labels.device
        tokens = self.tokens if with_tokens else self.cls[:, None]

        def copied():
            for rows in map(self.rows, steps):
                copy = torch.empty(len(rows), *tokens.shape[1:], dtype=tokens.dtype, pin_memory=device.type == "cuda")
                torch.index_select(tokens, 0, rows, out=copy)
                yield copy.to(device, non_blocking=True), None, self.labels[rows.to(device, non_blocking=True)]

        if tokens.device != device:
            yield from prefetched(copied(), device)
            return
        for rows in map(self.rows, steps):
            if len(rows) and len(rows) == rows[-1] - rows[0] + 1:
                # Neighbours, as in every test batch, need not be gathered.
                part = slice(int(rows[0]), int(rows[-1]) + 1)
                yield tokens[part], None, self.labels[part]
            else:
                rows = rows.to(device, non_blocking=True)  # without this, it waits for the step before
                yield tokens, rows, self.labels[rows]


@torch.inference_mode()
def encode_tokens(encoder: Encoder, images: torch.Tensor, precision: str) -> tuple[torch.Tensor, torch.Tensor]:
    """uint8 [B, 3, H, W] on the encoder's device -> class tokens [B, D] as the encoder gives them, and all tokens
    [B, 1 + N, D], normalised, in the precision's type."""
    with autocast(images.device, precision):
        tokens = encoder(encoder.preprocess(images))
    # Class tokens are a copy: a view would keep all tokens of the batch alive. Normalised before the cast: afterwards
    # an error of the mean would stay.
    return tokens[:, 0].to(DTYPES[precision], copy=True), normalise(tokens.float()).to(DTYPES[precision])


def encode_features(encoder: Encoder, dataset, label: str, with_tokens: bool, precision: str, workers: int, tier: str,
                    folder: Path, log: Callable[[str], None]) -> Features:
    """Features of a data set whose transform is deterministic, from one pass over its images.

    label: the data set's name in messages. with_tokens: all tokens, else the class token only. tier: where tokens live
    (utils.storage.allocate), folder: of a mapped file. Raises UserError where a feature is not finite.
    """
    device, dtype = encoder.mean.device, DTYPES[precision]
    images = shard(len(dataset))
    start, stop = int(dataset.first_id[images.start]), int(dataset.first_id[images.stop])
    arrays = [torch.empty(stop - start, encoder.embed_dim, dtype=dtype, device=device)]
    if with_tokens:
        height, width = encoder.grid(dataset.cut(Image.new("RGB", (64, 64)), None))
        shape = stop - start, 1 + height * width, encoder.embed_dim
        arrays.append(allocate(shape, dtype, device, tier, folder, f"{label}, {stop - start} patches", log))
    progress, finite = Progress(stop - start, f"encoding {label}", "patches"), torch.ones(1, device=device)
    batches = dataset.batches(images, ENCODE_BATCH[device.type], workers, pin_memory=device.type == "cuda")
    for patches, ids in batches:
        encoded = encode_tokens(encoder, patches.to(device, non_blocking=True), precision)
        first = int(ids[0]) - start
        for array, values in zip(arrays, encoded, strict=False):
            finite *= values.isfinite().all()
            array[first:first + len(ids)].copy_(values, non_blocking=True)
        progress.update(len(ids))
    if all_reduce(1 - finite):
        raise UserError(f"{label}: the encoder gave features that are not finite at --precision {precision}; "
                        "use bf16 or fp32")
    return Features(torch.arange(dataset.num_patches), start, dataset.labels[start:stop].to(device), *arrays)
