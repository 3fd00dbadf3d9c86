"""--precision auto on a CPU: each command measures what it does; a run continues as it began."""

import re

import imageio.v3
import numpy as np
import pytest
import torch
from helpers import DIGITS, ROOT, assert_equal_weights, load, require_library, run_two

import utils
from cpu import build
from engine import precision

TRAIN = ["main.py", *DIGITS, "--recipe", "fast", "--device", "cpu", "--precision", "auto"]


@pytest.fixture
def favour(monkeypatch):
    """Let a precision win every measurement from now on, on a CPU that has bfloat16 instructions.
    Returns the list of how many measurements each command made."""
    monkeypatch.setattr(utils, "has_bfloat16", lambda device: True)
    measure, count = precision.seconds_of_calls, []

    def favour(fast):
        def seconds(candidates):
            count.append(measure(candidates))
            return {name: 1.0 if name == fast else 2.0 for name in candidates}

        monkeypatch.setattr(precision, "seconds_of_calls", seconds)
        return count

    return favour


def machine(result):
    """What a command prints of the machine, after the threads."""
    return re.search(r"^machine: cpu \(\d+ threads?\), (.*)$", result.out, re.M)[1]


@pytest.mark.parametrize("fast", ["fp32", "bf16"])
def test_a_run_uses_and_stores_what_was_faster(fast, favour, succeed):
    """Training, evaluation and Muon's products; as if it had been given, when nothing is measured.

    Regression: Muon's products were measured even then, so that on a busy machine two equal
    commands trained different weights."""
    count = favour(fast)
    flags = ["--iterations", 3, "--save_to"]
    words = {"fp32": "bf16 would take 2.0 times as long", "bf16": "2.0 times as fast as fp32"}
    assert machine(succeed(*TRAIN, *flags, "auto.pth")) == f"{fast} ({words[fast]})"
    measured = load("auto.pth")["measured"]
    assert measured.pop("machine") == utils.cpu_name()
    assert measured == {"training": fast, "evaluation": fast, "Muon": fast}
    given = succeed(*TRAIN, "--precision", fast, *flags, "given.pth")
    assert machine(given) == fast
    assert len(count) == 3  # all of the first command
    assert_equal_weights("auto.pth", "given.pth")


def test_a_continued_run_keeps_its_precision(favour, succeed):
    """Bit for bit what it was without the interruption, whatever another measurement would say."""
    favour("bf16")
    succeed(*TRAIN, "--iterations", 6, "--save_to", "whole.pth")
    succeed(*TRAIN, "--iterations", 6, "--save_to", "w.{}.pth", "--save_frequency", 3)
    count = favour("fp32")
    count.clear()
    result = succeed(
        *TRAIN, "--iterations", 6, "--continue_from", "w.3.pth", "--save_to", "own.pth"
    )
    assert machine(result) == "bf16 (as before)"
    assert not count
    assert_equal_weights("own.pth", "whole.pth")


def test_another_machine_measures_again(favour, succeed):
    """And says in a line what changes. Checkpoints of before have no measurements."""
    favour("bf16")
    succeed(*TRAIN, "--iterations", 2, "--save_to", "w.pth")
    entries = load("w.pth")
    entries["measured"]["machine"] = "another"
    torch.save(entries, "other.pth")
    favour("fp32")
    more = ["--iterations", 3, "--continue_from"]
    result = succeed(*TRAIN, *more, "other.pth")
    for part in ("training", "evaluation", "Muon"):
        assert f"{part}: fp32 on this machine, bf16 on the one before" in result.out
    assert machine(result).startswith("fp32 (bf16 would")
    del entries["measured"]
    torch.save(entries, "old.pth")
    result = succeed(*TRAIN, *more, "old.pth")
    assert machine(result).startswith("fp32 (bf16 would")
    assert "the one before" not in result.out


