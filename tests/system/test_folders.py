"""Data sets in folders: which files are read, how, and what is said about the others."""

import os
import socket
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from helpers import TINY, start
from PIL import Image

import datasets
import image_files
from utils import UserError

TRAIN = ["--dataset", ".", *TINY, "--iterations", 1, "--batch_size", 2]
COLOUR = np.random.default_rng(0).integers(0, 256, (4, 5, 3), np.uint8)
GREY = COLOUR[..., 0]


def write(path, pixels=GREY, mode=None, **options):
    """Write an image file, and its folders."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(path, **options)
    return path


@pytest.fixture
def folder(tmp_path):
    """The current folder: a data set of one training and one test image, grey, 4x5."""
    write("train/m.png")
    write("test/0.png")
    return tmp_path


def train_images(folder):
    return datasets.load(str(folder), ".", True).images


def test_every_file_of_an_image_folder_is_read_in_order(tmp_path):
    for i, name in enumerate(["b/0.PNG", "a.tiff", "a/1.bmp", "a/0.webp", "c.gif"]):
        write(tmp_path / "train" / name, np.full((4, 5, 3), i, np.uint8))
    data = datasets.load(str(tmp_path), ".", True)
    assert data.image_shape == (4, 5, 3)
    assert data.images[:, 0].tolist() == [3, 2, 1, 0, 4]


def test_hidden_folders_are_left_out(folder, succeed):
    """Regression: the images of .ipynb_checkpoints/ were read and moved the indices."""
    write("train/.ipynb_checkpoints/a.png", COLOUR)
    write("train/.DS_Store.png", COLOUR)
    assert ", 1 training and 1 test images" in succeed("main.py", *TRAIN).out


def test_links_to_folders_are_followed(folder, succeed):
    """Regression: a class folder that is a symbolic link was skipped without a word."""
    for i in range(3):
        write(f"elsewhere/{i}.png")
    os.symlink("../elsewhere", "train/cats")
    assert ", 4 training and 1 test images" in succeed("main.py", *TRAIN).out


@pytest.mark.parametrize("target", [".", "..", "../..", "a", "nowhere/.."])
def test_links_are_not_followed_in_circles(target, folder, succeed):
    """Also not to the folder of the test images, by way of a folder further up."""
    write("train/a/b/0.png")
    os.symlink("../../a", "train/a/b/loop")
    os.symlink(target, "train/loop")
    out = succeed("main.py", *TRAIN).out
    assert f"{folder}/train/a/b/loop is not followed" in out
    n = 3 if target == "a" else 2
    assert f", {n} training and 1 test images" in out


def test_two_folders_that_link_to_each_other(folder):
    for name, other in ("ab", "ba"):
        write(f"train/{name}/0.png")
        os.symlink(f"../{other}", f"train/{name}/{other}")
    assert len(train_images(folder)) == 5  # m, a/0, a/b/0, b/0, b/a/0


def test_files_that_are_no_images_are_left_out_with_a_line(folder, succeed):
    """Regression: labels.csv was an error about a URI. A pipe is not waited for."""
    for name in ("labels.csv", "Thumbs.db", "x/notes"):
        write(f"train/{name}", format="PNG")
    os.mkfifo("train/x/pipe")
    out = succeed("main.py", *TRAIN).out
    assert "train: left out 4 whose names are not those of images, such as Thumbs.db\n" in out
    assert ", 1 training and 1 test images" in out


def test_an_array_beside_a_folder_of_images_is_read(folder, succeed):
    np.save("train.npy", np.zeros((7, 4, 5), np.uint8))
    out = succeed("main.py", *TRAIN).out
    assert "train.npy is read, and not the folder" in out
    assert ", 7 training and 1 test images" in out


def write_bytes(path, content):
    path.write_bytes(content)


def write_half(path):
    content = write(path, COLOUR.repeat(9, 0), quality=95).read_bytes()
    path.write_bytes(content[: len(content) * 3 // 4])


def write_socket(path):
    with socket.socket(socket.AF_UNIX) as unix:
        unix.bind(os.path.relpath(path))


ANIMATION = {"save_all": True, "append_images": [Image.fromarray(255 - GREY)]}
REFUSED = {
    "a.png": (partial(write_bytes, content=b""), "it is empty"),
    "b.png": (partial(write_bytes, content=b"<!DOCTYPE html><html>"), "it is none of BMP, GIF"),
    "c.jpg": (write_half, "image file is truncated"),
    "d.png": (partial(write_bytes, content=b"\x89PNG\r\n\x1a\n broken"), "it is none of BMP, GIF"),
    "e.gif": (partial(write, **ANIMATION), "holds 2 images: save each as a file of its own"),
    "f.tif": (partial(write, **ANIMATION), "holds 2 images"),
    "g.png": (partial(write, pixels=np.dstack([COLOUR, GREY])), "has transparent pixels"),
    "h.png": (partial(write, transparency=int(GREY[0, 0])), "has transparent pixels"),
    "i.png": (partial(write, pixels=GREY.astype(np.uint16)), "8 bits per channel: convert it"),
    "j.jpg": (partial(write, mode="CMYK"), "neither grey nor RGB"),
    "k.png": (partial(write, pixels=GREY.T), "is 5x4 grey: all must have one size"),
    "l.png": (partial(write, pixels=COLOUR), "is 4x5 in colour: all must"),
    "n.png": (os.mkfifo, "is no regular file"),
    "o.png": (write_socket, "is no regular file"),
    "p.png": (partial(os.symlink, "gone"), "is a broken link"),
    "q.png": (partial(os.symlink, "/dev/zero"), "is no regular file"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_images_that_cannot_be_read_are_named_with_the_reason(name, folder, call):
    """Regression: an empty file, HTML or half a JPEG was a problem of a URI or "an unknown error",
    a GIF "1x8x8x3", and a colour image among grey ones "of another size"."""
    make, reason = REFUSED[name]
    make(folder / "train" / name)
    result = call("main.py", *TRAIN)
    assert result.status == 2
    assert f"{folder}/train/" in result.err
    assert name in result.err
    assert reason in result.err
    assert result.err.count("\n") == 1


WEB = COLOUR // 51 * 51  # colours of Pillow's default palette
OPAQUE = np.full((4, 5), 255, np.uint8)
READ = {
    "colour.gif": (COLOUR, {"pixels": COLOUR}),
    "grey.gif": (np.dstack([GREY] * 3), {}),
    "black-and-white.gif": (np.dstack([GREY // 128 * 255] * 3), {"pixels": GREY // 128 * 255}),
    "palette.png": (WEB, {"pixels": WEB, "mode": "P"}),
    "one-bit.png": (OPAQUE, {"pixels": OPAQUE, "mode": "1"}),
    "opaque-colour.png": (COLOUR, {"pixels": np.dstack([COLOUR, OPAQUE])}),
    "opaque-grey.png": (GREY, {"mode": "LA"}),
    "really-png.jpg": (COLOUR, {"pixels": COLOUR, "format": "PNG"}),
    "two-views.jpg": (OPAQUE, {"pixels": OPAQUE, "format": "MPO", **ANIMATION}),
}


@pytest.mark.parametrize("name", READ)
def test_images_are_read_as_viewers_show_them(name, tmp_path):
    """Regression: a GIF that is not animated, and images of one bit, were refused."""
    expected, options = READ[name]
    write(tmp_path / "train" / name, **options)
    data = datasets.load(str(tmp_path), ".", True)
    assert data.image_shape == expected.shape
    assert np.array_equal(data.images[0], expected.ravel())


UPRIGHT = {  # What turns the stored pixels for each orientation of EXIF.
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.T,
    6: lambda x: np.rot90(x, -1),
    7: lambda x: x[::-1, ::-1].T,
    8: lambda x: np.rot90(x),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("extension", ["jpg", "png", "tiff"])
def test_photos_are_read_upright(orientation, extension, tmp_path):
    """Regression: JPEG files with a rotation in their EXIF data were read unrotated."""
    stored = np.zeros((16, 32), np.uint8)
    stored[:8, :16], stored[8:, 16:] = 255, 100
    exif = Image.Exif()
    exif[0x112] = orientation
    write(tmp_path / "train" / f"0.{extension}", stored, exif=exif)
    data = datasets.load(str(tmp_path), ".", True)
    upright = UPRIGHT[orientation](stored)
    assert data.image_shape == upright.shape
    assert np.abs(data.images[0].numpy() - upright.ravel().astype(int)).max() < 6


def test_images_of_one_byte_are_refused(tmp_path):
    """Regression: the loss was not finite, and the advice to lower --lr."""
    write(tmp_path / "train" / "0.png", GREY[:1, :1])
    with pytest.raises(UserError, match="is a single byte"):
        train_images(tmp_path)


def test_image_files_that_exceed_the_memory(folder, call, monkeypatch):
    """Regression: the advice was to lower --batch_size. They are refused before they are read."""
    monkeypatch.setattr(image_files, "device_memory", lambda device: 30)
    write("train/n.png").write_bytes(b"not read")
    result = call("main.py", *TRAIN)
    assert result.status == 2
    assert f"the data set {folder} does not fit in memory" in result.err
    assert "as train.npy and test.npy" in result.err


def test_an_array_that_is_truncated_during_a_run(folder):
    """Regression: the process ended with SIGBUS, without a message. A file that is replaced by
    renaming does no harm."""
    np.save("train.npy", np.ones((2000, 4, 5), np.uint8))
    data = datasets.load(str(folder), ".", True)
    np.save("new.npy", np.zeros((2, 4, 5), np.uint8))
    os.rename("new.npy", "train.npy")
    assert data.batch(0, 2000, 0).all()
    data = datasets.load(str(folder), ".", True)
    os.truncate("train.npy", 130)
    with pytest.raises(UserError, match="has become shorter while it was in use"):
        data.batch(0, 2, 0)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no names of bytes")
def test_names_that_the_locale_cannot_encode(tmp_path):
    """As with LC_ALL=C, where Python reads umlauts as surrogates."""
    folder = tmp_path / "bäume"
    for name in ("train/ä.png", "train/ü.txt", "test/ö.png"):
        write(folder / name, format="PNG")
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    flags = ["--no-compile", "--save_to", "ä.pth"]
    for command in ([*TRAIN, *flags], ["--continue_from", "ä.pth", "--iterations", 2, *flags]):
        process = start("main.py", *command, cwd=folder, env=environment)
        out, err = process.communicate()
        assert process.returncode == 0, err
        assert "left out 1 whose names are not those of images" in out
