"""Checkpoints: written atomically, found by pattern, and never executed."""

import copy
import os
import pickle

import numpy as np
import pytest
import torch

from engine import checkpoint as checkpoints
from engine import restoring
from utils import UserError


def make(iteration, value=0.0):
    return {
        "model_state": {"x": torch.full((100,), value)},
        "optimizer_state": {"state": {}, "param_groups": []},
        "iteration": iteration,
        "config": {"length": 64},
        "dataset": {"name": "digits", "image_shape": [8, 8]},
        "first_byte_counts": torch.zeros(256, dtype=torch.int64),
        "seed": 0,
        "optimizer": "radam",
    }


def test_the_newest_of_a_pattern_is_the_largest_iteration(tmp_path, capsys):
    """The original loaded the file written last, which could be a copy of an old checkpoint."""
    pattern = str(tmp_path / "w.{}.pth")
    for iteration in (100, 20, 3):
        checkpoints.save(pattern, make(iteration))
    (tmp_path / "w.best.pth").write_text("no number")
    checkpoint, path = checkpoints.load_newest(pattern)
    assert checkpoint["iteration"] == 100
    assert path == tmp_path / "w.100.pth"
    assert f"loaded {path}, iteration 100" in capsys.readouterr().out


def test_a_pattern_without_files_and_a_missing_file(tmp_path):
    pattern = str(tmp_path / "none" / "w.{}.pth")
    assert checkpoints.load_newest(pattern, or_none=True) == ({}, None)
    with pytest.raises(UserError, match="no file matches"):
        checkpoints.load_newest(pattern)
    for or_none in (False, True):
        with pytest.raises(UserError, match="does not exist"):
            checkpoints.load_newest(str(tmp_path / "w.pth"), or_none)


def test_a_damaged_newest_file_is_skipped_with_a_warning(tmp_path, capsys):
    pattern = str(tmp_path / "w.{}.pth")
    for iteration in (1, 2):
        checkpoints.save(pattern, make(iteration))
    (tmp_path / "w.3.pth").write_bytes((tmp_path / "w.2.pth").read_bytes()[:500])
    assert checkpoints.load_newest(pattern)[0]["iteration"] == 2
    assert "w.3.pth is damaged" in capsys.readouterr().err


def test_only_damaged_files_are_an_error(tmp_path):
    (tmp_path / "w.3.pth").write_bytes(b"")
    with pytest.raises(UserError, match=r"w\.3\.pth is damaged"):
        checkpoints.load_newest(str(tmp_path / "w.{}.pth"))


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("executed",)


FOREIGN = {
    "pickle": pickle.dumps({"model_state": 1}),
    "hostile-pickle": pickle.dumps(Hostile()),
    "text": b"hello",
    "png": b"\x89PNG\r\n\x1a\n",
    "zip": b"PK\x03\x04 nothing",
}


@pytest.mark.parametrize("content", FOREIGN.values(), ids=FOREIGN)
def test_foreign_files_are_refused_and_not_executed(content, tmp_path):
    path = tmp_path / "w.pth"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"w\.pth"):
        checkpoints.load(path)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("content", [Hostile(), {"model_state": Hostile(), "iteration": 1}, [1], 3])
def test_foreign_torch_files_are_refused(content, tmp_path):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"w\.pth"):
        checkpoints.load(tmp_path / "w.pth")
    assert not (tmp_path / "executed").exists()


