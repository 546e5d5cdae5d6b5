"""The crop rule against plain loops, the pixels of patches against plain Pillow, and how patches travel in batches."""

import math
import random

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from datasets.patches import (
    PatchDataset,
    PatchImage,
    count_outside,
    draw_numbers,
    keypoint_patches,
    resize_center_crop,
    select_keypoints,
)
from utils import UserError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def slow_selection(points, crop_scale=0.5):
    """The published rule, keypoint by keypoint."""
    kept = []
    for i, point in enumerate(points):
        nearest = math.inf
        for j, other in enumerate(points):
            distance = math.sqrt(sum((a - b) ** 2 for a, b in zip(point, other, strict=True)))
            if j != i and distance != 0 and distance < nearest:
                nearest = distance
        if 20 < nearest / 2 < 1000:
            kept.append((i, round(nearest / {0.5: 4, 1.0: 2}[crop_scale])))
    return kept


def selected(points, **options):
    indices, half_sides = select_keypoints(points, **options)
    return list(zip(indices.tolist(), half_sides.tolist(), strict=True))


@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize("crop_scale", [0.5, 1.0])
def test_selection_equals_plain_loops(dimensions, crop_scale):
    generator = random.Random(0)
    total = 0
    for _ in range(300):
        # Halves and few positions, so that ties, coinciding points and distances of exactly 40 occur.
        points = [tuple(generator.randrange(0, 240, 4) / 2 for _ in range(dimensions))
                  for _ in range(generator.randrange(7))]
        expected = slow_selection(points, crop_scale)
        assert selected(np.array(points).reshape(-1, dimensions), crop_scale=crop_scale) == expected
        total += len(expected)
    assert total > 100


@pytest.mark.parametrize("distance, half_side", [(50, 12), (54, 14), (42, 10), (46, 12), (42.1, 11), (1999, 500)])
def test_half_sides_round_half_to_even(distance, half_side):
    assert selected([(0, 0), (0, distance)]) == [(0, half_side), (1, half_side)]


def test_bounds_are_exclusive():
    assert selected([(10, 5), (10, 45)]) == []
    assert selected([(10, 5), (10, np.nextafter(45, 46))]) == [(0, 10), (1, 10)]
    assert selected([(0, 0), (2000, 0)]) == []


def test_few_points_coinciding_points_and_groups():
    assert selected(np.zeros((0, 2))) == selected([(3, 4)]) == selected([(7, 7), (7, 7)]) == []
    assert selected([(0, 0, 1), (0, 60, 1), (0, 10, 500), (0, 70, 500)]) == [(0, 15), (1, 15), (2, 15), (3, 15)]
    assert selected([(0, 0), (0, 60), (0, 10), (0, 70)]) == []


def test_a_crop_scale_that_leaves_nothing_is_refused():
    for crop_scale in (0, -1, float("nan")):
        with pytest.raises(UserError, match="crop scale"):
            select_keypoints([(0, 0), (41, 0)], crop_scale)


def test_patches_keep_the_labels_of_their_points():
    points = [(0, (0, 0)), (1, (30, 0)), (2, (130.5, 8))]
    dataset = keypoint_patches([("a.jpg", points), ("b.jpg", points[:2])], [3, 4, 5], dict.fromkeys((3, 4, 5), "x"),
                               "part", 0.5, None)
    assert dataset.images == [PatchImage("a.jpg", [(105.5, -17, 155.5, 33)], [2])]


