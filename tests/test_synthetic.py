"""The synthetic data set: the same for a seed, masks and keypoints that agree, learnable by shape and not by colour."""

import math
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torchvision.transforms.functional import pil_to_tensor

from datasets.pairs import load_synthetic_pairs
from datasets.segmentation import SyntheticSplit
from datasets.synthetic import (
    DEFAULT_KEYPOINTS,
    KEYPOINT_NAMES,
    NUM_IMAGES,
    OBJECT_NAMES,
    PART_NAMES,
    draw_figure,
    draw_image,
    image_seeds,
    load_synthetic_patches,
    load_synthetic_species,
)
from utils import UserError

PARTS_OF = {name: (name,) for name in KEYPOINT_NAMES} | {"hand": ("hand", "wing"), "knee": ("leg",)}


@pytest.fixture(scope="module")
def pictures():
    return [draw_figure(seed) for seed in range(60)]


def content(picture):
    return [picture.image.tobytes(), picture.part_mask.tobytes(), picture.object_mask.tobytes(), picture.keypoints]


def test_a_seed_gives_one_picture(pictures):
    for seed in (0, 3, 17):
        assert content(draw_figure(seed)) == content(pictures[seed])
        assert draw_image(seed).tobytes() == pictures[seed].image.tobytes()
    assert len({picture.image.tobytes() for picture in pictures}) == len(pictures)
    assert len({picture.image.size for picture in pictures}) > 10


def test_number_of_figures_can_be_given():
    for number in (1, 2):
        picture = draw_figure(5, number)
        assert picture.part_mask.shape == picture.object_mask.shape == picture.image.size[::-1]
        names = [keypoint.name for keypoint in picture.keypoints]
        assert len(picture.species) == number and max(map(names.count, names)) == number


def test_masks_agree_and_every_species_and_part_occurs(pictures):
    parts = {label: set() for label in range(1, len(OBJECT_NAMES) + 1)}
    for picture in pictures:
        assert picture.part_mask.dtype == picture.object_mask.dtype == np.uint8
        assert ((picture.part_mask > 0) == (picture.object_mask > 0)).all()
        assert set(np.unique(picture.object_mask)) - {0} <= set(picture.species)
        for label in picture.species:
            parts[label] |= {PART_NAMES[part - 1] for part in picture.part_mask[picture.object_mask == label]}
    assert set.union(*parts.values()) == set(PART_NAMES)
    assert set.intersection(*parts.values()) >= {"head", "eye", "mouth", "torso", "leg", "foot"}


def test_visible_keypoints_lie_on_their_part_and_hidden_ones_are_covered_by_what_is_painted_later(pictures):
    counts, num_covered = dict.fromkeys(KEYPOINT_NAMES, 0), 0
    for picture in pictures:
        for name, x, y, visible in picture.keypoints:
            counts[name] += visible
            if not (0 <= x < picture.image.width and 0 <= y < picture.image.height):
                assert not visible
            elif visible:
                assert PART_NAMES[picture.part_mask[y, x] - 1] in PARTS_OF[name]
            else:
                labels = [label for label, shape in enumerate(picture.shapes, 1) if shape.keypoint == name
                          and (round(shape.tip.real), round(shape.tip.imag)) == (x, y)]
                assert picture.shape_map[y, x] > max(labels)
                num_covered += 1
    assert min(counts.values()) > 10 and sum(counts.values()) > 300 and num_covered > 20


def test_the_box_of_a_pair_is_that_of_the_figure():
    for pair in load_synthetic_pairs(64, 20, seed=1, num_images=12).pairs:
        picture = draw_figure(pair.target, num_figures=1)
        rows, columns = picture.object_mask.nonzero()
        assert pair.box == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
        for x, y in pair.target_points:
            assert picture.object_mask[int(y), int(x)] == picture.species[0]


def test_splits_have_no_picture_in_common():
    seeds = [set(image_seeds(split, 5000, seed)) for split in ("train", "test") for seed in (0, 1, 2)]
    assert sum(map(len, seeds)) == len(set.union(*seeds)) == 30000
    assert image_seeds("val") == image_seeds("test") and len(image_seeds("train")) == NUM_IMAGES["train"]


