"""What users of comparable programs reported of runs, checkpoints and the command line."""

import argparse
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from helpers import DIGITS, ROOT, TINY, finish, load, records, start

from engine import construction

TRAIN = ["main.py", *DIGITS, "--evaluate_images", 4]
SAVE = ["--save_frequency", 2, "--save_to"]


def refused(call, *command):
    """Call a script that must end with one line and status 2; returns the line."""
    result = call(*command)
    assert result.status == 2, result
    (line,) = [line for line in result.err.splitlines() if not line.startswith("warning: ")]
    return line


# Patterns


@pytest.mark.parametrize("pattern", ["runs/{}/w.pth", "a/{}/w.{:06d}.pth", "[x]/*{}.pth"])
def test_a_field_anywhere_in_the_pattern_works(succeed, pattern, tmp_path):
    """Regression: with --save_to 'runs/{}/w.pth' a run saved, found nothing, began anew for ever,
    deleted nothing, and prediction.py found nothing."""
    command = [*TRAIN, *SAVE, pattern, "--continue_from", pattern, "--keep_checkpoints", 2]
    succeed(*command, "--iterations", 6)
    assert "iteration 6" in succeed(*command, "--iterations", 8).out.splitlines()[0]
    paths = [pattern.format(*[i] * pattern.count("{")) for i in (2, 4, 6, 8)]
    assert [os.path.exists(path) for path in paths] == [False, False, True, True]
    assert not any(os.path.isdir(os.path.dirname(p)) for p in paths[:2] if "/w" in p)
    assert "iteration 8" in succeed("prediction.py", pattern, "--offset", 63).out


@pytest.mark.parametrize("pattern", ["w.{:>1000000000}", "w.{x}", "w.{", "w.{:x}", "w.{0!r}"])
def test_a_pattern_that_is_not_valid_is_refused_before_the_first_iteration(call, pattern):
    """Regression: an error echoed a name that its pattern had padded to a gigabyte."""
    line = refused(call, *TRAIN, "--save_to", pattern)
    assert "not a valid pattern" in line
    assert len(line) < 300


# Other runs


def test_checkpoints_of_another_run_are_not_overwritten(call, succeed, tmp_path):
    """Regression: a new run replaced them in silence, and "the newest" mixed both runs."""
    succeed(*TRAIN, "--iterations", 4, *SAVE, "w.{}.pth")
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*.pth")}
    line = refused(call, *TRAIN, "--iterations", 2, "--seed", 1, "--save_to", "w.{}.pth")
    assert "w.4.pth is there, from another run" in line
    assert "--continue_from w.{}.pth" in line
    assert before == {path.name: path.read_bytes() for path in tmp_path.glob("*.pth")}
    succeed(*TRAIN, "--iterations", 2, "--save_to", "one.pth")
    assert "one.pth is there" in refused(call, *TRAIN, "--iterations", 2, "--save_to", "one.pth")


def test_going_back_to_an_older_checkpoint_of_the_same_pattern_is_no_other_run(succeed):
    succeed(*TRAIN, "--iterations", 4, *SAVE, "w.{}.pth")
    go_back = ["--continue_from", "w.2.pth", "--save_to", "w.{}.pth"]
    assert "saved w.3.pth" in succeed(*TRAIN, "--iterations", 3, *go_back).out


def test_tensorboard_shows_one_line_after_going_back(succeed):
    """Regression: after continuing from an older checkpoint it showed the steps 1-4, 3-5."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = ["--log_frequency", 1, "--log_dir", "board"]
    succeed(*TRAIN, "--iterations", 4, *SAVE, "w.{}.pth", *log)
    time.sleep(1)  # the writers' files are named by the second
    succeed(*TRAIN, "--iterations", 3, "--continue_from", "w.2.pth", "--save_to", "v.pth", *log)
    events = EventAccumulator("board").Reload()
    steps = [event.step for event in events.Scalars("train/bits_per_dim")]
    assert steps == [1, 2, 3]


# Paths


def test_a_quoted_tilde_is_the_home_folder(succeed, tmp_path, monkeypatch):
    """Regression: it made a folder named ~."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    files = ["--save_to", "~/w.{}.pth", "--metrics_file", "~/m.jsonl", "--log_dir", "~/board"]
    succeed(*TRAIN, "--iterations", 2, *files)
    succeed("main.py", "--continue_from", "~/w.{}.pth", "--export", "~/e.pth")
    pictures = ["--save_grid", "~/g.png", "--save_image", "~/{}.{}.png", "--save_gif", "~/a.gif"]
    succeed("prediction.py", "~/e.pth", "--offset", 60, *pictures, "--save_surprisal", "~/s.png")
    names = {"w.2.pth", "m.jsonl", "board", "e.pth", "g.png", "pred.0.png", "real.0.png", "a.gif"}
    found = set(os.listdir(tmp_path / "home"))
    assert found - {".cache", ".config"} == {*names, "s.png"}  # matplotlib keeps its own there
    np.save(tmp_path / "home" / "train.npy", np.zeros((3, 4, 4), np.uint8))
    np.save(tmp_path / "home" / "test.npy", np.zeros((3, 4, 4), np.uint8))
    succeed("main.py", "--dataset", "~", *TINY, "--iterations", 1)
    assert not os.path.exists("~")


