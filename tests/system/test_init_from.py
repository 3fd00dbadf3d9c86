"""main.py --init_from: a new run from trained weights; and a finished run that goes on."""

import re

import numpy as np
import pytest
import torch
from helpers import DIGITS, assert_equal_weights, load, records, weights

TRAIN = ["main.py", *DIGITS]


@pytest.fixture
def other_digits(tmp_path):
    """A data set of 8x8 images: white squares, whose first byte is 255."""
    folder = tmp_path / "other"
    folder.mkdir()
    for split in ("train", "test"):
        np.save(folder / f"{split}.npy", np.full((16, 8, 8), 255, np.uint8))
    return folder


def new_run(checkpoint, *flags):
    """A command that starts from a checkpoint, whose model it does not name."""
    return ["main.py", "--init_from", checkpoint, "--batch_size", 8, *flags]


def test_a_new_run_from_trained_weights(succeed, tiny_checkpoint, other_digits):
    """Iteration 0, no moments, the new data's histogram and its own settings, with the weights and
    the architecture of the checkpoint."""
    flags = ["--dataset", other_digits, "--iterations", 1, "--lr", 1e-30, "--seed", 5]
    flags += ["--weight_decay", 0, "--metrics_file", "m.jsonl", "--save_to", "own.{}.pth"]
    out = succeed(*new_run(tiny_checkpoint, *flags)).out
    assert "starting a new run from these weights" in out
    assert "learning rate" not in out
    assert_equal_weights("own.1.pth", tiny_checkpoint)
    own, old = load("own.1.pth"), load(tiny_checkpoint)
    assert (own["iteration"], own["seed"], own["dataset"]["name"]) == (1, 5, str(other_digits))
    assert own["config"] == old["config"]
    assert own["first_byte_counts"].nonzero().tolist() == [[255]]
    assert {int(moments["step"]) for moments in own["optimizer_state"]["state"].values()} == {1}
    assert {record["start"] for record in records("m.jsonl")} == {0}


def test_the_recipe_and_the_dropout_are_those_of_the_new_run(succeed, tiny_checkpoint):
    """The checkpoint's are the paper's; the architecture stays without neighbours."""
    flags = ["--dataset", "digits", "--recipe", "fast", "--iterations", 2, "--save_to", "own.pth"]
    succeed(*new_run(tiny_checkpoint, *flags))
    own = load("own.pth")
    assert own["settings"]["optimizer"] == "muon"
    assert (own["config"]["dropout"], own["config"]["neighbours"]) == (0.0, False)


def test_the_same_command_continues_the_new_run(call, succeed, tiny_checkpoint):
    """And ends with the weights of a run that was not interrupted."""
    flags = ["--dataset", "digits", "--iterations", 6]
    succeed(*new_run(tiny_checkpoint, *flags, "--save_to", "whole.pth"))
    command = new_run(tiny_checkpoint, *flags, "--save_to", "own.{}.pth")
    command += ["--continue_from", "own.{}.pth"]
    assert call(*command, "--yield_frequency", 4).status == 75
    assert "loaded own.4.pth, iteration 4" in succeed(*command).out
    assert_equal_weights("own.6.pth", "whole.pth")


def test_weights_of_the_original(succeed, tiny_checkpoint):
    """Its checkpoints do not determine the heads."""
    entries = load(tiny_checkpoint)
    names = "model_state", "optimizer_state", "iteration"
    torch.save({name: entries[name] for name in names}, "original.pth")
    flags = ["--dataset", "digits", "--n_heads", 2, "--iterations", 1, "--save_to", "own.pth"]
    succeed(*new_run("original.pth", *flags, "--lr", 1e-30, "--weight_decay", 0))
    assert load("own.pth")["iteration"] == 1
    assert_equal_weights("own.pth", tiny_checkpoint)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--n_layers", 4], "--n_layers 4 contradicts the checkpoint, whose n_layers is 2"),
        (["--dataset", "mnist-10k"], "has images of 28x28 and the checkpoint's have 8x8"),
        (["--evaluate_only", "--continue_from", "w.pth"], "--init_from has no effect"),
        (["--metrics_file", "w.pth"], "--metrics_file and --init_from name one file"),
        (["--save_to", "w.{}.pth"], "w.30.pth is there, from another run"),
    ],
    ids=lambda x: " ".join(map(str, x)) if isinstance(x, list) else "",
)
def test_wrong_input_is_one_line(flags, words, call, tiny_checkpoint, tmp_path):
    """The last of them would otherwise mix a new run with the one that it started from."""
    for name in ("w.pth", "w.30.pth"):
        (tmp_path / name).write_bytes(tiny_checkpoint.read_bytes())
    start = "w.30.pth" if "--save_to" in flags else "w.pth"
    result = call(*new_run(start, "--dataset", "digits", *flags))
    assert result.status == 2
    (line,) = [line for line in result.err.splitlines() if not line.startswith("warning")]
    assert words in line
    assert weights("w.30.pth").keys() == weights(tiny_checkpoint).keys()


def test_a_missing_file_is_one_line(call):
    """A pattern without a file, too: nothing else can be meant."""
    for name in ("missing.pth", "missing.{}.pth"):
        result = call(*new_run(name, "--dataset", "digits"))
        assert (result.status, result.err.count("\n")) == (2, 1)
        assert name in result.err


def test_a_run_that_goes_on_says_from_which_rate_to_which(succeed):
    """Regression: a finished run that was continued for longer raised its rate from 7e-7 to 2e-3
    in silence."""
    parts = ["--save_to", "w.{}.pth", "--continue_from", "w.{}.pth", "--metrics_file", "m.jsonl"]
    command = [*TRAIN, "--recipe", "fast", "--warmup", 0, "--lr", 2e-3, "--log_frequency", 1]
    first = succeed(*command, "--iterations", 20, *parts).out
    assert "learning rate:" not in first
    again = "main.py", "--continue_from", "w.20.pth", "--evaluate_only"
    assert "learning rate:" not in succeed(*again, "--evaluate_images", 1).out
    out = succeed(*command, "--iterations", 30, *parts).out
    (line,) = re.findall(r"learning rate: (.*)", out)
    rates = {r["iteration"]: r["lr"] for r in records("m.jsonl") if r["split"] == "train"}
    assert line == (
        f"{rates[20]:.3g} at iteration 20, {rates[21]:.3g} from iteration 21 on, "
        f"{rates[30]:.3g} at iteration 30"
    )
    succeed("main.py", "--continue_from", "w.{}.pth", "--export", "e.pth")
    out = succeed("main.py", "--continue_from", "e.pth", "--iterations", 32, "--batch_size", 8).out
    assert f"learning rate: {rates[30]:.3g} at iteration 30, " in out
