"""The transforms against pixels of the reference pipeline (tests/golden/segmentation) and against plain loops."""

from pathlib import Path

import numpy as np
import pytest
import torch

from datasets.segmentation_transforms import (
    Augmentation,
    Packed,
    accept_crops,
    choose_crop_region,
    choose_crops,
    draw_augmentation,
    hsv_to_rgb,
    pack_pixels,
    photometric_distortion,
    rescale_size,
    resize_image,
    resized_pixels,
    rgb_to_hsv,
    training_batch,
)

GOLDEN = Path(__file__).parent / "golden" / "segmentation"
MEAN = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)


def golden(name):
    return torch.load(GOLDEN / f"{name}.pt", weights_only=True)


def packed(images, labels):
    """Images [h, w, 3] and labels [h, w] of any sizes behind one another."""
    pixels = [pack_pixels(image.numpy(), label.numpy()) for image, label in zip(images, labels, strict=True)]
    ends = torch.tensor([part.numel() for part in pixels]).cumsum(0)
    sizes = torch.tensor([part.shape for part in pixels])
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), ends[:-1]])
    return Packed(torch.cat([part.flatten() for part in pixels]), starts, sizes[:, 0], sizes[:, 1])


def resize_crop_flip(batch, augmentations, out_sizes, crop_size):
    crops, labels = choose_crop_region(batch, augmentations, out_sizes, crop_size)
    return resized_pixels(batch.pixels, crops), labels, crops.inside()


def plain(offsets=((0.0, 0.0),) * 11, ratio=1.0, flip=False, **distortions):
    return Augmentation(ratio, np.array(offsets), flip, **distortions)


def test_training_sizes():
    data = golden("resize")
    for item in data["train_sizes"] + data["train_full"]:
        scale = tuple(int(side * item["ratio"]) for side in item["scale"])
        assert scale == tuple(item["target"])
        height, width = data["images"][item["image"]].shape[:2]
        height, width = item.get("height", height), item.get("width", width)
        assert rescale_size(height, width, scale) == (item["out_height"], item["out_width"])
    for row, ratio in zip(data["size_table"].tolist(), data["size_table_ratio"].tolist(), strict=True):
        height, width, a, b, *target, out_height, out_width = row
        scale = (int(a * ratio), int(b * ratio))
        assert list(scale) == target
        # An image without pixels is an error in OpenCV; here its side is 1.
        assert rescale_size(height, width, scale) == (max(out_height, 1), max(out_width, 1))


def test_test_sizes_and_pixels():
    data = golden("resize")
    for height, width, a, b, out_height, out_width in data["test_sizes"].tolist():
        assert rescale_size(height, width, (a, b)) == (out_height, out_width)
    for item in data["test_full"]:
        height, width = rescale_size(*item["image"].shape[:2], item["scale"])
        assert torch.equal(resize_image(item["image"], height, width).permute(1, 2, 0), item["out"])


def test_resized_pixels_and_labels_are_exact():
    """Every training resize, looked at through a crop that holds all of it; both images in one batch."""
    data = golden("resize")
    batch = packed(data["images"], data["labels"])
    for item in data["train_full"]:
        size = (item["out_height"], item["out_width"])
        one = Packed(batch.pixels, *(field[item["image"]:item["image"] + 1] for field in batch[1:]))
        colours, labels, inside = resize_crop_flip(one, [plain()], [size], size)
        assert inside.all()
        assert torch.equal(colours[0].permute(1, 2, 0).to(torch.uint8), item["out"])
        assert torch.equal(labels[0], item["out_label"])


def test_a_crop_is_a_cut_of_the_resized_image():
    """Cutting afterwards, the slow way, gives the same, flipped or not, for images of two sizes in one batch."""
    data = golden("resize")
    batch = packed(data["images"], data["labels"])
    augmentations = [plain([(0.3, 0.9)] * 11, flip=True), plain([(0.99, 0.1)] * 11)]
    sizes = [(131, 174), (90, 67)]
    colours, labels, _ = resize_crop_flip(batch, augmentations, sizes, (48, 64))
    for i, (height, width) in enumerate(sizes):
        one = Packed(batch.pixels, *(field[i:i + 1] for field in batch[1:]))
        whole, whole_labels, _ = resize_crop_flip(one, [plain()], [(height, width)], (height, width))
        y, x = (int(share * (side - crop + 1)) for share, side, crop
                in zip(augmentations[i].offsets[0], (height, width), (48, 64), strict=True))
        cut, cut_labels = whole[0, :, y:y + 48, x:x + 64], whole_labels[0, y:y + 48, x:x + 64]
        if augmentations[i].flip:
            cut, cut_labels = cut.flip(2), cut_labels.flip(1)
        assert torch.equal(colours[i], cut)
        assert torch.equal(labels[i], cut_labels)


