"""The synthetic data set: the same for a seed, masks and keypoints that agree, learnable by shape and not by colour."""

import hashlib
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

from datasets.synthetic import (
    DEFAULT_KEYPOINTS,
    KEYPOINT_NAMES,
    NUM_IMAGES,
    OBJECT_NAMES,
    PART_NAMES,
    SIDES,
    compose,
    draw_figure,
    draw_image,
    fill,
    image_seeds,
    load_synthetic_patches,
    load_synthetic_species,
    outline,
    scan,
    synthetic_segmentation,
)
from utils import UserError


@pytest.fixture(scope="module")
def pictures():
    return [draw_figure(seed) for seed in range(60)]


def digest(picture) -> str:
    state = hashlib.sha256(repr((picture.image.size, [tuple(k) for k in picture.keypoints])).encode())
    for pixels in (picture.image.tobytes(), picture.part_mask.tobytes(), picture.object_mask.tobytes()):
        state.update(pixels)
    return state.hexdigest()[:16]


@pytest.mark.parametrize(("seed", "size", "expected"), [
    (0, (256, 256), "8b778d1b86f1b0ac"), (1, None, "b92ac676cbbd7182"), (123456789, None, "6e78a3aade3692d6")])
def test_pixels_masks_and_keypoints_of_a_seed_are_pinned(seed, size, expected):
    assert digest(draw_figure(seed, size)) == expected
    assert digest(draw_figure(seed, size)) == expected


def test_other_seeds_give_other_pictures(pictures):
    assert len({digest(picture) for picture in pictures}) == len(pictures)


def test_image_alone_is_the_image_of_the_picture(pictures):
    for seed in (0, 3):
        assert draw_image(seed).tobytes() == pictures[seed].image.tobytes()


def test_size_and_number_of_figures_can_be_given():
    for number in (1, 2):
        picture = draw_figure(5, (200, 150), number)
        assert picture.image.size == (200, 150) and picture.image.mode == "RGB"
        assert picture.part_mask.shape == picture.object_mask.shape == (150, 200)
        assert {keypoint.figure for keypoint in picture.keypoints} == set(range(number))


def test_masks_are_consistent_and_every_class_occurs(pictures):
    parts, objects = set(), set()
    for picture in pictures:
        width, height = picture.image.size
        assert width in SIDES and height in SIDES
        for mask in (picture.part_mask, picture.object_mask):
            assert mask.dtype == np.uint8 and mask.shape == (height, width)
        assert ((picture.part_mask > 0) == (picture.object_mask > 0)).all()
        parts |= set(np.unique(picture.part_mask).tolist())
        objects |= set(np.unique(picture.object_mask).tolist())
    assert parts == set(range(len(PART_NAMES) + 1))
    assert objects == set(range(len(OBJECT_NAMES) + 1))


def winding(polygon, x, y) -> int:
    """How often a polygon turns round a point, by the angles its edges are seen under; the point is on no edge."""
    angles = [math.atan2(b - y, a - x) for a, b in polygon]
    turns = ((after - before + math.pi) % (2 * math.pi) - math.pi
             for before, after in zip(angles, angles[1:] + angles[:1], strict=True))
    return round(sum(turns) / (2 * math.pi))


def on_edge(polygon, x, y) -> bool:
    for (x0, y0), (x1, y1) in zip(polygon, polygon[1:] + polygon[:1], strict=True):
        length = max((x1 - x0) ** 2 + (y1 - y0) ** 2, 1e-12)
        share = min(1, max(0, ((x - x0) * (x1 - x0) + (y - y0) * (y1 - y0)) / length))
        if math.hypot(x0 + share * (x1 - x0) - x, y0 + share * (y1 - y0) - y) < 1e-6:
            return True
    return False


def to_subpixels(polygon):
    return [(round(8 * vertex.real) / 8, round(8 * vertex.imag) / 8) for vertex in polygon]


