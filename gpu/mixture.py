"""The loss on a GPU, in Triton: log-probabilities of bytes and their gradients, as the plain form
(layers/mixture.py) computes them, in float32 between loading and storing."""

import math

import torch
import triton
import triton.language as tl

from gpu.operators import operator
from layers.mixture import BIN_WIDTH, MIN_LOG_SCALE

ROWS = 32  # of a program
OPTIONS = {"num_warps": 4}
MINIMUM, WIDTH = tl.constexpr(MIN_LOG_SCALE), tl.constexpr(BIN_WIDTH)
LOG_WIDTH = tl.constexpr(math.log(BIN_WIDTH))


def sizes(K: int) -> dict[str, int]:
    return {"K": K, "COMPONENTS": triton.next_power_of_2(K), "ROWS": ROWS}


@triton.jit
def locate(rows, K: tl.constexpr, COMPONENTS: tl.constexpr, ROWS: tl.constexpr):
    """This program's rows (ROWS,), their mask, the offsets (ROWS, COMPONENTS) of their logits in
    (rows, 3K) and the mask of those."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    component = tl.arange(0, COMPONENTS)[None, :]
    mask = (row < rows)[:, None] & (component < K)
    return row, row < rows, row[:, None] * (3 * K) + component, mask


@triton.jit
def load_components(parameters, offsets, mask, K: tl.constexpr):
    """Log-weights, means and log-scales, which have no lower bound yet. A masked component has no
    weight."""
    logits = tl.load(parameters + offsets, mask, float("-inf")).to(tl.float32)
    means = tl.load(parameters + offsets + K, mask, 0.0).to(tl.float32)
    log_scales = tl.load(parameters + offsets + 2 * K, mask, 0.0).to(tl.float32)
    return logits - log_sum_exp(logits)[:, None], means, log_scales


@triton.jit
def log_sum_exp(x):
    """log(sum(exp(x))) of each row. NaN remains NaN."""
    largest = tl.max(x, 1)
    largest = tl.where(largest == float("-inf"), 0.0, largest)
    return largest + tl.log(tl.sum(tl.exp(x - largest[:, None]), 1))


@triton.jit
def load_edges(values, row, row_mask, means, log_scales):
    """Whether a byte is the first or the last, (ROWS, 1); the upper and the lower edge of its bin
    and the bin's width, in scales from the means; 1 / scales."""
    value = tl.load(values + row, row_mask, 0).to(tl.float32)[:, None]
    inverses = tl.exp(-tl.where(log_scales < MINIMUM, MINIMUM, log_scales))
    upper = (tl.div_rn(2 * value - 254, 255.0) - means) * inverses
    lower = (tl.div_rn(2 * value - 256, 255.0) - means) * inverses
    return value == 0, value == 255, upper, lower, inverses * WIDTH, inverses


@triton.jit
def log_sigmoid(x):
    return tl.minimum(x, 0.0) - tl.log(1 + tl.exp(-tl.abs(x)))


@triton.jit
def log_masses(first, last, upper, lower, widths, log_scales):
    """log(sigma(upper) - sigma(lower)), the first bin extending to minus infinity, the last to
    infinity. The logarithm of 1 - exp(-width) is log(width) - width / 2 + log(sinh(x) / x) with
    x = width / 2, whose series is exact in float32 up to a width of 1."""
    x2 = widths * widths / 4
    series = x2 * (1 / 6 - x2 * (1 / 180 - x2 * (1 / 2835 - x2 / 37800)))
    narrow = series - widths / 2 - tl.where(log_scales < MINIMUM, MINIMUM, log_scales) + LOG_WIDTH
    log_widths = tl.where(widths < 1, narrow, tl.log(1 - tl.exp(-widths)))
    below_upper, above_lower = log_sigmoid(upper), log_sigmoid(-lower)
    inside = below_upper + above_lower + log_widths
    return tl.where(first, below_upper, tl.where(last, above_lower, inside))


