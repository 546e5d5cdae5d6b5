"""Attention distance and receptive fields: exact weights, closed forms, slow readings, figures however it is run."""

import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from timm.models.beit import Attention as BeitAttention
from timm.models.vision_transformer import Attention

from models import METHODS, build_model
from models.attention import __main__ as attention
from models.attention import maps as attention_maps
from models.attention.maps import (
    Sums,
    add_centred,
    attention_chunks,
    pair_similarity,
    patch_gradients,
    patch_norms,
    query_key,
    radius_holding,
    watch_attention,
)
from models.attention.plots import latest
from utils import UserError
from utils.drawing import COLOURS

ROOT = Path(__file__).parent.parent
GOLDEN = ROOT / "tests/golden"
FORMS = [(path.parent.name, path.stem) for path in sorted(GOLDEN.glob("*/checkpoint*.pth"))]
REAL = ROOT / "../shared/real/coco/images/val2017"
RATIOS = [0.0, 0.25, 0.5, 0.75, 0.9]


def build(method, form="checkpoint"):
    return build_model(method, str(GOLDEN / method / f"{form}.pth"), num_heads=3)


def images(size=64, count=3):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def seeded(*shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(2))


def relative_error(ours, theirs):
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


def check_weights(blocks, run):
    """The weights of every layer in a pass: rows sum to 1, and with the values they give what the module gave."""
    seen, outputs = {}, {}
    hooks = [block.attn.register_forward_hook(lambda attn, x, out, layer=layer: outputs.update({layer: out}))
             for layer, block in enumerate(blocks)]
    with watch_attention(blocks, lambda layer, *rest: seen.update({layer: rest})):
        run()
    for hook in hooks:
        hook.remove()
    assert sorted(seen) == list(range(len(blocks)))
    for layer, (attn, tokens, bias) in seen.items():
        count = tokens.shape[1]
        # Chunks of five pairs, which no number of heads or images here divides.
        chunks = list(attention_chunks(*query_key(attn, tokens), bias, max_bytes=5 * count * count * 16))
        assert max(len(weights) for _, weights in chunks) == 5
        weights = torch.cat([weights for _, weights in chunks]).unflatten(0, (len(tokens), -1))
        assert weights.dtype == torch.float32 and weights.shape == (len(tokens), attn.num_heads, count, count)
        assert (weights.sum(-1) - 1).abs().max() < 1e-5
        value = F.linear(tokens, attn.qkv.weight)[..., -attn.proj.in_features:]
        value = value + (attn.v_bias if isinstance(attn, BeitAttention) else attn.qkv.bias[-attn.proj.in_features:])
        value = value.unflatten(2, (attn.num_heads, -1)).transpose(1, 2)
        ours = attn.proj((weights @ value).transpose(1, 2).flatten(2))
        assert relative_error(ours, outputs[layer]) < 1e-5
    return seen


@pytest.mark.parametrize("method, form", FORMS)
def test_weights_reproduce_the_modules_output(method, form):
    encoder = build(method, form)
    seen = check_weights(encoder.vit.blocks, lambda: encoder(images()))
    biased = method == "beit"
    assert all((bias is not None and bias.abs().max() > 0) == biased for _, _, bias in seen.values())
    check_weights(encoder.vit.blocks, lambda: encoder(images(96, count=2)))


def test_every_method_is_covered():
    assert {method for method, _ in FORMS} == set(METHODS)


@pytest.mark.parametrize("ratio", RATIOS)
def test_weights_of_the_decoder(ratio):
    encoder = build("mae", "checkpoint_full")
    latent, mask, ids_restore = encoder.encode_visible(images(), seeded(3, 16), ratio)
    assert latent.shape[1] == 1 + int(16 * (1 - ratio))
    check_weights(encoder.decoder.decoder_blocks, lambda: encoder.decode(latent, ids_restore))


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


def test_an_attention_that_is_not_known_is_refused():
    class Other(Attention):
        pass

    for block in (SimpleNamespace(attn=Other(24, 3)), torch.nn.Linear(2, 2)):
        with pytest.raises(UserError, match="not known here"), watch_attention([block], print):
            pass


def test_autocast_does_not_round_the_weights():
    encoder, found = build("dino"), []
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), watch_attention(
            encoder.vit.blocks, lambda layer, attn, tokens, bias: found.append(
                (attn, tokens, next(attention_chunks(*query_key(attn, tokens), bias))[1]))):
        encoder(images())
    for attn, tokens, weights in found:
        assert torch.equal(weights, next(attention_chunks(*query_key(attn, tokens)))[1])


