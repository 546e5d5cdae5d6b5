"""CAE (Chen et al., IJCV 2024), masked image modelling. Official files: under `model`, the encoder at `encoder.*`.

The rest of the file (alignment encoder, regressor, decoder, their position embeddings) is for pre-training only.
Biases on query and value but not key, LayerScale, fixed sine-cosine position embedding.
"""

from timm.models.beit import Beit

from .encoder import Encoder, beit_vit, bicubic_to_size, layer_norm, sincos_positions, unwrap

NESTING = "model"  # of the weights in the backbone file
OFFICIAL = {
    "backbone": {"file": "cae_base_1600ep.pth",
                 "where": "https://drive.google.com/drive/folders/1wwhg7nj2GQuU9uthVuQLkEEXEjx90G7g"},
}
PRETRAINING = r"(alignment_encoder|regresser|decoder|pretext_neck)\..*|mask_token|rd_pos_embed"


def from_checkpoint(checkpoint: dict, num_heads: int | None = None) -> Encoder:
    """Content of an official file -> Encoder. Raises CheckpointError."""
    state = unwrap(checkpoint, "model", "encoder.", PRETRAINING)
    return Encoder(beit_vit(state, num_heads), bicubic_to_size)


def random() -> Encoder:
    """An untrained ViT-B/16 of CAE's architecture."""
    vit = Beit(num_classes=0, global_pool="", init_values=0.1, norm_layer=layer_norm)
    vit.pos_embed.data = sincos_positions(14, 768)
    return Encoder(vit, bicubic_to_size)
