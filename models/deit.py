"""DeiT (Touvron et al., ICML 2021), supervised. Official files: facebookresearch/deit, weights under `model`.

The distilled files have a second prefix token; it takes part in attention and is not among the encoder's outputs.
"""

from .encoder import CheckpointError, Encoder, bicubic_to_size, drop_keys, plain_vit, random_vit, unwrap

NESTING = "model"  # of the weights in the backbone file
OFFICIAL = {"backbone": {"url": "https://dl.fbaipublicfiles.com/deit/deit_base_patch16_224-b5f2ef4d.pth"}}


def from_checkpoint(checkpoint: dict, num_heads: int | None = None) -> Encoder:
    """Content of an official file, plain or distilled -> Encoder. Raises CheckpointError."""
    state = unwrap(checkpoint, "model")
    # Only the classifier distinguishes a DeiT file from one of MAE.
    if "head.weight" not in state:
        raise CheckpointError("missing keys: head.weight, head.bias")
    if "dist_token" in state:
        state["reg_token"] = state.pop("dist_token")
    return Encoder(plain_vit(drop_keys(state, r"head(_dist)?\.(weight|bias)"), num_heads), bicubic_to_size)


def random() -> Encoder:
    """An untrained DeiT-B/16."""
    return Encoder(random_vit(), bicubic_to_size)
