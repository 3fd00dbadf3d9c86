"""A run that is killed at any moment continues from its last checkpoint, bit for bit."""

import contextlib
import os
import random
import re
import signal
import sys
import time

import pytest
from helpers import (
    ROOT,
    TINY,
    assert_equal_weights,
    children,
    finish,
    records,
    run_two,
    start_command,
    start_two,
)

DIGITS = ["--dataset", "digits", *TINY, "--batch_size", 4, "--evaluate_images", 8]
DIGITS += ["--dropout", 0.2, "--log_frequency", 1]
PARTS = ["--save_to", "part.{}.pth", "--continue_from", "part.{}.pth"]
PARTS += ["--metrics_file", "part.jsonl"]


def all_losses(path):
    """{iteration: the set of its losses, from every time that it was trained}."""
    seen = {}
    for record in records(path):
        if record["split"] == "train":
            seen.setdefault(record["iteration"], set()).add(record["bits_per_dim"])
    return seen


@pytest.mark.parametrize(
    "flags",
    [
        ["--accumulate", 2],
        ["--attention_type", "gated-linear", "--recipe", "fast"],
        ["--attention_type", "full", "--optimizer", "adam", "--attention_dropout", 0.2],
    ],
    ids=["linear-radam-accumulated", "gated-linear-fast", "full-adam"],
)
def test_killed_twenty_times(flags, succeed):
    """Every loss of every start equals the uninterrupted run's, and so do the final weights."""
    command = [*DIGITS, *flags, "--iterations", 400, "--save_frequency", 5]
    succeed("main.py", *command, "--save_to", "whole.pth", "--metrics_file", "whole.jsonl")
    killing = [sys.executable, ROOT / "tests" / "killing.py", 20, *command, *PARTS]
    out, _ = finish(start_command(killing))
    assert "killed 20" in out
    starts = re.findall(r"loaded .*, iteration (\d+)\n", out)
    assert len(set(starts)) > 6, starts
    assert all_losses("part.jsonl") == all_losses("whole.jsonl")
    assert_equal_weights("part.400.pth", "whole.pth")


def kill_with_children(process):
    """Kill torchrun and its processes, which would otherwise wait for it for minutes. torchrun is
    stopped first, so that it does not restart them."""
    process.send_signal(signal.SIGSTOP)
    for pid in [*children(process), process.pid]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def test_two_processes_killed_at_random_moments():
    """And torchrun with them, as in a power failure."""
    command = ["main.py", *DIGITS, "--iterations", 100, "--save_frequency", 5]
    run_two(*command, "--save_to", "whole.pth", "--metrics_file", "whole.jsonl")
    moments = random.Random(0)
    for _ in range(3):
        process = start_two(*command, *PARTS)
        time.sleep(moments.uniform(3, 7))
        kill_with_children(process)
        process.communicate()
    run_two(*command, *PARTS)
    assert all_losses("part.jsonl") == all_losses("whole.jsonl")
    assert_equal_weights("part.100.pth", "whole.pth")


def test_a_record_after_a_truncated_line_of_metrics(succeed, tmp_path):
    """If a run is killed while writing a line, the next record must start a new one."""
    file = tmp_path / "m.jsonl"
    file.write_text('{"iteration": 1}\n{"iterat')
    succeed("main.py", *DIGITS, "--iterations", 1, "--metrics_file", file)
    lines = file.read_text().splitlines()
    assert lines[1] == '{"iterat'
    assert '"split": "train"' in lines[2]