@pytest.mark.parametrize("case", golden("photometric")["single"], ids=lambda case: f"{case['op']} {case['value']}")
def test_one_distortion(case):
    image = golden("photometric")["image"].permute(2, 0, 1)[None].int()
    value = int(case["value"]) if case["op"] == "hue" else case["value"]
    out = photometric_distortion(image, [plain(**{case["op"]: value})])[0].permute(1, 2, 0)
    assert torch.equal(out.to(torch.uint8), case["out"])


def test_distortions_together_in_one_batch():
    """The cases have different coins; the batch applies to each image what is its own."""
    data = golden("photometric")
    image = data["image"].permute(2, 0, 1)[None].int()
    augmentations = []
    for case in data["combined"]:
        names = ("brightness", "contrast", "saturation", "hue")
        given = {name: case[name] for name in names if not np.isnan(case[name])}
        if "hue" in given:
            given["hue"] = int(given["hue"])
        augmentations.append(plain(contrast_first=case["contrast_first"], **given))
    out = photometric_distortion(image.repeat(len(augmentations), 1, 1, 1), augmentations)
    for ours, case in zip(out, data["combined"], strict=True):
        assert torch.equal(ours.permute(1, 2, 0).to(torch.uint8), case["out"])


def test_colour_tables():
    data = golden("photometric")
    rgb = data["rgb"].T[None, :, :, None].int()
    assert torch.equal(torch.stack(rgb_to_hsv(rgb), dim=1)[0, :, :, 0].T.to(torch.uint8), data["rgb_to_hsv"])
    hue, saturation, value = data["hsv"].T[:, None, :, None].int()
    assert torch.equal(hsv_to_rgb(hue, saturation, value)[0, :, :, 0].T.to(torch.uint8), data["hsv_to_rgb"])


@pytest.mark.parametrize("case", golden("crop")["cases"], ids=lambda case: case["name"][:40])
def test_crop_decisions(case):
    height, width = case["label"].shape
    crop_height, crop_width = case["crop_size"]

    def cut(samples, offsets):
        return torch.stack([case["label"][y:y + crop_height, x:x + crop_width] for y, x in offsets.tolist()])

    verdicts = [bool(accept_crops(cut([0], box[None]))) for box in case["boxes"]]
    assert verdicts == case["accepted"].tolist()
    chosen, labels = choose_crops(cut, case["boxes"][None])
    assert chosen.item() == case["chosen"]
    assert torch.equal(labels[0], case["out_label"])
    # The same through the whole of resize_crop_flip; the box as a share of the room, from the middle of its interval.
    room = np.maximum([height - crop_height + 1, width - crop_width + 1], 1)
    batch = packed([case["image"]], [case["label"]])
    augmentation = plain((case["boxes"].numpy() + 0.5) / room)
    colours, labels, inside = resize_crop_flip(batch, [augmentation], [(height, width)], (crop_height, crop_width))
    out_height, out_width = case["out_label"].shape
    assert torch.equal(labels[0, :out_height, :out_width], case["out_label"])
    assert torch.equal(colours[0, :, :out_height, :out_width].permute(1, 2, 0).to(torch.uint8), case["out_image"])
    assert inside.sum() == out_height * out_width
    assert (labels[~inside] == 255).all()


@pytest.mark.parametrize("stubborn", [0, 5, 16])
def test_crops_judged_together_are_those_of_one_round_after_another(stubborn):
    """All draws but the first are judged at once: the host waits for a GPU once, not after every draw."""
    generator = torch.Generator().manual_seed(stubborn)
    shares = torch.rand(16, 11, generator=generator) < 0.3
    shares[:stubborn] = False
    # A crop has two classes where its first offset is 1, and one where that is 0.
    label = torch.zeros(12, 12, dtype=torch.uint8)

    def cut(samples, offsets):
        labels = label.expand(len(samples), -1, -1).clone()
        labels[:, :6] = offsets[:, :1, None].to(torch.uint8)
        labels[:, 6:, :5] = 255
        return labels

    offsets = torch.stack([shares.int(), torch.arange(11).expand(16, -1)], dim=2)

    def one_after_another(sample):
        accepted = [bool(accept_crops(cut([0], box[None]))) for box in offsets[sample]]
        assert accepted == shares[sample].tolist()
        return accepted[:10].index(True) if True in accepted[:10] else 10

    expected = torch.tensor([one_after_another(sample) for sample in range(16)])
    chosen, labels = choose_crops(cut, offsets)
    assert torch.equal(chosen, expected)
    assert torch.equal(labels, cut(range(16), offsets[torch.arange(16), expected]))


