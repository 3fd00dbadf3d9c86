"""On a GPU, through the command line: training, continuing, sampling, and too little memory."""

import math

import imageio.v3
import numpy as np
import pytest
import torch
from helpers import DEVICE, TINY, records, weights

pytestmark = pytest.mark.cuda
DIGITS = ["main.py", "--dataset", "digits", *TINY, "--batch_size", 8, "--evaluate_images", 16]
DIGITS += ["--device", str(DEVICE), "--log_frequency", 1]
RECIPES = pytest.mark.parametrize(
    "flags", [["--optimizer", "adam"], ["--recipe", "fast"]], ids=["adam", "fast"]
)


def losses(path, split="train"):
    return [record["bits_per_dim"] for record in records(path) if record["split"] == split]


@RECIPES
def test_a_run_continues(flags, succeed, tmp_path):
    """Its losses are those of an uninterrupted run, up to the order of sums on a GPU."""
    command = [*DIGITS, *flags, "--lr_schedule", "constant", "--warmup", 0]
    succeed(*command, "--iterations", 8, "--metrics_file", "whole.jsonl")
    for iterations in (4, 8):
        succeed(*command, "--iterations", iterations, "--metrics_file", "parts.jsonl",
                "--save_to", "w.{}.pth", "--continue_from", "w.{}.pth")  # fmt: skip
    pairs = zip(losses(tmp_path / "whole.jsonl"), losses(tmp_path / "parts.jsonl"), strict=True)
    assert all(math.isclose(a, b, rel_tol=1e-4) for a, b in pairs)
    assert {tensor.device.type for tensor in weights("w.8.pth").values()} == {"cpu"}


@RECIPES
def test_bfloat16_learns_as_float32(flags, succeed, tmp_path):
    """60 iterations end within a fiftieth, far below the 8 bits/dim of the start."""
    ends = []
    for precision in ("fp32", "bf16"):
        file = tmp_path / f"{precision}.jsonl"
        command = [*DIGITS, *flags, "--lr", 1e-2, "--precision", precision, "--iterations", 60]
        succeed(*command, "--metrics_file", file)
        ends += losses(file, "test")
    assert math.isclose(*ends, rel_tol=0.02)
    assert max(ends) < 6


@RECIPES
def test_samples_while_it_trains(flags, succeed):
    """Each picture has a new decoder or CUDA graph, and training goes on after it."""
    command = [*DIGITS, *flags, "--iterations", 5, "--evaluate_frequency", 2]
    out = succeed(*command, "--samples", "{}.png").out
    assert out.count(": drew ") == 3
    assert all(imageio.v3.imread(f"{i}.png").std() > 10 for i in (2, 4, 5))


def test_evaluation_is_that_of_the_cpu(succeed, tiny_checkpoint, tmp_path):
    for device in (DEVICE.type, "cpu"):
        command = ["main.py", "--continue_from", tiny_checkpoint, "--evaluate_only"]
        succeed(*command, "--device", device, "--metrics_file", "bits.jsonl")
    assert math.isclose(*losses(tmp_path / "bits.jsonl", "test"), rel_tol=1e-4)


@pytest.mark.parametrize("checkpoint", ["tiny_checkpoint", "fast_checkpoint"])
def test_samples_are_those_of_the_cpu(checkpoint, succeed, request, tmp_path):
    """Of every sampler, except where a tie is decided by rounding and changes all later bytes."""
    samplers = [["--recompute"], []]
    samplers += [["--compile"], ["--recompute", "--no-compile"]] if DEVICE.type == "cuda" else []
    images = []
    for device, flags in [("cpu", samplers[0]), *((DEVICE.type, flags) for flags in samplers)]:
        command = ["prediction.py", request.getfixturevalue(checkpoint), *flags, "--index", "0-9"]
        succeed(*command, "--device", device, "--save_image", "{}.{}.png")
        images.append(np.stack([imageio.v3.imread(f"pred.{i}.png") for i in range(9)]))
    for others in images[1:]:
        assert (images[0] == others).all((1, 2)).mean() >= 0.5


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs the memory of a GPU")
def test_too_little_memory_is_one_line(call):
    """Simulated by a limit of a fiftieth; the estimate before the run sees the whole memory."""
    torch.cuda.set_per_process_memory_fraction(0.02)
    try:
        big = ["--n_layers", 8, "--n_heads", 8, "--d_query", 32, "--batch_size", 1024]
        result = call(*DIGITS, *big, "--iterations", 1)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()
    assert result.status == 2
    assert result.err.splitlines()[-1].startswith("main.py: error: out of memory")
    assert "Traceback" not in result.err
