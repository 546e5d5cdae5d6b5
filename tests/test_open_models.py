"""Models from outside the paper: timm's families of plain ViTs, files as training scripts save them, own networks."""

import argparse
import hashlib
import itertools
import re
import sys

import pytest
import timm
import torch
from safetensors.torch import save_file

import retrieval
import segment
from models import CheckpointError, build_model, encoder_signature

# One small model of a family, where its first token comes from.
FAMILIES = [
    ("deit_tiny_distilled_patch16_224", "class token"), ("vit_small_patch14_reg4_dinov2", "class token"),
    ("vit_base_patch32_clip_224", "class token"), ("deit3_small_patch16_224", "class token"),
    ("vit_base_patch32_siglip_256", "attention pool"), ("test_vit2", "mean"), ("test_vit3", "attention pool"),
    ("vit_small_patch16_dinov3", "class token"), ("eva02_tiny_patch14_224", "class token"),
    ("vit_pe_core_tiny_patch16_384", "class token"), ("vit_pe_spatial_tiny_patch16_512", "class token"),
    ("vit_small_patch16_rope_224", "class token"), ("beit_base_patch16_224", "class token"),
    ("beitv2_base_patch16_224", "class token"), ("vit_base_patch16_radio_v3", "class token"),
]


def timm_at(name, model, size):
    """timm's own model of that input size, with the same weights by timm's own conversion."""
    other = timm.create_model(name, img_size=size, num_classes=0).eval()
    convert = sys.modules[type(model).__module__].checkpoint_filter_fn
    other.load_state_dict(convert(model.state_dict(), other), strict=False)
    return other


