"""The operations of layers/ops.py in Triton, for NVIDIA GPUs. Float32 or bfloat16."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from gpu import attention, convolution, gated, gated_step
from gpu.attention import LinearAttention
from gpu.convolution import ShortConvolution
from gpu.dropout import ReluDropout
from gpu.mixture import LogProb
from gpu.norm import AddNorm
from gpu.step import step
from layers.convolution import convolution_offsets
from layers.dropout import Noise
from layers.ops import PlainOps, update
from models import ModelConfig
from utils import UserError

# Compute capabilities that the kernels compile for. For an unknown one LLVM may abort the process.
CAPABILITIES = (8, 0), (8, 6), (8, 7), (8, 9), (9, 0), (10, 0), (10, 3), (11, 0), (12, 0), (12, 1)
# Of heads.
SIZES_OF = {"causal-linear": attention.SIZES, "gated-linear": gated.SIZES}
# The largest difference from the plain form in float32 that is rounding, relative to the largest
# number of a tensor.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 0.05}


class TritonOps(PlainOps):
    """As `PlainOps`, on one GPU, for a model of this configuration.

    Raises `UserError` for a model or a GPU that the kernels are not for, or if they disagree with
    the plain form on a few random numbers. Triton's own errors are of many types.
    """

    def __init__(self, config: ModelConfig, device: torch.device):
        if device.type == "cuda":
            check_gpu(device)
        sizes = SIZES_OF.get(config.attention_type)
        if sizes and config.d_query not in sizes:
            raise UserError(f"heads of {config.d_query}, not {', '.join(map(str, sizes))}")
        for case in small_cases(config, device):
            for dtype in TOLERANCES:
                compare(case, self, dtype)

    def linear(
        self,
        x: torch.Tensor,
        *layers: nn.Linear,
        activation: str | None = None,
        noise: Noise | None = None,
    ) -> torch.Tensor:
        if len(layers) > 1 and torch.is_grad_enabled() and activation is None and noise is None:
            # One product: x is converted to bfloat16 once, and no gradients of it are added.
            weight = torch.cat([layer.weight for layer in layers])  # (O, I)
            bias = torch.cat([layer.bias for layer in layers])
            return nn.functional.linear(x, weight, bias)
        if activation is None or noise is None:
            return super().linear(x, *layers, activation=activation, noise=noise)
        x = super().linear(x, *layers)
        check(x)
        return ReluDropout.apply(x, *noise)

    def add_norm(
        self, x: torch.Tensor, y: torch.Tensor, norm: nn.LayerNorm, noise: Noise | None = None
    ) -> torch.Tensor:
        check(x, y)
        return AddNorm.apply(x, y, norm.weight, norm.bias, norm.eps, noise)

    def short_convolution(
        self, x: torch.Tensor, weight: torch.Tensor, offsets: Sequence[int]
    ) -> torch.Tensor:
        check(x)
        return ShortConvolution.apply(x, weight, offsets)

    def convolution_step(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        steps_back: torch.Tensor,
        recent: torch.Tensor,
        position: torch.Tensor,
    ) -> torch.Tensor:
        if torch.is_grad_enabled() and weight.requires_grad:
            return super().convolution_step(x, weight, steps_back, recent, position)
        check(x)
        return convolution.step(x, weight, steps_back, recent, position)

    def linear_attention(
        self, qkv: torch.Tensor, state: Sequence[torch.Tensor] | None = None
    ) -> torch.Tensor:
        check(qkv)
        outputs, *final = LinearAttention.apply(qkv, *(state or (None, None)))
        update(state, final)
        return outputs

    def linear_step(self, qkv: torch.Tensor, state: Sequence[torch.Tensor]) -> torch.Tensor:
        if torch.is_grad_enabled() and qkv.requires_grad:
            return super().linear_step(qkv, state)  # the kernel has no gradient
        check(qkv)
        return step(qkv, *state)

    def log_prob(self, parameters: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        check(parameters)
        return LogProb.apply(parameters, values)

    def gated_attention(
        self,
        projected: torch.Tensor,
        n_heads: int,
        state: Sequence[torch.Tensor] | None = None,
    ) -> torch.Tensor:
        check(projected)
        outputs, final = gated.GatedAttention.apply(projected, n_heads, *(state or (None,)))
        update(state, (final,))
        return outputs

    def gated_step(
        self, projected: torch.Tensor, n_heads: int, state: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        if torch.is_grad_enabled() and projected.requires_grad:
            return super().gated_step(projected, n_heads, state)
        check(projected)
        return gated_step.step(projected, n_heads, *state)


def check_gpu(device: torch.device) -> None:
    """Raise a `UserError` for a GPU that the kernels are not for."""
    if torch.version.hip:
        raise UserError("a GPU of AMD, and they are for NVIDIA's")
    capability = torch.cuda.get_device_capability(device)
    if capability not in CAPABILITIES:
        known = ", ".join(f"{major}.{minor}" for major, minor in CAPABILITIES)
        raise UserError(f"compute capability {capability[0]}.{capability[1]}, not one of {known}")


def check(*tensors: torch.Tensor) -> None:
    """Raise a TypeError for a tensor of a type that the kernels were not compared for."""
    for x in tensors:
        if x.dtype not in TOLERANCES:
            types = " and ".join(map(str, TOLERANCES))
            raise TypeError(f"Triton operations take {types}, not {x.dtype}")


@dataclass
class Case:
    """An operation, a function of an ops object and `tensors`, on random numbers in float32."""

    name: str
    operation: Callable
    tensors: list[torch.Tensor]
    parameters: Sequence[nn.Parameter] = ()  # float32 whatever the tensors are


def small_cases(config: ModelConfig, device: torch.device) -> Iterator[Case]:
    """Every operation that a model of this configuration needs."""
    generator, E, D = torch.Generator().manual_seed(0), config.d_query, config.d_model

    def random(*shape):
        return torch.randn(shape, generator=generator).to(device)

    @torch.no_grad()
    def two_steps(ops, *qkv):
        state = [torch.zeros(1, 2, *sizes, device=device) for sizes in ((E, E), (E,))]
        outputs = [ops.linear_step(x, state) for x in qkv]
        return torch.cat([x.float().flatten() for x in (*outputs, *state)])

    norm = nn.LayerNorm(D, device=device)
    norm.weight.data, norm.bias.data = random(D), random(D)
    keys = torch.tensor([[1, -2], [-3, 4]], dtype=torch.int32, device=device)
    noise, rows = (keys, 2**31), [random(2, 35, D), random(2, 35, D)]
    for name, drop in (("norm", None), ("norm with dropout", noise)):
        operation = partial(add_norm, norm=norm, noise=drop)
        yield Case(name, operation, rows, tuple(norm.parameters()))
    yield Case("ReLU with dropout", partial(relu_with_dropout, noise=noise), rows[:1])
    values = torch.randint(256, (2, 35), generator=generator).to(device, torch.uint8)
    parameters = random(2, 35, 3 * config.mixtures)
    yield Case("loss", lambda ops, x: ops.log_prob(x, values), [parameters])
    if config.neighbours:
        offsets = convolution_offsets(config.length, config.width, config.channels)
        weight = nn.Parameter(random(len(offsets), D))
        operation = partial(convolve, weight=weight, offsets=offsets)
        yield Case("convolution", operation, [random(1, 300, D)], (weight,))
        steps_back, R = torch.tensor(offsets, device=device), max(offsets) + 1
        recent, position = random(R, 2, D), torch.tensor([1], device=device)

        @torch.no_grad()
        def convolve_position(ops, x):
            state = recent.clone()
            y = ops.convolution_step(x, weight, steps_back, state, position)
            return torch.cat([y.float().flatten(), state.flatten()])

        yield Case("convolution at one position", convolve_position, [random(2, 1, D)])
    if config.attention_type == "causal-linear":
        qkv = [random(1, 100, 3, 2, E)]
        yield Case("attention", lambda ops, x: ops.linear_attention(x), qkv)
        yield Case("sampling step", two_steps, [random(1, 1, 3, 2, E) for _ in range(2)])
    if config.attention_type == "gated-linear":

        @torch.no_grad()
        def two_gated_steps(ops, *projected):
            state = (torch.zeros(1, 2, E, E, device=device),)
            outputs = [ops.gated_step(x, 2, state) for x in projected]
            return torch.cat([x.float().flatten() for x in (*outputs, *state)])

        def attend(ops, projected):
            return ops.gated_attention(projected, 2)

        W = 2 * (4 * E + 2)
        yield Case("gated attention", attend, [random(1, 100, W)])
        yield Case("sampling step", two_gated_steps, [random(1, 1, W) for _ in range(2)])


def add_norm(ops: PlainOps, x: torch.Tensor, y: torch.Tensor, **arguments) -> torch.Tensor:
    return ops.add_norm(x, y, **arguments)


def relu_with_dropout(ops: PlainOps, x: torch.Tensor, noise: Noise) -> torch.Tensor:
    """What follows the product of a linear layer, which would round differently."""
    return ops.linear(x, nn.Identity(), activation="relu", noise=noise)


def convolve(ops: PlainOps, x: torch.Tensor, **arguments) -> torch.Tensor:
    return ops.short_convolution(x, **arguments)


def compare(case: Case, ops: PlainOps, dtype: torch.dtype) -> None:
    """Raise a `UserError` if the values or gradients of an operation, with tensors of this type,
    differ from the plain form's in float32."""
    tensors = [x.to(dtype) for x in case.tensors]
    ours = value_and_gradients(case, ops, tensors)
    plain = value_and_gradients(case, PlainOps(), [x.float() for x in tensors])
    for x, expected in zip(ours, plain, strict=True):
        difference = (x.float() - expected).abs().max() / expected.abs().max()
        if not difference <= TOLERANCES[dtype]:  # NaN, too
            raise UserError(f"{case.name} in {dtype} differs by {difference:.1e}")


@torch.enable_grad()
def value_and_gradients(case: Case, ops: PlainOps, tensors: list) -> list[torch.Tensor]:
    """The value of an operation, and the gradients of a weighted sum of it."""
    tensors = [x.clone().requires_grad_() for x in tensors]
    value = case.operation(ops, *tensors)
    if not value.requires_grad:
        return [value]
    weights = torch.linspace(-1, 1, value.numel(), device=value.device).view(value.shape)
    total = (value.float() * weights).sum()
    return [value.detach(), *torch.autograd.grad(total, [*tensors, *case.parameters])]
