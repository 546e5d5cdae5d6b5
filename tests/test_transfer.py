"""Keypoint transfer: matching and PCK against loops in float64 and SciPy, the pairs of each data set, processes."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.ndimage import map_coordinates

from datasets.pairs import load_cub_pairs, load_pairs, load_spair, load_synthetic_pairs
from datasets.synthetic import draw_figure
from models import build_model
from models.transfer import chance, draw_pairs, pck, pck_of_features, transfer_keypoints, transfer_run, within
from utils import UserError, storage
from utils.distributed import init_processes, is_main

SHARED = Path(__file__).parents[2] / "shared"
CUB, WEIGHTS = SHARED / "real/CUB_200_2011", SHARED / "weights/vit_tiny_patch16_224.pth"
needs_cub = pytest.mark.skipif(not CUB.is_dir(), reason=f"needs the sample {CUB}")


class PixelEncoder(torch.nn.Module):
    """Tokens of block k are 48 mean colours of the patch less 0.1 k; an image's do not depend on its batch."""

    def __init__(self, patch_size=16, embed_dim=48, depth=3):
        super().__init__()
        self.patch_size, self.embed_dim, self.depth, self.encoded = patch_size, embed_dim, depth, 0
        self.register_buffer("mean", torch.zeros(1, 3, 1, 1))

    def preprocess(self, images):
        self.encoded += len(images)
        return images.float() / 255 - 0.5

    def get_intermediate_layers(self, images, n, norm):
        tokens = F.pixel_unshuffle(F.avg_pool2d(images, self.patch_size // 4), 4)
        return [tokens - 0.1 * index + 0.03 * norm for index in n]


def run(encoder, pairs, layers=(0,), norm=False, batch_size=64):
    return transfer_run(encoder, pairs, layers, norm, batch_size, 0, "fp32", lambda line: None)


def slow_transfer(source, target, point):
    """One point by NumPy and SciPy in float64."""
    source, target = (map_.double().numpy() / np.linalg.norm(map_.double().numpy(), axis=0)
                      for map_ in (source, target))
    at = [[point[1] * source.shape[1] - 0.5], [point[0] * source.shape[2] - 0.5]]
    query = np.array([map_coordinates(channel, at, order=1, mode="nearest")[0] for channel in source])
    similarity = np.einsum("d,dhw->hw", query / np.linalg.norm(query), target)
    height, width = similarity.shape
    row, column = divmod(int(similarity.argmax()), width)
    return (column + 0.5) / width, (row + 0.5) / height


@pytest.mark.parametrize("height,width", [(1, 1), (1, 5), (7, 3), (14, 14), (48, 48)])
def test_an_image_finds_itself_within_half_a_cell(height, width):
    tokens = torch.eye(height * width).view(-1, height, width)
    points = torch.rand(100, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    error = (transfer_keypoints(tokens, tokens, points) - points).abs()
    assert (error <= torch.tensor([0.5 / width, 0.5 / height]) + 1e-6).all()


def test_transfer_keypoints_equals_a_slow_loop():
    generator = torch.Generator().manual_seed(2)
    source, target = torch.randn(16, 9, 5, generator=generator), torch.randn(16, 20, 30, generator=generator)
    # Corners and points outside of the image too: the border's token.
    points = torch.cat([torch.rand(60, 2, dtype=torch.float64, generator=generator),
                        torch.tensor([[0, 0], [1, 1], [-0.2, 0.5], [0.4, 1.3]])])
    found = transfer_keypoints(source, target, points)
    expected = [slow_transfer(source, target, point) for point in points.tolist()]
    assert torch.allclose(found, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12)
    target[:, 3, 4] = torch.nan
    assert transfer_keypoints(source, target, points).isnan().all()


@pytest.mark.parametrize("norm", [True, False])
def test_a_whole_run_equals_a_slow_loop(norm):
    pairs = load_synthetic_pairs(96, 30, num_images=14)
    encoder = PixelEncoder()
    metrics, predicted = run(encoder, pairs, layers=(2, 0), norm=norm)
    assert encoder.encoded == len(pairs.images) <= 14  # each once, for both blocks
    right, total, per_pair = 0, 0, []
    for pair in pairs.pairs:
        pictures = [draw_figure(number, num_figures=1).image for number in (pair.source, pair.target)]
        pixels = torch.stack([torch.from_numpy(np.array(picture.resize((96, 96), Image.BILINEAR)))
                              for picture in pictures]).permute(0, 3, 1, 2)
        source, target = encoder.get_intermediate_layers(encoder.preprocess(pixels), [2], norm)[0]
        hits = 0
        for (x, y), (true_x, true_y) in zip(pair.source_points, pair.target_points, strict=True):
            found = slow_transfer(source, target, (x / pictures[0].width, y / pictures[0].height))
            at = found[0] * pictures[1].width, found[1] * pictures[1].height
            assert at == pytest.approx(predicted[total].tolist(), abs=0.05)
            side = max(pair.box[2] - pair.box[0], pair.box[3] - pair.box[1])
            hits += math.dist(at, (true_x, true_y)) <= 0.1 * side
            total += 1
        right += hits
        per_pair.append(100 * hits / len(pair.source_points))
    assert (metrics["num_pairs"], metrics["num_points"]) == (30, total)
    assert metrics["pck_point"]["0.1"] == pytest.approx(100 * right / total)
    assert metrics["pck_image"]["0.1"] == pytest.approx(sum(per_pair) / 30)
    sizes = [pairs.sizes[ends[pairs.pair]] for ends in (pairs.source, pairs.target)]
    same = within(pairs.source_points / sizes[0] * sizes[1], pairs.target_points, pairs.box_side[pairs.pair])
    assert metrics["same_place"]["pck_point"]["0.2"] == pytest.approx(100 * same[:, 3].double().mean().item())
    assert metrics["by_layer"].keys() == {"0", "2"} and metrics["by_layer"]["2"]["pck_image"] == metrics["pck_image"]
    assert metrics["by_layer"]["0"]["pck_image"] != metrics["pck_image"]


def test_means_over_images_points_and_categories():
    # Cats: a pair with 1 of 4 right, one with 1 of 1. Dogs: a pair with 0 of 2.
    right = torch.tensor([1, 0, 0, 0, 1, 0, 0])[:, None].expand(-1, 4)
    result = pck(right, torch.tensor([0, 0, 0, 0, 1, 2, 2]), ["cat", "cat", "dog"])
    assert result["pck_image"]["0.1"] == pytest.approx(125 / 3)
    assert result["pck_point"]["0.1"] == pytest.approx(200 / 7)
    assert result["pck_category"]["0.1"] == pytest.approx((62.5 + 0) / 2)
    assert list(result["pck_image"]) == ["0.05", "0.1", "0.15", "0.2"]
    cat = result["by_category"]["cat"]
    assert (cat["num_pairs"], cat["num_points"], cat["pck_image"]["0.05"]) == (2, 5, 62.5)
    assert cat["pck_point"]["0.2"] == pytest.approx(40)


@pytest.mark.parametrize("kind", [torch.Tensor, np.asarray])
def test_pck_of_own_features(kind):
    """An image in itself is all right; in one that is moved by two cells of ten, what is within alpha of the box is."""
    tokens = torch.eye(100).view(100, 10, 10)
    points = torch.rand(20, 2, generator=torch.Generator().manual_seed(1)) * 0.7
    maps, moved = kind(tokens), kind(tokens.roll(2, 2))
    assert pck_of_features([maps], [maps], [kind(points)], [kind(points)], [1.0]).tolist() == [100]
    given = [maps] * 2, [maps, moved], [kind(points)] * 2, [kind(points)] * 2
    assert pck_of_features(*given, [1.0, 1.0]).tolist() == [100, 0]
    # 0.2 of 200 by 100 pixels, give or take half a cell of 20 by 10: 33 to 57 of 150 pixels away.
    sizes = [(200, 100)] * 2
    assert pck_of_features(*given, [150, 150], target_sizes=sizes, alpha=0.38).tolist() == [100, 100]
    assert pck_of_features(*given, [150, 150], target_sizes=sizes, alpha=0.19)[1] == 0


def test_a_distance_exactly_at_the_threshold_is_right():
    # 3-4-5 triangles: distances 5 and 10 of a box of side 100, and a hair more.
    offsets = torch.tensor([[3, 4], [6, 8], [3, 4 + 1e-9]], dtype=torch.float64)
    points, side = torch.full((3, 2), 50, dtype=torch.float64), torch.full((3,), 100, dtype=torch.float64)
    assert within(points + offsets, points, side, (0.05, 0.1)).tolist() == [[True, True], [False, True], [False, True]]


def test_chance_counts_cells():
    generator = torch.Generator().manual_seed(4)
    points = torch.rand(300, 2, dtype=torch.float64, generator=generator) * 100
    sizes = torch.tensor([[130, 90]], dtype=torch.float64).expand(300, 2)
    side = torch.rand(300, dtype=torch.float64, generator=generator) * 100
    shares = chance(points, sizes, side, 6)
    for i in (0, 17, 299):
        for k, alpha in enumerate((0.05, 0.1, 0.15, 0.2)):
            count = sum(math.dist(((x + 0.5) / 6 * 130, (y + 0.5) / 6 * 90), points[i].tolist()) <= alpha * side[i]
                        for x in range(6) for y in range(6))
            assert shares[i, k].item() == pytest.approx(count / 36)


def process_main():
    init_processes("cpu")
    pairs = load_synthetic_pairs(64, 70, num_images=int(sys.argv[1]))
    metrics, predicted = run(PixelEncoder(), pairs, (0, 1), batch_size=int(sys.argv[2]))
    if is_main():
        print(json.dumps([metrics, predicted.tolist()]))


@pytest.mark.parametrize("images", [15, 4])
def test_two_and_three_processes_equal_one(launch, images):
    metrics, predicted = json.loads(launch(process_main, [images, 64])[0])
    assert metrics["num_pairs"] > 1
    for processes, batch_size in ((2, 5), (3, 64)):
        others, found = json.loads(launch(process_main, [images, batch_size], processes)[0])
        assert others == metrics and found == predicted


def test_layers_that_do_not_fit_take_passes(monkeypatch):
    pairs, encoder = load_synthetic_pairs(64, 40, num_images=12), PixelEncoder()
    expected = run(encoder, pairs, range(3))
    one_layer = len(pairs.images) * 16 * 48 * 4
    monkeypatch.setattr(storage, "free_memory", lambda device: 2 * (2 * one_layer + 8))
    encoder.encoded = 0
    metrics, predicted = run(encoder, pairs, range(3))
    assert encoder.encoded == 2 * len(pairs.images)
    assert metrics == expected[0] and torch.equal(predicted, expected[1])


def test_tokens_that_are_not_finite():
    pairs = load_synthetic_pairs(64, 3, num_images=8)
    broken = PixelEncoder()
    broken.preprocess = lambda images: images.float() * float("nan")
    with pytest.raises(UserError, match="not finite at fp32"):
        run(broken, pairs)


def write_spair(root, **changes):
    """A tiny SPair-71k with two cats and two dogs, the second of each the target; returns the pairs' names."""
    names = []
    for number, category in enumerate(("dog", "cat")):
        folder = root / "JPEGImages" / category
        folder.mkdir(parents=True)
        for i, size in enumerate(((60, 40), (50, 80))):
            Image.new("RGB", size, (90 * i, 80, 70)).save(folder / f"2008_{number}{i}.jpg")
        names.append(f"00000{number}-2008_{number}0-2008_{number}1:{category}")
        pair = {"category": category, "src_imname": f"2008_{number}0.jpg",
                "trg_imname": f"2008_{number}1.jpg", "src_imsize": [60, 40, 3], "trg_imsize": [50, 80, 3],
                "src_bndbox": [1, 2, 50, 39], "trg_bndbox": [5, 10, 45, 70],
                "src_kps": [[10, 20], [30, 39]], "trg_kps": [[12, 33], [49, 79]], "viewpoint_variation": number}
        file = root / "PairAnnotation/test" / f"{names[-1]}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(pair | (changes if category == "cat" else {})))
    return names


def test_spair(tmp_path):
    names = write_spair(tmp_path)
    pairs = load_pairs("spair", tmp_path, 32)
    assert [(pair.name, pair.category) for pair in pairs.pairs] == [(names[1], "cat"), (names[0], "dog")]
    assert len(pairs.images) == 4 and pairs.num_outside == 0
    assert pairs.box_side.tolist() == [60, 60] and pairs.sizes[pairs.target].tolist() == [[50, 80]] * 2
    assert pairs.target_points.tolist() == [[12, 33], [49, 79]] * 2 and pairs.pair.tolist() == [0, 0, 1, 1]
    assert run(PixelEncoder(), pairs)[0]["by_category"].keys() == {"cat", "dog"}
    assert json.loads(json.dumps([pairs.pairs[0]._asdict()]))[0]["category"] == "cat"
    assert len(load_spair(tmp_path, 32, num_pairs=1).pairs) == 1
    with pytest.raises(UserError, match="no split 'val'"):
        load_pairs("synthetic-pairs", None, 32, "val")
    with pytest.raises(UserError, match="PairAnnotation/val does not exist"):
        load_spair(tmp_path, 32, "val")


@pytest.mark.parametrize("changes,message", [
    ({"trg_bndbox": [5, 10, 5, 70]}, "no size"),
    ({"trg_bndbox": [5, 10, 5]}, "is not a pair's annotation"),
    ({"trg_kps": [[1, 2]]}, "2 keypoints in the source, 1 in the target"),
    ({"src_kps": [[1, 2], [3]]}, "is not a pair's annotation"),
])
def test_broken_pairs_are_named(tmp_path, changes, message):
    cat = write_spair(tmp_path, **changes)[1]
    with pytest.raises(UserError, match=f"{cat}.*{message}"):
        load_spair(tmp_path, 32)


def test_synthetic_pairs():
    pairs = load_synthetic_pairs(64, 50, seed=1, num_images=20)
    assert len(pairs.pairs) == 50 and pairs.num_outside == 0
    assert [pair.name for pair in pairs.pairs] == [pair.name for pair in load_synthetic_pairs(64, 50, 1, 20).pairs]
    assert [pair.name for pair in pairs.pairs] != [pair.name for pair in load_synthetic_pairs(64, 50, 2, 20).pairs]
    for pair in pairs.pairs[::7]:
        source, target = (draw_figure(number, num_figures=1) for number in (pair.source, pair.target))
        assert np.unique(source.object_mask).tolist() == np.unique(target.object_mask).tolist()
        for (x, y), (u, v) in zip(pair.source_points, pair.target_points, strict=True):
            part = source.part_mask[int(y), int(x)]
            assert part > 0 and part == target.part_mask[int(v), int(u)]
            assert {x % 1, y % 1, u % 1, v % 1} == {0.5}
        rows, columns = target.object_mask.nonzero()
        x1, y1, x2, y2 = pair.box
        assert x1 <= columns.min() and columns.max() < x2 and y1 <= rows.min() and rows.max() < y2


@needs_cub
def test_cub_pairs():
    pairs = load_cub_pairs(CUB, 64, 200, seed=3)
    names = dict(line.split() for line in (CUB / "images.txt").read_text().splitlines())
    split = dict(line.split() for line in (CUB / "train_test_split.txt").read_text().splitlines())
    boxes = {line.split()[0]: line.split()[1:] for line in (CUB / "bounding_boxes.txt").read_text().splitlines()}
    number = {str(CUB / "images" / name): image for image, name in names.items()}
    visible = {}
    for line in (CUB / "parts/part_locs.txt").read_text().splitlines():
        image, part, x, y, flag = line.split()
        if flag == "1":
            visible[image, int(part)] = (float(x), float(y))
    assert len(pairs.pairs) == 200 and len({pair.name for pair in pairs.pairs}) == 200
    for pair, side in zip(pairs.pairs, pairs.box_side.tolist(), strict=True):
        source, target = number[pair.source], number[pair.target]
        assert source != target and split[source] == split[target] == "0"
        assert Path(pair.source).parent.name == Path(pair.target).parent.name == pair.category
        shared = [part for part in range(1, 16) if (source, part) in visible and (target, part) in visible]
        assert list(pair.source_points) == [visible[source, part] for part in shared]
        assert list(pair.target_points) == [visible[target, part] for part in shared]
        assert side == max(map(float, boxes[target][2:]))
    # All ordered pairs of 18 test images in each of 10 species share a part here.
    assert len(load_pairs("cub-pairs", CUB, 64).pairs) == 10 * 18 * 17


@needs_cub
@pytest.mark.skipif(not WEIGHTS.is_file(), reason=f"needs {WEIGHTS}")
def test_a_trained_network_knows_parts_of_real_birds():
    pairs, values = load_cub_pairs(CUB, 224, 3060), {}
    for weights in (WEIGHTS, "random"):
        encoder = build_model("timm/vit_tiny_patch16_224", str(weights))
        metrics, _ = run(encoder, pairs, (7, 11), norm=True)
        values[str(weights)] = [metrics["by_layer"][layer]["pck_image"]["0.1"] for layer in ("7", "11")]
    # Measured: 49.4 and 46.0; untrained 7.6 and 7.3; a random cell 1.6.
    assert values[str(WEIGHTS)] == pytest.approx([49.4, 46.0], abs=0.5)
    assert all(value < 10 for value in values["random"]) and 1.5 < metrics["chance"]["pck_image"]["0.1"] < 1.7


def test_sheet_of_pairs(figures, tmp_path):
    """Of every pair both squares, a line from each keypoint to its prediction, and the true place of wrong ones."""
    pairs = load_synthetic_pairs(64, 20, num_images=12)
    predicted = pairs.target_points.clone()
    predicted[::2] += 100
    draw_pairs(tmp_path / "a.png", pairs, predicted, 3, "my $run", side=200)
    assert figures[0].axes[0].get_legend().get_title().get_text().startswith("my $run\n")
    ends, at = (pairs.source[10], pairs.target[10]), pairs.pair == 10
    for axes, image in zip(figures[0].axes[2:4], ends, strict=True):
        assert (axes.images[0].get_array() == pairs.images[image][0][0].permute(1, 2, 0).numpy()).all()
        assert axes.images[0].get_extent() == [0, 200, 200, 0]
    scale, target_scale = (200 / pairs.sizes[end] for end in ends)
    starts = pairs.source_points[at] * scale - torch.tensor([208, 0])
    good = torch.arange(len(predicted))[at] % 2 == 1
    true, *lines, keypoints = (line.get_xydata() for line in axes.lines)
    assert np.allclose(keypoints, starts) and np.allclose(true, (pairs.target_points[at] * target_scale)[~good])
    for line, kind in zip(lines, (good, ~good), strict=True):
        assert np.allclose(line[::3], starts[kind]) and np.isnan(line[2::3]).all()
        assert np.allclose(line[1::3], (predicted[at] * target_scale)[kind])
    sheet = np.asarray(Image.open(tmp_path / "a.png").convert("RGB"))
    for colour in ((0, 255, 0), (255, 0, 0)):  # across both images
        assert np.ptp((sheet == colour).all(-1).nonzero()[1]) > 80
