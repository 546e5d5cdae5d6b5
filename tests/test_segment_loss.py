"""The head and its loss against the reference pipeline's values and against float64 autograd."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode

from models import fused_cross_entropy, segmentation_head
from models.segmentation_head import LinearHead, strip_loss_and_gradient, upsampled_cross_entropy

GOLDEN = Path(__file__).parent / "golden" / "segmentation"
CASES = torch.load(GOLDEN / "head.pt", weights_only=True)["cases"]


@pytest.mark.parametrize("strip_bytes", [1, 16 << 20], ids=["one row", "whole image"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_logits_loss_and_gradients(case, strip_bytes, monkeypatch):
    monkeypatch.setitem(segmentation_head.STRIP_BYTES, "cpu", strip_bytes)
    channels = sum(block.shape[1] for block in case["features"])
    head = LinearHead(channels, case["num_classes"])
    head.load_state_dict({"weight": case["weight"], "bias": case["bias"]})
    logits = head(case["features"])
    assert torch.allclose(logits, case["logits"], atol=1e-5)
    loss = upsampled_cross_entropy(logits, case["label"])
    assert abs(loss.item() - case["loss"]) < 1e-5
    loss.backward()
    assert torch.allclose(head.weight.grad, case["grad_weight"], atol=1e-5)
    assert torch.allclose(head.bias.grad, case["grad_bias"], atol=1e-5)


def reference(logits, label):
    """Full upsampling in float64, gradient by autograd."""
    logits = logits.double().requires_grad_()
    upsampled = F.interpolate(logits, size=label.shape[1:], mode="bilinear", align_corners=False)
    loss = F.cross_entropy(upsampled, label.long(), ignore_index=255, reduction="sum")
    loss.backward()
    return loss.detach(), logits.grad


def example(batch=2, classes=209, height=2, width=3, scale=16):
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(batch, classes, height, width, generator=generator)
    label = torch.randint(0, classes, (batch, height * scale, width * scale), dtype=torch.uint8, generator=generator)
    label[:, 1:scale // 2, 5:] = 255
    return logits, label


def test_against_float64():
    logits, label = example()
    loss, gradient = strip_loss_and_gradient(logits, label, 255)
    expected_loss, expected_gradient = reference(logits, label)
    assert torch.allclose(loss.double(), expected_loss, rtol=1e-6)
    assert torch.allclose(gradient.double(), expected_gradient, rtol=1e-5, atol=1e-5)


def test_large_logits_do_not_overflow():
    logits, label = example(classes=7)
    loss, gradient = strip_loss_and_gradient(300 * logits, label, 255)
    expected_loss, _ = reference(300 * logits, label)
    assert torch.allclose(loss.double(), expected_loss, rtol=1e-6)
    assert gradient.isfinite().all()


def test_gradient_of_a_batch_is_the_sum_over_processes():
    """Losses of parts of a batch, each divided by the pixels of the whole batch, add up to its loss."""
    logits, label = example(batch=3, classes=5)
    logits.requires_grad_()
    whole = upsampled_cross_entropy(logits, label)
    parts = [upsampled_cross_entropy(logits[i:i + 1], label[i:i + 1], total_pixels=label.numel()) for i in range(3)]
    assert torch.allclose(sum(parts), whole)


def test_memory_is_bounded_by_the_strips(monkeypatch):
    """No tensor of the loss is larger than a strip or the logits; the upsampled logits would be 32 times as large."""
    logits, label = example(batch=2, classes=64, height=8, width=8)
    monkeypatch.setitem(segmentation_head.STRIP_BYTES, "cpu", 4 * 64 * 128 * 4)

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        bytes = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                self.bytes = max(self.bytes, result.numel() * result.element_size())
            return result

    with Largest() as largest:
        strip_loss_and_gradient(logits, label, 255)
    # The strip, and one image's logits after the interpolation across.
    assert largest.bytes <= max(4 * 64 * 128 * 4, 64 * 8 * 128 * 4)
    assert 4 * label.numel() * 64 >= 32 * largest.bytes


COPIED = """
import sys
import torch
import torch.nn.functional as F
from segmentation_head import LinearHead, upsampled_cross_entropy
from torch._subclasses import FakeTensorMode
torch.manual_seed(0)
logits = LinearHead(6, 5)([10 * torch.randn(2, 3, 4, 6), 10 * torch.randn(2, 3, 4, 6)])
label = torch.randint(0, 5, (2, 16, 24), dtype=torch.uint8)
expected = F.cross_entropy(F.interpolate(logits, scale_factor=4, mode="bilinear"), label.long())
torch.testing.assert_close(upsampled_cross_entropy(logits, label), expected)
with FakeTensorMode():
    logits, label = torch.empty(2, 5, 4, 6, device="cuda"), torch.empty(2, 16, 24, dtype=torch.uint8, device="cuda")
    assert upsampled_cross_entropy(logits, label).device.type == "cuda"
