"""The forms of each attention against each other: outputs, states and gradients."""

import pytest
import torch

from cpu.ops import CompiledOps
from layers.attention import (
    LinearAttention,
    SoftmaxAttention,
    linear_chunked,
    linear_quadratic,
    linear_recurrent,
)
from layers.gated import GatedAttention
from layers.ops import PlainOps
from models import ModelConfig

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
PRECISIONS = pytest.mark.parametrize("dtype", TOLERANCE, ids=["float64", "float32"])


def make_inputs(L, dtype=torch.float64, N=2, H=3, E=8, M=5):
    """Queries, keys, values and a state of an earlier part, all with gradients."""
    shapes = [(N, L, H, E), (N, L, H, E), (N, L, H, M), (N, H, E, M), (N, H, E)]
    *qkv, S, Z = (torch.randn(shape, dtype=dtype) for shape in shapes)
    # Z sums positive features in any real state.
    return [x.requires_grad_() for x in (*qkv, S, Z.abs())]


def step_by_step(queries, keys, values, state):
    """`linear_recurrent` over all positions; states are copied so that gradients exist."""
    outputs = []
    for i in range(queries.shape[1]):
        at = slice(i, i + 1)
        state = tuple(x.clone() for x in state)
        output, state = linear_recurrent(queries[:, at], keys[:, at], values[:, at], state)
        outputs.append(output)
    return torch.cat(outputs, dim=1), state


def results(form, inputs, **kwargs):
    """Outputs, final S and Z, and the gradients of all inputs of a form."""
    queries, keys, values, S, Z = inputs
    outputs, state = form(queries, keys, values, (S, Z), **kwargs)
    everything = [outputs, *state]
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, dtype=x.dtype, generator=generator) for x in everything]
    loss = sum((x * w).sum() for x, w in zip(everything, weights, strict=True))
    return [*everything, *torch.autograd.grad(loss, inputs)]


def assert_close(actual, expected, tolerance):
    """Equal up to `tolerance` times the largest number of each tensor."""
    for a, e in zip(actual, expected, strict=True):
        assert a.shape == e.shape
        assert (a - e).abs().max() <= tolerance * max(1, e.abs().max())


@PRECISIONS
@pytest.mark.parametrize("L", [1, 2, 63, 64, 65, 130])
def test_chunked_and_recurrent_equal_quadratic(L, dtype):
    inputs = make_inputs(L, dtype)
    expected = results(linear_quadratic, inputs)
    assert_close(results(linear_chunked, inputs), expected, TOLERANCE[dtype])
    assert_close(results(step_by_step, inputs), expected, TOLERANCE[dtype])


@pytest.mark.parametrize("chunk", [1, 2, 7, 16, 100])
def test_any_chunk_size_gives_the_same(chunk):
    inputs = make_inputs(33)
    expected = results(linear_quadratic, inputs)
    assert_close(results(linear_chunked, inputs, chunk=chunk), expected, 1e-10)


@pytest.mark.parametrize(("E", "M"), [(4, 9), (9, 4), (1, 1)])
def test_query_and_value_sizes_may_differ(E, M):
    inputs = make_inputs(21, E=E, M=M)
    expected = results(linear_quadratic, inputs)
    assert_close(results(linear_chunked, inputs, chunk=8), expected, 1e-10)
    assert_close(results(step_by_step, inputs), expected, 1e-10)


@pytest.mark.parametrize("split", range(1, 20))
def test_two_parts_with_a_state_equal_one_pass(split):
    """Outputs, states and gradients; fails if the normaliser ignores the Z of the given state."""

    def in_two_parts(queries, keys, values, state):
        first, state = linear_chunked(
            queries[:, :split], keys[:, :split], values[:, :split], state, chunk=6
        )
        second, state = linear_chunked(
            queries[:, split:], keys[:, split:], values[:, split:], state, chunk=6
        )
        return torch.cat([first, second], dim=1), state

    inputs = make_inputs(20)
    assert_close(results(in_two_parts, inputs), results(linear_quadratic, inputs), 1e-10)


def compiled(queries, keys, values, state):
    """The compiled form, without a gradient of the state, which it updates in place."""
    ops = CompiledOps(ModelConfig(30, d_query=queries.shape[-1]))
    outputs = ops.linear_attention(torch.stack([queries, keys, values], 2))
    return outputs, tuple(x.detach().clone() for x in state)


def gradients_of_outputs(form, inputs):
    queries, keys, values = (x.detach().requires_grad_() for x in inputs)
    zeros = queries.new_zeros(1, 2, 8, 8), queries.new_zeros(1, 2, 8)
    outputs, _ = form(queries, keys, values, zeros)
    gradients = torch.autograd.grad(outputs.sum(), (queries, keys, values))
    return [outputs.detach(), *gradients]