# Files that are not what they seem


UNSAFE = {
    "numpy": (("iteration", np.float64(3.0)), "numpy"),
    "namespace": (("args", argparse.Namespace(lr=1)), "argparse.Namespace"),
}


@pytest.mark.parametrize(("entry", "name"), UNSAFE.values(), ids=UNSAFE)
def test_a_healthy_file_with_other_types_is_not_called_damaged(call, tiny_checkpoint, entry, name):
    """Regression: "damaged ... delete it", with a terminal escape code cut in the middle."""
    torch.save({**load(tiny_checkpoint), entry[0]: entry[1]}, "w.pth")
    line = refused(call, "prediction.py", "w.pth")
    assert name in line
    assert "save it again" in line
    assert "delete" not in line
    assert "\x1b" not in line
    assert "x1b" not in line


def test_an_iteration_that_is_no_whole_number_is_named(call, tiny_checkpoint):
    """Regression: "damaged ... delete it" for an iteration of 3.0."""
    torch.save({**load(tiny_checkpoint), "iteration": 3.0}, "w.pth")
    assert "its iteration is 3.0, which is not valid" in refused(call, "prediction.py", "w.pth")


def test_a_text_file_is_not_to_be_deleted(call, tmp_path):
    """Regression: somebody's notes, given as a model by mistake, were to be deleted; and torch's
    reason, which was shown, spoke of turning off its protection against code in files."""
    (tmp_path / "notes.txt").write_text("buy milk")
    line = refused(call, "prediction.py", "notes.txt")
    assert "not a checkpoint" in line
    assert "delete" not in line
    assert "weights_only" not in line


def test_records_are_not_appended_to_other_files(call, tmp_path):
    """Regression: lines of JSON were appended to whatever file --metrics_file named."""
    (tmp_path / "notes.txt").write_text("buy milk")
    line = refused(call, *TRAIN, "--metrics_file", "notes.txt")
    assert "--metrics_file notes.txt holds something else" in line
    assert (tmp_path / "notes.txt").read_text() == "buy milk"


def diverged(checkpoint, value):
    """A copy of a checkpoint whose weights are all multiplied by a number."""
    entries = load(checkpoint)
    for weight in entries["model_state"].values():
        weight.mul_(value)
    torch.save(entries, "diverged.pth")
    return "diverged.pth"


def test_diverged_weights_are_no_success(call, tiny_checkpoint, tmp_path):
    """Regression: with huge finite weights --evaluate_only printed nan, exited with 0 and wrote
    NaN, which is not JSON; --export exported NaN, and a checkpoint without weights."""
    huge = diverged(tiny_checkpoint, 1e30)
    command = ["main.py", "--continue_from", huge, "--evaluate_only", "--evaluate_images", 4]
    assert "diverged" in refused(call, *command, "--metrics_file", "m.jsonl")
    assert not (tmp_path / "m.jsonl").exists() or records("m.jsonl") == []
    nan = diverged(tiny_checkpoint, float("nan"))
    export = ["--export", "e.pth"]
    assert "is not finite" in refused(call, "main.py", "--continue_from", nan, *export)
    torch.save({**load(tiny_checkpoint), "model_state": {}}, "empty.pth")
    torch.save({"model_state": {}, "iteration": 3}, "original.pth")
    for name in ("empty.pth", "original.pth"):
        line = refused(call, "main.py", "--continue_from", name, *export)
        assert "not a checkpoint of an image transformer" in line
    assert not (tmp_path / "e.pth").exists()


# Memory


def test_a_batch_of_a_small_model_that_cannot_fit_is_refused(call, monkeypatch):
    """Regression: the bound was a quarter of what a small model takes, and the system ended the
    run. (Measured, a step with 7,500 images takes 1.2 GB.)"""
    monkeypatch.setattr(construction, "device_memory", lambda device: 9e8)
    line = refused(call, *TRAIN, "--device", "cpu", "--batch_size", 7500)
    assert "need at least 1.0 GB of memory" in line