def test_patches_follow_the_published_rule():
    dataset = load_synthetic_patches("train", 40)
    assert dataset.classes == list(DEFAULT_KEYPOINTS)
    expected = []
    for seed in image_seeds("train", 40):
        points = [point for point in draw_figure(seed).keypoints if point.visible and point.name in DEFAULT_KEYPOINTS]
        for name, x, y, _ in points:
            distances = [math.hypot(x - other.x, y - other.y) for other in points if (other.x, other.y) != (x, y)]
            if 20 < min(distances, default=0) / 2 < 1000:
                half = round(min(distances) / 4)
                expected.append((seed, (x - half, y - half, x + half, y + half), DEFAULT_KEYPOINTS.index(name)))
    got = [(entry.path, box, label) for entry in dataset.images
           for box, label in zip(entry.boxes, entry.labels, strict=True)]
    assert got == expected and len(got) > 80


def test_loaders():
    dataset = load_synthetic_patches("test", 6, keypoints=("1", "tail"))
    assert dataset.classes == ["eye", "tail"] and len(pickle.loads(pickle.dumps(dataset))) == len(dataset) <= 6
    assert dataset[0][0].shape[1:] == (3, 224, 224)
    with pytest.raises(UserError, match="keypoint nose is not in the synthetic figures; choose from 1 eye, 2 hand"):
        load_synthetic_patches("train", 4, keypoints=("eye", "nose"))

    dataset = load_synthetic_species("train", 20, transform=pil_to_tensor)
    assert len(dataset) == 20 and dataset.classes == list(OBJECT_NAMES) and len(dataset.labels.unique()) == 3
    picture = draw_figure(dataset.images[2].path, num_figures=1)
    assert torch.equal(dataset[2][0][0], pil_to_tensor(picture.image))
    assert picture.species == [int(dataset.labels[2]) + 1]

    picture = draw_figure(image_seeds("val")[3])
    for kind, mask in (("object", picture.object_mask), ("part", picture.part_mask)):
        image, label = SyntheticSplit(kind, "val").load(3)
        assert image.tobytes() == picture.image.tobytes() and (label == mask - np.uint8(1)).all()
    assert SyntheticSplit("part", "train").load(3)[0].tobytes() != picture.image.tobytes()


def gradient_histograms(patches):
    """[n, 3, 32, 32] -> [n, 128]: orientation of gradients, 8 bins without sign, in 4 x 4 cells; unit length."""
    dy, dx = np.gradient(patches.mean(1), axis=(1, 2))
    bins = (np.arctan2(dy, dx) % np.pi / np.pi * 8).astype(int) % 8
    cells = [(np.hypot(dx, dy) * (bins == one)).reshape(-1, 4, 8, 4, 8).sum((2, 4)) for one in range(8)]
    features = np.stack(cells, -1).reshape(len(patches), -1)
    return features / (np.linalg.norm(features, axis=1, keepdims=True) + 1e-6)


def test_parts_are_learned_from_shape_and_not_from_colour():
    patches, labels = {}, {}
    for split, count in (("train", 250), ("test", 120)):
        dataset = load_synthetic_patches(
            split, count, transform=lambda patch: pil_to_tensor(patch.resize((32, 32), Image.BILINEAR)))
        patches[split] = torch.cat([dataset[index][0] for index in range(len(dataset))]).numpy() / 255.0
        labels[split] = dataset.labels.numpy()

    def accuracy(classifier, feature):
        classifier.fit(feature(patches["train"]), labels["train"])
        return balanced_accuracy_score(labels["test"], classifier.predict(feature(patches["test"])))
    colour = accuracy(KNeighborsClassifier(1), lambda x: x.mean((2, 3)))
    shape = accuracy(make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=500)), gradient_histograms)
    print(f"balanced accuracy of 4 classes: mean colour {colour:.3f}, gradient histograms {shape:.3f}")
    assert 0.15 < colour < 0.35 and shape > 0.4
