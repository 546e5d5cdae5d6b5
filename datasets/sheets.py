"""Picture sheets: query patches of images and the patches most similar to them (paper, figures 2, 4, 7 and 8)."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from utils import UserError
from utils.distributed import gather_rows, is_main
from utils.drawing import image_rows

from .files import read_rgb
from .imagenet import IMG_EXTENSIONS, image_files, notes_of
from .patches import PatchDataset, PatchImage, draw_numbers

# Boxes (left, upper, right, lower) of the grid in the 224 x 224 image, row by row: 56 x 56, stride 28.
GRID_BOXES = tuple((x, y, x + 56, y + 56) for y in range(0, 169, 28) for x in range(0, 169, 28))


def central(image: Image.Image, scale: int = 1) -> Image.Image:
    """The 224 x 224 image that GRID_BOXES divides: short side 256, bicubic, central crop; both times scale."""
    from torchvision import transforms
    return transforms.CenterCrop(224 * scale)(transforms.Resize(256 * scale, Image.BICUBIC)(image))


def grid_patches(image: Image.Image, size: int = 224) -> torch.Tensor:
    """The 49 patches of the paper's sheets (appendix A.5): the central image enlarged to 4 x size (bicubic, by Pillow),
    in windows of size with stride size / 2.

    image: PIL, RGB. size: even. Returns uint8 [49, 3, size, size], in the order of GRID_BOXES.
    """
    image = central(image).resize((4 * size, 4 * size), Image.BICUBIC)
    windows = torch.from_numpy(np.array(image)).unfold(0, size, size // 2).unfold(1, size, size // 2)
    return windows.reshape(49, 3, size, size)


def list_images(folder: str | Path, num_images: int | None = None, seed: int = 0) -> tuple[list[str], list[str]]:
    """The sorted paths of the image files below a folder, at any depth, and notes for the log; with num_images, a
    sample drawn by the seed. Raises UserError where there is no image."""
    images, others = image_files(folder)
    if not images:
        raise UserError(f"no image ({', '.join(IMG_EXTENSIONS)}) below {folder}; --data-path must be a folder of "
                        "images")
    images.sort()
    chosen = [images[number] for number in draw_numbers(len(images), num_images, seed)]
    return chosen, notes_of(others, "another suffix")


class GridDataset(PatchDataset):
    """Images cut into their grid patches; the boxes are GRID_BOXES, in the 224 x 224 image, not in the original."""

    def cut(self, image: Image.Image, boxes: Sequence[tuple] | None) -> torch.Tensor:
        return grid_patches(image, self.image_size)


def load_grid(root: str | Path, num_images: int | None = None, seed: int = 0, image_size: int = 224) -> GridDataset:
    """The grid patches of the images that list_images gives, all of one class. Raises UserError where there is none."""
    paths, notes = list_images(root, num_images, seed)
    labels = [0] * len(GRID_BOXES)
    dataset = GridDataset([PatchImage(path, GRID_BOXES, labels) for path in paths], ["patch"])
    dataset.image_size, dataset.notes = image_size, notes
    return dataset


def nearest_patches(features: torch.Tensor, queries: torch.Tensor, top: int, leave_out: int = 1) -> torch.Tensor:
    """Rows of features [N, D] most similar to those of queries [Q], most similar first: [Q, top], fewer where there
    are fewer. leave_out: 1 leaves the query itself out, the number of patches in an image all that are of its image."""
    features, images = torch.nn.functional.normalize(features, dim=1), torch.arange(len(features)) // leave_out
    same = (images == images[queries, None]).to(features.device)
    similarity = (features[queries] @ features.T).masked_fill_(same, float("-inf"))
    return similarity.topk(min(top, len(features)), dim=1).indices[:, :len(features) - leave_out]


def find_query(text: str, paths: Sequence[str]) -> int:
    """PATH:POSITION -> the patch's id. Raises UserError."""
    path, _, position = text.rpartition(":")
    matches = [index for index, candidate in enumerate(paths) if path and Path(candidate).match(path)]
    if len(matches) != 1 or not position.isdecimal() or int(position) >= len(GRID_BOXES):
        raise UserError(f"--query {text}: {len(matches)} images match; give PATH:POSITION, PATH the end of one image's "
                        f"path and POSITION 0 to {len(GRID_BOXES) - 1}, row by row")
    return matches[0] * len(GRID_BOXES) + int(position)


