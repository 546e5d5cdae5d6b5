"""A network of the user's own as an encoder: --model path/to/file.py:function, where function(weights) -> nn.Module.

Its forward maps normalised images [B, 3, H, W] to final tokens [B, 1 + N, D], class token first, patches row by row; or
to [B, N, D] where its attribute class_token is False, and their mean then replaces the class token. Attributes it may
have: patch_size (else 224 / sqrt(N)), mean and std of its input (else ImageNet's), num_heads (else D / 64, of the
attentive probe), and for its layers blocks, or depth and a get_intermediate_layers as in models/encoder.py.
"""

import importlib.util
import math
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn

from utils import UserError

from .encoder import CheckpointError, Encoder


class OwnEncoder(Encoder):
    """The interface of Encoder around any module. Raises CheckpointError where its tokens are not as promised."""

    def __init__(self, network: nn.Module):
        nn.Module.__init__(self)
        # Where build_model's own encoders are, whatever the function did.
        self.network, self.projector = network.to("cpu", torch.float32), None
        for name, default in (("mean", (0.485, 0.456, 0.406)), ("std", (0.229, 0.224, 0.225))):
            values = torch.as_tensor(getattr(network, name, default), dtype=torch.float32)
            self.register_buffer(name, values.view(1, 3, 1, 1), persistent=False)
        if not getattr(network, "class_token", True):
            self.cls_from = "mean"
        self.position_embedding = None
        self.eval().requires_grad_(False)
        patch = getattr(network, "patch_size", None)
        if not isinstance(patch, int | None):
            raise CheckpointError(f"its patch_size is {patch!r}; it must be one whole number, the side of a patch")
        side = 14 * patch if patch and 224 % patch else 224
        tokens = network(torch.zeros(1, 3, side, side))
        shape, prefix = tuple(getattr(tokens, "shape", ())), int(self.cls_from == "class token")
        grid = math.isqrt(max(shape[1] - prefix, 0)) if len(shape) == 3 else 0
        self.patch_size = patch or side // max(grid, 1)
        if shape[:2] != (1, prefix + grid**2) or grid * self.patch_size != side:
            given, wanted = shape or type(tokens).__name__, "[1, 1 + N, D]" if prefix else "[1, N, D]"
            raise CheckpointError(f"for an image of {side} x {side} its forward gives {given}; expected tokens "
                                  f"{wanted} of N square patches (class_token = False without a class token, "
                                  "patch_size = P where it is not plain)")
        self.embed_dim = shape[2]
        self.num_heads = getattr(network, "num_heads", max(1, self.embed_dim // 64))
        if hasattr(network, "num_heads"):
            self.heads_from = "its attribute num_heads"
        self.depth = getattr(network, "depth", len(getattr(network, "blocks", ())))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        height, width = self.grid(images)
        tokens = self.network(images)
        if self.cls_from == "mean":
            tokens = torch.cat([tokens.mean(1, keepdim=True), tokens], dim=1)
        if tokens.shape[1] != 1 + height * width:
            raise UserError(f"the network gives {tokens.shape[1]} tokens for {height} x {width} patches and a "
                            "class token; register tokens must be left out")
        return tokens

    def block_tokens(self, images: torch.Tensor, blocks: Sequence[int], norm: bool) -> Sequence[torch.Tensor]:
        """From the network's own get_intermediate_layers, or by hooks on its blocks, whose last N tokens are the
        patches'; norm then needs its attribute norm."""
        if hasattr(self.network, "get_intermediate_layers"):
            return self.network.get_intermediate_layers(images, n=blocks, reshape=False, norm=norm)
        (height, width), found = self.grid(images), {}

        def keep(index, module, inputs, output):
            found[index] = (output[0] if isinstance(output, tuple) else output)[:, -height * width:]

        with ExitStack() as hooks:
            for index in blocks:
                hooks.enter_context(self.network.blocks[index].register_forward_hook(partial(keep, index)))
            self.network(images)
        return [self.network.norm(found[index]) if norm else found[index] for index in blocks]


def load_own(name: str, weights: str) -> OwnEncoder:
    """name: path/to/file.py:function. Raises CheckpointError for any error of that file."""
    path, _, function = name.rpartition(":")
    if not Path(path).is_file():
        raise CheckpointError(f"--model {name}: {path} does not exist")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        network = getattr(module, function)(weights)
        if isinstance(network, nn.Module):
            return OwnEncoder(network)
    except CheckpointError as error:
        raise CheckpointError(f"--model {name}: {error}") from None
    except (Exception, SystemExit) as error:  # whatever the user's code raises
        raise CheckpointError(f"--model {name}: {type(error).__name__}: {error}") from error
    raise CheckpointError(f"--model {name}: {function} returned a {type(network).__name__}, not an nn.Module")
