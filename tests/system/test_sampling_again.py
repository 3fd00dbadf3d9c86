"""An image can be drawn again by its number, and an interrupted sampling continues."""

import os
import re

import imageio.v3
import numpy as np
import pytest
from helpers import run_two

from engine import pictures, progress, unfinished


@pytest.fixture
def sample(succeed, tiny_checkpoint):
    """Sample with flags; returns the images (N, H, W) written with --save_image, and stdout."""

    def run(*flags):
        out = succeed("prediction.py", tiny_checkpoint, *flags, "--save_image", "{}.{}.png").out
        return read_images(), out

    return run


def read_images():
    """The samples in the current folder, which are removed."""
    names = [f"pred.{n}.png" for n in range(sum(name[:5] == "pred." for name in os.listdir()))]
    images = np.stack([imageio.v3.imread(name) for name in names])
    for name in os.listdir():
        if name.endswith(".png"):
            os.remove(name)
    return images


@pytest.mark.parametrize("offset", [0, 20])
def test_an_image_does_not_depend_on_the_others(sample, offset):
    """Regression: the noise followed the place in the list, so that --index 5 drew another image
    than the last of --index 0-6."""
    images, _ = sample("--index", "0-6", "--offset", offset)
    assert np.array_equal(sample("--index", "5", "--offset", offset)[0], images[5:])
    some, _ = sample("--index", "4,2,4,3,4", "--offset", offset)
    assert np.array_equal(some[[0, 1, 3]], images[[4, 2, 3]])
    four, _ = sample("--index", "4*3", "--offset", offset)
    assert np.array_equal(four, some[[0, 2, 4]])
    assert len({image.tobytes() for image in four}) == 3


SIX = ["--index", "0-6", "--offset", 8, "--batch_size", 2]


@pytest.fixture
def interrupted(call, tiny_checkpoint, monkeypatch):
    """Ctrl-C while the fourth of six images is written; returns what was printed."""
    count, save = [], pictures.save_image

    def save_three(path, image):
        count.append(path)
        if len(count) == 7:  # each image has two files
            raise KeyboardInterrupt
        save(path, image)

    with monkeypatch.context() as patch:
        patch.setattr(pictures, "save_image", save_three)
        result = call("prediction.py", tiny_checkpoint, *SIX, "--save_image", "{}.{}.png")
    assert result.status == 130
    return result.out


def test_images_are_written_as_they_are_finished(interrupted):
    """Regression: all were written after the last, and Ctrl-C lost them."""
    files = {name for name in os.listdir() if name.endswith(".png")}
    assert files == {f"{kind}.{n}.png" for kind in ("pred", "real") for n in range(3)}


def test_an_interrupted_sampling_continues(interrupted, sample):
    folder = re.search(r"4 of 6 images are finished, in (unfinished-\w+): the same", interrupted)[1]
    assert os.path.isdir(folder)
    # Another seed, other bytes and other numbers are other images.
    for other in (["--seed", 1], ["--offset", 9], ["--index", "0-5"], ["--temperature", 0.5]):
        assert "continuing" not in sample(*SIX, *other)[1]
    images, out = sample(*SIX, "--batch_size", 1)
    assert "continuing: 4 of 6 images were finished before" in out
    assert "sampled 2 images" in out
    assert not os.path.exists(folder)
    again, out = sample(*SIX)
    assert "sampled 6 images" in out
    assert np.array_equal(images, again)


def test_a_larger_batch_continues(interrupted, sample):
    """Regression: one batch for all images neither read those that were finished nor removed
    them."""
    _, out = sample(*SIX, "--batch_size", 6)
    assert "continuing: 4 of 6 images were finished before" in out
    assert not os.listdir()


def test_a_damaged_batch_is_drawn_again(interrupted, sample):
    """Regression: a file that a power failure had cut off was a traceback at every retry."""
    folder = next(name for name in os.listdir() if name.startswith("unfinished"))
    os.truncate(f"{folder}/2.npy", 100)
    images, out = sample(*SIX)
    assert "continuing: 2 of 6 images were finished before" in out
    assert np.array_equal(images, sample(*SIX)[0])


def test_two_processes_continue(interrupted, sample, tiny_checkpoint):
    flags = [*SIX, "--batch_size", 1, "--save_image", "{}.{}.png"]
    out = run_two("prediction.py", tiny_checkpoint, *flags)
    assert "continuing: 4 of 6 images were finished before" in out
    assert np.array_equal(read_images(), sample(*SIX)[0])
    assert not os.listdir()


def test_a_disk_that_fills_up_leaves_no_folder(succeed, tiny_checkpoint, monkeypatch):
    """Regression: the batches that had been kept before stayed there for ever."""
    write, files = unfinished.write_atomically, []

    def write_one(path, content, durable):
        files.append(path)
        if len(files) > 1:
            raise OSError("no space left")
        write(path, content, durable)

    monkeypatch.setattr(unfinished, "write_atomically", write_one)
    result = succeed("prediction.py", tiny_checkpoint, *SIX, "--save_image", "{}.{}.png")
    assert result.err == (
        "warning: no space left: an interruption will lose the images from number 2 on\n"
    )
    assert len(files) == 2
    assert not [name for name in os.listdir() if name.startswith("unfinished")]
    assert len(read_images()) == 6


def test_what_is_kept_needs_no_space(call, tiny_checkpoint, full_disk):
    """A disk without space for what an interruption would need is no error."""
    result = call("prediction.py", tiny_checkpoint, *SIX, "--save_image", full_disk / "{}.{}.png")
    assert result.status == 1
    first, second, third, last = result.err.splitlines()
    assert "an interruption will lose the images from number 0 on" in first
    assert "sampling continues after an error" in second
    assert third == "warning: 12 outputs could not be written; the error is that of the first"
    assert "No space left" in last


def test_every_part_shows_progress(sample, monkeypatch):
    """Regression: 300 animations took 25 seconds without a word, and so did long prefixes and the
    bits/dim of the caption."""
    monkeypatch.setattr(progress, "SECONDS_PER_LINE", 0)
    flags = ["--index", "0-3", "--save_gif", "{}.gif", "--save_grid", "grid.png"]
    _, out = sample(*flags, "--offset", 60, "--batch_size", 2)
    counts = [int(n) for n in re.findall(r"^(\d+) of 189 bytes", out, re.MULTILINE)]
    assert counts[0] == 2 * 59  # the given bytes of the first batch
    assert counts[-1] == 3 * 63
    assert "writing image 2 of 2" in out
    assert out.count("evaluating batch 1 of 1") == 2  # samples and real images
    _, out = sample("--index", "0*101", "--offset", 60, "--save_grid", "grid.png")
    assert "drawing a figure of 101 images" in out
