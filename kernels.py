"""Training and evaluation on processors: the compiled attention and dropout of kernels.cpp, and
oneDNN's matrix products, behind torch's functions."""

import ctypes
from functools import partial

import torch
from torch import nn

from attention import LinearAttention
from compiling import load_library
from dropout import Dropout, scale

SOURCE = "kernels.cpp"
TYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


def sizes(config):
    """The constants of kernels.cpp."""
    return {"SIZE": config.d_query}


def accelerate(model):
    """Let the causal-linear attention and the dropouts of a model, in float32 or bfloat16, run in
    compiled kernels. Raises `UserError` where they cannot be compiled."""
    library, _ = load_library(SOURCE, sizes(model.config))
    for module in model.modules():
        if isinstance(module, LinearAttention):
            module.parallel = lambda *inputs: linear_attention(library, *inputs)
        elif isinstance(module, Dropout):
            module.compute = lambda *inputs: Drop.apply(library, *inputs)
        elif isinstance(module, nn.Linear) and has_onednn():
            module.forward = partial(linear, module)


def has_onednn():
    """Whether this torch has oneDNN, and tells the type of autocast (2.2 on old Macs does not)."""
    return torch.backends.mkldnn.is_available() and hasattr(torch, "get_autocast_dtype")


def linear(module, x):
    """nn.Linear's function, under autocast too."""
    dtype = x.dtype
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
    return Product.apply(*(tensor.to(dtype) for tensor in (x, module.weight, module.bias)))


class Product(torch.autograd.Function):
    """Inputs (..., I), weight (O, I) and bias (O,) to outputs (..., O), all of one type.

    torch hands float32 to MKL, which is slow on AMD's processors, and adds the bias of bfloat16
    in a pass of its own; oneDNN does neither. Its transposed products are no faster.
    """

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        rows = gradient.flatten(0, -2)  # (positions, O)
        inputs = torch.ops.mkldnn._linear_pointwise(gradient, weight.t(), None, "none", [], "")
        return inputs, rows.t() @ x.flatten(0, -2), rows.sum(0)


def linear_attention(library, queries, keys, values, state=None):
    """`attention.linear_chunked`; differentiable without a state."""
    if state is None:
        return Attend.apply(library, queries, keys, values), None
    state = tuple(tensor.clone() for tensor in state)
    return forward(library, queries, keys, values, state), state


def forward(library, queries, keys, values, state=(None, None)):
    """Outputs (N, L, H, M); `state` is brought up to date in place."""
    queries, keys, values = (x.contiguous() for x in (queries, keys, values))
    outputs = torch.empty_like(values)
    call(library, "forward", (queries, keys, values, outputs, *state), shape_numbers(queries))
    return outputs


def shape_numbers(queries):
    N, L, H, E = queries.shape
    return N, L, H, H * E, torch.get_num_threads()


class Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx, library, *inputs):
        inputs = [x.contiguous() for x in inputs]
        ctx.compiled = library
        ctx.save_for_backward(*inputs)
        return forward(library, *inputs)

    @staticmethod
    def backward(ctx, gradient):
        inputs = ctx.saved_tensors
        gradients = [torch.empty_like(x) for x in inputs]
        tensors = (*inputs, gradient.contiguous(), *gradients)
        call(ctx.compiled, "backward", tensors, shape_numbers(inputs[0]))
        return None, *gradients


class Drop(torch.autograd.Function):
    """The mask is computed again for the gradient, not kept."""

    @staticmethod
    def forward(ctx, library, x, keys, threshold):
        ctx.compiled, ctx.threshold = library, threshold
        ctx.save_for_backward(keys)
        return Drop.compute(library, x, keys, threshold)

    @staticmethod
    def backward(ctx, gradient):
        (keys,) = ctx.saved_tensors
        return None, Drop.compute(ctx.compiled, gradient, keys, ctx.threshold), None, None

    @staticmethod
    def compute(library, x, keys, threshold):
        x = x.contiguous()
        y = torch.empty_like(x)
        numbers = len(x), x[0].numel(), threshold, torch.get_num_threads()
        call(library, "drop", (x, y, keys), numbers, ctypes.c_float(scale(threshold)))
        return y


def call(library, name, tensors, numbers, *more):
    """Call the function for the type of the first tensor with pointers to contiguous tensors."""
    places = [ctypes.c_void_p(None if x is None else x.data_ptr()) for x in tensors]
    function = getattr(library, f"{name}_{TYPES[tensors[0].dtype]}")
    function(*places, *map(ctypes.c_int64, numbers), *more)
