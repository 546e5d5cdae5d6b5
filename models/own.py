"""A network of the user's own as an encoder: --model path/to/file.py:function, where function(weights) -> nn.Module.

Its forward maps normalised images [B, 3, H, W] to one of

    [B, 1 + N, D]   final tokens, class token first, patches row by row;
    [B, N, D]       the same without class token, where its attribute class_token is False;
    [B, D, h, w]    a feature map, whose cells are the patches.

The mean of the patches stands for a class token that is not there. Attributes it may have: patch_size (else read from
the output for an image of 224 x 224), mean and std of its input (else ImageNet's), num_heads (else D / 64, of the
attentive probe), and for its layers blocks, or depth and a get_intermediate_layers as in models/encoder.py; without
them its output is its one layer.
"""

import argparse
import importlib.util
import math
import os
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn

from .checkpoints import file_hash, one_line
from .encoder import CheckpointError, Encoder


class OwnEncoder(Encoder):
    """The interface of Encoder around any module. Raises CheckpointError where its output is not as promised."""

    def __init__(self, network: nn.Module):
        nn.Module.__init__(self)
        # Where build_model's own encoders are, whatever the function did.
        self.network, self.projector = network.to("cpu", torch.float32), None
        for name, default in (("mean", (0.485, 0.456, 0.406)), ("std", (0.229, 0.224, 0.225))):
            values = torch.as_tensor(getattr(network, name, default), dtype=torch.float32)
            self.register_buffer(name, values.view(1, 3, 1, 1), persistent=False)
        self.eval().requires_grad_(False)
        patch = getattr(network, "patch_size", None)
        side = 14 * patch if patch and 224 % patch else 224
        self.native_size = (side, side)
        shape = network(torch.zeros(1, 3, side, side)).shape
        is_map = len(shape) == 4
        if is_map or not getattr(network, "class_token", True):
            self.cls_from = "mean"
        count = math.prod(shape[2:]) if is_map else shape[1] - (self.cls_from == "class token")
        grid = math.isqrt(count)
        self.patch_size = patch or side // max(grid, 1)
        if len(shape) not in (3, 4) or grid * self.patch_size != side or grid**2 != count:
            raise CheckpointError(f"for an image of {side} x {side} its forward gives {list(shape)}; expected tokens "
                                  "[1, 1 + N, D] of N square patches (class_token = False: [1, N, D]; patch_size = P "
                                  "where it is not plain) or a map [1, D, h, h]")
        self.embed_dim = shape[1 if is_map else 2]
        self.num_heads = getattr(network, "num_heads", max(1, self.embed_dim // 64))
        depth = 0 if is_map else len(getattr(network, "blocks", ()))
        if hasattr(network, "get_intermediate_layers"):
            depth = getattr(network, "depth", depth)
        self.has_layers, self.depth = depth > 0, max(depth, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        tokens = self.network(images)
        if tokens.ndim == 4:
            tokens = tokens.flatten(2).mT
        return tokens if self.cls_from == "class token" else torch.cat([tokens.mean(1, keepdim=True), tokens], dim=1)

    def block_tokens(self, images: torch.Tensor, blocks: Sequence[int], norm: bool) -> Sequence[torch.Tensor]:
        """From the network's own get_intermediate_layers, or by hooks on its blocks, whose last N tokens are the
        patches'; norm then needs its attribute norm. Without either, its output."""
        if not self.has_layers:
            return [self(images)[:, 1:]]
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
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    try:
        # What open_checkpoint allows in a file, the function may open with weights_only=True too.
        with torch.serialization.safe_globals([argparse.Namespace]):
            spec.loader.exec_module(module)
            encoder = OwnEncoder(getattr(module, function)(weights))
    except Exception as error:  # whatever the user's code raises
        raise CheckpointError(f"--model {name}: {one_line(error)}") from error
    encoder.weights = weights
    encoder.sha256 = file_hash(Path(weights if os.path.isfile(weights) else path))
    return encoder
