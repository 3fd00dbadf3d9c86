"""What several test files use: tiny models, scripts as processes, the files that runs write."""

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

import main
import prediction
import prepare

ROOT = Path(__file__).parent.parent
SCRIPTS = {"main.py": main.main, "prediction.py": prediction.main, "prepare.py": prepare.main}

# Where the tests marked `cuda` run; TEST_DEVICE=cpu runs most of them without a GPU.
DEVICE = torch.device(os.environ.get("TEST_DEVICE", "cuda"))

# Sizes of random logits and means, and means and sizes of log-scales: below their minimum, far
# above the range of bytes, means far outside it, and one component that has all the weight.
EXTREME_MIXTURES = {
    "ordinary": (1, 1, -2, 1),
    "narrow": (1, 0.7, -7.5, 1),
    "clamped": (1, 0.7, -60, 20),
    "wide": (1, 1, 12, 2),
    "flat": (1, 1, 95, 5),
    "far": (3, 300, -4, 3),
    "one-sided": (500, 1, -3, 2),
}

# A model that trains and samples in seconds, and its training on the embedded digits.
TINY = ["--n_layers", "2", "--n_heads", "2", "--d_query", "8", "--mixtures", "3"]
DIGITS = ["--dataset", "digits", *TINY, "--batch_size", "8", "--evaluate_images", "8"]


def require_library():
    """Skip a test where pytorch-fast-transformers is missing; in CI that is a failure."""
    if find_spec("fast_transformers") is None and os.environ.get("CI") != "true":
        pytest.skip("pytorch-fast-transformers is not installed: make reference")


def start(script, *arguments, **kwargs):
    """Start a script as a process of its own."""
    return start_command([sys.executable, ROOT / script, *arguments], **kwargs)


def start_two(script, *arguments, **kwargs):
    """Start a script in two processes, by torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", 2]
    return start_command([*command, "--standalone", ROOT / script, *arguments], **kwargs)


def start_module(module, *arguments):
    """Start a module of the project, such as benchmarks.curves, in the current folder."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return start_command([sys.executable, "-m", module, *arguments], env=environment)


def start_command(command, **kwargs):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([str(part) for part in command], **{**pipes, **kwargs})


def finish(process, status=0):
    """Wait for a process, which must end with this status; returns its stdout and stderr."""
    out, err = process.communicate(timeout=300)
    assert process.returncode == status, err
    assert "Traceback" not in (err or "")
    return out, err


def run_two(script, *arguments):
    """Run a script in two processes; returns what they print."""
    return finish(start_two(script, *arguments))[0]


def children(process):
    """The ids of the processes that a process has started."""
    command = ["ps", "-o", "pid=", "--ppid", str(process.pid)]
    done = subprocess.run(command, capture_output=True, text=True)
    return [int(pid) for pid in done.stdout.split()]


def load(path):
    """The entries of a checkpoint, as the original's loader sees them."""
    return torch.load(path, map_location="cpu", weights_only=True)


def weights(path):
    return load(path)["model_state"]


def assert_equal_weights(a, b):
    a, b = weights(a), weights(b)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def records(path):
    """The lines of a metrics file."""
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def losses(path):
    """{iteration: bits/dim} of training."""
    return {r["iteration"]: r["bits_per_dim"] for r in records(path) if r["split"] == "train"}


def help_of(call, script, flag):
    """The entry of a flag in a script's --help, on one line."""
    out = " ".join(call(script, "--help").out.split("options:")[1].split())
    return re.split(r" --(?=\w+ |\w+$)", out.rsplit(f" --{flag} ", 1)[1])[0]


def write_colour_images(folder, height, width):
    """Write 12 + 4 random images to train.npy and test.npy; returns the folder."""
    random = np.random.default_rng(0)
    for split, n in (("train", 12), ("test", 4)):
        images = random.integers(0, 256, (n, height, width, 3), np.uint8)
        np.save(folder / f"{split}.npy", images)
    return folder
