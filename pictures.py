"""What prediction.py writes: image files, the GIF of an image appearing, the figure."""

import math
import os
from pathlib import Path

import imageio.v3
import numpy as np

from utils import UserError

# Colours a grey image cannot contain.
GIVEN_TINT = np.array([60, 120, 255])
NOT_YET = np.array([40, 20, 60], np.uint8)
# Small images are enlarged in a GIF until their longer side has about this many pixels.
GIF_SIDE = 128
FRAME_MS = 20  # the shortest time that browsers respect
LAST_FRAME_MS = 2000


def image_path(pattern, *values):
    """The path of a `--save_image` pattern, with .png behind an extension that is no image's."""
    path = Path(pattern.format(*values))
    return path if is_image_extension(path.suffix) else path.with_name(path.name + ".png")


def is_image_extension(extension):
    """Whether imageio writes single images under this extension."""
    from PIL import Image

    Image.init()
    format_name = Image.registered_extensions().get(extension.lower())
    return format_name in Image.SAVE and format_name not in ("PDF", "MPO")


def save_image(path, image):
    """Write an image (H, W) or (H, W, 3), uint8, whole or not at all. Raises OSError."""
    write_whole(path, lambda file: imageio.v3.imwrite(file, image, extension=Path(path).suffix))


def write_whole(path, write):
    """Call `write` with a temporary file beside `path`, then rename it."""
    temporary = Path(path).with_name(f".{Path(path).name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_gif(path, image, offset):
    """Write an image appearing byte by byte from byte `offset` on, the given part tinted."""
    frames = list(appearing(image, offset))
    durations = [FRAME_MS] * (len(frames) - 1) + [LAST_FRAME_MS]
    write_whole(
        path,
        lambda file: imageio.v3.imwrite(
            file, frames, extension=".gif", duration=durations, loop=0, plugin="pillow"
        ),
    )


def appearing(image, offset):
    """Frames (H, W, 3): the given bytes alone, then one more byte each."""
    enlarge = max(1, GIF_SIDE // max(image.shape[:2]))
    for count in range(offset, image.size + 1):
        frame = partial_image(image, offset, count)
        yield frame.repeat(enlarge, 0).repeat(enlarge, 1)


def partial_image(image, offset, count):
    """The first `count` bytes of an image as (H, W, 3), the first `offset` of them tinted."""
    shape = image.shape[:2]
    channels = image.size // math.prod(shape)
    known = np.arange(image.size).reshape(*shape, channels)
    values = np.where(known < count, image.reshape(*shape, channels), 0)
    values = np.broadcast_to(values, (*shape, 3)).astype(np.uint8)
    given = (known < offset).all(-1)[..., None]
    values = np.where(given, (values * 0.6 + GIVEN_TINT * 0.4).astype(np.uint8), values)
    return np.where((known < count).any(-1)[..., None], values, NOT_YET)


def figure(rows, offset, caption):
    """A matplotlib figure with one row an image: given part, completions, real image.

    `rows` is a list of (label, real image or None, completions). Where nothing was given
    (real images are None) the completions alone are laid out as a square.
    """
    import matplotlib.pyplot as plt

    if rows[0][1] is None:
        images = [image for _, _, completions in rows for image in completions]
        columns = math.ceil(math.sqrt(len(images)))
        cells = [images[i : i + columns] for i in range(0, len(images), columns)]
        titles, labels = [], [""] * len(cells)
    else:
        widest = max(len(completions) for _, _, completions in rows)
        blank = np.full((*rows[0][1].shape[:2], 3), 255, np.uint8)
        cells = [
            [partial_image(real, offset, offset), real]
            + completions
            + [blank] * (widest - len(completions))
            for _, real, completions in rows
        ]
        titles = ["given", "real"] + ["completion"] + [""] * (widest - 1)
        labels = [label for label, _, _ in rows]
    return draw(plt, cells, titles, labels, caption)


def draw(plt, cells, titles, labels, caption):
    n_rows, n_columns = len(cells), max(map(len, cells))
    # A cell is 0.9 inches; the caption needs a line of its own and some width.
    size = (max(4.5, 0.9 * n_columns + 0.6), 0.9 * n_rows + 0.7)
    drawing, axes = plt.subplots(
        n_rows, n_columns, figsize=size, squeeze=False, layout="constrained"
    )
    for axis in axes.flat:
        axis.set_axis_off()
    for row, images in enumerate(cells):
        for column, image in enumerate(images):
            axes[row, column].imshow(image, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        axes[row, 0].text(
            -0.1,
            0.5,
            labels[row],
            transform=axes[row, 0].transAxes,
            ha="right",
            va="center",
            fontsize=7,
        )
    for column, title in enumerate(titles):
        axes[0, column].set_title(title, fontsize=7)
    drawing.supxlabel(caption, fontsize=7)
    return drawing


def save_figure(drawing, path):
    """Write a figure whole or not at all."""
    extension = Path(path).suffix[1:] or "png"
    write_whole(path, lambda file: drawing.savefig(file, format=extension, dpi=150))


def show():
    """Show the figures in windows; returns when they are closed."""
    import matplotlib.pyplot as plt

    plt.show()


def check_figure_format(path):
    """A `UserError` where matplotlib does not write files of this extension."""
    from matplotlib.backend_bases import FigureCanvasBase

    extension = Path(path).suffix.lower()[1:] or "png"
    known = FigureCanvasBase.get_supported_filetypes()
    if extension not in known:
        raise UserError(f"--save_grid {path}: .{extension} is none of {', '.join(sorted(known))}")


def check_display():
    """A `UserError` where matplotlib finds no way to open a window."""
    import matplotlib.pyplot as plt
    from matplotlib.backends import BackendFilter, backend_registry

    interactive = backend_registry.list_builtin(BackendFilter.INTERACTIVE)
    if plt.get_backend().lower() not in [name.lower() for name in interactive]:
        raise UserError(
            f"--plot finds no display (matplotlib's backend is {plt.get_backend()}): "
            "use --save_grid FILE, or a desktop session"
        )
