"""Checkpoint files: found by pattern, validated, never executed; what a run writes and deletes."""

import copy
import os
import pickle

import numpy as np
import pytest
import torch
from helpers import DIGITS, load

from engine.checkpoint import Checkpoint
from utils import UserError


@pytest.fixture
def copies(tiny_checkpoint):
    """Writes copies of a checkpoint that differ in the iteration: copies("w.{}.pth", 1, 2)."""

    def write(pattern, *iterations):
        for iteration in iterations:
            torch.save({**load(tiny_checkpoint), "iteration": iteration}, pattern.format(iteration))

    return write


def test_the_newest_of_a_pattern_is_the_largest_iteration(copies, succeed, tmp_path):
    """The original loaded the file written last, which could be a copy of an old checkpoint."""
    copies("w.{}.pth", 100, 20, 3)
    (tmp_path / "w.best.pth").write_text("no number")
    out = succeed("prediction.py", "w.{}.pth", "--offset", 63).out
    assert "loaded w.100.pth, iteration 100" in out


def test_a_damaged_newest_file_is_skipped_with_a_warning(copies, call, tmp_path):
    """If no other is left, that is an error."""
    copies("w.{}.pth", 1, 2)
    (tmp_path / "w.3.pth").write_bytes((tmp_path / "w.2.pth").read_bytes()[:500])
    result = call("prediction.py", "w.{}.pth", "--offset", 63)
    assert "loaded w.2.pth" in result.out
    assert "w.3.pth is damaged" in result.err
    (tmp_path / "v.3.pth").write_bytes(b"")
    result = call("prediction.py", "v.{}.pth", "--offset", 63)
    assert (result.status, "v.3.pth is damaged" in result.err) == (2, True)


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("executed",)


FOREIGN = {
    "pickle": pickle.dumps({"model_state": 1}),
    "hostile-pickle": pickle.dumps(Hostile()),
    "png": b"\x89PNG\r\n\x1a\n",
    "zip": b"PK\x03\x04 nothing",
    "hostile": Hostile(),
    "hostile-weights": {"model_state": Hostile(), "iteration": 1},
    "list": [1],
}


@pytest.mark.parametrize("content", FOREIGN.values(), ids=FOREIGN)
def test_foreign_files_are_refused_and_not_executed(content, call, tmp_path):
    path = tmp_path / "w.pth"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    result = call("prediction.py", path)
    assert (result.status, "w.pth" in result.err) == (2, True)
    assert not (tmp_path / "executed").exists()


def test_only_the_newest_checkpoints_are_kept(succeed, tmp_path):
    """Regression: a damaged file, or one of another run, with a later iteration was counted as the
    newest, and the only good one was deleted."""
    saving = ["--save_frequency", 2, "--keep_checkpoints", 2, "--save_to", "w.{}.pth"]
    succeed("main.py", *DIGITS, "--iterations", 2, *saving)
    for name in ("w.final.pth", "w.9000.pth"):
        (tmp_path / name).write_text("somebody's")
    continued = ["--continue_from", "w.{}.pth", "--iterations", 11]
    succeed("main.py", *DIGITS, *continued, *saving)
    names = ["w.10.pth", "w.11.pth", "w.9000.pth", "w.final.pth"]
    assert sorted(os.listdir(tmp_path)) == names


def test_an_old_checkpoint_that_cannot_be_removed_is_a_warning(succeed, tmp_path):
    """Regression: the last save was said to have failed, and the run ended without evaluation."""
    saving = ["--save_frequency", 2, "--keep_checkpoints", 2, "--save_to", "w.{}.pth"]
    succeed("main.py", *DIGITS, "--iterations", 2, *saving)
    (tmp_path / "w.1.pth").mkdir()
    continued = ["--continue_from", "w.{}.pth", "--iterations", 4]
    result = succeed("main.py", *DIGITS, *continued, *saving)
    assert "warning: the old checkpoint w.1.pth cannot be removed" in result.err
    assert "iteration 4: test" in result.out
    assert (tmp_path / "w.4.pth").is_file()


def test_files_are_readable_for_others_as_the_umask_says(succeed, tmp_path):
    """A temporary file is private, but the renamed checkpoint must not be."""
    old = os.umask(0o022)
    try:
        succeed("main.py", *DIGITS, "--iterations", 1, "--save_to", "w.pth")
    finally:
        os.umask(old)
    assert (tmp_path / "w.pth").stat().st_mode & 0o777 == 0o644


def damage(content, random):
    """The bytes with one kind of damage that disks and transfers cause."""
    at, length = random.integers(len(content)), random.integers(1, 4096)
    kind = random.integers(5)
    if kind < 2:
        changed = bytearray(content)
        changed[at] ^= 1 << random.integers(8)
        return bytes(changed)
    if kind == 2:
        return content[:at]
    hole = bytes(length) if kind == 3 else random.bytes(length)
    return content[:at] + hole + content[at + length :]


