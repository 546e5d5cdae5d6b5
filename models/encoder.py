"""A frozen ViT encoder built on timm's VisionTransformer or Beit, and the functions that the method files share.

To use a method in another project, copy its file and this one (for iBOT dino.py too); they import nothing else of ours.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F

# The epsilon of all seven methods.
layer_norm = partial(nn.LayerNorm, eps=1e-6)


class CheckpointError(ValueError):
    """A checkpoint that cannot be used. The message is one line that says what is wrong and how to fix it."""


class Encoder(nn.Module):
    """A frozen ViT that maps images of any size divisible by the patch size to final normalised tokens.

    vit: timm's VisionTransformer or Beit, without classifier. position_embedding: maps (vit, grid height, grid width)
    to the [1, prefix + N, D] that is added to all tokens; None where the method has none. projector: maps class tokens
    [B, D] to [B, P]. mean, std: of the input normalisation, per channel, for values from 0 to 1; default ImageNet's.
    """

    # Source and hash of the weights, set by build_model, and encoder_signature, set by load_encoder.
    weights, sha256, signature = "unknown", None, None
    # What the first of the tokens that forward returns is.
    cls_from = "class token"

    def __init__(self, vit: nn.Module, position_embedding: Callable | None, projector: nn.Module | None = None,
                 mean: Sequence[float] = (0.485, 0.456, 0.406), std: Sequence[float] = (0.229, 0.224, 0.225)):
        super().__init__()
        self.vit, self.projector = vit, projector
        self.position_embedding = position_embedding
        self.patch_size = vit.patch_embed.patch_size[0]
        self.embed_dim = vit.embed_dim
        self.depth = len(vit.blocks)
        self.num_heads = vit.blocks[0].attn.num_heads
        self.native_size = tuple(vit.patch_embed.img_size)
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)
        # Images may have any size that grid accepts.
        vit.patch_embed.strict_img_size = False
        self.eval().requires_grad_(False)

    @property
    def has_projector(self) -> bool:
        return self.projector is not None

    def train(self, mode: bool = True) -> "Encoder":
        """Stays in evaluation mode, also when a parent module's train() is called."""
        return super().train(False)

    def preprocess(self, images: torch.Tensor) -> torch.Tensor:
        """[B, 3, H, W] uint8 -> float32, normalised as in the encoder's training. Raises TypeError for other types."""
        if images.dtype != torch.uint8:
            raise TypeError("preprocess takes a tensor of uint8, images with values from 0 to 255, not "
                            f"{type(images).__name__} of {images.dtype}")
        return (images.float() / 255 - self.mean) / self.std

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        """[B, 3, H, W] -> tokens before the first block, [B, prefix + N, D]."""
        grid = self.grid(images)
        patches = self.vit.patch_embed(images)
        # DeiT's distillation token is held in timm's register token.
        prefix = [token for token in (self.vit.cls_token, getattr(self.vit, "reg_token", None)) if token is not None]
        tokens = torch.cat([*(token.expand(len(images), -1, -1) for token in prefix), patches], dim=1)
        if self.position_embedding is None:
            return tokens
        return tokens + self.position_embedding(self.vit, *grid)

    def block_options(self, height: int, width: int) -> dict:
        """Keyword arguments of every block, for a grid of height x width patches."""
        return {}

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """[B, 3, H, W] -> final normalised tokens [B, 1 + N, D], class token first, patches row by row."""
        tokens, options = self.embed(images), self.block_options(*self.grid(images))
        for block in self.vit.blocks:
            tokens = block(tokens, **options)
        tokens, prefix = self.vit.norm(tokens), self.vit.num_prefix_tokens
        return tokens if prefix == 1 else torch.cat([tokens[:, :1], tokens[:, prefix:]], dim=1)

    def extract(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """[B, 3, H, W] -> {"cls": [B, D], "avg": [B, D], "projected": [B, P] where there is a projector}, float32.

        avg is the mean of the patch tokens. The projector runs in float32 even under autocast: it costs little.
        """
        tokens = self(images).float()
        # A copy: a view would keep all tokens of the batch in memory as long as the class tokens.
        features = {"cls": tokens[:, 0].clone(), "avg": tokens[:, 1:].mean(1)}
        if self.has_projector:
            with torch.autocast(images.device.type, enabled=False):
                features["projected"] = self.projector(features["cls"])
        return features

    def get_intermediate_layers(self, images: torch.Tensor, n: Sequence[int] = (3, 5, 7, 11), reshape: bool = True,
                                norm: bool = False) -> list[torch.Tensor]:
        """Patch tokens after the 0-based blocks n, class token dropped: a list of [B, D, H/p, W/p], or [B, N, D] where
        reshape is False. norm: apply the encoder's final norm. Blocks after the last one in n are not computed."""
        blocks, grid = sorted(set(n)), self.grid(images)
        layers = self.block_tokens(images, blocks, norm)
        if reshape:
            layers = [layer.transpose(1, 2).unflatten(2, grid) for layer in layers]
        return [layers[blocks.index(index)] for index in n]

    def block_tokens(self, images: torch.Tensor, blocks: Sequence[int], norm: bool) -> Sequence[torch.Tensor]:
        """What get_intermediate_layers gives, for ascending blocks, as [B, N, D]."""
        tokens, options, layers = self.embed(images), self.block_options(*self.grid(images)), []
        for index in range(blocks[-1] + 1):
            tokens = self.vit.blocks[index](tokens, **options)
            if index in blocks:
                layers.append((self.vit.norm(tokens) if norm else tokens)[:, self.vit.num_prefix_tokens:])
        return layers

    def grid(self, images: torch.Tensor) -> tuple[int, int]:
        """Rows and columns of patches of images [B, 3, H, W]. Raises ValueError where the patch does not divide."""
        height, width = images.shape[-2:]
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(f"image size {height} x {width} is not divisible by the patch size {self.patch_size}")
        return height // self.patch_size, width // self.patch_size


@torch.no_grad()
def encoder_signature(encoder: Encoder) -> torch.Tensor:
    """What an encoder makes of one fixed image: 256 values of its final tokens, float32, on the CPU, picked evenly from
    all tokens and channels. The same encoder gives the same values, to rounding, on every machine; other weights,
    another number of heads, mean or order of patches give others."""
    colours = torch.randint(256, (1, 3, 32, 32), generator=torch.Generator().manual_seed(0))
    image = F.interpolate(colours.to(encoder.mean.device, torch.uint8), size=encoder.native_size, mode="nearest")
    tokens = encoder(encoder.preprocess(image)).flatten()
    picked = torch.arange(256, device=tokens.device) * (len(tokens) - 1) // 255
    return tokens[picked].float().cpu()


def num_blocks(state: Mapping[str, torch.Tensor], prefix: str = "blocks.") -> int:
    """Of how many blocks, numbered after the prefix, there are keys."""
    return len({key.split(".")[0] for key in take_prefix(state, prefix)})


def take_prefix(state: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """The entries whose key starts with the prefix, with the prefix removed."""
    return {key[len(prefix):]: value for key, value in state.items() if key.startswith(prefix)}


def drop_keys(state: Mapping[str, torch.Tensor], pattern: str) -> dict[str, torch.Tensor]:
    """The entries whose whole key does not match the pattern."""
    return {key: value for key, value in state.items() if not re.fullmatch(pattern, key)}


def unwrap(checkpoint: Mapping, key: str = "", prefix: str = "", others: str = ".*") -> dict[str, torch.Tensor]:
    """A checkpoint's state dictionary, which lies under the key if one is given: the entries with the prefix, which is
    removed. others: a pattern of the keys that may be left out. Raises CheckpointError."""
    state = checkpoint.get(key) if key else checkpoint
    if not isinstance(state, Mapping) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise CheckpointError(f"expected a dictionary of tensors{f' under {key!r}' if key else ''}; it has "
                              f"{first_few([str(name) for name in checkpoint])}")
    if unexpected := [name for name in drop_keys(state, others) if not name.startswith(prefix)]:
        raise CheckpointError(f"unexpected keys: {first_few(unexpected)}")
    if not (found := take_prefix(state, prefix)):
        raise CheckpointError(f"no key starts with {prefix!r}")
    return found


def first_few(keys: Sequence[str]) -> str:
    """"a, b, c and 4 more"."""
    return ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")


def load_exactly(module: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """load_state_dict. Raises CheckpointError that lists missing, unexpected and wrongly shaped keys."""
    wanted = module.state_dict()
    problems = {
        "missing keys": [key for key in wanted if key not in state],
        "unexpected keys": [key for key in state if key not in wanted],
        "wrong shapes": [f"{key} {list(state[key].shape)} for {list(value.shape)}" for key, value in wanted.items()
                         if key in state and state[key].shape != value.shape],
    }
    if any(problems.values()):
        raise CheckpointError("; ".join(f"{what}: {first_few(keys)}" for what, keys in problems.items() if keys))
    module.load_state_dict(state)


def vit_shape(state: Mapping[str, torch.Tensor], num_heads: int | None) -> dict:
    """Width, depth, patch size, MLP ratio and heads of a ViT's state dictionary, as timm names them.

    num_heads: width / 64 unless given. Raises CheckpointError; KeyError for a key that is missing.
    """
    width = state["cls_token"].shape[-1]
    if num_heads is None and width % 64:
        raise CheckpointError(f"width {width} is not a multiple of 64, so the number of heads is unknown; "
                              "give --num-heads")
    return {
        "embed_dim": width,
        "depth": num_blocks(state),
        "patch_size": state["patch_embed.proj.weight"].shape[-1],
        "mlp_ratio": len(state["blocks.0.mlp.fc1.weight"]) / width,
        "num_heads": num_heads or width // 64,
    }


# timm is imported where a model is made: it takes longer than all else that a script's --help needs.
def plain_vit(state: Mapping[str, torch.Tensor], num_heads: int | None) -> nn.Module:
    """timm's VisionTransformer with the weights of an official file of DeiT, MoCo v3, DINO, MAE or iBOT: one qkv bias,
    no LayerScale, LayerNorm epsilon 1e-6, position embedding with a class-token row."""
    from timm.models.vision_transformer import VisionTransformer
    shape, prefix = vit_shape(state, num_heads), 1 + ("reg_token" in state)
    grid = math.isqrt(state["pos_embed"].shape[1] - prefix)
    vit = VisionTransformer(img_size=grid * shape["patch_size"], num_classes=0, reg_tokens=prefix - 1,
                            weight_init="skip", norm_layer=layer_norm, **shape)
    load_exactly(vit, state)
    return vit


def beit_vit(state: Mapping[str, torch.Tensor], num_heads: int | None) -> nn.Module:
    """timm's Beit with the weights of an official file of BEiT or CAE: biases on query and value but not key,
    LayerScale where the file has it, and one relative position bias for all blocks or an absolute embedding."""
    from timm.models.beit import Beit
    shape, table = vit_shape(state, num_heads), state.get("rel_pos_bias.relative_position_bias_table")
    grid = math.isqrt(state["pos_embed"].shape[1] - 1) if table is None else (math.isqrt(len(table) - 3) + 1) // 2
    vit = Beit(img_size=grid * shape["patch_size"], num_classes=0, global_pool="", norm_layer=layer_norm,
               init_values=1.0 if "blocks.0.gamma_1" in state else None, use_abs_pos_emb=table is None,
               use_shared_rel_pos_bias=table is not None, **shape)
    # timm computes the index from the grid; its older versions have it in the state dictionary.
    index = {key: value for key, value in vit.state_dict().items() if key.endswith("relative_position_index")}
    load_exactly(vit, state | index)
    return vit


def random_vit() -> nn.Module:
    """timm's VisionTransformer, an untrained ViT-B/16 with its initialisation."""
    from timm.models.vision_transformer import VisionTransformer
    return VisionTransformer(num_classes=0, norm_layer=layer_norm)


def sincos_positions(grid: int, width: int) -> torch.Tensor:
    """A fixed 2-d sine-cosine position embedding with class row 0, [1, 1 + grid * grid, width], for untrained encoders.
    Trained ones read theirs from the file: the order of sines, cosines and axes differs between methods."""
    from timm.layers import build_sincos2d_pos_embed
    table = build_sincos2d_pos_embed([grid, grid], width)
    return torch.cat([torch.zeros(1, 1, width), table[None]], dim=1)


def bicubic_to_size(vit: nn.Module, height: int, width: int, **target) -> torch.Tensor:
    """Position embedding at another grid: bicubic to the target size, align_corners False, no antialiasing; class and
    distillation rows unchanged. As the study's segmentation code does for DeiT, MoCo v3, MAE and CAE. target: keyword
    arguments of F.interpolate in place of size."""
    native, prefix = vit.patch_embed.grid_size, vit.num_prefix_tokens
    if (height, width) == native:
        return vit.pos_embed
    table = vit.pos_embed[:, prefix:].unflatten(1, native).permute(0, 3, 1, 2).float()
    table = F.interpolate(table, mode="bicubic", align_corners=False, **(target or {"size": (height, width)}))
    return torch.cat([vit.pos_embed[:, :prefix], table.flatten(2).transpose(1, 2)], dim=1)


def bicubic_by_scale(vit: nn.Module, height: int, width: int) -> torch.Tensor:
    """Position embedding at another grid: bicubic by the scale factor (n + 0.1) / native, whose sample points differ
    slightly from a resize to n (facebookresearch/dino, interpolate_pos_encoding). For DINO and iBOT."""
    native = vit.patch_embed.grid_size[0]
    return bicubic_to_size(vit, height, width, scale_factor=((height + 0.1) / native, (width + 0.1) / native))