# Processes


def test_closed_streams_are_no_error(tmp_path):
    """Regression: a traceback when stdout or stderr was closed, as with >&-."""
    command = f"{sys.executable} {ROOT}/main.py " + " ".join(map(str, TRAIN[1:]))
    command += " --iterations 2 --save_to w.{}.pth"
    assert subprocess.run(f"{command} >&- 2>&-", shell=True).returncode == 0
    assert (tmp_path / "w.2.pth").exists()


@pytest.mark.parametrize("seconds", [0.1, 0.4, 0.8, 1.2])
def test_an_interrupt_in_the_first_second_is_no_traceback(seconds):
    process = start("prediction.py", "-", "--dataset", "digits", "--index", "0-5000")
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=100)
    assert process.returncode in (130, -signal.SIGINT)
    assert "Traceback" not in err


def test_a_run_that_saves_nothing_does_not_say_so(tmp_path):
    """Regression: "saving and exiting" without --save_to."""
    process = start(*TRAIN, "--iterations", 10**6, "--log_frequency", 1)
    while "iteration 1 of" not in process.stdout.readline():
        pass
    process.send_signal(signal.SIGTERM)
    _, err = finish(process, status=143)
    assert "SIGTERM: exiting" in err
    assert "saving" not in err


def test_a_folder_with_umlauts_in_another_locale(tmp_path):
    """Regression: a traceback after a run in such a folder, continued under LC_ALL=C."""
    folder = tmp_path / "ä"
    folder.mkdir()
    for split in ("train", "test"):
        np.save(folder / f"{split}.npy", np.zeros((3, 4, 4), np.uint8))
    train = ["main.py", "--dataset", folder, *TINY, "--save_to", folder / "w.{}.pth"]
    finish(start(*train, "--iterations", 1, env={**os.environ, "PYTHONUTF8": "1"}))
    other = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0"}
    continued = [*train, "--continue_from", folder / "w.{}.pth", "--iterations", 2]
    finish(start(*continued, env=other))
    _, err = finish(start(*continued, "--log_dir", folder / "board", env=other), status=2)
    assert "TensorBoard cannot write" in err
    finish(start("prediction.py", folder / "w.{}.pth", "--offset", 8, cwd=folder, env=other))
    assert load(folder / "w.2.pth")["dataset"]["name"] == str(folder)


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1])
def test_a_closed_terminal_and_a_queues_signal_save(tmp_path, number):
    """Regression: both ended a run without saving."""
    process = start(*TRAIN, "--iterations", 10**6, "--log_frequency", 1, "--save_to", "w.pth")
    while "iteration 1 of" not in process.stdout.readline():
        pass
    process.send_signal(number)
    finish(process, status=128 + number)
    assert load("w.pth")["iteration"] >= 1


@pytest.mark.parametrize("world_size", ["2", "many"])
def test_a_stray_variable_of_a_cluster_is_an_error_in_words(world_size):
    """Regression: a traceback with WORLD_SIZE set, and none of torchrun's other variables."""
    env = {**os.environ, "WORLD_SIZE": world_size}
    _, err = finish(start(*TRAIN, "--iterations", 1, env=env), status=2)
    assert "unset WORLD_SIZE" in err


def test_an_empty_variable_for_the_data_counts_as_none(call):
    """Regression: with DATASET_DIRECTORY= the data sets were looked for in the current folder."""
    _, err = finish(start("main.py", "--help", env={**os.environ, "DATASET_DIRECTORY": ""}))
    assert err == ""


def test_two_outputs_with_one_name_are_refused(call):
    """Regression: a metrics file with the name of the checkpoint: each replaced the other."""
    same = ["--save_to", "w.pth", "--metrics_file", "./w.pth"]
    assert "name one file" in refused(call, *TRAIN, *same)


def test_a_folder_given_as_a_model_is_an_error_in_words(call, tmp_path):
    line = refused(call, "prediction.py", tmp_path)
    assert "cannot be read (Is a directory)" in line


def test_an_empty_name_is_refused(call):
    """Regression: an empty name, of a variable that is not set, counted as not given."""
    for flag in ("--save_to", "--continue_from", "--metrics_file"):
        assert "it is empty" in refused(call, *TRAIN, flag, "")
    assert "it is empty" in refused(call, "prediction.py", "-", "--save_grid", "")
