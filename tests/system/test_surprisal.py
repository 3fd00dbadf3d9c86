"""--save_surprisal: the bits that every byte costs, and the figure of them."""

import re

import numpy as np
import pytest
import torch
from helpers import TINY

import datasets
from engine import figures
from layers import mixture
from prediction import load_model, surprisal


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were drawn."""
    drawings = []
    save = figures.save_figure
    monkeypatch.setattr(
        figures, "save_figure", lambda figure, path: drawings.append(figure) or save(figure, path)
    )
    return drawings


def cells(drawing):
    """(title, values) of each image of a figure, and the axis of its colour bar."""
    *axes, bar = drawing.axes
    shown = [axis for axis in axes if axis.images]
    return [(axis.get_title(), axis.images[0].get_array()) for axis in shown], bar


@torch.no_grad()
def test_the_surprisal_is_that_of_the_exact_probabilities(tiny_checkpoint):
    """For all bytes, the first by its histogram: predicted byte by byte, from each prefix."""
    model = load_model(tiny_checkpoint)
    images = datasets.load("digits", ".", False).images[:80]  # more than at once
    bits = surprisal(model, images)
    assert bits.shape == (80, 64)
    for position in range(1, 64):
        probabilities = mixture.probabilities(model.predict_next(images[:, :position]))  # (N, 256)
        exact = -probabilities.gather(1, images[:, position, None].long())[:, 0].log2()
        assert (bits[:, position] - exact).abs().max() < 1e-3
    counts = datasets.load("digits", ".", True).first_byte_counts()
    probabilities = (counts + 1 / 256) / (counts.sum() + 1)
    assert probabilities.sum() == pytest.approx(1)
    expected = -probabilities[images[:, 0].long()].log2()
    assert torch.allclose(bits[:, 0].float(), expected)


def test_the_figure_shows_the_bits_that_an_evaluation_reports(succeed, tiny_checkpoint, drawn):
    command = ["prediction.py", tiny_checkpoint, "--index", "0-20", "--save_surprisal", "s.png"]
    out = succeed(*command).out
    evaluate = ["--continue_from", tiny_checkpoint, "--evaluate_only", "--evaluate_images", 20]
    line = re.search(r"test (.*) bits/dim \((.*) over all", succeed("main.py", *evaluate).out)
    reported = [float(number) for number in line.groups()]
    shown = re.search(r"wrote s.png \(.* (\d.*) bits/dim, (.*) over all bytes\)", out)
    assert [float(number) for number in shown.groups()] == pytest.approx(reported, abs=1.1e-4)
    maps = [values for _, values in cells(drawn[0])[0][1::2]]
    assert np.mean(maps) == pytest.approx(reported[1], abs=1e-4)
    without_first = [values.ravel()[1:].mean() for values in maps]
    assert np.mean(without_first) == pytest.approx(reported[0], abs=1e-4)
    titles = [title for title, _ in cells(drawn[0])[0][1::2]]
    assert titles == [f"{mean:.3f} bits/dim" for mean in without_first]


def test_the_images_stand_beside_their_maps(succeed, tiny_checkpoint, drawn):
    """One scale for all maps; an image that is asked for twice is shown once."""
    succeed("prediction.py", tiny_checkpoint, "--index", "7,3*3,5", "--save_surprisal", "s.png")
    shown, bar = cells(drawn[0])
    assert [title for title, _ in shown[::2]] == ["7", "3", "5"]
    real = datasets.load("digits", ".", False).images.view(-1, 8, 8)[[7, 3, 5]].numpy()
    assert np.array_equal([values for _, values in shown[::2]], real)
    highest = max(values.max() for _, values in shown[1::2])
    limits = {axis.images[0].get_clim() for axis in drawn[0].axes if "bits" in axis.get_title()}
    assert limits == {(0, highest)}
    assert "bits" in bar.get_ylabel()


def test_the_map_of_a_colour_image_sums_its_channels(succeed, colour_folder, drawn):
    model = ["-", "--dataset", colour_folder, *TINY]
    out = succeed("prediction.py", *model, "--index", "0-2", "--save_surprisal", "s.pdf").out
    shown, _ = cells(drawn[0])
    assert [values.shape for _, values in shown] == 2 * [(6, 5, 3), (6, 5)]
    total = float(re.search(r"(\d+\.\d+) over all bytes", out)[1])
    bits = np.mean([values.sum() / 90 for _, values in shown[1::2]])
    assert bits == pytest.approx(total, abs=1e-4)


def test_alone_it_samples_nothing(succeed, tiny_checkpoint, tmp_path):
    out = succeed("prediction.py", tiny_checkpoint, "--save_surprisal", "s.png").out
    assert "sampled" not in out
    assert [path.name for path in tmp_path.iterdir()] == ["s.png"]


def test_it_is_written_beside_samples(succeed, tiny_checkpoint, tmp_path):
    flags = ["--save_surprisal", "s.png", "--save_grid", "grid.png", "--offset", 60]
    out = succeed("prediction.py", tiny_checkpoint, *flags, "--training_set").out
    assert "sampled 1 image, 4 bytes" in out
    assert {path.name for path in tmp_path.iterdir()} == {"s.png", "grid.png"}
