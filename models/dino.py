"""DINO (Caron et al., ICCV 2021), contrastive. Official files: facebookresearch/dino.

The backbone file is the teacher's state dictionary. The full file holds `student` and `teacher`, each with `backbone.*`
and `head.*`; the projector is the head, on the class token.
"""

from collections.abc import Mapping

import torch
import torch.nn as nn
import torch.nn.functional as F

from .encoder import CheckpointError, Encoder, bicubic_by_scale, load_exactly, plain_vit, random_vit, unwrap

URL = "https://dl.fbaipublicfiles.com/dino/dino_vitbase16_pretrain/dino_vitbase16_pretrain"
NESTING = ""  # of the weights in the backbone file
OFFICIAL = {"backbone": {"url": f"{URL}.pth"}, "full": {"url": f"{URL}_full_checkpoint.pth"}}


class WeightNormHead(nn.Module):
    """The projector of DINO and iBOT: Linear, GELU, Linear, GELU, Linear to the bottleneck, L2 normalisation, linear
    without bias (facebookresearch/dino, vision_transformer.py, DINOHead; weight normalisation folded in)."""

    def __init__(self, in_dim: int, hidden_dim: int = 2048, bottleneck_dim: int = 256, out_dim: int = 65536):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(in_dim, hidden_dim), nn.GELU(),
            nn.Linear(hidden_dim, hidden_dim), nn.GELU(),
            nn.Linear(hidden_dim, bottleneck_dim),
        )
        self.last_layer = nn.Linear(bottleneck_dim, out_dim, bias=False)
        for layer in self.mlp[::2]:
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """[B, D] -> [B, out_dim]; after shorten [B, bottleneck_dim]."""
        return self.last_layer(F.normalize(self.mlp(tokens), dim=-1))

    def shorten(self) -> None:
        """Makes the output [B, bottleneck_dim], where that is shorter, with the same inner products and cosines.

        With the last layer W = Q R (orthonormal columns in Q), (W a) . (W b) = (R a) . (R b): DINO's 65,536 outputs
        span at most 256 dimensions, and similarities cost 1/256 of the arithmetic and the memory.
        """
        weight = self.last_layer.weight
        if weight.shape[0] > weight.shape[1]:
            triangle = torch.linalg.qr(weight.double(), mode="r")[1].float()
            self.last_layer.weight = nn.Parameter(triangle, requires_grad=False)

    @classmethod
    def from_state(cls, state: Mapping[str, torch.Tensor]) -> "WeightNormHead":
        """Built from an official head's keys: mlp.*, and last_layer.weight or, with weight normalisation, .weight_g and
        .weight_v: the weight is g v / |v|, row by row. Raises CheckpointError; KeyError for a key that is missing."""
        state = dict(state)
        if "last_layer.weight_v" in state:
            direction, length = state.pop("last_layer.weight_v"), state.pop("last_layer.weight_g")
            state["last_layer.weight"] = F.normalize(direction, dim=1, eps=0) * length
        hidden_dim, in_dim = state["mlp.0.weight"].shape
        out_dim, bottleneck_dim = state["last_layer.weight"].shape
        head = cls(in_dim, hidden_dim, bottleneck_dim, out_dim)
        load_exactly(head, state)
        return head


def from_checkpoint(checkpoint: dict, num_heads: int | None = None, branch: str = "teacher") -> Encoder:
    """Content of an official file, backbone or full -> Encoder. branch: "teacher" (which the paper evaluates) or
    "student" of a full file. Raises CheckpointError."""
    if "teacher" not in checkpoint:
        if branch == "student":
            raise CheckpointError("this file holds the teacher's backbone only; the student is in the full checkpoint")
        return Encoder(plain_vit(unwrap(checkpoint), num_heads), bicubic_by_scale)
    # Only the student was saved from DistributedDataParallel.
    state = {key.removeprefix("module."): value for key, value in unwrap(checkpoint, branch).items()}
    vit = plain_vit(unwrap(state, prefix="backbone."), num_heads)
    has_head = any(key.startswith("head.") for key in state)
    head = WeightNormHead.from_state(unwrap(state, prefix="head.")) if has_head else None
    return Encoder(vit, bicubic_by_scale, head)


def random(out_dim: int = 65536) -> Encoder:
    """An untrained ViT-B/16 with DINO's head of 65,536 outputs, or iBOT's of another number."""
    return Encoder(random_vit(), bicubic_by_scale, WeightNormHead(768, out_dim=out_dim))
