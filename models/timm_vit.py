"""Any plain ViT of timm, as --model timm/NAME: VisionTransformer, Eva and Beit, with or without class token."""

import re
import sys
from collections.abc import Mapping, Sequence

import timm
import torch
import torch.nn as nn

from utils import UserError

from .checkpoints import one_line, state_dicts
from .encoder import CheckpointError, Encoder, drop_keys, load_exactly

NESTING = ""  # of the weights in a file that is read at one place
PLAIN = ("VisionTransformer", "VisionTransformerDistilled", "Eva", "Beit")
# What the file of a whole model holds beside what gives tokens.
NOT_TOKENS = (r"(head|head_dist|lm_head|fc|classifier|projector|predictor)\..*|decoder[._].*|mask_token|"
              r".*relative_position_index")


class TimmEncoder(Encoder):
    """timm's own embedding and position resampling; register and distillation tokens are left out.

    cls_from: what the first token is: the "class token"; without one the output of the "attention pool"; without that
    the "mean" of the patch tokens.
    """

    def __init__(self, vit: nn.Module):
        super().__init__(vit, None, mean=vit.default_cfg["mean"], std=vit.default_cfg["std"])
        if getattr(vit, "cls_token", None) is None:
            self.cls_from = "mean" if getattr(vit, "attn_pool", None) is None else "attention pool"
        # A model made for mean pooling has its final norm behind the pool: applied to the tokens, it serves both.
        fc_norm = getattr(vit, "fc_norm", None)
        self.late_norm = fc_norm if isinstance(vit.norm, nn.Identity) and fc_norm is not None else nn.Identity()
        self.dynamic, self.size = getattr(vit, "dynamic_img_size", False), self.native_size
        self.native = {} if self.dynamic else {
            name: value.clone() for name, value in vit.state_dict().items()
            if "relative_position" in name or name == "pos_embed"}

    def fit(self, images: torch.Tensor) -> None:
        """Prepares a model that has one input size at a time for these images. Raises UserError where an older timm
        cannot."""
        self.grid(images)  # raises ValueError
        size = tuple(images.shape[-2:])
        if self.dynamic or size == self.size:
            return
        if not hasattr(self.vit, "set_input_size"):
            raise UserError(f"timm {timm.__version__} gives this model one input size, {self.native_size}; update timm")
        with torch.inference_mode(False), torch.no_grad():
            # From the native tables each time: resampling a resampled table would lose more with every size.
            self.vit.set_input_size(img_size=self.native_size)
            self.vit.load_state_dict(self.native, strict=False)
            self.vit.set_input_size(img_size=size)
        self.vit.requires_grad_(False)
        self.size = size

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.fit(images)
        tokens = self.late_norm(self.vit.forward_features(images))
        patches = tokens[:, self.vit.num_prefix_tokens:]
        if self.cls_from == "class token":
            first = tokens[:, :1]
        else:
            first = (patches.mean(1) if self.cls_from == "mean" else self.vit.pool(tokens))[:, None]
        return torch.cat([first, patches], dim=1)

    def block_tokens(self, images: torch.Tensor, blocks: Sequence[int], norm: bool) -> list[torch.Tensor]:
        self.fit(images)
        layers = self.vit.forward_intermediates(images, indices=blocks, norm=norm, stop_early=True, output_fmt="NLC",
                                                intermediates_only=True)
        return [self.late_norm(layer) if norm else layer for layer in layers]


def random(name: str, pretrained: bool = False) -> TimmEncoder:
    """timm's model of that name (also hf-hub:OWNER/NAME), untrained or with timm's weights. Raises CheckpointError for
    a name that timm does not have, a model that is no plain ViT, and weights that cannot be downloaded."""
    options = {"pretrained": pretrained, "num_classes": 0}
    try:
        try:
            vit = timm.create_model(name, dynamic_img_size=True, **options)
        except TypeError:
            vit = timm.create_model(name, **options)
    except (OSError, RuntimeError, ValueError, LookupError) as error:
        raise CheckpointError(f"timm/{name} could not be made ({one_line(error)}); check the name and the network, or "
                              "give timm/NAME with --weights PATH") from None
    kind = type(vit).__name__
    if kind not in PLAIN or hasattr(vit.patch_embed, "backbone") or not hasattr(vit.blocks[0], "attn"):
        raise CheckpointError(f"timm/{name}, a {kind}, is not one row of blocks over the patches of an image; --model "
                              "FILE.py:FUNCTION takes any network (README, own encoder)")
    return TimmEncoder(vit)


def from_checkpoint(checkpoint: dict, name: str) -> TimmEncoder:
    """timm's model of that name with the weights of a file, of whose state dictionaries one must fit. Raises
    CheckpointError."""
    vit, fitting, errors = random(name).vit, [], []
    for where, state in state_dicts(checkpoint).items():
        try:
            load_exactly(vit, converted(state, vit))
            fitting.append(where)
        except CheckpointError as error:
            errors.append((where.count("/"), str(error)))
    if len(fitting) > 1:
        raise CheckpointError(f"several of its state dictionaries fit: {', '.join(map(repr, fitting))}; choose one "
                              "with --weights-key")
    if not fitting:
        # What the innermost one lacks is what the user wants to know.
        raise CheckpointError(max(errors, default=(0, "it holds no weights"))[1])
    return TimmEncoder(vit)


def converted(state: Mapping[str, torch.Tensor], vit: nn.Module) -> dict[str, torch.Tensor]:
    """A state dictionary with timm's names of keys and this model's size of the position embedding."""
    # DINOv2's training code saves its blocks in chunks: blocks.0.3. is block 3.
    state = {re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", key): value for key, value in state.items()}
    patch, kernel = vit.patch_embed.patch_size[0], state.get("patch_embed.proj.weight")
    if kernel is not None and kernel.ndim == 4 and kernel.shape[-1] != patch:
        # timm would resample it, to another encoder than the file's.
        raise CheckpointError(f"its patches are {kernel.shape[-1]} pixels wide, those of the model {patch}")
    convert = getattr(sys.modules[type(vit).__module__], "checkpoint_filter_fn", lambda state, model: state)
    state = drop_keys(convert(state, vit), NOT_TOKENS)
    # timm computes these indices; versions differ in whether they count as state.
    return state | {key: value for key, value in vit.state_dict().items() if "relative_position_index" in key}
