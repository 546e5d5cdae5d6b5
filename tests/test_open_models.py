"""Models from outside the paper: timm's families of plain ViTs, files as training scripts save them, own networks."""

import json
import socket
import sys
import time
import traceback
import types

import huggingface_hub
import pytest
import timm
import torch
from conftest import call_main

import models
import models.attention.__main__ as attention
import retrieval
from models import CheckpointError, build_model, timm_vit

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


def timm_at(name, encoder, size):
    """timm's own model of that input size, with the same weights by timm's own conversion."""
    model = timm.create_model(name, img_size=size, num_classes=0).eval()
    native = timm.create_model(name, num_classes=0)
    native.load_state_dict(encoder.vit.state_dict() | getattr(encoder, "native", {}))
    convert = sys.modules[type(model).__module__].checkpoint_filter_fn
    model.load_state_dict(convert(native.state_dict(), model), strict=False)
    return model


@pytest.mark.parametrize(("name", "cls_from"), FAMILIES)
def test_families_of_timm(name, cls_from):
    if not timm.is_model(name):
        pytest.skip(f"timm {timm.__version__} has no {name}")
    encoder = build_model(f"timm/{name}", "random")
    if not encoder.dynamic and not hasattr(encoder.vit, "set_input_size"):
        pytest.skip(f"timm {timm.__version__} gives {name} one input size")
    patch = encoder.patch_size
    references = {size: timm_at(name, encoder, size) for size in ((6 * patch, 6 * patch), (4 * patch, 7 * patch))}
    # Twice: the second time a model of one input size at a time has been at another.
    for size, reference in [*references.items(), *references.items()]:
        images = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            tokens, expected = encoder(images), reference.forward_features(images)
            pooled = reference.forward_head(expected, pre_logits=True)
            blocks = encoder.get_intermediate_layers(images, n=[encoder.depth - 1, 0], norm=True)
        assert tokens.shape == (1, 1 + size[0] * size[1] // patch**2, encoder.embed_dim)
        prefix, norm = reference.num_prefix_tokens, encoder.late_norm
        torch.testing.assert_close(tokens[:, 1:], norm(expected[:, prefix:]), rtol=1e-4, atol=1e-4)
        assert encoder.cls_from == cls_from
        first = {"class token": norm(expected[:, 0]), "attention pool": pooled, "mean": tokens[:, 1:].mean(1)}[cls_from]
        torch.testing.assert_close(tokens[:, 0], first, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(blocks[0].flatten(2).mT, tokens[:, 1:], rtol=1e-4, atol=1e-4)
        assert blocks[1].shape == (1, encoder.embed_dim, size[0] // patch, size[1] // patch)
    with pytest.raises(ValueError, match="not divisible by the patch size"):
        encoder(torch.zeros(1, 3, 6 * patch, 6 * patch + 1))


@pytest.mark.parametrize(("name", "reason"), [
    ("timm/naflexvit_base_patch16_gap", "lists of patches"), ("timm/hiera_tiny_224", "a Hiera"),
    ("timm/samvit_base_patch16_224", "a VisionTransformerSAM"), ("timm/cait_xxs24_224", "a Cait"),
    ("timm/swin_tiny_patch4_window7_224", "a SwinTransformer"), ("timm/resnet18", "a ResNet"),
    ("timm/vit_tiny_r_s16_p8_224", "convolutional network"), ("timm/vit_small_patch16_18x2_224", "ParallelThingsBlock"),
    ("dinov2", "timm/vit_small_patch14_dinov2"), ("timm/vit_smal_patch16_224", "timm/vit_small_patch16_224"),
    ("mea", "did you mean mae?"),
])
def test_refused_with_the_true_reason(name, reason):
    if reason.startswith(("a ", "lists")) and not timm.is_model(name.removeprefix("timm/")):
        pytest.skip(f"timm {timm.__version__} has no {name}")
    with pytest.raises(CheckpointError, match=reason):
        build_model(name, "random")


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
    with torch.inference_mode():
        assert torch.equal(encoder(images), build_from(tiny)(images))


def build_from(model):
    encoder = build_model("timm/vit_tiny_patch16_224", "random")
    encoder.vit.load_state_dict({key: value for key, value in model.state_dict().items() if "head" not in key})
    return encoder


def test_several_that_fit_need_a_choice(tiny, tmp_path):
    other = {key: value + 1 for key, value in tiny.state_dict().items()}
    torch.save({"state_dict": tiny.state_dict(), "ema": other}, tmp_path / "file.pth")
    with pytest.raises(CheckpointError, match="several of its state dictionaries fit: 'state_dict', 'ema'"):
        build_model("timm/vit_tiny_patch16_224", str(tmp_path / "file.pth"))
    chosen = build_model("timm/vit_tiny_patch16_224", str(tmp_path / "file.pth"), weights_key="ema")
    assert torch.equal(chosen.vit.cls_token, other["cls_token"])
    with pytest.raises(CheckpointError, match="--weights-key nothing: it has 'state_dict', 'ema'"):
        build_model("timm/vit_tiny_patch16_224", str(tmp_path / "file.pth"), weights_key="nothing")


def test_position_embedding_of_another_size(tmp_path):
    large = timm.create_model("vit_tiny_patch16_384")
    torch.save(large.state_dict(), tmp_path / "384.pth")
    encoder = build_model("timm/vit_tiny_patch16_224", str(tmp_path / "384.pth"))
    assert encoder.vit.pos_embed.shape == (1, 197, 192)


def test_missing_keys_are_one_short_line(tiny, tmp_path):
    state = {key: value for key, value in tiny.state_dict().items() if "blocks.7" not in key}
    torch.save(state, tmp_path / "file.pth")
    with pytest.raises(CheckpointError, match=r"missing keys: blocks\.7\.norm1\.weight.* and \d+ more") as caught:
        build_model("timm/vit_tiny_patch16_224", str(tmp_path / "file.pth"))
    assert len(str(caught.value)) < 400


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

def no_module(weights):
    return 3

def raises(weights):
    raise RuntimeError("cannot find " + weights)

def leaves(weights):
    raise SystemExit(3)

def in_half(weights):
    return Patches().half()

def wrong_shape(weights):
    return torch.nn.Flatten()

def two_sides(weights):
    network = Patches()
    network.patch_size = (8, 8)
    return network
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
    assert plain.mean.flatten().tolist() == [0.5, 0.5, 0.5] and len(plain.sha256) == 64
    assert set(plain.extract(images)) == {"cls", "avg"}


@pytest.mark.parametrize(("function", "message"), [
    ("no_module", "returned a int, not an nn.Module"), ("raises", "RuntimeError: cannot find random"),
    ("wrong_shape", "its forward gives"), ("absent", "has no attribute 'absent'"), ("leaves", "SystemExit: 3"),
    ("two_sides", r"its patch_size is \(8, 8\); it must be one whole number"),
])
def test_own_network_gone_wrong_is_one_line(own, function, message):
    with pytest.raises(CheckpointError, match=message):
        build_model(f"{own}:{function}", "random")
    with pytest.raises(CheckpointError, match="none.py does not exist"):
        build_model("none.py:function")


def test_own_network_through_a_script(own, tmp_path, launch):
    words = ["--model", f"{own}:without_class", "--weights", "mine", "--num-images", 4, "--workers", 0,
             "--output-dir", tmp_path / "out"]
    out, _ = launch(retrieval.main, words)
    assert "mean" in out and "AP" in out
    launch(retrieval.main, [*words, "--model", f"{own}:in_half"])
    _, error = launch(retrieval.main, [*words, "--model", f"{own}:raises"], status=2)
    assert error.splitlines()[-1].endswith("RuntimeError: cannot find mine")
    with pytest.raises(CheckpointError) as whole:
        call_main(retrieval.main, [*words, "--model", f"{own}:raises", "--debug"])
    shown = "".join(traceback.format_exception(whole.value))
    assert f'{own}", line' in shown and 'raise RuntimeError("cannot find " + weights)' in shown


def test_a_teacher_without_its_head_serves_where_no_projection_is_asked(tmp_path):
    for method in ("dino", "ibot"):
        path = f"tests/golden/{method}/checkpoint.pth"
        content = torch.load(path, weights_only=False)
        content = {"teacher": {key: value for key, value in content["teacher"].items() if "head." not in key}}
        torch.save(content, tmp_path / "teacher.pth")
        whole = build_model(method, path, 3)
        encoder = build_model(method, str(tmp_path / "teacher.pth"), 3)
        assert torch.equal(encoder.vit.cls_token, whole.vit.cls_token) and not encoder.has_projector
        with pytest.raises(CheckpointError, match="no projector"):
            build_model(method, str(tmp_path / "teacher.pth"), 3, projector=True)


def test_weights_key_reads_a_methods_weights_from_elsewhere(tmp_path):
    content = torch.load("tests/golden/mae/checkpoint.pth", weights_only=False)
    torch.save({"ema": wrapped(content["model"], "module.")}, tmp_path / "file.pth")
    with pytest.raises(CheckpointError, match="it has weights at ema, ema/module, which --weights-key can name"):
        build_model("mae", str(tmp_path / "file.pth"), 3)
    encoder = build_model("mae", str(tmp_path / "file.pth"), 3, weights_key="ema/module")
    assert torch.equal(encoder.vit.cls_token, content["model"]["cls_token"])


def test_names_of_the_hub_pass_through_to_timm(monkeypatch):
    asked, create = [], timm.create_model

    def record(name, **options):
        asked.append((name, options["pretrained"]))
        return create("test_vit", num_classes=0)
    monkeypatch.setattr(timm, "create_model", record)
    monkeypatch.setattr(socket, "create_connection", lambda address, timeout: socket.socket())
    encoder = build_model("timm/hf-hub:somebody/vit")
    build_model("timm/hf-hub:somebody/vit", "random")
    assert asked == [("hf-hub:somebody/vit", True), ("hf-hub:somebody/vit", False)]
    assert encoder.weights == "timm/hf-hub:somebody/vit"


@pytest.mark.parametrize("name", ["timm/hf-hub:somebody/vit", "timm/vit_tiny_patch16_224"])
def test_without_a_network_is_one_line_at_once(monkeypatch, tmp_path, name):
    def unreachable(address, timeout):
        raise OSError
    monkeypatch.setattr(socket, "create_connection", unreachable)
    monkeypatch.setattr(timm_vit, "getproxies", dict)
    for constant, value in (("HF_HUB_OFFLINE", False), ("HF_HUB_CACHE", str(tmp_path))):
        monkeypatch.setattr(huggingface_hub.constants, constant, value)
    started = time.monotonic()
    with pytest.raises(CheckpointError, match=f"{name} could not be downloaded .*; check the network"):
        build_model(name)
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("name", ["vit_small_patch16_dinov3", "eva02_tiny_patch14_224",
                                  "vit_pe_spatial_tiny_patch16_512", "vit_small_patch16_rope_224", "my.py"])
def test_attention_that_is_not_measured_is_one_line(own, tmp_path, launch, name):
    if name != "my.py" and not timm.is_model(name):
        pytest.skip(f"timm {timm.__version__} has no {name}")
    model = f"{own}:with_class" if name == "my.py" else f"timm/{name}"
    _, err = launch(attention.main, ["--model", model, "--weights", "random", "--dataset", "synthetic",
                                     "--num-images", 2, "--workers", 0, "--output-dir", tmp_path], status=2)
    assert "not known here" in err and err.count("\n") == 1


@pytest.mark.parametrize("name", ["test_vit2", "test_vit3"])
def test_attention_of_models_without_a_class_token(tmp_path, launch, name):
    launch(attention.main, ["--model", f"timm/{name}", "--weights", "random", "--dataset", "synthetic",
                            "--num-images", 2, "--workers", 0, "--queries", 1, "--output-dir", tmp_path])
    line, = map(json.loads, (tmp_path / "results.jsonl").read_text().splitlines())
    assert len(line["distance_patches"]) == build_model(f"timm/{name}", "random").depth


def test_a_method_without_official_file_or_random_is_one_line(monkeypatch):
    bare = types.ModuleType("models.bare")
    monkeypatch.setitem(sys.modules, "models.bare", bare)
    monkeypatch.setattr(models, "METHODS", (*models.METHODS, "bare"))
    with pytest.raises(CheckpointError, match="bare.py names no official file; give --weights PATH"):
        build_model("bare")
    with pytest.raises(CheckpointError, match="no function random in models/bare.py"):
        build_model("bare", "random")
