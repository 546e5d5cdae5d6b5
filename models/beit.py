"""BEiT (Bao et al., ICLR 2022), masked image modelling. Two architectures, told apart by their keys:

* the study's authors' file: relative position bias shared by all blocks, no absolute position embedding, LayerScale;
* the public beit_base_patch16_224_pt1k_800ep.pth: absolute position embedding, no relative bias, no LayerScale.

Both files hold the weights under `model`, with biases on query and value but not key, and an `lm_head`.
"""

import math
from functools import lru_cache

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.models.beit import Beit, gen_relative_position_index

from .encoder import Encoder, bicubic_to_size, drop_keys, layer_norm, load_exactly, unwrap, vit_shape

NESTING = "model"  # of the weights in the backbone file
OFFICIAL = {
    "backbone": {"file": "beit_base_standard_epoch800_checkpoint-799.pth",
                 "where": "https://drive.google.com/drive/folders/1JSNzbxc9MBpNIhMRP8Vd0FFk7K5hC65q"},
}
RELATIVE_TABLE = "rel_pos_bias.relative_position_bias_table"
RELATIVE_INDEX = "rel_pos_bias.relative_position_index"


class BEiTEncoder(Encoder):
    """An encoder whose blocks add one shared relative position bias to their attention scores."""

    def __init__(self, vit: Beit):
        super().__init__(vit, position_embedding=None)
        self._bias_key = None

    def relative_bias(self, height: int, width: int) -> torch.Tensor:
        """The bias of a grid of patches, [1, heads, 1 + N, 1 + N], float32, or in autocast's type where the fused
        attention takes it; that of the last grid is cached."""
        table = self.vit.rel_pos_bias.relative_position_bias_table
        kind, fused = table.device.type, self.vit.blocks[0].attn.fused_attn
        dtype = torch.get_autocast_dtype(kind) if fused and torch.is_autocast_enabled(kind) else table.dtype
        key = (height, width, table.device, dtype)
        if self._bias_key != key:
            # A cached inference tensor could not be used by a later call that needs gradients.
            with torch.inference_mode(False):
                table = resize_relative_table(table, self.vit.patch_embed.grid_size, (height, width))
                index = gen_relative_position_index((height, width)).to(table.device)
                bias = table[index].permute(2, 0, 1)[None].to(dtype)
                # The CUDA kernel wants strides divisible by 8, and would copy the bias in every block.
                self._bias_key, self._bias = key, F.pad(bias, (0, -bias.shape[3] % 8))[..., :bias.shape[3]]
        return self._bias

    def block_options(self, height: int, width: int) -> dict:
        return {"shared_rel_pos_bias": self.relative_bias(height, width)}


def resize_relative_table(table: torch.Tensor, old_grid: tuple[int, int], new_grid: tuple[int, int]) -> torch.Tensor:
    """A relative position bias table for another grid of patches (microsoft/unilm, beit/run_class_finetuning.py).

    table [(2 h - 1)(2 w - 1) + 3, heads] for old_grid (h, w); the last three rows, of the class token, are unchanged.
    A cubic spline, one matrix for each axis, through the known values at distances that grow as a geometric progression
    up to the new table's border.
    """
    old, new = [2 * side - 1 for side in old_grid], [2 * side - 1 for side in new_grid]
    rows, columns = (torch.from_numpy(geometric_spline(*pair)).to(table.device) for pair in zip(old, new, strict=True))
    values = table[:-3].double().unflatten(0, old)
    resized = torch.einsum("io,jp,oph->ijh", rows, columns, values).flatten(0, 1)
    return torch.cat([resized.to(table.dtype), table[-3:]])


@lru_cache
def geometric_spline(old: int, new: int) -> np.ndarray:
    """The matrix [new, old] that interpolates old values at geometrically spaced distances to new integer distances."""
    if old == new:
        return np.eye(old)
    # Bisection for the ratio whose sum 1 + q + q^2 + ... reaches the border; bounds and tolerance of the official code.
    low, high = 1.01, 1.5
    while high - low > 1e-6:
        ratio = (low + high) / 2
        if (1 - ratio ** (old // 2)) / (1 - ratio) > new // 2:
            high = ratio
        else:
            low = ratio
    distances = np.cumsum(ratio ** np.arange(old // 2))
    known = np.concatenate([-distances[::-1], [0], distances])
    wanted = np.arange(new) - new // 2
    # FITPACK, which the official code calls, evaluates points outside the known range at its border.
    return cubic_spline(known, np.clip(wanted, known[0], known[-1]))


def cubic_spline(known: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The matrix [wanted, known] of cubic spline interpolation with not-a-knot ends, from values at the known points
    (ascending, at least four) to those at the wanted points, none of which is outside of the known ones."""
    knots = np.concatenate([[known[0]] * 4, known[2:-2], [known[-1]] * 4])

    def basis(points):
        """The cubic B-splines at the points, [points, known], by de Boor's recursion."""
        interval = np.clip(np.searchsorted(knots, points, side="right") - 1, 3, len(known) - 1)
        values = np.eye(len(knots) - 1)[interval]
        for degree in (1, 2, 3):
            width = knots[degree:] - knots[:-degree]
            share = (points[:, None] - knots[:-degree]) / np.where(width > 0, width, 1)
            values = share[:, :-1] * values[:, :-1] + (1 - share[:, 1:]) * values[:, 1:]
        return values

    return np.linalg.solve(basis(known).T, basis(wanted).T).T


def from_checkpoint(checkpoint: dict, num_heads: int | None = None) -> Encoder:
    """Content of either file -> Encoder. Raises CheckpointError."""
    state = drop_keys(unwrap(checkpoint, "model"), rf"lm_head\.(weight|bias)|mask_token|{RELATIVE_INDEX}")
    shape, relative = vit_shape(state, num_heads), RELATIVE_TABLE in state
    if relative:
        grid = (math.isqrt(len(state[RELATIVE_TABLE]) - 3) + 1) // 2
    else:
        grid = math.isqrt(state["pos_embed"].shape[1] - 1)
    vit = Beit(img_size=grid * shape["patch_size"], num_classes=0, global_pool="", norm_layer=layer_norm,
               init_values=1.0 if "blocks.0.gamma_1" in state else None, use_abs_pos_emb=not relative,
               use_shared_rel_pos_bias=relative, **shape)
    # timm computes the index from the grid; its older versions have it in the state dictionary.
    state |= {key: value for key, value in vit.state_dict().items() if key == RELATIVE_INDEX}
    load_exactly(vit, state)
    return BEiTEncoder(vit) if relative else Encoder(vit, bicubic_to_size)


def random() -> Encoder:
    """An untrained BEiT-B/16 of the study's architecture."""
    vit = Beit(num_classes=0, global_pool="", init_values=0.1, norm_layer=layer_norm, use_abs_pos_emb=False,
               use_shared_rel_pos_bias=True)
    nn.init.trunc_normal_(vit.rel_pos_bias.relative_position_bias_table, std=0.02)
    return BEiTEncoder(vit)
