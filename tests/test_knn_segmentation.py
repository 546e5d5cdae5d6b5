"""Dense nearest-neighbour segmentation: the search against a loop in float64, the memory against a loop over patches,
one process against several, and a memory that is asked for what it holds."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from models import knn_segmentation
from models.knn_segmentation import KNNSegmenter, choose_patches, fill_memory, label_histograms, nearest, patch_tokens
from utils import UserError, storage
from utils.distributed import gather_rows, init_processes, is_main, rank, shard

CPU = torch.device("cpu")


def unit_rows(count, width=24, seed=0):
    return F.normalize(torch.randn(count, width, generator=torch.Generator().manual_seed(seed)), dim=1)


def by_a_loop(queries, memory, k):
    """Row numbers by a float64 product for each pair, rounded to float32; of equal ones the lower row first."""
    found = []
    for query in queries.double().numpy():
        products = [np.float32(sum(a * b for a, b in zip(query, row, strict=True))) for row in memory.double().numpy()]
        found.append(sorted(range(len(memory)), key=lambda i: (-products[i], i))[:k])
    return torch.tensor(found)


def small_chunks(monkeypatch, size, queries=1024):
    monkeypatch.setattr(knn_segmentation, "CHUNK_BYTES", {"cpu": size})
    monkeypatch.setattr(knn_segmentation, "CHUNK_QUERIES", {"cpu": queries})


# The search

@pytest.mark.parametrize("size", [1, 1000, 20_000, 64 << 20])
@pytest.mark.parametrize("queries_at_once", [1, 7, 1024])
def test_search_is_that_of_a_loop_whatever_the_chunks(monkeypatch, size, queries_at_once):
    queries, memory = unit_rows(23), unit_rows(150, seed=1)
    expected = by_a_loop(queries, memory, 30)
    small_chunks(monkeypatch, size, queries_at_once)
    similarity, index = nearest(queries, memory, 30)
    assert torch.equal(index, expected)
    assert torch.equal(similarity, (queries.double() @ memory.double().T).float().gather(1, expected))


@pytest.mark.parametrize("size", [1, 3000, 64 << 20])
def test_ties_go_to_the_lower_row(monkeypatch, size):
    """More equal rows than candidates are compared at first; and rows that differ in float64 but not in float32."""
    small_chunks(monkeypatch, size)
    memory = unit_rows(3, seed=2).repeat(100, 1)
    queries = torch.cat([memory[:3], unit_rows(4)])
    assert torch.equal(nearest(queries, memory, 30)[1], by_a_loop(queries, memory, 30))
    close = unit_rows(1).repeat(200, 1)
    close[:, 0] += 1e-7 * torch.randn(200, generator=torch.Generator().manual_seed(3))
    queries = unit_rows(5, seed=4)
    assert torch.equal(nearest(queries, close, 10)[1], by_a_loop(queries, close, 10))


def test_undecided_queries_are_searched_again(monkeypatch):
    """The first search sees 64 candidates; a hundred rows are better than its worst by less than float32 resolves."""
    calls, search = [], knn_segmentation.nearest
    monkeypatch.setattr(knn_segmentation, "nearest",
                        lambda *given: calls.append((len(given[0]), given[3])) or search(*given))
    memory = torch.cat([unit_rows(1).repeat(100, 1), unit_rows(1000, seed=1)])
    queries = torch.cat([unit_rows(5, seed=2), memory[:1]])
    search(queries, memory, 30)
    assert calls == [(1, 512)]


def test_the_nearest_one_and_small_memories():
    memory = unit_rows(40)
    similarity, index = nearest(memory, memory, 1)
    assert index[:, 0].tolist() == list(range(40))
    assert torch.allclose(similarity, torch.ones(40, 1))
    similarity, index = nearest(memory[:3], memory[:5], 30)
    assert index.sort().values.tolist() == [[0, 1, 2, 3, 4]] * 3
    assert nearest(memory[:0], memory, 30)[1].shape == (0, 30)


def test_the_search_keeps_within_its_memory(monkeypatch):
    """Every tensor that the search makes is seen; none is larger than a chunk, though Q x M would be 40 of them."""
    small_chunks(monkeypatch, 1 << 20, 256)
    largest = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            largest.extend(one.untyped_storage().nbytes() for one in (result if isinstance(result, tuple) else [result])
                           if isinstance(one, torch.Tensor))
            return result

    queries, memory = unit_rows(1024, 8), unit_rows(10_000, 8, seed=1)
    with Watch():
        nearest(queries, memory, 30)
    assert max(largest) <= 1 << 20


# Labels and the choice of patches

def example_labels():
    generator = torch.Generator().manual_seed(5)
    labels = torch.randint(0, 4, (3, 12, 16), generator=generator, dtype=torch.uint8)
    labels[0, :6] = 255
    labels[1, :, 4:8] = 2
    labels[1, 0, 0] = 9  # no class
    labels[2] = torch.where(labels[2] == 3, 255, labels[2])
    return labels


def test_histograms_are_those_of_a_loop():
    labels = example_labels()
    ours = label_histograms(labels, 4, 4)
    for image in range(3):
        for patch in range(12):
            row, column = 4 * (patch // 4), 4 * (patch % 4)
            pixels = labels[image, row:row + 4, column:column + 4].flatten().tolist()
            assert ours[image, patch].tolist() == [pixels.count(label) for label in range(4)]


def test_choice_is_that_of_a_loop():
    histograms = label_histograms(example_labels(), 4, 4)
    uniform = torch.rand(3, 12, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    chosen = choose_patches(histograms, 5, uniform)
    for image in range(3):
        present = [{label for label in range(4) if patch[label] > 0} for patch in histograms[image].tolist()]
        score = {i: sum(sum(label in other for other in present) for label in one) * float(uniform[image, i])
                 for i, one in enumerate(present) if one}
        assert chosen[image].nonzero()[:, 0].tolist() == sorted(sorted(score, key=score.get)[:5])
    assert not choose_patches(histograms, 12, uniform)[0, :4].any()


def test_rare_classes_are_not_crowded_out():
    """One patch of class 1 among 99 of class 0: a uniform choice of a tenth would miss it nine times in ten."""
    histograms = torch.zeros(400, 100, 2)
    histograms[:, :, 0] = 1
    histograms[:, 37] = torch.tensor([0.0, 1.0])
    uniform = torch.rand(400, 100, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    assert choose_patches(histograms, 10, uniform)[:, 37].sum() > 390


# The memory

class Colours(torch.nn.Module):
    """An encoder whose tokens are the pixels of their patch."""

    patch_size, embed_dim = 4, 48

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(1, 3, 1, 1))

    def grid(self, images):
        return images.shape[2] // 4, images.shape[3] // 4

    def forward(self, images):
        patches = F.unfold(images, 4, stride=4).transpose(1, 2)
        return torch.cat([torch.full_like(patches[:, :1], 1e3), patches], dim=1)


def crops(count, side=16, classes=5, batch_size=3):
    """This process's share of count crops in batches of batch_size, as segment.py makes them: the last one is full."""
    for first in range(0, count, batch_size):
        generators = [torch.Generator().manual_seed(first + place) for place in shard(batch_size)]
        images = [torch.randn(3, side, side, generator=generator) for generator in generators]
        labels = [torch.randint(0, classes + 1, (side, side), generator=generator) for generator in generators]
        labels = [torch.where(label == classes, 255, label).to(torch.uint8) for label in labels]
        yield torch.stack(images), torch.stack(labels)


