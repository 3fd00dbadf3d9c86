"""Training with compiled operations does not depend on a private function of torch."""

import pytest
import torch

import cpu.ops
import cpu.torch_private
from cpu.ops import CompiledOps
from cpu.torch_private import private_linear, private_or_public, public_linear
from layers.dropout import draw_keys
from layers.ops import PlainOps
from models import ImageTransformer, ModelConfig
from utils import has_bfloat16

CONFIG = ModelConfig(40, n_layers=2, n_heads=2, d_query=8, mixtures=3)
TOLERANCE = {"fp32": 1e-4, "bf16": 0.1}  # as in test_cpu_ops.py
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ONEDNN = torch.ops.mkldnn._linear_pointwise


def missing(*args):
    raise AttributeError("no such function")  # what torch.ops raises


def without_backend(*args):
    raise RuntimeError("not compiled with it")


def with_other_arguments():
    pass


def with_other_results(*args):
    return 1.05 * ONEDNN(*args)


def with_no_results(*args):
    pass


CHANGES = [missing, without_backend, with_other_arguments, with_other_results, with_no_results]


@pytest.fixture(autouse=True)
def clear_choices(monkeypatch):
    """Choices are cached: neither those of other tests may count here, nor these elsewhere. There
    are none on Apple's CPUs."""
    monkeypatch.setattr(cpu.torch_private, "APPLE", False)
    private_or_public.cache_clear()
    yield
    private_or_public.cache_clear()


def train(ops, precision):
    """The losses of a tiny model and the gradients of its parameters."""
    torch.manual_seed(0)
    model = ImageTransformer(CONFIG, ops).train()
    images, keys = torch.randint(0, 256, (5, CONFIG.length)), draw_keys(5, "cpu")
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        losses = model.nll(images, keys)
        losses.sum().backward()
    return [losses, *(p.grad for p in model.parameters())]


def assert_equals_plain(precision):
    for x, y in zip(
        train(CompiledOps(CONFIG), precision), train(PlainOps(), precision), strict=True
    ):
        assert x.dtype == y.dtype
        assert (x - y).abs().max() < TOLERANCE[precision] * y.abs().max()


@pytest.mark.parametrize("precision", TOLERANCE)
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_training_works_without_the_private_product(change, precision, monkeypatch, capsys):
    """A release of torch without it, or with a changed one, would make training fail or wrong."""
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", change)
    assert_equals_plain(precision)
    assert private_or_public(torch.float32) is public_linear
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == len({"fp32", precision})
    assert "no usable oneDNN product of torch.float32" in warnings[0]


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
@pytest.mark.parametrize("precision", TOLERANCE)
def test_the_private_product_is_chosen_where_it_works(precision, capsys):
    """A trial that always failed would slow down training, and no other test would see it."""
    if precision == "bf16" and not has_bfloat16(torch.device("cpu")):
        pytest.skip("oneDNN has no bfloat16 products on this CPU")
    assert_equals_plain(precision)
    assert private_or_public(TYPES[precision]) is private_linear
    assert not capsys.readouterr().err


def test_it_may_work_for_one_type_only(monkeypatch, capsys):
    """Regression: without AVX-512, where oneDNN has no bfloat16 products, the slower function took
    the place of its float32 products too, and every run printed a warning."""

    def without_bfloat16(x, *others):
        if x.dtype == torch.bfloat16:
            raise RuntimeError("could not create a primitive")
        return ONEDNN(x, *others)

    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", without_bfloat16)
    assert_equals_plain("fp32")
    assert not capsys.readouterr().err
    assert private_or_public(torch.float32) is private_linear
    assert private_or_public(torch.bfloat16) is public_linear
    assert "no usable oneDNN product of torch.bfloat16" in capsys.readouterr().err


def test_products_on_apple_cpus_are_those_of_torch(monkeypatch, capsys):
    """Regression: there, the fused feed-forward network and oneDNN were ten times as slow as the
    library behind torch's own products, which uses a unit for matrices."""
    for module in cpu.ops, cpu.torch_private:
        monkeypatch.setattr(module, "APPLE", True)
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", missing)
    monkeypatch.setattr(cpu.ops.FeedForwardBlock, "apply", missing)
    assert_equals_plain("fp32")
    assert not capsys.readouterr().err
