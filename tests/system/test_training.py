"""Training through the command line: what it writes, how it stops and how it continues."""

import gc
import json
import math
import re
import signal
import weakref

import numpy as np
import pytest
import torch
from conftest import TINY, start

import datasets
import main
from engine import checkpoint as checkpoints
from engine.training import train_step

DIGITS = ["--dataset", "digits", *TINY, "--batch_size", 8, "--evaluate_images", 8]


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def losses(path):
    return {r["iteration"]: r["bits_per_dim"] for r in records(path) if r["split"] == "train"}


def weights(path):
    return torch.load(path, weights_only=True)["model_state"]


def assert_equal_weights(a, b):
    a, b = weights(a), weights(b)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_checkpoint_is_complete(succeed, tmp_path):
    succeed("main.py", *DIGITS, "--iterations", 3, "--seed", 7, "--save_to", "runs/w.{}.pth")
    checkpoint = torch.load("runs/w.3.pth", weights_only=True)
    assert checkpoint["iteration"] == 3
    assert checkpoint["seed"] == 7
    assert checkpoint["optimizer"] == "radam"
    assert checkpoint["config"]["n_layers"] == 2
    assert checkpoint["config"]["length"] == 64
    assert checkpoint["dataset"] == {"name": "digits", "image_shape": [8, 8]}
    assert checkpoint["first_byte_counts"].sum() == 1497
    assert (
        len(checkpoint["optimizer_state"]["state"]) == sum(1 for _ in checkpoint["model_state"]) - 1
    )


def test_the_metrics_file(succeed, tmp_path):
    succeed(
        "main.py", *DIGITS, "--iterations", 10, "--log_frequency", 4, "--evaluate_frequency", 5,
        "--metrics_file", "m.jsonl",
    )  # fmt: skip
    written = records(tmp_path / "m.jsonl")
    assert [(r["split"], r["iteration"]) for r in written] == [
        ("train", 4), ("test", 5), ("train", 8), ("train", 10), ("test", 10),
    ]  # fmt: skip
    assert all(r["bits_per_dim"] > 0 and r["seconds"] > 0 for r in written)
    assert all("bits_per_dim_all_bytes" in r for r in written if r["split"] == "test")


