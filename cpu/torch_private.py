"""oneDNN's matrix product, which is a private function of torch.

It may disappear or change with any release. It is therefore tried once, on small examples, and the
public product takes its place, with a warning, if it is missing or returns something else.
"""

import sys
from collections.abc import Callable
from functools import cache

import torch
from torch.nn.functional import linear, relu

from utils import warn

# On Apple's CPUs a unit for matrices computes torch's public product of float32, ten times as fast
# as the vectors of a core, which oneDNN uses.
APPLE = sys.platform == "darwin"
# Relative and absolute.
TOLERANCE = {torch.float32: (1e-4, 1e-5), torch.bfloat16: (2e-2, 2e-2)}


@cache
def private_or_public(dtype: torch.dtype) -> Callable[..., torch.Tensor]:
    """The fastest product that works here for tensors of this type: (x, weight, bias, activation)
    -> outputs, for x (..., I), weight (O, I), bias (O,) or None, and activation None or "relu".

    (Without AVX-512, oneDNN has no bfloat16 products.)
    """
    if APPLE:
        return public_linear
    try:
        works = all(agree(private_linear(*x), public_linear(*x)) for x in examples(dtype))
    except (AttributeError, RuntimeError, TypeError, NotImplementedError):
        works = False
    if not works:
        warn(
            f"this torch ({torch.__version__}) has no usable oneDNN product of {dtype} on this "
            "CPU: a slower one takes its place"
        )
    return private_linear if works else public_linear


def private_linear(x, weight, bias, activation):
    """torch hands float32 to MKL, which is slow on AMD CPUs, and adds the bias of a bfloat16
    product in a separate pass; oneDNN does neither.

    oneDNN's relu turns NaN into 0, so that diverged weights would go unnoticed. Its leaky relu
    keeps NaN; with this slope it differs from a relu by less than any rounding.
    """
    name, slope = ("leaky_relu", [1e-30]) if activation == "relu" else ("none", [])
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, name, slope, "")


def public_linear(x, weight, bias, activation):
    outputs = linear(x, weight, bias)
    return relu(outputs) if activation == "relu" else outputs


def examples(dtype):
    """Arguments as in `Linear` of cpu/ops.py: those of its forward pass, without and with a relu,
    and those of its gradient, which has no bias and a transposed weight."""
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (
        torch.randn(shape, generator=generator).to(dtype) for shape in ((2, 3, 8), (5, 8), (5,))
    )
    gradient = x[..., :5].contiguous()
    return (x, weight, bias, None), (x, weight, bias, "relu"), (gradient, weight.t(), None, None)


def agree(x, expected):
    """Whether two tensors are equal up to rounding."""
    return (
        torch.is_tensor(x)
        and (x.dtype, x.shape) == (expected.dtype, expected.shape)
        and torch.allclose(x, expected, *TOLERANCE[x.dtype])
    )