def test_memory_sets_the_chunks(monkeypatch):
    encoder = build("beit")
    whole = Sums(encoder.vit.blocks, (4, 4), 1, torch.device("cpu"))
    with whole.watch(torch.zeros(3, 16)):
        encoder(images())
    asked = []
    monkeypatch.setattr(attention_maps, "free_memory", lambda device: asked.append(device) or 0)
    pairs = Sums(encoder.vit.blocks, (4, 4), 1, torch.device("cpu"))
    with pairs.watch(torch.zeros(3, 16)):
        encoder(images())
    assert asked
    torch.testing.assert_close(pairs.distance, whole.distance)
    torch.testing.assert_close(pairs.maps, whole.maps)


def hand_made(grid):
    """timm's attention, 3 heads: the same to all; itself alone; the patch two rows down (in the last two rows, up).
    Returns it with its input, one-hot tokens after a class token of zeros."""
    count = grid * grid
    patches = torch.arange(count)
    target = torch.where(patches < count - 2 * grid, patches + 2 * grid, patches - 2 * grid)
    wanted = [torch.zeros(count, count), torch.eye(count), torch.eye(count)[target]]
    attn = Attention(3 * count, 3).eval().requires_grad_(False)
    attn.qkv.weight.zero_()
    for head, matrix in enumerate(wanted):
        rows = slice(head * count, (head + 1) * count)
        attn.qkv.weight[:3 * count][rows, :count] = 1000 * matrix.T
        attn.qkv.weight[3 * count:6 * count][rows, :count] = torch.eye(count)
    tokens = torch.zeros(1, 1 + count, 3 * count)
    tokens[0, 1:, :count] = torch.eye(count)
    return attn, tokens


@pytest.mark.parametrize("grid", [4, 7])
def test_uniform_identity_and_local_attention_have_their_distances(grid):
    attn, tokens = hand_made(grid)
    blocks = [SimpleNamespace(attn=attn)]
    sums = Sums(blocks, (grid, grid), 1, torch.device("cpu"), decoder=True)
    mask = (torch.arange(grid * grid) % 3 == 0).float().expand(2, -1)
    with sums.watch(mask):
        attn(tokens.expand(2, -1, -1))
    figures = sums.figures(patch_size=16)
    # (g - |i|)(g - |j|) pairs of patches lie i rows and j columns apart.
    steps = range(1 - grid, grid)
    uniform = sum((grid - abs(i)) * (grid - abs(j)) * math.hypot(i, j) for i in steps for j in steps) / grid**4
    assert figures["distance_patches"][0] == pytest.approx([uniform, 0, 2], abs=1e-5)
    assert figures["distance_patches_uniform"] == pytest.approx(uniform, abs=1e-5)
    assert figures["distance_pixels"][0] == pytest.approx([16 * uniform, 0, 32], abs=1e-4)
    for group in ("masked", "visible"):
        assert figures[f"distance_patches_{group}"][0][1:] == pytest.approx([0, 2], abs=1e-5)
    masked = int(mask[0].sum())
    both = (masked * figures["distance_patches_masked"][0][0]
            + (grid**2 - masked) * figures["distance_patches_visible"][0][0]) / grid**2
    assert both == pytest.approx(uniform, abs=1e-5)
    assert figures["map_similarity"] == pytest.approx([1], abs=1e-5)
    assert figures["receptive_field"] is None and figures["receptive_field_radius90_pixels"] is None


@pytest.mark.parametrize("method, form, prefix", [("beit", "checkpoint", 1), ("deit", "checkpoint_distilled", 2),
                                                  ("mae", "checkpoint_full", 1)])
