"""Picture sheets: query patches of images and the patches most similar to them (paper, figures 2, 4, 7 and 8)."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from utils import UserError
from utils.distributed import all_reduce, gather_rows, is_main, rank
from utils.storage import atomic_write

from .files import read_rgb
from .imagenet import IMG_EXTENSIONS, image_files, notes_of
from .patches import PatchDataset, PatchImage, draw_numbers

# Boxes (left, upper, right, lower) of the grid in the 224 x 224 image, row by row: 56 x 56, stride 28.
GRID_BOXES = tuple((x, y, x + 56, y + 56) for y in range(0, 169, 28) for x in range(0, 169, 28))
# In pixels.
CELL, GAP, MARGIN, TITLE = 96, 4, 16, 24
MARK = (255, 140, 0)


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

    def __init__(self, paths: Sequence[str], image_size: int):
        labels = [0] * len(GRID_BOXES)
        super().__init__([PatchImage(path, GRID_BOXES, labels) for path in paths], ["patch"])
        self.image_size = image_size

    def cut(self, image: Image.Image, boxes: Sequence[tuple] | None) -> torch.Tensor:
        return grid_patches(image, self.image_size)


def load_grid(root: str | Path, num_images: int | None = None, seed: int = 0, image_size: int = 224) -> GridDataset:
    """The grid patches of the images that list_images gives, all of one class. Raises UserError where there is none."""
    paths, notes = list_images(root, num_images, seed)
    dataset = GridDataset(paths, image_size)
    dataset.notes = notes
    return dataset


def nearest_patches(features: torch.Tensor, ids: torch.Tensor, queries: torch.Tensor, top: int,
                    leave_out: int = 1) -> torch.Tensor:
    """Ids of the `top` patches most similar to each query, most similar first: [Q, top], fewer where there are fewer.

    features [n, D] and ids [n] are this process's share; queries [Q] are ids, each in one process's share. leave_out:
    1 leaves the query itself out, the number of patches in an image all that are of its image.
    """
    normalized = torch.nn.functional.normalize(features, dim=1)
    ids, queries = ids.to(features.device), queries.to(features.device)
    mine = ids[None] == queries[:, None]
    # Every query's row stands in one process: zeros elsewhere, so the sum is that row.
    own = normalized[mine.int().argmax(1)] if len(ids) else features.new_zeros(len(queries), features.shape[1])
    wanted = all_reduce(torch.where(mine.any(1, keepdim=True), own, 0.0))
    left_out = ids[None] // leave_out == queries[:, None] // leave_out
    best = (wanted @ normalized.T).masked_fill_(left_out, float("-inf")).topk(min(top, len(ids)), dim=1)
    values = gather_rows(best.values.T.contiguous()).T
    candidates = gather_rows(ids[best.indices].T.contiguous()).T
    values, order = values.sort(dim=1, descending=True, stable=True)
    # Every query leaves out as many.
    return candidates.gather(1, order)[:, :min(top, int((values[0] > float("-inf")).sum()))]


def find_query(text: str, paths: Sequence[str]) -> int:
    """PATH:POSITION -> the patch's id. Raises UserError."""
    path, _, position = text.rpartition(":")
    matches = [index for index, candidate in enumerate(paths) if path and Path(candidate).match(path)]
    if len(matches) != 1 or not position.isdecimal() or int(position) >= len(GRID_BOXES):
        raise UserError(f"--query {text}: {len(matches)} images match; give PATH:POSITION, PATH the end of one image's "
                        f"path and POSITION 0 to {len(GRID_BOXES) - 1}, row by row")
    return matches[0] * len(GRID_BOXES) + int(position)


