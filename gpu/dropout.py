"""ReLU with dropout on a GPU, in Triton, and its gradient. The noise, with keys for each image, is
that of layers/dropout.py."""

import torch
import triton
import triton.language as tl

from gpu.operators import operator
from layers.dropout import scale

BLOCK = 1024  # elements of a program
OPTIONS = {"num_warps": 4}


@triton.jit
def mix(x):
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def dropout_factors(index, first_key, second_key, threshold, scale):
    """`scale` for the elements at `index` of an image that are kept, else 0."""
    x = index.to(tl.uint32) ^ first_key.to(tl.uint32, bitcast=True)
    x = mix(mix(x) + second_key.to(tl.uint32, bitcast=True))
    return tl.where(x.to(tl.int64) >= threshold, scale, 0.0)


@triton.jit
def relu_drop(x, y, keys, threshold, scale, size, BLOCK: tl.constexpr):
    """y (N, size) of x (N, size). NaN remains NaN."""
    image, index = tl.program_id(1), tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    offsets, mask = image.to(tl.int64) * size + index, index < size
    value = tl.load(x + offsets, mask, 0.0).to(tl.float32)
    first, second = tl.load(keys + 2 * image), tl.load(keys + 2 * image + 1)
    factors = dropout_factors(index, first, second, threshold, scale)
    value = tl.where(value <= 0, 0.0, value) * factors
    tl.store(y + offsets, value.to(y.dtype.element_ty), mask)


@triton.jit
def relu_drop_backward(y, gradient, d_x, scale, size, BLOCK: tl.constexpr):
    """The gradient of x (size,); y is 0 where nothing passed."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < size
    value = tl.load(y + offsets, mask, 0.0)
    g = tl.load(gradient + offsets, mask, 0.0).to(tl.float32) * scale
    tl.store(d_x + offsets, tl.where(value <= 0, 0.0, g).to(d_x.dtype.element_ty), mask)


@operator("y")
def relu_dropout_forward(
    x: torch.Tensor, keys: torch.Tensor, y: torch.Tensor, threshold: int
) -> None:
    """Fills y."""
    size = x[0].numel()
    grid, numbers = (triton.cdiv(size, BLOCK), len(x)), (threshold, scale(threshold), size)
    relu_drop[grid](x, y, keys, *numbers, BLOCK=BLOCK, **OPTIONS)


@operator("d_x")
def relu_dropout_backward(
    y: torch.Tensor, gradient: torch.Tensor, d_x: torch.Tensor, threshold: int
) -> None:
    """Fills d_x."""
    grid, size = (triton.cdiv(y.numel(), BLOCK),), y.numel()
    relu_drop_backward[grid](y, gradient, d_x, scale(threshold), size, BLOCK=BLOCK, **OPTIONS)


class ReluDropout(torch.autograd.Function):
    """x (N, ...) and keys (N, 2), int32. The mask is not kept: the result tells what passed."""

    @staticmethod
    def forward(ctx, x, keys, threshold):
        x = x.contiguous()
        y = torch.empty_like(x)
        relu_dropout_forward(x, keys.contiguous(), y, threshold)
        ctx.save_for_backward(y)
        ctx.threshold = threshold
        return y

    @staticmethod
    def backward(ctx, gradient):
        (y,) = ctx.saved_tensors
        d_x = torch.empty_like(y)
        relu_dropout_backward(y, gradient.contiguous(), d_x, ctx.threshold)
        return d_x, None, None
