"""The forms of gated linear attention against each other: outputs, states and gradients."""

import math

import pytest
import torch

from cpu.ops import CompiledOps
from layers.gated import (
    FASTEST_DECAY,
    OUTPUT_RMS,
    SLOWEST_DECAY,
    gated_chunked,
    gated_quadratic,
    gated_recurrent,
    initialise_decays,
    split,
)
from layers.ops import PlainOps
from models import ModelConfig

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}
PRECISIONS = pytest.mark.parametrize("dtype", TOLERANCE, ids=["float64", "float32"])
H = 3


def make_inputs(L, dtype=torch.float64, N=2, E=8, M=5):
    """Queries, keys, values, decays, betas, gates and a state, all with gradients."""
    rows = [(N, L, H, E), (N, L, H, E), (N, L, H, M), (N, L, H), (N, L, H), (N, L, H, M)]
    return [torch.randn(shape, dtype=dtype).requires_grad_() for shape in [*rows, (N, H, E, M)]]


def results(form, inputs, **options):
    """Outputs, the final state, and the gradients of all inputs of a form."""
    *inner, S = inputs
    outputs, (final,) = form(*inner, (S,), **options)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, dtype=x.dtype, generator=generator) for x in (outputs, final)]
    loss = (outputs * weights[0]).sum() + (final * weights[1]).sum()
    return [outputs, final, *torch.autograd.grad(loss, inputs)]


def assert_close(actual, expected, tolerance):
    """Equal up to `tolerance` times the largest number of each tensor."""
    for a, e in zip(actual, expected, strict=True):
        assert a.shape == e.shape
        assert (a - e).abs().max() <= tolerance * max(1, e.abs().max())


def test_the_quadratic_form_equals_the_definition():
    """The reference itself, against the equations with numbers and vectors, for one head."""
    inputs = [x.detach()[:, :, :1] for x in make_inputs(6, N=1)[:6]]
    S = torch.zeros(8, 5, dtype=torch.float64)
    outputs, (final,) = gated_quadratic(*inputs)
    for i in range(6):
        query, key, value, decay, beta, gate = (x[0, i, 0] for x in inputs)
        key = key / key.norm()
        S = S / (1 + math.exp(decay))
        S = S + torch.outer(key, value) / (1 + math.exp(-beta))
        expected = S.T @ query
        expected = OUTPUT_RMS * expected / expected.square().mean().sqrt()
        expected = 2 * expected / (1 + (-gate).exp())
        torch.testing.assert_close(outputs[0, i, 0], expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(final[0, 0], S, rtol=1e-4, atol=1e-4)


@PRECISIONS
@pytest.mark.parametrize("L", [1, 2, 63, 64, 65, 130])
def test_chunks_equal_the_quadratic_form(L, dtype):
    inputs = make_inputs(L, dtype)
    expected = results(gated_quadratic, inputs)
    assert_close(results(gated_chunked, inputs), expected, TOLERANCE[dtype])


@pytest.mark.parametrize("chunk", [1, 2, 7, 16, 100])
def test_any_chunk_size_gives_the_same(chunk):
    inputs = make_inputs(33)
    expected = results(gated_quadratic, inputs)
    assert_close(results(gated_chunked, inputs, chunk=chunk), expected, 1e-10)


@pytest.mark.parametrize("split_at", range(1, 20))
def test_two_parts_with_a_state_equal_one_pass(split_at):
    def in_two_parts(*inputs):
        *inputs, state = inputs
        parts = zip(*(x.split([split_at, 20 - split_at], dim=1) for x in inputs), strict=True)
        outputs = []
        for part in parts:
            output, state = gated_chunked(*part, state, chunk=6)
            outputs.append(output)
        return torch.cat(outputs, dim=1), state

    inputs = make_inputs(20)
    expected = results(gated_quadratic, inputs)
    assert_close(results(in_two_parts, inputs), expected, 1e-10)


@torch.no_grad()
def test_steps_equal_the_quadratic_form_and_update_the_state_in_place():
    *inputs, S = make_inputs(20)
    expected, (final,) = gated_quadratic(*inputs, (S,))
    state, parts = (S.clone(),), zip(*(x.split(1, dim=1) for x in inputs), strict=True)
    outputs = [gated_recurrent(*part, state)[0] for part in parts]
    assert_close([torch.cat(outputs, dim=1), *state], [expected, final], 1e-10)


@pytest.mark.parametrize("decay", [-60.0, 60.0], ids=["kept", "forgotten"])
def test_extreme_decays_neither_overflow_nor_lose_the_state(decay):
    """Ratios of products of decays would be 0 / 0 after a few positions."""
    *inputs, S = make_inputs(40, torch.float32)
    inputs[3] = torch.full_like(inputs[3], decay).requires_grad_()
    expected = results(gated_quadratic, [*inputs, S])
    actual = results(gated_chunked, [*inputs, S])
    assert all(x.isfinite().all() for x in actual)
    assert_close(actual, expected, 1e-4)


def test_the_state_is_float32_under_bfloat16():
    *inputs, _ = (x.detach().bfloat16() for x in make_inputs(300))
    expected, (S,) = gated_quadratic(*(x.float() for x in inputs))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs, (final,) = gated_chunked(*inputs)
    assert final.dtype == torch.float32
    assert_close([outputs, final], [expected, S], 1e-4)


@pytest.mark.parametrize("n_heads", [1, 2, 8])
def test_the_heads_begin_with_decays_of_different_time_scales(n_heads):
    layer = torch.nn.Linear(16, 16 + 2 * n_heads)
    initialise_decays(layer, n_heads)
    _, decays, betas = layer.bias.detach().double().split([16, n_heads, n_heads])
    rates = -torch.nn.functional.logsigmoid(-decays)
    assert math.isclose(rates[0], FASTEST_DECAY, rel_tol=1e-4)
    assert n_heads == 1 or math.isclose(rates[-1], SLOWEST_DECAY, rel_tol=1e-4)
    assert torch.allclose(rates.log().diff(2), torch.zeros(()).double(), atol=1e-4)
    assert (betas == 0).all()


# The compiled form (cpu/gated.h) against the plain one.


def compiled(E=8):
    return CompiledOps(ModelConfig(400, n_heads=H, d_query=E))


def with_gradients(ops, projected, weights):
    projected = projected.detach().requires_grad_()
    outputs = ops.gated_attention(projected, H)
    gradient = torch.autograd.grad((outputs * weights).sum(), projected)
    return [outputs, *(x.flatten(2) for x in split(*gradient, H))]


@pytest.mark.slow
@pytest.mark.parametrize("E", [2, 5, 8, 32, 40, 56, 64])
@pytest.mark.parametrize("L", [1, 2, 3, 4, 5, 300])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 4e-2)], ids=["fp32", "bf16"]
)
def test_the_compiled_form_and_its_gradients(L, E, dtype, tolerance):
    """Regression: with heads of 56 in bfloat16, g++ read a part of a row as if it was aligned,
    which ended the process."""
    projected = torch.randn(2, L, H * (4 * E + 2)).to(dtype)
    weights = torch.randn(2, L, H * E).to(dtype)
    expected = with_gradients(PlainOps(), projected.double(), weights.double())
    actual = with_gradients(compiled(E), projected, weights)
    assert {x.dtype for x in actual} == {dtype}
    # Relative to the largest gradient: that of a first query is 0 but for rounding.
    scale = [expected[0].norm(), *[max(e.norm() for e in expected[1:])] * 6]
    for a, e, norm in zip(actual, expected, scale, strict=True):
        assert (a.double() - e).norm() <= tolerance * norm