def test_tensorboard(succeed, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    succeed("main.py", *DIGITS, "--iterations", 2, "--log_frequency", 1, "--log_dir", "board")
    events = EventAccumulator(str(tmp_path / "board"))
    events.Reload()
    assert [e.step for e in events.Scalars("train/bits_per_dim")] == [1, 2]
    assert [e.step for e in events.Scalars("test/bits_per_dim_all_bytes")] == [2]


@pytest.mark.parametrize("attention_type", ["causal-linear", "full"])
@pytest.mark.parametrize(
    "flags",
    [
        ["--optimizer", "radam"],
        ["--optimizer", "adam"],
        ["--recipe", "fast", "--warmup", 7, "--dropout", 0.1],
        ["--optimizer", "muon", "--lr_schedule", "cosine", "--neighbours", "--accumulate", 2],
    ],
    ids=["radam", "adam", "fast", "muon-accumulated"],
)
def test_a_resumed_run_equals_an_uninterrupted_one(attention_type, flags, call, succeed, tmp_path):
    """Losses and weights, bit for bit, with dropout and beyond the end of an epoch, in the middle
    of a warm-up and a schedule. The original started again at image 0 with different dropout."""
    command = ["main.py", *DIGITS, "--attention_type", attention_type, *flags]
    command += ["--log_frequency", 1, "--batch_size", 200, "--iterations", 12]
    succeed(*command, "--save_to", "whole.{}.pth", "--metrics_file", "whole.jsonl")
    parts = ["--save_to", "part.{}.pth", "--continue_from", "part.{}.pth"]
    parts += ["--metrics_file", "part.jsonl"]
    assert call(*command, *parts, "--yield_frequency", 5).status == 75
    succeed(*command, *parts)
    assert losses(tmp_path / "part.jsonl") == losses(tmp_path / "whole.jsonl")
    assert_equal_weights("part.12.pth", "whole.12.pth")
    rates = [
        [(r["iteration"], r["lr"]) for r in records(tmp_path / name) if r["split"] == "train"]
        for name in ("part.jsonl", "whole.jsonl")
    ]
    assert rates[0] == rates[1]


def test_evaluating_does_not_change_training(succeed):
    """In the original the first evaluation switched dropout off for the rest of the run."""
    command = ["main.py", *DIGITS, "--iterations", 8, "--dropout", 0.5]
    succeed(*command, "--save_to", "often.pth", "--evaluate_frequency", 1)
    succeed(*command, "--save_to", "once.pth")
    assert_equal_weights("often.pth", "once.pth")


def test_optimisation_flags_have_an_effect(succeed):
    command = ["main.py", *DIGITS, "--iterations", 2, "--save_to"]
    succeed(*command, "a.pth")
    for i, flags in enumerate((["--dropout", 0], ["--seed", 1], ["--clip_norm", 1e-3],
                               ["--weight_decay", 0.5], ["--lr", 0.1])):  # fmt: skip
        succeed(*command, f"{i}.pth", *flags)
        a, b = weights("a.pth")["predictor.weight"], weights(f"{i}.pth")["predictor.weight"]
        assert not torch.equal(a, b), flags


def test_yielding_has_its_own_status_and_the_same_command_continues(call):
    command = ["main.py", *DIGITS, "--iterations", 5, "--yield_frequency", 2]
    command += ["--save_to", "w.{}.pth", "--continue_from", "w.{}.pth"]
    results = [call(*command) for _ in range(4)]
    assert [result.status for result in results] == [75, 75, 0, 0]
    assert [i for i, _ in checkpoints.find("w.{}.pth")] == [5, 4, 2]
    assert "no more iterations to train" in results[-1].out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_exits(number, tmp_path):
    process = start(
        "main.py", *DIGITS, "--iterations", 10**6, "--log_frequency", 1, "--save_to", "w.{}.pth",
        cwd=tmp_path,
    )  # fmt: skip
    for line in process.stdout:
        if line.startswith("iteration 3 "):
            process.send_signal(number)
            break
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number, err
    stopped = int(re.search(r"stopped at iteration (\d+) by " + number.name, out)[1])
    assert torch.load(tmp_path / f"w.{stopped}.pth", weights_only=True)["iteration"] == stopped


def test_only_the_newest_checkpoints_are_kept(succeed, tmp_path):
    succeed(
        "main.py", *DIGITS, "--iterations", 9, "--save_frequency", 2, "--keep_checkpoints", 2,
        "--save_to", "w.{}.pth",
    )  # fmt: skip
    assert sorted(p.name for p in tmp_path.glob("*.pth")) == ["w.8.pth", "w.9.pth"]


def test_evaluate_only(succeed, tiny_checkpoint, tmp_path):
    result = succeed(
        "main.py",
        "--continue_from",
        tiny_checkpoint,
        "--evaluate_only",
        "--metrics_file",
        "m.jsonl",
    )
    (record,) = records(tmp_path / "m.jsonl")
    assert record["iteration"] == 30
    assert f"{record['bits_per_dim']:.4f} bits/dim" in result.out
    assert f"{record['bits_per_dim_all_bytes']:.4f} over all bytes" in result.out
    assert not list(tmp_path.glob("*.pth"))


def test_bits_per_dim_do_not_depend_on_the_batch_size(succeed, tiny_checkpoint, tmp_path):
    """A mean of batch means would weigh the last, smaller batch too much."""
    for batch_size in (1, 7, 300):
        succeed(
            "main.py", "--continue_from", tiny_checkpoint, "--evaluate_only",
            "--batch_size", batch_size, "--metrics_file", "m.jsonl",
        )  # fmt: skip
    bits = [r["bits_per_dim"] for r in records(tmp_path / "m.jsonl")]
    assert max(bits) - min(bits) < 1e-5


def test_a_trained_model_beats_the_histogram(succeed, tmp_path):
    """On test images, by 0.3 bits: the histogram's entropy is known exactly."""
    succeed(
        "main.py", "--dataset", "digits", "--n_layers", 2, "--n_heads", 4, "--batch_size", 16,
        "--optimizer", "adam", "--lr", 2e-3, "--iterations", 300, "--metrics_file", "m.jsonl",
    )  # fmt: skip
    counts = np.bincount(datasets.load("digits", ".", False).images.numpy().ravel())
    p = counts[counts > 0] / counts.sum()
    entropy = -(p * np.log2(p)).sum()
    assert records(tmp_path / "m.jsonl")[-1]["bits_per_dim_all_bytes"] < entropy - 0.3


def test_bfloat16_and_compile_train_the_same(succeed, tmp_path):
    command = ["main.py", *DIGITS, "--iterations", 3, "--log_frequency", 1, "--dropout", 0]
    bits = {}
    for name, flags in {
        "fp32": [],
        "bf16": ["--precision", "bf16-emulated"],
        "compiled": ["--compile"],
        "plain": ["--no-compile"],
    }.items():
        succeed(*command, *flags, "--metrics_file", f"{name}.jsonl", "--save_to", f"{name}.pth")
        bits[name] = list(losses(tmp_path / f"{name}.jsonl").values())
    assert np.allclose(bits["compiled"], bits["plain"], rtol=1e-4)
    assert np.allclose(bits["bf16"], bits["fp32"], rtol=2e-2)
    assert weights("bf16.pth")["predictor.weight"].dtype == torch.float32
    assert weights("compiled.pth").keys() == weights("fp32.pth").keys()


def test_no_compile_says_so(succeed):
    """It did not say that it was slower."""
    command = ["main.py", *DIGITS, "--iterations", 1, "--device", "cpu"]
    out = succeed(*command, "--no-compile").out
    assert out.count("--no-compile: training in plain PyTorch, which is slower\n") == 1
    assert "--no-compile" not in succeed(*command).out


def test_what_was_loaded_does_not_stay_in_memory(succeed, tiny_checkpoint, monkeypatch):
    """The whole checkpoint stayed in memory, beside the model and the optimiser, until the run
    ended."""
    loaded, steps = {}, []

    def load_and_watch(path):
        checkpoint = load(path)
        state = checkpoint["optimizer_state"]["state"]
        moments = [m[k] for m in state.values() for k in ("exp_avg", "exp_avg_sq")]
        loaded["weights"] = [weakref.ref(t) for t in checkpoint["model_state"].values()]
        loaded["moments"] = [weakref.ref(t) for t in moments]
        return checkpoint

    def step(nll, optimizer, *args, **kwargs):
        gc.collect()
        assert [ref() for ref in loaded["weights"] if ref() is not None] == []
        used = {id(m[k]) for m in optimizer.state.values() for k in ("exp_avg", "exp_avg_sq")}
        assert len(used) == len(loaded["moments"])
        left = {id(ref()) for ref in loaded["moments"] if ref() is not None}
        assert left <= used  # the optimiser may have taken them over
        steps.append(kwargs["iteration"])
        return train_step(nll, optimizer, *args, **kwargs)

    load = checkpoints.load
    monkeypatch.setattr(checkpoints, "load", load_and_watch)
    monkeypatch.setattr(main, "train_step", step)
    succeed("main.py", *DIGITS, "--continue_from", tiny_checkpoint, "--iterations", 32)
    assert steps == [31, 32]
    assert len(loaded["weights"]) == len(weights(tiny_checkpoint))


@pytest.fixture
def threads():
    """`torch.set_num_threads`, undone after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_another_number_of_threads_is_a_warning(succeed, threads):
    """The weights then differ in their last digits from those of an uninterrupted run, and nothing
    said why."""
    command = ["main.py", *DIGITS, "--device", "cpu", "--save_to", "w.pth", "--iterations"]
    threads(2)
    succeed(*command, 1)
    assert checkpoints.load("w.pth")["threads"] == 2
    more = ["--continue_from", "w.pth"]
    assert "threads" not in succeed(*command, 2, *more).err
    threads(1)
    assert succeed(*command, 3, *more).err.count("used 2 CPU threads and continues with 1") == 1
    assert "threads" not in succeed(*command, 4, *more).err


def test_a_checkpoint_without_the_number_of_threads_loads(succeed, tiny_checkpoint):
    """Earlier versions did not store it."""
    checkpoint = torch.load(tiny_checkpoint, weights_only=True)
    del checkpoint["threads"]
    torch.save(checkpoint, "old.pth")
    command = ["--continue_from", "old.pth", "--iterations", 31, "--save_to", "new.pth"]
    assert "threads" not in succeed("main.py", *DIGITS, *command).err
    succeed("prediction.py", "old.pth", "--offset", 60)


@pytest.mark.parametrize("optimizer", ["radam", "muon"])
def test_a_diverged_run_stops_and_saves_nothing(call, tmp_path, optimizer):
    flags = ["--lr", 1e30, "--clip_norm", 0, "--optimizer", optimizer]
    result = call("main.py", *DIGITS, *flags, "--save_to", "w.{}.pth")
    assert result.status == 2
    assert "is not finite: lower --" in result.err
    assert "--lr (now 1e+30)" in result.err
    assert ("--muon_lr (now 0.02)" in result.err) == (optimizer == "muon")
    assert not list(tmp_path.iterdir())


def test_without_save_to_a_warning(succeed):
    assert "without --save_to" in succeed("main.py", *DIGITS, "--iterations", 1).err


def test_seed_and_optimizer_of_the_checkpoint_are_kept(call, succeed):
    succeed("main.py", *DIGITS, "--iterations", 1, "--seed", 5, "--save_to", "w.pth")
    command = ["main.py", *DIGITS, "--iterations", 2, "--continue_from", "w.pth", "--save_to"]
    succeed(*command, "next.pth")
    assert torch.load("next.pth", weights_only=True)["seed"] == 5
    assert "contradicts" in call(*command, "no.pth", "--seed", 6).err
    assert "contradicts" in call(*command, "no.pth", "--optimizer", "adam").err


def test_learning_rate_may_change_when_a_run_continues(succeed):
    succeed("main.py", *DIGITS, "--iterations", 1, "--save_to", "w.pth")
    succeed(
        "main.py", *DIGITS, "--iterations", 2, "--lr", 0.5, "--continue_from", "w.pth",
        "--save_to", "w.pth",
    )  # fmt: skip
    state = torch.load("w.pth", weights_only=True)["optimizer_state"]
    assert math.isclose(state["param_groups"][0]["lr"], 0.5)


def test_a_moved_folder_may_replace_the_stored_one_if_its_shape_is_the_same(
    call, succeed, colour_folder, tmp_path
):
    command = ["main.py", *TINY, "--iterations", 2, "--dataset"]
    succeed(*command, colour_folder, "--iterations", 1, "--save_to", "w.pth")
    (tmp_path / "moved").symlink_to(colour_folder)
    succeed(*command, "moved", "--continue_from", "w.pth")
    (tmp_path / "other").mkdir()
    for split in ("train", "test"):
        np.save(tmp_path / "other" / f"{split}.npy", np.zeros((3, 6, 4, 3), np.uint8))
    result = call(*command, "other", "--continue_from", "w.pth")
    assert result.status == 2
    assert "6x4x3" in result.err
    assert "6x5x3" in result.err


def test_bfloat16_learns_as_float32_does(succeed, data_directory, tmp_path):
    """After 300 iterations on MNIST the training bits/dim agree. (Larger steps are chaotic: with
    1e-3, two fp32 runs that round differently end 0.01 apart.)"""
    command = ["main.py", "--dataset", "mnist", "--dataset_directory", data_directory]
    command += ["--n_layers", 2, "--n_heads", 4, "--d_query", 16, "--iterations", 300]
    command += ["--batch_size", 8, "--optimizer", "adam", "--lr", 3e-4, "--evaluate_images", 8]
    bits = {}
    for precision in ("fp32", "bf16-emulated"):
        succeed(*command, "--precision", precision, "--metrics_file", f"{precision}.jsonl")
        bits[precision] = losses(tmp_path / f"{precision}.jsonl")
    assert bits["fp32"][300] < bits["fp32"][100] - 0.1
    assert abs(bits["fp32"][300] - bits["bf16-emulated"][300]) < 0.01


@pytest.mark.parametrize("attention_type", ["causal-linear", "full"])
def test_accumulation_is_the_larger_batch(succeed, attention_type):
    """Also with dropout in the layers, which does not depend on how the batch is split."""
    command = ["main.py", *DIGITS, "--iterations", 5, "--attention_type", attention_type]
    command += ["--attention_dropout", 0] if attention_type == "full" else []
    for batch, parts in ((8, 1), (4, 2), (1, 8)):
        flags = ["--batch_size", batch, "--accumulate", parts, "--save_to", f"{parts}.pth"]
        succeed(*command, *flags)
    for parts in (2, 8):
        for name, weight in weights("1.pth").items():
            torch.testing.assert_close(weights(f"{parts}.pth")[name], weight, rtol=0, atol=1e-5)
