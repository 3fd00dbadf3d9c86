"""Image files, the animation of an image appearing, and the figures of samples and surprisals."""

import math
from pathlib import Path

import imageio.v3
import numpy as np

from utils import write_whole

# Colours of the given part and of bytes not yet drawn; grey images do not contain them.
GIVEN_TINT = np.array([60, 120, 255])
NOT_YET = np.array([40, 20, 60], np.uint8)
# Small images are enlarged in a GIF until their longer side has about this many pixels.
GIF_SIDE = 128
# Seconds per frame of a GIF: smooth, and above 0.02, the shortest that browsers respect.
FRAME_SECONDS = 0.04
# The fraction of an animation that shows the finished image.
FINISHED = 1 / 4
# Inches of an image in the figure of surprisals.
SURPRISAL_CELL = 1.2


def image_path(pattern, *values):
    """The path of a `--save_image` pattern; .png is appended unless the extension is an image
    format."""
    path = Path(pattern.format(*values))
    return path if is_image_extension(path.suffix) else path.with_name(path.name + ".png")


def is_image_extension(extension):
    """Whether imageio writes single images under this extension."""
    from PIL import Image

    Image.init()
    format_name = Image.registered_extensions().get(extension.lower())
    return format_name in Image.SAVE and format_name not in ("PDF", "MPO")


def save_image(path, image):
    """Write an image (H, W) or (H, W, 3), uint8, to a file. Raises OSError."""
    write_whole(path, lambda file: imageio.v3.imwrite(file, image, extension=Path(path).suffix))


def save_gif(path, image, offset, seconds):
    """Write an animation of an image appearing from byte `offset` on, with the given part tinted.
    It lasts `seconds`; the last quarter shows the finished image."""
    counts = frame_counts(offset, image.size, seconds)
    frames = [enlarged(partial_image(image, offset, count)) for count in counts]
    ends = np.linspace(0, (1 - FINISHED) * seconds, len(frames))  # of all frames but the last
    durations = 10 * np.diff([*(100 * ends).round(), 100 * seconds])  # ms; GIFs count 1/100 s
    write_whole(
        path,
        lambda file: imageio.v3.imwrite(
            file, frames, extension=".gif", duration=durations.tolist(), loop=0, plugin="pillow"
        ),
    )


def frame_counts(offset, length, seconds):
    """How many bytes of an image each frame shows: from `offset` to all of them, evenly."""
    most = max(2, round((1 - FINISHED) * seconds / FRAME_SECONDS))
    counts = np.linspace(offset, length, min(most, length - offset + 1))
    return np.unique(counts.round()).astype(int)


def enlarged(frame):
    """Repeat the pixels of a small image (H, W, 3)."""
    factor = max(1, GIF_SIDE // max(frame.shape[:2]))
    return frame.repeat(factor, 0).repeat(factor, 1)


def partial_image(image, offset, count):
    """An image with its first `count` bytes only, as (H, W, 3), the first `offset` tinted."""
    shape = image.shape[:2]
    channels = image.size // math.prod(shape)
    known = np.arange(image.size).reshape(*shape, channels)
    values = np.where(known < count, image.reshape(*shape, channels), 0)
    values = np.broadcast_to(values, (*shape, 3)).astype(np.uint8)
    given = (known < offset).all(-1)[..., None]
    values = np.where(given, (values * 0.6 + GIVEN_TINT * 0.4).astype(np.uint8), values)
    return np.where((known < count).any(-1)[..., None], values, NOT_YET)


def figure(rows, offset, caption):
    """A matplotlib figure with one row per image: given part, completions, real image.

    `rows` is a list of (label, completions, real image or None). Unconditional samples have no
    real images; they fill a square.
    """
    if rows[0][2] is None:
        samples = [image for _, completions, _ in rows for image in completions]
        columns = math.ceil(math.sqrt(len(samples)))
        return draw([samples[i : i + columns] for i in range(0, len(samples), columns)], caption)
    widest = max(len(completions) for _, completions, _ in rows)
    cells = []
    for _, completions, real in rows:
        blanks = [None] * (widest - len(completions))
        cells.append([partial_image(real, offset, offset), *completions, *blanks, real])
    titles = ["given", "completion" if widest == 1 else "completions", *[""] * (widest - 1), "real"]
    return draw(cells, caption, titles, [label for label, _, _ in rows])


def draw(cells, caption, titles=(), labels=()):
    """The figure of a table of images (None for an empty cell)."""
    import matplotlib.pyplot as plt  # takes a second, and only figures need it

    n_rows, n_columns = len(cells), max(map(len, cells))
    # 0.6 inches per cell, and room for the caption.
    size = (max(4.0, 0.6 * n_columns + 0.4), 0.6 * n_rows + 0.6)
    grid = {"wspace": 0.15, "hspace": 0.15, "bottom": 0.4 / size[1], "top": 1 - 0.2 / size[1]}
    drawing, axes = plt.subplots(n_rows, n_columns, figsize=size, squeeze=False, gridspec_kw=grid)
    for axis in axes.flat:
        axis.set_axis_off()
    for row, images in enumerate(cells):
        for axis, image in zip(axes[row], images, strict=False):
            if image is not None:
                axis.imshow(image, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    for axis, title in zip(axes[0], titles, strict=False):
        axis.set_title(title, fontsize=7)
    for axis, label in zip(axes[:, 0], labels, strict=False):
        axis.text(-0.1, 0.5, label, transform=axis.transAxes, ha="right", va="center", fontsize=7)
    drawing.text(0.5, 0.05 / size[1], caption, ha="center", va="bottom", fontsize=6)
    return drawing


def surprisal_figure(images, bits, labels, caption):
    """A matplotlib figure of images (N, H, W) or (N, H, W, 3), each beside a heat map of the `bits`
    of its pixels, from an array of the same shape; one colour bar is the scale of all maps.

    The titles are the labels and the bits/dim, the mean over all bytes but the first.
    """
    import matplotlib.pyplot as plt

    pixels = bits.reshape(*images.shape[:3], -1).sum(-1)  # (N, H, W)
    n_columns = math.ceil(math.sqrt(len(images) / 2))
    n_rows = math.ceil(len(images) / n_columns)
    size = SURPRISAL_CELL * np.array([2 * n_columns + 0.5, n_rows + 0.25])
    drawing, axes = plt.subplots(
        n_rows, 2 * n_columns, figsize=size, squeeze=False, layout="compressed"
    )
    for axis in axes.flat:
        axis.set_axis_off()
    for (left, right), image, heat, label, values in zip(
        axes.reshape(-1, 2), images, pixels, labels, bits, strict=False
    ):
        left.imshow(image, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        left.set_title(label, fontsize=7)
        heat_map = right.imshow(heat, cmap="magma", vmin=0, vmax=pixels.max())
        right.set_title(f"{values.flat[1:].mean():.3f} bits/dim", fontsize=7)
    bar = drawing.colorbar(heat_map, ax=axes, aspect=30)
    bar.set_label("bits per pixel", fontsize=7)
    bar.ax.tick_params(labelsize=7)
    drawing.supxlabel(caption, fontsize=6)
    return drawing


def save_figure(drawing, path):
    """Write a figure to a file. Raises OSError."""
    extension = Path(path).suffix[1:] or "png"
    write_whole(
        path, lambda file: drawing.savefig(file, format=extension, dpi=150, bbox_inches="tight")
    )


def show():
    """Show the figures in windows; returns when they are closed."""
    import matplotlib.pyplot as plt

    plt.show()


def close(drawing):
    import matplotlib.pyplot as plt

    plt.close(drawing)
