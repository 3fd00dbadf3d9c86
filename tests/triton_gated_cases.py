"""Gated linear attention in Triton, run by Triton's interpreter as in triton_cases.py."""

import pytest
import torch
from triton_cases import TRITON, TYPES, close, differentiate

from gpu.gated import GatedAttention
from layers.gated import gated_quadratic, split

H = 2
TOLERANCES = {torch.float32: 4e-6, torch.bfloat16: 0.03}


def make_inputs(dtype, length, E=16, n_images=2):
    """`projected` (N, L, 4HE + 2H) and a state (N, H, E, E)."""
    generator = torch.Generator().manual_seed(0)
    projected = torch.randn(n_images, length, H * (4 * E + 2), generator=generator)
    return projected.to(dtype), torch.randn(n_images, H, E, E, generator=generator)


def apply(projected, S):
    return GatedAttention.apply(projected, H, S)


def reference(projected, S):
    outputs, state = gated_quadratic(*split(projected, H), (S,))
    return outputs.flatten(-2), *state


def compare(function, projected, S, tolerance):
    """Outputs, the state, and the gradients of queries, keys, values, decays, betas, gates and the
    state
    before, against the reference's in float64."""
    both = differentiate(function, projected, S), differentiate(reference, *exact(projected, S))
    for results in both:
        results[2:3] = [x.flatten(2) for x in split(results[2], H)]
    for x, expected in zip(*both, strict=True):
        close(x, expected, tolerance)


def exact(*tensors):
    return [x.double() for x in tensors]


@TYPES
@pytest.mark.parametrize("length", [1, 64, 70])
def test_gated_attention(dtype, length):
    compare(apply, *make_inputs(dtype, length), TOLERANCES[dtype])


@pytest.mark.parametrize(
    ("size", "dtype"),
    [(32, torch.float32), (32, torch.bfloat16), (64, torch.float32), (64, torch.bfloat16)],
)
def test_sizes_of_heads(size, dtype):
    compare(apply, *make_inputs(dtype, 36, size, n_images=1), TOLERANCES[dtype])


@pytest.mark.parametrize("lengths", [[1, 69], [32, 38], [33, 36, 1]], ids=str)
def test_split_and_resumed(lengths):
    """With the gradients, which the state hands from part to part."""

    def apply_to_parts(projected, S):
        outputs = []
        for part in projected.split(lengths, dim=1):
            output, S = apply(part, S)
            outputs.append(output)
        return torch.cat(outputs, 1), S

    compare(apply_to_parts, *make_inputs(torch.float32, 70, n_images=1), 4e-6)


@pytest.mark.parametrize(
    ("decay", "dtype"),
    [(-20.0, torch.float32), (50.0, torch.float32), (None, torch.float32), (None, torch.bfloat16)],
    ids=["kept", "forgotten", "mixed", "mixed, bf16"],
)
def test_extreme_decays(decay, dtype):
    """A decay is 1 - 2e-9 or exp(-50) at every position, or one of these or 1/2. If everything is
    forgotten, its gradient is about 0, so errors are relative to the largest gradient of all."""
    projected, S = make_inputs(dtype, 70, n_images=1)
    decays = split(projected, H)[3]
    mixed = torch.tensor([-20.0, 0.0, 50.0])[torch.arange(decays.numel()) % 7 % 3]
    decays.copy_(mixed.view(decays.shape) if decay is None else torch.tensor(decay))
    expected = differentiate(reference, *exact(projected, S))
    for x, y in zip(differentiate(apply, projected, S), expected, strict=True):
        close(x, y, 5e-5 if dtype == torch.float32 else 0.04)


@TYPES
@torch.no_grad()
def test_steps(dtype):
    """Position by position: outputs and the state, changed in place."""
    for size in (16, 32, 64):
        projected, S = make_inputs(dtype, 4, size)
        outputs, state = reference(*exact(projected, S))
        ours = [TRITON.gated_step(x, H, (S,)) for x in projected.split(1, dim=1)]
        assert ours[0].dtype == dtype
        close(torch.cat(ours, 1), outputs, 2e-6 if dtype == torch.float32 else 0.01)
        close(S, state, 1e-6)


def test_steps_with_gradients_are_plain():
    projected, S = make_inputs(torch.float32, 1)
    TRITON.gated_step(projected.requires_grad_(), H, (S,)).sum().backward()
    assert projected.grad.isfinite().all()


@torch.no_grad()
def test_the_state_is_updated_in_place():
    projected, S = make_inputs(torch.float32, 40)
    expected, state = reference(*exact(projected, S))
    parts = [TRITON.gated_attention(x, H, (S,)) for x in projected.split([33, 7], dim=1)]
    close(torch.cat(parts, 1), expected, 2e-6)
    close(S, state, 1e-6)


@pytest.mark.parametrize("part", range(5), ids=["query", "key", "value", "decay", "beta"])
def test_nan_stays_nan(part):
    """In the outputs of a head from its position on (a query's: of its position), and in the
    gradients; a value's also before, in its chunk, since 0 times NaN is NaN."""
    projected, S = make_inputs(torch.float32, 40)
    split(projected, H)[part][0, 5, 0] = torch.nan
    outputs, S = apply(projected.requires_grad_(), S)
    of_head = outputs[0, :, : outputs.shape[2] // H]
    assert of_head[5].isnan().all()
    assert of_head[35].isnan().all() == (part > 0)
    assert of_head[:5].isnan().any() == (part == 2)
    assert not outputs[1].isnan().any()
    assert S[0, 0].isnan().any() == (part > 0)
    outputs.sum().backward()
    assert split(projected.grad, H)[part][0, 5, 0].isnan().any()


def test_nan_of_a_gate_stays_nan():
    """In its channel of the outputs, and in the gradients."""
    projected, S = make_inputs(torch.float32, 40)
    split(projected, H)[5][0, 5, 0, 3] = torch.nan
    outputs, _ = apply(projected.requires_grad_(), S)
    assert outputs.isnan().nonzero().tolist() == [[0, 5, 3]]
    outputs.sum().backward()
    assert split(projected.grad, H)[5][0, 5, 0, 3].isnan()


@pytest.mark.parametrize("gates", [[-80.0], [80.0], [-1000.0, 1.0, 1000.0]], ids=str)
def test_extreme_gates(gates):
    """The gradient divides the outputs by the gates."""
    projected, S = make_inputs(torch.float32, 12)
    z = split(projected, H)[5]
    z.copy_(torch.tensor(gates).repeat(z.numel())[: z.numel()].view(z.shape))
    expected = differentiate(reference, *exact(projected, S))
    for x, y in zip(differentiate(apply, projected, S), expected, strict=True):
        assert (x.double() - y).abs().max() <= 2e-5 * y.abs().max() + 1e-30


@torch.no_grad()
def test_nan_in_a_step_stays():
    for part in range(5):
        projected, S = make_inputs(torch.float32, 1)
        split(projected, H)[part][0, 0, 1] = torch.nan
        outputs = TRITON.gated_step(projected, H, (S,))
        assert outputs[0, 0, 16:].isnan().all()
        assert not outputs[0, 0, :16].isnan().any()
        assert S[0, 1].isnan().any() == (part > 0)


def test_gradient_of_the_state_alone():
    """The outputs need not take part in the loss."""
    projected, S = make_inputs(torch.float32, 40)
    x, y = projected.requires_grad_(), projected.detach().double().requires_grad_()
    ours = torch.autograd.grad(apply(x, S)[1].square().sum(), x)[0]
    expected = torch.autograd.grad(reference(y, S.double())[1].square().sum(), y)[0]
    close(ours, expected, 2e-6)
