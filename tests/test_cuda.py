"""What a machine with a GPU needs and one without can show."""

import copy
import json
import os
import re
import time
from argparse import Namespace
from functools import cache, partial
from pathlib import Path

import pytest
import timm
import torch
from conftest import PROCESSES
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import models
import retrieval
import segment
from datasets import patches
from datasets import segmentation_transforms as transforms
from models import METHODS, build_model, fused_cross_entropy
from models.attention.maps import query_key
from models.encoder import Encoder
from models.features import DTYPES, encode_tokens, encoder_identity
from models.probes import HeadSGD, build_heads, knn_predict
from models.segmentation_head import LinearHead, upsampled_cross_entropy
from models.segmentation_probe import Segmenter
from models.timm_vit import TimmEncoder
from models.transfer import transfer_keypoints
from utils import UserError
from utils.distributed import init_processes
from utils.ending import exit_with_one_line_errors
from utils.run import autocast, log_waiting

GOLDEN = Path(__file__).parent / "golden"
CPU = torch.device("cpu")
DONE_HERE = []


def golden(method, **options):
    return build_model(method, str(GOLDEN / method / "checkpoint.pth"), num_heads=3, **options)


def images(count=2, height=64, width=64):
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(0))


class Calls(TorchDispatchMode):
    """Counts the calls of an operator."""

    def __init__(self, name):
        super().__init__()
        self.name, self.count = name, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.overloadpacket.__name__ == self.name
        return function(*args, **(kwargs or {}))


# Processes

def report_origin():
    print(os.getppid(), DONE_HERE, torch.get_num_threads())


def test_started_processes_inherit_nothing_of_this_one(launch):
    """CUDA's context and, where there is a GPU, autograd's threads cannot be used in a fork of the process that made
    them, so no test's process may be a fork of the one that runs the tests."""
    DONE_HERE.append("backward")
    torch.ones(1, requires_grad=True).backward()
    parent, done, threads = launch(report_origin, [], processes=2)[0].split()
    assert int(parent) != os.getpid() and done == "[]" and threads == "1"
    assert PROCESSES.get_start_method() == "forkserver"


@pytest.fixture
def machine_with_two_gpus(monkeypatch):
    """As init_processes sees it; returns the list of devices that are set."""
    chosen = []
    for name, value in (("is_available", lambda: True), ("device_count", lambda: 2), ("set_device", chosen.append),
                        ("current_device", lambda: chosen[-1])):
        monkeypatch.setattr(torch.cuda, name, value)
    libraries = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [library.allow_tf32 for library in libraries]
    for library in libraries:
        library.allow_tf32 = True
    yield chosen
    for library, value in zip(libraries, before, strict=True):
        library.allow_tf32 = value


def test_fp32_is_float32_on_a_gpu(machine_with_two_gpus):
    assert init_processes("cuda") == torch.device("cuda", 0)
    assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32


def test_more_processes_than_gpus_are_one_line(machine_with_two_gpus, monkeypatch):
    for name, value in (("LOCAL_WORLD_SIZE", "3"), ("LOCAL_RANK", "2")):
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"^3 processes were .* 2 GPU\(s\).*use --nproc-per-node 2, or --device cpu$"):
        init_processes("auto")
    assert not machine_with_two_gpus and init_processes("cpu") == CPU


def test_the_end_with_nccl_waits_for_no_threads(monkeypatch):
    left = []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_backend_config", lambda: "cpu:gloo,cuda:nccl")
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: left.append("destroyed"))
    monkeypatch.setattr(os, "_exit", left.append)
    exit_with_one_line_errors(lambda: left.append("ran"))
    assert left == ["ran", 0]


# The encoder's weights in the run's precision

@torch.no_grad()
def tokens_at(encoder, pictures, precision):
    with autocast(CPU, precision):
        return [encoder(pictures), *encoder.get_intermediate_layers(pictures, [1, 3], norm=True)]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("method", [*METHODS, "timm"])
