"""The heads against textbook formulations written here, scikit-learn, scipy and PyTorch's own optimiser."""

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.special import softmax
from sklearn.linear_model import LogisticRegression

from models.features import Batch
from models.probe_training import RECIPES, Probe, Recipe
from models.probes import (
    AttentiveHeads,
    BatchNorm,
    HeadSGD,
    LinearHeads,
    build_heads,
    cosine_learning_rate,
    knn_predict,
    load_head,
    normalise,
)

ROOT = Path(__file__).parents[1]


def random_attentive(count=2, width=12, classes=4, num_heads=3, dtype=torch.float64):
    heads = AttentiveHeads(count, width, classes, num_heads).to(dtype)
    generator = torch.Generator().manual_seed(0)
    for parameter in heads.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=dtype) * 0.5 + 0.3
    return heads


def textbook_attentive(tokens, p, num_heads, norm_k_bias):
    """Section 4 word for word: every token is normalised and projected to a key and a value; loops over heads."""
    width = tokens.shape[2]
    head_width = width // num_heads
    query = F.layer_norm(p["query"], (width,), p["norm_q_weight"], p["norm_q_bias"], 1e-6)
    query = query @ p["q_weight"].T + p["q_bias"]
    keys = F.layer_norm(tokens, (width,), p["norm_k_weight"], norm_k_bias, 1e-6) @ p["k_weight"].T
    values = F.layer_norm(tokens, (width,), p["norm_v_weight"], p["norm_v_bias"], 1e-6) @ p["v_weight"].T + p["v_bias"]
    pooled = []
    for image in range(len(tokens)):
        row = []
        for head in range(num_heads):
            part = slice(head * head_width, (head + 1) * head_width)
            scores = torch.stack([key[part] @ query[part] for key in keys[image]]) / math.sqrt(head_width)
            weights = scores.exp() / scores.exp().sum()
            row.append(sum(weight * value[part] for weight, value in zip(weights, values[image], strict=True)))
        pooled.append(torch.cat(row))
    x = torch.stack(pooled) @ p["proj_weight"].T + p["proj_bias"]
    x = (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt()
    return x @ p["weight"].T + p["bias"]


def test_attentive_head_equals_the_textbook_in_output_and_gradients():
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randn(6, 5, 12, generator=generator, dtype=torch.float64) * 2 + 1.5
    target = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    heads = random_attentive()
    logits = heads(tokens)
    (logits * target).sum().backward()
    for k in range(2):
        p = {name: parameter.detach()[k].clone().requires_grad_() for name, parameter in heads.named_parameters()}
        norm_k_bias = torch.randn(12, generator=generator, dtype=torch.float64).requires_grad_()
        expected = textbook_attentive(tokens, p, 3, norm_k_bias)
        (expected * target).sum().backward()
        torch.testing.assert_close(logits[k], expected, rtol=1e-10, atol=1e-10)
        for name, parameter in heads.named_parameters():
            torch.testing.assert_close(parameter.grad[k], p[name].grad, rtol=1e-9, atol=1e-10, msg=name)
        # Why the head has no such parameter: nothing depends on it.
        assert norm_k_bias.grad.abs().max() < 1e-10


def test_attentive_head_reads_rows_of_half_precision_tokens_in_chunks():
    generator = torch.Generator().manual_seed(2)
    cache = normalise(torch.randn(300, 70, 48, generator=generator) + 0.5).bfloat16()  # chunks of 58 rows on a CPU
    rows = torch.randperm(300, generator=generator)[:200]
    heads = random_attentive(3, 48, 5, 3, torch.float32)
    exact = AttentiveHeads(3, 48, 5, 3).double()
    exact.load_state_dict(heads.state_dict())
    logits = heads.classify(cache, rows)
    expected = exact.classify(cache[rows].double())
    torch.testing.assert_close(logits.double(), expected, rtol=1e-3, atol=2e-3)
    logits.square().mean().backward()
    expected.square().mean().backward()
    for one, other in zip(heads.parameters(), exact.parameters(), strict=True):
        # Biases before the batch norm have none.
        assert (one.grad.double() - other.grad).norm() < 1e-3 * other.grad.norm() + 1e-5


def test_head_without_rows_has_zero_gradients():
    heads = random_attentive().eval()
    heads(torch.zeros(0, 5, 12, dtype=torch.float64)).sum().backward()
    assert all((parameter.grad == 0).all() for parameter in heads.parameters())


def test_heads_do_not_influence_each_other():
    tokens = torch.randn(6, 5, 12, generator=torch.Generator().manual_seed(3))
    for kind in ("linear", "attentive"):
        heads = build_heads(kind, 3, 12, 4, 3, batch_norm=True)
        heads.initialise([5, 6, 5])
        logits = heads(tokens)
        assert torch.equal(logits[0], logits[2]) and not torch.equal(logits[0], logits[1])
        alone = build_heads(kind, 1, 12, 4, 3, batch_norm=True)
        alone.initialise([6])
        torch.testing.assert_close(alone(tokens)[0], logits[1])


def test_initial_weights_have_the_published_spread():
    heads = AttentiveHeads(1, 192, 50, 3)
    heads.initialise([0])
    assert heads.weight.std().item() == pytest.approx(0.01, rel=0.05)
    for parameter in (heads.query, heads.q_weight, heads.k_weight, heads.v_weight, heads.proj_weight):
        assert parameter.std().item() == pytest.approx(0.02, rel=0.15)
    assert not heads.bias.any() and not heads.q_bias.any() and not heads.v_bias.any() and not heads.proj_bias.any()


def test_batch_norm_equals_pytorch():
    ours, theirs = BatchNorm(2, 6, eps=1e-5), [torch.nn.BatchNorm1d(6, affine=False) for _ in range(2)]
    generator = torch.Generator().manual_seed(4)
    for _ in range(3):
        x = torch.randn(2, 8, 6, generator=generator) * 3 + 1
        expected = torch.stack([norm(part) for norm, part in zip(theirs, x, strict=True)])
        torch.testing.assert_close(ours(x), expected)
    torch.testing.assert_close(ours.running_mean, torch.stack([norm.running_mean for norm in theirs]))
    torch.testing.assert_close(ours.running_var, torch.stack([norm.running_var for norm in theirs]))
    ours.eval()
    torch.testing.assert_close(ours(x), torch.stack([norm.eval()(part) for norm, part in zip(theirs, x, strict=True)]))


def test_linear_head_agrees_with_logistic_regression():
    generator = np.random.default_rng(0)
    centres = generator.normal(size=(4, 20)) * 1.5
    labels = generator.integers(0, 4, 800)
    features = (centres[labels] + generator.normal(size=(800, 20))).astype(np.float32)
    reference = LogisticRegression(C=1e4, max_iter=2000).fit(features[:500], labels[:500])
    probe = Probe("linear", Recipe(0.4, 100), 100, [0.1, 0.4], [0], 90, 20, 4, 1, torch.device("cpu"))
    tokens, target = torch.from_numpy(features)[:, None], torch.from_numpy(labels)
    for epoch in range(90):
        order = torch.randperm(500, generator=torch.Generator().manual_seed(epoch))
        for rows in probe.steps(order):
            probe.step(Batch(tokens, rows, target[rows]), epoch)
    predicted = probe.heads(tokens[500:]).argmax(-1).numpy()
    expected = reference.score(features[500:], labels[500:])
    assert expected > 0.95
    for k in range(2):
        assert abs((predicted[k] == labels[500:]).mean() - expected) < 0.015
        assert (predicted[k] == reference.predict(features[500:])).mean() > 0.98


def test_sgd_equals_pytorch():
    ours = torch.nn.Parameter(torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(5)))
    rates = [0.1, 0.4, 0.02]
    theirs = [torch.nn.Parameter(ours.detach()[k].clone()) for k in range(3)]
    reference = [torch.optim.SGD([theirs[k]], lr=rates[k], momentum=0.9) for k in range(3)]
    optimizer = HeadSGD([ours])
    for factor in (1.0, 0.7, 0.3):  # a schedule
        for k in range(3):
            reference[k].param_groups[0]["lr"] = rates[k] * factor
            reference[k].zero_grad()
            (theirs[k] ** 3).sum().backward()
            reference[k].step()
        (ours**3).sum().backward()
        optimizer.step(torch.tensor(rates) * factor)
    torch.testing.assert_close(ours.detach(), torch.stack([one.detach() for one in theirs]))


