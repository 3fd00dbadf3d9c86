"""The short convolution on a GPU, in Triton, with its gradients. Sums are float32."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from gpu.operators import operator

# Of a tile; and the positions whose gradients of the weights one program adds.
SIZES = {"POSITIONS": 32, "COLUMNS": 64}
POSITIONS_OF_A_PROGRAM = 256
OPTIONS = {"num_warps": 4}
STEP_OPTIONS = {"num_warps": 2}


@triton.jit
def locate(L, D, first, POSITIONS: tl.constexpr, COLUMNS: tl.constexpr):
    """A tile's positions (POSITIONS, 1) from `first` on, its columns, and the offset of this
    program's image in (N, L, D)."""
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    image = tl.program_id(2).to(tl.int64) * L * D
    return first + tl.arange(0, POSITIONS)[:, None], columns, image


@triton.jit
def load_tile(x, image, positions, columns, L, D):
    """x at positions and columns, in float32; 0 before the first and after the last."""
    mask = (positions >= 0) & (positions < L) & (columns < D)[None, :]
    return tl.load(x + image + positions * D + columns[None, :], mask, 0.0).to(tl.float32)


@triton.jit
def convolve(
    x, weight, y, L, D, OFFSETS: tl.constexpr, POSITIONS: tl.constexpr, COLUMNS: tl.constexpr
):
    """y[l] = x[l] plus the sum over t of weight[t] * x[l - OFFSETS[t]]."""
    first = tl.program_id(0) * POSITIONS
    positions, columns, image = locate(L, D, first, POSITIONS, COLUMNS)
    total = load_tile(x, image, positions, columns, L, D)
    for t in tl.static_range(len(OFFSETS)):
        w = tl.load(weight + t * D + columns, columns < D, 0.0).to(tl.float32)
        total += w[None, :] * load_tile(x, image, positions - OFFSETS[t], columns, L, D)
    inside = (positions < L) & (columns < D)[None, :]
    pointers = y + image + positions * D + columns[None, :]
    tl.store(pointers, total.to(y.dtype.element_ty), inside)


@triton.jit
def weight_gradient(
    x, gradient, sums, L, D,
    OFFSETS: tl.constexpr, POSITIONS: tl.constexpr, COLUMNS: tl.constexpr,
    PER_PROGRAM: tl.constexpr,
):  # fmt: skip
    """The sums (N, programs, T, D) over some positions of gradient[l] * x[l - OFFSETS[t]]."""
    row = tl.program_id(2).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    for t in tl.static_range(len(OFFSETS)):
        total = tl.zeros((COLUMNS,), tl.float32)
        for start in range(0, PER_PROGRAM, POSITIONS):
            first = tl.program_id(0) * PER_PROGRAM + start
            positions, columns, image = locate(L, D, first, POSITIONS, COLUMNS)
            g = load_tile(gradient, image, positions, columns, L, D)
            total += tl.sum(g * load_tile(x, image, positions - OFFSETS[t], columns, L, D), 0)
        columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        tl.store(sums + (row * len(OFFSETS) + t) * D + columns, total, columns < D)


@triton.jit
def convolve_position(
    x, weight, steps_back, recent, position, y, N, R, D, T: tl.constexpr, COLUMNS: tl.constexpr
):
    """y (N, D) of x (N, D) at one position, whose row of `recent` (R, N, D) becomes x. No offset of
    `steps_back` (T,) leads to that row."""
    n = tl.program_id(0)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mask, p = columns < D, tl.load(position)
    value = tl.load(x + n * D + columns, mask, 0.0)
    tl.store(recent + (p % R * N + n) * D + columns, value.to(recent.dtype.element_ty), mask)
    total = value.to(tl.float32)
    for t in tl.static_range(T):
        row = (p - tl.load(steps_back + t) + R) % R  # not negative: an offset is less than R
        earlier = tl.load(recent + (row * N + n) * D + columns, mask, 0.0).to(tl.float32)
        total += tl.load(weight + t * D + columns, mask, 0.0).to(tl.float32) * earlier
    tl.store(y + n * D + columns, total.to(y.dtype.element_ty), mask)


@operator("y")
def convolution(
    x: torch.Tensor, weight: torch.Tensor, y: torch.Tensor, offsets: Sequence[int]
) -> None:
    """Fills y with the convolution of x; with negative offsets, with the gradient of x."""
    N, L, D = x.shape
    grid = triton.cdiv(L, SIZES["POSITIONS"]), triton.cdiv(D, SIZES["COLUMNS"]), N
    convolve[grid](x, weight, y, L, D, OFFSETS=tuple(offsets), **SIZES, **OPTIONS)


@operator("sums")
def convolution_weights(
    x: torch.Tensor, gradient: torch.Tensor, sums: torch.Tensor, offsets: Sequence[int]
) -> None:
    """Fills sums (N, programs, T, D), whose sum is the gradient of the weights."""
    N, L, D = x.shape
    grid = sums.shape[1], triton.cdiv(D, SIZES["COLUMNS"]), N
    constants = {"OFFSETS": tuple(offsets), **SIZES, "PER_PROGRAM": POSITIONS_OF_A_PROGRAM}
    weight_gradient[grid](x, gradient, sums, L, D, **constants, **OPTIONS)


@operator("recent", "y")
def convolution_step(
    x: torch.Tensor,
    weight: torch.Tensor,
    steps_back: torch.Tensor,
    recent: torch.Tensor,
    position: torch.Tensor,
    y: torch.Tensor,
) -> None:
    """Fills y, and a row of recent."""
    (N, _, D), columns = x.shape, SIZES["COLUMNS"]
    tensors, sizes = (x, weight, steps_back, recent, position, y), (N, len(recent), D)
    grid = N, triton.cdiv(D, columns)
    convolve_position[grid](*tensors, *sizes, T=len(weight), COLUMNS=columns, **STEP_OPTIONS)


class ShortConvolution(torch.autograd.Function):
    """x (N, L, D) and its rows at T offsets before, times weight (T, D)."""

    @staticmethod
    def forward(ctx, x, weight, offsets):
        x, weight = x.contiguous(), weight.contiguous()
        ctx.save_for_backward(x, weight)
        ctx.offsets = tuple(offsets)
        y = torch.empty_like(x)
        convolution(x, weight, y, ctx.offsets)
        return y

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        gradient, inputs = gradient.contiguous(), torch.empty_like(x)
        convolution(gradient, weight, inputs, tuple(-offset for offset in ctx.offsets))
        programs = triton.cdiv(x.shape[1], POSITIONS_OF_A_PROGRAM)
        sums = x.new_empty(len(x), programs, *weight.shape, dtype=torch.float32)
        convolution_weights(x, gradient, sums, ctx.offsets)
        return inputs, sums.sum((0, 1)).to(weight.dtype), None


def step(
    x: torch.Tensor,
    weight: torch.Tensor,
    steps_back: torch.Tensor,
    recent: torch.Tensor,
    position: torch.Tensor,
) -> torch.Tensor:
    """As `PlainOps.convolution_step`, without gradients."""
    if not recent.is_contiguous():
        raise TypeError("the last inputs should be contiguous")
    x = x.contiguous()
    y = torch.empty_like(x)
    convolution_step(x, weight.contiguous(), steps_back, recent, position, y)
    return y
