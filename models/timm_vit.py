"""Any plain ViT of timm, as --model timm/NAME: VisionTransformer, Eva and Beit, with or without class token."""

import difflib
import os
import socket
import sys
from collections.abc import Sequence
from functools import partial
from urllib.parse import urlsplit
from urllib.request import getproxies

import huggingface_hub
import timm
import torch
import torch.nn as nn

from utils import UserError

from .checkpoints import find_state
from .encoder import CheckpointError, Encoder, drop_keys, load_exactly

# What the file of a whole model holds beside what gives tokens.
NOT_TOKENS = (r"(head|head_dist|lm_head|fc|classifier|projector|decoder|predictor)[._].*|mask_token|"
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
        self.dynamic = getattr(vit, "dynamic_img_size", False)
        self.native = {name: value.clone() for name, value in vit.state_dict().items()
                       if "relative_position" in name or name == "pos_embed"} if not self.dynamic else {}
        self.native_size = self.size = tuple(vit.patch_embed.img_size)

    def fit(self, images: torch.Tensor) -> None:
        """Prepares the model for these images: weights in autocast's type, and the size, where it has one at a time.
        Raises UserError where an older timm cannot change it."""
        size = tuple(images.shape[-2:])
        self.grid(images)  # raises ValueError
        self.cast_weights(images.device)
        if self.dynamic or size == self.size:
            return
        if not hasattr(self.vit, "set_input_size"):
            raise UserError(f"timm {timm.__version__} gives this model one input size, {self.native_size}; "
                            "update timm, or use that size")
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
    """timm's model of that name, untrained or with timm's weights. Raises CheckpointError for a name that timm does not
    have, a model that is no plain ViT, and weights that cannot be downloaded."""
    if ":" not in name and not timm.is_model(name):  # hf-hub:OWNER/NAME is timm's to read
        raise CheckpointError(f"timm has no model {name!r}{suggestion(name)}")
    if downloads := pretrained or ":" in name:
        stop_retries_without_network()
    options = {"pretrained": pretrained, "num_classes": 0}
    try:
        try:
            vit = timm.create_model(name, dynamic_img_size=True, **options)
        except TypeError:
            vit = timm.create_model(name, **options)
    except (OSError, RuntimeError, ValueError, LookupError) as error:
        if not downloads:
            raise
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"timm/{name} could not be downloaded ({why}); check the network and the name, or give "
                              "timm/NAME with --weights PATH") from None
    if reason := why_not_plain(vit):
        raise CheckpointError(f"timm/{name} is not a plain ViT: {reason}")
    return TimmEncoder(vit)


pretrained = partial(random, pretrained=True)


def stop_retries_without_network() -> None:
    """Leaves huggingface_hub only its cache where its server is not reached: it would try for a minute."""
    server = urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    try:
        if not getproxies():
            socket.create_connection((server.hostname, server.port or 443), timeout=5).close()
    except OSError:
        huggingface_hub.constants.HF_HUB_OFFLINE = True


def from_checkpoint(checkpoint: dict, name: str, weights_key: str | None = None) -> TimmEncoder:
    """timm's model of that name with the weights of a file, which timm converts (key names, size of the position
    embedding). weights_key: which of several state dictionaries. Raises CheckpointError."""
    vit = random(name).vit
    convert = getattr(sys.modules[type(vit).__module__], "checkpoint_filter_fn", lambda state, model: state)

    def load(state):
        state = drop_keys(convert(dict(state), vit), NOT_TOKENS)
        # timm computes these indices; versions differ in whether they count as state.
        state |= {key: value for key, value in vit.state_dict().items() if "relative_position_index" in key}
        load_exactly(vit, state)

    find_state(checkpoint, load, weights_key)
    return TimmEncoder(vit)


def why_not_plain(vit: nn.Module) -> str:
    """What keeps a model of timm from being an encoder here; "" for a plain ViT."""
    kind = type(vit).__name__
    if kind == "NaFlexVit":
        return "it takes lists of patches, not images of one size"
    if kind not in ("VisionTransformer", "VisionTransformerDistilled", "Eva", "Beit"):
        return f"a {kind}, not a VisionTransformer, Eva or Beit, is not one row of blocks over patch tokens"
    if hasattr(vit.patch_embed, "backbone"):
        return "a convolutional network stands before its blocks"
    return "" if hasattr(vit.blocks[0], "attn") else f"its blocks are of the kind {type(vit.blocks[0]).__name__}"


def suggestion(name: str, others: Sequence[str] = ()) -> str:
    """"; did you mean ..." with similar names of timm or others; "" where there is none."""
    known = [*others, *(f"timm/{one}" for one in timm.list_models("*vit*") + timm.list_models("*beit*"))]
    # Small models first.
    within = sorted((one for one in known if name in one), key=lambda one: ("small" not in one, len(one)))[:3]
    near = within or difflib.get_close_matches(name, others, 1) or difflib.get_close_matches(f"timm/{name}", known, 3)
    return f"; did you mean {', '.join(near)}?" if near else ""
