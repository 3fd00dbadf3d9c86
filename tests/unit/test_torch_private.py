"""Training with compiled operations does not depend on private functions of torch."""

import pytest
import torch

from cpu import torch_private
from cpu.ops import CompiledOps
from layers.dropout import draw_keys
from layers.ops import PlainOps
from models import ImageTransformer, ModelConfig
from utils import has_bfloat16

CONFIG = ModelConfig(40, n_layers=2, n_heads=2, d_query=8, mixtures=3)
# Where each private function is in torch.
PRIVATE = {
    "linear": (torch.ops.mkldnn, "_linear_pointwise"),
    "relu_backward": (torch.ops.aten, "threshold_backward"),
    "norm_backward": (torch.ops.aten, "native_layer_norm_backward"),
}
TOLERANCE = {"fp32": 1e-4, "bf16": 0.1}  # as in test_cpu_ops.py
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def missing(function):
    def replacement(*args):
        raise AttributeError("no such function")  # what torch.ops raises

    return replacement


def without_backend(function):
    def replacement(*args):
        raise RuntimeError("not compiled with it")

    return replacement


def with_other_arguments(function):
    return lambda: None


def with_other_results(function):
    """A few per cent too large."""

    def replacement(*args):
        results = function(*args)
        return 1.05 * results if torch.is_tensor(results) else tuple(1.05 * x for x in results)

    return replacement


def with_fewer_results(function):
    return lambda *args: None


CHANGES = [missing, without_backend, with_other_arguments, with_other_results, with_fewer_results]


@pytest.fixture(autouse=True)
def clear_choices():
    """Choices are cached: neither those of other tests may count here, nor these elsewhere."""
    torch_private.choose.cache_clear()
    yield
    torch_private.choose.cache_clear()


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


def test_every_private_function_is_tested():
    """A new private function must be added to PRIVATE."""
    assert PRIVATE.keys() == torch_private.FUNCTIONS.keys()


@pytest.mark.parametrize("precision", TOLERANCE)
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("name", PRIVATE)
def test_training_works_without_a_private_function(name, change, precision, monkeypatch, capsys):
    """A release of torch without one, or with a changed one, would make training fail or wrong."""
    place, attribute = PRIVATE[name]
    monkeypatch.setattr(place, attribute, change(getattr(place, attribute)))
    assert_equals_plain(precision)
    assert torch_private.choose(name, torch.float32) is torch_private.FUNCTIONS[name][1]
    warnings = capsys.readouterr().err.splitlines()
    about = [line for line in warnings if f"no usable {name} of torch." in line]
    assert len(about) == len(set(about))
    assert "torch.float32 on this CPU: a slower one takes its place" in about[0]
    assert precision == "bf16" or warnings == about[:1]


def test_training_works_without_any_private_function(monkeypatch, capsys):
    """Their public equivalents were only tested one at a time."""
    for place, attribute in PRIVATE.values():
        monkeypatch.setattr(place, attribute, missing(getattr(place, attribute)))
    assert_equals_plain("fp32")
    assert capsys.readouterr().err.count("warning: ") == len(PRIVATE)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
@pytest.mark.parametrize("precision", TOLERANCE)
def test_the_private_functions_are_chosen_where_they_work(precision, capsys):
    """A trial that always failed would slow down training, and no other test would see it. (The
    gradients of norms are float32 with either precision.)"""
    if precision == "bf16" and not has_bfloat16(torch.device("cpu")):
        pytest.skip("oneDNN has no bfloat16 products on this CPU")
    assert_equals_plain(precision)
    for name, (private, _, _) in torch_private.FUNCTIONS.items():
        dtype = torch.float32 if name == "norm_backward" else TYPES[precision]
        assert torch_private.choose(name, dtype) is private
    assert not capsys.readouterr().err


def test_a_function_may_work_for_one_type_only(monkeypatch, capsys):
    """On CPUs without AVX-512, where oneDNN has no bfloat16 products, the slower function took the
    place of its float32 products, too, and every run printed a warning."""
    onednn = torch.ops.mkldnn._linear_pointwise

    def without_bfloat16(x, *others):
        if x.dtype == torch.bfloat16:
            raise RuntimeError("could not create a primitive")
        return onednn(x, *others)

    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", without_bfloat16)
    assert_equals_plain("fp32")
    assert not capsys.readouterr().err
    private, public, _ = torch_private.FUNCTIONS["linear"]
    assert torch_private.choose("linear", torch.float32) is private
    assert torch_private.choose("linear", torch.bfloat16) is public
    assert "no usable linear of torch.bfloat16" in capsys.readouterr().err