@pytest.mark.parametrize("place", ["queries", "keys"])
@pytest.mark.parametrize("x", [-80.0, -20.0, -17.0, -5.0, 0.0, 3.0])
@pytest.mark.parametrize(
    "form",
    [linear_quadratic, linear_chunked, step_by_step, compiled],
    ids=lambda form: form.__name__,
)
def test_phi_does_not_cancel(form, x, place):
    """Regression: elu(x) + 1 in float32 had lost all digits for keys below -17: outputs were
    wrong by 144% at -20, and gradients by a factor of 40."""
    inputs = [torch.randn(1, 9, 2, 8) for _ in range(3)]
    inputs[0 if place == "queries" else 1] *= 0.1
    inputs[0 if place == "queries" else 1] += x
    if x == 0:
        inputs[0][..., ::2] = inputs[1][..., ::2] = 0  # where phi has its corner
    expected = gradients_of_outputs(exact_quadratic, [y.double() for y in inputs])
    for actual, right in zip(gradients_of_outputs(form, inputs), expected, strict=True):
        assert (actual - right).norm() <= 1e-4 * right.norm()


def exact_quadratic(queries, keys, values, state):
    """The definition in float64, with 1 as the gradient of phi at 0."""
    q, k = (torch.where(x > 0, x + 1, x.clamp(max=1).exp()) for x in (queries, keys))
    weights = torch.einsum("nlhe,nshe->nhls", q, k).tril()
    sums = torch.einsum("nhls,nshm->nlhm", weights, values)
    return sums / (weights.sum(-1).transpose(1, 2) + 1e-6)[..., None], state


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("part", range(3), ids=["queries", "keys", "values"])
@pytest.mark.parametrize("form", [linear_chunked, compiled], ids=["chunked", "compiled"])
def test_a_nan_is_seen(form, part, value):
    """Regression: the compiled attention turned NaN in a query or key into a finite number."""
    inputs = [torch.randn(1, 9, 2, 8) for _ in range(3)]
    inputs[part][0, 4, 1, 3] = value
    outputs, *gradients = gradients_of_outputs(form, inputs)
    assert not outputs[0, 4, 1].isfinite().all()
    assert not any(g.isfinite().all() for g in gradients[: 1 if part == 0 else 2])
    assert outputs[0, :, 0].isfinite().all()


def test_quadratic_equals_the_sums_of_the_paper():
    """The reference itself, against the definition written as loops."""
    queries, keys, values, S, Z = (x.detach() for x in make_inputs(5, N=1, H=1))
    outputs, state = linear_quadratic(queries, keys, values, (S, Z))
    S, Z = S[0, 0].clone(), Z[0, 0].clone()
    for i in range(5):
        q, k = (torch.where(x > 0, x + 1, x.exp()) for x in (queries[0, i, 0], keys[0, i, 0]))
        S += torch.outer(k, values[0, i, 0])
        Z += k
        expected = q @ S / (q @ Z + 1e-6)
        torch.testing.assert_close(outputs[0, i, 0], expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(state[0][0, 0], S, rtol=1e-10, atol=1e-10)


def test_sums_are_float32_under_bfloat16():
    """Sums in bfloat16 stop growing after 256 equal terms."""
    queries, keys, values, *_ = (x.detach().bfloat16() for x in make_inputs(1000))
    expected = linear_quadratic(queries.float(), keys.float(), values.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs, (S, Z) = linear_chunked(queries, keys, values)
    assert S.dtype == Z.dtype == torch.float32
    assert_close([outputs, S, Z], [expected[0], *expected[1]], 1e-5)


HEADS, SIZE = 3, 8


def make_projected(L, per_head=3 * SIZE):
    """Queries, keys and values (or what else it needs of each head) as an attention takes them."""
    return torch.randn(2, L, HEADS * per_head, dtype=torch.float64)


def attend_in_parts(attention, projected, lengths):
    """Outputs of an attention with a state, called on consecutive parts of these lengths."""
    N, L, _ = projected.shape
    state = attention.empty_state(N, SIZE, L, like=projected)
    return torch.cat([attention(part, state) for part in projected.split(lengths, dim=1)], dim=1)


MODULES = {
    "linear": LinearAttention(PlainOps(), HEADS),
    "gated-linear": GatedAttention(PlainOps(), HEADS),
    "softmax": SoftmaxAttention(HEADS),
    "softmax-scaled": SoftmaxAttention(HEADS, scale=0.3),
}


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize(
    "lengths", [[12], [11, 1], [1] * 12, [5, 1, 1, 4, 1]], ids=["prefill", "last", "steps", "mixed"]
)
def test_states_in_place_equal_one_parallel_pass(name, lengths):
    per_head = 4 * SIZE + 2 if name == "gated-linear" else 3 * SIZE
    attention, projected = MODULES[name], make_projected(12, per_head)
    actual = attend_in_parts(attention, projected, lengths)
    assert_close([actual], [attention(projected)], 1e-10)


def test_softmax_equals_its_definition():
    projected = make_projected(9)
    queries, keys, values = projected.unflatten(-1, (3, HEADS, SIZE)).unbind(2)
    scores = torch.einsum("nlhe,nshe->nhls", queries, keys) * 0.25
    scores = scores.masked_fill(torch.ones(9, 9).triu(1).bool(), -torch.inf)
    expected = torch.einsum("nhls,nshm->nlhm", scores.softmax(-1), values).flatten(-2)
    assert_close([SoftmaxAttention(HEADS, scale=0.25)(projected)], [expected], 1e-10)


def test_attention_dropout_acts_in_training_only():
    projected = make_projected(9)
    attention = SoftmaxAttention(HEADS, dropout=0.5)
    expected = SoftmaxAttention(HEADS)(projected)
    assert not torch.allclose(attention(projected), expected)
    assert_close([attention.eval()(projected)], [expected], 1e-10)