def test_flip_normalise_and_pad():
    data = golden("normpad")
    mean = torch.tensor(data["mean"]).view(1, 3, 1, 1) / 255
    std = torch.tensor(data["std"]).view(1, 3, 1, 1) / 255
    for case in data["cases"]:
        height, width = case["label"].shape
        # A base scale for which the size stays what it is.
        images, labels = training_batch(packed([case["image"]], [case["label"]]), [(height, width)],
                                        [plain(flip=case["flip"])], (max(height, width), min(height, width)),
                                        case["crop_size"][0], mean, std)
        assert torch.allclose(images[0], case["out"], atol=1e-5)
        assert torch.equal(labels[0], case["out_label"])


def test_a_batch_equals_its_samples():
    """Whatever stands beside a sample in a batch, and however the batch is cut, its crop is the same."""
    data = golden("resize")
    batch = packed(data["images"] * 4, data["labels"] * 4)
    sizes = [tuple(image.shape[:2]) for image in data["images"]] * 4
    augmentations = [draw_augmentation(3, 7, position) for position in range(8)]
    together = resize_crop_flip(batch, augmentations, [rescale_size(*size, (128, 64)) for size in sizes], (48, 48))
    images, labels = training_batch(batch, sizes, augmentations, (128, 64), 48, MEAN, STD)
    assert images.shape == (8, 3, 48, 48)
    for i in range(8):
        one = Packed(batch.pixels, *(field[i:i + 1] for field in batch[1:]))
        alone = resize_crop_flip(one, augmentations[i:i + 1], [rescale_size(*sizes[i], (128, 64))], (48, 48))
        assert all(torch.equal(a[i:i + 1][..., alone[2][0]], b[..., alone[2][0]])
                   for a, b in zip(together, alone, strict=True))
        alone = training_batch(one, sizes[i:i + 1], augmentations[i:i + 1], (128, 64), 48, MEAN, STD)
        assert torch.equal(images[i:i + 1], alone[0])
        assert torch.equal(labels[i:i + 1], alone[1])


def test_distribution_of_augmentations():
    """Published shares and ranges, over 4,000 draws; bounds of four standard deviations."""
    draws = [draw_augmentation(0, iteration, position) for iteration in range(250) for position in range(16)]
    ratios = np.array([one.ratio for one in draws])
    assert 0.5 <= ratios.min() < 0.51
    assert 1.99 < ratios.max() < 2
    assert abs(ratios.mean() - 1.25) < 0.03
    coins = np.array([[one.flip, one.brightness != 0, one.contrast != 1, one.contrast_first, one.saturation is not None,
                       one.hue is not None] for one in draws])
    assert (abs(coins.mean(0) - 0.5) < 0.032).all()
    assert {one.hue for one in draws} == {None, *range(-18, 18)}
    assert all(-32 <= one.brightness <= 32 and 0.5 <= one.contrast <= 1.5 for one in draws)
    # Independent of each other, and new at every iteration and position.
    table = np.array([[one.ratio, one.flip, one.brightness, one.contrast, *one.offsets[:2].ravel()] for one in draws])
    assert (abs(np.corrcoef(table.T) - np.eye(8)) < 0.07).all()
    assert len(np.unique(ratios)) == len(draws)
    again = draw_augmentation(0, 3, 5)
    assert np.array_equal(again.offsets, draws[3 * 16 + 5].offsets)


@pytest.mark.parametrize("size", [(5, 700), (700, 5), (1, 1), (3, 40)])
def test_extreme_shapes(size):
    """A side ratio above 10 and images smaller than the crop come through, padded."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (*size, 3), dtype=torch.uint8, generator=generator)
    label = torch.randint(0, 3, size, dtype=torch.uint8, generator=generator)
    for seed in range(4):
        images, labels = training_batch(packed([image], [label]), [size], [draw_augmentation(seed, 0, 0)], (256, 64),
                                        64, MEAN, STD)
        assert images.isfinite().all()
        assert (labels != 255).any()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_same_on_a_gpu():
    data = golden("resize")
    batch = packed(data["images"] * 8, data["labels"] * 8)
    sizes = [tuple(image.shape[:2]) for image in data["images"]] * 8
    augmentations = [draw_augmentation(5, 0, position) for position in range(16)]
    expected = training_batch(batch, sizes, augmentations, (256, 64), 64, MEAN, STD)
    ours = training_batch(Packed(*(field.cuda() for field in batch)), sizes, augmentations, (256, 64), 64, MEAN.cuda(),
                          STD.cuda())
    assert torch.equal(ours[1].cpu(), expected[1])
    # One level is 0.018.
    assert (ours[0].cpu() - expected[0]).abs().max() < 0.04
