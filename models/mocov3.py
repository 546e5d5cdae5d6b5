"""MoCo v3 (Chen et al., ICCV 2021), contrastive. Official files: facebookresearch/moco-v3, weights under `state_dict`.

`module.base_encoder.*` is the encoder that the paper evaluates, its `head` the projector, on the class token. Number of
heads: 12 for every size, where other methods' ViT-S has 6; give num_heads=12 for it.
"""

import torch.nn as nn

from .encoder import (
    CheckpointError,
    Encoder,
    bicubic_to_size,
    load_exactly,
    plain_vit,
    random_vit,
    sincos_positions,
    take_prefix,
    unwrap,
)

NESTING = "state_dict"  # of the weights in the backbone file
OFFICIAL = {
    "backbone": {"url": "https://dl.fbaipublicfiles.com/moco-v3/vit-b-300ep/vit-b-300ep.pth.tar"},
}


def from_checkpoint(checkpoint: dict, num_heads: int | None = None) -> Encoder:
    """An official file's content -> Encoder. Raises CheckpointError."""
    state = take_prefix(unwrap(checkpoint, "state_dict"), "module.base_encoder.")
    if not state:
        raise CheckpointError("no key starts with module.base_encoder.; this is not a pre-training file of MoCo v3")
    vit = plain_vit({key: value for key, value in state.items() if not key.startswith("head.")}, num_heads)
    head = take_prefix(state, "head.")
    if "0.weight" not in head or "6.weight" not in head:
        raise CheckpointError("missing keys: module.base_encoder.head.0.weight or head.6.weight, the projector")
    hidden_dim, out_dim = head["0.weight"].shape[0], head["6.weight"].shape[0]
    projector = build_projector(vit.embed_dim, hidden_dim, out_dim)
    load_exactly(projector, head)
    return Encoder(vit, bicubic_to_size, projector)


def build_projector(in_dim: int, hidden_dim: int = 4096, out_dim: int = 256) -> nn.Sequential:
    """The three-layer projector: biases nowhere, batch norm after every layer, without affine after the last
    (facebookresearch/moco-v3, moco/builder.py)."""
    return nn.Sequential(
        nn.Linear(in_dim, hidden_dim, bias=False), nn.BatchNorm1d(hidden_dim), nn.ReLU(),
        nn.Linear(hidden_dim, hidden_dim, bias=False), nn.BatchNorm1d(hidden_dim), nn.ReLU(),
        nn.Linear(hidden_dim, out_dim, bias=False), nn.BatchNorm1d(out_dim, affine=False),
    )


def random() -> Encoder:
    """An untrained ViT-B/16 with MoCo v3's projector and a fixed sine-cosine position embedding, drawn from PyTorch's
    generator."""
    vit = random_vit()
    vit.pos_embed.data = sincos_positions(14, 768)
    return Encoder(vit, bicubic_to_size, build_projector(768))