def test_fill_agrees_with_winding_numbers_of_pixel_centres():
    random = np.random.RandomState(0)
    size = (23, 17)
    # Stars that cross themselves and reach beyond the image.
    polygons = [[complex(*vertex) for vertex in random.uniform(-6, 28, (count, 2))] for count in (3, 4, 5, 7, 9, 12)]
    values = [3, 1, 4, 5, 9, 2]
    painted = fill(size, scan(size, polygons), values)
    rounded = [to_subpixels(polygon) for polygon in polygons]
    on = checked = 0
    for row in range(size[1]):
        for column in range(size[0]):
            centre = (column + 0.5, row + 0.5)
            if any(on_edge(polygon, *centre) for polygon in rounded):
                on += 1
                continue
            covering = [value for polygon, value in zip(rounded, values, strict=True) if winding(polygon, *centre)]
            assert painted[row, column] == (covering[-1] if covering else 0)
            checked += 1
    assert checked > 300 and on < 20


def test_polygons_that_share_an_edge_neither_overlap_nor_leave_a_gap():
    size = (40, 40)
    corners, centre = [3.3 + 2.1j, 36.7 + 5.4j, 33.9 + 37.2j, 5.2 + 35.5j], 17.3 + 21.9j
    triangles = [[corners[i], corners[i - 1], centre] for i in range(4)]
    times = sum(fill(size, scan(size, [triangle]), [1]).astype(int) for triangle in triangles)
    assert (times == fill(size, scan(size, [corners]), [1])).all()


def test_keypoints_lie_on_their_part_where_visible_and_under_something_where_not(pictures):
    visible = covered = outside = 0
    for seed, picture in enumerate(pictures):
        width, height = picture.image.size
        scene = compose(seed)
        assert scene.keypoints == picture.keypoints
        named = [index for index, shape in enumerate(scene.shapes) if shape.at is not None]
        for keypoint, index in zip(picture.keypoints, named, strict=True):
            x, y = keypoint.x, keypoint.y
            if not (0 <= x < width and 0 <= y < height):
                assert not keypoint.visible
                outside += 1
            elif keypoint.visible:
                assert picture.part_mask[y, x] == keypoint.part
                assert picture.object_mask[y, x] == scene.species[keypoint.figure]
                visible += 1
            else:
                centre = (x + 0.5, y + 0.5)
                later = [to_subpixels(outline(shape)) for shape in scene.shapes[index + 1:]]
                assert any(winding(polygon, *centre) or on_edge(polygon, *centre) for polygon in later)
                covered += 1
    assert visible > 200 and covered > 10 and outside > 2


def test_keypoints_have_the_part_of_their_name(pictures):
    tips = {"hand": {"hand", "wing", "fin"}, "knee": {"leg"}}
    found = set()
    for picture in pictures:
        for keypoint in picture.keypoints:
            assert PART_NAMES[keypoint.part - 1] in tips.get(keypoint.name, {keypoint.name})
            found.add(keypoint.name)
    assert found == set(KEYPOINT_NAMES)


def test_splits_have_no_picture_in_common():
    seeds = [set(image_seeds(split, 5000, seed)) for split in ("train", "test") for seed in (0, 1, 2)]
    assert sum(map(len, seeds)) == len(set.union(*seeds)) == 30000
    assert image_seeds("val") == image_seeds("test") and len(image_seeds("train")) == NUM_IMAGES["train"]


def test_patches_follow_the_published_rule():
    dataset = load_synthetic_patches("train", 40)
    assert dataset.classes == list(DEFAULT_KEYPOINTS)
    expected = []
    for seed in image_seeds("train", 40):
        points = [(k.x, k.y, k.name) for k in compose(seed).keypoints if k.visible and k.name in DEFAULT_KEYPOINTS]
        for x, y, name in points:
            distance = min((math.hypot(x - a, y - b) for a, b, _ in points if (a, b) != (x, y)), default=0)
            if 20 < distance / 2 < 1000:
                half = round(distance / 4)
                expected.append((seed, (x - half, y - half, x + half, y + half), DEFAULT_KEYPOINTS.index(name)))
    got = [(entry.path, box, label) for entry in dataset.images
           for box, label in zip(entry.boxes, entry.labels, strict=True)]
    assert got == expected and len(got) > 100