def test_lars_equals_the_update_written_out():
    weight, bias = np.array([[3.0, 4.0], [0.0, 0.0]]), np.array([1.0, 2.0])
    gradients = [np.array([[0.6, 0.8], [0.0, 0.0]]), np.array([[0.0, 2.0], [1.5, 0.0]])]
    ours_weight = torch.nn.Parameter(torch.from_numpy(weight.copy())[None])
    ours_bias = torch.nn.Parameter(torch.from_numpy(bias.copy())[None])
    optimizer = HeadSGD([ours_weight, ours_bias], trust_coefficient=0.001)
    momentum_weight, momentum_bias = np.zeros((2, 2)), np.zeros(2)
    for gradient, rate in zip(gradients, (6.4, 3.2), strict=True):
        trust = 0.001 * np.sqrt((weight**2).sum()) / np.sqrt((gradient**2).sum())
        momentum_weight = 0.9 * momentum_weight + trust * gradient
        momentum_bias = 0.9 * momentum_bias + gradient[0]  # a bias is not scaled
        weight, bias = weight - rate * momentum_weight, bias - rate * momentum_bias
        ours_weight.grad, ours_bias.grad = torch.from_numpy(gradient)[None], torch.from_numpy(gradient[0])[None].clone()
        optimizer.step(torch.tensor([rate], dtype=torch.float64))
    np.testing.assert_allclose(ours_weight.detach()[0].numpy(), weight)
    np.testing.assert_allclose(ours_bias.detach()[0].numpy(), bias)


