"""main.py --validation: training images that are held out, to choose flags with."""

import numpy as np
import pytest
from helpers import DIGITS, assert_equal_weights, load, records, weights

import datasets
from engine import training

TRAIN = ["main.py", *DIGITS, "--iterations", 4]


@pytest.fixture
def numbered(tmp_path):
    """A data set of 40 + 4 images of 2x2 whose bytes are all an image's number; those of the test
    images are 255."""
    folder = tmp_path / "numbered"
    folder.mkdir()
    train = np.arange(40, dtype=np.uint8)
    np.save(folder / "train.npy", np.broadcast_to(train[:, None, None], (40, 2, 2)))
    np.save(folder / "test.npy", np.full((4, 2, 2), 255, np.uint8))
    return folder


@pytest.fixture
def seen(monkeypatch):
    """The numbers of the images that are trained on, in order, and of those evaluated."""
    seen = {"training": [], "evaluation": []}
    batch, evaluate = datasets.ImageDataset.batch, training.evaluate

    def recorded_batch(self, *arguments):
        images = batch(self, *arguments)
        seen["training"] += images[:, 0].tolist()
        return images

    def recorded_evaluation(nll, images, **options):
        seen["evaluation"].append(images[:, 0].tolist())
        return evaluate(nll, images, **options)

    monkeypatch.setattr(datasets.ImageDataset, "batch", recorded_batch)
    monkeypatch.setattr("main.evaluate", recorded_evaluation)
    return seen


def run(succeed, seen, *flags):
    """What a run of two epochs trains on and evaluates."""
    seen["training"].clear()
    seen["evaluation"].clear()
    command = ["main.py", *DIGITS[2:-2], "--iterations", 8, "--batch_size", 8, *flags]
    out = succeed(*command).out
    return out, list(seen["training"]), list(seen["evaluation"][-1])


@pytest.mark.parametrize("flags", [[], ["--no_shuffle"]], ids=["shuffled", "in-order"])
def test_images_that_are_held_out_are_evaluated_and_not_trained_on(flags, numbered, succeed, seen):
    """Every other one is trained on twice in two epochs; the histogram is that of those."""
    data = ["--dataset", numbered, "--validation", 8, "--save_to", "w.pth", *flags]
    out, trained, held_out = run(succeed, seen, *data)
    assert len(set(held_out)) == 8
    assert "32 training and 8 validation images of 2x2" in out
    assert "iteration 8: validation " in out
    others = sorted(set(range(40)) - set(held_out))
    assert sorted(trained) == sorted(2 * others)
    assert load("w.pth")["first_byte_counts"].nonzero()[:, 0].tolist() == others
    if flags:
        assert trained == 2 * others


def test_the_seed_chooses_them(numbered, succeed, seen):
    """The same ones with the same seed; with fewer, the first of them."""
    data = ["--dataset", numbered, "--validation"]
    _, _, eight = run(succeed, seen, *data, 8)
    assert run(succeed, seen, *data, 8, "--lr", 1e-3)[2] == eight
    assert run(succeed, seen, *data, 3)[2] == eight[:3]
    assert run(succeed, seen, *data, 8, "--evaluate_images", 3)[2] == eight[:3]
    assert run(succeed, seen, *data, 8, "--seed", 1)[2] != eight
    out, _, test = run(succeed, seen, "--dataset", numbered)
    assert test == [255] * 4
    assert "4 test images" in out


def test_a_run_that_continues_holds_out_the_same_images(call, succeed):
    """Without the flag, too; with another number it is refused, since it has trained on them."""
    flags = ["--validation", 500, "--metrics_file"]
    succeed(*TRAIN, *flags, "whole.jsonl", "--save_to", "whole.pth")
    part = [*flags, "part.jsonl", "--save_to", "part.{}.pth", "--continue_from", "part.{}.pth"]
    assert call(*TRAIN, *part, "--yield_frequency", 2).status == 75
    succeed(*TRAIN, *part[2:])
    assert_equal_weights("part.4.pth", "whole.pth")
    last = [records(name)[-1] for name in ("whole.jsonl", "part.jsonl")]
    assert [record["split"] for record in last] == ["validation"] * 2
    assert last[0]["bits_per_dim"] == last[1]["bits_per_dim"]
    for n in (0, 400):
        result = call(*TRAIN, "--continue_from", "whole.pth", "--validation", n)
        assert result.status == 2
        assert f"--validation {n} contradicts the checkpoint, whose validation is 500" in result.err


def test_a_run_without_validation_does_not_begin_with_it(call, tiny_checkpoint, tmp_path):
    """Checkpoints of version 2 do not store it: nothing was held out."""
    import torch

    entries = load(tiny_checkpoint)
    del entries["settings"]["validation"]
    torch.save({**entries, "format_version": 2}, "old.pth")
    for path in (tiny_checkpoint, "old.pth"):
        result = call("main.py", "--continue_from", path, "--validation", 9, "--iterations", 40)
        assert result.status == 2
        assert "--validation 9 contradicts the checkpoint, whose validation is 0" in result.err
    assert weights("old.pth")


def test_the_last_word_has_the_test_set(succeed):
    """--evaluate_only evaluates the test images of a run with --validation."""
    succeed(*TRAIN, "--validation", 500, "--save_to", "w.pth")
    out = succeed("main.py", "--continue_from", "w.pth", "--evaluate_only").out
    assert "iteration 4: test " in out


def test_too_many_is_one_line(call):
    for n, words in ((1497, "leaves none of the 1497 training images of digits"), (-1, "range")):
        result = call(*TRAIN, "--validation", n)
        assert (result.status, result.err.count("\n")) == (2, 1)
        assert words in result.err
