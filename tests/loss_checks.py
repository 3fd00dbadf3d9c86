"""Checks of a compiled loss, on a CPU or in Triton, against the plain one in float64."""

import torch
from helpers import EXTREME_MIXTURES

from layers.ops import PlainOps

BYTES = torch.tensor([0, 1, 100, 254, 255], dtype=torch.uint8)


def make_mixtures(kind, n, K, dtype):
    """Parameters (n, 5, 3K), each of which belongs to a byte."""
    logit_size, mean_size, log_scale, log_scale_size = EXTREME_MIXTURES[kind]
    logits, means, log_scales = torch.randn(3, n, len(BYTES), K)
    parts = logit_size * logits, mean_size * means, log_scale + log_scale_size * log_scales
    return torch.cat(parts, dim=-1).to(dtype)


def check_loss(ops, kind, dtype):
    """Values and gradients, of the smallest and largest bytes too, and of a scale at its minimum. A
    rounding error of a mean is 1e-4 of a narrow scale, and one of a logit of hundreds is 1e-5."""
    parameters, values, results = make_mixtures(kind, 17, 5, dtype), BYTES.expand(17, -1), []
    parameters[0, :, -1] = -7
    weights = torch.randn(values.shape)
    for loss, x in ((ops.log_prob, parameters), (PlainOps().log_prob, parameters.double())):
        x.requires_grad_()
        log_probs = loss(x, values)
        (log_probs * weights).sum().backward()
        results.append((log_probs, x.grad))
    assert [x.dtype for x in results[0]] == [torch.float32, dtype]
    tolerances = 1e-5, 3e-4 if dtype == torch.float32 else 0.01
    for a, b, tolerance in zip(*results, tolerances, strict=True):
        assert a.shape == b.shape
        assert ((a.double() - b).abs() <= tolerance * (1 + b.abs())).all()


def check_loss_of_nan(ops, K, what):
    """NaN in one byte's parameters, or all of its logits minus infinity, stays there."""
    parameters = make_mixtures("ordinary", 1, K, torch.float32)[0]
    parameters[1, what * K] = torch.nan
    parameters[2, :K] = -torch.inf
    parameters.requires_grad_()
    log_probs = ops.log_prob(parameters, BYTES)
    assert log_probs.isnan().tolist() == [False, True, True, False, False]
    log_probs.sum().backward()
    assert parameters.grad.isnan().any(1).tolist() == [False, True, True, False, False]
