"""torchrun on this machine: two processes give what one gives."""

import os
import re
import signal
import time
from pathlib import Path

import imageio.v3
import numpy as np
import pytest
import torch
from helpers import TINY, children, finish, load, run_two, start, start_two, weights

from engine import distributed
from engine.training import seed_iteration

DIGITS = ["--dataset", "digits", *TINY, "--lr", 1e-2, "--evaluate_images", 51]


def assert_same_weights(first, second, tolerance=1e-5):
    torch.testing.assert_close(weights(first), weights(second), rtol=tolerance, atol=tolerance)


def printed_losses(out):
    return [
        float(line.split(": ")[1].split(" bits")[0]) for line in out.splitlines() if " left" in line
    ]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process prints and saves in 12 iterations of 8 images, with dropout."""
    path = tmp_path_factory.mktemp("alone") / "w.pth"
    command = [*DIGITS, "--batch_size", 8, "--iterations", 12, "--log_frequency", 3]
    return finish(start("main.py", *command, "--save_to", path))[0], path


@pytest.mark.parametrize("parts", [1, 2], ids=["whole", "accumulated"])
def test_two_processes_train_what_one_trains(alone, parts):
    """The same order of images, dropout, weights and bits/dim, printed by one process only. The
    second half of the run continues in a single process."""
    batch = ["--batch_size", 8 // parts, "--accumulate", parts, "--log_frequency", 3]
    train = [*DIGITS, *batch, "--save_to", "w.{}.pth", "--continue_from", "w.{}.pth"]
    first = run_two("main.py", *train, "--iterations", 6)
    assert first.count("iteration 6: saved") == 1
    second = finish(start("main.py", *train, "--iterations", 12))[0]
    bits = printed_losses(first) + printed_losses(second)
    assert np.allclose(bits, printed_losses(alone[0]), atol=2e-4)
    assert_same_weights(alone[1], "w.12.pth")
    assert second.splitlines()[-1].split(": ")[1] == alone[0].splitlines()[-1].split(": ")[1]


def test_two_processes_train_the_fast_recipe_as_one(succeed):
    """Muon multiplies in bfloat16 and makes all directions of a step equally long, so what differs
    in the last digit of a gradient differs more in the weights than with the others."""
    train = [*DIGITS, "--recipe", "fast", "--warmup", 3, "--dropout", 0.1, "--iterations", 8]
    train += ["--lr", 4e-3, "--batch_size", 4, "--accumulate", 2, "--log_frequency", 2]
    two = run_two("main.py", *train, "--save_to", "two.pth")
    one = succeed("main.py", *train, "--save_to", "one.pth").out
    bits = [printed_losses(out) for out in (two, one)]
    assert len(bits[0]) == 4
    assert np.allclose(*bits, atol=1e-3)
    assert_same_weights("one.pth", "two.pth", tolerance=2e-2)


@pytest.mark.parametrize(("index", "sampler"), [("0-5", "--recurrent"), ("3", "--recompute")])
def test_two_processes_sample_what_one_samples(succeed, tiny_checkpoint, tmp_path, index, sampler):
    """Even if there are fewer images than processes."""
    flags = [tiny_checkpoint, "--index", index, "--offset", 30, sampler, "--batch_size", 1]
    out = run_two("prediction.py", *flags, "--save_image", "two.{}.{}.png")
    assert ("sampled 5 images," if index == "0-5" else "sampled 1 image,") in out
    succeed("prediction.py", *flags, "--save_image", "one.{}.{}.png")
    files = sorted(tmp_path.glob("one.*.png"))
    assert files
    for file in files:
        other = file.with_name(file.name.replace("one", "two"))
        assert np.array_equal(imageio.v3.imread(file), imageio.v3.imread(other))


def test_each_process_has_other_attention_dropout(monkeypatch):
    """Regression: all processes seeded torch alike, so that their different images got the same
    masks. The dropout of the layers must remain the same with any number of processes."""
    alone = seed_iteration(3, 7, 4), torch.get_rng_state()
    drawn = {}
    for rank in (0, 1):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        drawn[rank] = seed_iteration(3, 7, 4), torch.get_rng_state()
        assert torch.equal(drawn[rank][0], alone[0])
    assert torch.equal(drawn[0][1], alone[1])
    assert not torch.equal(drawn[1][1], alone[1])


def start_training(*flags):
    """Start two processes that train for a long time, in a new process group, and wait until they
    have begun."""
    train = [*DIGITS, "--batch_size", 2, "--iterations", 10**6, "--log_frequency", 5, *flags]
    with open("out", "w") as out, open("err", "w") as err:
        process = start_two("main.py", *train, stdout=out, stderr=err, start_new_session=True)
    deadline = time.monotonic() + 120
    while "iteration 5 of" not in Path("out").read_text():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.2)
    return process


def test_a_process_that_dies_ends_the_run():
    """With an error: it must not hang."""
    process = start_training()
    os.kill(children(process)[-1], signal.SIGKILL)
    assert process.wait(timeout=120) != 0


def test_a_batch_that_cannot_be_shared_is_refused():
    process = start_two("main.py", *DIGITS, "--batch_size", 7)
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "--batch_size 7 is shared by 2 processes" in err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_both_after_saving(number):
    """SIGTERM reaches only torchrun, Ctrl-C all processes of the terminal. Those then get a second
    signal from torchrun, which must not end them while they save."""
    process = start_training("--save_to", "w.{}.pth")
    if number == signal.SIGINT:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    assert process.wait(timeout=120) != 0
    out = Path("out").read_text()
    stopped = re.search(rf"stopped at iteration (\d+) by {number.name}", out)[1]
    assert load(f"w.{stopped}.pth")["iteration"] == int(stopped)
