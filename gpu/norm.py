"""The layer norm of a residual sum on a GPU, in Triton, with dropout of what is added to the
residual, and its gradients. Statistics, sums and the gradients of weight and bias are float32."""

import torch
import triton
import triton.language as tl

from gpu.dropout import dropout_factors
from gpu.operators import operator
from layers.dropout import Noise, scale

ROWS = 4  # at a time
ROWS_OF_A_PROGRAM = 64  # whose gradients of weight and bias one program adds
OPTIONS = {"num_warps": 4}


def sizes(D: int) -> dict[str, int]:
    return {"D": D, "COLUMNS": triton.next_power_of_2(D), "ROWS": ROWS}


@triton.jit
def locate(rows, start, D: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr):
    """Rows (ROWS,) from `start` on, their mask, offsets (ROWS, COLUMNS) in (rows, D) and theirs."""
    row, column = start + tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    mask = (row < rows)[:, None] & (column < D)[None, :]
    return row, row < rows, row[:, None] * D + column[None, :], mask


@triton.jit
def row_factors(
    keys, row, row_mask, L, threshold, scale, D: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """The factors (ROWS, COLUMNS) of dropout: rows of L positions belong to an image."""
    image, position = row // L, row % L
    first = tl.load(keys + 2 * image, row_mask, 0)[:, None]
    second = tl.load(keys + 2 * image + 1, row_mask, 0)[:, None]
    index = position[:, None] * D + tl.arange(0, COLUMNS)[None, :]
    return dropout_factors(index, first, second, threshold, scale)


@triton.jit
def add_norm(
    residual, y, weight, bias, keys, sums, normed, means, inverses, rows, L, threshold, scale,
    EPSILON, D: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """residual + y (rows, D) into `sums`, its layer norm into `normed`; means and inverse standard
    deviations (rows,). With `keys` of the images, dropout of y."""
    start = tl.program_id(0).to(tl.int64) * ROWS
    row, row_mask, offsets, mask = locate(rows, start, D, COLUMNS, ROWS)
    column = tl.arange(0, COLUMNS)
    added = tl.load(y + offsets, mask, 0.0).to(tl.float32)
    if keys is not None:
        added *= row_factors(keys, row, row_mask, L, threshold, scale, D, COLUMNS)
    s = tl.load(residual + offsets, mask, 0.0).to(tl.float32) + added
    s = s.to(sums.dtype.element_ty)
    tl.store(sums + offsets, s, mask)
    s = s.to(tl.float32)
    mean = tl.sum(s, 1) / D
    centred = tl.where(mask, s - mean[:, None], 0.0)
    inverse = 1 / tl.sqrt(tl.sum(centred * centred, 1) / D + EPSILON)
    tl.store(means + row, mean, row_mask)
    tl.store(inverses + row, inverse, row_mask)
    w = tl.load(weight + column, column < D, 0.0)[None, :]
    b = tl.load(bias + column, column < D, 0.0)[None, :]
    z = centred * inverse[:, None] * w + b
    tl.store(normed + offsets, z.to(normed.dtype.element_ty), mask)


@triton.jit
def add_norm_backward(
    sums, weight, keys, means, inverses, gradient, d_residual, d_y, d_weight, d_bias, rows, L,
    threshold, scale,
    D: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, PER_PROGRAM: tl.constexpr,
):  # fmt: skip
    """The gradients of the residual and of y, unless d_y is None, since it is the same, and a row
    of the gradients of weight and bias (programs, D)."""
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    w = tl.load(weight + column, column < D, 0.0)[None, :]
    w_sum, b_sum = tl.zeros((COLUMNS,), tl.float32), tl.zeros((COLUMNS,), tl.float32)
    for start in range(0, PER_PROGRAM, ROWS):
        first = program * PER_PROGRAM + start
        row, row_mask, offsets, mask = locate(rows, first, D, COLUMNS, ROWS)
        mean, inverse = tl.load(means + row, row_mask, 0.0), tl.load(inverses + row, row_mask, 0.0)
        s = tl.load(sums + offsets, mask, 0.0).to(tl.float32)
        g = tl.load(gradient + offsets, mask, 0.0).to(tl.float32)
        z = tl.where(mask, (s - mean[:, None]) * inverse[:, None], 0.0)
        w_sum += tl.sum(g * z, 0)
        b_sum += tl.sum(g, 0)
        g *= w
        g -= (tl.sum(g, 1) / D)[:, None] + z * (tl.sum(g * z, 1) / D)[:, None]
        g *= inverse[:, None]
        tl.store(d_residual + offsets, g.to(d_residual.dtype.element_ty), mask)
        if keys is not None:
            g *= row_factors(keys, row, row_mask, L, threshold, scale, D, COLUMNS)
        if d_y is not None:
            tl.store(d_y + offsets, g.to(d_y.dtype.element_ty), mask)
    tl.store(d_weight + program * D + column, w_sum, column < D)
    tl.store(d_bias + program * D + column, b_sum, column < D)


@operator("sums", "normed", "means", "inverses")
def norm_forward(
    residual: torch.Tensor,
    y: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    keys: torch.Tensor | None,
    sums: torch.Tensor,
    normed: torch.Tensor,
    means: torch.Tensor,
    inverses: torch.Tensor,
    threshold: int,
    epsilon: float,
) -> None:
    """Fills sums, normed, means and inverses."""
    rows, D = len(means), len(weight)
    tensors = residual, y, weight, bias, keys, sums, normed, means, inverses
    numbers = rows, rows // len(sums), threshold, scale(threshold), epsilon
    add_norm[(triton.cdiv(rows, ROWS),)](*tensors, *numbers, **sizes(D), **OPTIONS)


@operator("d_residual", "d_y", "d_weight", "d_bias")
def norm_backward(
    sums: torch.Tensor,
    weight: torch.Tensor,
    keys: torch.Tensor | None,
    means: torch.Tensor,
    inverses: torch.Tensor,
    gradient: torch.Tensor,
    d_residual: torch.Tensor,
    d_y: torch.Tensor | None,
    d_weight: torch.Tensor,
    d_bias: torch.Tensor,
    threshold: int,
) -> None:
    """Fills d_residual, d_y, and the rows of d_weight and d_bias, whose sums are the gradients."""
    rows, constants = len(means), {**sizes(len(weight)), "PER_PROGRAM": ROWS_OF_A_PROGRAM}
    tensors = sums, weight, keys, means, inverses, gradient, d_residual, d_y, d_weight, d_bias
    numbers = rows, rows // len(sums), threshold, scale(threshold)
    add_norm_backward[(len(d_weight),)](*tensors, *numbers, **constants, **OPTIONS)


class AddNorm(torch.autograd.Function):
    """Layer norm of x + y (N, ..., D), of the type of x, with dropout of y if there is noise."""

    @staticmethod
    def forward(ctx, x, y, weight, bias, epsilon, noise: Noise | None):
        x, y = x.contiguous(), y.contiguous()
        keys, ctx.threshold = noise or (None, 0)
        keys = keys if keys is None else keys.contiguous()
        sums, outputs = torch.empty_like(x), torch.empty_like(x)
        means, inverses = (x.new_empty(x[..., 0].numel(), dtype=torch.float32) for _ in range(2))
        results = sums, outputs, means, inverses
        norm_forward(x, y, weight, bias, keys, *results, ctx.threshold, epsilon)
        ctx.save_for_backward(sums, weight, keys, means, inverses)
        ctx.y_type = y.dtype
        return outputs

    @staticmethod
    def backward(ctx, gradient):
        sums, weight, keys, means, inverses = ctx.saved_tensors
        d_x, d_y = torch.empty_like(sums), None
        if keys is not None or ctx.y_type != sums.dtype:
            d_y = torch.empty_like(sums, dtype=ctx.y_type)
        rows = triton.cdiv(len(means), ROWS_OF_A_PROGRAM), sums.shape[-1]
        d_weight, d_bias = (sums.new_empty(rows, dtype=torch.float32) for _ in range(2))
        results = d_x, d_y, d_weight, d_bias
        saved = sums, weight, keys, means, inverses
        norm_backward(*saved, gradient.contiguous(), *results, ctx.threshold)
        return d_x, d_x if d_y is None else d_y, d_weight.sum(0), d_bias.sum(0), None, None
