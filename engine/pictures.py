"""Image files, and the animation of an image appearing."""

import io
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from files import write_atomically

# Pillow's names of the formats of image files, which are those that every viewer knows.
FORMATS = {
    ".png": "PNG", ".bmp": "BMP", ".gif": "GIF", ".jpg": "JPEG", ".jpeg": "JPEG", ".ppm": "PPM",
    ".tga": "TGA", ".tif": "TIFF", ".tiff": "TIFF", ".webp": "WEBP",
}  # fmt: skip
# Colours of the given part and of bytes not yet drawn; grey images do not contain them.
GIVEN_TINT = np.array([60, 120, 255])
NOT_YET = np.array([40, 20, 60], np.uint8)
# Small images are enlarged in a GIF or a grid until their longer side has about this many pixels.
SHOWN_SIDE = 128
GAP = 4  # pixels around an image in a grid
# Seconds per frame of a GIF: smooth, and above 0.02, the shortest that browsers respect.
FRAME_SECONDS = 0.04
FINISHED = 1 / 4  # the fraction of an animation that shows the finished image


def save_image(path: Path, image: np.ndarray) -> None:
    """Write an image (H, W) or (H, W, 3), uint8, in one of the FORMATS. Raises OSError."""
    save(path, Image.fromarray(image))


def save_gif(path: Path, image: np.ndarray, offset: int, seconds: float) -> None:
    """Write an animation of an image appearing from byte `offset` on, with the given part tinted.
    It lasts `seconds`; the last quarter shows the finished image. Raises OSError."""
    counts = frame_counts(offset, image.size, seconds)
    frames = (enlarge(partial_image(image, offset, n)) for n in counts)
    first, *others = map(Image.fromarray, frames)
    ends = np.linspace(0, (1 - FINISHED) * seconds, len(counts))  # of all frames but the last
    durations = 10 * np.diff([*(100 * ends).round(), 100 * seconds])  # ms; GIFs count 1/100 s
    save(path, first, save_all=True, append_images=others, duration=durations.tolist(), loop=0)


def enlarge(image: np.ndarray) -> np.ndarray:
    """A small image with every pixel as a square of pixels."""
    factor = max(1, SHOWN_SIDE // max(image.shape[:2]))
    return image.repeat(factor, 0).repeat(factor, 1)


def tile(rows: Sequence[Sequence[np.ndarray]]) -> np.ndarray:
    """One image (H', W', 3) of rows of images (H, W) or (H, W, 3), all of one size, enlarged."""
    border = [(GAP, GAP), (GAP, GAP), (0, 0)]
    cells = [[enlarge(partial_image(image, 0, image.size)) for image in row] for row in rows]
    cells = [[np.pad(cell, border, constant_values=255) for cell in row] for row in cells]
    return np.vstack([np.hstack(row) for row in cells])


def save(path: Path, image: Image.Image, **options) -> None:
    """Write an image that is encoded in memory: Pillow calls a full disk an "encoder error"."""
    content = io.BytesIO()
    image.save(content, FORMATS[path.suffix.lower()], **options)
    write_atomically(path, lambda file: file.write(content.getbuffer()))


def frame_counts(offset: int, length: int, seconds: float) -> np.ndarray:
    """How many bytes of an image each frame shows: from `offset` to all of them, evenly."""
    most = max(2, round((1 - FINISHED) * seconds / FRAME_SECONDS))
    counts = np.linspace(offset, length, min(most, length - offset + 1))
    return np.unique(counts.round()).astype(int)


def partial_image(image: np.ndarray, offset: int, count: int) -> np.ndarray:
    """An image with its first `count` bytes only, as (H, W, 3), the first `offset` tinted."""
    shape = image.shape[:2]
    channels = image.size // math.prod(shape)
    known = np.arange(image.size).reshape(*shape, channels)
    values = np.where(known < count, image.reshape(*shape, channels), 0)
    values = np.broadcast_to(values, (*shape, 3)).astype(np.uint8)
    given = (known < offset).all(-1)[..., None]
    values = np.where(given, (values * 0.6 + GIVEN_TINT * 0.4).astype(np.uint8), values)
    return np.where((known < count).any(-1)[..., None], values, NOT_YET)