def noise(height, width, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("box", [(10, 12, 60, 62), (-20, -9, 30, 41), (100, 60, 150, 110), (0.5, 1.5, 40.5, 41.5),
                                 (-10.3, 5.7, 31.7, 47.7), (500, 500, 540, 540)])
def test_patch_pixels_equal_plain_pillow(box):
    image = noise(90, 130)
    dataset = PatchDataset([PatchImage("", [box], [0])], ["part"], load=lambda path: image)
    left, upper, right, lower = (round(corner) for corner in box)
    canvas = Image.new("RGB", (right - left, lower - upper))  # black
    canvas.paste(image, (-left, -upper))
    expected = np.asarray(canvas.resize((224, 224), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    patches, ids = dataset[0]
    assert patches.dtype == torch.uint8 and patches.shape == (1, 3, 224, 224) and ids.tolist() == [0]
    assert np.array_equal(patches[0].numpy(), expected)


@pytest.mark.parametrize("ours, published", [
    (resize_center_crop(short_side=224), [transforms.Resize(224, InterpolationMode.BICUBIC)]),
    (resize_center_crop(), [transforms.Resize(256, InterpolationMode.BICUBIC), transforms.CenterCrop(224)]),
])
def test_normalised_uint8_equals_to_tensor_and_normalize(ours, published):
    patch = noise(61, 61)
    expected = transforms.Compose([*published, transforms.ToTensor(), transforms.Normalize(MEAN, STD)])(patch)
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    assert torch.equal((ours(patch).float() / 255 - mean) / std, expected)


@pytest.fixture
def folder(tmp_path):
    """Six images of 1 to 4 patches: (folder, PatchImages)."""
    images = []
    for index, count in enumerate([2, 1, 4, 3, 1, 2]):
        path = tmp_path / f"{index}.png"
        noise(40, 50, index).save(path)
        boxes = [(4 * k, 3 * k, 4 * k + 20, 3 * k + 20) for k in range(count)]
        images.append(PatchImage(str(path), boxes, [(index + k) % 3 for k in range(count)]))
    return tmp_path, images


def small(images, **options):
    return PatchDataset(images, ["a", "b", "c"], resize_center_crop(16, 16), **options)


def collect(dataset, indices, batch_size, workers=0):
    batches = list(dataset.batches(indices, batch_size, workers))
    return [len(ids) for _, ids in batches], torch.cat([p for p, _ in batches]), torch.cat([i for _, i in batches])


def test_ids_labels_and_image_index(folder):
    dataset = small(folder[1])
    assert len(dataset) == 6 and dataset.num_patches == 13
    assert dataset.image_index.tolist() == [0, 0, 1, 2, 2, 2, 2, 3, 3, 3, 4, 5, 5]
    assert dataset.labels.tolist() == [0, 1, 1, 2, 0, 1, 2, 0, 1, 2, 1, 2, 0]
    assert torch.cat([dataset[index][1] for index in range(6)]).tolist() == list(range(13))
    assert [len(dataset[index][0]) for index in range(6)] == [2, 1, 4, 3, 1, 2]


def test_identity_is_of_number_classes_labels_and_boxes(folder):
    images = folder[1]
    first = small(images).identity("test set")
    assert first == small([image._replace(path="elsewhere") for image in images]).identity("test set")
    moved = images[0]._replace(boxes=[(0, 0, 21, 20), *images[0].boxes[1:]])
    others = (small(images[1:]), small([images[0]._replace(labels=[2, 2]), *images[1:]]), small([moved, *images[1:]]),
              PatchDataset(images, ["a", "b", "d"]))
    assert all(other.identity("test set") != first for other in others)
    assert all(key.endswith("test set") for key in first)


def test_a_subset_drawn_by_the_seed(folder):
    dataset = small(folder[1])
    dataset.num_outside, dataset.notes = 3, ["a note"]
    part = dataset.subset(draw_numbers(6, 2, 0))
    assert len(part) == 2 and part.labels.tolist() == sum((list(image.labels) for image in part.images), [])
    assert (part.num_outside, part.notes, part.classes) == (3, ["a note"], ["a", "b", "c"])
    assert draw_numbers(6, None, 1) == draw_numbers(6, 9, 2) == list(range(6))
    assert len({tuple(draw_numbers(6, 2, seed)) for seed in range(99)}) == 15


@pytest.mark.parametrize("batch_size, expected", [
    (1, [2, 1, 4, 3, 1, 2]), (3, [3, 4, 3, 3]), (4, [3, 4, 4, 2]), (7, [7, 6]), (12, [11, 2]), (13, [13]), (99, [13])])
def test_batches_are_as_many_whole_images_as_fit_in_order(folder, batch_size, expected):
    dataset = small(folder[1])
    sizes, patches, ids = collect(dataset, range(6), batch_size)
    assert sizes == expected
    assert ids.tolist() == list(range(13))
    assert torch.equal(patches, torch.cat([dataset[index][0] for index in range(6)]))


def test_batches_of_some_images_in_any_order(folder):
    dataset = small(folder[1])
    sizes, patches, ids = collect(dataset, [3, 0], 4)
    assert sizes == [3, 2] and ids.tolist() == [7, 8, 9, 0, 1]
    assert torch.equal(patches, torch.cat([dataset[3][0], dataset[0][0]]))
    # As of a process among more than there are images.
    assert all(list(dataset.batches([], 4, workers)) == [] for workers in (0, 2))


class CountingLoad:
    """Opens an image and writes its path to a file, one line a call, from whichever process."""

    def __init__(self, record):
        self.record = str(record)

    def __call__(self, path):
        with open(self.record, "a") as file:
            file.write(path + "\n")
        return Image.open(path).convert("RGB")


@pytest.mark.parametrize("workers", [0, 2])
def test_every_image_is_decoded_once(folder, workers):
    root, images = folder
    dataset = small(images, load=CountingLoad(root / "record"))
    _, patches, ids = collect(dataset, range(6), 2, workers)
    assert ids.tolist() == list(range(13))
    assert torch.equal(patches, collect(small(images), range(6), 13)[1])
    assert sorted((root / "record").read_text().split()) == sorted(image.path for image in images)


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGBA", "LA", "CMYK", "I;16"])
def test_images_of_all_modes_become_rgb(tmp_path, mode):
    path = tmp_path / ("image.tif" if mode == "CMYK" else "image.png")
    image = Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(30, 40)) if mode == "I;16" else noise(30, 40)
    (image if mode == "I;16" else image.convert(mode)).save(path)
    assert small([PatchImage(str(path), [(0, 0, 20, 20)], [0])])[0][0].shape == (1, 3, 16, 16)


@pytest.mark.parametrize("content", [None, b"", b"<html>404</html>", 400])
def test_bad_image_is_one_line_with_and_without_workers(folder, content):
    root, images = folder
    path = root / "3.png"
    if content is None:
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-content] if content == 400 else content)
    with pytest.raises(UserError) as direct:
        small(images)[3]
    assert f"{path} cannot be decoded" in str(direct.value) and "\n" not in str(direct.value)
    for workers in (0, 1):
        with pytest.raises(UserError) as batched:
            list(small(images).batches(range(6), 2, workers))
        assert str(batched.value) == str(direct.value)


def test_keypoints_outside_of_their_pictures():
    points, sizes = [(0, 0), (60, 40), (30, 20), (60.5, 5)] * 100, [(60, 40)] * 400
    with pytest.raises(UserError, match=r"100 of 400 .* \(line 3\) at \(60.5, 5\) of 60 x 40 pixels.*resized, cropped"):
        count_outside(points, sizes, lambda number: f"line {number}")
    few = points[2:3] * 297 + [(-1, 0), (0, -0.5), (9, 41)]
    assert count_outside([], [], str) == (0, [])
    assert count_outside(few, sizes[:300], str) == (3, [
        "3 of 300 visible keypoints lie outside of their pictures, the first (297) at (-1, 0) of 60 x 40 pixels"])
    with pytest.raises(UserError, match=r"3 of 299 .*\(296\) at \(-1, 0\)"):
        count_outside(few[1:], sizes[1:300], str)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_pinned_batches(folder):
    dataset = small(folder[1])
    batches = list(dataset.batches(range(6), 4, 2, pin_memory=True))
    assert all(patches.is_pinned() for patches, _ in batches)
    assert torch.equal(torch.cat([patches for patches, _ in batches]), collect(dataset, range(6), 13)[1])