assert not any(name.startswith(("models", "utils")) for name in sys.modules)
"""


without_data = pytest.mark.skipif(torch.__version__.startswith("2.6."),
                                  reason="CUDA tensors without data abort torch 2.6")


@without_data
def test_the_head_copies_out_alone(tmp_path):
    """segmentation_head.py in an empty folder computes its loss, and on CUDA tensors does not miss the kernel."""
    shutil.copy(segmentation_head.__file__, tmp_path)
    run = subprocess.run([sys.executable, "-c", COPIED], capture_output=True, text=True, cwd=tmp_path,
                         env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"})
    assert run.returncode == 0, run.stderr


@without_data
@pytest.mark.parametrize("usable", [True, False])
def test_cuda_logits_go_to_the_kernel_where_it_can_be_used(monkeypatch, usable):
    monkeypatch.setattr(fused_cross_entropy, "can_fuse", lambda logits, label: usable)
    monkeypatch.setattr(fused_cross_entropy, "fused_loss_and_gradient",
                        lambda logits, label, ignore_index: (logits.new_zeros(()), logits.new_zeros(7)))
    with FakeTensorMode():
        logits = torch.empty(2, 5, 4, 6, device="cuda", requires_grad=True)
        loss = upsampled_cross_entropy(logits, torch.empty(2, 16, 24, dtype=torch.uint8, device="cuda"))
        assert loss.grad_fn.saved_tensors[0].shape == ((7,) if usable else logits.shape)


INTERPRETED = """
import torch
from models.fused_cross_entropy import fused_loss_and_gradient
from models.segmentation_head import strip_loss_and_gradient
from test_segment_loss import example
for size in (dict(classes=21, scale=4), dict(batch=1, classes=209, height=1, width=2, scale=6)):
    logits, label = example(**size)
    fused, strips = (function(logits, label, 255) for function in (fused_loss_and_gradient, strip_loss_and_gradient))
    assert torch.allclose(fused[0], strips[0], rtol=1e-5), (fused[0], strips[0])
    assert torch.allclose(fused[1], strips[1], rtol=1e-5, atol=1e-5)
"""


@pytest.mark.skipif(fused_cross_entropy.triton is None, reason="Triton is not installed")
def test_fused_kernel_in_tritons_interpreter():
    """The kernel's arithmetic, run without a GPU; its speed and its compilation are not tested here."""
    paths = os.pathsep.join([str(Path(__file__).parents[1]), str(Path(__file__).parent)])
    run = subprocess.run([sys.executable, "-c", INTERPRETED], capture_output=True, text=True,
                         env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": paths})
    assert run.returncode == 0, run.stderr


COMPILED = """
import subprocess, sys
from pathlib import Path
import torch, triton, triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from models import fused_cross_entropy
kernel, given = fused_cross_entropy._cell_kernel, {}
types = dict.fromkeys(("height", "width", "classes", "ignore_index"), "i32")
types |= {"logits": "*fp32", "labels": "*u8", "losses": "*fp32", "corners": "*fp32"}
class Recorder:
    def __getitem__(self, grid):
        return lambda *args, **options: given.update(options)
fused_cross_entropy._cell_kernel = Recorder()
for classes in (209, 512):
    label = torch.zeros(1, 32, 32, dtype=torch.uint8)
    fused_cross_entropy.fused_loss_and_gradient(torch.zeros(1, classes, 2, 2), label, 255)
    warps = given.pop("num_warps")
    source = ASTSource(kernel, types | dict.fromkeys(given, "constexpr"), given)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
    Path(sys.argv[1]).write_bytes(compiled.asm["cubin"])
    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    print(subprocess.run([tool, "-res-usage", sys.argv[1]], capture_output=True, text=True, check=True).stdout)
"""


@pytest.mark.skipif(fused_cross_entropy.triton is None or not hasattr(fused_cross_entropy.triton.backends, "nvidia"),
                    reason="Triton for NVIDIA is not installed")
def test_the_kernel_compiles_for_hopper_without_spilling(tmp_path):
    run = subprocess.run([sys.executable, "-c", COMPILED, str(tmp_path / "kernel.cubin")], capture_output=True,
                         text=True, cwd=Path(__file__).parents[1])
    if "has no attribute" in run.stderr or "unexpected keyword" in run.stderr:
        pytest.skip("this Triton compiles in another way")
    usage = re.findall(r"REG:(\d+) STACK:(\d+)", run.stdout)
    assert len(usage) == 2, run.stderr
    assert all(int(stack) == 0 and int(registers) <= 168 for registers, stack in usage)


@pytest.mark.parametrize("fault", ["raises", "is wrong"])
def test_a_kernel_that_does_not_work_is_not_used(monkeypatch, fault):
    def broken(logits, label, ignore_index):
        if fault == "raises":
            raise RuntimeError("no such architecture")
        return logits.sum(), logits

    fused_cross_entropy.kernel_is_right.cache_clear()
    monkeypatch.setattr(fused_cross_entropy, "fused_loss_and_gradient", broken)
    with pytest.warns(UserWarning, match="no such architecture" if fault == "raises" else "disagrees"):
        assert not fused_cross_entropy.kernel_is_right(torch.device("cpu"))
    fused_cross_entropy.kernel_is_right.cache_clear()
    monkeypatch.setattr(fused_cross_entropy, "fused_loss_and_gradient", strip_loss_and_gradient)
    assert fused_cross_entropy.kernel_is_right(torch.device("cpu"))
    fused_cross_entropy.kernel_is_right.cache_clear()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_fused_kernel_on_a_gpu():
    for size in ({}, {"classes": 150, "height": 5, "width": 7}, {"classes": 19, "height": 20, "width": 20}):
        logits, label = (tensor.cuda() for tensor in example(**size))
        logits.requires_grad_()
        upsampled_cross_entropy(logits, label).backward()
        _, expected = reference(logits.detach().cpu(), label.cpu())
        assert torch.allclose(logits.grad.cpu().double() * label.numel(), expected, rtol=1e-4, atol=1e-4)
