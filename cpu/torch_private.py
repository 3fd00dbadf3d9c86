"""Private functions of torch that save time, each with a public equivalent.

Such a function may disappear or change with any release. `choose` therefore tries it once, on a
small example, and uses the public one, with a warning, if the private one is missing or returns
something else.
"""

from functools import cache

import torch
from torch.nn.functional import linear, relu

from utils import warn

# Relative and absolute.
TOLERANCE = {torch.float32: (1e-4, 1e-5), torch.bfloat16: (2e-2, 2e-2)}


@cache
def choose(name, dtype):
    """The function `name` of this file's table: private if it works here for tensors of this type,
    else public. (Without AVX-512, oneDNN has no bfloat16 products.)"""
    private, public, examples = FUNCTIONS[name]
    arguments = [example(dtype) for example in examples]
    try:
        works = all(agree(private(*some), public(*some)) for some in arguments)
    except (AttributeError, RuntimeError, TypeError, NotImplementedError):
        works = False
    if not works:
        warn(
            f"this torch ({torch.__version__}) has no usable {name} of {dtype} on this CPU: "
            "a slower one takes its place"
        )
    return private if works else public


def agree(results, expected):
    """Whether tensors, or tuples of tensors, are equal up to rounding."""
    if torch.is_tensor(results):
        results, expected = (results,), (expected,)
    return len(results) == len(expected) and all(
        x.dtype == y.dtype and x.shape == y.shape and torch.allclose(x, y, *TOLERANCE[x.dtype])
        for x, y in zip(results, expected, strict=True)
    )


def onednn_linear(x, weight, bias, activation):
    """Inputs (..., I), weight (O, I), bias (O,) or None -> (..., O); activation None or "relu".

    torch hands float32 to MKL, which is slow on AMD CPUs, and adds the bias of a bfloat16 product
    in a separate pass; oneDNN does neither.
    """
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation or "none", [], "")


def public_linear(x, weight, bias, activation):
    outputs = linear(x, weight, bias)
    return relu(outputs) if activation == "relu" else outputs


def aten_relu_backward(gradient, outputs):
    """The gradient of relu, given its outputs, in one pass."""
    return torch.ops.aten.threshold_backward(gradient, outputs, 0)


def public_relu_backward(gradient, outputs):
    return torch.where(outputs > 0, gradient, 0)


def aten_norm_backward(gradient, x, mean, inverse, weight, bias):
    """Gradients of x (..., D), weight and bias of a layer norm, from the mean of x and the inverse
    of its standard deviation, both (..., 1)."""
    shape = x.shape[-1:]
    return torch.ops.aten.native_layer_norm_backward(
        gradient, x, shape, mean, inverse, weight, bias, [True] * 3
    )


def public_norm_backward(gradient, x, mean, inverse, weight, bias):
    normalised = (x.float() - mean) * inverse
    gradient = gradient.float()
    scaled = gradient * weight
    inner = (scaled * normalised).mean(-1, keepdim=True)
    inputs = inverse * (scaled - scaled.mean(-1, keepdim=True) - normalised * inner)
    weight_gradient = (gradient * normalised).flatten(0, -2).sum(0)
    return inputs.to(x.dtype), weight_gradient, gradient.flatten(0, -2).sum(0)


def linear_example(dtype, activation=None):
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (
        torch.randn(shape, generator=generator).to(dtype) for shape in ((2, 3, 8), (5, 8), (5,))
    )
    return x, weight, bias, activation


def linear_relu_example(dtype):
    return linear_example(dtype, "relu")


def transposed_example(dtype):
    """As in `Linear.backward`: without a bias, with a transposed weight."""
    x, weight, _, _ = linear_example(dtype)
    return x[..., :5].contiguous(), weight.t(), None, None


def relu_example(dtype):
    x = linear_example(dtype)[0]
    return x, relu(x.roll(1))


def norm_example(dtype):
    x = linear_example(dtype)[0]
    mean = x.mean(-1, keepdim=True)
    inverse = 1 / x.std(-1, correction=0, keepdim=True)
    weight = torch.linspace(0.5, 2, 8)
    return x.roll(1), x, mean, inverse, weight, torch.ones(8)


FUNCTIONS = {
    "linear": (
        onednn_linear,
        public_linear,
        (linear_example, linear_relu_example, transposed_example),
    ),
    "relu_backward": (aten_relu_backward, public_relu_backward, (relu_example,)),
    "norm_backward": (aten_norm_backward, public_norm_backward, (norm_example,)),
}
