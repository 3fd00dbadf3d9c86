"""prepare.py: a data set of a folder of pictures of any size, mode and format."""

import os
import re

import imageio.v3
import numpy as np
import pytest
from helpers import TINY
from PIL import Image

from engine import figures


def picture(path, pixels, mode=None, **options):
    """Write a picture, and its folders."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    image = Image.fromarray(np.asarray(pixels))
    (image.convert(mode) if mode else image).save(path, **options)


def plain(colour, height=20, width=20):
    return np.full((height, width, 3), colour, np.uint8)


RED, BLUE = (200, 40, 30), (10, 60, 220)


@pytest.fixture
def pictures(tmp_path):
    """Ten plain pictures in five colours, formats and sizes."""
    extensions = ["png", "jpg", "webp", "bmp", "tiff"]
    for n in range(10):
        colour = (20 * n, 100, 255 - 20 * n)
        picture(f"pictures/{n}.{extensions[n % 5]}", plain(colour, 40 + n, 60 - n))
    return tmp_path / "pictures"


def prepared(folder="own"):
    """The training and the test images, together, in the order of their first byte."""
    images = np.concatenate([np.load(f"{folder}/{split}.npy") for split in ("train", "test")])
    return images[np.argsort(images[:, 0, 0, 0] if images.ndim == 4 else images[:, 0, 0])]


def test_pictures_become_a_data_set_that_trains(pictures, succeed):
    out = succeed("prepare.py", pictures, "own", "--size", 8, "--test", 0.2).out
    assert "wrote own: 8 training and 2 test images of 8x8x3; own/contact.png shows some" in out
    assert sorted(os.listdir("own")) == ["contact.png", "test.npy", "train.npy"]
    assert sorted(os.listdir()) == ["own", "pictures"]
    expected = np.array([(20 * n, 100, 255 - 20 * n) for n in range(10)])
    assert np.abs(prepared().astype(int) - expected[:, None, None]).max() < 5  # JPEG and WebP
    assert imageio.v3.imread("own/contact.png").std() > 20
    out = succeed("main.py", "--dataset", "own", *TINY, "--iterations", 1, "--save_to", "w.pth").out
    assert "own, 8 training and 2 test images of 8x8x3" in out


def test_the_seed_and_the_fraction_choose_the_test_images(pictures, succeed):
    chosen = []
    for n, flags in enumerate([[], ["--seed", 0], ["--seed", 1], ["--test", 0.001]]):
        succeed("prepare.py", pictures, f"own{n}", *flags)
        chosen.append(np.load(f"own{n}/test.npy"))
        assert len(np.load(f"own{n}/train.npy")) == 9
    assert np.array_equal(chosen[0], chosen[1])
    assert not np.array_equal(chosen[0], chosen[2])
    assert len(chosen[3]) == 1


TRANSPARENT = np.dstack([plain(RED), np.r_[np.zeros((10, 20)), np.full((10, 20), 255)]])
STRIPES = np.repeat([40, 200], 10).astype(np.uint8) + np.zeros((20, 1), np.uint8)
ORIENTED = Image.Exif()
ORIENTED[0x112] = 6  # to be turned clockwise
WEB = (204, 51, 51)  # a colour of Pillow's default palette
# The pixels that are stored, how, and the upper and the lower half of what they become.
KINDS = {
    "rgba.png": (TRANSPARENT.astype(np.uint8), {}, [(255, 255, 255), RED]),
    "palette.png": (plain(WEB), {"mode": "P"}, [WEB, WEB]),
    "cmyk.tif": (plain(RED), {"mode": "CMYK"}, [RED, RED]),
    "one-bit.png": (STRIPES.T // 128 * 255, {"mode": "1"}, [(0,) * 3, (255,) * 3]),
    "16-bit.png": (STRIPES.T.astype(np.uint16) * 257, {}, [(40,) * 3, (200,) * 3]),
    "16-bit.tif": (STRIPES.T.astype(np.uint16) * 257, {}, [(40,) * 3, (200,) * 3]),
    "grey-alpha.png": (STRIPES.T, {"mode": "LA"}, [(40,) * 3, (200,) * 3]),
    "turned.jpg": (STRIPES[:, ::-1], {"exif": ORIENTED, "quality": 95}, [(200,) * 3, (40,) * 3]),
    "wide.png": (np.hstack([plain(BLUE), plain(RED), plain(BLUE)]), {}, [RED, RED]),
    "no-extension": (plain(RED), {"format": "PNG"}, [RED, RED]),
    "folder/small.png": (plain(RED, 2, 2), {}, [RED, RED]),
}


@pytest.mark.parametrize("name", KINDS)
def test_pictures_of_any_kind_are_read_as_viewers_show_them(name, succeed):
    pixels, options, halves = KINDS[name]
    picture(f"pictures/{name}", pixels, **options)
    picture("pictures/another.png", plain(BLUE))
    out = succeed("prepare.py", "pictures", "own", "--size", 4).out
    assert "left out" not in out
    assert ("1 of 2 pictures are smaller than 4x4 and were enlarged" in out) == ("small" in name)
    blue = (prepared() == BLUE).all((1, 2, 3))
    (image,) = prepared()[~blue].astype(int)
    assert np.abs(image - np.repeat(halves, 2, 0)[:, None]).max() <= 20  # a filter blurs edges


def test_images_are_grey_if_all_pictures_are(succeed):
    """Also where they are stored in colour."""
    for n in range(3):
        picture(f"pictures/{n}.png", plain((50 * n,) * 3))
    assert "test images of 4x4;" in succeed("prepare.py", "pictures", "own", "--size", 4).out
    assert prepared().shape == (3, 4, 4)
    assert prepared()[:, 0, 0].tolist() == [0, 50, 100]
    picture("pictures/3.png", plain(RED))
    assert "of 4x4x3;" in succeed("prepare.py", "pictures", "colour", "--size", 4).out
    succeed("prepare.py", "pictures", "grey", "--size", 4, "--grey")
    luma = round(0.299 * RED[0] + 0.587 * RED[1] + 0.114 * RED[2])
    assert prepared("grey")[:, 0, 0].tolist() == [0, 50, luma, 100]


def test_pictures_are_averaged_when_they_become_smaller(succeed):
    """A chessboard of single pixels becomes grey. Without a filter it would be black or white."""
    board = (np.indices((32, 32)).sum(0) % 2 * 255).astype(np.uint8)
    for n in range(2):
        picture(f"pictures/{n}.png", board)
    succeed("prepare.py", "pictures", "own", "--size", 8)
    assert np.abs(prepared().astype(int) - 127).max() <= 2


def test_every_file_that_is_left_out_is_named_with_the_reason(pictures, succeed):
    for name in ("labels.csv", "photo.heic"):
        (pictures / name).write_bytes(b"not an image")
    (pictures / "empty.png").touch()
    (pictures / ".hidden").touch()
    os.mkfifo(pictures / "pipe")
    more = {"save_all": True, "append_images": [Image.fromarray(plain(BLUE))]}
    picture(pictures / "moving.gif", plain(RED), **more)
    picture(pictures / "float.tif", np.ones((9, 9), np.float32))
    out = succeed("prepare.py", pictures, "own").out
    left_out = re.findall(r"^left out: \S*/pictures/(\S*) (.*)$", out, re.MULTILINE)
    reasons = {
        "empty.png": "it is empty",
        "float.tif": "32 bits per pixel",
        "labels.csv": "none of BMP, GIF, JPEG, PNG, PPM, TIFF, WEBP",
        "moving.gif": "holds 2 images",
        "photo.heic": "none of BMP",
        "pipe": "no regular file",
    }
    assert [name for name, _ in left_out] == sorted(reasons)
    for name, reason in left_out:
        assert reasons[name] in reason
    assert "9 training and 1 test images" in out


def test_bad_input_is_refused_before_pictures_are_read(call, pictures, monkeypatch, tmp_path):
    monkeypatch.setattr("prepare.read_image", None)
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "train.npy").touch()
    (tmp_path / "file").touch()
    for arguments, reason in [
        (["nowhere", "own"], "nowhere is no folder"),
        ([pictures, "there"], "there is not empty: give a new folder, or delete it"),
        ([pictures, pictures], "is in the folder of the pictures"),
        ([pictures, pictures / "own"], "is in the folder of the pictures"),
        ([pictures, "file"], "cannot be written"),
        ([pictures, "own", "--size", 1], "argument --size: 1 is out of range"),
        ([pictures, "own", "--test", 1], "argument --test: 1 is out of range"),
    ]:
        result = call("prepare.py", *arguments)
        assert (result.status, result.err.count("\n")) == (2, 1)
        assert reason in result.err
    assert sorted(os.listdir()) == ["file", "pictures", "there"]


def test_too_few_pictures(call, tmp_path):
    picture("pictures/0.png", plain(RED))
    (tmp_path / "pictures" / "1.png").touch()
    result = call("prepare.py", "pictures", "own")
    assert result.status == 2
    assert "pictures holds 1 pictures that can be read: at least 2 are needed" in result.err


def test_more_pictures_than_fit_in_memory_are_refused(call, pictures, monkeypatch):
    monkeypatch.setattr("image_files.device_memory", lambda device: 30)
    result = call("prepare.py", pictures, "own")
    assert result.status == 2
    assert "10 images of 32x32 do not fit in memory" in result.err


def test_an_interruption_leaves_nothing(call, pictures, monkeypatch):
    def interrupt(*arguments):
        assert os.listdir(next(name for name in os.listdir() if name.startswith("unfinished")))
        raise KeyboardInterrupt

    monkeypatch.setattr(figures, "save_figure", interrupt)
    assert call("prepare.py", pictures, "own").status == 130
    assert os.listdir() == ["pictures"]


def test_a_full_disk_leaves_nothing(call, pictures, full_disk):
    result = call("prepare.py", pictures, full_disk / "own")
    assert result.status == 1
    assert "No space left on device" in result.err
    assert os.listdir(full_disk) == ["filler"]
