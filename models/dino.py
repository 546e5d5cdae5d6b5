"""DINO (Caron et al., ICCV 2021), contrastive. Official files: facebookresearch/dino.

The backbone file is the teacher's state dictionary. The full file holds `student` and `teacher`, each with `backbone.*`
and `head.*`; the projector is the head, on the class token.
"""

from .encoder import (
    CheckpointError,
    Encoder,
    WeightNormHead,
    bicubic_by_scale,
    plain_vit,
    random_vit,
    take_prefix,
    unwrap,
)

URL = "https://dl.fbaipublicfiles.com/dino/dino_vitbase16_pretrain/dino_vitbase16_pretrain"
NESTING = ""  # of the weights in the backbone file
OFFICIAL = {"backbone": {"url": f"{URL}.pth"}, "full": {"url": f"{URL}_full_checkpoint.pth"}}


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
