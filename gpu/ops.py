"""The operations of layers/ops.py in Triton, for NVIDIA GPUs. Float32 or bfloat16."""

from collections.abc import Callable, Iterator, Sequence

import torch

from gpu.attention import SIZES, LinearAttention
from gpu.step import step
from layers.ops import PlainOps, update
from models import ModelConfig
from utils import UserError

# The largest difference from the plain form in float32 that is rounding, relative to the largest
# number of a tensor.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 0.05}


class TritonOps(PlainOps):
    """As `PlainOps`, on one GPU, for a model of this configuration; gated attention stays plain.

    Raises `UserError` for a model or a GPU that the kernels are not for, or if they disagree with
    the plain form on a few random numbers. Triton's own errors are of many types.
    """

    def __init__(self, config: ModelConfig, device: torch.device):
        if config.d_query not in SIZES:
            raise UserError(f"heads of {config.d_query}, not {', '.join(map(str, SIZES))}")
        for name, operation, tensors in small_cases(config, device):
            for dtype, tolerance in TOLERANCES.items():
                compare(name, operation, self, [x.to(dtype) for x in tensors], tolerance)

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


def check(x: torch.Tensor) -> None:
    """Raise a TypeError for a tensor that the kernels were not compared for."""
    if x.dtype not in TOLERANCES:
        raise TypeError(
            f"Triton operations take {' and '.join(map(str, TOLERANCES))}, not {x.dtype}"
        )


def small_cases(
    config: ModelConfig, device: torch.device
) -> Iterator[tuple[str, Callable, list[torch.Tensor]]]:
    """Names, functions of an ops object and tensors, and random tensors in float32."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator).to(device)

    def attention(ops, qkv):
        return ops.linear_attention(qkv)

    @torch.no_grad()
    def step(ops, *qkv):
        state = [torch.zeros(1, 2, *sizes, device=device) for sizes in ((E, E), (E,))]
        outputs = [ops.linear_step(x, state) for x in qkv]
        return torch.cat([x.float().flatten() for x in (*outputs, *state)])

    E = config.d_query
    yield "attention", attention, [random(1, 100, 3, 2, E)]
    yield "attention at one position", step, [random(1, 1, 3, 2, E) for _ in range(2)]


def compare(
    name: str, operation: Callable, ops: PlainOps, tensors: list[torch.Tensor], tolerance: float
) -> None:
    """Raise a `UserError` if the values or gradients of an operation differ from the plain form's
    in float32."""
    ours = value_and_gradients(operation, ops, tensors)
    plain = value_and_gradients(operation, PlainOps(), [x.float() for x in tensors])
    for x, expected in zip(ours, plain, strict=True):
        difference = (x.float() - expected).abs().max() / expected.abs().max()
        if not difference <= tolerance:  # NaN, too
            raise UserError(f"{name} in {tensors[0].dtype} differs by {difference:.1e}")


@torch.enable_grad()
def value_and_gradients(operation, ops, tensors):
    """The value of an operation, and its sum's gradients with weights that are the same for all."""
    tensors = [x.clone().requires_grad_() for x in tensors]
    value = operation(ops, *tensors)
    weights = torch.linspace(-1, 1, value.numel(), device=value.device).view(value.shape)
    if not value.requires_grad:
        return [value]
    return [value.detach(), *torch.autograd.grad((value.float() * weights).sum(), tensors)]
