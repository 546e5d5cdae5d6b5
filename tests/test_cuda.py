"""What a machine with a GPU needs and one without can show."""

from argparse import Namespace
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import retrieval
import segment
from models import METHODS, beit, load_encoder
from models.features import encode_tokens
from models.knn_segmentation import KNNSegmenter, patch_tokens
from models.probes import HeadSGD, build_heads, knn_predict
from models.segmentation_head import LinearHead, upsampled_cross_entropy
from models.segmentation_probe import Segmenter
from models.transfer import locate, transfer_keypoints
from utils import UserError, distributed
from utils.distributed import init_processes
from utils.run import DTYPES, autocast

GOLDEN = Path(__file__).parent / "golden"
CPU = torch.device("cpu")


def loaded(model, precision="fp32", compiled=False):
    """As a script loads it, on the CPU: a golden file, or timm's network without training."""
    weights, heads = (str(GOLDEN / model / "checkpoint.pth"), 3) if model in METHODS else ("random", None)
    return load_encoder(Namespace(model=model, weights=weights, weights_key=None, num_heads=heads, seed=0,
                                  image_size=64, precision=precision, compile=compiled), CPU, print)


def images(count=2, height=64, width=64):
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(0))


class Calls(TorchDispatchMode):
    """Counts the calls of an operator, and keeps the types of their first tensors."""

    def __init__(self, name):
        super().__init__()
        self.name, self.count, self.dtypes = name, 0, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket.__name__ == self.name:
            self.count += 1
            self.dtypes.add(args[0].dtype)
        return function(*args, **(kwargs or {}))


# Processes

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


def test_nccl_gets_tensors_on_the_gpu(monkeypatch):
    copies = []
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "get_backend", lambda: "nccl")
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: tensor.mul_(2))
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self: copies.append(self.clone()) or copies[-1])
    value = torch.tensor([1, 2])
    assert distributed.all_reduce(value) is value and value.tolist() == [2, 4] and len(copies) == 1


# What the precision reaches

def test_the_projector_stays_float32():
    encoder = loaded("dino", "bf16")
    with torch.no_grad(), autocast(CPU, "bf16"):
        features = encoder.extract(images())
        assert encoder.vit.blocks[0].attn.qkv.weight.dtype == torch.bfloat16
    assert torch.equal(features["projected"], encoder.projector(features["cls"]))


def test_beits_bias_is_in_the_precision_and_not_copied_for_the_kernel():
    encoder = loaded("beit")
    assert encoder.block_options(4, 4)["shared_rel_pos_bias"].dtype == torch.float32
    with autocast(CPU, "bf16"):
        bias = encoder.block_options(4, 4)["shared_rel_pos_bias"]
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


@pytest.mark.parametrize("classes, crop_size, together", [(150, 512, 8), (254, 2048, 2), (254, 4096, 1)])
def test_logits_of_windows_stay_below_what_cuda_interpolates(monkeypatch, classes, crop_size, together):
    counts, split = [], segment.data.open_segmentation("synthetic", None, "val", 1)
    split.num_classes, split.names = classes, range(classes)
    logits = torch.ones(1, classes, 2, 2)
    monkeypatch.setattr(segment, "slide_inference", lambda *given: counts.append(given[4]) or logits)
    segment.evaluate(Segmenter(loaded("dino"), None, (1, 3), "fp32"), split, (64, 64), crop_size, 32, workers=0)
    assert counts == [together]


# CUDA's branches, on tensors that have a device and no data

@pytest.fixture
def fake_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *args, **options: True)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    # What is kept by device has no data here.
    for kept in (beit.geometric_spline, beit.relative_index):
        kept.cache_clear()
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


@pytest.fixture
def encoder(request):
    """Of the test's parameters model and precision, loaded before tensors have no data."""
    given = request.node.callspec.params
    return loaded(given.get("model", "beit"), given.get("precision", "bf16"))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("model", [*METHODS, "timm/test_vit"])
