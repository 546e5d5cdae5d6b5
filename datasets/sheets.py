"""Picture sheets of part retrieval: a query patch boxed in its image, and the patches nearest to it.

Paper, figures 2, 4, 7 and 8. The patches are those of datasets/imagenet.py: 49 of every image, on a grid.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torchvision.datasets.folder import pil_loader
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

from utils import UserError
from utils.distributed import all_reduce, gather_rows, is_main
from utils.storage import atomic_write

from .imagenet import GRID_BOXES

CELL, GAP, MARGIN, TITLE = 64, 4, 16, 24


def shown_image(path: str) -> Image.Image:
    """The 224 x 224 image whose grid GRID_BOXES divides: short side 256, bicubic, central crop."""
    return F.center_crop(F.resize(pil_loader(path), 256, InterpolationMode.BICUBIC), 224)


def shown_patch(path: str, position: int) -> Image.Image:
    """A grid patch at the size of a cell."""
    return shown_image(path).crop(GRID_BOXES[position]).resize((CELL, CELL), Image.Resampling.BICUBIC)


def query_image(path: str, position: int) -> Image.Image:
    """The query's image with a red box around its patch."""
    image = shown_image(path)
    left, upper, right, lower = GRID_BOXES[position]
    ImageDraw.Draw(image).rectangle((left, upper, right - 1, lower - 1), outline=(255, 0, 0), width=3)
    return image


def text_font(size: int = 14) -> ImageFont.ImageFont:
    return ImageFont.load_default(size)


def draw_sheet(query: Image.Image, rows: Sequence[tuple[str, Sequence[tuple[str, Sequence[Image.Image]]]]],
               columns: int = 6) -> Image.Image:
    """One sheet: the query image on the left, then a row for each model and in it a block of patches for each feature.

    rows: (model, [(feature, patches in order), ...]). columns: patches side by side in a block.
    """
    deep = max(-(-len(patches) // columns) for _, blocks in rows for _, patches in blocks)
    block_width, block_height = columns * (CELL + GAP) - GAP, TITLE + deep * (CELL + GAP) - GAP
    across = max(len(blocks) for _, blocks in rows)
    left = MARGIN + query.width + 2 * MARGIN
    size = (left + across * (block_width + 2 * MARGIN) - MARGIN,
            MARGIN + max(len(rows) * (block_height + MARGIN), TITLE + query.height + MARGIN))
    sheet = Image.new("RGB", size, (255, 255, 255))
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, MARGIN), "query", fill=(0, 0, 0), font=text_font())
    sheet.paste(query, (MARGIN, MARGIN + TITLE))
    for row, (model, blocks) in enumerate(rows):
        top = MARGIN + row * (block_height + MARGIN)
        for block, (feature, patches) in enumerate(blocks):
            x = left + block * (block_width + 2 * MARGIN)
            draw.text((x, top), f"{model}: {feature}", fill=(0, 0, 0), font=text_font())
            for number, patch in enumerate(patches):
                cell = (x + number % columns * (CELL + GAP), top + TITLE + number // columns * (CELL + GAP))
                sheet.paste(patch, cell)
    return sheet


def nearest_patches(features: torch.Tensor, ids: torch.Tensor, queries: torch.Tensor, top: int) -> torch.Tensor:
    """Ids of the `top` patches most similar to each query, most similar first, the query itself left out: [Q, top].

    features [n, D] and ids [n] are this process's share; queries [Q] are ids, each in one process's share.
    """
    normalized = torch.nn.functional.normalize(features, dim=1)
    ids, queries = ids.to(features.device), queries.to(features.device)
    mine = ids[None] == queries[:, None]
    # Every query's row stands in one process: zeros elsewhere, so the sum is that row.
    wanted = all_reduce(torch.where(mine.any(1, keepdim=True), normalized[mine.int().argmax(1)]
                                            if len(ids) else features.new_zeros(len(queries), features.shape[1]), 0.0))
    similarity = (wanted @ normalized.T).masked_fill_(mine, float("-inf"))
    best = similarity.topk(min(top + 1, len(ids)), dim=1)
    values = gather_rows(best.values.T.contiguous()).T
    candidates = gather_rows(ids[best.indices].T.contiguous()).T
    order = values.sort(dim=1, descending=True, stable=True).indices[:, :top]
    return candidates.gather(1, order)


def find_query(text: str, paths: Sequence[str]) -> int:
    """PATH:POSITION -> the patch's id. Raises UserError."""
    path, _, position = text.rpartition(":")
    matches = [index for index, candidate in enumerate(paths) if path and Path(candidate).match(path)]
    if len(matches) != 1 or not position.isdigit() or int(position) >= len(GRID_BOXES):
        raise UserError(f"--query {text}: {len(matches)} images match; give PATH:POSITION, PATH the end of one image's "
                        f"path and POSITION 0 to {len(GRID_BOXES) - 1}, row by row")
    return matches[0] * len(GRID_BOXES) + int(position)


def write_sheets(sources: Sequence[dict], chosen: Sequence[str], num_queries: int, top: int, columns: int, seed: int,
                folder: Path, device: torch.device) -> list[str]:
    """Writes a sheet per query, a row of blocks for each source in it; returns the files' names.

    chosen: queries as PATH:POSITION, PATH the end of an image's path, POSITION 0 to 48 in the 7 x 7 grid, row by row.
    """
    paths = sources[0]["paths"]
    if any(source["paths"] != paths for source in sources):
        raise UserError("the feature files are of different images; write them with one --data-path and --num-images")
    per_image = len(GRID_BOXES)
    ids = gather_rows(sources[0]["ids"].to(device)).cpu()
    queries = [find_query(text, paths) for text in chosen]
    if not queries:
        drawn = torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))[:num_queries]
        queries = ids[drawn].tolist()
    absent = [query for query in queries if query not in set(ids.tolist())]
    if absent:
        raise UserError(f"{paths[absent[0] // per_image]} could not be decoded, so it cannot be a query")
    found = [{name: nearest_patches(rows.to(device), source["ids"], torch.tensor(queries), top).cpu().tolist()
              for name, rows in source["features"].items()} for source in sources]
    files = []
    for number, query in enumerate(queries if is_main() else []):
        path, position = paths[query // per_image], query % per_image
        rows = []
        for source, features in zip(sources, found, strict=True):
            mark = " (random weights)" if source["weights"] == "random" else ""
            rows.append((source["model"] + mark, [
                (name, [shown_patch(paths[patch // per_image], patch % per_image) for patch in nearest[number]])
                for name, nearest in features.items()]))
        file = folder / f"sheet_{number:03}_{Path(path).stem}_{position}.png"
        sheet = draw_sheet(query_image(path, position), rows, columns)
        atomic_write(file, lambda temporary, sheet=sheet: sheet.save(temporary, format="PNG"))
        files.append(file.name)
    return files
