"""MAE (He et al., CVPR 2022), masked image modelling. Official files: facebookresearch/mae, weights under `model`.

The base file holds the encoder; the full file (mae_pretrain_vit_base_full.pth, or mae_visualize_vit_base.pth) also
holds the decoder. Fixed sine-cosine position embedding, from the file.
"""

import torch
import torch.nn as nn
from timm.models.vision_transformer import Block

from .encoder import (
    Encoder,
    bicubic_to_size,
    drop_keys,
    layer_norm,
    load_exactly,
    num_blocks,
    plain_vit,
    random_vit,
    sincos_positions,
    unwrap,
)

NESTING = "model"  # of the weights in the backbone file
OFFICIAL = {
    "backbone": {"url": "https://dl.fbaipublicfiles.com/mae/pretrain/mae_pretrain_vit_base.pth", "md5": "8cad7c"},
    "full": {"url": "https://dl.fbaipublicfiles.com/mae/pretrain/mae_pretrain_vit_base_full.pth"},
}
DECODER = r"mask_token|decoder_.*"


class Decoder(nn.Module):
    """MAE's decoder: latent and ids_restore, as MAEEncoder.encode_visible gives them at the native size -> predicted
    patches [B, N, p * p * 3], pixels row by row, channels last."""

    def __init__(self, encoder_dim: int, grid: int, patch_size: int, width: int = 512, depth: int = 8,
                 num_heads: int = 16):
        super().__init__()
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.decoder_pos_embed = nn.Parameter(torch.zeros(1, 1 + grid * grid, width))
        self.decoder_embed = nn.Linear(encoder_dim, width)
        self.decoder_blocks = nn.ModuleList(
            Block(width, num_heads, mlp_ratio=4, qkv_bias=True, norm_layer=layer_norm) for _ in range(depth))
        self.decoder_norm = layer_norm(width)
        self.decoder_pred = nn.Linear(width, patch_size**2 * 3)

    def forward(self, latent: torch.Tensor, ids_restore: torch.Tensor) -> torch.Tensor:
        tokens = self.decoder_embed(latent)
        masked = self.mask_token.expand(len(tokens), ids_restore.shape[1] + 1 - tokens.shape[1], -1)
        patches = torch.cat([tokens[:, 1:], masked.to(tokens.dtype)], dim=1)
        patches = patches.gather(1, ids_restore[..., None].expand(-1, -1, patches.shape[2]))
        tokens = torch.cat([tokens[:, :1], patches], dim=1) + self.decoder_pos_embed
        for block in self.decoder_blocks:
            tokens = block(tokens)
        return self.decoder_pred(self.decoder_norm(tokens))[:, 1:]


class MAEEncoder(Encoder):
    """MAE's encoder with masking and, where the file has one, its decoder.

    shuffle_patches: a defect of the authors' code (README, differences): the patch tokens of every image are permuted
    at random before the position embedding is added, in every batch by the same orders.
    """

    def __init__(self, vit: nn.Module, decoder: Decoder | None = None, shuffle_patches: bool = False):
        super().__init__(vit, bicubic_to_size)
        self.decoder, self.shuffle_patches = decoder, shuffle_patches
        self.eval().requires_grad_(False)

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        tokens = super().embed(images)
        if not self.shuffle_patches:
            return tokens
        positions = self.position_embedding(self.vit, *self.grid(images))[:, 1:]
        drawn = torch.rand(len(tokens), positions.shape[1], generator=torch.Generator().manual_seed(0))
        order = drawn.argsort(dim=1).to(tokens.device)
        patches = tokens[:, 1:] - positions
        patches = patches.gather(1, order[..., None].expand_as(patches)) + positions
        return torch.cat([tokens[:, :1], patches], dim=1)

    def encode_visible(self, images: torch.Tensor, noise: torch.Tensor, mask_ratio: float = 0.75,
                       ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Encodes the int(N (1 - mask_ratio)) patches with the smallest noise [B, N] (facebookresearch/mae,
        models_mae.py). Returns latent [B, 1 + visible, D] (normalised, class token first, patches by ascending noise),
        mask [B, N] (1 = hidden) and ids_restore [B, N], the rank of every patch's noise."""
        tokens = self.embed(images)
        visible = int(noise.shape[1] * (1 - mask_ratio))
        order = noise.argsort(dim=1)
        ids_restore = order.argsort(dim=1)
        kept = tokens[:, 1:].gather(1, order[:, :visible, None].expand(-1, -1, tokens.shape[2]))
        tokens = torch.cat([tokens[:, :1], kept], dim=1)
        for block in self.vit.blocks:
            tokens = block(tokens)
        return self.vit.norm(tokens), (ids_restore >= visible).float(), ids_restore


def from_checkpoint(checkpoint: dict, num_heads: int | None = None, decoder_num_heads: int | None = None,
                    shuffle_patches: bool = False) -> MAEEncoder:
    """Content of an official file, base or full -> MAEEncoder. ViT-H/14 has 16 heads, not width / 64: give num_heads.
    decoder_num_heads: default 16 at width 512, as in all official decoders, else heads half as wide as the encoder's.
    Raises CheckpointError."""
    state = unwrap(checkpoint, "model")
    encoder_state = drop_keys(state, DECODER)
    vit = plain_vit(encoder_state, num_heads)
    if "decoder_embed.weight" not in state:
        return MAEEncoder(vit, None, shuffle_patches)
    width = state["decoder_embed.weight"].shape[0]
    depth = num_blocks(state, "decoder_blocks.")
    decoder_num_heads = decoder_num_heads or (16 if width == 512 else 2 * width // vit.blocks[0].attn.head_dim)
    embed = vit.patch_embed
    decoder = Decoder(vit.embed_dim, embed.grid_size[0], embed.patch_size[0], width, depth, decoder_num_heads)
    load_exactly(decoder, {key: value for key, value in state.items() if key not in encoder_state})
    return MAEEncoder(vit, decoder, shuffle_patches)


def random(shuffle_patches: bool = False) -> MAEEncoder:
    """An untrained ViT-B/16 with MAE's decoder and sine-cosine position embeddings."""
    vit = random_vit()
    vit.pos_embed.data = sincos_positions(14, 768)
    decoder = Decoder(768, 14, 16)
    nn.init.normal_(decoder.mask_token, std=0.02)
    decoder.decoder_pos_embed.data = sincos_positions(14, 512)
    return MAEEncoder(vit, decoder, shuffle_patches)