def test_encoders_on_cuda(encoder, fake_cuda, model, precision):
    encoder = moved(encoder, fake_cuda)
    pixels = torch.empty(2, 3, 64, 64, dtype=torch.uint8, device=fake_cuda)
    with torch.inference_mode(), autocast(fake_cuda, precision):
        found = encoder.extract(encoder.preprocess(pixels))
        layers = encoder.get_intermediate_layers(torch.empty(2, 3, 64, 96, device=fake_cuda), [1, 3], norm=True)
    assert all(value.is_cuda and value.dtype == torch.float32 for value in found.values())
    assert all(layer.is_cuda and layer.shape[2:] == (4, 6) for layer in layers)
    assert encoder.vit.blocks[0].mlp.fc1.weight.dtype == DTYPES[precision]
    tokens = encode_tokens(encoder, pixels, precision)[1]
    assert tokens.is_cuda and tokens.dtype == DTYPES[precision]


@pytest.mark.parametrize("batch_norm", [False, True])
def test_a_step_of_segmentation_on_cuda(encoder, fake_cuda, batch_norm):
    segmenter = moved(Segmenter(encoder, LinearHead(2 * 48, 5), (1, 3), "bf16", False, batch_norm), fake_cuda).train()
    logits = segmenter.patch_logits(torch.empty(2, 3, 64, 64, device=fake_cuda))
    labels = torch.empty(2, 64, 64, dtype=torch.uint8, device=fake_cuda)
    loss = upsampled_cross_entropy(logits, labels, dtype=torch.bfloat16)
    assert logits.dtype == torch.float32 and loss.grad_fn.saved_tensors[0].shape == logits.shape
    with torch.inference_mode():
        logits = segmenter.eval()(torch.empty(2, 3, 50, 70, device=fake_cuda))
        assert logits.shape == (2, 5, 50, 70)
        assert segment.upsampled_argmax(logits[0], (90, 120)).is_cuda


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_nearest_neighbours_of_patches_on_cuda(encoder, fake_cuda, precision):
    """Products in the run's precision, probabilities in float32."""
    encoder = moved(encoder, fake_cuda)
    memory = torch.empty(100, 48, dtype=DTYPES[precision], device=fake_cuda)
    segmenter = KNNSegmenter(encoder, memory, torch.empty(100, 5, device=fake_cuda), precision)
    pictures = torch.empty(2, 3, 64, 48, device=fake_cuda)
    with torch.inference_mode():
        assert patch_tokens(encoder, pictures, precision).dtype == DTYPES[precision]
        mixed = segmenter.patch_logits(pictures)
    assert mixed.is_cuda and mixed.shape == (2, 5, 4, 3) and mixed.dtype == torch.float32


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
    found = transfer_keypoints(torch.empty(48, 4, 4, device=fake_cuda), torch.empty(48, 6, 6, device=fake_cuda), points)
    assert found.is_cuda and found.shape == (3, 2)
    target = torch.empty(2, 48, 6, 6, dtype=torch.bfloat16, device=fake_cuda)
    with Calls("bmm") as products:
        found = locate(torch.empty(2, 3, 48, device=fake_cuda), target)
    assert products.dtypes == {torch.bfloat16} and found.shape == (2, 3, 2)


# --compile

def test_compiled_tokens():
    encoder, expected = loaded("ibot", compiled=True), loaded("ibot")
    for pictures in (images(), images(3, 96, 64)):
        with torch.inference_mode():
            ours, plain = encoder(pictures), expected(pictures)
        assert (ours - plain).norm() <= 1e-5 * plain.norm()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("model", ["beit", "timm/beit_base_patch16_224"])
def test_sizes_in_turn(monkeypatch, model, precision):
    """Blocks that torch.compile traced, and relative position tables, follow each change of size."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    monkeypatch.setattr(timm, "create_model", partial(timm.create_model, depth=2))
    used, fresh = loaded(model, precision, compiled=True), loaded(model, precision)
    if model != "beit" and not hasattr(fresh.vit, "set_input_size"):
        pytest.skip(f"timm {timm.__version__} gives a Beit one input size")
    for pictures in (images(), images(3, 96, 64), images()):
        with torch.inference_mode(), autocast(CPU, precision):
            assert torch.equal(used(pictures), fresh(pictures))