def fill(num_crops=7, memory_size=30, seed=0, encoder=None, log=lambda line: None, batches=None):
    return fill_memory(encoder or Colours(), batches or crops(num_crops), num_crops, 3, 16, 5, memory_size, seed,
                       "fp32", log)


def test_memory_is_bounded_and_rows_sum_to_one():
    lines = []
    memory, labels = fill(log=lines.append)
    assert memory.shape == (28, 48)
    assert labels.shape == (28, 5)
    assert torch.allclose(labels.sum(1), torch.ones(28))
    assert torch.allclose(memory.norm(dim=1), torch.ones(28))
    assert "28 patches (4 from each of 7 crops)" in lines[0]
    assert "0.00 GB" in lines[0]


def test_memory_holds_each_patch_with_its_labels():
    """With room for all patches: those of the images, in their order, each with the labels that it covers."""
    memory, labels = fill(memory_size=10 ** 4)
    images, maps = (torch.cat(parts)[:7] for parts in zip(*crops(7), strict=True))
    assert torch.equal(memory, patch_tokens(Colours(), images, "fp32").flatten(0, 1))
    counts = label_histograms(maps, 4, 5).flatten(0, 1)
    assert torch.equal(labels, counts / counts.sum(1, keepdim=True))


def test_ignored_pixels_are_no_class():
    """Patches without labels are not in the memory, others count labelled pixels only; nothing becomes class 0."""
    images, maps = torch.randn(3, 3, 16, 16), torch.full((3, 16, 16), 255, dtype=torch.uint8)
    maps[0, :4, :2] = 3
    memory, labels = fill(3, 100, batches=[(images, maps)])
    assert labels.tolist() == [[0, 0, 0, 1, 0]]
    assert torch.equal(memory, patch_tokens(Colours(), images[:1], "fp32")[0, :1])
    with pytest.raises(UserError, match="no training crop has a labelled pixel"):
        fill(3, 100, batches=[(images, torch.full_like(maps, 255))])


