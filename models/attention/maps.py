"""Attention weights of timm's modules and their statistics: distances, similarity of maps, receptive fields.
models/attention/__main__.py is the command; its docstring defines them. Each function here can be copied alone."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F

from utils import UserError
from utils.distributed import all_reduce, barrier
from utils.storage import free_memory


def query_key(attn: nn.Module, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scaled queries, and keys, of timm's attention module for its input tokens [B, T, D]: each [B, heads, T, d], in
    float32."""
    # The registered parameters are float32 also where Encoder.cast_weights hides them.
    parameters = dict(attn.qkv.named_parameters())
    weight, bias = parameters["weight"], parameters.get("bias")
    if getattr(attn, "q_bias", None) is not None:
        bias = torch.cat([attn.q_bias, attn.k_bias])
    # Rows of queries and keys, not of values.
    rows = len(weight) // 3 * 2
    both = F.linear(tokens.to(weight.dtype), weight[:rows], None if bias is None else bias[:rows])
    query, key = both.unflatten(2, (2, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
    if hasattr(attn, "q_norm"):
        query, key = attn.q_norm(query), attn.k_norm(key)
    return query * attn.scale, key


def attention_chunks(query: torch.Tensor, key: torch.Tensor, bias: torch.Tensor | None = None,
                     max_bytes: int | None = None) -> Iterator[tuple[slice, torch.Tensor]]:
    """The attention weights softmax(query key^T + bias) in float32, in chunks. query (scaled), key: [B, heads, T, d];
    bias [1, heads, T, T]. Yields (which, weights [c, T, T]): a slice of the B * heads pairs of image and head, image by
    image. max_bytes limits a chunk of more than one pair and what is computed from it (default: by free memory)."""
    heads, count = query.shape[1:3]
    max_bytes = max_bytes or min(2**28 if query.device.type == "cpu" else 2**31, free_memory(query.device) // 4)
    # Four float32 arrays: scores, bias, weights, and a product of the caller.
    size = max(1, max_bytes // (count * count * 16))
    query, key = query.flatten(0, 1), key.flatten(0, 1)
    for start in range(0, len(query), size):
        which = slice(start, min(start + size, len(query)))
        scores = (query[which] @ key[which].mT).float()
        if bias is not None:
            scores += bias[0, torch.arange(which.start, which.stop, device=scores.device) % heads]
        yield which, scores.softmax(dim=-1)


@contextmanager
def watch_attention(blocks: Sequence[nn.Module], receive: Callable) -> Iterator[None]:
    """In this context every attention module of timm's blocks calls receive(layer, module, tokens [B, T, D], bias)
    before it runs; bias is Beit's relative position bias [1, heads, T, T] or None. receive runs without autocast, which
    would round the weights. Raises UserError for another type of attention."""
    def before(layer, attn, inputs, keywords):
        bias = keywords.get("shared_rel_pos_bias")
        if getattr(attn, "relative_position_bias_table", None) is not None:
            own = attn._get_rel_pos_bias()
            bias = own if bias is None else bias + own
        with torch.autocast(inputs[0].device.type, enabled=False):
            receive(layer, attn, inputs[0], bias)

    # As in models/encoder.py.
    from timm.models.beit import Attention as BeitAttention
    from timm.models.vision_transformer import Attention as VitAttention
    modules = [getattr(block, "attn", block) for block in blocks]
    # By exact type: a subclass may compute its weights differently.
    unknown = [type(attn) for attn in modules if type(attn) not in (VitAttention, BeitAttention)]
    if unknown:
        raise UserError(f"the weights of {unknown[0].__module__}.{unknown[0].__name__} are not known here: "
                        "rotary attention is not measured; use a model of timm's VisionTransformer or Beit")
    with ExitStack() as hooks:
        for layer, attn in enumerate(modules):
            hooks.enter_context(attn.register_forward_pre_hook(partial(before, layer), with_kwargs=True))
        yield


def pair_similarity(unit_sum: torch.Tensor, count: torch.Tensor | int) -> torch.Tensor:
    """The mean cosine similarity of all pairs of `count` unit vectors, from their sum [..., D]: its squared length is
    count plus twice the sum over pairs. Not finite for fewer than two vectors."""
    return (unit_sum.square().sum(-1) - count) / (count * (count - 1))


def patch_gradients(outputs: torch.Tensor, query: torch.Tensor, direction: torch.Tensor,
                    inputs: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    """Gradients of outputs[b, query[b]] . direction[b], summed over b, with respect to the inputs: each image's own, as
    images do not mix. outputs [B, N, C], query [B], direction [B, C]. The graph is kept for the next query."""
    chosen = outputs[torch.arange(len(query), device=query.device), query]
    return torch.autograd.grad((chosen.float() * direction).sum(), inputs, retain_graph=True)


def patch_norms(images: torch.Tensor, patch_size: int) -> torch.Tensor:
    """L2 norms of the patches of images [B, C, H, W], over all channels: [B, N], row by row."""
    squares = images.float().square().sum(1)
    squares = squares.unflatten(2, (-1, patch_size)).unflatten(1, (-1, patch_size))
    return squares.sum((2, 4)).sqrt().flatten(1)


def add_centred(field: torch.Tensor, magnitude: torch.Tensor, seen: torch.Tensor, query: torch.Tensor,
                grid: tuple[int, int]) -> None:
    """Adds magnitude [B, N] over a grid of h x w patches to field [2, (2h - 1)(2w - 1)]: sums and counts by offset from
    the patches query [B]. seen [B, N]: 1 where a patch counts."""
    height, width = grid
    position = torch.arange(height * width, device=query.device)
    rows = position // width - query[:, None] // width + height - 1
    columns = position % width - query[:, None] % width + width - 1
    values = torch.stack([magnitude * seen, seen]).to(field.dtype)
    field.index_add_(1, (rows * (2 * width - 1) + columns).flatten(), values.flatten(1))


def radius_holding(field: torch.Tensor, share: float) -> float:
    """The smallest distance, in patches, from the centre of field [2h - 1, 2w - 1] that holds this share of its sum. A
    NaN (no value) counts as the mean of the values at its distance, 0 where there are none: otherwise the radius would
    grow with the number of images. NaN for a field without values."""
    rows, columns = (torch.arange(side) - side // 2 for side in field.shape)
    squares, ring = (rows[:, None] ** 2 + columns**2).flatten().unique(return_inverse=True)
    field = field.flatten().double()
    total, found = (torch.bincount(ring, values) for values in (field.nan_to_num(0), field.isfinite()))
    held = (total / found.clamp(min=1) * torch.bincount(ring)).cumsum(0)
    return float(squares[(held >= share * held[-1]).nonzero()[0, 0]]) ** 0.5 if held[-1] > 0 else float("nan")


class Sums:
    """Sums over images for the layers of the encoder, or of the decoder at one mask ratio. blocks: timm's. grid: rows
    and columns of patches. prefix: tokens before those of the patches. decoder: adds figures by mask, and a second
    receptive field, of the decoder alone."""

    def __init__(self, blocks: Sequence[nn.Module], grid: tuple[int, int], prefix: int, device: torch.device,
                 decoder: bool = False):
        self.blocks, self.grid, self.prefix, self.decoder = blocks, grid, prefix, decoder
        layers, heads, count = len(blocks), blocks[0].attn.num_heads, grid[0] * grid[1]
        # Between the centres of patches, in patches: [N, N].
        centres = torch.cartesian_prod(*map(torch.arange, grid)).float()
        self.distances = (centres[:, None] - centres).square().sum(2).sqrt().to(device)
        zeros = partial(torch.zeros, dtype=torch.float64, device=device)
        # Two groups of queries: tokens of visible patches, mask tokens.
        self.distance, self.queries = zeros(2, layers, heads), zeros(2, layers, 1)
        self.maps = zeros(layers, heads, count * count)
        self.fields = {name: zeros(2, (2 * grid[0] - 1) * (2 * grid[1] - 1))
                       for name in ("receptive_field", "receptive_field_tokens")[:1 + decoder]}

    def watch(self, mask: torch.Tensor):
        """A context in which passes through the blocks are added to the sums. mask [B, N]: 1 = mask token."""
        return watch_attention(self.blocks, partial(self._add, mask))

    @torch.no_grad()
    def _add(self, mask, layer, attn, tokens, bias):
        distance = torch.empty(len(tokens) * attn.num_heads, mask.shape[1], device=tokens.device)
        # Softmax over the patch keys only: the full softmax divided by its sum over them.
        query, key = (part[:, :, self.prefix:] for part in query_key(attn, tokens))
        bias = None if bias is None else bias[:, :, self.prefix:, self.prefix:]
        for which, weights in attention_chunks(query, key, bias):
            # Rows of weights sum to 1: each query's mean distance to its keys.
            distance[which] = torch.einsum("pqk,qk->pq", weights, self.distances)
            pair = torch.arange(len(weights), device=tokens.device)
            scale = torch.zeros(attn.num_heads, len(pair), device=tokens.device)
            scale[(which.start + pair) % attn.num_heads, pair] = 1 / weights.norm(dim=2).norm(dim=1)
            self.maps[layer] += scale @ weights.flatten(1)
        groups = torch.stack([1 - mask, mask]).double()
        distance = distance.unflatten(0, (len(tokens), -1)).double()
        self.distance[:, layer] += torch.einsum("gbn,bhn->gh", groups, distance)
        self.queries[:, layer, 0] += groups.sum((1, 2))

    def figures(self, patch_size: int) -> dict:
        """The metrics of a results line, over all processes."""
        barrier()
        for value in (self.distance, self.queries, self.maps, *self.fields.values()):
            all_reduce(value)
        figures = {}

        def add_distance(name, value):
            figures[name.format("patches")], figures[name.format("pixels")] = plain(value), plain(value * patch_size)

        add_distance("distance_{}", self.distance.sum(0) / self.queries.sum(0))
        for name, group in (("visible", 0), ("masked", 1)) if self.decoder else ():
            add_distance(f"distance_{{}}_{name}", self.distance[group] / self.queries[group])
        add_distance("distance_{}_uniform", self.distances.double().mean())
        images = (self.queries.sum(0) / len(self.distances)).round()
        figures["map_similarity"] = plain(pair_similarity(self.maps, images).mean(1))
        for name, (total, count) in self.fields.items():
            field = (total / count).view(2 * self.grid[0] - 1, -1).cpu()
            figures[name] = plain(field) if count.any() else None
            if name == "receptive_field":
                figures["receptive_field_count"] = count.view_as(field).long().tolist() if count.any() else None
            for share in (50, 90):
                add_distance(f"{name}_radius{share}_{{}}", radius_holding(field, share / 100))
        return figures


def plain(values: torch.Tensor | list | float) -> list | float | None:
    """As nested lists of numbers with six significant digits; values that are not finite become None (JSON null)."""
    values = values.tolist() if isinstance(values, torch.Tensor) else values
    if isinstance(values, list):
        return [plain(value) for value in values]
    return float(f"{values:.6g}") if math.isfinite(values) else None
