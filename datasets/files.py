"""A user's files: pictures, lists, and names in lists. What is not what it should be is an error, never a guess."""

import os
import stat
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from utils import UserError

# What a picture raises that is missing, truncated, not an image, far too large, or far too long to be resized.
BAD_IMAGE = (OSError, SyntaxError, ValueError, EOFError, OverflowError, struct.error, Image.DecompressionBombError)
LARGEST_RATIO = 100  # of a picture's sides: resized by its short side, a longer one would take gigabytes


def reason(error: Exception) -> str:
    """Why a file could not be read, without its path."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return "not an image" if isinstance(error, Image.UnidentifiedImageError) else str(error)


@contextmanager
def open_image(path: str | Path) -> Iterator[Image.Image]:
    """Image.open. Raises one of BAD_IMAGE, also for pipes and devices, which would be waited for, and for a picture
    whose sides differ by more than LARGEST_RATIO."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError("not a regular file")
    with Image.open(path) as image:
        if max(image.size) > LARGEST_RATIO * min(image.size):
            raise ValueError(f"a picture of {image.width} x {image.height} pixels")
        yield image


def read_rgb(path: str | Path) -> Image.Image:
    """A picture in RGB, whatever its colours. Of 16-bit grey values the high byte is taken, as Pillow does for 16-bit
    colours. Raises one of BAD_IMAGE, also for 32-bit and floating-point values, of which none is known to be white."""
    with open_image(path) as image:
        # In mode I are PNG (before Pillow 11) and PGM; Pillow's own conversion cuts off what is above 255.
        if image.mode.startswith("I;16") or image.mode == "I" and image.format in ("PNG", "PPM"):
            return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
        if image.mode in ("I", "F"):
            raise ValueError("its values have 32 bits, and which of them is white is not known: save it with 8 bits")
        return image.convert("RGB")


@contextmanager
def image_errors(path: str | Path) -> Iterator[None]:
    """What a picture raises within the context becomes a UserError."""
    try:
        yield
    except BAD_IMAGE as error:
        raise UserError(f"{path} cannot be decoded ({reason(error)}); restore the file") from None


def load_rgb(path: str | Path) -> Image.Image:
    """read_rgb. Raises UserError."""
    with image_errors(path):
        return read_rgb(path)


def read_lines(path: Path) -> list[str]:
    """The lines of a text file. Raises UserError where there is none, and where it is not UTF-8."""
    if not path.is_file():
        raise UserError(f"{path} does not exist, or is not a regular file")
    content = path.read_bytes()
    try:
        return content.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        number = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}, line {number}: it is not UTF-8 text; save the file as UTF-8") from None


def path_below(folder: str | Path, name: object, where: str) -> str:
    """The path of a name that a list gives, relative to a folder. Symbolic links in the folder may lead anywhere, the
    name may not: raises UserError, with where it stands, for an absolute one, ".." in it, and what is no name."""
    if not isinstance(name, str) or not PurePosixPath(name).name or "\0" in name or (
            os.path.isabs(name) or ".." in PurePosixPath(name).parts):
        raise UserError(f"{where}: {name!r} is not the name of a file in {folder}; correct it")
    return str(Path(folder, name))
