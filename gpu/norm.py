"""The layer norm of a residual sum on a GPU, in Triton, with its gradients. Statistics, sums and
the gradients of weight and bias are float32."""

import torch
import triton
import triton.language as tl

from gpu.operators import operator

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
def add_norm(
    residual, y, weight, bias, sums, normed, means, inverses, rows, EPSILON,
    D: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """residual + y (rows, D) into `sums`, its layer norm into `normed`; means and inverse standard
    deviations (rows,)."""
    start = tl.program_id(0).to(tl.int64) * ROWS
    row, row_mask, offsets, mask = locate(rows, start, D, COLUMNS, ROWS)
    column = tl.arange(0, COLUMNS)
    s = tl.load(residual + offsets, mask, 0.0).to(tl.float32)
    s += tl.load(y + offsets, mask, 0.0).to(tl.float32)
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
    sums, weight, means, inverses, gradient, d_residual, d_y, d_weight, d_bias, rows,
    D: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, PER_PROGRAM: tl.constexpr,
):  # fmt: skip
    """The gradient of the sum in the types of the residual and of y, and a row of the gradients of
    weight and bias (programs, D)."""
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
        if d_y.dtype.element_ty != d_residual.dtype.element_ty:
            tl.store(d_y + offsets, g.to(d_y.dtype.element_ty), mask)
    tl.store(d_weight + program * D + column, w_sum, column < D)
    tl.store(d_bias + program * D + column, b_sum, column < D)


@operator("sums", "normed", "means", "inverses")
def norm_forward(
    residual: torch.Tensor,
    y: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    sums: torch.Tensor,
    normed: torch.Tensor,
    means: torch.Tensor,
    inverses: torch.Tensor,
    epsilon: float,
) -> None:
    """Fills sums, normed, means and inverses."""
    rows, D = len(means), len(weight)
    tensors = residual, y, weight, bias, sums, normed, means, inverses
    add_norm[(triton.cdiv(rows, ROWS),)](*tensors, rows, epsilon, **sizes(D), **OPTIONS)


@operator("d_residual", "d_y", "d_weight", "d_bias")
def norm_backward(
    sums: torch.Tensor,
    weight: torch.Tensor,
    means: torch.Tensor,
    inverses: torch.Tensor,
    gradient: torch.Tensor,
    d_residual: torch.Tensor,
    d_y: torch.Tensor,
    d_weight: torch.Tensor,
    d_bias: torch.Tensor,
) -> None:
    """Fills d_residual, d_y unless it has the same type, and the rows of d_weight and d_bias, whose
    sums are the gradients."""
    constants = {**sizes(len(weight)), "PER_PROGRAM": ROWS_OF_A_PROGRAM}
    tensors = sums, weight, means, inverses, gradient, d_residual, d_y, d_weight, d_bias
    add_norm_backward[(len(d_weight),)](*tensors, len(means), **constants, **OPTIONS)


class AddNorm(torch.autograd.Function):
    """Layer norm of x + y (..., D), of the type of x."""

    @staticmethod
    def forward(ctx, x, y, weight, bias, epsilon):
        x, y = x.contiguous(), y.contiguous()
        sums, outputs = torch.empty_like(x), torch.empty_like(x)
        rows = x[..., 0].numel()
        means, inverses = (x.new_empty(rows, dtype=torch.float32) for _ in range(2))
        norm_forward(x, y, weight, bias, sums, outputs, means, inverses, epsilon)
        ctx.save_for_backward(sums, weight, means, inverses)
        ctx.y_type = y.dtype
        return outputs

    @staticmethod
    def backward(ctx, gradient):
        sums, weight, means, inverses = ctx.saved_tensors
        same, D = ctx.y_type == sums.dtype, sums.shape[-1]
        d_x = torch.empty_like(sums)
        d_y = sums.new_empty(0) if same else torch.empty_like(sums, dtype=ctx.y_type)
        programs = triton.cdiv(len(means), ROWS_OF_A_PROGRAM)
        d_weight, d_bias = (sums.new_empty(programs, D, dtype=torch.float32) for _ in range(2))
        gradients = d_x, d_y, d_weight, d_bias
        norm_backward(sums, weight, means, inverses, gradient.contiguous(), *gradients)
        return d_x, d_x if same else d_y, d_weight.sum(0), d_bias.sum(0), None
