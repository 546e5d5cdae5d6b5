"""iBOT (Zhou et al., ICLR 2022), contrastive and masked image modelling. Official files: bytedance/ibot.

The teacher file holds its backbone under `state_dict`. The full file holds `student` and `teacher`, each with
`backbone.*` and `head.*`; the projector is the head on the class token, `last_layer` (`last_layer2` is for patches).
"""

from .dino import WeightNormHead
from .encoder import CheckpointError, Encoder, bicubic_by_scale, drop_keys, plain_vit, random_vit, take_prefix, unwrap

URL = "https://lf3-nlp-opensource.bytetos.com/obj/nlp-opensource/archive/2022/ibot/vitb_16_rand_mask"
NESTING = "state_dict"  # of the weights in the backbone file
OFFICIAL = {
    "backbone": {"url": f"{URL}/checkpoint_teacher.pth", "file": "ibot_vitb_16_rand_mask_checkpoint_teacher.pth"},
    "full": {"url": f"{URL}/checkpoint.pth", "file": "ibot_vitb_16_rand_mask_checkpoint.pth"},
}


def from_checkpoint(checkpoint: dict, num_heads: int | None = None, branch: str = "teacher") -> Encoder:
    """Content of an official file, backbone or full -> Encoder. branch: "teacher" (which the paper evaluates) or
    "student" of a full file. Raises CheckpointError."""
    if "teacher" not in checkpoint:
        if branch == "student":
            raise CheckpointError("this file holds the teacher's backbone only; the student is in checkpoint.pth")
        return Encoder(plain_vit(unwrap(checkpoint, "state_dict"), num_heads), bicubic_by_scale)
    # Only the student was saved from DistributedDataParallel.
    state = {key.removeprefix("module."): value for key, value in unwrap(checkpoint, branch).items()}
    vit = plain_vit(drop_keys(take_prefix(state, "backbone."), "masked_embed"), num_heads)
    head = take_prefix(state, "head.")
    if not head:
        return Encoder(vit, bicubic_by_scale)
    # Only the layer for patches distinguishes a full file of iBOT from one of DINO.
    if not any(key.startswith("last_layer2.") for key in head):
        raise CheckpointError("missing keys: head.last_layer2.weight_g or .weight; this is not a full file of iBOT")
    head = drop_keys(head, r"last_layer2\..*")
    return Encoder(vit, bicubic_by_scale, WeightNormHead.from_state(head))


def random() -> Encoder:
    """An untrained ViT-B/16 with iBOT's head of 8,192 outputs."""
    return Encoder(random_vit(), bicubic_by_scale, WeightNormHead(768, (2048, 2048), 256, 8192))
