"""Dense nearest-neighbour segmentation: the search against float64, the memory against a loop over patches, one process
against several, and a memory that is asked for what it holds."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from models import knn_segmentation
from models.knn_segmentation import (
    KNNSegmenter,
    choose_patches,
    fill_memory,
    label_histograms,
    nearest,
    patch_tokens,
)
from utils import UserError
from utils.distributed import gather_rows, init_processes, is_main, shard


def unit_rows(count, width=24, seed=0):
    return F.normalize(torch.randn(count, width, generator=torch.Generator().manual_seed(seed)), dim=1)


def by_sorting(queries, memory, k):
    """Row numbers of the k largest products in float64."""
    products = queries.double() @ memory.double().T
    return products.sort(dim=1, descending=True).indices[:, :k]


# The search

@pytest.mark.parametrize(("queries_at_once", "rows"), [(1, 7), (7, 1), (7, 100), (256, 16384)])
def test_search_is_that_of_a_sort_whatever_the_chunks(monkeypatch, rows, queries_at_once):
    monkeypatch.setattr(knn_segmentation, "CHUNK", {"cpu": (queries_at_once, rows)})
    queries, memory = unit_rows(23), unit_rows(150, seed=1)
    similarity, index = nearest(queries, memory, 30)
    expected = (queries @ memory.T).sort(dim=1, descending=True).values[:, :30]
    assert torch.allclose(similarity, expected, rtol=0, atol=1e-6)
    assert torch.allclose((queries @ memory.T).gather(1, index), similarity, rtol=0, atol=1e-6)
    # Other rows where float32 does not tell two apart.
    assert (index == by_sorting(queries, memory, 30)).double().mean() > 0.99


def test_the_search_in_bfloat16():
    """Products in the type of the rows; most of the neighbours of float32."""
    queries, memory = unit_rows(50, 192), unit_rows(3000, 192, seed=1)
    similarity, index = nearest(queries.bfloat16(), memory.bfloat16(), 30)
    assert similarity.dtype == torch.bfloat16
    expected = by_sorting(queries, memory, 30).tolist()
    shared = [len(set(one) & set(other)) / 30 for one, other in zip(index.tolist(), expected, strict=True)]
    assert sum(shared) / len(shared) > 0.9


def test_small_memories():
    memory = unit_rows(40)
    assert nearest(memory, memory, 1)[1][:, 0].tolist() == list(range(40))
    assert nearest(memory[:3], memory[:5], 30)[1].sort().values.tolist() == [[0, 1, 2, 3, 4]] * 3


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
    assert choose_patches(histograms, 10, torch.rand(400, 100, dtype=torch.float64))[:, 37].sum() > 390


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


def fill(num_crops=7, memory_size=30, seed=0, encoder=None, batches=None):
    return fill_memory(encoder or Colours(), batches or crops(num_crops), num_crops, 3, memory_size // num_crops, 5,
                       seed, "fp32", lambda line: None)


def test_memory_is_bounded_and_rows_sum_to_one():
    memory, labels = fill()
    assert memory.shape == (28, 48) and labels.shape == (28, 5)
    assert torch.allclose(labels.sum(1), torch.ones(28)) and torch.allclose(memory.norm(dim=1), torch.ones(28))
    assert torch.equal(fill()[0], memory) and not torch.equal(fill(seed=1)[0], memory)


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
    assert torch.equal(torch.tensor(memory), expected[0]) and torch.equal(torch.tensor(labels), expected[1])


def test_mistakes_are_named():
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


def test_probabilities_are_those_of_a_loop(monkeypatch):
    monkeypatch.setattr(knn_segmentation, "CHUNK", {"cpu": (5, 20)})
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
