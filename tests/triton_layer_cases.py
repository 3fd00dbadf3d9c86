"""Norms, dropout, the loss and the short convolution in Triton, run by Triton's interpreter as in
triton_cases.py."""

import copy
from functools import partial

import pytest
import torch
from helpers import EXTREME_MIXTURES
from loss_checks import check_loss, check_loss_of_nan
from torch import nn
from triton_cases import TOLERANCES, TRITON, TYPES, close, differentiate, seed  # noqa: F401

from gpu.ops import relu_with_dropout
from layers.dropout import draw_keys
from layers.ops import PlainOps


def make_noise(n_images):
    return draw_keys(n_images, "cpu").view(torch.int32).view(-1, 2), round(0.3 * 2**32)


@pytest.mark.parametrize("noisy", [False, True], ids=["", "dropout"])
@pytest.mark.parametrize("y_type", TOLERANCES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", [(1, 1, 64), (2, 35, 24), (1, 70, 96)], ids=str)
@TYPES
def test_norm_of_a_sum(dtype, y_type, shape, noisy):
    """The gradients have the types of their tensors; the same elements are dropped."""
    noise = make_noise(shape[0]) if noisy else None
    norm = nn.LayerNorm(shape[-1])
    norm.weight.data.uniform_(), norm.bias.data.normal_()
    exact = copy.deepcopy(norm).double()
    x, y = torch.randn(shape).to(dtype), torch.randn(shape).to(y_type)

    def normalise(ops, norm, *tensors):
        tensors = [t.detach().clone().requires_grad_() for t in tensors]
        z = ops.add_norm(*tensors, norm, noise)
        return z, *torch.autograd.grad((z * z.cos()).sum(), [*tensors, *norm.parameters()])

    ours = normalise(TRITON, norm, x, y)
    expected = normalise(PlainOps(), exact, x.double(), y.double())
    assert [t.dtype for t in ours[:3]] == [dtype, dtype, y_type]
    for a, b in zip(ours, expected, strict=True):
        close(a, b, 2e-6 if a.dtype == dtype == torch.float32 else 0.05)
    assert not noisy or (ours[2][expected[2] == 0] == 0).all()


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 35, 40)], ids=str)
@TYPES
def test_relu_with_dropout(dtype, shape):
    """The elements that the plain form drops, and no others."""
    noise = make_noise(shape[0])

    def relu(ops, x):
        return [relu_with_dropout(ops, x, noise)]

    x = torch.randn(shape).to(dtype)
    ours = differentiate(partial(relu, TRITON), x)
    expected = differentiate(partial(relu, PlainOps()), x.double())
    for a, b in zip(ours, expected, strict=True):
        assert a.dtype == dtype
        assert torch.equal(a == 0, b == 0)
        close(a, b, 1e-6 if dtype == torch.float32 else 0.01)


def test_nan_passes_dropout():
    x = torch.full((2, 3, 40), torch.nan)
    norm, noise = nn.LayerNorm(40), make_noise(2)
    assert relu_with_dropout(TRITON, x, noise).isnan().all()
    assert TRITON.add_norm(torch.zeros_like(x), x, norm, noise).isnan().all()


@pytest.mark.parametrize("kind", EXTREME_MIXTURES)
@TYPES
def test_loss(dtype, kind):
    check_loss(TRITON, kind, dtype)


@pytest.mark.parametrize("what", [0, 1, 2], ids=["logit", "mean", "log-scale"])
@pytest.mark.parametrize("K", [1, 3, 10])
def test_loss_of_nan(K, what):
    check_loss_of_nan(TRITON, K, what)


@pytest.mark.parametrize(
    ("shape", "offsets"),
    [((1, 1, 64), (1,)), ((2, 35, 24), (1, 3, 30)), ((1, 300, 70), (1, 3, 98))],
    ids=["1", "35", "300"],
)
@TYPES
def test_short_convolution(dtype, shape, offsets):
    def convolve(ops, x, weight):
        return [ops.short_convolution(x, weight, offsets)]

    tensors = torch.randn(shape).to(dtype), torch.randn(len(offsets), shape[-1])
    ours = differentiate(partial(convolve, TRITON), *tensors)
    expected = differentiate(partial(convolve, PlainOps()), *(t.double() for t in tensors))
    assert [t.dtype for t in ours] == [dtype, dtype, torch.float32]
    for a, b in zip(ours, expected, strict=True):
        close(a, b, TOLERANCES[dtype])


@TYPES
@torch.no_grad()
def test_convolution_steps(dtype):
    """Outputs, and the last inputs, whose rows are used again after the last."""
    offsets, weight = torch.tensor([1, 2, 5]), torch.randn(3, 70)
    ours, plain = torch.randn(2, 6, 3, 70).unbind()
    plain.copy_(ours)
    for position in range(13):
        x = torch.randn(3, 1, 70).to(dtype)
        arguments = weight, offsets, ours, torch.tensor([position])
        y = TRITON.convolution_step(x, *arguments)
        expected = PlainOps().convolution_step(x.float(), *arguments[:2], plain, arguments[3])
        assert y.dtype == dtype
        close(y, expected.double(), TOLERANCES[dtype])
        assert torch.equal(ours, plain)
