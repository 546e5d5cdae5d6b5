"""Attention distance and receptive fields: exact weights, sums in float64, Jacobians, figures however it is run."""

import json
import math
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from timm.models.beit import Attention as BeitAttention
from timm.models.vision_transformer import Attention

from models import METHODS, attention, build_model
from models.attention import Sums, radius_holding, read_attention
from utils import UserError

GOLDEN = Path(__file__).parent / "golden"
FORMS = [(path.parent.name, path.stem) for path in sorted(GOLDEN.glob("*/checkpoint*.pth"))]
assert {method for method, _ in FORMS} == set(METHODS)
CPU = torch.device("cpu")
RATIOS = [0.0, 0.25, 0.5, 0.75, 0.9]


def build(method, form="checkpoint"):
    return build_model(method, str(GOLDEN / method / f"{form}.pth"), num_heads=3)


def images(size=64, count=3):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def seeded(*shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(2))


def relative_error(ours, theirs):
    return float((ours.double() - theirs.double()).detach().norm() / theirs.double().detach().norm())


def check_weights(blocks, forward):
    """The weights of every layer: rows sum to 1, and with the values they give what the module gives by fused
    attention. Returns them."""
    calls, layers = [], []
    hooks = [block.attn.register_forward_hook(lambda *call: calls.append(call)) for block in blocks]
    forward()
    for hook in hooks:
        hook.remove()
    with read_attention(blocks, lambda *weights: layers.append(weights)):
        forward()
    assert [layer for layer, _ in layers] == list(range(len(blocks)))
    assert all(block.attn.fused_attn and not block.attn.attn_drop._forward_hooks for block in blocks)
    for (attn, (tokens, *_), output), (_, weights) in zip(calls, layers, strict=True):
        assert weights.dtype == torch.float32 and weights.shape == (len(tokens), attn.num_heads, *tokens.shape[1:2] * 2)
        assert (weights.sum(-1) - 1).abs().max() < 1e-5
        value = attn.qkv(tokens)[..., -attn.proj.in_features:]
        if getattr(attn, "v_bias", None) is not None:
            value = value + attn.v_bias
        value = value.unflatten(2, (attn.num_heads, -1)).transpose(1, 2)
        mixed = (weights @ value).transpose(1, 2).flatten(2)
        assert relative_error(attn.proj(attn.norm(mixed) if hasattr(attn, "norm") else mixed), output) < 1e-5
    return [weights for _, weights in layers]


@pytest.mark.parametrize("method, form", FORMS)
def test_weights_reproduce_the_modules_output(method, form):
    encoder = build(method, form)
    check_weights(encoder.vit.blocks, lambda: encoder(images()))
    check_weights(encoder.vit.blocks, lambda: encoder(images(96, count=2)))


@pytest.mark.parametrize("ratio", RATIOS)
def test_weights_of_the_decoder(ratio):
    encoder = build("mae", "checkpoint_full")
    latent, mask, ids_restore = encoder.encode_visible(images(), seeded(3, 16), ratio)
    assert latent.shape[1] == 1 + int(16 * (1 - ratio))
    check_weights(encoder.decoder.decoder_blocks, lambda: encoder.decoder(latent, ids_restore))


def test_weights_with_norms_and_with_a_blocks_own_bias():
    """What timm's modules have and the seven methods do not: normalised queries and keys, a bias table per block."""
    torch.manual_seed(0)
    normed = Attention(24, 3, qkv_bias=True, qk_norm=True, norm_layer=torch.nn.LayerNorm).eval()
    torch.nn.init.normal_(normed.q_norm.weight)
    own = BeitAttention(24, 3, qkv_bias=True, window_size=(2, 3)).eval()
    torch.nn.init.normal_(own.relative_position_bias_table)
    torch.nn.init.normal_(own.q_bias)
    tokens, shared = torch.randn(2, 7, 24), torch.randn(1, 3, 7, 7)
    with torch.no_grad():
        check_weights([SimpleNamespace(attn=normed)], lambda: normed(tokens))
        check_weights([SimpleNamespace(attn=own)], lambda: own(tokens, shared_rel_pos_bias=shared))


