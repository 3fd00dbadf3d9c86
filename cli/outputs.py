"""The output flags of prediction.py, checked before sampling and carried out after it."""

import string
from pathlib import Path

from engine import pictures
from utils import UserError, check_writable, say

# Limits of a figure: matplotlib needs about ten milliseconds for each row and image.
MAX_FIGURE_ROWS, MAX_FIGURE_IMAGES = 200, 1000


def check_outputs(args):
    """Raise a `UserError`, before minutes of sampling, if an output could not be written or shown
    after it."""
    if args.save_image:
        check_fields("--save_image", args.save_image, 2, "as in images/{}.{}.png")
        path = pictures.image_path(args.save_image, "pred", 0)
        check_writable(path, "--save_image")
        if path.suffix != Path(args.save_image).suffix:
            extension = Path(args.save_image).suffix or "no extension"
            say(f"--save_image: {extension} is not an image format: writing {path} and so on")
    if args.save_gif:
        check_fields("--save_gif", args.save_gif, int(len(args.index) > 1), "as in sample.{}.gif")
        if Path(args.save_gif).suffix.lower() != ".gif":
            raise UserError(f"--save_gif {args.save_gif} does not end in .gif")
        check_writable(args.save_gif.format(0), "--save_gif")
    if args.save_grid or args.plot or args.save_surprisal:
        check_figure_size(args)
    for name in ("save_grid", "save_surprisal"):
        if path := getattr(args, name):
            check_figure_format(f"--{name}", path)
            check_writable(path, f"--{name}")
    if args.plot:
        check_display()


def check_fields(flag, pattern, least, example):
    """Raise a `UserError` if a pattern does not have one {} for each of its values."""
    try:
        fields = [
            field for _, field, _, _ in string.Formatter().parse(pattern) if field is not None
        ]
        pattern.format("pred", 0) if least == 2 else pattern.format(0)
    except (ValueError, KeyError, IndexError):
        fields = None
    if fields is None or not least <= len(fields) <= max(1, least):
        needs = f"needs {least}" if least else "takes at most one"
        raise UserError(f"{flag} {pattern} {needs} {{}}, {example}")


def check_figure_size(args):
    """Raise a `UserError` if a figure would have too many images."""
    images, rows = len(args.index), 1 if args.offset == 0 else len(set(args.index))
    if images > MAX_FIGURE_IMAGES or rows > MAX_FIGURE_ROWS:
        raise UserError(
            f"--index asks for {images} images, and a figure has at most {MAX_FIGURE_IMAGES} "
            f"and {MAX_FIGURE_ROWS} different ones: use --save_image, or fewer images"
        )


def check_figure_format(flag, path):
    """Raise a `UserError` if matplotlib does not write files with this extension."""
    from matplotlib.backend_bases import FigureCanvasBase

    extension = Path(path).suffix.lower()[1:] or "png"
    known = FigureCanvasBase.get_supported_filetypes()
    if extension not in known:
        raise UserError(f"{flag} {path}: .{extension} is none of {', '.join(sorted(known))}")


def check_display():
    """Raise a `UserError` if matplotlib cannot open a window."""
    import matplotlib.pyplot as plt
    from matplotlib.backends import BackendFilter, backend_registry

    interactive = backend_registry.list_builtin(BackendFilter.INTERACTIVE)
    if plt.get_backend().lower() not in [name.lower() for name in interactive]:
        raise UserError(
            f"--plot finds no display (matplotlib's backend is {plt.get_backend()}): "
            "use --save_grid FILE, or a desktop session"
        )


def write_files(args, completions, originals, offset):
    """Write --save_image and --save_gif for images (N, H, W) or (N, H, W, 3), uint8."""
    written = []
    for n, image in enumerate(completions):
        if args.save_image:
            kinds = {"pred": image} | ({} if originals is None else {"real": originals[n]})
            for kind, picture in kinds.items():
                written.append(pictures.image_path(args.save_image, kind, n))
                pictures.save_image(written[-1], picture)
        if args.save_gif:
            written.append(Path(args.save_gif.format(n)))
            pictures.save_gif(written[-1], image, offset, args.gif_seconds)
    if written:
        say(f"wrote {written[0]}" + (f" to {written[-1]}" if len(written) > 1 else ""))


def show_figure(args, completions, originals, offset, caption):
    """Write --save_grid and show --plot."""
    drawing = pictures.figure(figure_rows(args.index, completions, originals), offset, caption)
    if args.save_grid:
        pictures.save_figure(drawing, args.save_grid)
        say(f"wrote {args.save_grid} ({caption})")
    if args.plot:
        pictures.show()
    pictures.close(drawing)


def write_surprisal(args, images, bits):
    """Write --save_surprisal for images (N, H, W) or (N, H, W, 3) and the bits of their bytes, of
    the same shape."""
    different = {i: n for n, i in enumerate(args.index)}  # an image is shown once
    numbers = list(different.values())
    images, bits = images[numbers], bits[numbers]
    per_byte = bits.reshape(len(bits), -1)  # (N, L)
    bits_per_dim, all_bytes = per_byte[:, 1:].mean(), per_byte.mean()
    caption = f"surprisal: {bits_per_dim:.4f} bits/dim, {all_bytes:.4f} over all bytes"
    drawing = pictures.surprisal_figure(images, bits, list(map(str, different)), caption)
    pictures.save_figure(drawing, args.save_surprisal)
    say(f"wrote {args.save_surprisal} ({caption})")
    pictures.close(drawing)


def figure_rows(index, completions, originals):
    """(label, completions, real image or None) of each image of the data set, in order."""
    rows = {}
    for n, i in enumerate(index):
        original = None if originals is None else originals[n]
        rows.setdefault(i, (str(i), [], original))[1].append(completions[n])
    return list(rows.values())
