"""Any ViT of timm with a class token, as --model timm/NAME."""

from collections.abc import Sequence

import timm
import torch
import torch.nn as nn

from .encoder import CheckpointError, Encoder, load_exactly


class TimmEncoder(Encoder):
    """timm's own embedding and position resampling; tokens that are neither class nor patch are left out."""

    def __init__(self, vit: nn.Module):
        super().__init__(vit, None, mean=vit.default_cfg["mean"], std=vit.default_cfg["std"])

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError("a timm model embeds its input itself")

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.grid(images)
        return self._drop_extra_tokens(self.vit.forward_features(images))

    def get_intermediate_layers(self, images: torch.Tensor, n: Sequence[int] = (3, 5, 7, 11), reshape: bool = True,
                                norm: bool = False) -> list[torch.Tensor]:
        if not all(0 <= index < self.depth for index in n):
            raise IndexError(f"blocks {list(n)} were asked for; this encoder has blocks 0 to {self.depth - 1}")
        self.grid(images)
        layers = self.vit.forward_intermediates(images, indices=sorted(set(n)), norm=norm, stop_early=True,
                                                output_fmt="NCHW" if reshape else "NLC", intermediates_only=True)
        layers = dict(zip(sorted(set(n)), layers, strict=True))
        return [layers[index] for index in n]


def random(name: str) -> TimmEncoder:
    """timm's model of that name, untrained. Raises CheckpointError for a name that timm does not have and for a model
    that is not a ViT with a class token."""
    return _build(name, pretrained=False)


def pretrained(name: str) -> TimmEncoder:
    """timm's model of that name with timm's weights, downloaded by timm. Raises CheckpointError."""
    return _build(name, pretrained=True)


def from_checkpoint(checkpoint: dict, name: str, num_heads: int | None = None) -> TimmEncoder:
    """timm's model of that name with the weights of a file, flat or under `state_dict` or `model`. The number of heads
    is timm's. Raises CheckpointError."""
    encoder = _build(name, pretrained=False)
    if num_heads not in (None, encoder.num_heads):
        raise CheckpointError(f"timm/{name} has {encoder.num_heads} heads; leave --num-heads out")
    for nesting in ("state_dict", "model"):
        checkpoint = checkpoint.get(nesting, checkpoint)
    load_exactly(encoder.vit, {key: value for key, value in checkpoint.items() if not key.startswith("head.")})
    return encoder


def _build(name: str, pretrained: bool) -> TimmEncoder:
    if not timm.is_model(name):
        near = timm.list_models(f"*{name.split('_')[0]}*{name.split('_')[-1]}*")[:3]
        raise CheckpointError(f"timm has no model {name!r}" + (f"; near it: {', '.join(near)}" if near else ""))
    try:
        vit = timm.create_model(name, pretrained=pretrained, num_classes=0, dynamic_img_size=True)
    except TypeError:
        raise CheckpointError(f"timm/{name} is not a plain ViT: it does not take images of every size") from None
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"the weights of timm/{name} could not be had ({str(error).splitlines()[0]}); "
                              "check the network, or give --weights PATH") from None
    if not getattr(vit, "has_class_token", False) or not hasattr(vit, "blocks"):
        raise CheckpointError(f"timm/{name} is not a ViT with a class token")
    return TimmEncoder(vit)