def test_the_choice_follows_from_the_seed():
    assert torch.equal(fill()[0], fill()[0])
    assert not torch.equal(fill()[0], fill(seed=1)[0])


def fill_in_processes():
    init_processes("cpu")
    memory, labels = fill()
    same = gather_rows(torch.cat([memory.flatten(), labels.flatten()])[None])
    if is_main():
        print(json.dumps([same.unique(dim=0).shape[0], memory.tolist(), labels.tolist()]))


@pytest.mark.parametrize("processes", [2, 3])
def test_several_processes_hold_what_one_holds(launch, processes):
    different, memory, labels = json.loads(launch(fill_in_processes, [], processes)[0].splitlines()[-1])
    expected = fill()
    assert different == 1
    assert torch.equal(torch.tensor(memory), expected[0])
    assert torch.equal(torch.tensor(labels), expected[1])


def test_a_memory_below_one_patch_for_each_crop():
    with pytest.raises(UserError, match="less than one patch for each of the 7 .* use --memory-size 7 or") as error:
        fill(memory_size=6)
    assert "\n" not in str(error.value)
    assert len(fill(memory_size=7)[0]) == 7


def test_a_memory_that_does_not_fit(monkeypatch):
    monkeypatch.setattr(storage, "free_memory", lambda device: 10 ** 9)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(Colours, "embed_dim", 10 ** 6)
    with pytest.raises(UserError, match="0.50 GB are free on cpu; use --memory-size 66 or less"):
        fill(memory_size=112)


def fill_where_one_has_less_memory():
    init_processes("cpu")
    storage.free_memory = lambda device: (8 * 10 ** 9, 10 ** 8)[rank()]
    fill()


def test_the_process_with_the_least_memory_decides_for_all(launch):
    """And its figure is said, whichever process speaks: the first has 8 GB, the second not enough for a search."""
    _, err = launch(fill_where_one_has_less_memory, [], 2, status=2)
    assert "0.10 GB are free on cpu; use --memory-size 0 or less" in err and len(err.splitlines()) == 1


def test_tokens_that_are_not_finite():
    class Broken(Colours):
        def forward(self, images):
            return super().forward(images) * torch.inf

    with pytest.raises(UserError, match="not finite at --precision fp32"):
        fill(encoder=Broken())


# The module

def test_an_image_asks_a_memory_of_itself():
    """One label a patch: the nearest neighbour of each patch is itself, and its label comes back."""
    image = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    grid = torch.randint(0, 5, (3, 4, 4), generator=torch.Generator().manual_seed(1))
    maps = grid.repeat_interleave(4, 1).repeat_interleave(4, 2).to(torch.uint8)
    memory, labels = fill(1, 100, batches=[(image, maps)])
    assert len(memory) == 16
    segmenter = KNNSegmenter(Colours(), memory, labels, "fp32", neighbours=1)
    probabilities = segmenter.patch_logits(image[:1])
    assert torch.equal(probabilities[0], F.one_hot(grid[0], 5).permute(2, 0, 1).float())
    assert torch.equal(KNNSegmenter(Colours(), memory, labels, "fp32").patch_logits(image[:1]).argmax(1), grid[:1])


@pytest.mark.parametrize("size", [100, 64 << 20])
def test_probabilities_are_those_of_a_loop(monkeypatch, size):
    small_chunks(monkeypatch, size, 5)
    memory, labels = fill(memory_size=70)
    image = torch.randn(2, 3, 8, 12, generator=torch.Generator().manual_seed(8))
    ours = KNNSegmenter(Colours(), memory, labels, "fp32").patch_logits(image)
    assert ours.shape == (2, 5, 2, 3)
    assert torch.allclose(ours.sum(1), torch.ones(2, 2, 3))
    tokens = patch_tokens(Colours(), image, "fp32").double().numpy()
    for b in range(2):
        for patch in range(6):
            cosine = memory.double().numpy() @ tokens[b, patch]
            best = np.argsort(-cosine)[:30]
            weights = np.exp(cosine[best] / 0.02)
            expected = weights @ labels.double().numpy()[best] / weights.sum()
            assert np.allclose(ours[b, :, patch // 3, patch % 3].numpy(), expected, atol=1e-5)


def test_any_size_of_image():
    """As a linear segmenter's: padded to whole patches, upsampled bilinearly, cut to the size."""
    memory, labels = fill()
    segmenter = KNNSegmenter(Colours(), memory, labels, "fp32")
    image = torch.randn(1, 3, 13, 10, generator=torch.Generator().manual_seed(9))
    whole = segmenter(F.pad(image, (0, 2, 0, 3)))
    assert torch.equal(segmenter(image), whole[:, :, :13, :10])
    assert torch.allclose(whole.sum(1), torch.ones(1, 16, 12))
    assert segmenter(image).shape == (1, 5, 13, 10)