@pytest.mark.parametrize(("name", "cls_from"), FAMILIES)
def test_families_of_timm_from_a_file(tmp_path, name, cls_from):
    """The file of a whole model, classifier included, against timm's own forward_features."""
    if not timm.is_model(name):
        pytest.skip(f"timm {timm.__version__} has no {name}")
    model = timm.create_model(name).eval()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    encoder = build_model(f"timm/{name}", str(tmp_path / "model.safetensors"))
    assert encoder.cls_from == cls_from
    if not encoder.dynamic and not hasattr(model, "set_input_size"):
        pytest.skip(f"timm {timm.__version__} gives {name} one input size")
    patch, width = encoder.patch_size, encoder.embed_dim
    rectangle = (4 * patch, 7 * patch)
    references = [(rectangle, timm_at(name, model, rectangle))]
    if not encoder.dynamic:
        # A model of one input size at a time comes back to the first.
        references = [(encoder.native_size, model), *references, (encoder.native_size, model)]
    for size, reference in references:
        images = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            tokens, expected = encoder(images), reference.forward_features(images)
            pooled = reference.forward_head(expected, pre_logits=True)
            blocks = encoder.get_intermediate_layers(images, n=[encoder.depth - 1, 0], norm=True)
        prefix, norm = reference.num_prefix_tokens, encoder.late_norm
        torch.testing.assert_close(tokens[:, 1:], norm(expected[:, prefix:]), rtol=1e-4, atol=1e-4)
        first = {"class token": norm(expected[:, 0]), "attention pool": pooled, "mean": tokens[:, 1:].mean(1)}[cls_from]
        torch.testing.assert_close(tokens[:, 0], first, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(blocks[0].flatten(2).mT, tokens[:, 1:], rtol=1e-4, atol=1e-4)
        assert blocks[1].shape == (1, width, size[0] // patch, size[1] // patch)
    with pytest.raises(ValueError, match="not divisible by the patch size"):
        encoder(torch.zeros(1, 3, 6 * patch, 6 * patch + 1))


@pytest.mark.parametrize(("name", "reason"), [
    ("naflexvit_base_patch16_gap", "a NaFlexVit, is not one row of blocks"), ("hiera_tiny_224", "a Hiera"),
    ("convnext_tiny", "a ConvNeXt, .* FILE.py:FUNCTION takes any network"),
    ("vit_tiny_r_s16_p8_224", "not one row of blocks"), ("vit_small_patch16_18x2_224", "not one row of blocks"),
    ("vit_smal_patch16_224", "Unknown model .*vit_smal_patch16_224.*; check the name"),
])
def test_refused_with_the_reason(name, reason):
    if "one row" in reason and not timm.is_model(name):
        pytest.skip(f"timm {timm.__version__} has no {name}")
    with pytest.raises(CheckpointError, match=reason):
        build_model(f"timm/{name}", "random")


@pytest.mark.parametrize("chunk", [4, None], ids=["chunks", "whole"])
@pytest.mark.parametrize("name", ["vit_small_patch14_dinov2", "vit_small_patch14_reg4_dinov2"])
def test_a_teacher_of_dinov2s_training_code(tmp_path, name, chunk):
    """Its keys and its chunks of blocks, whose numbers go on from chunk to chunk."""
    made = build_model(f"timm/{name}", "random", seed=2)
    state = {key: value.clone() for key, value in made.vit.state_dict().items()}
    state["mask_token"] = torch.zeros(1, 384)
    if "reg_token" in state:
        # timm's position embedding has no row of the class token, which holds it.
        state["register_tokens"] = state.pop("reg_token")
        state["pos_embed"] = torch.cat([torch.zeros(1, 1, 384), state["pos_embed"]], dim=1)
    if chunk:
        state = {re.sub(r"^blocks\.(\d+)", lambda found: f"blocks.{int(found[1]) // chunk}.{found[1]}", key): value
                 for key, value in state.items()}
    teacher = wrapped(state, "backbone.") | {"dino_head.last_layer.weight_g": torch.ones(8, 1)}
    torch.save({"teacher": teacher}, tmp_path / "teacher_checkpoint.pth")
    encoder = build_model(f"timm/{name}", str(tmp_path / "teacher_checkpoint.pth"))
    images = torch.randn(1, 3, 56, 56)
    torch.testing.assert_close(encoder(images), made(images), rtol=1e-4, atol=1e-5)
    with pytest.raises(CheckpointError, match="its patches are 14 pixels wide, those of the model 16"):
        build_model("timm/vit_small_patch16_224", str(tmp_path / "teacher_checkpoint.pth"))


def test_weights_that_timm_downloads_have_a_hash(monkeypatch):
    asked, create = [], timm.create_model

    def downloaded(name, pretrained, **options):
        asked.append((name, pretrained))
        return create("test_vit", num_classes=0)
    monkeypatch.setattr(timm, "create_model", downloaded)
    encoder = build_model("timm/hf-hub:somebody/vit")
    build_model("timm/hf-hub:somebody/vit", "random")
    assert asked == [("hf-hub:somebody/vit", True), ("hf-hub:somebody/vit", False)]
    assert encoder.weights == "timm/hf-hub:somebody/vit" and len(encoder.sha256) == 64
    assert build_model("timm/test_vit").sha256 == encoder.sha256 != build_model("timm/test_vit", seed=1).sha256

    def unreachable(*words, **options):
        raise OSError("[Errno 101]\nNetwork is unreachable")
    monkeypatch.setattr(timm, "create_model", unreachable)
    with pytest.raises(CheckpointError, match=r"test_vit could not be made .*Errno 101. Network is unreachable"):
        build_model("timm/test_vit")


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224")


def wrapped(state, prefix=""):
    return {prefix + key: value for key, value in state.items()}


@pytest.mark.parametrize("wrap", [
    lambda state: state, lambda state: {"state_dict": state}, lambda state: {"model": state, "epoch": 3},
    lambda state: {"teacher": wrapped(state, "backbone."), "student": {"x": torch.zeros(1)}},
    lambda state: {"state_dict": wrapped(state, "module.")}, lambda state: wrapped(state, "_orig_mod."),
    lambda state: {"model_ema": wrapped(state, "module.encoder.")},
], ids=["flat", "state_dict", "model", "teacher", "module", "compiled", "ema"])
def test_wrappings_are_found(tiny, tmp_path, wrap):
    torch.save(wrap(tiny.state_dict()), tmp_path / "file.pth")
    encoder = build_model("timm/vit_tiny_patch16_224", str(tmp_path / "file.pth"))
    images = torch.randn(1, 3, 64, 64)
    flexible = timm.create_model("vit_tiny_patch16_224", dynamic_img_size=True)
    flexible.load_state_dict(tiny.state_dict())
    with torch.inference_mode():
        assert torch.equal(encoder(images), flexible.eval().forward_features(images))


def test_a_file_of_timms_train_py(tiny, tmp_path):
    other = {key: value + 1 for key, value in tiny.state_dict().items()}
    torch.save({"epoch": 3, "arch": "vit_tiny_patch16_224", "state_dict": tiny.state_dict(), "state_dict_ema": other,
                "args": argparse.Namespace(lr=1.0), "metric": 71.5}, tmp_path / "last.pth.tar")
    (tmp_path / "nets.py").write_text(OWN)
    words = "timm/vit_tiny_patch16_224", str(tmp_path / "last.pth.tar")
    with pytest.raises(CheckpointError, match="several of its state dictionaries fit: 'state_dict', 'state_dict_ema'"):
        build_model(*words)
    chosen = build_model(*words, weights_key="state_dict_ema")
    assert torch.equal(chosen.vit.cls_token, other["cls_token"])
    assert len(build_model(f"{tmp_path}/nets.py:reads_a_file", words[1]).network.state) == len(other)
    with pytest.raises(CheckpointError, match="missing keys: 'nothing'; it has weights at 'state_dict', 's"):
        build_model(*words, weights_key="nothing")


OWN = '''
import timm, torch

def with_class(weights):
    return timm.create_model("test_vit", num_classes=0, global_pool="", dynamic_img_size=True)

class Patches(torch.nn.Module):
    class_token, patch_size, mean, std = False, 8, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)

    def __init__(self):
        super().__init__()
        self.proj = torch.nn.Conv2d(3, 32, 8, 8)
        self.blocks = torch.nn.ModuleList([torch.nn.Linear(32, 32), torch.nn.Linear(32, 32)])
        self.norm = torch.nn.LayerNorm(32)

    def forward(self, images):
        x = self.proj(images).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

def without_class(weights):
    torch.manual_seed(len(weights))
    return Patches()

def another_function(weights):
    network = Patches()
    network.load_state_dict(without_class(weights).state_dict())
    network.blocks = network.blocks[::-1]
    return network

class Map(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.blocks, self.scale = torch.nn.Conv2d(3, 24, 32, 32), torch.nn.ModuleList([]), 1.0
        torch.nn.init.normal_(self.body.weight, generator=torch.Generator().manual_seed(0))

    def forward(self, images):
        return self.scale * self.body(images)

def feature_map(weights):
    return Map()

def another_attribute(weights):
    network = Map()
    network.scale = 1.1
    return network

def reads_a_file(weights):
    network = Map()
    network.state = torch.load(weights, weights_only=True)["state_dict"]
    return network

def raises(weights):
    raise RuntimeError("\x1b[31mcannot find\x1b[0m\\n" + weights)

def wrong_shape(weights):
    return torch.nn.Flatten()
'''


@pytest.fixture
def own(tmp_path):
    (tmp_path / "nets.py").write_text(OWN)
    return tmp_path / "nets.py"


@torch.inference_mode()
def test_own_network_with_and_without_class_token(own):
    images = torch.randn(2, 3, 48, 64)
    encoder = build_model(f"{own}:with_class", "any")
    assert torch.equal(encoder(images), encoder.network(images)) and encoder.cls_from == "class token"
    assert (encoder.patch_size, encoder.embed_dim, encoder.depth) == (16, 64, len(encoder.network.blocks))
    last = encoder.get_intermediate_layers(images, n=[encoder.depth - 1, 0], norm=True)[0]
    torch.testing.assert_close(last.flatten(2).mT, encoder(images)[:, 1:])
    plain = build_model(f"{own}:without_class", "any")
    tokens = plain(images)
    assert tokens.shape == (2, 1 + 6 * 8, 32) and plain.cls_from == "mean"
    torch.testing.assert_close(tokens[:, 0], tokens[:, 1:].mean(1))
    first = plain.get_intermediate_layers(images, n=[0], reshape=False)[0]
    x = plain.network.proj(images).flatten(2).transpose(1, 2)
    torch.testing.assert_close(first, plain.network.blocks[0](x))
    assert plain.mean.flatten().tolist() == [0.5, 0.5, 0.5]


@torch.inference_mode()
def test_own_network_that_gives_a_feature_map(own):
    encoder, images = build_model(f"{own}:feature_map", "any"), torch.randn(2, 3, 64, 96)
    cells = encoder.network(images)
    tokens = encoder(images)
    assert (encoder.patch_size, encoder.embed_dim, encoder.depth, encoder.cls_from) == (32, 24, 1, "mean")
    assert torch.equal(tokens[:, 1:], cells.flatten(2).mT) and tokens.shape == (2, 1 + 2 * 3, 24)
    torch.testing.assert_close(tokens[:, 0], cells.mean((2, 3)))
    for norm in (True, False):
        assert torch.equal(encoder.get_intermediate_layers(images, n=[0], norm=norm)[0], cells)


def test_own_networks_are_known_by_what_they_do_and_their_file(own):
    signatures = {}
    for function in ("with_class", "without_class", "another_function", "feature_map", "another_attribute"):
        encoder = build_model(f"{own}:{function}", "any")
        signatures[function] = encoder_signature(encoder)
        assert torch.equal(encoder_signature(build_model(f"{own}:{function}", "any")), signatures[function])
        assert encoder.sha256 == hashlib.sha256(own.read_bytes()).hexdigest()
    signatures["other weights"] = encoder_signature(build_model(f"{own}:without_class", "others"))
    for first, second in itertools.combinations(signatures.values(), 2):
        assert (first - second).abs().max() > 0.01 * second.abs().max()
    weights = own.with_name("mine.pth")
    weights.write_bytes(b"1")
    assert build_model(f"{own}:with_class", str(weights)).sha256 == hashlib.sha256(b"1").hexdigest()


@pytest.mark.parametrize(("function", "message"), [
    ("raises", "RuntimeError: cannot find random$"), ("wrong_shape", "its forward gives"),
    ("absent", "has no attribute 'absent'"),
])
def test_own_network_gone_wrong_is_one_line(own, function, message):
    with pytest.raises(CheckpointError, match=message):
        build_model(f"{own}:{function}", "random")
    with pytest.raises(CheckpointError, match="No such file or directory: .*none.py"):
        build_model("none.py:function")


def test_own_network_through_a_script(own, tmp_path, launch):
    words = ["--weights", "mine", "--num-images", 4, "--workers", 0, "--output-dir", tmp_path / "out"]
    for function in ("without_class", "feature_map"):
        out, _ = launch(retrieval.main, ["--model", f"{own}:{function}", *words])
        assert "mean 0." in out and "AP" in out
    out, _ = launch(segment.main, ["--model", f"{own}:feature_map", "--layers", "last", "--iterations", 1,
                                   "--batch-size", 1, *words])
    assert "linear: mIoU" in out and '"layers": [0]' in (tmp_path / "out/results.jsonl").read_text()


@pytest.mark.parametrize("method", ["dino", "ibot"])
def test_a_teacher_without_its_head_serves_where_no_projection_is_asked(tmp_path, method):
    whole = f"tests/golden/{method}/checkpoint.pth"
    teacher = torch.load(whole, weights_only=False)["teacher"]
    teacher = {key: value for key, value in teacher.items() if "head." not in key}
    torch.save({"teacher": teacher}, tmp_path / "teacher.pth")
    encoder = build_model(method, str(tmp_path / "teacher.pth"), 3)
    assert torch.equal(encoder.vit.cls_token, build_model(method, whole, 3).vit.cls_token) and not encoder.has_projector
    with pytest.raises(CheckpointError, match="no projector"):
        build_model(method, str(tmp_path / "teacher.pth"), 3, projector=True)


def test_weights_key_reads_a_methods_weights_from_elsewhere(tmp_path):
    content = torch.load("tests/golden/mae/checkpoint.pth", weights_only=False)
    torch.save({"ema": wrapped(content["model"], "module.")}, tmp_path / "file.pth")
    with pytest.raises(CheckpointError, match="it has weights at 'ema', 'ema/module'; another .*--weights-key"):
        build_model("mae", str(tmp_path / "file.pth"), 3)
    encoder = build_model("mae", str(tmp_path / "file.pth"), 3, weights_key="ema/module")
    assert torch.equal(encoder.vit.cls_token, content["model"]["cls_token"])
