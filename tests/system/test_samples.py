"""main.py --samples: the same images, drawn at every evaluation."""

import os
import re

import imageio.v3
import numpy as np
import pytest
from helpers import DIGITS, assert_equal_weights, losses, records, require_library, run_two

from engine.pictures import GAP

TRAIN = ["main.py", *DIGITS, "--evaluate_frequency", 4, "--iterations", 8, "--log_frequency", 1]
SAMPLES = ["--samples", "look/{}.png"]


def cells(path, shape=(8, 8)):
    """The images of a picture, (rows, columns, H, W, 3), without borders and enlargement."""
    factor = 128 // max(shape)
    picture = imageio.v3.imread(path)
    size = [factor * side + 2 * GAP for side in shape]
    rows, columns = picture.shape[0] // size[0], picture.shape[1] // size[1]
    grid = picture.reshape(rows, size[0], columns, size[1], 3).swapaxes(1, 2)
    return grid[:, :, GAP:-GAP:factor, GAP:-GAP:factor]


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--recipe", "fast", "--dropout", 0.1, "--precision", "bf16"],
        ["--attention_type", "gated-linear"],
        ["--attention_type", "full", "--attention_dropout", 0.2],
        ["--no-compile"],
    ],
    ids=["linear", "fast-bf16", "gated", "full", "plain"],
)
def test_samples_do_not_change_the_training(flags, call, succeed):
    """Losses and weights, bit for bit, with dropout, also of a run that was interrupted."""
    command = [*TRAIN, *flags]
    whole = ["--save_to", "whole.pth", "--metrics_file", "whole.jsonl"]
    succeed(*command, *whole)
    part = ["--save_to", "part.{}.pth", "--continue_from", "part.{}.pth", *SAMPLES]
    part += ["--metrics_file", "part.jsonl"]
    assert call(*command, *part, "--yield_frequency", 5).status == 75
    assert os.listdir("look") == ["4.png"]
    succeed(*command, *part)
    assert sorted(os.listdir("look")) == ["4.png", "8.png"]
    assert losses("part.jsonl") == losses("whole.jsonl")
    assert_equal_weights("part.8.pth", "whole.pth")


def test_the_pictures_are_those_of_prediction(succeed):
    """New images, then the given half, completions and test images, of the last checkpoint; the
    rows of real images are the same at every evaluation."""
    succeed(*TRAIN, *SAMPLES, "--lr", 1e-2, "--save_to", "w.pth")
    for name, offset in (("new", 0), ("half", 32)):
        files = ["--save_image", name + ".{}.{}.png"]
        succeed("prediction.py", "w.pth", "--index", "0-8", "--offset", offset, *files)
    new, given, completed, real = cells("look/8.png")
    read = {}
    for name in ("new.pred", "half.pred", "half.real"):
        read[name] = np.stack([imageio.v3.imread(f"{name}.{i}.png") for i in range(8)])
    assert np.array_equal(new[..., 0], read["new.pred"])
    assert np.array_equal(completed[..., 0], read["half.pred"])
    assert np.array_equal(real[..., 0], read["half.real"])
    before = cells("look/4.png")
    assert np.array_equal(before[1], given)
    assert np.array_equal(before[3], real)
    assert not np.array_equal(before[0], new)


def test_colour_images_of_a_small_data_set(colour_folder, succeed):
    """It has four test images; a pattern without {} is one file, which shows the last ones."""
    data = ["--dataset", colour_folder, "--recipe", "fast"]
    result = succeed(*TRAIN, *data, "--samples", "now.png")
    assert re.findall(r"iteration (\d+): drew now.png", result.out) == ["4", "8"]
    new, given, completed, real = cells("now.png", (6, 5))
    assert np.array_equal(real, np.load(colour_folder / "test.npy"))
    assert np.array_equal(completed[:, :3], real[:, :3])
    assert new.shape == given.shape == (4, 6, 5, 3)


def test_tensorboard_shows_the_pictures(succeed):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    succeed(*TRAIN, *SAMPLES, "--log_dir", "board")
    images = EventAccumulator("board").Reload().Images("samples")
    assert [event.step for event in images] == [4, 8]
    picture = imageio.v3.imread(images[1].encoded_image_string)
    assert np.array_equal(picture, imageio.v3.imread("look/8.png"))


def test_the_first_of_two_processes_draws(succeed):
    """As one process does, but for bytes that differ in rounding."""
    options = ["--batch_size", 8, *SAMPLES]
    assert run_two(*TRAIN, *options).count("drew look/8.png") == 1
    two = cells("look/8.png")
    succeed(*TRAIN, *options)
    assert np.mean(two != cells("look/8.png")) < 0.02


def test_the_other_backend(call, succeed):
    """Its recurrence is slow but draws the same; the reformer has none."""
    require_library()
    backend = [*TRAIN, *SAMPLES, "--backend", "fast-transformers"]
    succeed(*backend)
    assert cells("look/8.png").shape == (4, 8, 8, 8, 3)
    result = call(*backend, "--attention_type", "reformer")
    assert result.status == 2
    assert "--samples would take minutes with --attention_type reformer" in result.err


def test_a_picture_that_cannot_be_written_is_a_warning(succeed, full_disk):
    """And the run goes on: after hours it must not end because of a picture."""
    result = succeed(*TRAIN, "--samples", full_disk / "{}.png", "--metrics_file", "m.jsonl")
    unwritten = re.findall(r"warning: \S*(\d).png cannot be written \(No space", result.err)
    assert unwritten == ["4", "8"]
    assert records("m.jsonl")[-1]["iteration"] == 8


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--samples", "w.{}"], "must end in one of .png"),
        (["--samples", "w.{x}.png"], "is not a valid pattern"),
        (["--samples", "/dev/null/{}.png"], "--samples /dev/null/0.png cannot be written"),
        (["--samples", "w.png", "--save_to", "./w.png"], "--samples and --save_to name one file"),
        (["--samples", "w.png", "--continue_from", "w", "--evaluate_only"], "has no effect"),
    ],
)
def test_wrong_input_is_one_line(flags, words, call):
    result = call(*TRAIN[:1], *flags)
    assert (result.status, result.err.count("\n")) == (2, 1)
    assert words in result.err