def write_sheets(sources: Sequence[dict], chosen: Sequence[str], num_queries: int, top: int, seed: int,
                 other_images: bool, folder: Path, suffix: str = "png") -> list[str]:
    """Writes a sheet per query, PNG or PDF by the suffix, with a row for each source: the query in its image and
    enlarged, then a block of patches for each feature. Returns the files' names.

    sources: one for each model, {"features": {name: [n, D], this process's share of the patches in their order},
    "paths": of the images, "line": with "name" and "weights" of the model}. chosen: queries as PATH:POSITION, PATH the
    end of an image's path, POSITION 0 to 48 in the 7 x 7 grid, row by row; where there are none, num_queries are drawn
    by the seed. top: patches shown. other_images: patches of the query's own image are left out; else those that
    overlap the query are marked. Raises UserError for a query that no image has.
    """
    paths, per_image = sources[0]["paths"], len(GRID_BOXES)
    leave_out = per_image if other_images else 1
    if other_images and len(paths) < 2:
        raise UserError("--other-images needs two images at least")
    drawn = torch.randperm(len(paths) * per_image, generator=torch.Generator().manual_seed(seed))[:num_queries]
    queries = torch.tensor([find_query(text, paths) for text in chosen]) if chosen else drawn
    found = []
    for source in sources:
        model = source["line"]["name"] + " (random weights)" * (source["line"]["weights"] == "random")
        # Seven letters are as wide as a patch.
        found.append({textwrap.fill(f"{model}: {name}", 7 * min(top, 6)): nearest_patches(
            gather_rows(rows), queries, top, leave_out) for name, rows in source["features"].items()})
    files = []
    for number, query in enumerate(queries.tolist() if is_main() else []):
        path, position = paths[query // per_image], query % per_image
        left, upper, right, lower = GRID_BOXES[position]
        image, large = (np.asarray(central(read_rgb(path), scale)) for scale in (1, 4))
        shown = np.vstack([image, large[4 * upper:4 * lower, 4 * left:4 * right]])
        rows = [[("query", shown), *((title, patch_block(paths, nearest[number].tolist(), query))
                                     for title, nearest in of_model.items())] for of_model in found]
        files.append(f"sheet_{number:03}_{Path(path).stem}_{position}.{suffix}")
        with image_rows(folder / files[-1], rows) as axes:
            for one in axes[:, 0]:
                one.plot([left, right, right, left, left], [upper, upper, lower, lower, upper], color="red")
            if not other_images:
                axes[-1, 0].text(0, len(shown) + 8, "orange:\noverlaps it", color="darkorange", va="top")
    return files


def overlap(patch: int, query: int) -> bool:
    """Whether two grid patches, numbered image by image, share pixels."""
    (x, y, *_), (query_x, query_y, *_) = (GRID_BOXES[number % len(GRID_BOXES)] for number in (patch, query))
    return patch // len(GRID_BOXES) == query // len(GRID_BOXES) and abs(x - query_x) < 56 and abs(y - query_y) < 56


def patch_block(paths: Sequence[str], patches: Sequence[int], query: int) -> np.ndarray:
    """Grid patches, numbered image by image, in rows of six, 112 x 112 in frames of 4 pixels, orange where a patch
    overlaps the query, else white: uint8 [H, W, 3]."""
    from torchvision.utils import make_grid

    framed = []
    for patch in patches:
        image = central(read_rgb(paths[patch // len(GRID_BOXES)]), 2)
        shown = image.crop([2 * side for side in GRID_BOXES[patch % len(GRID_BOXES)]])
        framed.append(ImageOps.expand(shown, 4, "darkorange" if overlap(patch, query) else "white"))
    tiles = torch.from_numpy(np.stack(framed)).permute(0, 3, 1, 2)
    return make_grid(tiles, nrow=6, padding=0, pad_value=255).permute(1, 2, 0).numpy()