def test_sums_are_not_rounded_under_autocast():
    blocks = [SimpleNamespace(attn=SimpleNamespace(num_heads=3))]
    ours, theirs = (Sums(blocks, 4, 1, CPU) for _ in range(2))
    inputs = torch.zeros(2, 16), 0, seeded(2, 3, 17, 17).softmax(3)
    with torch.autocast("cpu", torch.bfloat16):
        ours.add_maps(*inputs)
    theirs.add_maps(*inputs)
    assert torch.equal(ours.maps, theirs.maps) and torch.equal(ours.distance, theirs.distance)


def test_attention_without_one_softmax_for_each_head_is_refused():
    for attn in (torch.nn.Identity(), type("DiffAttention", (), {"attn_drop": torch.nn.Dropout()})()):
        with pytest.raises(UserError, match=f"timm's {type(attn).__name__} has not one softmax"), \
             read_attention([SimpleNamespace(attn=attn)], None):
            pass


def test_what_is_not_finite_is_refused():
    encoder = build("dino")
    sums = Sums(encoder.vit.blocks, 4, 1, CPU)
    nothing = torch.empty(1, 0, dtype=torch.int64)
    attention.add_encoder(encoder, torch.full((1, 3, 64, 64), torch.inf), nothing, nothing[..., None], sums)
    with pytest.raises(UserError, match="attention weights are not finite"):
        sums.figures(16, 1)


@pytest.mark.parametrize("method, form, prefix", [("beit", "checkpoint", 1), ("deit", "checkpoint_distilled", 2),
                                                  ("mae", "checkpoint_full", 1)])
