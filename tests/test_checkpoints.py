"""Checkpoints: whole or not at all, found by pattern, and never executed."""

import os
import pickle

import pytest
import torch

import checkpoints
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


def test_the_newest_of_a_pattern_is_the_largest_iteration(tmp_path):
    """The original took the file written last: a copy of an old one won over a newer."""
    pattern = str(tmp_path / "w.{}.pth")
    for iteration in (100, 20, 3):
        checkpoints.save(pattern, make(iteration))
    (tmp_path / "w.best.pth").write_text("no number")
    checkpoint, path = checkpoints.load_newest(pattern)
    assert checkpoint["iteration"] == 100
    assert path == tmp_path / "w.100.pth"


def test_a_pattern_without_files_and_a_missing_file(tmp_path):
    assert checkpoints.load_newest(str(tmp_path / "none" / "w.{}.pth")) == (None, None)
    with pytest.raises(UserError, match="does not exist"):
        checkpoints.load_newest(str(tmp_path / "w.pth"))


def test_a_damaged_newest_falls_back_with_a_warning(tmp_path, capsys):
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
    """A temporary file is private, and the renamed checkpoint must not stay so."""
    old = os.umask(0o022)
    try:
        path = checkpoints.save(str(tmp_path / "w.pth"), make(1))
    finally:
        os.umask(old)
    assert path.stat().st_mode & 0o777 == 0o644


def test_old_layout_is_renamed():
    weights = torch.arange(12.0).view(6, 2)
    state = {
        "transformer.layers.0.self_attn.in_proj_weight": weights,
        "transformer.layers.0.self_attn.out_proj.bias": torch.ones(2),
        "predictor.bias": torch.zeros(3),
    }
    checkpoint = {"model_state": state}
    checkpoints.upgrade_layout(checkpoint, "old.pth")
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
        checkpoints.upgrade_layout(checkpoint, "new.pth")
