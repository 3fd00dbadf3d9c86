"""The operations of layers/ops.py compiled for the CPU: ops.cpp for attention, norms, dropout and
the loss, oneDNN for matrix products, each with its gradient. Float32 or bfloat16."""

import math
from collections.abc import Sequence

import torch
from torch import nn

from cpu.build import NORM_EPSILON, ROWS_PER_BLOCK, ROWS_PER_TASK, Library, load_library
from cpu.dot import multiplies_pairs
from cpu.torch_private import APPLE, private_or_public
from layers.dropout import Noise, scale
from layers.ops import PlainOps
from models import ModelConfig

SOURCE = "ops.cpp"
VECTOR = 16  # float32 numbers of the widest vectors
TYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


def sizes(config: ModelConfig) -> dict:
    """The sizes with which ops.cpp is compiled for a model."""
    return {"SIZE": config.d_query}


class CompiledOps(PlainOps):
    """As `PlainOps`, for a float32 model of this configuration, under bfloat16 autocast or not.

    With gradients, the residual sums and norms stay float32 under autocast, since training learns
    less with them in bfloat16; without gradients all activations between the products are
    bfloat16. Tensors of another type or device raise a TypeError. Raises `UserError` if ops.cpp
    cannot be compiled.
    """

    def __init__(self, config: ModelConfig):
        self.size = config.d_query
        self.library, self.compile_seconds = load_library(SOURCE, sizes(config))
        private_or_public(torch.float32)  # warn now, not in the first step

    def linear(
        self,
        x: torch.Tensor,
        *layers: nn.Linear,
        activation: str | None = None,
        noise: Noise | None = None,
    ) -> torch.Tensor:
        weight, bias = layers[0].weight, layers[0].bias
        if len(layers) > 1:
            weight = torch.cat([layer.weight for layer in layers])  # (O, I)
            bias = torch.cat([layer.bias for layer in layers])
        if torch.is_autocast_enabled("cpu"):
            dtype = torch.get_autocast_dtype("cpu")
            x, weight = x.to(dtype), weight.to(dtype)
            bias = bias if bias is None else bias.to(dtype)
        check(x, weight)
        if activation is None and noise is not None:
            return self.dropout(Linear.apply(self.library, x, weight, bias), *noise)
        return Linear.apply(self.library, x, weight, bias, activation, noise)

    def add_norm(
        self, x: torch.Tensor, y: torch.Tensor, norm: nn.LayerNorm, noise: Noise | None = None
    ) -> torch.Tensor:
        check_norm(norm, x)
        check_shape(y, x.shape)
        if not torch.is_grad_enabled():
            x = x.to(y.dtype)
        y = y if x.dtype == torch.float32 else y.to(x.dtype)
        return AddNorm.apply(self.library, x, y, norm.weight, norm.bias, noise)

    def feed_forward_block(
        self,
        x: torch.Tensor,
        first: nn.Linear,
        second: nn.Linear,
        norm: nn.LayerNorm,
        hidden_noise: Noise | None = None,
        noise: Noise | None = None,
    ) -> torch.Tensor:
        autocast, keep = torch.is_autocast_enabled("cpu"), torch.is_grad_enabled()
        dtype = torch.get_autocast_dtype("cpu") if autocast else torch.float32
        F, D = first.weight.shape
        if D % VECTOR or F % (4 * VECTOR) or not self.has_fast_block(dtype, x.dtype, keep):
            return super().feed_forward_block(x, first, second, norm, hidden_noise, noise)
        check_norm(norm, x)
        parameters = [p for layer in (first, second, norm) for p in (layer.weight, layer.bias)]
        # Sampling in bfloat16 has converted the weights.
        parameters = [p.float() if p.dtype == dtype else p for p in parameters]
        arguments = *parameters, hidden_noise, noise, keep
        return FeedForwardBlock.apply(self.library, dtype, x, *arguments)

    def has_fast_block(self, dtype: torch.dtype, x_dtype: torch.dtype, keep: bool) -> bool:
        """Whether feed_forward.h has products of this type, for these inputs and perhaps with
        gradients, which are faster than those of torch: only the latter use units for matrices."""
        if APPLE:
            return False
        if dtype == torch.float32:
            return True
        compiled = f"feed_forward_block_backward_{TYPES.get(dtype)}" in self.library.functions
        return compiled and (x_dtype == torch.float32 or not keep) and multiplies_pairs()

    def short_convolution(
        self, x: torch.Tensor, weight: torch.Tensor, offsets: Sequence[int]
    ) -> torch.Tensor:
        _, _, D = x.shape
        check_shape(weight, (len(offsets), D))
        if min(offsets) < 0:
            raise ValueError(f"offsets {tuple(offsets)} reach into later positions")
        return ShortConvolution.apply(self.library, x, weight, offsets)

    def linear_attention(
        self, qkv: torch.Tensor, state: Sequence[torch.Tensor] | None = None
    ) -> torch.Tensor:
        N, L, _, H, E = qkv.shape
        if self.size != E:
            raise ValueError(f"ops.cpp is compiled for heads of {self.size}, not {E}")
        check_shape(qkv, (N, L, 3, H, E))
        if state is None:
            return Attention.apply(self.library, qkv)
        for tensor, shape in zip(state, ((N, H, E, E), (N, H, E)), strict=True):
            check_shape(tensor, shape)
        return attention(self.library, qkv, *state)

    def gated_attention(
        self,
        projected: torch.Tensor,
        n_heads: int,
        state: Sequence[torch.Tensor] | None = None,
    ) -> torch.Tensor:
        N, L, _ = projected.shape
        check_shape(projected, (N, L, n_heads * (4 * self.size + 2)))
        if state is None:
            return GatedAttention.apply(self.library, projected, n_heads)
        (S,) = state
        check_shape(S, (N, n_heads, self.size, self.size))
        return gated_attention(self.library, projected, n_heads, S=S)

    def log_prob(self, parameters: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        check_shape(values, parameters.shape[:-1])
        return LogProb.apply(self.library, parameters, values)


class Linear(torch.autograd.Function):
    """x (..., I), weight (O, I), bias (O,) or None, of one type -> (..., O); after a relu perhaps
    with dropout, in place. What was dropped is 0: the gradient needs to know no more."""

    @staticmethod
    def forward(ctx, library, x, weight, bias, activation=None, noise=None):
        outputs = private_or_public(x.dtype)(x, weight, bias, activation)
        if noise is not None:
            keys, size, threshold, factor = dropout_arguments(outputs, noise)
            numbers = len(x), size, threshold, factor, torch.get_num_threads()
            library.call(f"drop_{TYPES[x.dtype]}", outputs, keys, *numbers)
        ctx.library, ctx.factor = library, 1.0 if noise is None else factor
        ctx.save_for_backward(x, weight, outputs if activation == "relu" else None)
        return outputs

    @staticmethod
    def backward(ctx, gradient):
        x, weight, outputs = ctx.saved_tensors
        gradient, bias = bias_gradient(ctx.library, gradient.contiguous(), outputs, ctx.factor)
        inputs = None
        if ctx.needs_input_grad[1]:
            inputs = private_or_public(x.dtype)(gradient, weight.t(), None, None)
        rows = gradient.flatten(0, -2)  # (positions, O)
        bias = bias if ctx.needs_input_grad[3] else None
        return None, inputs, rows.t() @ x.flatten(0, -2), bias, None, None


def bias_gradient(
    library: Library, gradient: torch.Tensor, outputs: torch.Tensor | None, factor: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradient (..., O) in front of a relu, and dropout that multiplied by `factor`, with these
    `outputs`, if there are any, and that of the bias (O,)."""
    rows, width = gradient.flatten(0, -2).shape
    sums = gradient.new_empty(tasks(rows), width, dtype=torch.float32)
    numbers = rows, width, torch.get_num_threads()
    check(gradient)
    kind = TYPES[gradient.dtype]
    if outputs is None:
        library.call(f"bias_backward_{kind}", gradient, sums, *numbers)
    else:
        check(outputs, types=(gradient.dtype,))
        masked = torch.empty_like(gradient)
        tensors = gradient, outputs.contiguous(), masked, sums
        library.call(f"relu_backward_{kind}", *tensors, factor, *numbers)
        gradient = masked
    return gradient, sums.sum(0).to(gradient.dtype)


def tasks(rows: int) -> int:
    """How many tasks ops.cpp makes of rows."""
    return math.ceil(rows / ROWS_PER_TASK)


def dropout_arguments(
    x: torch.Tensor, noise: Noise | None
) -> tuple[torch.Tensor | None, int, int, float]:
    """What ops.cpp needs to drop elements of images x (N, ...): keys, None without `noise`, the
    elements of an image, the threshold, and what multiplies the elements that are kept."""
    if noise is None:
        return None, 1, 0, 1.0
    keys, threshold = noise
    check_shape(keys, (len(x), 2))
    check(keys, types=(torch.int32,))
    return keys.contiguous(), x[0].numel(), threshold, scale(threshold)


class AddNorm(torch.autograd.Function):
    """Layer norm of x + y (..., D), of the type of x, with dropout of y if there is `noise`. The
    statistics are float32; the mask is recomputed for the gradient instead of being kept."""

    @staticmethod
    def forward(ctx, library, x, y, weight, bias, noise):
        ctx.library, ctx.y_type, ctx.noise = library, y.dtype, noise
        x, y = x.contiguous(), y.contiguous()
        sums, outputs = torch.empty_like(x), torch.empty_like(x)
        rows, D = x.flatten(0, -2).shape
        mean, inverse = (x.new_empty(*x.shape[:-1], 1, dtype=torch.float32) for _ in range(2))
        check(x, y, sums, outputs)
        check(weight, bias, mean, inverse, types=(torch.float32,))
        name = f"norm_{TYPES[x.dtype]}_{TYPES[y.dtype]}"
        keys, *dropout = dropout_arguments(y, noise)
        tensors = y, x, weight, bias, sums, outputs, mean, inverse, keys
        library.call(name, *tensors, rows, D, *dropout, torch.get_num_threads())
        ctx.save_for_backward(sums, mean, inverse, weight)
        return outputs

    @staticmethod
    def backward(ctx, gradient):
        sums, mean, inverse, weight = ctx.saved_tensors
        gradient = gradient.contiguous()
        rows, D = sums.flatten(0, -2).shape
        d_x, d_y = torch.empty_like(sums), torch.empty_like(sums, dtype=ctx.y_type)
        parameters = sums.new_empty(tasks(rows), 2, D, dtype=torch.float32)
        check(gradient, types=(sums.dtype,))
        name = f"norm_backward_{TYPES[sums.dtype]}_{TYPES[ctx.y_type]}"
        keys, *dropout = dropout_arguments(sums, ctx.noise)
        tensors = gradient, sums, mean, inverse, weight, d_x, d_y, parameters, keys
        ctx.library.call(name, *tensors, rows, D, *dropout, torch.get_num_threads())
        return None, d_x, d_y, *parameters.sum(0), None


class FeedForwardBlock(torch.autograd.Function):
    """`feed_forward_block` of x (..., D) with float32 weights (F, D) and (D, F), whose products are
    of numbers of `dtype`. What the gradient needs is kept if `keep`. (In a pass without gradients,
    needs_input_grad is true.)"""

    @staticmethod
    def forward(ctx, library, dtype, x, *rest):
        *parameters, hidden_noise, noise, keep = rest
        weight1, bias1, weight2, bias2, scale, shift = parameters
        F, D = weight1.shape
        x = x.contiguous()
        check(x, types=(torch.float32, dtype))
        check(*parameters, types=(torch.float32,))
        outputs, kept, rows = torch.empty_like(x), [None] * 4, x.numel() // D
        if keep:
            mean, inverse = (x.new_empty(rows) for _ in range(2))
            hidden = x.new_empty(rows + rows % 2, F, dtype=dtype)  # in pairs of rows
            kept = [hidden, torch.empty_like(x), mean, inverse]
        hidden_keys, _, *hidden_dropout = dropout_arguments(x, hidden_noise)
        keys, _, *dropout = dropout_arguments(x, noise)
        layers = weight1.t().contiguous(), bias1, weight2.t().contiguous(), bias2, scale, shift
        tensors = x, *layers, outputs, *kept, hidden_keys, keys
        sizes = rows, D, F, x.shape[1:].numel()
        numbers = *sizes, *hidden_dropout, *dropout, torch.get_num_threads()
        library.call(f"feed_forward_block_{TYPES[dtype]}_{TYPES[x.dtype]}", *tensors, *numbers)
        ctx.library, ctx.dtype = library, dtype
        ctx.factor, ctx.noise = hidden_dropout[-1], noise
        ctx.save_for_backward(x, *kept, weight1, weight2, scale)
        return outputs

    @staticmethod
    def backward(ctx, gradient):
        x, *kept, weight1, weight2, scale = ctx.saved_tensors
        gradient = gradient.contiguous()
        check(gradient, types=(torch.float32,))
        F, D = weight1.shape
        rows, threads = x.numel() // D, torch.get_num_threads()
        blocks = math.ceil(rows / ROWS_PER_BLOCK)
        inputs = torch.empty_like(x)
        weights = x.new_empty(threads, F, D), x.new_empty(threads, D, F)  # of each thread
        vectors = (x.new_empty(blocks, n) for n in (F, D, 2 * D))  # of each block
        keys, _, *dropout = dropout_arguments(x, ctx.noise)
        gradients = *weights, *vectors
        tensors = x, *kept, gradient, weight1, weight2, scale, inputs, *gradients, keys
        numbers = rows, D, F, ctx.factor, x.shape[1:].numel(), *dropout, threads
        ctx.library.call(f"feed_forward_block_backward_{TYPES[ctx.dtype]}", *tensors, *numbers)
        first, second, bias1, bias2, norm = (tensor.sum(0) for tensor in gradients)
        return None, None, inputs, first, bias1, second, bias2, *norm.split(D), None, None, None


class ShortConvolution(torch.autograd.Function):
    """x (N, L, D) and its rows at T offsets before, times weight (T, D)."""

    @staticmethod
    def forward(ctx, library, x, weight, offsets):
        ctx.library, ctx.offsets = library, torch.tensor(offsets, dtype=torch.int64)
        x, weight = x.contiguous(), weight.contiguous()
        ctx.save_for_backward(x, weight)
        y = torch.empty_like(x)
        check(x, y)
        check(weight, types=(torch.float32,))
        numbers = *x.shape, len(offsets), torch.get_num_threads()
        library.call(f"convolve_{TYPES[x.dtype]}", x, weight, ctx.offsets, y, *numbers)
        return y

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        gradient = gradient.contiguous()
        inputs = torch.empty_like(x)
        weights = x.new_empty(len(x), *weight.shape, dtype=torch.float32)  # of each image
        check(gradient, inputs, types=(x.dtype,))
        numbers = *x.shape, len(weight), torch.get_num_threads()
        tensors = x, weight, ctx.offsets, gradient, inputs, weights
        ctx.library.call(f"convolve_backward_{TYPES[x.dtype]}", *tensors, *numbers)
        return None, inputs, weights.sum(0), None


class Attention(torch.autograd.Function):
    """Causal linear attention of qkv (N, L, 3, H, E) from its first position on."""

    @staticmethod
    def forward(ctx, library, qkv):
        ctx.library = library
        ctx.save_for_backward(qkv)
        return attention(library, qkv)

    @staticmethod
    def backward(ctx, gradient):
        (qkv,) = ctx.saved_tensors
        qkv, gradient = qkv.contiguous(), gradient.contiguous()
        gradients = torch.empty_like(qkv)
        check(qkv, gradient, gradients)
        name = f"backward_{TYPES[qkv.dtype]}"
        ctx.library.call(name, qkv, gradient, gradients, *attention_numbers(qkv))
        return None, gradients


def attention(
    library: Library,
    qkv: torch.Tensor,
    S: torch.Tensor | None = None,
    Z: torch.Tensor | None = None,
) -> torch.Tensor:
    """Outputs (N, L, H, E) of qkv (N, L, 3, H, E); updates the state `S` (N, H, E, E), `Z`
    (N, H, E) in place."""
    qkv = qkv.contiguous()
    outputs = torch.empty_like(qkv[:, :, 0], memory_format=torch.contiguous_format)
    check(qkv, outputs)
    check(*(x for x in (S, Z) if x is not None), types=(torch.float32,))
    name = f"forward_{TYPES[qkv.dtype]}"
    library.call(name, qkv, outputs, S, Z, *attention_numbers(qkv))
    return outputs


class GatedAttention(torch.autograd.Function):
    """Gated linear attention of `projected` (N, L, 4HE + 2H) from its first position on."""

    @staticmethod
    def forward(ctx, library, projected, n_heads):
        ctx.library = library
        scales = projected.new_empty(*projected.shape[:2], n_heads, dtype=torch.float32)
        outputs = gated_attention(library, projected, n_heads, scales)
        ctx.save_for_backward(projected, outputs, scales)
        return outputs

    @staticmethod
    def backward(ctx, gradient):
        projected, outputs, scales = ctx.saved_tensors
        projected, gradient = projected.contiguous(), gradient.contiguous()
        gradients = torch.empty_like(projected)
        check(projected, outputs, gradient, gradients, types=(projected.dtype,))
        name = f"gated_backward_{TYPES[projected.dtype]}"
        tensors = projected, outputs, scales, gradient, gradients
        ctx.library.call(name, *tensors, *scales.shape, torch.get_num_threads())
        return None, gradients, None


def gated_attention(
    library: Library,
    projected: torch.Tensor,
    n_heads: int,
    scales: torch.Tensor | None = None,
    S: torch.Tensor | None = None,
) -> torch.Tensor:
    """Outputs (N, L, HE) of `projected` (N, L, 4HE + 2H), with their factors in `scales` (N, L, H);
    updates the state `S` (N, H, E, E) in place."""
    projected = projected.contiguous()
    N, L, width = projected.shape
    outputs = projected.new_empty(N, L, (width - 2 * n_heads) // 4)
    check(projected, outputs)
    if S is not None:
        check(S, types=(torch.float32,))
    numbers = N, L, n_heads, torch.get_num_threads()
    library.call(f"gated_forward_{TYPES[projected.dtype]}", projected, outputs, scales, S, *numbers)
    return outputs


class LogProb(torch.autograd.Function):
    """Parameters (..., 3K) and bytes (...) -> log-probabilities (...), float32. The gradients are
    computed at once, since they need the same exponentials."""

    @staticmethod
    def forward(ctx, library, parameters, values):
        parameters, values = parameters.contiguous(), values.to(torch.uint8).contiguous()
        log_probs = parameters.new_empty(values.shape, dtype=torch.float32)
        gradients = None
        if ctx.needs_input_grad[1]:
            gradients = torch.empty_like(parameters, dtype=torch.float32)
        check(parameters)
        check(values, types=(torch.uint8,))
        numbers = values.numel(), parameters.shape[-1] // 3, torch.get_num_threads()
        name = f"log_prob_{TYPES[parameters.dtype]}"
        library.call(name, parameters, values, log_probs, gradients, *numbers)
        ctx.save_for_backward(gradients)
        ctx.type = parameters.dtype
        return log_probs

    @staticmethod
    def backward(ctx, gradient):
        (gradients,) = ctx.saved_tensors
        return None, (gradients * gradient[..., None]).to(ctx.type), None


def attention_numbers(qkv):
    N, L, _, H, _ = qkv.shape
    return N, L, H, torch.get_num_threads()


def check_norm(norm: nn.LayerNorm, x: torch.Tensor) -> None:
    """Raise a ValueError for a norm that ops.cpp would compute differently."""
    if norm.eps != NORM_EPSILON:
        raise ValueError(f"ops.cpp is compiled for eps {NORM_EPSILON}, not {norm.eps}")
    check_shape(norm.weight, x.shape[-1:])


def check(*tensors: torch.Tensor, types: Sequence[torch.dtype] = tuple(TYPES)) -> None:
    """Raise a TypeError for a tensor whose memory the C++ functions would misread."""
    for tensor in tensors:
        if tensor.device.type != "cpu" or tensor.dtype not in types:
            raise TypeError(
                f"compiled operations take {' and '.join(map(str, types))} on the CPU, not "
                f"{tensor.dtype} on {tensor.device}: build the model with PlainOps"
            )


def check_shape(tensor: torch.Tensor, shape: Sequence[int]) -> None:
    """Raise a ValueError for a tensor of another shape."""
    if tensor.shape != shape:
        raise ValueError(f"a tensor is {tuple(tensor.shape)} and should be {tuple(shape)}")
