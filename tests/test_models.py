"""Encoders against the official ones: golden files hold a small checkpoint of each official form, inputs, and what the
official encoder computed (tests/golden). Relative errors in the 2-norm: 1e-5 at the native size, 1e-4 interpolated."""

import argparse
from pathlib import Path

import numpy as np
import pytest
import scipy.interpolate
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer

from models import METHODS, WITH_PROJECTOR, build_model, choose_layers, encoder_signature, load_encoder
from models.beit import resize_relative_table
from models.mocov3 import build_projector
from utils import UserError

GOLDEN = Path(__file__).parent / "golden"
FORMS = [(path.parent.name, path.stem) for path in sorted(GOLDEN.glob("*/checkpoint*.pth"))]
assert len(FORMS) == 14 and {method for method, _ in FORMS} == set(METHODS)


def golden(method):
    return torch.load(GOLDEN / method / "golden.pt", weights_only=True)


def build(method, form="checkpoint", **options):
    return build_model(method, str(GOLDEN / method / f"{form}.pth"), num_heads=3, **options)


def error(ours, official):
    assert ours.shape == official.shape
    return float((ours.double() - official.double()).norm() / official.double().norm())


@pytest.mark.parametrize("method, form", FORMS)
def test_tokens_and_blocks_are_the_official_ones(method, form):
    encoder, reference = build(method, form), golden(method)
    kind = "distilled_" if form == "checkpoint_distilled" else ""
    tokens = reference[kind + "tokens"]
    if kind:
        tokens = torch.cat([tokens[:, :1], tokens[:, 2:]], dim=1)
    assert error(encoder(reference["image"]), tokens) < 1e-5
    features = encoder.extract(reference["image"])
    assert error(features["cls"], tokens[:, 0]) < 1e-5
    assert error(features["avg"], tokens[:, 1:].mean(1)) < 1e-5
    for size, tolerance in (("", 1e-5), ("_large", 1e-4)):
        layers = encoder.get_intermediate_layers(reference["image" + size], [0, 1, 2, 3], reshape=False)
        assert error(torch.stack(layers), reference[f"{kind}blocks{size}"]) < tolerance
    for size in ("rect", "large") if method in ("dino", "ibot") else ():
        assert error(encoder(reference[f"image_{size}"]), reference[f"tokens_{size}"]) < 1e-4


@pytest.mark.parametrize("method, form", [("mocov3", "checkpoint"), ("dino", "checkpoint"), ("ibot", "checkpoint"),
                                          ("dino", "checkpoint_plainhead")])
def test_projections_are_the_official_ones(method, form):
    encoder, reference = build(method, form), golden(method)
    projected = encoder.extract(reference["image"])["projected"]
    assert error(projected, reference["projected"]) < 1e-5
    encoder = load_encoder(run_arguments(method, "fp32", weights=encoder.weights), torch.device("cpu"), print)
    compact = encoder.extract(reference["image"])["projected"]
    assert compact.shape[1] <= projected.shape[1]
    assert error(compact @ compact.T, projected @ projected.T) < 1e-5


@pytest.mark.parametrize("method", ["dino", "ibot"])
def test_the_student_is_another_branch(method):
    reference = golden(method)
    assert error(build(method, branch="student")(reference["image"]), reference["student_tokens"]) < 1e-5


def test_mae_decoder():
    encoder, reference = build("mae", "checkpoint_full", decoder=True), golden("mae")
    latent, mask, ids_restore = encoder.encode_visible(reference["image"], reference["noise"], reference["mask_ratio"])
    assert error(latent, reference["latent"]) < 1e-5
    assert torch.equal(mask, reference["mask"]) and torch.equal(ids_restore, reference["ids_restore"])
    assert error(encoder.decoder(latent, ids_restore), reference["decoder_pred"]) < 1e-5