def equal(a, b):
    """Whether two checkpoints hold the same."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_four_hundred_damaged_files(tiny_checkpoint, tmp_path):
    """Each is refused in one line, unless the damage hit unused bytes and the content is equal.
    torch itself loads flipped bits as other weights: it does not verify checksums."""
    content, random = tiny_checkpoint.read_bytes(), np.random.default_rng(0)
    path, refused = tmp_path / "w.pth", []
    good = vars(Checkpoint.read(tiny_checkpoint)) | {"path": path}
    for _ in range(400):
        path.write_bytes(damage(content, random))
        try:
            loaded = Checkpoint.read(path)
        except UserError as error:
            refused.append(str(error))
        else:
            assert equal(vars(loaded), good)
    assert len(refused) > 300
    assert all(str(path) in line and "\n" not in line for line in refused)


def with_changes(checkpoint, path):
    """A copy of the checkpoint with one entry changed: `path` has its keys and the new value, such
    as ("config", "n_heads", 3); the value ... deletes it."""
    *keys, last, value = path
    changed = copy.deepcopy(checkpoint)
    place = changed
    for key in keys:
        place = place[key]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return changed


WRONG = [
    ("iteration", -1), ("iteration", "3"), ("iteration", True), ("iteration", 2**70),
    ("model_state", []), ("model_state", {}), ("model_state", "predictor.weight", ...),
    ("model_state", "predictor.weight", 3), ("model_state", "predictor.bias", torch.zeros(2)),
    ("model_state", "predictor.bias", torch.zeros(9, dtype=torch.int64)),
    ("model_state", "predictor.weight", torch.zeros(1, 1).expand(2**30, 2**20)),
    ("model_state", "predictor.bias", torch.zeros(9, device="meta")),
    ("model_state", "predictor.bias", torch.zeros(9).to_sparse()),
    ("model_state", "predictor.bias", torch.full((9,), float("nan"))),
    ("model_state", "pos_embedding.pe", torch.zeros(3)), ("model_state", "more", torch.zeros(3)),
    ("optimizer_state", None), ("optimizer_state", "state", []),
    ("optimizer_state", "param_groups", [1]), ("optimizer_state", "param_groups", [{}]),
    ("optimizer_state", "param_groups", 0, "params", [[]]),
    ("optimizer_state", "state", 0, "exp_avg", 3), ("optimizer_state", "state", 0, "step", "x"),
    ("optimizer_state", "state", 0, "exp_avg", ...), ("optimizer_state", "state", 0, 3),
    ("optimizer_state", "state", 0, "exp_avg", torch.zeros(2)),
    ("config", None), ("config", {}), ("config", "n_heads", 10**12), ("config", "n_heads", "2"),
    ("config", "n_layers", 2**62), ("config", "n_layers", 0), ("config", "length", 65),
    ("config", "dropout", 2.0), ("config", "dropout", "x"), ("config", "softmax_temp", -1.0),
    ("config", "attention_type", "none"), ("config", "attention_type", ["full"]),
    ("config", "unmasked_reformer", 1), ("config", "unknown", 1),
    ("dataset", "digits"), ("dataset", {}), ("dataset", "name", 3),
    ("dataset", "image_shape", (8, 8)), ("dataset", "image_shape", [8, -8]),
    ("dataset", "image_shape", [4, 4]), ("dataset", "image_shape", [2**40, 2**40]),
    ("first_byte_counts", torch.zeros(255, dtype=torch.int64)), ("first_byte_counts", 1),
    ("first_byte_counts", torch.full((256,), -1)), ("first_byte_counts", torch.zeros(256)),
    ("seed", -1), ("seed", 0.5), ("threads", -1), ("threads", "2"),
    ("measured", "bf16"), ("measured", "machine", 2), ("measured", "training", "fp16"),
    ("config", "neighbours", 1), ("config", "neighbours", True), ("config", "width", -1),
    ("config", "width", "8"), ("config", "channels", 1.0),
    ("settings", None), ("settings", []), ("settings", "unknown", 1), ("settings", "lr", "x"),
    ("settings", "lr", float("nan")), ("settings", "lr", -1.0), ("settings", "lr", 10**400),
    ("settings", "muon_lr", True), ("settings", "clip_norm", float("inf")),
    ("settings", "warmup", 2.5), ("settings", "warmup", -1), ("settings", "recipe", "slow"),
    ("settings", "recipe", ["paper"]), ("settings", "optimizer", "sgd"),
    ("settings", "lr_schedule", "linear"),
    ("format_version", "1"), ("format_version", None), ("format_version", 4), ("seed", ...),
    ("config", ...), ("dataset", ...), ("first_byte_counts", ...),
]  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG, ids=[".".join(map(str, w[:-1])) for w in WRONG])
def test_entries_of_the_wrong_type_or_value_are_refused(wrong, tiny_checkpoint, call, tmp_path):
    """By both scripts, before anything is built from them: one line, status 2."""
    torch.save(with_changes(load(tiny_checkpoint), wrong), "wrong.pth")
    train = ["--continue_from", "wrong.pth", "--iterations", 31, "--evaluate_images", 2]
    results = [call("main.py", *train, "--batch_size", 2)]
    if wrong[0] != "optimizer_state" or len(wrong) == 2:  # not used for sampling
        results.append(call("prediction.py", "wrong.pth", "--offset", 0))
        results.append(call("prediction.py", "wrong.pth", "--offset", 32))
    for result in results:
        assert result.status == 2, result
        assert result.err.count("error: ") == 1
        assert result.err.splitlines()[-1].partition(": ")[2].startswith("error: ")
        assert "Traceback" not in result.err