def test_weights_are_cast_once_and_tokens_are_those_of_autocast(monkeypatch, method, precision):
    encoder = golden(method) if method != "timm" else TimmEncoder(timm.create_model(
        "vit_base_patch16_siglip_224", embed_dim=48, depth=4, num_heads=3, num_classes=0, dynamic_img_size=True))
    exact = tokens_at(encoder, images(), "fp32")
    with monkeypatch.context() as patch:
        patch.setattr(Encoder, "cast_weights", lambda self, device: None)
        with Calls("_to_copy") as plain:
            expected = tokens_at(encoder, images(), precision)
    tokens_at(encoder, images(), precision)
    with Calls("_to_copy") as ours:
        found = tokens_at(encoder, images(), precision)
    assert all(map(torch.equal, found, expected))
    layers = [one for one in encoder.vit.blocks.modules() if isinstance(one, torch.nn.Linear)]
    # In both passes of tokens_at, and those of the patch embedding.
    assert plain.count - ours.count >= 2 * (2 + sum(len(list(one.parameters())) for one in layers))
    # Nothing that says what the encoder is has changed, and neither has float32.
    assert {tensor.dtype for tensor in (*encoder.parameters(), *encoder.state_dict().values())
            if tensor.is_floating_point()} == {torch.float32}
    assert method == "timm" or encoder_identity(encoder) == encoder_identity(golden(method))
    assert all(map(torch.equal, tokens_at(encoder, images(), "fp32"), exact))


def test_the_projector_and_attention_maps_stay_float32():
    encoder = golden("dino")
    with torch.no_grad(), autocast(CPU, "bf16"):
        features = encoder.extract(images())
        assert encoder.vit.blocks[0].attn.qkv.weight.dtype == torch.bfloat16
    assert torch.equal(features["projected"], encoder.projector(features["cls"]))
    query, key = query_key(encoder.vit.blocks[0].attn, torch.randn(1, 17, 48))
    assert query.dtype == key.dtype == torch.float32


def test_beits_bias_is_kept_in_the_precision_and_not_copied_for_the_kernel():
    encoder = golden("beit")
    assert encoder.relative_bias(4, 4).dtype == torch.float32
    with autocast(CPU, "bf16"):
        bias = encoder.relative_bias(4, 4)
        assert encoder.relative_bias(4, 4) is bias
    assert bias.dtype == torch.bfloat16 and bias.shape == (1, 3, 17, 17)
    # What PyTorch asks of an attention mask (aligned_tensor in its sdp_utils), else it pads a copy in every call.
    assert all(stride % 8 == 0 for stride in bias.stride()[:-1]) and bias.stride(-1) == 1


def test_the_segmentation_head_is_a_matrix_product():
    """Not a convolution, whose TF32 is another switch's; float32 under autocast; a file's weights [K, D, 1, 1] fit."""
    head = LinearHead(8, 5)
    assert head.state_dict()["weight"].shape == (5, 8, 1, 1)
    blocks = [torch.randn(2, 4, 3, 6) for _ in range(2)]
    with Calls("convolution") as convolutions, autocast(CPU, "bf16"):
        logits = head([block.bfloat16() for block in blocks])
    assert convolutions.count == 0 and logits.dtype == torch.float32
    rounded = torch.cat(blocks, 1).bfloat16().float()
    assert torch.allclose(logits, torch.nn.functional.conv2d(rounded, head.weight, head.bias), atol=1e-6)


