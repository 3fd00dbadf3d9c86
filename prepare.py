"""Make a data set of a folder of pictures: train.npy, test.npy, and contact.png to look at.

python prepare.py path/to/photos own --size 32
python main.py --dataset own --recipe fast
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while torch is imported: no traceback

import warnings
from argparse import Namespace
from functools import partial
from pathlib import Path

import numpy as np

import datasets
from cli.flags import Parser, flag, path, switch
from cli.process import run
from engine import figures
from engine.progress import track
from files import check_writable, new_folder, write_atomically
from image_files import allocate, describe, files_below, fit_image, read_image
from options import SEED, Number
from utils import UserError, say

FLAGS = {
    "size": flag("height and width of the images, in pixels", Number(int, 2, 4096), 32),
    "grey": switch("make all images grey (default: only if every picture is)"),
    "test": flag(
        "the fraction of the images that become test images", Number(float, 0, 0.9, above=True), 0.1
    ),
    "seed": flag("random seed of the choice of test images", SEED, 0),
}
COLUMNS, ROWS = 10, 5  # of training images on the contact sheet, above a row of test images


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    images = read_pictures(Path(args.pictures), args.size, args.grey)
    is_test = choose_test(len(images), args.test, args.seed)
    write_dataset(Path(args.dataset), images[~is_test], images[is_test])


def parse(argv: list[str] | None) -> Namespace:
    parser = Parser(
        description="Make a data set of the pictures in a folder and the folders in it, of any "
        "size: the middle of each becomes a square, in colour unless all are grey, on white where "
        "it is transparent."
    )
    parser.add_argument(
        "pictures", type=path, help="a folder; each file that cannot be read is named"
    )
    parser.add_argument("dataset", type=path, help="a new folder, for --dataset of main.py")
    parser.add_flags("images", FLAGS)
    args = parser.parse_args(argv)
    check_folders(Path(args.pictures), Path(args.dataset))
    return args


def check_folders(pictures: Path, dataset: Path) -> None:
    """Raise a `UserError` unless one folder can be read and the other be made beside it."""
    if not pictures.is_dir():
        raise UserError(f"{pictures} is no folder: give one with pictures")
    if dataset.resolve().is_relative_to(pictures.resolve()):
        raise UserError(f"{dataset} is in the folder of the pictures: give another place for it")
    check_writable(dataset / "train.npy", "the data set's")
    if dataset.exists() and any(dataset.iterdir()):
        raise UserError(f"{dataset} is not empty: give a new folder, or delete it")


def read_pictures(folder: Path, size: int, grey: bool) -> np.ndarray:
    """The pictures below `folder`, (n, size, size) if all are grey, else (n, size, size, 3), uint8.
    A file that is left out is named with the reason."""
    paths = files_below(folder)
    images, n, enlarged = allocate_images(len(paths), size), 0, 0
    convert = partial(fit_image, size=size, grey=grey)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about damaged metadata, which the pixels do not need
        for file in track(paths, "reading picture"):
            try:
                images[n], original = read_image(file, convert)
            except UserError as error:
                say(f"left out: {error}")
            else:
                n += 1
                enlarged += min(original) < size
    if n < 2:
        raise UserError(f"{folder} holds {n} pictures that can be read: at least 2 are needed")
    if enlarged:
        say(f"{enlarged} of {n} pictures are smaller than {size}x{size} and were enlarged")
    has_colour = any((image != image[..., :1]).any() for image in images[:n])
    return images[:n] if has_colour else images[:n, ..., 0]


def allocate_images(n: int, size: int) -> np.ndarray:
    """Memory for n colour images; raises `UserError` if this machine has less."""
    try:
        return allocate((n, size, size, 3))
    except MemoryError as error:
        problem = f"{n} images of {size}x{size} do not fit in memory ({error})"
        raise UserError(f"{problem}: give fewer, or a smaller --size") from None


def choose_test(n: int, fraction: float, seed: int) -> np.ndarray:
    """Which of n images, at least one and not all, become test images: (n,), bool."""
    order = np.random.default_rng(seed).permutation(n)
    return order < min(max(1, round(fraction * n)), n - 1)


def write_dataset(folder: Path, train: np.ndarray, test: np.ndarray) -> None:
    """Write the images and a contact sheet to a new folder: all of them or nothing."""
    with new_folder(folder) as unfinished:
        for name, images in (("train.npy", train), ("test.npy", test)):
            write_atomically(unfinished / name, partial(datasets.write_array, images=images))
        write_contact_sheet(unfinished / "contact.png", train, test)
    numbers = f"{len(train)} training and {len(test)} test images of {describe(train.shape[1:])}"
    say(f"wrote {folder}: {numbers}; {folder / 'contact.png'} shows some of them")


def write_contact_sheet(path: Path, train: np.ndarray, test: np.ndarray) -> None:
    """Write a figure of training images and, in the last row, test images."""
    rows = [*spread(train, ROWS), *spread(test, 1)]
    labels = ["training", *[""] * (len(rows) - 2), "test"]
    caption = f"{len(train)} training and {len(test)} test images"
    figure = figures.new_figure()
    figures.draw_table(figure, rows, caption, labels=labels)
    figures.save_figure(figure, path)


def spread(images: np.ndarray, rows: int) -> list[np.ndarray]:
    """Images for at most the given number of rows, evenly chosen."""
    n = min(len(images), rows * COLUMNS)
    chosen = images[np.linspace(0, len(images) - 1, n).round().astype(int)]
    return np.split(chosen, range(COLUMNS, n, COLUMNS))


if __name__ == "__main__":
    run(main)
