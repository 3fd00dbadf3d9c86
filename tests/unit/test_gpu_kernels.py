"""The Triton kernels, without a GPU."""

import os
import subprocess
import sys

import pytest
import torch
from helpers import ROOT

from engine.construction import choose_ops
from layers.ops import PlainOps
from models import ModelConfig

pytest.importorskip("triton", reason="torch comes with triton on Linux alone")


@pytest.mark.slow
def test_kernels_in_the_interpreter():
    """A process of its own: triton reads the variable when it is imported."""
    cases = "tests/triton_cases.py", "tests/triton_gated_cases.py"
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *cases]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
@pytest.mark.parametrize("compile", [None, True, False])
def test_plain_operations_where_triton_does_not_work(compile, capfd):
    """One line says why; --no-compile is plain without a word."""
    ops = choose_ops(ModelConfig(64), torch.device("cuda"), compile, "training")
    assert type(ops) is PlainOps
    error = capfd.readouterr().err
    lines = error.splitlines()
    assert len(lines) == (0 if compile is False else 1), error
    assert compile is False or "training in plain PyTorch" in lines[0]


def test_plain_operations_without_triton(monkeypatch, capfd):
    """As on Windows."""
    monkeypatch.setitem(sys.modules, "triton", None)
    for name in [name for name in sys.modules if name.startswith("gpu.")]:
        monkeypatch.delitem(sys.modules, name)
    ops = choose_ops(ModelConfig(64), torch.device("cuda"), None, "sampling")
    assert type(ops) is PlainOps
    error = capfd.readouterr().err
    assert len(error.splitlines()) == 1
    assert "triton" in error


def test_nothing_is_imported_without_cuda():
    """Triton takes a second to import, and most machines without a GPU do not have it."""
    code = "import sys, main, prediction; assert not {'gpu.ops', 'triton'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
