"""What prediction.py writes: image files, the GIF of an image appearing, the figure."""

import math
import os
import string
from pathlib import Path

import imageio.v3
import numpy as np

from reporting import say
from utils import UserError, check_writable

# Colours a grey image cannot contain.
GIVEN_TINT = np.array([60, 120, 255])
NOT_YET = np.array([40, 20, 60], np.uint8)
# Small images are enlarged in a GIF until their longer side has about this many pixels.
GIF_SIDE = 128
FRAME_MS = 20  # the shortest time that browsers respect
LAST_FRAME_MS = 2000
# A figure has no more rows and images: each takes matplotlib some ten milliseconds.
MAX_FIGURE_ROWS, MAX_FIGURE_IMAGES = 200, 1000


def check_outputs(args):
    """Refuse, before minutes of sampling, what could not be written or shown after them."""
    if not (args.save_image or args.save_gif or args.save_grid or args.plot):
        args.save_grid = "samples.png"
    if args.save_image:
        check_fields("--save_image", args.save_image, 2, "as in images/{}.{}.png")
        path = image_path(args.save_image, "pred", 0)
        check_writable(path, "--save_image")
        if path.suffix != Path(args.save_image).suffix:
            say(f"--save_image: {Path(args.save_image).suffix or 'no extension'} is no image "
                f"format: writing {path} and so on")  # fmt: skip
    if args.save_gif:
        check_fields("--save_gif", args.save_gif, int(len(args.index) > 1), "as in sample.{}.gif")
        if Path(args.save_gif).suffix.lower() != ".gif":
            raise UserError(f"--save_gif {args.save_gif} does not end in .gif")
        check_writable(args.save_gif.format(0), "--save_gif")
    if args.save_grid or args.plot:
        images, rows = len(args.index), 1 if args.offset == 0 else len(set(args.index))
        if images > MAX_FIGURE_IMAGES or rows > MAX_FIGURE_ROWS:
            raise UserError(
                f"--index asks for {images} images, and a figure has at most {MAX_FIGURE_IMAGES} "
                f"and {MAX_FIGURE_ROWS} different ones: use --save_image, or fewer images"
            )
    if args.save_grid:
        check_figure_format(args.save_grid)
        check_writable(args.save_grid, "--save_grid")
    if args.plot:
        check_display()


def check_fields(flag, pattern, least, example):
    """The pattern must have a {} for each value that is put into it."""
    try:
        fields = [
            field for _, field, _, _ in string.Formatter().parse(pattern) if field is not None
        ]
        pattern.format("pred", 0) if least == 2 else pattern.format(0)
    except (ValueError, KeyError, IndexError):
        fields = ()
    if not least <= len(fields) <= max(1, least):
        raise UserError(f"{flag} {pattern} needs {least} {{}}, {example}")


def write_files(args, completions, originals, offset):
    """Write --save_image and --save_gif."""
    written = []
    for n, image in enumerate(completions):
        if args.save_image:
            kinds = {"pred": image} | ({} if originals is None else {"real": originals[n]})
            for kind, picture in kinds.items():
                written.append(image_path(args.save_image, kind, n))
                save_image(written[-1], picture)
        if args.save_gif:
            written.append(Path(args.save_gif.format(n)))
            save_gif(written[-1], image, offset)
    if written:
        say(f"wrote {written[0]}" + (f" to {written[-1]}" if len(written) > 1 else ""))


def figure_rows(index, completions, originals):
    """(label, completions, real image or None) of each image of the data set, in order."""
    rows = {}
    for n, i in enumerate(index):
        original = None if originals is None else originals[n]
        rows.setdefault(i, (str(i), [], original))[1].append(completions[n])
    return list(rows.values())


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
    """Call `write` with a temporary file beside `path`, then rename it; folders are made."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
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

    `rows` is a list of (label, completions, real image or None). Where nothing was given there
    are no real images, and the completions alone fill a square.
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
    # 0.6 inches a cell, and room for the caption.
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


def show_figure(args, rows, offset, caption):
    """Write --save_grid and show --plot."""
    drawing = figure(rows, offset, caption)
    if args.save_grid:
        save_figure(drawing, args.save_grid)
        say(f"wrote {args.save_grid} ({caption})")
    if args.plot:
        show()
    close(drawing)


def save_figure(drawing, path):
    """Write a figure whole or not at all."""
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