@pytest.mark.parametrize("classes, crop_size", [(64, 1024), (150, 512), (254, 1024), (19, 320), (254, 4096)])
def test_logits_of_windows_stay_below_what_cuda_interpolates(classes, crop_size):
    for kind in ("cuda", "cpu"):
        count = segment.windows_together(torch.device(kind), classes, crop_size)
        elements = classes * crop_size**2
        assert count == 1 or count * elements <= min(2**31 - 1, segment.WINDOW_BYTES[kind] // 4)
        assert count == 32 or (count + 1) * elements > min(2**31 - 1, segment.WINDOW_BYTES[kind] // 4)


# CUDA's branches, on tensors that have a device and no data

@pytest.fixture
def fake_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *args, **options: True)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    with FakeTensorMode():
        try:
            images = torch.empty(1, 1, 4, 4, device="cuda")
            torch.nn.functional.conv2d(images, images)
            torch.nn.functional.scaled_dot_product_attention(images, images, images)
        except RuntimeError:
            pytest.skip("for tensors without data this torch (seen: 2.6) asks a CUDA driver, and there is none")
        yield torch.device("cuda", 0)


def moved(module, device):
    """Module.to, which cannot change a real parameter into one without data."""
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensors[name] = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
                    if tensors is part._parameters:
                        tensors[name] = torch.nn.Parameter(tensors[name], tensor.requires_grad)
    return module


@cache
def all_encoders():
    return {method: golden(method) for method in METHODS} | {
        "timm": build_model("timm/vit_tiny_patch16_224", "random")}


@pytest.fixture
def encoder(request):
    """A copy, made before tensors have no data, of the encoder of the test's parameter method (else BEiT's)."""
    return copy.deepcopy(all_encoders()[request.node.callspec.params.get("method", "beit")])


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("method", [*METHODS, "timm"])
def test_encoders_on_cuda(encoder, fake_cuda, method, precision):
    encoder = moved(encoder, fake_cuda)
    pixels = torch.empty(2, 3, 64, 64, dtype=torch.uint8, device=fake_cuda)
    with torch.inference_mode(), autocast(fake_cuda, precision):
        found = encoder.extract(encoder.preprocess(pixels), isometric=True)
        layers = encoder.get_intermediate_layers(torch.empty(2, 3, 64, 96, device=fake_cuda), [1, 3], norm=True)
    assert all(value.is_cuda and value.dtype == torch.float32 for value in found.values())
    assert all(layer.is_cuda and layer.shape[2:] == (4, 6) for layer in layers)
    assert encoder.vit.blocks[0].mlp.fc1.weight.dtype == DTYPES[precision]
    tokens = encode_tokens(encoder, pixels, precision).tokens
    assert tokens.is_cuda and tokens.dtype == DTYPES[precision]


@pytest.mark.parametrize("batch_norm", [False, True])
def test_a_step_of_segmentation_on_cuda(encoder, fake_cuda, monkeypatch, batch_norm):
    monkeypatch.setattr(fused_cross_entropy, "can_fuse", lambda logits, label: False)
    segmenter = moved(Segmenter(encoder, LinearHead(2 * 48, 5), (1, 3), "bf16", False, batch_norm), fake_cuda).train()
    logits = segmenter.patch_logits(torch.empty(2, 3, 64, 64, device=fake_cuda))
    loss = upsampled_cross_entropy(logits, torch.empty(2, 64, 64, dtype=torch.uint8, device=fake_cuda))
    assert logits.dtype == torch.float32 and loss.grad_fn.saved_tensors[0].shape == logits.shape
    with torch.inference_mode():
        logits = segmenter.eval()(torch.empty(2, 3, 50, 70, device=fake_cuda))
        assert logits.shape == (2, 5, 50, 70)
        assert segment.upsampled_argmax(logits[0], (90, 120)).is_cuda


def test_a_training_batch_on_cuda(fake_cuda, monkeypatch):
    """All but the choice among crops, whose number depends on the data (test_segmentation_transforms.py)."""
    def first(cut, offsets):
        samples = torch.arange(len(offsets), device=offsets.device)
        labels = cut(samples, offsets[:, 0])
        assert transforms.accept_crops(labels).is_cuda
        return torch.zeros_like(samples), labels

    monkeypatch.setattr(transforms, "choose_crops", first)
    monkeypatch.setattr(torch.Tensor, "__int__", lambda self: 40)  # source rows of a crop
    transforms.colour_tables.cache_clear()
    numbers = torch.empty(3, 4, dtype=torch.int64, device=fake_cuda)
    batch = transforms.Packed(torch.empty(9000, dtype=torch.int32, device=fake_cuda), *numbers)
    statistics = torch.empty(1, 3, 1, 1, device=fake_cuda)
    changes = [transforms.draw_augmentation(0, 0, position) for position in range(4)]
    images, labels = transforms.training_batch(batch, [(40, 50)] * 4, changes, (64, 32), 32, statistics, statistics)
    transforms.colour_tables.cache_clear()
    assert images.is_cuda and images.shape == (4, 3, 32, 32) and labels.is_cuda and labels.shape == (4, 32, 32)


def test_ranking_and_heads_on_cuda(fake_cuda):
    similarity = torch.empty(7, 100, device=fake_cuda)
    assert retrieval.ranked_precision(similarity, 10, 30, 1).shape == (7,)
    assert retrieval.ranked_precision(similarity, 10, 30, 1).is_cuda
    tokens = torch.empty(9, 17, 48, dtype=torch.bfloat16, device=fake_cuda)
    for kind in ("linear", "attentive"):
        heads = moved(build_heads(kind, 2, 48, 5, 3, True), fake_cuda)
        logits = heads.classify(tokens, torch.arange(4, device=fake_cuda))
        assert logits.shape == (2, 4, 5) and logits.is_cuda
        for parameter in heads.parameters():
            parameter.grad = torch.empty_like(parameter)
        HeadSGD(heads.parameters(), trust_coefficient=0.001).step(torch.empty(2, device=fake_cuda))
    assert knn_predict(tokens[:, 0], torch.empty(9, dtype=torch.int64, device=fake_cuda), tokens[:, 1], 5)[10].is_cuda
    points = torch.empty(3, 2, dtype=torch.float64, device=fake_cuda)
    found = transfer_keypoints(torch.empty(48, 4, 4, device=fake_cuda), torch.empty(48, 6, 6, device=fake_cuda), points,
                               "soft-argmax")
    assert found.is_cuda and found.shape == (3, 2)


# What a run waits for

@pytest.mark.parametrize("loading, encoding", [(0.05, 0.0), (0.0, 0.05)])
def test_the_log_says_what_encoding_waited_for(loading, encoding):
    def batches():
        for number in range(4):
            time.sleep(loading)
            yield number

    lines, seen = [], []
    for number in log_waiting(batches(), "encoding", lines.append):
        time.sleep(encoding)
        seen.append(number)
    total, waited = map(float, re.fullmatch(r"encoding: (.+) s, (.+) s of it waiting for images to be decoded, .*",
                                            lines[0]).groups())
    assert seen == [0, 1, 2, 3] and len(lines) == 1 and total >= 0.2
    assert waited >= 0.2 if loading else waited <= 0.1


def test_groups_of_patches_leave_work_for_every_worker(monkeypatch):
    """Groups of 64, but of a small data set four for each worker, down to 16."""
    groups = []
    monkeypatch.setattr(patches, "DataLoader", lambda items, *args, **options: groups.append(len(items)) or [])
    images = [patches.PatchImage("", None, [0])] * 1024
    for workers in (0, 2, 8, 100):
        assert list(patches.PatchDataset(images, ["a"]).batches(range(1024), 256, workers)) == []
    assert groups == [16, 16, 32, 64]


# --compile

def arguments(**options):
    return Namespace(**{"model": "ibot", "weights": str(GOLDEN / "ibot" / "checkpoint.pth"), "num_heads": 3, "seed": 0,
                        "weights_key": None, "debug": False, "precision": "fp32", "compile": True, "image_size": 64}
                     | options)


def test_compiled_tokens():
    lines, expected = [], golden("ibot")
    encoder = models.load_encoder(arguments(), CPU, lines.append)
    for pictures in (images(), images(3, 96, 64)):
        with torch.inference_mode():
            for ours, plain in zip(tokens_at(encoder, pictures, "fp32"), tokens_at(expected, pictures, "fp32"),
                                   strict=True):
                assert (ours - plain).norm() <= 1e-5 * plain.norm()
    assert lines[-1].startswith("--compile: the first call took") and "8 images of 64 x 64" in lines[-1]


@pytest.mark.parametrize("model", ["beit", "timm/beit_base_patch16_224"])
def test_sizes_and_precisions_in_turn(monkeypatch, model):
    """Blocks that torch.compile traced, weights in autocast's type and relative position tables follow each change."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))

    monkeypatch.setattr(timm, "create_model", partial(timm.create_model, depth=2))
    fresh = golden("beit") if model == "beit" else build_model(model, "random")
    if model != "beit":
        if not hasattr(fresh.vit, "set_input_size"):
            pytest.skip(f"timm {timm.__version__} gives a Beit one input size")
        for block in fresh.vit.blocks:
            torch.nn.init.normal_(block.attn.relative_position_bias_table)  # timm's are 0
        fresh = TimmEncoder(fresh.vit)
    used = copy.deepcopy(fresh)
    models.compile_blocks(used, 64, "fp32", print)
    for precision in ("bf16", "fp32", "bf16"):
        for pictures in (images(), images(3, 96, 64)):
            other = copy.deepcopy(fresh)
            with torch.inference_mode(), autocast(CPU, precision):
                assert torch.equal(used(pictures), other(pictures))


def test_compile_by_the_command_line(launch, monkeypatch, tmp_path):
    used = []
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: used.append(function) or function)
    words = ["--model", "ibot", "--weights", GOLDEN / "ibot" / "checkpoint.pth", "--num-heads", 3, "--num-images", 2,
             "--image-size", 64, "--workers", 0, "--device", "cpu", "--output-dir", tmp_path]
    launch(retrieval.main, [*words, "--compile"])
    assert len(used) == 4 and json.loads((tmp_path / "results.jsonl").read_text())["args"]["compile"]
    assert "--compile: the first call took" in (tmp_path / "log.txt").read_text()


def test_a_compiler_that_fails(monkeypatch):
    def broken(function, dynamic):
        def fails(*args, **keywords):
            raise RuntimeError("No working C++ compiler found\nand more")
        return fails

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(UserError, match="^--compile: RuntimeError: No working C.. compiler found; leave --compile out"):
        models.load_encoder(arguments(), CPU, print)


def test_the_log_says_what_keeps_flash_attention_out():
    for model, said in (("beit", True), ("ibot", False)):
        lines = []
        models.load_encoder(arguments(model=model, weights=str(GOLDEN / model / "checkpoint.pth"), compile=False), CPU,
                            lines.append)
        assert ("flash attention" in lines[0]) == said
