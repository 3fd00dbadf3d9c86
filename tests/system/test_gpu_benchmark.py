"""benchmarks/gpu.py: a step that fails in any way does not stop the others."""

import json
import os
import time

import pytest
import torch

from benchmarks import gpu
from cli import process
from utils import UserError

CASE = {"what": "training", "config": "mnist", "batch": 4, "mode": "compiled", "precision": "fp32"}


def works():
    yield {"rates": {"fp32": 1e3, "copy": 100.0}, "text": "a machine"}
    yield {**CASE, "ms": 500.0, "operations": 250, "traffic": 10}
    yield gpu.attempt(CASE, out_of_memory)


def out_of_memory():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")


def fails():
    yield {"text": "before"}
    raise ValueError("two\nlines")


def hangs():
    yield {"text": "before"}
    time.sleep(1000)


def crashes():
    os._exit(7)
    yield


def test_every_step_is_tried(monkeypatch, capsys, tmp_path):
    steps = [("one", fails, (), 300), ("two", hangs, (), 1), ("three", crashes, (), 300)]
    steps += [("four", works, (), 300), ("five", works, (), 300)]
    monkeypatch.setattr(gpu, "list_steps", lambda device: steps)
    with pytest.raises(SystemExit) as exit:
        process.run(lambda: gpu.main(["--device", "cpu", "--json", "results.json"]))
    assert exit.value.code == 1
    result = json.loads((tmp_path / "results.json").read_text())
    errors = ["ValueError: two lines", "stopped after 1 s", "the process ended with status 7"]
    assert [step["error"] for step in result["steps"]] == [*errors, None, None]
    assert result["rates"] == {"fp32": 1e3, "copy": 100.0}
    measured = [record for record in result["records"] if "ms" in record]
    assert [record["of_matrix_rate"] for record in measured] == [0.5, 0.5]
    assert [record["of_copy_rate"] for record in measured] == [0.2, 0.2]
    out = capsys.readouterr().out
    assert out.count("before") >= 1
    assert out.count("FAILED: training mnist 4 compiled fp32: out of memory") == 2
    assert out.splitlines()[-5:-2] == ["FAILED: one", "FAILED: two", "FAILED: three"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_nothing_starts(tmp_path):
    with pytest.raises(UserError, match="finds 0 CUDA devices"):
        gpu.main([])
    assert not list(tmp_path.iterdir())
