"""MoCo v3 (Chen et al., ICCV 2021), contrastive. Official files: facebookresearch/moco-v3, weights under `state_dict`.

`module.base_encoder.*` is the encoder that the paper evaluates, its `head` the projector, on the class token. ViT-S has
12 heads, not width / 64.
"""

import torch.nn as nn

from .encoder import Encoder, bicubic_to_size, drop_keys, load_exactly, plain_vit, random_vit, sincos_positions, unwrap

NESTING = "state_dict"  # of the weights in the backbone file
OFFICIAL = {"backbone": {"url": "https://dl.fbaipublicfiles.com/moco-v3/vit-b-300ep/vit-b-300ep.pth.tar"}}


def from_checkpoint(checkpoint: dict, num_heads: int | None = None) -> Encoder:
    """Content of an official file -> Encoder. num_heads: default 12 for ViT-S (width 384), else width / 64. Raises
    CheckpointError."""
    state = drop_keys(unwrap(checkpoint, "state_dict", "module.base_encoder."), r"head\..*")
    head = unwrap(checkpoint, "state_dict", "module.base_encoder.head.")
    small = state["cls_token"].shape[-1] == 384
    vit = plain_vit(state, num_heads or (12 if small else None))
    projector = build_projector(vit.embed_dim, len(head["0.weight"]), len(head["6.weight"]))
    load_exactly(projector, head)
    return Encoder(vit, bicubic_to_size, projector)


def build_projector(in_dim: int, hidden_dim: int = 4096, out_dim: int = 256) -> nn.Sequential:
    """The three-layer projector: no biases, batch norm after every layer, the last without affine parameters
    (facebookresearch/moco-v3, moco/builder.py)."""
    return nn.Sequential(
        nn.Linear(in_dim, hidden_dim, bias=False), nn.BatchNorm1d(hidden_dim), nn.ReLU(),
        nn.Linear(hidden_dim, hidden_dim, bias=False), nn.BatchNorm1d(hidden_dim), nn.ReLU(),
        nn.Linear(hidden_dim, out_dim, bias=False), nn.BatchNorm1d(out_dim, affine=False),
    )


def random() -> Encoder:
    """An untrained ViT-B/16 with MoCo v3's projector and a fixed sine-cosine position embedding."""
    vit = random_vit()
    vit.pos_embed.data = sincos_positions(14, 768)
    return Encoder(vit, bicubic_to_size, build_projector(768))
