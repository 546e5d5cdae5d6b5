"""A user's files: pictures and lists. What is not what it should be is an error, never a guess."""

import hashlib
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps

from utils import UserError

# What Pillow raises for a picture that is missing, truncated, not an image, or far too large (-W error: and warns of).
BAD_IMAGE = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError, Warning)


@contextmanager
def open_image(path: str | Path) -> Iterator[Image.Image]:
    """Image.open; what Pillow raises within the context becomes a UserError."""
    try:
        with Image.open(path) as image:
            yield image
    except BAD_IMAGE as error:
        reason = getattr(error, "strerror", None) or error
        if isinstance(error, Image.UnidentifiedImageError):
            reason = "not an image"
        raise UserError(f"{path} cannot be decoded ({reason}); replace it, or take it out of the data set") from None


def read_rgb(path: str | Path, size: tuple[int, int] | None = None, upright: bool = False) -> Image.Image:
    """A picture in RGB, whatever its colours; of 16-bit grey values the high byte, as Pillow does for 16-bit colours.

    size: (width, height) that the picture's annotation states. A picture that has it only when it is turned as its
    EXIF orientation says is turned, one that has it only as stored is not. Where both have it (a square, a half turn, a
    mirrored picture) and without a size, upright says whether the orientation is obeyed. Raises UserError for a picture
    of another size, one that cannot be decoded, and values of 32 bits, of which none is known to be white.
    """
    with open_image(path) as image:
        image.load()
        chosen = image
        if upright or size not in (None, image.size):
            turned = ImageOps.exif_transpose(image)
            if size in (None, turned.size):
                chosen = turned
            elif size != image.size:
                raise UserError(f"{path} has {image.width} x {image.height} pixels, its annotation says {size[0]} x "
                                f"{size[1]}; use the pictures that were annotated, neither resized nor cropped")
        if image.mode == "F" or image.mode == "I" and image.format not in ("PNG", "PPM"):
            raise ValueError("its values have 32 bits, and which of them is white is not known: save it with 8 bits")
        if image.mode.startswith("I"):
            # PNG has mode I before Pillow 11, PGM always; Pillow's own conversion cuts off what is above 255.
            chosen = Image.fromarray((np.asarray(chosen) >> 8).astype(np.uint8))
        chosen.info.pop("transparency", None)  # of which Pillow would warn
        return chosen.convert("RGB")


def picture_size(path: str | Path, upright: bool = False) -> tuple[int, int]:
    """(width, height) from a picture's header; upright: when it is turned as its EXIF orientation says. Raises
    UserError."""
    with open_image(path) as image:
        quarter_turn = upright and image.getexif().get(ExifTags.Base.Orientation, 1) > 4
        return image.size[::-1] if quarter_turn else image.size


def shared_images(first, second, by_content: bool = False) -> int:
    """How many images of the second data set are images of the first: the same file, under whatever name or link, or,
    by_content, a copy of one. Both have files(), the paths of their images. Raises OSError for a missing file."""
    first, second = first.files(), second.files()

    def content(path: str | Path) -> bytes:
        return hashlib.sha256(Path(path).read_bytes()).digest()

    files = {(status.st_dev, status.st_ino) for status in map(os.stat, first)}
    shared = {path for path in second if (os.stat(path).st_dev, os.stat(path).st_ino) in files}
    if by_content:
        sizes = {*map(os.path.getsize, first)} & {*map(os.path.getsize, second)}
        contents = {content(path) for path in first if os.path.getsize(path) in sizes}
        shared |= {path for path in second if os.path.getsize(path) in sizes and content(path) in contents}
    return len(shared)


def read_lines(path: Path) -> list[str]:
    """The lines of a text file. Raises UserError where it is not UTF-8, OSError where there is none."""
    try:
        return path.read_text("utf-8-sig").split("\n")
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text; save it as UTF-8") from None
