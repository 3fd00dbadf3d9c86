"""The figures of samples and of surprisals. matplotlib is imported where it is needed, since that
takes a second."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from engine.pictures import partial_image
from files import write_atomically
from utils import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# What matplotlib writes without other programs.
EXTENSIONS = ("png", "pdf", "svg", "svgz", "eps", "ps", "jpg", "jpeg", "tif", "tiff", "webp")


def check_extension(path: str | Path, flag: str) -> None:
    """Raise a `UserError` if a figure cannot be written with the extension of this path."""
    if extension_of(path) not in EXTENSIONS:
        known = ", ".join(EXTENSIONS)
        raise UserError(f"{flag} {path}: .{extension_of(path)} is none of {known}")


def extension_of(path: str | Path) -> str:
    """Without the dot; png if there is none."""
    return Path(path).suffix.lower()[1:] or "png"


def new_figure(**options) -> Figure:
    """An empty figure for a file, with matplotlib's options. It needs no window system."""
    os.environ.pop("MPLBACKEND", None)  # a window's; a notebook's is an error outside of it
    from matplotlib.figure import Figure

    return Figure(**options)


def draw_samples(
    figure: Figure,
    index: list[int],
    completions: np.ndarray,
    originals: np.ndarray | None,
    offset: int,
    caption: str,
) -> None:
    """Draw one row per image of the data set on an empty figure: given part, completions, real
    image. `completions` and `originals` are the images (N, H, W) or (N, H, W, 3) of an `index`.

    Unconditional samples have no real images; they fill a square.
    """
    if originals is None:
        columns = math.ceil(math.sqrt(len(completions)))
        cells = [completions[i : i + columns] for i in range(0, len(completions), columns)]
        return draw_table(figure, cells, caption)
    rows = {}
    for n, i in enumerate(index):
        rows.setdefault(i, []).append(n)
    widest = max(map(len, rows.values()))
    cells = []
    for numbers in rows.values():
        real, blanks = originals[numbers[0]], [None] * (widest - len(numbers))
        cells.append([partial_image(real, offset, offset), *completions[numbers], *blanks, real])
    titles = ["given", "completion" if widest == 1 else "completions", *[""] * (widest - 1), "real"]
    draw_table(figure, cells, caption, titles, labels=rows)


def draw_table(
    figure: Figure,
    cells: list[Sequence[np.ndarray | None]],
    caption: str,
    titles: Sequence[str] = (),
    labels: Iterable[int | str] = (),
) -> None:
    """Draw a table of images (None for an empty cell)."""
    n_rows, n_columns = len(cells), max(map(len, cells))
    # 0.6 inches per cell, and room for the caption.
    width, height = max(4.0, 0.6 * n_columns + 0.4), 0.6 * n_rows + 0.6
    figure.set_size_inches(width, height)
    grid = {"wspace": 0.15, "hspace": 0.15, "bottom": 0.4 / height, "top": 1 - 0.2 / height}
    axes = figure.subplots(n_rows, n_columns, squeeze=False, gridspec_kw=grid)
    for axis in axes.flat:
        axis.set_axis_off()
    for row, images in zip(axes, cells, strict=True):
        for axis, image in zip(row, images, strict=False):
            if image is not None:
                show(axis, image)
    for axis, title in zip(axes[0], titles, strict=False):
        axis.set_title(title, fontsize=7)
    for axis, label in zip(axes[:, 0], labels, strict=False):
        axis.text(-0.1, 0.5, label, transform=axis.transAxes, ha="right", va="center", fontsize=7)
    figure.text(0.5, 0.05 / height, caption, ha="center", va="bottom", fontsize=6)


def show(axis: Axes, image: np.ndarray) -> None:
    axis.imshow(image, cmap="gray", vmin=0, vmax=255, interpolation="nearest")


def surprisal_figure(
    images: np.ndarray, bits: np.ndarray, labels: list[str], caption: str
) -> Figure:
    """Images (N, H, W) or (N, H, W, 3), each beside a heat map of the bits of its pixels, from
    the `bits` (N, L) of its bytes; one colour bar is the scale of all maps.

    The titles are the labels and the bits/dim, the mean over all bytes but the first.
    """
    pixels = bits.reshape(*images.shape[:3], -1).sum(-1)  # (N, H, W)
    n_columns = math.ceil(math.sqrt(len(images) / 2))
    n_rows = math.ceil(len(images) / n_columns)
    size = 1.2 * np.array([2 * n_columns + 0.5, n_rows + 0.25])  # inches: 1.2 for an image
    figure = new_figure(figsize=size, layout="compressed")
    axes = figure.subplots(n_rows, 2 * n_columns, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for (left, right), image, heat, label, values in zip(
        axes.reshape(-1, 2), images, pixels, labels, bits, strict=False
    ):
        show(left, image)
        left.set_title(label, fontsize=7)
        heat_map = right.imshow(heat, cmap="magma", vmin=0, vmax=pixels.max())
        right.set_title(f"{values[1:].mean():.3f} bits/dim", fontsize=7)
    bar = figure.colorbar(heat_map, ax=axes, aspect=30)
    bar.set_label("bits per pixel", fontsize=7)
    bar.ax.tick_params(labelsize=7)
    figure.supxlabel(caption, fontsize=6)
    return figure


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write a figure to a file with one of the EXTENSIONS, or without one. Raises OSError."""
    content = io.BytesIO()  # see pictures.save
    figure.savefig(content, format=extension_of(path), dpi=150, bbox_inches="tight")
    write_atomically(path, lambda file: file.write(content.getbuffer()))
