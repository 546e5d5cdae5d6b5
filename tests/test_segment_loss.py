"""The head and its loss against the reference pipeline's values and against float64 autograd."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from models import segmentation_head
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


def loss_and_gradient(logits, label, **options):
    """Of the sum over pixels."""
    logits = logits.clone().requires_grad_()
    loss = upsampled_cross_entropy(logits, label, total_pixels=1, **options)
    loss.backward()
    return loss.detach(), logits.grad


def test_against_float64():
    logits, label = example()
    loss, gradient = loss_and_gradient(logits, label)
    expected_loss, expected_gradient = reference(logits, label)
    assert torch.allclose(loss.double(), expected_loss, rtol=1e-6)
    assert torch.allclose(gradient.double(), expected_gradient, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype,loss_error,gradient_error", [(torch.bfloat16, 2e-3, 2e-2), (torch.float16, 2e-4, 4e-3)])
def test_strips_in_half_precision_sum_in_float32(dtype, loss_error, gradient_error):
    logits, label = example(height=6, width=8)
    loss, gradient = loss_and_gradient(logits, label, dtype=dtype)
    expected_loss, expected_gradient = reference(logits, label)
    assert loss.dtype == gradient.dtype == torch.float32
    assert (loss / expected_loss - 1).abs() < loss_error
    assert (gradient - expected_gradient).norm() < gradient_error * expected_gradient.norm()


def test_compiled_strips_equal_plain_ones():
    """By dynamo and without its code generator, which takes half a minute here."""
    logits, label = example(classes=7)
    compiled = torch.compile(strip_loss_and_gradient, fullgraph=True, backend="aot_eager")
    for one, other in zip(loss_and_gradient(logits, label, strip=compiled), loss_and_gradient(logits, label),
                          strict=True):
        assert torch.allclose(one, other, rtol=1e-6, atol=1e-6)


def test_large_logits_do_not_overflow():
    logits, label = example(classes=7)
    loss, gradient = loss_and_gradient(300 * logits, label)
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
        upsampled_cross_entropy(logits, label)
    # The strip, and one image's logits after the interpolation across.
    assert largest.bytes <= max(4 * 64 * 128 * 4, 64 * 8 * 128 * 4)
    assert 4 * label.numel() * 64 >= 32 * largest.bytes


COPIED = """
import sys
import torch
import torch.nn.functional as F
from segmentation_head import LinearHead, upsampled_cross_entropy
torch.manual_seed(0)
logits = LinearHead(6, 5)([10 * torch.randn(2, 3, 4, 6), 10 * torch.randn(2, 3, 4, 6)])
label = torch.randint(0, 5, (2, 16, 24), dtype=torch.uint8)
expected = F.cross_entropy(F.interpolate(logits, scale_factor=4, mode="bilinear"), label.long())
torch.testing.assert_close(upsampled_cross_entropy(logits, label), expected)
assert not any(name.startswith(("models", "utils")) for name in sys.modules)
"""


def test_the_head_copies_out_alone(tmp_path):
    shutil.copy(segmentation_head.__file__, tmp_path)
    run = subprocess.run([sys.executable, "-c", COPIED], capture_output=True, text=True, cwd=tmp_path,
                         env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"})
    assert run.returncode == 0, run.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
def test_on_a_gpu(dtype, tolerance):
    for size in ({}, {"classes": 150, "height": 5, "width": 7}, {"classes": 19, "height": 20, "width": 20}):
        logits, label = example(**size)
        _, gradient = loss_and_gradient(logits.cuda(), label.cuda(), dtype=dtype)
        _, expected = reference(logits, label)
        assert (gradient.cpu() - expected).norm() < tolerance * expected.norm()
