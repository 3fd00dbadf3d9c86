"""Training through the command line: what it writes, how it stops and how it continues."""

import gc
import os
import re
import signal

import numpy as np
import pytest
import torch
from helpers import DIGITS, TINY, assert_equal_weights, load, losses, records, start, weights

import datasets
from models import NATIVE_ATTENTIONS


def test_a_checkpoint_is_complete(succeed, tmp_path):
    succeed("main.py", *DIGITS, "--iterations", 3, "--seed", 7, "--save_to", "runs/w.{}.pth")
    checkpoint = load("runs/w.3.pth")
    assert checkpoint["iteration"] == 3
    assert checkpoint["seed"] == 7
    assert checkpoint["config"]["n_layers"] == 2
    assert checkpoint["config"]["length"] == 64
    assert checkpoint["dataset"] == {"name": "digits", "image_shape": [8, 8]}
    assert checkpoint["first_byte_counts"].sum() == 1497
    assert len(checkpoint["optimizer_state"]["state"]) == len(checkpoint["model_state"]) - 1


def test_the_metrics_file(succeed, tmp_path):
    command = ["main.py", *DIGITS, "--iterations", 10, "--log_frequency", 4]
    succeed(*command, "--evaluate_frequency", 5, "--metrics_file", "m.jsonl")
    written = records("m.jsonl")
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


@pytest.mark.parametrize("attention_type", NATIVE_ATTENTIONS)
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
    # The rate goes on as planned, which is nothing to report.
    assert "learning rate:" not in succeed(*command, *parts).out
    assert losses("part.jsonl") == losses("whole.jsonl")
    assert_equal_weights("part.12.pth", "whole.12.pth")
    rates = [
        [(r["iteration"], r["lr"]) for r in records(name) if r["split"] == "train"]
        for name in ("part.jsonl", "whole.jsonl")
    ]
    assert rates[0] == rates[1]


def test_evaluating_does_not_change_training(succeed):
    """In the original, the first evaluation switched dropout off for the rest of the run."""
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
    assert sorted(os.listdir()) == ["w.2.pth", "w.4.pth", "w.5.pth"]
    assert "no more iterations to train" in results[-1].out


def test_going_back_to_an_earlier_checkpoint_is_a_warning(succeed):
    """Regression: the checkpoints of later iterations were replaced in silence."""
    command = ["main.py", *DIGITS, "--save_frequency", 2, "--save_to", "w.{}.pth"]
    assert succeed(*command, "--iterations", 4).err == ""
    err = succeed(*command, "--iterations", 4, "--continue_from", "w.2.pth").err
    assert err.startswith("warning: w.4.pth is there, too: the run replaces the checkpoints")
    assert succeed(*command, "--iterations", 6, "--continue_from", "w.4.pth").err == ""


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
    assert load(tmp_path / f"w.{stopped}.pth")["iteration"] == stopped


def test_evaluate_only(succeed, tiny_checkpoint, tmp_path):
    command = ["main.py", "--continue_from", tiny_checkpoint, "--evaluate_only"]
    result = succeed(*command, "--metrics_file", "m.jsonl")
    (record,) = records("m.jsonl")
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
    bits = [r["bits_per_dim"] for r in records("m.jsonl")]
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
    assert records("m.jsonl")[-1]["bits_per_dim_all_bytes"] < entropy - 0.3


def test_bfloat16_and_compile_train_the_same(succeed, tmp_path):
    command = ["main.py", *DIGITS, "--iterations", 3, "--log_frequency", 1, "--dropout", 0]
    bits = {}
    for name, flags in {
        "fp32": [],
        "bf16": ["--precision", "bf16"],
        "compiled": ["--compile"],
        "plain": ["--no-compile"],
    }.items():
        succeed(*command, *flags, "--metrics_file", f"{name}.jsonl", "--save_to", f"{name}.pth")
        bits[name] = list(losses(f"{name}.jsonl").values())
    assert np.allclose(bits["compiled"], bits["plain"], rtol=1e-4)
    assert np.allclose(bits["bf16"], bits["fp32"], rtol=2e-2)
    assert weights("bf16.pth")["predictor.weight"].dtype == torch.float32
    assert weights("compiled.pth").keys() == weights("fp32.pth").keys()


def test_no_compile_says_so(succeed):
    """Regression: it did not say that it was slower."""
    command = ["main.py", *DIGITS, "--iterations", 1, "--device", "cpu"]
    out = succeed(*command, "--no-compile").out
    assert out.count("--no-compile: training in plain PyTorch, which is slower\n") == 1
    assert "--no-compile" not in succeed(*command).out


def test_what_was_loaded_does_not_stay_in_memory(succeed, tiny_checkpoint, monkeypatch):
    """Regression: the whole checkpoint stayed in memory, beside the model and the optimiser, until
    the run ended."""
    step, sizes = torch.optim.RAdam.step, []

    def measure_and_step(optimizer, *args):
        gc.collect()
        tensors = [x for x in gc.get_objects() if type(x) in (torch.Tensor, torch.nn.Parameter)]
        tensors = [x for x in tensors if x.layout == torch.strided]
        storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
        sizes.append(sum(storages.values()))
        return step(optimizer, *args)

    monkeypatch.setattr(torch.optim.RAdam, "step", measure_and_step)
    succeed("main.py", *DIGITS, "--iterations", 2)
    succeed("main.py", *DIGITS, "--continue_from", tiny_checkpoint, "--iterations", 32)
    model = sum(x.nbytes for x in weights(tiny_checkpoint).values())
    assert sizes[-1] < sizes[1] + model / 4


@pytest.fixture
def threads():
    """`torch.set_num_threads`, undone after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_another_number_of_threads_is_a_warning(succeed, threads):
    """Regression: the weights then differ in their last digits from those of an uninterrupted run,
    and nothing said why."""
    command = ["main.py", *DIGITS, "--device", "cpu", "--save_to", "w.pth", "--iterations"]
    threads(2)
    succeed(*command, 1)
    assert load("w.pth")["threads"] == 2
    more = ["--continue_from", "w.pth"]
    assert "threads" not in succeed(*command, 2, *more).err
    threads(1)
    assert succeed(*command, 3, *more).err.count("used 2 CPU threads and continues with 1") == 1
    assert "threads" not in succeed(*command, 4, *more).err


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


def test_the_seed_of_the_checkpoint_is_kept(succeed):
    succeed("main.py", *DIGITS, "--iterations", 1, "--seed", 5, "--save_to", "w.pth")
    command = ["main.py", *DIGITS, "--iterations", 2, "--continue_from", "w.pth", "--save_to"]
    succeed(*command, "next.pth")
    assert load("next.pth")["seed"] == 5


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


@pytest.mark.parametrize("attention_type", NATIVE_ATTENTIONS)
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
