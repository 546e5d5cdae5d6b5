"""BEiT (Bao et al., ICLR 2022), masked image modelling. Two architectures, told apart by their keys:

* the study's authors' file: relative position bias shared by all blocks, no absolute position embedding, LayerScale;
* the public beit_base_patch16_224_pt1k_800ep.pth: absolute position embedding, no relative bias, no LayerScale.

Both files hold the weights under `model`, with biases on query and value but not key, and an `lm_head`.
"""

from functools import lru_cache

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.models.beit import Beit, gen_relative_position_index

from .encoder import Encoder, beit_vit, bicubic_to_size, drop_keys, layer_norm, unwrap

NESTING = "model"  # of the weights in the backbone file
OFFICIAL = {
    "backbone": {"file": "beit_base_standard_epoch800_checkpoint-799.pth",
                 "where": "https://drive.google.com/drive/folders/1JSNzbxc9MBpNIhMRP8Vd0FFk7K5hC65q"},
}


class BEiTEncoder(Encoder):
    """An encoder whose blocks add one shared relative position bias to their attention scores."""

    def block_options(self, height: int, width: int) -> dict:
        """The bias [1, heads, 1 + N, 1 + N], in autocast's type where it is on, so that not every block casts it."""
        table = self.vit.rel_pos_bias.relative_position_bias_table
        kind, index = table.device.type, relative_index(height, width, table.device)
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else table.dtype
        table = resize_relative_table(table, self.vit.patch_embed.grid_size, (height, width)).to(dtype)
        bias = table.T.index_select(1, index.flatten()).view(1, -1, *index.shape)
        return {"shared_rel_pos_bias": bias[..., :len(index)]}


@lru_cache(maxsize=1)
def relative_index(height: int, width: int, device: torch.device) -> torch.Tensor:
    """Row of the bias table for each pair of tokens on a grid of patches, [1 + N, M]: M is 1 + N made divisible by 8,
    since attention's CUDA kernel wants such strides of the bias, and would copy it in every block."""
    index = gen_relative_position_index((height, width)).to(device)
    return F.pad(index, (0, -len(index) % 8))


def resize_relative_table(table: torch.Tensor, old_grid: tuple[int, int], new_grid: tuple[int, int]) -> torch.Tensor:
    """A relative position bias table for another grid of patches (microsoft/unilm, beit/run_class_finetuning.py).

    table [(2 h - 1)(2 w - 1) + 3, heads] for old_grid (h, w); the last three rows, of the class token, are unchanged.
    A cubic spline, one matrix for each axis, through the known values at distances that grow as a geometric progression
    up to the new table's border.
    """
    old, new = [2 * side - 1 for side in old_grid], [2 * side - 1 for side in new_grid]
    rows, columns = (geometric_spline(*pair, table.device) for pair in zip(old, new, strict=True))
    values = table[:-3].double().unflatten(0, old)
    resized = torch.einsum("io,jp,oph->ijh", rows, columns, values).flatten(0, 1)
    return torch.cat([resized.to(table.dtype), table[-3:]])


@lru_cache
def geometric_spline(old: int, new: int, device: torch.device) -> torch.Tensor:
    """The matrix [new, old], float64, that interpolates old values at geometrically spaced distances to new integer
    distances."""
    if old == new:
        return torch.eye(old, dtype=torch.float64, device=device)
    # Bisection for the ratio whose sum 1 + q + q^2 + ... reaches the border; bounds and tolerance of the official code.
    low, high = 1.01, 1.5
    while high - low > 1e-6:
        ratio = (low + high) / 2
        if (1 - ratio ** (old // 2)) / (1 - ratio) > new // 2:
            high = ratio
        else:
            low = ratio
    distances = (ratio ** torch.arange(old // 2, dtype=torch.float64)).cumsum(0)
    known = torch.cat([-distances.flip(0), torch.zeros(1), distances])
    wanted = torch.arange(new) - new // 2
    # FITPACK, which the official code calls, evaluates points outside the known range at its border.
    return cubic_spline(known, wanted.clamp(known[0], known[-1])).to(device)


def cubic_spline(known: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """The matrix [wanted, known] of cubic spline interpolation with not-a-knot ends, from values at the known points
    (float64, ascending, at least four) to those at the wanted points, none of which is outside of the known ones."""
    def basis(points):
        # The third derivative may jump at each known point but the first and last two. Scaled to -1 to 1, the solution
        # is right to eight digits, more than float32 has, up to a grid of 128.
        points, knots = points[:, None] / known[-1], known[2:-2] / known[-1]
        return torch.cat([points ** torch.arange(4), (points - knots).clamp(min=0) ** 3], dim=1)

    return torch.linalg.solve(basis(known), basis(wanted), left=False)


def from_checkpoint(checkpoint: dict, num_heads: int | None = None) -> Encoder:
    """Content of either file -> Encoder. Raises CheckpointError."""
    state = drop_keys(unwrap(checkpoint, "model"), r"lm_head\.(weight|bias)|mask_token|.*relative_position_index")
    vit = beit_vit(state, num_heads)
    return Encoder(vit, bicubic_to_size) if vit.rel_pos_bias is None else BEiTEncoder(vit, position_embedding=None)


def random() -> Encoder:
    """An untrained BEiT-B/16 of the study's architecture."""
    vit = Beit(num_classes=0, global_pool="", init_values=0.1, norm_layer=layer_norm, use_abs_pos_emb=False,
               use_shared_rel_pos_bias=True)
    nn.init.trunc_normal_(vit.rel_pos_bias.relative_position_bias_table, std=0.02)
    return BEiTEncoder(vit, position_embedding=None)
