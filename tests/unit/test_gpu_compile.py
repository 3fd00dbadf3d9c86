"""The Triton kernels, compiled for GPUs that are not here."""

import pytest
import torch

pytest.importorskip("triton", reason="torch comes with triton on Linux alone")
from benchmarks.gpu_compile import INTEGERS, TARGETS, compile_kernel, list_kernels, measure
from gpu.ops import CAPABILITIES

# The kernels with matrix products.
PRODUCTS = {"sum_chunks", "attend", "sum_gradients", "backpropagate"}
PRODUCTS |= {f"gated_{name}" for name in PRODUCTS}
pytestmark = pytest.mark.slow


@pytest.mark.parametrize("E", [32, 48, 64, 96, 128])
def test_kernels_fit_the_registers_and_use_tensor_cores(E, monkeypatch, tmp_path):
    """Nothing is spilled to memory, two blocks fit the registers of a multiprocessor, shared memory
    is within the 48 KB that need no permission. Of heads of 32 on every target; of other heads only
    attention and its step, on one."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernels, targets = list(list_kernels(E)), list(TARGETS)
    if E != 32:
        names = *PRODUCTS, "read_position"
        kernels, targets = [x for x in kernels if x[0].__name__ in names], [80]
    records = list(measure(kernels, targets))
    assert len(records) == len(targets) * len(kernels)
    for record in records:
        assert record["spilled"] == 0, record
        assert record["blocks"] >= 2, record
        assert record["shared"] <= 48 * 1024, record
        products = record["products"] != "none"
        assert products == (record["kernel"] in PRODUCTS), record


@pytest.mark.parametrize("capability", CAPABILITIES, ids=str)
def test_accepted_gpus_are_known_to_the_compiler(capability, monkeypatch, tmp_path):
    """By the kernel that uses most of their instructions."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    (kernel,) = [
        x for x in list_kernels(32) if x[0].__name__ == "attend" and x[1] == torch.bfloat16
    ]
    target = 10 * capability[0] + capability[1]
    assert compile_kernel(*kernel, target)["products"] != "none"


def test_sizes_of_one(monkeypatch, tmp_path):
    """One position, head or row: Triton compiles a kernel of its own for the number 1."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for kernel, dtype, constants, options in list_kernels(16, 1):
        if dtype == torch.bfloat16:
            ones = {name: 1 for name in kernel.arg_names if name in INTEGERS}
            compile_kernel(kernel, dtype, {**ones, **constants}, options, 90)
