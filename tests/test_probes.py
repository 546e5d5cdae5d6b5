"""The heads and the published recipes against textbook formulations written here, scipy and PyTorch."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.special import softmax

from models.features import Features
from models.probe_training import RECIPES, Probe, Recipe, batch_and_epochs, shuffled
from models.probes import AttentiveHeads, BatchNorm, HeadSGD, build_heads, initialise, knn_predict, normalise


def small_probe(kind, recipe, batch_size, rates, seeds, epochs, width=12, classes=4):
    heads = build_heads(kind, len(rates) * len(seeds), width, classes, 3, recipe.batch_norm)
    return Probe(heads, recipe, batch_size, rates, seeds, epochs)


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


def test_heads_do_not_influence_each_other():
    tokens = torch.randn(6, 5, 12, generator=torch.Generator().manual_seed(3))
    for kind in ("linear", "attentive"):
        heads = build_heads(kind, 3, 12, 4, 3, batch_norm=True)
        initialise(heads, [5, 6, 5])
        logits = heads(tokens)
        assert torch.equal(logits[0], logits[2]) and not torch.equal(logits[0], logits[1])
        alone = build_heads(kind, 1, 12, 4, 3, batch_norm=True)
        initialise(alone, [6])
        torch.testing.assert_close(alone(tokens)[0], logits[1])


def test_initial_weights_have_the_published_spread():
    heads = AttentiveHeads(1, 192, 50, 3)
    initialise(heads, [0])
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


def plain_steps(kind, recipe, probe, tokens, labels, k):
    """Head k of the probe, trained by its recipe with one parameter after the other, as the papers write it."""
    p = {name: parameter.detach()[k].clone().requires_grad_() for name, parameter in probe.heads.named_parameters()}
    momentum = {name: torch.zeros_like(parameter) for name, parameter in p.items()}
    norm = torch.nn.BatchNorm1d(12, affine=False, eps=1e-6).double()
    for epoch in range(probe.epochs):
        steps = shuffled(torch.arange(len(tokens)), 0, epoch).split(probe.batch_size)
        if recipe.every_step:
            steps = [rows for rows in steps if len(rows) == probe.batch_size]
        for index, rows in enumerate(steps):
            x = tokens[rows]
            if kind == "attentive":
                logits = textbook_attentive(x, p, 3, None)
            else:
                logits = (norm(x[:, 0]) if recipe.batch_norm else x[:, 0]) @ p["weight"].T + p["bias"]
            loss = -logits.log_softmax(1)[torch.arange(len(rows)), labels[rows]].mean()
            gradients = torch.autograd.grad(loss, list(p.values()))
            # Parts: once an epoch, no warm-up. Images: every step, after a linear warm-up of a ninth of the epochs.
            now = epoch + index / len(steps) if recipe.every_step else epoch
            warm = probe.epochs / 9 if recipe.every_step else 0
            if now < warm:
                lr = probe.rates[k] * now / warm
            else:
                share = 0.5 * (1 + math.cos(math.pi * (now - warm) / (probe.epochs - warm)))
                lr = recipe.minimum_lr + (probe.rates[k] - recipe.minimum_lr) * share
            for (name, parameter), gradient in zip(p.items(), gradients, strict=True):
                if recipe.trust_coefficient and parameter.ndim > 1:
                    gradient = gradient * 0.001 * parameter.detach().norm() / gradient.norm()
                momentum[name] = 0.9 * momentum[name] + gradient
                parameter.data -= lr * momentum[name]
    return p


@pytest.mark.parametrize("kind", ["linear", "attentive"])
@pytest.mark.parametrize("data", ["parts", "images"])
def test_published_recipes_step_by_step(kind, data):
    recipe, generator = RECIPES[data][kind], torch.Generator().manual_seed(0)
    tokens = torch.randn(21, 3, 12, generator=generator, dtype=torch.float64)
    labels = torch.randint(4, (21,), generator=generator)
    features = Features(torch.arange(21), 0, labels, tokens[:, 0], normalise(tokens))
    probe = small_probe(kind, recipe, 8, [recipe.rates[0], recipe.rates[0] / 4], [3], 9)
    probe.heads.double()
    probe.optimizer.buffers = [buffer.double() for buffer in probe.optimizer.buffers]
    expected = [plain_steps(kind, recipe, probe, tokens, labels, k) for k in range(2)]
    for epoch in range(9):
        probe.train(features, shuffled(torch.arange(21), 0, epoch), epoch)
    for k in range(2):
        for name, parameter in probe.heads.named_parameters():
            torch.testing.assert_close(parameter.detach()[k], expected[k][name].detach(), rtol=1e-4, atol=1e-6,
                                       msg=f"{name} {k}")


def test_lars_leaves_a_zero_weight_unscaled():
    weight = torch.nn.Parameter(torch.zeros(1, 2, 2))
    weight.grad = torch.ones(1, 2, 2)
    HeadSGD([weight], trust_coefficient=0.001).step(torch.tensor([0.5]))
    assert torch.equal(weight.detach(), torch.full((1, 2, 2), -0.5))


def test_published_recipes():
    parts, images = RECIPES["parts"], RECIPES["images"]
    assert (parts["linear"].rates, parts["linear"].batch_size) == ((0.4,), 1024)
    assert (parts["attentive"].rates, parts["attentive"].batch_size) == ((0.04,), 1024)
    assert images["linear"][:5] == ((6.4,), 16384, 1 / 9, 0.0, 0.001)
    assert images["attentive"][:5] == ((0.4,), 8192, 1 / 9, 1e-6, None)
    assert batch_and_epochs(parts["linear"], 30_000) == (1024, 90)
    assert batch_and_epochs(parts["linear"], 467) == (467, 90)


def test_incomplete_batches_are_trained_on_for_parts_and_dropped_for_images():
    for recipe, sizes in ((Recipe((1,), 4), [4, 4, 2]), (Recipe((1,), 4, every_step=True), [4, 4])):
        probe = small_probe("linear", recipe, 4, [0.1], [0], 1)
        assert [len(step) for step in probe.steps(torch.arange(10))] == sizes
        assert [len(step) for step in probe.steps(torch.arange(3))] == [3]


def test_summary_chooses_rate_and_epoch_by_the_score_not_by_the_test_set():
    probe = small_probe("linear", Recipe((1,), 4), 4, [0.1, 0.2], [7, 8], 3)
    # Heads: (0.1, 7), (0.1, 8), (0.2, 7), (0.2, 8); by epoch.
    scores = [[50, 52, 60, 40], [55, 53, 58, 70], [54, 51, 59, 60]]
    test = [[10, 20, 30, 40], [11, 21, 31, 41], [12, 22, 32, 42]]
    for epoch in range(3):
        probe.heads.bias.data += 1
        probe.record(torch.tensor(scores[epoch], dtype=torch.float64), torch.tensor(test[epoch], dtype=torch.float64))
    result, index, _ = probe.summary()
    assert (result["lr"], index, result["best_epoch"]) == (0.2, 3, 2)
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