def test_sums_against_a_slow_reading(method, form, prefix):
    """Distances in float64 by loops; likeness of maps by all pairs. MAE: its decoder, with three quarters masked."""
    encoder, noise, nothing = build(method, form), seeded(3, 16), torch.empty(3, 0, dtype=torch.int64)
    # Visible are the four patches of the least noise.
    mask = noise > noise.sort(dim=1).values[:, 3:4]
    blocks = encoder.decoder.decoder_blocks if method == "mae" else encoder.vit.blocks
    sums, seen = Sums(blocks, (4, 4), prefix, torch.device("cpu"), decoder=method == "mae"), {}
    with watch_attention(blocks, lambda layer, *rest: seen.update({layer: rest})):
        if method == "mae":
            attention.add_decoder(encoder, images(), None, noise, 0.75, nothing, nothing, sums)
        else:
            attention.add_encoder(encoder, images(), nothing, nothing, sums)
    figures = sums.figures(16)
    for layer, (attn, tokens, bias) in seen.items():
        bias = torch.zeros(1, 4, 18, 18) if bias is None else bias
        query, key = (x.double().numpy() for x in query_key(attn, tokens))
        heads = attn.num_heads
        maps = np.zeros((3, heads, 16, 16))
        found = {name: [[] for _ in range(heads)] for name in ("", "_masked", "_visible")}
        for image, head, q in np.ndindex(3, heads, 16):
            scores = [math.exp(query[image, head, prefix + q] @ key[image, head, prefix + k]
                               + float(bias[0, head, prefix + q, prefix + k])) for k in range(16)]
            distances = [math.hypot(q // 4 - k // 4, q % 4 - k % 4) for k in range(16)]
            maps[image, head, q] = np.array(scores) / sum(scores)
            group = "_masked" if mask[image, q] else "_visible"
            for name in ("", group):
                found[name][head].append(sum(np.multiply(scores, distances)) / sum(scores))
        for name in found if method == "mae" else [""]:
            expected = [np.mean(values) for values in found[name]]
            assert figures[f"distance_patches{name}"][layer] == pytest.approx(expected, rel=1e-5)
        flat = maps.reshape(3, heads, -1) / np.linalg.norm(maps.reshape(3, heads, -1), axis=2, keepdims=True)
        pairs = [flat[a, head] @ flat[b, head] for head in range(heads) for a in range(3) for b in range(a)]
        assert figures["map_similarity"][layer] == pytest.approx(np.mean(pairs), rel=1e-5)


def test_pair_similarity_of_one_and_of_opposite_vectors():
    assert not pair_similarity(torch.tensor([1.0, 0]), 1).isfinite()
    assert float(pair_similarity(torch.zeros(2), 2)) == -1


def test_radii_of_known_fields():
    field = torch.full((9, 9), float("nan"))
    assert math.isnan(radius_holding(field, 0.5))
    field[4, 4] = 4.0
    assert radius_holding(field, 0.9) == 0
    for row, column in ((4, 5), (4, 3), (3, 4), (5, 4)):
        field[row, column] = 0.5
    assert radius_holding(field, 0.5) == 0 and radius_holding(field, 0.9) == 1
    field[0, 8] = 1.0
    # The three corners without a value count as the fourth: 4, 2 and 4.
    assert radius_holding(field, 0.6) == 1 and radius_holding(field, 0.61) == pytest.approx(math.hypot(4, 4))
    even = torch.ones(21, 21)
    places = [math.hypot(row - 10, column - 10) for row in range(21) for column in range(21)]
    whole = [float(np.quantile(places, share, method="inverted_cdf")) for share in (0.5, 0.9)]
    assert [radius_holding(even, share) for share in (0.5, 0.9)] == pytest.approx(whole)
    even[seeded(21, 21) < 0.5] = float("nan")
    assert [radius_holding(even, share) for share in (0.5, 0.9)] == pytest.approx(whole, rel=0.05)
    ring = torch.zeros(9, 9)
    ring[2, 4] = ring[6, 4] = ring[4, 2] = ring[4, 6] = 1
    assert radius_holding(ring, 0.01) == radius_holding(ring, 1.0) == 2


def test_a_local_linear_prediction_has_its_field():
    """Every output is the sum of the pixels of its patch's 3 x 3 neighbourhood: gradients are 1 there, 0 elsewhere."""
    grid, patch = 5, 4
    pixels = images(grid * patch, count=2).requires_grad_()
    sums = F.avg_pool2d(pixels.sum(1, keepdim=True), patch) * patch**2
    outputs = F.conv2d(F.pad(sums, (1, 1, 1, 1)), torch.ones(1, 1, 3, 3)).flatten(2).transpose(1, 2)
    field = torch.zeros(2, 81)
    seen = torch.ones(2, 25)
    seen[:, 7] = 0
    for query in (torch.tensor([12, 0]), torch.tensor([24, 12])):
        gradient, = patch_gradients(outputs, query, torch.full((2, 1), 3.0), [pixels])
        add_centred(field, patch_norms(gradient, patch), seen, query, (grid, grid))
    counts = torch.zeros(9, 9)
    for query in (12, 0, 24, 12):
        for key in set(range(25)) - {7}:
            counts[key // 5 - query // 5 + 4, key % 5 - query % 5 + 4] += 1
    assert torch.equal(field[1].view(9, 9), counts)
    mean = (field[0] / field[1]).view(9, 9)
    expected = torch.zeros(9, 9)
    expected[3:6, 3:6] = 3 * (3 * patch**2) ** 0.5
    torch.testing.assert_close(mean[counts > 0], expected[counts > 0])
    assert radius_holding(mean, 0.9) == pytest.approx(2**0.5)


def finite_differences(function, x, where):
    """Central differences of function(batch of x) -> [batch], float64, for the entries of x[0] that `where` marks."""
    places, gradient, step = where.flatten().nonzero()[:, 0], [], 1e-5
    for part in places.split(192):
        moved = x.flatten(1).repeat(2 * len(part), 1)
        moved[torch.arange(len(part)), part] += step
        moved[torch.arange(len(part), 2 * len(part)), part] -= step
        plus, minus = function(moved.view(-1, *x.shape[1:])).chunk(2)
        gradient.append((plus - minus) / (2 * step))
    return torch.cat(gradient)


@torch.no_grad()
def test_receptive_fields_against_finite_differences():
    """Through MAE's decoder and encoder, of one query and one visible patch: the norm over 768 pixels, and over the
    encoder's output for that patch; and through the encoder alone."""
    encoder = build("mae", "checkpoint_full").double()
    noise, direction = seeded(1, 16).double(), seeded(1, 1, 768) - 0.5
    order = noise.argsort()[0]
    query, patch = int(order[-1]), int(order[2])
    image = images(count=1).double()
    sums = Sums(encoder.decoder.decoder_blocks, (4, 4), 1, torch.device("cpu"), decoder=True)
    with torch.enable_grad():
        attention.add_decoder(encoder, image.clone().requires_grad_(), None, noise, 0.75, torch.tensor([[query]]),
                              direction, sums)
    row, column = patch // 4, patch % 4
    offset = (row - query // 4 + 3) * 7 + column - query % 4 + 3
    inside = torch.zeros_like(image[0])
    inside[:, 16 * row:16 * row + 16, 16 * column:16 * column + 16] = 1

    def by_pixels(batch):
        latent, _, ids_restore = encoder.encode_visible(batch, noise.expand(len(batch), -1), 0.75)
        return encoder.decode(latent, ids_restore)[:, query] @ direction[0, 0].double()

    latent, _, ids_restore = encoder.encode_visible(image, noise, 0.75)
    latent_inside = torch.zeros_like(latent[0])
    latent_inside[3] = 1

    def by_tokens(batch):
        return encoder.decode(batch, ids_restore.expand(len(batch), -1))[:, query] @ direction[0, 0].double()

    for name, expected in (("receptive_field", finite_differences(by_pixels, image, inside)),
                           ("receptive_field_tokens", finite_differences(by_tokens, latent, latent_inside))):
        total, count = sums.fields[name]
        assert count.sum() == 4 and count[offset] == 1
        assert float(total[offset]) == pytest.approx(float(expected.norm()), rel=1e-5)

    direction = direction[..., :48]
    sums = Sums(encoder.vit.blocks, (4, 4), 1, torch.device("cpu"))
    with torch.enable_grad():
        moving = image.clone().requires_grad_()
        tokens = attention.add_encoder(encoder, moving, torch.tensor([[query]]), direction, sums)
    assert torch.equal(tokens, encoder(image)) and sums.fields["receptive_field"][1].sum() == 16
    expected = finite_differences(lambda batch: encoder(batch)[:, 1 + query] @ direction[0, 0].double(), image, inside)
    assert float(sums.fields["receptive_field"][0, offset]) == pytest.approx(float(expected.norm()), rel=1e-5)


def test_chance_depends_on_seed_and_image_alone():
    first, again, other = (attention.image_noise(ids, seed, [(16,), (2, 4)])
                           for ids, seed in (([3, 70000], 5), ([70000], 5), ([70000], 6)))
    assert torch.equal(first[0][1:], again[0]) and torch.equal(first[1][1:], again[1])
    assert not torch.equal(first[0][0], first[0][1]) and not torch.equal(again[0], other[0])


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
    """Every figure of a line, flat, None as NaN."""
    figures = {}
    for name, value in result.items():
        if name.startswith(("distance", "map_", "receptive")):
            figures[name] = np.array(value, dtype=np.float64)
    return figures


def assert_same(ours, theirs):
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert (one["part"], one["mask_ratio"], one["num_images"]) == (
            other["part"], other["mask_ratio"], other["num_images"])
        one, other = figures_of(one), figures_of(other)
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_allclose(one[name], other[name], rtol=2e-4, atol=1e-6, err_msg=name)


def test_processes_and_batches_do_not_change_the_figures(run, tmp_path):
    words = (*golden("mae", "checkpoint_full"), "--dataset", "synthetic", "--num-images", 5)
    run(*words, "--batch-size", 5, "--output-dir", tmp_path / "one")
    one = results_of(tmp_path / "one")
    assert [(line["part"], line["mask_ratio"]) for line in one] == [
        ("encoder", 0), *(("decoder", ratio) for ratio in RATIOS)]
    for line in one:
        assert line["task"] == "attention" and line["num_images"] == 5 and line["sha256"]
        for name in ("model", "weights", "dataset", "world_size", "precision", "seed", "seconds", "args", "patch_size"):
            assert name in line
    for line, visible in zip(one[2:], (12, 8, 4, 1), strict=True):
        assert np.sum(line["receptive_field_count"]) == 5 * visible
        assert line["receptive_field_count"][3][3] == 0 and line["receptive_field"][3][3] is None
        assert line["receptive_field_radius50_patches"] <= line["receptive_field_radius90_patches"]
    assert one[1]["receptive_field"] is None and one[1]["distance_patches_masked"][0][0] is None
    for name, processes, batch in (("batch", 1, 2), ("two", 2, 4), ("three", 3, 3), ("more", 6, 32)):
        run(*words, "--batch-size", batch, "--output-dir", tmp_path / name, processes=processes)
        others = results_of(tmp_path / name)
        assert {line["world_size"] for line in others} == {processes}
        assert_same(one, others)
    run(*words, "--precision", "bf16", "--output-dir", tmp_path / "bf16")
    for line, other in zip(one, results_of(tmp_path / "bf16"), strict=True):
        np.testing.assert_allclose(other["distance_pixels"], line["distance_pixels"], rtol=0.01)
        if line["receptive_field"]:
            ours, theirs = (figures_of(result)["receptive_field"] for result in (other, line))
            np.testing.assert_allclose(np.nansum(ours), np.nansum(theirs), rtol=0.02)
    run(*words, "--seed", 1, "--output-dir", tmp_path / "seed")
    assert figures_of(results_of(tmp_path / "seed")[3])["map_similarity"] != figures_of(one[3])["map_similarity"]


def colours_in(path):
    with Image.open(path) as image:
        return {"#{:02x}{:02x}{:02x}".format(*colour) for colour in np.unique(np.asarray(image).reshape(-1, 3), axis=0)}


def test_several_models_their_plots_and_the_table(run, tmp_path):
    common = ("--dataset", "synthetic", "--num-images", 2, "--output-dir", tmp_path)
    for model in ("dino", "beit"):
        run(*golden(model), *common)
    out, _ = run(*golden("mae", "checkpoint_full"), *common, "--mask-ratios", 0.75, 0)
    assert "attention_distance_decoder.png" in out and "synthetic data" in out
    assert [(line["model"], line["part"], line["mask_ratio"]) for line in results_of(tmp_path)] == [
        ("dino", "encoder", 0), ("beit", "encoder", 0), ("mae", "encoder", 0), ("mae", "decoder", 0),
        ("mae", "decoder", 0.75)]
    # A line per encoder, and per mask ratio of the decoder.
    for name, count in (("encoders", 3), ("decoder", 2)):
        assert set(COLOURS[:5]) & colours_in(tmp_path / f"attention_distance_{name}.png") == set(COLOURS[:count])
    assert "#0050ff" in colours_in(tmp_path / "attention_fields.png")
    run(*golden("mae"), *common, "--encoder-only", "--queries", 0)
    first, *_, last = results_of(tmp_path)
    assert len(results_of(tmp_path)) == 6 and last["part"] == "encoder" and last["receptive_field"] is None
    for path in tmp_path.glob("*.png"):
        path.unlink()
    with open(tmp_path / "results.jsonl", "a") as file:
        file.write('{"task": "attention", "model": "old", "dataset": "synthetic", "part": "encoder"}\n{"task": "atte\n')
    out, _ = run("--table", "--format", "md", "--output-dir", tmp_path)
    for number, reason in ((7, "no weights, no mask_ratio"), (8, "not whole JSON")):
        assert f"line {number}, is not a results line ({reason}" in out
    rows = [line for line in out.splitlines() if line.startswith("| ")]
    assert len(rows) == 2 + 6 and any("mae mae/checkpoint_full.pth" in row and "mask ratio 0.75" in row for row in rows)
    shown = next(row for row in rows if row.startswith("| dino")).split(" | ")
    assert float(shown[2]) == pytest.approx(np.mean(first["distance_pixels"][0]), abs=0.06)
    assert len(list(tmp_path.glob("*.png"))) == 3


def one_line(err, *parts):
    lines = [line for line in err.splitlines() if line.strip()]
    assert len(lines) == 1, err
    for part in parts:
        assert part in lines[0], err


def test_mistakes_get_one_line_and_no_result(run, tmp_path):
    out = tmp_path / "out"
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/one.jpg").write_bytes(b"no image")
    Image.new("RGB", (80, 70), (9, 99, 200)).save(tmp_path / "bad/two.png")
    full = golden("mae", "checkpoint_full")
    synthetic = ("--dataset", "synthetic", "--num-images", 1)
    for words, parts in (
        ((*golden("mae"), *synthetic), ["no decoder", "mae_pretrain_vit_base_full.pth", "--encoder-only"]),
        (full, ["needs --data-path", "--dataset synthetic"]),
        ((*full, "--data-path", tmp_path / "empty"), ["empty", "no image below"]),
        ((*full, "--data-path", tmp_path / "none"), ["none", "no image below"]),
        ((*full, "--data-path", tmp_path / "bad"), ["one.jpg", "cannot be decoded", "--skip-bad-images"]),
        ((*full, *synthetic, "--mask-ratios", 0.75, 1), ["--mask-ratios 0.75 1", "below 1"]),
        ((*full, *synthetic, "--mask-ratios", 0.99), ["--mask-ratios 0.99", "one visible"]),
        ((*full, *synthetic, "--mask-ratios", -0.5), ["--mask-ratios: '-0.5'"]),
        ((*full, *synthetic, "--queries", 5), ["--queries 5", "4 of 16"]),
        ((*full, "--num-images", 0), ["--num-images"]),
        (("--weights", tmp_path / "none.pth"), ["none.pth", "does not exist"]),
        (("--model", "dinov9", "--weights", "random"), ["dinov9", "deit"]),
        (("--table",), ["results.jsonl", "run without --table first"]),
    ):
        _, err = run(*words, "--output-dir", out, status=2)
        one_line(err, *parts)
        assert not (out / "results.jsonl").exists() and not list(out.glob("*.png"))
    run(*full, "--data-path", tmp_path / "bad", "--skip-bad-images", "--output-dir", out)
    line = results_of(out)[0]
    assert line["num_images"] == 1 and line["map_similarity"] == [None] * 4
    (tmp_path / "bad/two.png").unlink()
    _, err = run(*full, "--data-path", tmp_path / "bad", "--skip-bad-images", "--output-dir", tmp_path / "o", status=2)
    one_line(err, "no image could be read")


def test_a_row_has_the_name_of_its_run():
    """Also two runs of one file, as of an epoch sweep by --name; files where one name has several."""
    common = {"model": "mae", "weights": "a/x.pth", "dataset": "imagenet", "part": "encoder", "mask_ratio": 0.0}
    runs = [common | {"name": "one"}, common | {"name": "two"}, common | {"name": "two", "weights": "b/x.pth"}, common]
    assert [name for name, *_ in latest(runs)] == ["one", "two a/x.pth", "two b/x.pth", "mae"]


@pytest.mark.skipif(not REAL.is_dir(), reason="the real samples of ../shared/real are not here")
def test_real_images_by_torchrun(tmp_path):
    """As a user starts it, on two processes."""
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m",
                    "models.attention", *map(str, golden("mae", "checkpoint_full")), "--data-path", str(REAL),
                    "--num-images", "7", "--workers", "1", "--device", "cpu", "--output-dir", str(tmp_path)],
                   cwd=ROOT, check=True, timeout=600)
    lines = results_of(tmp_path)
    assert len(lines) == 6 and all(line["num_images"] == 7 and line["world_size"] == 2 for line in lines)
    assert all(0 < value < 48 * 2**0.5 for line in lines for heads in line["distance_pixels"] for value in heads)
    assert {path.name for path in tmp_path.glob("*.png")} == {
        "attention_distance_encoders.png", "attention_distance_decoder.png", "attention_fields.png"}