def test_a_failed_save_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "w.pth"
    checkpoints.save(str(path), make(1, 1.0))

    def full_disk(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        checkpoints.save(str(path), make(2, 2.0))
    assert checkpoints.load(path)["iteration"] == 1
    assert os.listdir(tmp_path) == ["w.pth"]


def test_keep_deletes_the_oldest_only(tmp_path):
    pattern = str(tmp_path / "w.{}.pth")
    (tmp_path / "w.final.pth").write_text("somebody's")
    for iteration in (8, 9, 10, 11):
        checkpoints.save(pattern, make(iteration), keep=2)
    assert sorted(os.listdir(tmp_path)) == ["w.10.pth", "w.11.pth", "w.final.pth"]


def test_files_are_readable_for_others_as_the_umask_says(tmp_path):
    """A temporary file is private, but the renamed checkpoint must not be."""
    old = os.umask(0o022)
    try:
        path = checkpoints.save(str(tmp_path / "w.pth"), make(1))
    finally:
        os.umask(old)
    assert path.stat().st_mode & 0o777 == 0o644


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
    good, path, refused = checkpoints.load(tiny_checkpoint), tmp_path / "w.pth", []
    for _ in range(400):
        path.write_bytes(damage(content, random))
        try:
            loaded = checkpoints.load(path)
        except UserError as error:
            refused.append(str(error))
        else:
            assert equal(loaded, good)
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
    ("model_state", "transformer.layers", torch.zeros(3)),
    ("model_state", "pos_embedding.pe", torch.zeros(3)),
    ("model_state", "more", torch.zeros(3)),
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
    ("seed", -1), ("seed", 0.5), ("optimizer", "sgd"), ("optimizer", ["radam"]),
    ("threads", -1), ("threads", "2"),
    ("config", "neighbours", 1), ("config", "neighbours", True), ("config", "width", -1),
    ("config", "width", "8"), ("config", "channels", 1.0),
    ("settings", None), ("settings", []), ("settings", "unknown", 1), ("settings", "lr", "x"),
    ("settings", "lr", float("nan")), ("settings", "lr", -1.0), ("settings", "muon_lr", True),
    ("settings", "clip_norm", float("inf")), ("settings", "warmup", 2.5),
    ("settings", "warmup", -1), ("settings", "recipe", "slow"), ("settings", "recipe", ["paper"]),
    ("settings", "optimizer", "sgd"), ("settings", "lr_schedule", "linear"),
    ("format_version", "1"), ("format_version", None), ("format_version", 2), ("seed", ...),
    ("config", ...), ("dataset", ...), ("first_byte_counts", ...), ("optimizer", ...),
]  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG, ids=[".".join(map(str, w[:-1])) for w in WRONG])
def test_entries_of_the_wrong_type_or_value_are_refused(wrong, tiny_checkpoint, call, tmp_path):
    """By both scripts, before anything is built from them: one line, status 2."""
    torch.save(with_changes(checkpoints.load(tiny_checkpoint), wrong), "wrong.pth")
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


def test_keep_never_deletes_what_was_just_saved(tmp_path):
    """A damaged file, or one of another run, with a later iteration was counted as the newest,
    and the only good one was deleted."""
    pattern = str(tmp_path / "w.{}.pth")
    (tmp_path / "w.9000.pth").write_bytes(b"damaged")
    for iteration in (1, 2):
        checkpoints.save(pattern, make(iteration), keep=1)
    assert sorted(os.listdir(tmp_path)) == ["w.2.pth", "w.9000.pth"]
    assert checkpoints.load_newest(pattern)[0]["iteration"] == 2


def test_old_layout_is_renamed():
    weights = torch.arange(12.0).view(6, 2)
    state = {
        "transformer.layers.0.self_attn.in_proj_weight": weights,
        "transformer.layers.0.self_attn.out_proj.bias": torch.ones(2),
        "predictor.bias": torch.zeros(3),
    }
    checkpoint = {"model_state": state}
    restoring.upgrade_layout(checkpoint, "old.pth")
    upgraded = checkpoint["model_state"]
    assert torch.equal(
        upgraded["transformer.layers.0.attention.key_projection.weight"], weights[2:4]
    )
    assert set(upgraded) == {
        *(
            f"transformer.layers.0.attention.{x}_projection.weight"
            for x in ("query", "key", "value")
        ),
        "transformer.layers.0.attention.out_projection.bias",
        "predictor.bias",
    }
    with pytest.raises(UserError, match="--load_pytorch"):
        restoring.upgrade_layout(checkpoint, "new.pth")
