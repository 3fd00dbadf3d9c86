"""The Triton kernels, without a GPU."""

import os
import subprocess
import sys
from unittest.mock import Mock

import pytest
import torch
from helpers import ROOT

from engine.construction import choose_ops
from layers.ops import PlainOps
from models import ModelConfig

pytest.importorskip("triton", reason="torch comes with triton on Linux alone")
import gpu.ops


@pytest.mark.slow
@pytest.mark.parametrize("cases", sorted(ROOT.glob("tests/triton*_cases.py")), ids=lambda x: x.stem)
def test_kernels_in_the_interpreter(cases):
    """A process of its own: triton reads the variable when it is imported."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", cases]
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


def assert_plain(capfd, reason):
    """That the operations are plain and that one line says why."""
    assert type(choose_ops(ModelConfig(64), torch.device("cuda"), None, "sampling")) is PlainOps
    error = capfd.readouterr().err
    assert len(error.splitlines()) == 1, error
    assert reason in error


@pytest.fixture
def imported_again(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("gpu.")]:
        monkeypatch.delitem(sys.modules, name)


def test_without_triton(monkeypatch, imported_again, capfd):
    """As on Windows."""
    monkeypatch.setitem(sys.modules, "triton", None)
    assert_plain(capfd, "triton")


def test_old_triton(monkeypatch, imported_again, capfd):
    """One that lacks something when it is imported."""
    monkeypatch.delattr("triton.knobs")
    assert_plain(capfd, "has no attribute 'knobs'")


def test_gpu_of_amd(monkeypatch, capfd):
    monkeypatch.setattr("torch.version.hip", "7.0")
    assert_plain(capfd, "a GPU of AMD")


@pytest.mark.parametrize("capability", [(7, 5), (13, 0)])
def test_unknown_architecture(monkeypatch, capability, capfd):
    """Checked before the compiler is called, since LLVM aborts the process for some of them."""
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: capability)
    assert_plain(capfd, f"compute capability {capability[0]}.{capability[1]}, not one of 8.0")


def test_failing_compiler(monkeypatch, capfd):
    """The first kernel of the comparison does not compile, with a report of many lines."""

    def fail(config, device):
        error = RuntimeError("PTXAS error:\n  line 1\n  line 2")
        yield gpu.ops.Case("norm", Mock(side_effect=error), [torch.ones(1)])

    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr("gpu.ops.small_cases", fail)
    assert_plain(capfd, "PTXAS error: line 1 line 2")


def test_nothing_is_imported_without_cuda():
    """Triton takes a second to import, and most machines without a GPU do not have it."""
    code = "import sys, main, prediction; assert not {'gpu.ops', 'triton'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
