"""Linear attention in Triton, run by Triton's interpreter on CPU tensors.

tests/unit/test_gpu_kernels.py runs this file and the other cases in a process with
TRITON_INTERPRET=1. The interpreter rounds to bfloat16 by truncation, which doubles the errors of a
GPU.
"""

import pytest
import torch

from gpu.attention import LinearAttention
from gpu.ops import TritonOps
from layers.attention import linear_quadratic

TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 0.02}
TYPES = pytest.mark.parametrize("dtype", TOLERANCES, ids=["fp32", "bf16"])
LENGTHS = pytest.mark.parametrize("length", [1, 31, 32, 33, 100])


TRITON = TritonOps.__new__(TritonOps)  # without the comparison, which has a test


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def close(x, expected, tolerance):
    """Whether the largest difference is within the tolerance, relative to the largest number."""
    assert x.shape == expected.shape
    difference = (x.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-30)
    assert difference <= tolerance, f"{difference:.1e}"


def make_qkv(dtype, length, E=16, n_images=2):
    return torch.randn(n_images, length, 3, 2, E).to(dtype)


def make_state(E=16):
    return torch.rand(2, 2, E, E), torch.rand(2, 2, E)


def differentiate(function, *tensors):
    """Outputs and state, and the gradients of all of them, weighted, in all tensors."""
    tensors = [x.detach().clone().requires_grad_() for x in tensors]
    results = function(*tensors)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, generator=generator) for x in results]
    total = sum((x.double() * w).sum() for x, w in zip(results, weights, strict=True))
    return [*results, *torch.autograd.grad(total, tensors)]


def reference(qkv, S, Z):
    outputs, state = linear_quadratic(*qkv.unbind(2), (S, Z))
    return outputs, *state


@TYPES
@LENGTHS
def test_linear_attention(dtype, length):
    """Outputs, states and gradients, the states' included, with an earlier state."""
    tensors = make_qkv(dtype, length), *make_state()
    ours = differentiate(LinearAttention.apply, *tensors)
    expected = differentiate(reference, *(x.double() for x in tensors))
    for x, y in zip(ours, expected, strict=True):
        close(x, y, TOLERANCES[dtype])


@pytest.mark.parametrize(
    ("size", "dtype"),
    [(32, torch.float32), (32, torch.bfloat16), (48, torch.float32), (128, torch.bfloat16)],
)
def test_sizes_of_heads(size, dtype):
    tensors = (
        make_qkv(dtype, 36, size, n_images=1)[:, :, :, :1],
        *(x[:1, :1] for x in make_state(size)),
    )
    ours = differentiate(LinearAttention.apply, *tensors)
    expected = differentiate(reference, *(x.double() for x in tensors))
    for x, y in zip(ours, expected, strict=True):
        close(x, y, TOLERANCES[dtype])


@TYPES
@pytest.mark.parametrize("size", [16, 48, 128])
@torch.no_grad()
def test_steps(dtype, size):
    """The recurrence, position by position: outputs and states, changed in place."""
    qkv, (S, Z) = make_qkv(dtype, 5, size), make_state(size)
    outputs, state = linear_quadratic(*qkv.double().unbind(2), (S.double(), Z.double()))
    ours = [TRITON.linear_step(x, (S, Z)) for x in qkv.split(1, dim=1)]
    assert ours[0].dtype == dtype
    close(torch.cat(ours, 1), outputs, TOLERANCES[dtype])
    for x, y in zip((S, Z), state, strict=True):
        close(x, y, 1e-6)


@torch.no_grad()
def test_step_with_extreme_numbers():
    """As below; NaN in a value or key of one head of one image stays in its outputs and state."""
    qkv, (S, Z) = make_qkv(torch.float32, 1), make_state()
    S, Z = 0 * S, 0 * Z
    qkv[0, 0, 1], qkv[1, 0, 1, 1, 3] = -80, torch.nan
    y = TRITON.linear_step(qkv, (S, Z))
    close(Z[0], torch.full_like(Z[0], -80).double().exp(), 1e-5)
    assert y[1, 0, 1].isnan().all()
    assert S[1, 1].isnan().any()
    assert not y[1, 0, 0].isnan().any()


def test_steps_with_gradients_are_plain():
    qkv = make_qkv(torch.float32, 1).requires_grad_()
    TRITON.linear_step(qkv, make_state()).sum().backward()
    assert qkv.grad.isfinite().all()


@pytest.mark.parametrize("split", [1, 31, 32, 33, 99])
def test_split_and_resumed(split):
    """The ops object updates the state in place."""
    qkv, S, Z = make_qkv(torch.float32, 100), torch.zeros(2, 2, 16, 16), torch.zeros(2, 2, 16)
    parts = [TRITON.linear_attention(part, (S, Z)) for part in (qkv[:, :split], qkv[:, split:])]
    outputs, state = linear_quadratic(*qkv.double().unbind(2))
    for x, y in ((torch.cat(parts, 1), outputs), (S, state[0]), (Z, state[1])):
        close(x, y, 1e-6)


@TYPES
def test_keys_and_queries_down_to_minus_80(dtype):
    """The features are as small as 2e-35: none of their digits may be lost to the 1 in elu(x) + 1,
    and nothing may overflow."""
    qkv = make_qkv(dtype, 70)
    qkv[:, :, :2] = torch.linspace(-80, 1, qkv[:, :, :2].numel()).view_as(qkv[:, :, :2])
    zeros = torch.zeros(2, 2, 16, 16), torch.zeros(2, 2, 16)
    ours = differentiate(LinearAttention.apply, qkv, *zeros)
    expected = differentiate(reference, *(x.double() for x in (qkv, *zeros)))
    for x, y in zip(ours[:4], expected[:4], strict=True):
        close(x, y, 5 * TOLERANCES[dtype])
    keys = make_qkv(torch.float32, 1)
    keys[:, :, 1] = -80
    Z = LinearAttention.apply(keys, *zeros)[2]
    close(Z, torch.full_like(Z, -80).double().exp(), 1e-5)


@TYPES
@pytest.mark.parametrize("what", [0, 1, 2], ids=["query", "key", "value"])
def test_nan_stays_nan(dtype, what):
    """In the outputs from its position on (a query's: of its position), and in the gradients."""
    qkv = make_qkv(dtype, 40)
    qkv[0, 5, what, 0, 3] = torch.nan
    qkv.requires_grad_()
    outputs, _, Z = LinearAttention.apply(qkv, None, None)
    assert outputs[0, 5, 0].isnan().any()
    assert outputs[0, 35, 0].isnan().any() == (what > 0)
    assert not outputs[1].isnan().any()
    assert Z.isnan().any() == (what == 1)
    outputs.sum().backward()
    assert qkv.grad[0, 5, :, 0].isnan().any()


def test_gradient_of_the_state_alone():
    """The outputs need not take part in the loss."""
    qkv = make_qkv(torch.float32, 40).requires_grad_()
    _, S, _ = LinearAttention.apply(qkv, None, None)
    x = qkv.detach().double().requires_grad_()
    expected = torch.autograd.grad(linear_quadratic(*x.unbind(2))[1][0].square().sum(), x)[0]
    close(torch.autograd.grad(S.square().sum(), qkv)[0], expected, 1e-6)
