"""iBOT (Zhou et al., ICLR 2022), contrastive and masked image modelling. Official files: bytedance/ibot.

The teacher file holds its backbone under `state_dict`. The full file holds `student` and `teacher`, each with
`backbone.*` and `head.*`; the projector is the head on the class token, `last_layer` (`last_layer2` is for patches).
"""

from . import dino
from .encoder import CheckpointError, Encoder, drop_keys, unwrap

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
        return dino.from_checkpoint(unwrap(checkpoint, "state_dict"), num_heads, branch)
    state = unwrap(checkpoint, branch)
    # Only the layer for patches distinguishes a full file of iBOT from one of DINO.
    if any("head." in key for key in state) and not any("head.last_layer2." in key for key in state):
        raise CheckpointError("missing keys: head.last_layer2.weight_g or .weight; this is not a full file of iBOT")
    state = drop_keys(state, r"(module\.)?(backbone\.masked_embed|head\.last_layer2\..*)")
    return dino.from_checkpoint(checkpoint | {branch: state}, num_heads, branch)


def random() -> Encoder:
    """An untrained ViT-B/16 with iBOT's head of 8,192 outputs."""
    return dino.random(out_dim=8192)