def test_an_evaluation_measures_nothing_else(favour, succeed, tiny_checkpoint):
    count = favour("bf16")
    flags = ["--evaluate_only", "--evaluate_images", 8, "--device", "cpu", "--precision", "auto"]
    result = succeed("main.py", "--continue_from", tiny_checkpoint, *flags)
    assert machine(result).startswith("bf16")
    assert len(count) == 1


def test_surprisal_alone_measures_an_evaluation(monkeypatch, succeed, tiny_checkpoint):
    """Regression: it measured the sampler, and on a CPU without bfloat16 instructions, where that
    may be faster with them emulated, the evaluation then took several times as long."""
    monkeypatch.setattr(precision, "sampling_candidates", None)
    flags = ["--save_surprisal", "s.png", "--device", "cpu", "--precision", "auto"]
    assert machine(succeed("prediction.py", tiny_checkpoint, *flags))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--no-compile"], "--no-compile: sampling in plain PyTorch"),
        ([], "no C++ compiler found"),
    ],
    ids=str,
)
def test_what_is_not_compiled_is_said_once(flags, message, monkeypatch, call, tiny_checkpoint):
    """Regression: each measurement said it, too."""
    for module in (build, precision):
        monkeypatch.setattr(module, "find_compiler", lambda: None)
    flags = [*flags, "--offset", 30, "--index", "0-9", "--batch_size", 1, "--device", "cpu"]
    result = call("prediction.py", tiny_checkpoint, *flags, "--precision", "auto")
    assert result.status == 0
    assert (result.out + result.err).count(message) == 1


@pytest.mark.parametrize("flags", [[], ["--recompute"], ["--no-compile"]], ids=str)
@pytest.mark.parametrize("fast", ["fp32", "bf16"])
def test_sampling_draws_what_the_faster_precision_draws(
    flags, fast, favour, succeed, tiny_checkpoint
):
    favour(fast)
    draw = ["prediction.py", tiny_checkpoint, "--offset", 32, "--index", "0-3", "--device", "cpu"]
    result = succeed(*draw, *flags, "--precision", "auto", "--save_grid", "auto.png")
    assert machine(result).startswith(fast)
    succeed(*draw, *flags, "--precision", fast, "--save_grid", "given.png")
    assert np.array_equal(*map(imageio.v3.imread, ["auto.png", "given.png"]))


def test_without_instructions_training_is_not_measured(monkeypatch, succeed):
    """Emulated bfloat16 would take seconds, and loses."""
    monkeypatch.setattr(utils, "has_bfloat16", lambda device: False)
    monkeypatch.setattr(precision, "seconds_of_calls", None)
    assert machine(succeed(*TRAIN, "--iterations", 1)) == "fp32"


def test_the_library_has_one_precision(favour, succeed):
    """Regression: --precision auto was refused with it, as bf16 is."""
    require_library()
    favour("bf16")
    flags = [*DIGITS, "--device", "cpu", "--backend", "fast-transformers", "--iterations", 1]
    assert machine(succeed("main.py", *flags, "--precision", "auto")) == "fp32"


TWO_PROCESSES = """
import time
from functools import partial

import torch

from engine import distributed
from engine.precision import fastest

with distributed.process_group(torch.device("cpu")):
    seconds = {"fp32": 0.04, "bf16": 0.001} if distributed.rank() else {"fp32": 0.001, "bf16": 0.01}
    name, _ = fastest({name: partial(time.sleep, s) for name, s in seconds.items()})
    print(f"rank {distributed.rank()}: {name}\\n", end="")  # in one piece, unlike the default end
"""


def test_processes_agree(tmp_path, monkeypatch):
    """Where another precision is faster in each: they would train with different roundings."""
    script = tmp_path / "two.py"
    script.write_text(TWO_PROCESSES)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    out = run_two(script)
    assert sorted(out.split("\n"))[-2:] == ["rank 0: bf16", "rank 1: bf16"]


def test_two_processes_measure():
    run_two(*TRAIN, "--iterations", 2, "--save_to", "w.pth")
    assert load("w.pth")["measured"].keys() == {"machine", "training", "evaluation", "Muon"}