def test_sums_against_numpy(method, form, prefix):
    """In float64, without the class's sums: likeness of maps by all pairs. MAE: its decoder, three quarters masked."""
    encoder, noise, nothing = build(method, form), seeded(3, 16), torch.empty(3, 0, dtype=torch.int64)
    blocks = encoder.decoder.decoder_blocks if method == "mae" else encoder.vit.blocks
    sums = Sums(blocks, 4, prefix, CPU, decoder=method == "mae")
    if method == "mae":
        add = partial(attention.add_decoder, encoder, images(), None, noise, 0.75, nothing, nothing[..., None], sums)
    else:
        add = partial(attention.add_encoder, encoder, images(), nothing, nothing[..., None], sums)
    layers = []
    with read_attention(blocks, lambda layer, weights: layers.append(weights.double().numpy())):
        add()
    figures = sums.figures(16, 3)
    between = np.array([[math.hypot(q // 4 - k // 4, q % 4 - k % 4) for k in range(16)] for q in range(16)])
    assert figures["distance_patches_uniform"] == pytest.approx(between.mean(), rel=1e-5)
    assert figures["distance_pixels"] == pytest.approx(16 * np.array(figures["distance_patches"]), rel=1e-5)
    # Visible are the four patches of the least noise.
    hidden = (noise > noise.sort(dim=1).values[:, 3:4]).numpy()
    assert len(layers) == len(blocks)
    for layer, weights in enumerate(layers):
        maps = weights[:, :, prefix:, prefix:]
        maps = maps / maps.sum(3, keepdims=True)
        distances = (maps * between).sum(3).swapaxes(0, 1)
        for name, chosen in {"": hidden | True, "_masked": hidden, "_visible": ~hidden}.items():
            if not name or method == "mae":
                expected = distances[:, chosen].mean(1)
                assert figures[f"distance_patches{name}"][layer] == pytest.approx(expected, rel=1e-5)
        flat = maps.reshape(3, maps.shape[1], -1)
        flat = flat / np.linalg.norm(flat, axis=2, keepdims=True)
        pairs = [(flat[a] * flat[b]).sum(1) for a in range(3) for b in range(a)]
        assert figures["map_similarity"][layer] == pytest.approx(np.mean(pairs), rel=1e-5)


def test_radii_of_known_fields():
    field = torch.full((9, 9), float("nan"))
    assert math.isnan(radius_holding(field, 0.5))
    field[4, 4] = 4.0
    for row, column in ((4, 5), (4, 3), (3, 4), (5, 4)):
        field[row, column] = 0.5
    assert radius_holding(field, 0.5) == 0 and radius_holding(field, 0.9) == 1
    field[0, 8] = 1.0
    # The three corners without a value count as the fourth: 4, 2 and 4.
    assert radius_holding(field, 0.6) == 1 and radius_holding(field, 0.61) == pytest.approx(math.hypot(4, 4))
    places = [math.hypot(row - 10, column - 10) for row in range(21) for column in range(21)]
    for share in (0.5, 0.9):
        expected = float(np.quantile(places, share, method="inverted_cdf"))
        assert radius_holding(torch.ones(21, 21), share) == pytest.approx(expected)


def test_receptive_fields_against_the_jacobian():
    """Through MAE's decoder and encoder, through the decoder alone, and through the encoder alone: for every visible
    patch the norm of the whole Jacobian of the query's product with the direction."""
    encoder = build("mae", "checkpoint_full").double()
    noise, image = seeded(1, 16).double(), images(count=1).double()
    order, latent = noise.argsort()[0], encoder.encode_visible(image, noise, 0.75)[0]
    query, ids_restore = int(order[-1]), order.argsort()[None]
    pixel_direction, token_direction = seeded(1, 1, 768).double() - 0.5, seeded(1, 1, 48).double() - 0.5

    def decoded(latent):
        return encoder.decoder(latent, ids_restore)[0, query] @ pixel_direction[0, 0]

    def by_patch(function):
        gradient = torch.autograd.functional.jacobian(function, image)[0]
        return [float(gradient[:, row:row + 16, column:column + 16].norm())
                for row in range(0, 64, 16) for column in range(0, 64, 16)]

    tokens = torch.autograd.functional.jacobian(decoded, latent)[0, 1:].norm(dim=1).tolist()
    visible = order[:4].tolist()
    both = Sums(encoder.decoder.decoder_blocks, 4, 1, CPU, decoder=True)
    alone = Sums(encoder.vit.blocks, 4, 1, CPU)
    expected = ((both.fields["receptive_field"], visible, by_patch(
                    lambda x: decoded(encoder.encode_visible(x, noise, 0.75)[0]))),
                (both.fields["receptive_field_tokens"], visible, dict(zip(visible, tokens, strict=True))),
                (alone.fields["receptive_field"], range(16), by_patch(
                    lambda x: encoder(x)[0, 1 + query] @ token_direction[0, 0])))
    image.requires_grad_()
    attention.add_decoder(encoder, image, None, noise, 0.75, torch.tensor([[query]]), pixel_direction, both)
    attention.add_encoder(encoder, image, torch.tensor([[query]]), token_direction, alone)
    for (total, count), patches, norms in expected:
        assert count.sum() == len(patches)
        for patch in patches:
            offset = patch // 4 - query // 4 + 3, patch % 4 - query % 4 + 3
            assert count[offset] == 1 and float(total[offset]) == pytest.approx(norms[patch], rel=1e-5)


@pytest.fixture
def run(launch):
    def run_attention(*words, **options):
        return launch(attention.main, ["--workers", "0", "--device", "cpu", *words], **options)
    return run_attention


def golden(model, form="checkpoint"):
    return "--model", model, "--weights", GOLDEN / model / f"{form}.pth", "--num-heads", 3


def results_of(folder):
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def figures_of(result):
    """Every figure of a line, None as NaN."""
    return {name: np.array(value, dtype=np.float64) for name, value in result.items()
            if name.startswith(("distance", "map_", "receptive"))}


def test_processes_and_batches_do_not_change_the_figures(run, tmp_path):
    words = (*golden("mae", "checkpoint_full"), "--dataset", "synthetic", "--num-images", 5)
    run(*words, "--batch-size", 5, "--output-dir", tmp_path / "one")
    one = results_of(tmp_path / "one")
    assert [(line["part"], line["mask_ratio"]) for line in one] == [
        ("encoder", 0), *(("decoder", ratio) for ratio in RATIOS)]
    for line, visible in zip(one[2:], (12, 8, 4, 1), strict=True):
        assert np.sum(line["receptive_field_count"]) == 5 * visible
        assert line["receptive_field_count"][3][3] == 0 and line["receptive_field"][3][3] is None
    assert one[1]["receptive_field"] is None and one[1]["distance_patches_masked"][0][0] is None
    # Of six processes one has no image.
    for name, processes, batch in (("batch", 1, 2), ("two", 2, 4), ("more", 6, 32)):
        run(*words, "--batch-size", batch, "--output-dir", tmp_path / name, processes=processes)
        for ours, theirs in zip(results_of(tmp_path / name), one, strict=True):
            assert ours["world_size"] == processes
            for figure, values in figures_of(theirs).items():
                np.testing.assert_allclose(figures_of(ours)[figure], values, rtol=2e-4, atol=1e-6, err_msg=figure)
    run(*words, "--seed", 1, "--output-dir", tmp_path / "seed")
    assert figures_of(results_of(tmp_path / "seed")[3])["map_similarity"] != figures_of(one[3])["map_similarity"]


def test_several_models_in_one_picture_and_table(run, tmp_path):
    common = ("--dataset", "synthetic", "--num-images", 2, "--output-dir", tmp_path)
    run(*golden("beit"), *common)
    out, _ = run(*golden("mae", "checkpoint_full"), *common, "--mask-ratios", 0.75, 0)
    assert "mae (synthetic data), decoder, mask ratio 0.75" in out
    run(*golden("mae"), *common, "--encoder-only", "--queries", 0)
    results = results_of(tmp_path)
    assert [(line["model"], line["part"], line["mask_ratio"]) for line in results] == [
        ("beit", "encoder", 0), ("mae", "encoder", 0), ("mae", "decoder", 0), ("mae", "decoder", 0.75),
        ("mae", "encoder", 0)]
    (tmp_path / "attention.png").unlink()
    out, _ = run("--table", "--format", "md", "--output-dir", tmp_path)
    rows = [line.split(" | ") for line in out.splitlines() if line.startswith("| ")]
    # Of two results of one name and part the later one.
    assert len(rows) == 2 + 4 and [row[5] for row in rows if row[0].startswith("| mae (synthetic data), enc")] == ["-"]
    assert float(rows[2][2]) == pytest.approx(np.mean(results[0]["distance_pixels"][0]), abs=0.06)
    assert (tmp_path / "attention.png").read_bytes().startswith(b"\x89PNG")


def test_mistakes_get_one_line_and_no_result(run, tmp_path):
    out = tmp_path / "out"
    (tmp_path / "own.py").write_text("import timm\n\ndef mine(weights):\n"
                                     "    return timm.create_model('test_vit', num_classes=0, global_pool='')\n")
    full, synthetic = golden("mae", "checkpoint_full"), ("--dataset", "synthetic", "--num-images", 1)
    for words, parts in (
        ((*golden("mae"), *synthetic), ["no decoder", "mae_pretrain_vit_base_full.pth", "--encoder-only"]),
        ((*full, *synthetic, "--queries", 5), ["--queries 5", "4 of 16"]),
        (("--table",), ["results.jsonl", "run without --table first"]),
        (("--model", f"{tmp_path}/own.py:mine", *synthetic), ["the attention of your own network is not known"]),
    ):
        _, err = run(*words, "--output-dir", out, status=2)
        assert len(err.splitlines()) == 1 and all(part in err for part in parts), err
        assert not (out / "results.jsonl").exists() and not list(out.glob("*.png"))


@pytest.mark.parametrize("model", ["test_vit2", "test_vit3", "vit_small_patch16_dinov3", "eva02_tiny_patch14_224",
                                   "vit_small_patch16_rope_224"])
def test_other_models_of_timm(model):
    """Averaged tokens, an attention pool, registers, rotated queries and keys: weights, and a gradient that reaches
    every patch."""
    if not timm.is_model(model):
        pytest.skip(f"timm {timm.__version__} has no {model}")
    encoder = build_model(f"timm/{model}", "random")
    count, prefix = encoder.vit.patch_embed.num_patches, encoder.vit.num_prefix_tokens
    pictures = images(encoder.native_size[0], 2).requires_grad_()
    layers = check_weights(encoder.vit.blocks, lambda: encoder(pictures))
    assert all(weights.shape[2] == prefix + count for weights in layers)
    sums = Sums(encoder.vit.blocks, math.isqrt(count), prefix, CPU)
    queries, directions = torch.tensor([[3], [7]]), torch.randn(2, 1, encoder.embed_dim)
    attention.add_encoder(encoder, pictures, queries, directions, sums)
    total, seen = sums.fields["receptive_field"]
    assert seen.sum() == 2 * count and (total[seen > 0] > 0).all() and (sums.queries.sum((0, 2)) == 2 * count).all()
