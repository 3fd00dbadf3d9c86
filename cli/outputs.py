"""The output flags of prediction.py: checked before sampling, carried out during and after it."""

import os
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from engine import distributed, figures, pictures
from engine.checkpoint import find_files
from engine.progress import track
from engine.unfinished import UnfinishedSamples, digest
from files import check_writable, count_fields
from models import ImageTransformer
from utils import UserError, is_first_process, one_line, say, warn

# Limits of a figure: matplotlib needs about ten milliseconds for each row and image.
MAX_FIGURE_ROWS, MAX_FIGURE_IMAGES = 200, 1000
SLOW_FIGURE_IMAGES = 100  # more take seconds


def check_outputs(args: Namespace) -> None:
    """Raise a `UserError` if an output could not be written or shown after minutes of sampling."""
    if args.save_image:
        needs = "needs 2 fields, {} for pred or real and {} or {:06d} for the number"
        check_fields("--save_image", args.save_image, ("pred", 0), 2, needs)
        pattern = image_pattern(args.save_image)
        if pattern != args.save_image:
            first = pattern.format("pred", 0)
            say(f"--save_image has no extension of an image format: writing {first} and so on")
    if args.save_gif:
        least = int(len(args.index) > 1)
        needs = f"{'needs one' if least else 'takes at most one'} {{}} or {{:06d}} for the number"
        check_fields("--save_gif", args.save_gif, (0,), least, needs)
        if Path(args.save_gif).suffix.lower() != ".gif":
            raise UserError(f"--save_gif {args.save_gif} does not end in .gif")
    if args.save_grid or args.plot or args.save_surprisal:
        check_figure_size(args)
    if args.save_grid:
        figures.check_extension(args.save_grid, "--save_grid")
    if args.save_surprisal:
        figures.check_extension(args.save_surprisal, "--save_surprisal")
    check_paths(args)
    if args.plot:
        check_display()


def check_fields(flag: str, pattern: str, values: tuple, least: int, needs: str) -> None:
    """Raise a `UserError` unless a pattern has one {} for each of `least` to all of the values."""
    try:
        valid = least <= count_fields(pattern) <= len(values) and pattern.format(*values)
    except ValueError:
        valid = False
    if not valid:
        raise UserError(f"{flag} {pattern} {needs}")


def image_pattern(pattern: str) -> str:
    """The pattern of --save_image, with .png appended if it has no extension or .pth, as in the
    original's documented command. Other extensions are a `UserError`."""
    extension = Path(pattern).suffix.lower()
    if extension in pictures.FORMATS:
        return pattern
    if extension in ("", ".pth") or "{" in extension:
        return f"{Path(pattern)}.png"
    known = ", ".join(pictures.FORMATS)
    raise UserError(f"--save_image {pattern}: {extension} is none of {known}")


def check_paths(args: Namespace) -> None:
    """Raise a `UserError` if an output could not be written, is also another flag's, or would
    replace a checkpoint that MODEL names."""
    checkpoints = {os.path.realpath(path) for path in find_files(args.model)}
    flags = {}
    for flag, path in output_paths(args):
        check_writable(path, flag)
        if os.path.realpath(path) in checkpoints:
            raise UserError(f"{flag} {path} would replace the checkpoint: give another path")
        if flags.setdefault(os.path.realpath(path), flag) != flag:
            raise UserError(f"{flag} {path} is also written by another flag: give another path")


def output_paths(args: Namespace) -> list[tuple[str, str]]:
    """(flag, path) of each figure and of the files of the first and the last image."""
    paths = [("--save_grid", args.save_grid), ("--save_surprisal", args.save_surprisal)]
    for n in {0, len(args.index) - 1}:
        paths += [(flag, path) for flag, _, path in image_files(args, n)]
    return [(flag, path) for flag, path in paths if path]


def unfinished_samples(
    args: Namespace, model: ImageTransformer, given: torch.Tensor, options: dict
) -> UnfinishedSamples:
    """Where images are kept until all are written, beside the first output, if they take several
    batches, or did before an interruption. The model, the given bytes (N, offset) and the options
    determine them."""
    path = None
    if is_first_process():
        weights = model.state_dict().values()
        name = digest(*weights, model.config, args.backend, given, given.shape, options)
        _, first = (output_paths(args) or [("--plot", "figure")])[0]
        folder = Path(first).parent / f"unfinished-{name}"
        several = len(given) > args.batch_size * distributed.world_size()
        path = folder if several or folder.exists() else None
    return UnfinishedSamples(path, len(given))


def image_files(args: Namespace, n: int) -> Iterator[tuple[str, str, str]]:
    """(flag, kind of picture, path) of each file of --save_image and --save_gif of image n."""
    if args.save_image:
        for kind in ("pred",) if args.offset == 0 else ("pred", "real"):
            yield "--save_image", kind, image_pattern(args.save_image).format(kind, n)
    if args.save_gif:
        yield "--save_gif", "animation", args.save_gif.format(n)


def check_figure_size(args: Namespace) -> None:
    """Raise a `UserError` if a figure would have too many images."""
    images, rows = len(args.index), 1 if args.offset == 0 else len(set(args.index))
    if images > MAX_FIGURE_IMAGES or rows > MAX_FIGURE_ROWS:
        raise UserError(
            f"--index asks for {images} images, and a figure has at most {MAX_FIGURE_IMAGES} "
            f"and {MAX_FIGURE_ROWS} different ones: use --save_image, or fewer images"
        )