def test_lars_leaves_a_zero_weight_unscaled():
    weight = torch.nn.Parameter(torch.zeros(1, 2, 2))
    weight.grad = torch.ones(1, 2, 2)
    HeadSGD([weight], trust_coefficient=0.001).step(torch.tensor([0.5]))
    assert torch.equal(weight.detach(), torch.full((1, 2, 2), -0.5))


def test_schedules():
    assert cosine_learning_rate(0.4, 0, 90) == 0.4
    assert cosine_learning_rate(0.4, 30, 90) == pytest.approx(0.3)
    assert cosine_learning_rate(0.4, 45, 90) == pytest.approx(0.2)
    assert cosine_learning_rate(0.4, 89, 90) == pytest.approx(0.4 * 0.5 * (1 + math.cos(math.pi * 89 / 90)))
    assert cosine_learning_rate(6.4, 5, 90, warmup=10) == pytest.approx(3.2)
    assert cosine_learning_rate(6.4, 10, 90, warmup=10) == pytest.approx(6.4)
    assert cosine_learning_rate(6.4, 50, 90, warmup=10) == pytest.approx(3.2)
    assert cosine_learning_rate(0.4, 90, 90, warmup=10, minimum=1e-6) == pytest.approx(1e-6)


def test_published_recipes():
    parts, images = RECIPES["parts"], RECIPES["images"]
    assert (parts["linear"].lr, parts["linear"].batch_size) == (0.4, 1024)
    assert (parts["attentive"].lr, parts["attentive"].batch_size) == (0.04, 1024)
    assert (images["linear"].lr, images["linear"].batch_size, images["linear"].trust_coefficient) == (6.4, 16384, 0.001)
    assert (images["attentive"].lr, images["attentive"].batch_size, images["attentive"].minimum_lr) == (0.4, 8192, 1e-6)
    assert images["linear"].warmup * 90 == pytest.approx(10)


