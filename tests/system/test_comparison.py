"""python -m benchmarks.comparison, with tiny models; its numbers are not looked at."""

import json
import os
import signal
import sys
from importlib.util import find_spec

import imageio.v3
import pytest
import torch
from helpers import ROOT, finish, require_library, start_command, start_module

from benchmarks.comparison import learning
from benchmarks.comparison.__main__ import main
from benchmarks.comparison.methods import METHODS, make_sampler
from benchmarks.comparison.report import QUANTITIES, Point, crossover, crossovers, where
from utils import UserError

CPU = torch.device("cpu")
LIBRARY = find_spec("fast_transformers") is not None
INSTALLED = [name for name in METHODS if LIBRARY or "library" not in name]
SMALL = {"length": 40, "n_layers": 2, "n_heads": 2}


def run(*arguments):
    """Run the command; returns what it prints, as a list of lines."""
    return finish(start_module("benchmarks.comparison", *arguments))[0].splitlines()


def report_of(lines):
    """The lines after the first empty one: before it are those of progress."""
    return lines[lines.index("") :]


def test_quick_comparison(tmp_path):
    """The records of all installed methods, a report, a figure, and both again from the file."""
    lines = run("--quick", "--device", "cpu", "--json", "out/r.json", "--plot", "out/r.png")
    results = json.loads((tmp_path / "out" / "r.json").read_text())
    assert {r["method"] for r in results["sampling"]} == set(INSTALLED)
    assert {r["method"] for r in results["training"]} == set(INSTALLED) - {"softmax, KV cache"}
    assert {(r["method"], r["length"]) for r in results["training"]} >= {("linear", 256)}
    assert {r["batch"] for r in results["sampling"]} == {1, 10}
    for words in ("sampling, ms per byte;", "mnist, images per second", "times that of 64 bytes"):
        assert any(words in line for line in lines)
    assert imageio.v3.imread(tmp_path / "out" / "r.png").std() > 10
    again = run("--results", "out/r.json", "--plot", "again.pdf")
    assert report_of(again) == report_of(lines)
    assert (tmp_path / "again.pdf").exists()


def test_quick_learning(tmp_path):
    run("--learning", "--quick", "--device", "cpu", "--json", "l.json", "--plot", "l.png")
    runs = json.loads((tmp_path / "l.json").read_text())["learning"]
    assert [(record["method"], record["seed"]) for record in runs] == [
        (name, seed) for seed in (0, 1) for name in learning.METHODS if name in INSTALLED
    ]
    for record in runs:
        images = [point["images"] for point in record["points"]]
        assert images == sorted(set(images))
        assert all(0 < point["bits_per_dim"] < 9 for point in record["points"])
    assert imageio.v3.imread(tmp_path / "l.png").std() > 10


def test_results_that_are_none(tmp_path):
    (tmp_path / "r.json").write_text("[]")
    with pytest.raises(UserError, match="is not a file that --json has written"):
        main(["--results", "r.json"])
    (tmp_path / "half.json").write_text('{"machine": "m", "date": "d", "minutes": 1, "quick": 0}')
    with pytest.raises(UserError, match="is not a file that --json has written"):
        main(["--results", "half.json"])


def test_ctrl_c_ends_all_processes_in_one_line():
    """Regression: a traceback of each process."""
    command = [sys.executable, "-m", "benchmarks.comparison", "--quick", "--device", "cpu"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = start_command(command, env=environment, start_new_session=True)
    while not process.stdout.readline().startswith("training step"):
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGINT)
    _, err = finish(process, status=130)
    assert err == "__main__.py: interrupted\n"


@pytest.mark.parametrize("name", METHODS)
def test_a_sampler_draws_the_bytes_it_is_asked_for(name):
    """A time per byte is wrong if more or fewer bytes, or others, are drawn."""
    if "library" in name:
        require_library()
    sampler = make_sampler(name, SMALL, 2, CPU)
    for position, count in ((30, 4), (1, 2)):
        sampler.images.fill_(7)  # which is not drawn: random weights draw mostly 0 and 255
        sampler.draw(position, count)
        drawn = (sampler.images != 7).all(0).nonzero().flatten().tolist()
        assert drawn == list(range(position, position + count))


@pytest.mark.parametrize(
    ("name", "other"), [("softmax", "softmax, KV cache"), ("linear", "linear (library)")]
)
def test_samplers_of_one_attention_draw_the_same_images(name, other):
    """A whole image: the methods that are compared do the same work."""
    if "library" in other:
        require_library()
    first, second = (make_sampler(name, SMALL, 2, CPU) for name in (name, other))
    for sampler in (first, second):
        sampler.draw(1, SMALL["length"] - 1)
    assert (first.images == second.images).float().mean() > 0.95  # a byte may be rounded otherwise
    assert len(first.images.unique()) > 5


def test_crossover():
    """Linear times against quadratic ones that are equal at 1,000."""
    lengths = [256, 784, 3072]
    assert crossover(lengths, [n / 1000 for n in lengths]) == pytest.approx(1000)
    assert crossover(lengths, [1.1, 0.9, 1.1]) == pytest.approx((784 * 3072) ** 0.5, rel=0.05)
    assert crossover(lengths, [1.1, 1.2, 1.3]) == 256
    assert crossover(lengths, [1.1, 1.2, 0.9]) is None
    assert where(lengths, [0.256, 0.784, 3.072]) == (
        "from about L = 1,000 on (by a factor of 3.07 at 3,072)"
    )
    assert where(lengths, [2, 2, 0.5]) == "at no length up to 3,072 (there the factor is 0.5)"


def test_differences_within_the_noise_are_no_crossover():
    """Regression: two memories that differed by 2% at the longest length were said to cross before
    it, since they differed by more at the shortest."""
    curves = {
        "linear": {256: Point(100, False), 784: Point(201, False)},
        "softmax": {256: Point(106, False), 784: Point(205, False)},
    }
    (sentence,) = crossovers(curves, QUANTITIES[1])
    assert sentence == "training, MB per step: linear is within 5% of softmax at 784"