def test_patches_are_the_same_from_workers_and_after_pickling():
    dataset = load_synthetic_patches("test", 8, keypoints=("eye", "tail"))
    copy = pickle.loads(pickle.dumps(dataset))
    indices = range(len(dataset))
    for ours, others in zip(dataset.batches(indices, 5, 0), copy.batches(indices, 5, 1), strict=True):
        assert torch.equal(ours[0], others[0]) and torch.equal(ours[1], others[1])
    assert ours[0].shape[1:] == (3, 224, 224) and set(dataset.labels.tolist()) == {0, 1}


def test_unknown_keypoint_is_one_line():
    with pytest.raises(UserError, match="keypoint nose is not in the synthetic figures; choose from 1 eye, 2 hand"):
        load_synthetic_patches("train", 4, keypoints=("eye", "nose"))
    assert load_synthetic_patches("train", 4, keypoints=("1", "tail")).classes == ["eye", "tail"]


def test_species_are_whole_pictures_of_one_figure():
    dataset = load_synthetic_species("train", 40, transform=pil_to_tensor)
    assert dataset.classes == list(OBJECT_NAMES) and set(dataset.labels.tolist()) == set(range(len(OBJECT_NAMES)))
    for index in range(3):
        patches, _ = dataset[index]
        picture = draw_figure(dataset.images[index].path, num_figures=1)
        assert torch.equal(patches[0], pil_to_tensor(picture.image))
        assert set(np.unique(picture.object_mask)) == {0, int(dataset.labels[index]) + 1}


def test_segmentation_gives_either_mask_of_the_same_picture():
    picture = draw_figure(image_seeds("val")[3])
    for kind, mask in (("object", picture.object_mask), ("part", picture.part_mask)):
        image, label = synthetic_segmentation(3, "val", kind)
        assert image.tobytes() == picture.image.tobytes() and (label == mask).all()
    assert synthetic_segmentation(3, "train")[0].tobytes() != picture.image.tobytes()
    assert synthetic_segmentation(3, "val", seed=1)[0].tobytes() != picture.image.tobytes()


def gradient_histograms(patches: np.ndarray) -> np.ndarray:
    """[n, 3, 32, 32] -> [n, 128]: orientation of gradients, 8 bins without sign, in 4 x 4 cells; unit length."""
    dy, dx = np.gradient(patches.mean(1), axis=(1, 2))
    bins = (np.arctan2(dy, dx) % np.pi / np.pi * 8).astype(int) % 8
    cells = [(np.hypot(dx, dy) * (bins == one)).reshape(-1, 4, 8, 4, 8).sum((2, 4)) for one in range(8)]
    features = np.stack(cells, -1).reshape(len(patches), -1)
    return features / (np.linalg.norm(features, axis=1, keepdims=True) + 1e-6)


def test_parts_are_learned_from_shape_and_not_from_colour():
    def patches(split, count):
        dataset = load_synthetic_patches(
            split, count, transform=lambda patch: pil_to_tensor(patch.resize((32, 32), Image.BILINEAR)))
        return torch.cat([dataset[index][0] for index in range(len(dataset))]).numpy() / 255.0, dataset.labels.numpy()

    train, labels = patches("train", 160)
    test, truth = patches("test", 80)

    def accuracy(classifier, feature):
        return balanced_accuracy_score(truth, classifier.fit(feature(train), labels).predict(feature(test)))
    colour = accuracy(KNeighborsClassifier(1), lambda x: x.mean((2, 3)))
    shape = accuracy(make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=500)), gradient_histograms)
    print(f"balanced accuracy of 4 classes: mean colour {colour:.3f}, gradient histograms {shape:.3f}")
    assert 0.2 < colour < 0.36
    assert 0.5 < shape < 0.85
