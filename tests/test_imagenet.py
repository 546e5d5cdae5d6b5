"""Image folders against torchvision's ImageFolder, and the grid of the picture sheets against plain Pillow."""

import itertools

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.transforms import InterpolationMode

from datasets.classification import open_classification
from datasets.imagenet import load_image_folder
from datasets.patches import resize_center_crop
from datasets.sheets import GRID_BOXES, grid_patches, list_images, load_grid, overlap, patch_block, write_sheets
from utils import UserError


def noise(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture
def root(tmp_path):
    for seed, name in enumerate(["val/n02/b.JPEG", "val/n02/a.JPEG", "val/n01/deep/z.JPEG", "val/n01/y.png"]):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        noise(300 + seed, 260, seed).save(path)
    (tmp_path / "val/n01/notes.txt").write_text("not an image")
    return tmp_path


def test_equals_torchvision_image_folder(root):
    """Same classes, same order, same values as the published test transform."""
    theirs = ImageFolder(root / "val", transforms.Compose([
        transforms.Resize(256, InterpolationMode.BICUBIC), transforms.CenterCrop(224), transforms.ToTensor()]))
    ours = load_image_folder(root, "val", resize_center_crop())
    assert ours.classes == theirs.classes == ["n01", "n02"]
    assert ours.labels.tolist() == theirs.targets
    assert [image.path for image in ours.images] == [path for path, _ in theirs.samples]
    patches, ids = next(ours.batches(range(len(ours)), 10, 0))
    assert ids.tolist() == [0, 1, 2, 3]
    assert torch.equal(patches.float() / 255, torch.stack([image for image, _ in theirs]))


def test_folders_without_images_are_one_line(root):
    with pytest.raises(UserError, match="train has no class folders; --data-path must be a folder with train/CLASS/"):
        load_image_folder(root, "train", None)
    (root / "val/n00").mkdir()
    with pytest.raises(UserError, match="val/n00 holds no image; fill or remove it"):
        load_image_folder(root, "val", None)
    with pytest.raises(UserError, match="no image .* below .*n00; --data-path"):
        load_grid(root / "val/n00")


def test_list_images(root):
    names = ["n01/deep/z.JPEG", "n01/y.png", "n02/a.JPEG", "n02/b.JPEG"]
    assert list_images(root / "val")[0] == [str(root / "val" / name) for name in names]
    (root / "linked").mkdir()
    (root / "linked/n02").symlink_to(root / "val/n02")
    assert list_images(root / "linked")[0] == [str(root / "linked/n02/a.JPEG"), str(root / "linked/n02/b.JPEG")]


def test_hidden_files_are_no_images_and_others_are_counted(root):
    """What editors, macOS and unpackers leave behind makes neither a class nor an image."""
    before = load_image_folder(root, "val", resize_center_crop())
    for name in (".ipynb_checkpoints/a.png", "__MACOSX/n01/a.png", "n01/._y.png", "n02/.cache/b.png", "n02/a.avif",
                 "readme.txt"):
        (root / "val" / name).parent.mkdir(parents=True, exist_ok=True)
        noise(30, 30).save(root / "val" / name, "png")
    dataset = load_image_folder(root, "val", resize_center_crop())
    assert dataset.classes == ["n01", "n02"] and dataset.images == before.images
    assert [note.split(" (")[0] for note in before.notes + dataset.notes] == ["1 files were not read",
                                                                             "3 files were not read"]
    assert dataset.notes[0].endswith(f"the first {root / 'val/n01/notes.txt'}")
    paths, notes = list_images(root / "val")
    assert set(paths) == {image.path for image in before.images}
    assert notes[0].startswith("3 files") and load_grid(root / "val").notes == notes


def test_a_sample_of_images_is_sorted_and_drawn_by_the_seed(root):
    everything, _ = list_images(root / "val")
    samples = [tuple(list_images(root / "val", 2, seed)[0]) for seed in range(60)]
    assert set(samples) == set(itertools.combinations(everything, 2))
    assert [image.path for image in load_grid(root / "val", num_images=2, seed=7).images] == list(samples[7])
    assert list_images(root / "val", 4, 3)[0] == list_images(root / "val", 9, 3)[0] == everything


def test_samples_for_classification_have_the_classes_of_the_training_sample(tmp_path):
    """Ten classes, a sample of three training images: test images are of their classes."""
    for split, count in (("train", 3), ("val", 2)):
        for label, number in itertools.product(range(10), range(count)):
            path = tmp_path / split / f"n{label}" / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            noise(20, 20, label).save(path)
    train, test = open_classification("imagenet", tmp_path, num_images=3, seed=1)
    known = {train.classes[label] for label in train.labels}
    assert len(train) == 3 and {test.classes[label] for label in test.labels} <= known
    assert len(test) == min(3, 2 * len(known))
    again, _ = open_classification("imagenet", tmp_path, num_images=3, seed=1)
    other, _ = open_classification("imagenet", tmp_path, num_images=3, seed=2)
    assert again.images == train.images != other.images
    assert [len(part) for part in open_classification("imagenet", tmp_path, num_images=99)] == [30, 20]


def slow_grid(image):
    """The published grid, window by window."""
    scale = 256 / min(image.size)
    width, height = (256 if side == min(image.size) else int(side * scale) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, upper = round((width - 224) / 2), round((height - 224) / 2)
    image = image.crop((left, upper, left + 224, upper + 224)).resize((896, 896), Image.Resampling.BICUBIC)
    windows = [image.crop((x, y, x + 224, y + 224)) for y in range(0, 673, 112) for x in range(0, 673, 112)]
    return np.stack([np.asarray(window) for window in windows]).transpose(0, 3, 1, 2)


@pytest.mark.parametrize("size", [(500, 375), (333, 500), (256, 256), (100, 80)])
def test_grid_patches_equal_the_slow_grid(size):
    image = noise(*size)
    patches = grid_patches(image)
    assert patches.shape == (49, 3, 224, 224) and patches.dtype == torch.uint8 and patches.is_contiguous()
    assert np.array_equal(patches.numpy(), slow_grid(image))


def test_grid_boxes_are_where_the_patches_come_from():
    """A bright box of the 224 image fills exactly its own patch; 56 x 56 at stride 28 covers the image."""
    assert len(set(GRID_BOXES)) == 49
    assert all(right - left == lower - upper == 56 for left, upper, right, lower in GRID_BOXES)
    assert sorted({left for left, *_ in GRID_BOXES}) == sorted({upper for _, upper, *_ in GRID_BOXES})
    assert sorted({left for left, *_ in GRID_BOXES}) == [0, 28, 56, 84, 112, 140, 168]
    for index in (0, 10, 24, 48):
        # At 256 x 256 nothing is resized before the central crop, which starts at 16.
        left, upper, right, lower = (corner + 16 for corner in GRID_BOXES[index])
        image = Image.new("RGB", (256, 256))
        image.paste((255, 255, 255), (left, upper, right, lower))
        means = grid_patches(image).float().mean((1, 2, 3))
        assert means.argmax() == index and means[index] > 250 and (means > 250).sum() == 1


def test_overlap_is_shared_pixels_of_one_image():
    covers = np.zeros((49, 224, 224), bool)
    for position, (left, upper, right, lower) in enumerate(GRID_BOXES):
        covers[position, upper:lower, left:right] = True
    shared = np.einsum("aij,bij->ab", covers.astype(np.float32), covers.astype(np.float32)) > 0
    found = [[overlap(3 * 49 + a, 3 * 49 + b) for b in range(49)] for a in range(49)]
    assert (np.array(found) == shared).all()
    assert not any(overlap(3 * 49 + a, 2 * 49 + a) for a in range(49))


def test_patches_in_rows_of_six_are_framed_in_orange_where_they_overlap_the_query(tmp_path):
    noise(500, 375).save(tmp_path / "a.png")
    noise(400, 300).save(tmp_path / "b.png")
    block = patch_block([tmp_path / "a.png", tmp_path / "b.png"], [10, 48, 49 + 10, 11, 0, 9, 3, 2], 10)
    assert block.shape == (240, 720, 3) and (block[120:, 240:] == 255).all()
    whole = Image.open(tmp_path / "a.png").resize((int(512 * 500 / 375), 512), Image.Resampling.BICUBIC)
    left, upper = round((whole.width - 448) / 2) + 2 * 84, round((512 - 448) / 2) + 2 * 28
    assert (block[4:116, 4:116] == np.asarray(whole.crop((left, upper, left + 112, upper + 112)))).all()
    for number, overlaps in enumerate((True, False, False, True, False, True, True, True)):
        tile = block[number // 6 * 120:, number % 6 * 120:][:120, :120]
        assert (tile[[0, 3, -1]] == ((255, 140, 0) if overlaps else 255)).all()


def test_a_grid_of_images(root):
    dataset = load_grid(root / "val")
    assert [image.path for image in dataset.images] == list_images(root / "val")[0]
    assert dataset.num_patches == 4 * 49 and dataset.images[0].boxes is GRID_BOXES
    patches, ids = dataset[1]
    assert ids.tolist() == list(range(49, 98))
    assert np.array_equal(patches.numpy(), slow_grid(Image.open(dataset.images[1].path)))


@pytest.mark.parametrize("other_images", [False, True])
def test_a_sheet_for_every_query(root, figures, other_images):
    dataset = load_grid(root / "val")
    generator = torch.Generator().manual_seed(0)
    sources = [{"features": {"cls": torch.randn(dataset.num_patches, 8, generator=generator)}, "paths":
                [image.path for image in dataset.images], "line": {"name": f"a ${name}", "weights": name}}
               for name in ("official", "random")]
    options = {"top": 7, "seed": 3, "other_images": other_images, "folder": root}
    assert write_sheets(sources, ["a.JPEG:7", "y.png:48"], 5, **options) == ["sheet_000_a_7.png", "sheet_001_y_48.png"]
    drawn = write_sheets(sources, [], 5, **options)
    assert len(set(drawn)) == 5 and drawn == write_sheets(sources, [], 5, **options)
    titles = [[text.get_text() for text in axes.texts if text.get_text()] for axes in figures[0].axes]
    assert titles == [["query"], ["a $official: cls"], ["query"] + ["orange:\noverlaps it"] * (not other_images),
                      ["a $random (random weights): cls"]]
    # The query's box in its image, and below it its patch, enlarged.
    assert figures[0].axes[2].lines[0].get_xydata().tolist() == [[0, 28], [56, 28], [56, 84], [0, 84], [0, 28]]
    image = figures[0].axes[2].images[0].get_array().astype(int)
    assert abs(image[224:].reshape(56, 4, 56, 4, 3).mean((1, 3)) - image[28:84, :56]).mean() < 10
    pdf, = write_sheets(sources, ["a.JPEG:7"], 5, **options, suffix="pdf")
    assert (root / pdf).read_bytes().startswith(b"%PDF")
    if other_images:
        lonely = [sources[0] | {"paths": sources[0]["paths"][:1]}]
        with pytest.raises(UserError, match="two images"):
            write_sheets(lonely, [], 5, **options)
