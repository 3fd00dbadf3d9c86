"""The benchmarks run; their numbers are not looked at."""

import json

import pytest

import utils
from benchmarks import measure, sampling_speed, training_speed

SMALL = {"length": 784, "n_layers": 1, "n_heads": 1}


@pytest.mark.parametrize(
    "benchmark", [sampling_speed, training_speed], ids=["sampling", "training"]
)
def test_a_benchmark_runs(benchmark, monkeypatch, tmp_path):
    """Regression: the one of sampling stopped when the state of a layer became an object."""
    monkeypatch.setitem(measure.COMPARED, "mnist", SMALL)
    words = "--configs mnist --batches 2 --precisions fp32 --rounds 1 --json r.json --plot r.png"
    benchmark.main(words.split())
    records = json.loads((tmp_path / "r.json").read_text())
    assert {record["batch"] for record in records} >= {2}
    assert (tmp_path / "r.png").exists()


def test_emulated_precisions_are_not_measured_unasked(monkeypatch):
    """Regression: on a CPU without bfloat16 instructions, where a large product takes seconds, the
    benchmarks ran for minutes before their first line about a model."""
    monkeypatch.setattr(utils, "has_bfloat16", lambda device: device.type != "cpu")
    parse = measure.parse_arguments
    assert parse("", None, []).precisions == ["fp32"]
    assert parse("", None, ["--precisions", "bf16"]).precisions == ["bf16"]