def check_display() -> None:
    """Raise a `UserError` if matplotlib cannot open a window."""
    try:
        import matplotlib.pyplot as plt  # raises ValueError for an unknown MPLBACKEND
        from matplotlib.backends import BackendFilter, backend_registry

        plt.switch_backend(plt.get_backend())  # raises ImportError for one that cannot run here
        reason = f"matplotlib's backend is {plt.get_backend()}"
        windows = backend_registry.list_builtin(BackendFilter.INTERACTIVE)
        found = plt.get_backend().lower() in map(str.lower, windows)
    except (ImportError, ValueError) as error:
        reason, found = one_line(error), False
    if not found:
        way_out = "use --save_grid FILE, or a desktop session"
        raise UserError(f"--plot finds no display ({reason}): {way_out}")


class Outputs:
    """Writes and shows what the output flags ask for: image files and animations while images are
    sampled, figures in the end.

    `real` are the images (N, L), uint8, None with --offset 0, of a `shape` (H, W) or (H, W, 3). An
    output that fails does not lose the others: `finish` raises the first error.
    """

    def __init__(
        self, args: Namespace, real: torch.Tensor | None, shape: tuple[int, ...], offset: int
    ):
        self.args, self.shape, self.offset = args, shape, offset
        self.real, self.completed = real, []
        self.count, self.written, self.errors = 0, [], []

    def add(self, completed: torch.Tensor) -> None:
        """Write the files of the next completed images (n, L)."""
        had_errors = bool(self.errors)
        for n, image in enumerate(track(completed, "writing image"), self.count):
            for _, kind, name in image_files(self.args, n):
                with keep_error(self.errors):
                    self.write(kind, Path(name), image if kind != "real" else self.real[n])
        self.completed.append(completed)
        self.count += len(completed)
        if self.errors and not had_errors and self.count < len(self.args.index):
            warn(f"sampling continues after an error: {one_line(self.errors[0])}")

    def write(self, kind: str, path: Path, image: torch.Tensor) -> None:
        image = image.view(self.shape).numpy()
        if kind == "animation":
            pictures.save_gif(path, image, self.offset, self.args.gif_seconds)
        else:
            pictures.save_image(path, image)
        self.written.append(path)

    def finish(self, bits_of: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Write and show the figures. `bits_of(images)` is what the bytes of images (N, L) cost,
        (N, L), in bits."""
        args, real = self.args, self.real
        if written := self.written:
            say(f"wrote {written[0]}" + (f" to {written[-1]}" if len(written) > 1 else ""))
        completed = torch.cat(self.completed)
        originals = None if real is None else real.view(-1, *self.shape).numpy()
        if args.save_grid or args.plot:
            with keep_error(self.errors):
                caption = describe_samples(args, completed, real, self.offset, bits_of)
                completions = completed.view(-1, *self.shape).numpy()
                write_samples(args, completions, originals, self.offset, caption, self.errors)
        if args.save_surprisal:
            with keep_error(self.errors):
                write_surprisal(args, originals, bits_of(real))
        if len(self.errors) > 1:
            warn(f"{len(self.errors)} outputs could not be written; the error is that of the first")
        if self.errors:
            raise self.errors[0]


@contextmanager
def keep_error(errors: list[Exception]) -> Iterator[None]:
    """Add an exception to the list instead of raising it."""
    try:
        yield
    except Exception as error:
        errors.append(error)


def describe_samples(
    args: Namespace,
    completed: torch.Tensor,
    real: torch.Tensor | None,
    offset: int,
    bits_of: Callable[[torch.Tensor], torch.Tensor],
) -> str:
    """The caption of the figure: how the samples were drawn and, on a second line, the model's
    bits/dim of them, without the given bytes and, as everywhere, the first."""
    length, first = completed.shape[1], max(1, offset)
    text = f"seed {args.seed}, offset {offset}, temperature {args.temperature:g}"
    if first == length:
        return f"{text}\nall bytes are given"
    text += f"\nbits/dim of bytes {first + 1} to {length}: "
    text += f"samples {bits_of(completed)[:, first:].mean():.3f}"
    return text if real is None else f"{text}, real images {bits_of(real)[:, first:].mean():.3f}"


def write_samples(
    args: Namespace,
    completions: np.ndarray,
    originals: np.ndarray | None,
    offset: int,
    caption: str,
    errors: list[Exception],
) -> None:
    """Write --save_grid and show --plot."""
    if args.plot:
        import matplotlib.pyplot as plt
    announce_figure(len(completions))
    figure = plt.figure() if args.plot else figures.new_figure()
    figures.draw_samples(figure, args.index, completions, originals, offset, caption)
    if args.save_grid:
        with keep_error(errors):  # a window may show what no file can hold
            figures.save_figure(figure, args.save_grid)
            say(f"wrote {args.save_grid} ({'; '.join(caption.splitlines())})")
    if args.plot:
        plt.show()


def announce_figure(n_images: int) -> None:
    """Say that a figure is drawn, if that takes seconds."""
    if n_images > SLOW_FIGURE_IMAGES:
        say(f"drawing a figure of {n_images} images")


def write_surprisal(args: Namespace, images: np.ndarray, bits: torch.Tensor) -> None:
    """Write --save_surprisal of images (N, H, W) or (N, H, W, 3), bits (N, L) of their bytes."""
    different = {i: n for n, i in enumerate(args.index)}  # an image is shown once
    numbers = list(different.values())
    images, bits = images[numbers], bits[numbers].numpy()
    announce_figure(len(images))
    caption = f"surprisal: {bits[:, 1:].mean():.4f} bits/dim, {bits.mean():.4f} over all bytes"
    figure = figures.surprisal_figure(images, bits, list(map(str, different)), caption)
    figures.save_figure(figure, args.save_surprisal)
    say(f"wrote {args.save_surprisal} ({caption})")
