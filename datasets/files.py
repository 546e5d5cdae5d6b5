"""A user's files: pictures, lists, and names in lists. What is not what it should be is an error, never a guess."""

import hashlib
import os
import stat
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from utils import UserError

# What a picture raises that is missing, truncated, not an image, far too large, or far too long to be resized.
BAD_IMAGE = (OSError, SyntaxError, ValueError, EOFError, OverflowError, struct.error, Image.DecompressionBombError)
LARGEST_RATIO = 100  # of a picture's sides: resized by its short side, a longer one would take gigabytes
ORIENTATION = 0x0112  # EXIF's tag of how the camera was held
# What turns a picture upright, by the value of that tag; from 5 on width and height change places.
TURNS = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
         5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
         8: Image.Transpose.ROTATE_90}


@contextmanager
def image_errors(path: str | Path) -> Iterator[None]:
    """What a picture raises within the context becomes a UserError."""
    try:
        yield
    except BAD_IMAGE as error:
        if isinstance(error, Image.UnidentifiedImageError):
            reason = "not an image"
        else:
            reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path} cannot be decoded ({reason}); replace it, or take it out of the data set") from None


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


def read_rgb(path: str | Path, size: tuple[int, int] | None = None, upright: bool = False) -> Image.Image:
    """A picture in RGB, whatever its colours.

    size: (width, height) that the picture's annotation states. A picture that has it only when it is turned as its
    EXIF orientation says is turned, one that has it only as stored is not. Where both have it (a square, a half turn, a
    mirrored picture) and without a size, upright says whether the orientation is obeyed.

    Of 16-bit grey values the high byte is taken, as Pillow does for 16-bit colours. Raises UserError for a picture of
    another size, for one that cannot be decoded, and for values of 32 bits, of which none is known to be white.
    """
    with image_errors(path), open_image(path) as image:
        image.load()
        turn = read_turn(image)
        if image.mode in ("I", "F") and not (image.mode == "I" and image.format in ("PNG", "PPM")):
            raise ValueError("its values have 32 bits, and which of them is white is not known: save it with 8 bits")
        if image.mode.startswith("I"):
            # PNG has mode I before Pillow 11, PGM always; Pillow's own conversion cuts off what is above 255.
            rgb = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
        else:
            rgb = image.convert("RGB")
    turned = turned_size(rgb.size, turn)
    if size is not None and rgb.size != turned:
        upright = turned == size
    if size is not None and size not in (rgb.size, turned):
        raise UserError(f"{path} has {rgb.width} x {rgb.height} pixels, its annotation says {size[0]} x {size[1]}; "
                        "use the pictures that were annotated, neither resized nor cropped")
    return rgb.transpose(turn) if upright and turn is not None else rgb


def picture_size(path: str | Path, upright: bool = False) -> tuple[int, int]:
    """(width, height) from a picture's header; upright: when it is turned as its EXIF orientation says. Raises
    UserError."""
    with image_errors(path), open_image(path) as image:
        return turned_size(image.size, read_turn(image)) if upright else image.size


def read_turn(image: Image.Image) -> Image.Transpose | None:
    """What brings an open picture upright; None where nothing has to."""
    if image.format == "TIFF":
        image.load()  # newer versions of Pillow turn a TIFF while they load it
    try:
        return TURNS.get(image.getexif().get(ORIENTATION))
    except (SyntaxError, ValueError, TypeError, KeyError, struct.error):
        return None  # a tag that cannot be read turns nothing, in viewers too


def turned_size(size: tuple[int, int], turn: Image.Transpose | None) -> tuple[int, int]:
    return size[::-1] if turn in list(TURNS.values())[3:] else size


def shared_files(first: Sequence[str | Path], second: Sequence[str | Path], by_content: bool = False) -> int:
    """How many of the second paths lead to files that the first lead to, under whatever name or link; by_content: or to
    a copy of one. Raises OSError for a missing file."""
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