@pytest.mark.parametrize("method", ["deit", "mocov3", "mae"])
def test_rectangles_against_timm_with_its_positions_replaced(method):
    encoder = build(method)
    state = encoder.vit.state_dict()
    table = state["pos_embed"][:, 1:].unflatten(1, (4, 4)).permute(0, 3, 1, 2)
    table = F.interpolate(table, size=(5, 7), mode="bicubic", align_corners=False).flatten(2).mT
    state["pos_embed"] = torch.cat([state["pos_embed"][:, :1], table], dim=1)
    vit = VisionTransformer(img_size=(80, 112), embed_dim=48, depth=4, num_heads=3, num_classes=0).eval()
    vit.load_state_dict(state)
    images = torch.randn(2, 3, 80, 112, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert error(encoder(images), vit.forward_features(images)) < 1e-5


def slow_beit(state, images, heads, bias=None):
    """BEiT's encoder in float64, one image, head and block at a time, from the file's keys alone."""
    state = {key: value.double() for key, value in state.items()}
    width = state["cls_token"].shape[-1]
    outputs = []
    for image in images.double():
        tokens = F.conv2d(image[None], state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=16)
        tokens = torch.cat([state["cls_token"][0], tokens[0].flatten(1).T])
        if "pos_embed" in state:
            tokens = tokens + state["pos_embed"][0]
        for block in range(4):
            part = {key.removeprefix(f"blocks.{block}."): value for key, value in state.items()}
            x = F.layer_norm(tokens, (width,), part["norm1.weight"], part["norm1.bias"], 1e-6)
            query, key, value = (x @ part["attn.qkv.weight"].T).split(width, dim=1)
            query, value = query + part["attn.q_bias"], value + part["attn.v_bias"]
            out = []
            by_head = zip(*(x.split(width // heads, dim=1) for x in (query, key, value)), strict=True)
            for head, (q, k, v) in enumerate(by_head):
                scores = q @ k.T / (width // heads) ** 0.5
                out.append((scores if bias is None else scores + bias[head]).softmax(1) @ v)
            attended = torch.cat(out, 1) @ part["attn.proj.weight"].T + part["attn.proj.bias"]
            tokens = tokens + part.get("gamma_1", 1) * attended
            x = F.layer_norm(tokens, (width,), part["norm2.weight"], part["norm2.bias"], 1e-6)
            x = F.gelu(x @ part["mlp.fc1.weight"].T + part["mlp.fc1.bias"])
            tokens = tokens + part.get("gamma_2", 1) * (x @ part["mlp.fc2.weight"].T + part["mlp.fc2.bias"])
        outputs.append(F.layer_norm(tokens, (width,), state["norm.weight"], state["norm.bias"], 1e-6))
    return torch.stack(outputs)


def test_public_beit_form(tmp_path):
    """Absolute positions, no relative bias, no LayerScale, as beit_base_patch16_224_pt1k_800ep.pth."""
    state = torch.load(GOLDEN / "beit/checkpoint.pth", weights_only=True)["model"]
    state = {key: value.clone() for key, value in state.items() if "gamma" not in key and "rel_pos_bias" not in key}
    state["pos_embed"] = torch.randn(1, 17, 48, generator=torch.Generator().manual_seed(0))
    torch.save({"model": state}, tmp_path / "public.pth")
    encoder, image = build_model("beit", str(tmp_path / "public.pth"), num_heads=3), golden("beit")["image"]
    assert error(encoder(image), slow_beit(state, image, 3)) < 1e-5
    assert encoder(torch.randn(1, 3, 96, 64)).shape == (1, 25, 48)


def official_relative_table(table, old, new):
    """The interpolation of BEiT's fine-tuning code, with SciPy's spline on the whole grid (FITPACK, no smoothing)."""
    def positions(source, target):
        left, right = 1.01, 1.5
        while right - left > 1e-6:
            q = (left + right) / 2.0
            if (1.0 - q ** (source // 2)) / (1.0 - q) > target // 2:
                right = q
            else:
                left = q
        out, current = [], 1
        for i in range(source // 2):
            out.append(current)
            current += q ** (i + 1)
        return [-x for x in reversed(out)] + [0] + out
    (rows, columns), (new_rows, new_columns) = ([2 * side - 1 for side in grid] for grid in (old, new))
    y = positions(rows, new_rows) if rows != new_rows else np.arange(rows) - rows // 2
    x = positions(columns, new_columns) if columns != new_columns else np.arange(columns) - columns // 2
    heads = []
    for head in range(table.shape[1]):
        values = table[:-3, head].reshape(rows, columns).double().numpy()
        spline = scipy.interpolate.RectBivariateSpline(y, x, values, s=0)
        heads.append(spline(np.arange(new_rows) - new_rows // 2, np.arange(new_columns) - new_columns // 2).ravel())
    return np.concatenate([np.stack(heads, 1), table[-3:].numpy()])


def test_beit_relative_table():
    reference, table = golden("beit"), build("beit").vit.rel_pos_bias.relative_position_bias_table
    assert error(resize_relative_table(table, (4, 4), (6, 6)), reference["rel_table_large"]) < 1e-5
    for grid in ((4, 4), (6, 6), (4, 7), (9, 5), (32, 32)):
        official = torch.from_numpy(official_relative_table(table, (4, 4), grid))
        assert error(resize_relative_table(table, (4, 4), grid), official) < 1e-5, grid


def test_beit_at_a_rectangle():
    encoder = build("beit")
    state = torch.load(GOLDEN / "beit/checkpoint.pth", weights_only=True)["model"]
    table = state["rel_pos_bias.relative_position_bias_table"]
    table = torch.from_numpy(official_relative_table(table, (4, 4), (4, 6)))
    # Table rows by offset (rows, columns); the last three: class to patch, patch to class, class to class.
    positions = [(y, x) for y in range(4) for x in range(6)]
    bias = torch.zeros(3, 25, 25, dtype=torch.float64)
    for i, (y, x) in enumerate(positions, 1):
        for j, (v, u) in enumerate(positions, 1):
            bias[:, i, j] = table[(y - v + 3) * 11 + x - u + 5]
        bias[:, 0, i], bias[:, i, 0] = table[-3], table[-2]
    bias[:, 0, 0] = table[-1]
    images = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    assert error(encoder(images), slow_beit(state, images, 3, bias)) < 1e-4


def test_block_features_have_the_promised_shape_and_order():
    encoder, image = build("dino"), golden("dino")["image_rect"]
    layers = encoder.get_intermediate_layers(image, n=[3, 0])
    assert [layer.shape for layer in layers] == [(2, 48, 4, 6)] * 2
    flat = encoder.get_intermediate_layers(image, n=[0, 3], reshape=False)
    assert torch.equal(layers[1].flatten(2).mT, flat[0]) and torch.equal(layers[0].flatten(2).mT, flat[1])
    normed = encoder.get_intermediate_layers(image, n=[3], reshape=False, norm=True)[0]
    assert torch.equal(normed, encoder(image)[:, 1:])
    with pytest.raises(IndexError):
        encoder.get_intermediate_layers(image, n=[4])
    with pytest.raises(ValueError, match="not divisible by the patch size 16"):
        encoder(torch.zeros(1, 3, 60, 64))


@pytest.mark.parametrize("method", METHODS)
def test_gradients_reach_the_image_after_inference(method):
    encoder, image = build(method), golden(method)["image"].clone()
    with torch.inference_mode():
        encoder.extract(image)
    features = encoder.extract(image.requires_grad_())
    sum(rows.sum() for rows in features.values()).backward()
    assert image.grad.abs().sum() > 0


def test_mae_shuffle_is_the_defect_and_only_it():
    image = golden("mae")["image"]
    right, wrong = build("mae"), build("mae", shuffle_patches=True)
    assert error(wrong(image), right(image)) > 1e-2 and torch.equal(wrong(image), wrong(image))
    assert not torch.equal(*wrong(image[:1].repeat(2, 1, 1, 1)))
    patches = right.embed(image)[:, 1:] - right.vit.pos_embed[:, 1:]
    shuffled = wrong.embed(image)[:, 1:] - wrong.vit.pos_embed[:, 1:]
    assert torch.allclose(patches.sum(1), shuffled.sum(1), atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_frozen_whole_and_equal_for_any_seed(method):
    image = golden(method)["image"]
    encoder, other = build(method), build(method, seed=1)
    first, second = encoder.extract(image), other.extract(image)
    assert all(torch.equal(first[name], second[name]) for name in first)
    torch.nn.Sequential(encoder).train()
    assert not any(module.training for module in encoder.modules())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    assert (encoder.embed_dim, encoder.depth, encoder.patch_size, encoder.num_heads) == (48, 4, 16, 3)
    assert encoder.has_projector == (method in WITH_PROJECTOR)
    with pytest.raises(TypeError, match="uint8, images with values from 0 to 255, not Tensor of torch.float32"):
        encoder.preprocess(image)


@pytest.mark.parametrize("method", METHODS)
def test_random_control(method):
    encoder = build_model(method, "random", seed=3)
    assert (encoder.weights, encoder.sha256) == ("random", None)
    assert (encoder.embed_dim, encoder.depth, encoder.num_heads, encoder.patch_size) == (768, 12, 12, 16)
    assert encoder.has_projector == (method in WITH_PROJECTOR)
    if method == "beit":
        again, other = (build_model(method, "random", seed=seed) for seed in (3, 4))
        signature = encoder_signature(encoder)
        assert torch.equal(encoder_signature(again), signature) and differs(encoder_signature(other), signature)


def test_heads_of_mocov3(tmp_path):
    """Official ViT-S files have 12 heads, not 384 / 64; timm's network with 12 heads is the reference."""
    vit = VisionTransformer(embed_dim=384, depth=2, num_heads=12, num_classes=0, img_size=32).eval()
    state = {f"module.base_encoder.{key}": value for key, value in vit.state_dict().items()}
    for key, value in build_projector(384, 8, 4).state_dict().items():
        state[f"module.base_encoder.head.{key}"] = value
    torch.save({"arch": "vit_small", "state_dict": state}, tmp_path / "file.pth.tar")
    for given, heads in ((None, 12), (6, 6)):
        encoder = build_model("mocov3", str(tmp_path / "file.pth.tar"), given)
        assert encoder.num_heads == heads
        images = torch.randn(2, 3, 32, 32)
        assert (error(encoder(images), vit.forward_features(images).detach()) < 1e-5) == (heads == 12)


def differs(one, other):
    """As utils.results.check_same sees it."""
    return float((one - other).abs().max()) > 1e-3 * float(other.abs().max())


@pytest.mark.parametrize("method", METHODS)
def test_the_signature_sees_what_makes_the_tokens(method):
    encoder, image = build(method), golden(method)["image"]
    signature = encoder_signature(encoder)
    assert signature.shape == (256,) and signature.dtype == torch.float32
    assert torch.equal(encoder_signature(encoder), signature)
    assert encoder(image.clone().requires_grad_()).requires_grad

    mean, weights, order = (build(method) for _ in range(3))
    mean.mean += 0.02
    weights.vit.blocks[3].mlp.fc2.weight *= 1.1
    order.vit.patch_embed.register_forward_hook(lambda module, images, patches: patches.flip(1))
    others = [mean, weights, order]
    if method != "beit":  # whose bias has a column for each head
        others.append(build_model(method, str(GOLDEN / method / "checkpoint.pth"), num_heads=6))
    assert all(differs(encoder_signature(other), signature) for other in others)


def run_arguments(method, precision, **others):
    values = {"model": method, "weights": str(GOLDEN / method / "checkpoint.pth"), "num_heads": 3, "seed": 0,
              "weights_key": None, "precision": precision, "compile": False}
    return argparse.Namespace(**(values | others))


@pytest.mark.parametrize("method", METHODS)
def test_weights_converted_once_give_what_autocast_gives(method):
    lines = []
    encoder = load_encoder(run_arguments(method, "bf16"), torch.device("cpu"), lines.append)
    whole = load_encoder(run_arguments(method, "fp32"), torch.device("cpu"), print)
    image = golden(method)["image"]
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = encoder.extract(image), whole.extract(image)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert found["cls"].dtype == torch.float32 and error(found["cls"], whole.extract(image)["cls"]) < 0.05
    assert torch.equal(encoder.signature, encoder_signature(whole))
    assert encoder.vit.blocks[0].attn.qkv.weight.dtype == torch.bfloat16
    assert encoder.vit.norm.weight.dtype == torch.float32
    assert f"SHA-256 {encoder.sha256}: 4 blocks, width 48, 3 heads, patch 16, class token, " in lines[0]
    assert "mean 0.485 0.456 0.406, std 0.229 0.224 0.225" in lines[0]


def test_what_load_encoder_refuses():
    for changes, words in (({"image_size": 100}, "not divisible by the patch size 16; use 96"),
                           ({"weights": "absent.pth"}, "there is no weights file absent.pth")):
        with pytest.raises(UserError, match=words):
            load_encoder(run_arguments("mae", "fp32", **changes), torch.device("cpu"), print)


def test_layers():
    for words, depth, blocks in ((None, 12, [3, 5, 7, 11]), (None, 1, [0]), (["last"], 1, [0]),
                                 (["last4"], 3, [0, 1, 2]), (["1", "0"], 2, [1, 0])):
        assert choose_layers(words, depth) == blocks
    for word in ("2", "first"):
        with pytest.raises(UserError, match="blocks 0 to 1"):
            choose_layers([word], 2)
