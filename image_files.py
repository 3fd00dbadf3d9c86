"""Folders of image files, read as viewers show them."""

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from utils import UserError, device_memory, one_line, say

# Pillow's names of the formats that are read.
IMAGE_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
KNOWN = ", ".join(IMAGE_FORMATS)


def load_image_files(folder: Path) -> np.ndarray:
    """All image files below `folder`, in the order of their names; hidden files are ignored."""
    known = Image.registered_extensions()
    paths, others = [], []
    for path in files_below(folder):
        is_image = known.get(path.suffix.lower()) in IMAGE_FORMATS
        (paths if is_image else others).append(path)
    if others:
        name = others[0].relative_to(folder)
        say(f"{folder}: left out {len(others)} whose names are not those of images, such as {name}")
    if not paths:
        raise UserError(f"{folder} holds no image files: their names must end in .png, .jpg, ...")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about damaged metadata, which the pixels do not need
        first = read_image(paths[0])
        if first.size < 2:
            raise UserError(f"{paths[0]} is a single byte: there is nothing to predict")
        images = allocate((len(paths), *first.shape))
        for i, path in enumerate(paths):
            image = read_image(path)
            if image.shape != first.shape:
                raise UserError(
                    f"{path} is {with_colour(image.shape)} but {paths[0]} is "
                    f"{with_colour(first.shape)}: all must have one size and one colour mode "
                    "(prepare.py makes them so)"
                )
            images[i] = image
    return images


def files_below(folder: Path) -> list[Path]:
    """All files below `folder`, sorted, without those that are hidden or in hidden folders.

    Links are followed, except those to a folder that they lie in."""
    files, folders = [], [folder]
    while folders:
        for path in folders.pop().iterdir():
            if path.name.startswith("."):
                continue
            if not path.is_dir():
                files.append(path)
            elif any(path.samefile(parent) for parent in path.parents):
                say(f"{path} is not followed: it leads back to a folder that it lies in")
            else:
                folders.append(path)
    return sorted(files)


def exact_image(image: Image.Image, path: Path) -> np.ndarray:
    """An image as viewers show it, upright: uint8, (H, W) or (H, W, 3). Raises `UserError` if 8
    bits of grey or RGB cannot hold it."""
    check_convertible(image, path)
    grey = image.mode in ("1", "L", "LA") and image.format != "GIF"  # it has a palette
    return np.asarray(ImageOps.exif_transpose(image).convert("L" if grey else "RGB"))


def fit_image(
    image: Image.Image, path: Path, *, size: int, grey: bool
) -> tuple[np.ndarray, tuple[int, int]]:
    """The middle square of an image as viewers show it, upright and on white where it is
    transparent, resized to (size, size, 3), uint8, with three equal channels if `grey`; and the
    image's own size. Raises `UserError` for several images and for 32-bit pixels."""
    check_single(image, path)
    original, is_tiff = image.size, image.format == "TIFF"
    image.draft(None, (2 * size, 2 * size))  # decodes a large JPEG file at a fraction of its size
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16") or (image.mode == "I" and not is_tiff):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise UserError(f"{path} has 32 bits per pixel and no known range: convert it")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("L") if grey else image
    # Resizing filters, so that several pixels of the image become one of the result.
    return np.asarray(ImageOps.fit(image.convert("RGB"), (size, size))), original


def read_image(path: Path, convert: Callable[[Image.Image, Path], Any] = exact_image) -> Any:
    """What `convert` returns for the image in a file. Raises `UserError` if it is damaged."""
    check_is_file(path)
    try:
        # Given a path, Pillow 13 misreads rotated TIFF files.
        with path.open("rb") as file, Image.open(file, formats=IMAGE_FORMATS) as image:
            return convert(image, path)
    except UserError:
        raise
    except Exception as error:  # Pillow raises many types for damaged files
        if isinstance(error, UnidentifiedImageError):
            error = f"it is none of {KNOWN}" if path.stat().st_size else "it is empty"
        raise UserError(
            f"{path} cannot be read as an image ({one_line(error)}): replace or remove it"
        ) from None


def check_convertible(image: Image.Image, path: Path) -> None:
    """Raise a `UserError` if 8 bits of grey or RGB cannot hold the image."""
    check_single(image, path)
    if image.mode not in ("1", "L", "LA", "P", "RGB", "RGBA") or ";16" in str(image.tile):
        raise UserError(f"{path} is neither grey nor RGB with 8 bits per channel: convert it")
    if image.has_transparency_data and image.convert("RGBA").getextrema()[3] != (255, 255):
        raise UserError(f"{path} has transparent pixels: convert it to grey or RGB")


def check_single(image: Image.Image, path: Path) -> None:
    """Raise a `UserError` for several images in one file."""
    if image.format != "MPO" and getattr(image, "n_frames", 1) > 1:  # MPO: previews of a photo
        raise UserError(f"{path} holds {image.n_frames} images: save each as a file of its own")


def check_is_file(path: Path) -> None:
    """Raise a `UserError` unless `path` is a file, which this user may read, and no pipe or device,
    which may have no end."""
    if path.is_file() and os.access(path, os.R_OK):
        return
    if path.exists():
        problem = "may not be read by this user" if path.is_file() else "is no regular file"
    else:
        problem = "is a broken link" if path.is_symlink() else "does not exist"
    raise UserError(f"{path} {problem}: put a file with images there")


def with_colour(shape: tuple[int, ...]) -> str:
    return f"{describe(shape[:2])} {'grey' if len(shape) == 2 else 'in colour'}"


def describe(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def allocate(shape: tuple[int, ...]) -> np.ndarray:
    """Memory for images; raises MemoryError if this machine has less."""
    needed, available = np.prod(shape, dtype=float), device_memory(torch.device("cpu"))
    if needed > available:  # the system may promise more than there is
        raise MemoryError(f"{needed / 1e9:.1f} GB, and there are {available / 1e9:.1f}")
    return np.empty(shape, np.uint8)
