"""The trained weights in weights/, as docs/weights.md describes them."""

import re

import pytest
from helpers import ROOT

CARDS = (ROOT / "docs" / "weights.md").read_text()
BITS = r"(\d\.\d+) bits/dim \((\d\.\d+) over all bytes\)"


def test_every_file_has_a_card_and_is_small():
    files = list((ROOT / "weights").glob("*.pth"))
    assert files
    for path in files:
        assert f"## weights/{path.name}\n" in CARDS
        assert path.stat().st_size < 9e6


def test_the_embedded_digits_have_the_bits_per_dim_on_the_card(succeed):
    flags = ["--evaluate_only", "--dataset", "mnist-10k", "--evaluate_images", 100]
    result = succeed("main.py", "--continue_from", ROOT / "weights" / "mnist.pth", *flags)
    measured = re.search(f"test {BITS}", result.out).groups()
    stated = re.search(rf"the first 100 embedded test digits \| {BITS}", CARDS).groups()
    assert [*map(float, measured)] == pytest.approx([*map(float, stated)], abs=5e-4)
