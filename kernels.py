"""Training and evaluation on processors: the compiled attention, norm and dropout of kernels.cpp,
and oneDNN's matrix products, behind torch's functions."""

import ctypes
from functools import partial

import torch
from torch import nn

from attention import LinearAttention
from compiling import load_library
from dropout import Dropout, scale
from models import AttentionLayer, LinearRelu, ResidualNorm

SOURCE = "kernels.cpp"
TYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


def sizes(config):
    """The constants of kernels.cpp."""
    return {"SIZE": config.d_query}


def accelerate(model):
    """Let the causal-linear attention, the dropouts, norms and products of a model, in float32 or
    bfloat16, run in kernels. Raises `UserError` where they cannot be compiled.

    With bfloat16 a gradient needs the residual sums and norms in float32 (else training learns
    less); without one all activations between the products are bfloat16.
    """
    library, _ = load_library(SOURCE, sizes(model.config))
    for module in model.modules():
        if isinstance(module, AttentionLayer) and isinstance(module.attend, LinearAttention):
            module.forward = partial(attention_layer, library, module, module.forward)
        elif isinstance(module, ResidualNorm):
            module.forward = partial(residual_norm, library, module)
        elif isinstance(module, Dropout):
            module.drop = partial(Drop.apply, library)
        elif isinstance(module, nn.Linear) and has_onednn():
            module.forward = partial(linear, module)


def has_onednn():
    """Whether this torch has oneDNN, and tells the type of autocast (2.2 on old Macs does not)."""
    return torch.backends.mkldnn.is_available() and hasattr(torch, "get_autocast_dtype")


def linear(module, x):
    """The function of nn.Linear or LinearRelu, under autocast too."""
    activation = "relu" if isinstance(module, LinearRelu) else "none"
    return product(x, module.weight, module.bias, activation)


def product(x, weight, bias, activation="none"):
    if not has_onednn():
        return nn.functional.linear(x, weight, bias)
    dtype = x.dtype
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
    return Product.apply(*(tensor.to(dtype) for tensor in (x, weight, bias)), activation)


class Product(torch.autograd.Function):
    """Inputs (..., I), weight (O, I) and bias (O,) to outputs (..., O), all of one type; the
    activation is "none" or "relu".

    torch hands float32 to MKL, which is slow on AMD's processors, and adds the bias of bfloat16
    in a pass of its own; oneDNN does neither. Its transposed products are no faster.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, activation):
        outputs = torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation, [], "")
        ctx.save_for_backward(x, weight, outputs if activation == "relu" else None)
        return outputs

    @staticmethod
    def backward(ctx, gradient):
        x, weight, outputs = ctx.saved_tensors
        if outputs is not None:
            gradient = torch.ops.aten.threshold_backward(gradient, outputs, 0)
        rows = gradient.flatten(0, -2)  # (positions, O)
        inputs = torch.ops.mkldnn._linear_pointwise(gradient, weight.t(), None, "none", [], "")
        return inputs, rows.t() @ x.flatten(0, -2), rows.sum(0), None


def attention_layer(library, module, plain, x, state):
    """`AttentionLayer.forward` for more than one position, with one product for queries, keys and
    values; `plain` is the function for one position."""
    if x.shape[1] == 1:
        return plain(x, state)
    weight = torch.cat([project.weight for project in module.projections])  # (3D, D)
    bias = torch.cat([project.bias for project in module.projections])
    together = product(x, weight, bias).unflatten(-1, (3, module.n_heads, -1))  # (N, L, 3, H, E)
    if state is None:
        outputs = Attend.apply(library, together)
    else:
        outputs = forward(library, together, *state)
    return module.out_projection(outputs.flatten(-2))


def forward(library, together, S=None, Z=None):
    """Attention of queries, keys and values (N, L, 3, H, E): outputs (N, L, H, E). The state
    `S` (N, H, E, E), `Z` (N, H, E) is brought up to date in place."""
    outputs = torch.empty_like(together[:, :, 0], memory_format=torch.contiguous_format)
    call(library, "forward", (together.contiguous(), outputs, S, Z), shape_numbers(together))
    return outputs


def shape_numbers(together):
    N, L, _, H, _ = together.shape
    return N, L, H, torch.get_num_threads()


class Attend(torch.autograd.Function):
    """`attention.linear_chunked` of queries, keys and values in one tensor (N, L, 3, H, E)."""

    @staticmethod
    def forward(ctx, library, together):
        ctx.compiled = library
        ctx.save_for_backward(together)
        return forward(library, together)

    @staticmethod
    def backward(ctx, gradient):
        (together,) = ctx.saved_tensors
        gradients = torch.empty_like(together)
        tensors = together, gradient.contiguous(), gradients
        call(ctx.compiled, "backward", tensors, shape_numbers(together))
        return None, gradients


def residual_norm(library, module, x, y):
    if not torch.is_grad_enabled():
        x = x.to(y.dtype)
    return Norm.apply(library, x, y, module.weight, module.bias, module.eps)


class Norm(torch.autograd.Function):
    """Layer norm of x + y (..., D), of the type of x; the statistics are float32."""

    @staticmethod
    def forward(ctx, library, x, y, weight, bias, epsilon):
        ctx.y_type = y.dtype
        x, y = x.contiguous(), y.contiguous()
        sums, outputs = torch.empty_like(x), torch.empty_like(x)
        rows, D = x.flatten(0, -2).shape
        mean, inverse = (torch.empty(*x.shape[:-1], 1) for _ in range(2))  # 1 / deviation
        tensors = y, x, weight, bias, sums, outputs, mean, inverse
        numbers = rows, D, torch.get_num_threads()
        call(library, f"norm_{TYPES[x.dtype]}", tensors, numbers, ctypes.c_float(epsilon))
        ctx.save_for_backward(sums, mean, inverse, weight, bias)
        return outputs

    @staticmethod
    def backward(ctx, gradient):
        sums, mean, inverse, weight, bias = ctx.saved_tensors
        shape = sums.shape[-1:]
        inputs, *parameters = torch.ops.aten.native_layer_norm_backward(
            gradient.contiguous(), sums, shape, mean, inverse, weight, bias, [True] * 3
        )
        return None, inputs, inputs.to(ctx.y_type), *parameters, None


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