@triton.jit
def width_gradient(widths):
    """The derivative of log(1 - exp(-width)) by log(width): width / (exp(width) - 1)."""
    w2 = widths * widths
    series = w2 * (1 / 12 - w2 * (1 / 720 - w2 * (1 / 30240 - w2 / 1209600)))
    e = tl.exp(-widths)
    return tl.where(widths < 1, 1 - widths / 2 + series, widths * e / (1 - e))


@triton.jit
def mixture_log_prob(
    parameters, values, log_probs, rows,
    K: tl.constexpr, COMPONENTS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """log p (rows,) of the bytes `values` (rows,) with parameters (rows, 3K)."""
    row, row_mask, offsets, mask = locate(rows, K, COMPONENTS, ROWS)
    log_weights, means, log_scales = load_components(parameters, offsets, mask, K)
    first, last, upper, lower, widths, _ = load_edges(values, row, row_mask, means, log_scales)
    terms = log_weights + log_masses(first, last, upper, lower, widths, log_scales)
    tl.store(log_probs + row, log_sum_exp(terms), row_mask)


@triton.jit
def mixture_backward(
    parameters, values, d_log_probs, gradients, rows,
    K: tl.constexpr, COMPONENTS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The gradients of the parameters (rows, 3K); everything else is computed again."""
    row, row_mask, offsets, mask = locate(rows, K, COMPONENTS, ROWS)
    log_weights, means, log_scales = load_components(parameters, offsets, mask, K)
    first, last, upper, lower, widths, inverses = load_edges(
        values, row, row_mask, means, log_scales
    )
    terms = log_weights + log_masses(first, last, upper, lower, widths, log_scales)
    g = tl.load(d_log_probs + row, row_mask, 0.0)[:, None]
    posterior = g * tl.exp(terms - log_sum_exp(terms)[:, None])
    d_logits = posterior - g * tl.exp(log_weights)
    d_upper = tl.where(last, 0.0, tl.sigmoid(-upper))
    d_lower = tl.where(first, 0.0, tl.sigmoid(lower))  # of -lower
    d_width = tl.where(first | last, 0.0, width_gradient(widths))
    d_means = posterior * inverses * (d_lower - d_upper)
    d_log_scales = posterior * (lower * d_lower - upper * d_upper - d_width)
    d_log_scales = tl.where(log_scales <= MINIMUM, 0.0, d_log_scales)
    dtype: tl.constexpr = gradients.dtype.element_ty
    tl.store(gradients + offsets, d_logits.to(dtype), mask)
    tl.store(gradients + offsets + K, d_means.to(dtype), mask)
    tl.store(gradients + offsets + 2 * K, d_log_scales.to(dtype), mask)


@operator("log_probs")
def mixture_forward(
    parameters: torch.Tensor, values: torch.Tensor, log_probs: torch.Tensor
) -> None:
    """Fills log_probs."""
    rows, grid = values.numel(), (triton.cdiv(values.numel(), ROWS),)
    constants = sizes(parameters.shape[-1] // 3)
    mixture_log_prob[grid](parameters, values, log_probs, rows, **constants, **OPTIONS)


@operator("gradients")
def mixture_gradients(
    parameters: torch.Tensor,
    values: torch.Tensor,
    d_log_probs: torch.Tensor,
    gradients: torch.Tensor,
) -> None:
    """Fills gradients."""
    rows, grid = values.numel(), (triton.cdiv(values.numel(), ROWS),)
    tensors, constants = (
        (parameters, values, d_log_probs, gradients),
        sizes(parameters.shape[-1] // 3),
    )
    mixture_backward[grid](*tensors, rows, **constants, **OPTIONS)


class LogProb(torch.autograd.Function):
    """Parameters (..., 3K) and bytes (...) -> log-probabilities (...), float32."""

    @staticmethod
    def forward(ctx, parameters, values):
        parameters, values = parameters.contiguous(), values.contiguous()
        log_probs = parameters.new_empty(values.shape, dtype=torch.float32)
        mixture_forward(parameters, values, log_probs)
        ctx.save_for_backward(parameters, values)
        return log_probs

    @staticmethod
    def backward(ctx, gradient):
        parameters, values = ctx.saved_tensors
        gradients = torch.empty_like(parameters)
        mixture_gradients(parameters, values, gradient.contiguous(), gradients)
        return gradients, None
