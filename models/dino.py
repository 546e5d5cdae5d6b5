"""DINO (Caron et al., ICCV 2021), contrastive. Official files: facebookresearch/dino.

The backbone file is the teacher's state dictionary. The full file holds `student` and `teacher`, each with `backbone.*`
and `head.*`; the projector is the head, on the class token.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F

from .encoder import (
    CheckpointError,
    Encoder,
    bicubic_by_scale,
    layer_indices,
    load_exactly,
    plain_vit,
    random_vit,
    take_prefix,
    unwrap,
)

URL = "https://dl.fbaipublicfiles.com/dino/dino_vitbase16_pretrain/dino_vitbase16_pretrain"
NESTING = ""  # of the weights in the backbone file
OFFICIAL = {"backbone": {"url": f"{URL}.pth"}, "full": {"url": f"{URL}_full_checkpoint.pth"}}


class WeightNormHead(nn.Module):
    """The projector of DINO and iBOT: Linear, GELU, Linear, GELU, Linear to the bottleneck, L2 normalisation, linear
    without bias (facebookresearch/dino, vision_transformer.py, DINOHead; weight normalisation folded in)."""

    def __init__(self, in_dim: int, hidden_dims: Sequence[int], bottleneck_dim: int, out_dim: int):
        super().__init__()
        widths, layers = (in_dim, *hidden_dims, bottleneck_dim), []
        for before, after in zip(widths, widths[1:], strict=False):
            layers += [nn.Linear(before, after), nn.GELU()]
        self.mlp = nn.Sequential(*layers[:-1])
        self.last_layer = nn.Linear(bottleneck_dim, out_dim, bias=False)
        for layer in self.mlp[::2]:
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def bottleneck(self, tokens: torch.Tensor) -> torch.Tensor:
        return F.normalize(self.mlp(tokens), dim=-1)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """[B, D] -> [B, out_dim]."""
        return self.last_layer(self.bottleneck(tokens))

    def isometric(self, tokens: torch.Tensor) -> torch.Tensor:
        """[B, D] -> [B, bottleneck_dim] with the same inner products and cosines as forward's [B, out_dim].

        With the last layer W = Q R (orthonormal columns in Q), (W a) . (W b) = (R a) . (R b): DINO's 65,536 outputs
        span at most 256 dimensions, and similarities cost 1/256 of the arithmetic and the memory.
        """
        weight = self.last_layer.weight
        if weight.shape[0] <= weight.shape[1]:
            return self(tokens)
        if getattr(self, "_triangle", None) is None or self._triangle.device != tokens.device:
            # A cached inference tensor could not be used by a later call that needs gradients.
            with torch.inference_mode(False):
                self._triangle = torch.linalg.qr(weight.double(), mode="r")[1].float()
        return F.linear(self.bottleneck(tokens), self._triangle)

    @classmethod
    def from_state(cls, state: Mapping[str, torch.Tensor]) -> "WeightNormHead":
        """Built from an official head's keys: mlp.*, and last_layer.weight or, with weight normalisation, .weight_g and
        .weight_v: the weight is g v / |v|, row by row. Raises CheckpointError; KeyError for a key that is missing."""
        state = dict(state)
        if "last_layer.weight_v" in state:
            direction, length = state.pop("last_layer.weight_v"), state.pop("last_layer.weight_g")
            state["last_layer.weight"] = F.normalize(direction, dim=1, eps=0) * length
        widths = [state[f"mlp.{index}.weight"].shape[0] for index in layer_indices(state, r"mlp\.(\d+)\.weight")]
        out_dim, bottleneck_dim = state["last_layer.weight"].shape
        head = cls(state["mlp.0.weight"].shape[1], widths[:-1], bottleneck_dim, out_dim)
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
    vit = plain_vit(take_prefix(state, "backbone."), num_heads)
    head = take_prefix(state, "head.")
    return Encoder(vit, bicubic_by_scale, WeightNormHead.from_state(head) if head else None)


def random() -> Encoder:
    """An untrained ViT-B/16 with DINO's head of 65,536 outputs."""
    return Encoder(random_vit(), bicubic_by_scale, WeightNormHead(768, (2048, 2048), 256, 65536))
