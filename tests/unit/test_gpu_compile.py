"""The Triton kernels, compiled for GPUs that are not here."""

import pytest

pytest.importorskip("triton", reason="torch comes with triton on Linux alone")
from benchmarks.gpu_compile import TARGETS, list_kernels, measure

# The kernels with matrix products.
PRODUCTS = "sum_chunks", "attend", "sum_gradients", "backpropagate"
pytestmark = pytest.mark.slow


@pytest.mark.parametrize("E", [16, 32, 64, 128])
def test_kernels_fit_the_registers_and_use_tensor_cores(E, monkeypatch, tmp_path):
    """Nothing is spilled to memory, two blocks fit the registers of a multiprocessor, shared memory
    is within the 48 KB that need no permission. Of heads of 32 on every target, else on one."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    targets = list(TARGETS) if E == 32 else [80]
    records = list(measure([E], targets))
    assert len(records) == len(targets) * len(list(list_kernels(E)))
    for record in records:
        assert record["spilled"] == 0, record
        assert record["blocks"] >= 2, record
        assert record["shared"] <= 48 * 1024, record
        products = record["products"] != "none"
        assert products == (record["kernel"] in PRODUCTS), record