def write_sheets(sources: Sequence[dict], chosen: Sequence[str], num_queries: int, top: int, columns: int, seed: int,
                 other_images: bool, folder: Path, suffix: str = "png") -> list[str]:
    """Writes a sheet per query, a row of blocks for each source in it, PNG or PDF by the suffix; returns the files'
    names.

    sources: one for each model, {"features": {name: [n, D], this process's share of the patches in their order},
    "paths": of the images, "line": with "name" and "weights" of the model}. chosen: queries as PATH:POSITION, PATH the
    end of an image's path, POSITION 0 to 48 in the 7 x 7 grid, row by row; where there are none, num_queries are drawn
    by the seed. top: patches shown, in rows of `columns`. other_images: patches of the query's own image are left out;
    else those that overlap the query are marked. Raises UserError for a query that no image has.
    """
    paths, per_image = sources[0]["paths"], len(GRID_BOXES)
    if other_images and len(paths) < 2:
        raise UserError("--other-images needs two images at least")
    queries = [find_query(text, paths) for text in chosen]
    if not queries:
        drawn = torch.randperm(len(paths) * per_image, generator=torch.Generator().manual_seed(seed))
        queries = drawn[:num_queries].tolist()
    found = []
    for source in sources:
        count = torch.tensor([len(next(iter(source["features"].values())))])
        first = int(gather_rows(count)[:rank()].sum())
        ids = torch.arange(first, first + int(count))
        found.append({name: nearest_patches(rows, ids, torch.tensor(queries), top, per_image if other_images else 1)
                      for name, rows in source["features"].items()})
    files = []
    for number, query in enumerate(queries if is_main() else []):
        path, position = paths[query // per_image], query % per_image
        rows = []
        for source, nearest in zip(sources, found, strict=True):
            model = source["line"]["name"] + " (random weights)" * (source["line"]["weights"] == "random")
            rows.append([])
            for feature, patches in nearest.items():
                shown = [(shown_patch(paths[patch // per_image], patch % per_image), overlap(patch, query))
                         for patch in patches[number].tolist()]
                rows[-1].append((f"{model}: {feature}", shown))
        files.append(f"sheet_{number:03}_{Path(path).stem}_{position}.{suffix}")
        draw_sheet(folder / files[-1], query_image(path, position), rows, columns)
    return files


def overlap(patch: int, query: int) -> bool:
    """Whether two grid patches, numbered image by image, share pixels."""
    (x, y, *_), (query_x, query_y, *_) = (GRID_BOXES[number % len(GRID_BOXES)] for number in (patch, query))
    return patch // len(GRID_BOXES) == query // len(GRID_BOXES) and abs(x - query_x) < 56 and abs(y - query_y) < 56


def shown_patch(path: str, position: int) -> Image.Image:
    """A grid patch at twice the grid's resolution, 112 x 112."""
    return central(read_rgb(path), 2).crop([2 * side for side in GRID_BOXES[position]])


def query_image(path: str, position: int) -> Image.Image:
    """The query's image, with a red box around its patch, and beside it the patch, enlarged to the same height."""
    image, patch = central(read_rgb(path)), shown_patch(path, position)
    left, upper, right, lower = GRID_BOXES[position]
    ImageDraw.Draw(image).rectangle((left, upper, right - 1, lower - 1), outline=(255, 0, 0), width=3)
    both = Image.new("RGB", (452, 224), "white")
    both.paste(image, (0, 0))
    both.paste(patch.resize((224, 224), Image.Resampling.BICUBIC), (228, 0))
    return both


def draw_sheet(path: Path, query: Image.Image, rows: Sequence[Sequence[tuple[str, list]]], columns: int = 6) -> None:
    """Writes a PNG or PDF, by the suffix of path: the query image on the left, then a row for each model, in it a block
    of patches for each feature: (title, [(patch, whether it overlaps the query), ...]). columns: of patches in a block.
    """
    blocks = [block for row in rows for block in row]
    font = ImageFont.load_default(14)
    deep = math.ceil(max(len(patches) for _, patches in blocks) / columns)
    block_height = TITLE + deep * (CELL + GAP) - GAP
    block_width = max(columns * (CELL + GAP) - GAP, *(math.ceil(font.getlength(title)) for title, _ in blocks))
    left = MARGIN + query.width + 2 * MARGIN
    size = (left + max(map(len, rows)) * (block_width + 2 * MARGIN) - MARGIN,
            MARGIN + max(len(rows) * (block_height + MARGIN), 2 * TITLE + query.height + MARGIN))
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, MARGIN), "query", fill="black", font=font)
    sheet.paste(query, (MARGIN, MARGIN + TITLE))
    if any(overlaps for _, patches in blocks for _, overlaps in patches):
        draw.text((MARGIN, MARGIN + TITLE + query.height + GAP), "orange: overlaps the query", fill=MARK, font=font)
    for row, of_row in enumerate(rows):
        top = MARGIN + row * (block_height + MARGIN)
        for block, (title, patches) in enumerate(of_row):
            x = left + block * (block_width + 2 * MARGIN)
            draw.text((x, top), title, fill="black", font=font)
            for number, (patch, overlaps) in enumerate(patches):
                cell = (x + number % columns * (CELL + GAP), top + TITLE + number // columns * (CELL + GAP))
                sheet.paste(patch.resize((CELL, CELL), Image.Resampling.BICUBIC), cell)
                if overlaps:
                    draw.rectangle((*cell, cell[0] + CELL - 1, cell[1] + CELL - 1), outline=MARK, width=4)
    atomic_write(path, lambda temporary: sheet.save(temporary, path.suffix[1:]))