def test_incomplete_batches_are_trained_on_for_parts_and_dropped_for_images():
    for recipe, sizes in ((Recipe(1, 4), [4, 4, 2]), (Recipe(1, 4, every_step=True), [4, 4])):
        probe = Probe("linear", recipe, 4, [0.1], [0], 1, 3, 2, 1, torch.device("cpu"))
        assert [len(step) for step in probe.steps(torch.arange(10))] == sizes
        assert [len(step) for step in probe.steps(torch.arange(3))] == [3]


def test_summary_chooses_rate_and_epoch_by_the_score_not_by_the_test_set():
    probe = Probe("linear", Recipe(1, 4), 4, [0.1, 0.2], [7, 8], 3, 3, 2, 1, torch.device("cpu"))
    # Heads: (0.1, 7), (0.1, 8), (0.2, 7), (0.2, 8); by epoch.
    scores = [[50, 52, 60, 40], [55, 53, 58, 70], [54, 51, 59, 60]]
    test = [[10, 20, 30, 40], [11, 21, 31, 41], [12, 22, 32, 42]]
    for epoch in range(3):
        probe.heads.bias.data += 1
        probe.record(torch.tensor(scores[epoch], dtype=torch.float64), torch.tensor(test[epoch], dtype=torch.float64))
    result = probe.summary()
    assert (result["lr"], result["index"], result["best_epoch"]) == (0.2, 3, 2)
    assert result["acc1"] == 37 and result["best_acc1"] == (30 + 41) / 2
    assert result["best_acc1_std"] == pytest.approx(np.std([30, 41], ddof=1))
    # The kept copies are those of each head's best epoch: 2, 2, 1, 2.
    assert probe.best["bias"][:, 0].tolist() == [2, 2, 1, 2]


def test_knn_equals_a_loop_in_float64():
    generator = np.random.default_rng(1)
    train, labels = generator.normal(size=(90, 8)), generator.integers(0, 3, 90)
    test = generator.normal(size=(25, 8))
    predicted = knn_predict(*map(torch.from_numpy, (train, labels, test)), 3)
    for k in (10, 20, 100, 200):
        for row in range(25):
            similarity = train @ test[row] / np.linalg.norm(train, axis=1) / np.linalg.norm(test[row])
            nearest = np.argsort(-similarity)[:k]
            votes = np.bincount(labels[nearest], weights=softmax(similarity[nearest] / 0.07), minlength=3)
            assert predicted[k][row] == votes.argmax()


def test_head_file_loads_from_three_lines_in_a_fresh_process(tmp_path):
    heads = AttentiveHeads(1, 12, 4, 3)
    heads.initialise([3])
    torch.save({"kind": "attentive", "num_heads": 3, "head": heads.state_dict(), "classes": list("abcd")},
               tmp_path / "head.pth")
    tokens = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(6))
    torch.save(tokens, tmp_path / "tokens.pt")
    code = (f"import torch; tokens = torch.load({str(tmp_path / 'tokens.pt')!r})\n"
            "from models.probes import load_head\n"
            f"head = load_head({str(tmp_path / 'head.pth')!r})\n"
            "logits = head(tokens)[0]\n"
            f"torch.save(logits, {str(tmp_path / 'logits.pt')!r})")
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), heads.eval()(tokens)[0].detach())
    with pytest.raises(ValueError, match="no head"):
        load_head(tmp_path / "tokens.pt")


def test_linear_head_takes_the_class_token():
    heads = LinearHeads(2, 3, 2)
    heads.initialise([0, 1])
    tokens = torch.randn(4, 5, 3, generator=torch.Generator().manual_seed(7))
    torch.testing.assert_close(heads(tokens)[1], F.linear(tokens[:, 0], heads.weight[1], heads.bias[1]))
