"""Sheets of patches, by Pillow."""

import math
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from utils.storage import atomic_write

# In pixels.
CELL, GAP, MARGIN, TITLE = 96, 4, 16, 24
MARK = (255, 140, 0)


def draw_sheet(path: Path, query: Image.Image,
               rows: Sequence[tuple[str, Sequence[tuple[str, Sequence[tuple[Image.Image, bool]]]]]],
               columns: int = 6) -> None:
    """Writes a PNG or PDF, by the suffix of path: the query image on the left, then a row for each model, in it a block
    of patches for each feature.

    rows: (model, [(feature, [(patch, whether it overlaps the query), ...]), ...]); columns: of patches in a block.
    """
    deep = math.ceil(max(len(patches) for _, blocks in rows for _, patches in blocks) / columns)
    font, block_height = ImageFont.load_default(14), TITLE + deep * (CELL + GAP) - GAP
    widest = max(font.getlength(f"{model}: {feature}") for model, blocks in rows for feature, _ in blocks)
    block_width = max(columns * (CELL + GAP) - GAP, math.ceil(widest))
    across = max(len(blocks) for _, blocks in rows)
    left = MARGIN + query.width + 2 * MARGIN
    size = (left + across * (block_width + 2 * MARGIN) - MARGIN,
            MARGIN + max(len(rows) * (block_height + MARGIN), 2 * TITLE + query.height + MARGIN))
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, MARGIN), "query", fill="black", font=font)
    sheet.paste(query, (MARGIN, MARGIN + TITLE))
    if any(overlaps for _, blocks in rows for _, patches in blocks for _, overlaps in patches):
        draw.text((MARGIN, MARGIN + TITLE + query.height + GAP), "orange: overlaps the query", fill=MARK, font=font)
    for row, (model, blocks) in enumerate(rows):
        top = MARGIN + row * (block_height + MARGIN)
        for block, (feature, patches) in enumerate(blocks):
            x = left + block * (block_width + 2 * MARGIN)
            draw.text((x, top), f"{model}: {feature}", fill="black", font=font)
            for number, (patch, overlaps) in enumerate(patches):
                cell = (x + number % columns * (CELL + GAP), top + TITLE + number // columns * (CELL + GAP))
                sheet.paste(patch.resize((CELL, CELL), Image.Resampling.BICUBIC), cell)
                if overlaps:
                    draw.rectangle((*cell, cell[0] + CELL - 1, cell[1] + CELL - 1), outline=MARK, width=4)
    atomic_write(path, lambda temporary: sheet.save(temporary, path.suffix[1:]))