@pytest.mark.slow
@pytest.mark.parametrize(
    "decays", [[-60.0], [10.0], [60.0], [-60.0, 60.0, -60.0, 10.0, 1.0]], ids=str
)
def test_the_compiled_form_with_extreme_decays(decays):
    """Those of four positions are multiplied, unless the product is too small to divide by."""
    projected, weights = torch.randn(2, 42, H * 34), torch.randn(2, 42, H * 8)
    # Else some outputs are almost 0, and their norm enlarges the rounding errors.
    for positive in split(projected, H)[:2]:
        positive.abs_()
    split(projected, H)[3].copy_(torch.tensor(decays).repeat(42)[:42, None])
    expected = with_gradients(PlainOps(), projected.double(), weights.double())
    actual = with_gradients(compiled(), projected, weights)
    largest = max(e.abs().max() for e in expected[1:])
    for a, e, scale in zip(
        actual, expected, [expected[0].abs().max(), *[largest] * 6], strict=True
    ):
        assert (a.double() - e).abs().max() <= 2e-5 * scale


@pytest.mark.slow
@pytest.mark.parametrize("gates", [[-80.0], [80.0], [-1000.0, 1.0, 1000.0]], ids=str)
def test_the_compiled_form_with_extreme_gates(gates):
    """The gradient divides the outputs by the gates."""
    projected, weights = torch.randn(2, 12, H * 34), torch.randn(2, 12, H * 8)
    z = split(projected, H)[5]
    z.copy_(torch.tensor(gates).repeat(z.numel())[: z.numel()].view(z.shape))
    expected = with_gradients(PlainOps(), projected.double(), weights.double())
    actual = with_gradients(compiled(), projected, weights)
    for a, e in zip(actual, expected, strict=True):
        assert (a.double() - e).abs().max() <= 2e-5 * e.abs().max() + 1e-30


@pytest.mark.slow
@pytest.mark.parametrize("lengths", [[40], [16, 24], [1, 38, 1], [1] * 40])
@torch.no_grad()
def test_the_compiled_form_with_a_state(lengths):
    projected, state = torch.randn(2, 40, H * 34), torch.randn(2, H, 8, 8)
    exact, ops = state.double(), compiled()
    expected = PlainOps().gated_attention(projected.double(), H, (exact,))
    parts = projected.split(lengths, dim=1)
    outputs = [ops.gated_attention(part, H, (state,)) for part in parts]
    outputs = torch.cat(outputs, dim=1)
    assert_close([outputs.double(), state.double()], [expected, exact], 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(6), ids=["query", "key", "value", "decay", "beta", "gate"])
@pytest.mark.parametrize("is_compiled", [False, True], ids=["plain", "compiled"])
def test_a_nan_is_seen(is_compiled, part):
    """In the outputs from its position on, and in the gradients."""
    projected = torch.randn(1, 40, H * 34)
    split(projected, H)[part][0, 20, 1] = torch.nan
    ops, weights = compiled() if is_compiled else PlainOps(), torch.ones(1, 40, H * 8)
    outputs, *gradients = with_gradients(ops, projected, weights)
    assert not outputs[0, 20].isfinite().all()
    assert not any(x.isfinite().all() for x in gradients)
