"""The Triton kernels' memory traffic on paper, and their times and errors on a GPU.

python -m benchmarks.gpu_kernels

prints the first of these, bytes for each position and layer of the paper's models in training (of
the loss, for each position) and for each image and layer in sampling. `make gpu` measures the
others.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import triton
from torch import nn

from benchmarks import measure
from gpu import attention, convolution, gated, norm
from gpu.ops import TritonOps, relu_with_dropout
from layers.ops import PlainOps

FLOAT32 = 4  # bytes
KEYS = 8  # bytes of an image's keys of dropout
OFFSETS = 1, 2, 3, 92, 95, 98  # of the short convolution in 32x32 colour images
MIXTURES, THRESHOLD = 10, round(0.1 * 2**32)  # of the paper's models; of dropout


def attention_traffic(N: int, L: int, H: int, E: int, dtype: torch.dtype) -> dict[str, int]:
    """Bytes that each kernel loads and stores, if it loads nothing twice, in training."""
    tensor = N * L * H * E * dtype.itemsize  # queries, keys, values, outputs or a gradient
    scales = N * L * H * FLOAT32
    row = N * H * (E * E + E) * FLOAT32
    sums = triton.cdiv(L, attention.sizes(E, dtype)["C"]) * row
    return {
        "sum_chunks": 2 * tensor + sums,
        "cumulative sums": 2 * (sums + row),
        "attend": 4 * tensor + scales + sums,
        "sum_gradients": 3 * tensor + scales + sums,
        "cumulative sums of gradients": 2 * (sums + row),
        "backpropagate": 8 * tensor + scales + 2 * sums,
    }


def step_traffic(N: int, H: int, E: int, dtype: torch.dtype) -> dict[str, int]:
    """The same for a sampling step."""
    return {"read_position": N * H * (4 * E * dtype.itemsize + 2 * (E * E + E) * FLOAT32)}


def gated_traffic(N: int, L: int, H: int, E: int, dtype: torch.dtype) -> dict[str, int]:
    """The same for gated attention, in training."""
    tensor, gate = N * L * H * E * dtype.itemsize, N * L * H * dtype.itemsize
    scales, row = N * L * H * FLOAT32, N * H * E * E * FLOAT32
    K = triton.cdiv(L, gated.sizes(E, dtype)["C"])
    sums, kept = K * row, K * N * H * FLOAT32
    return {
        "gated_sum_chunks": 2 * tensor + 2 * gate + sums + kept,
        "gated_carry": 2 * sums + row + kept,
        "gated_attend": 5 * tensor + 2 * gate + scales + sums,
        "gated_sum_gradients": 6 * tensor + gate + scales + sums,
        "gated_carry, of gradients": 2 * sums + row + kept,
        "gated_backpropagate": 7 * tensor + 4 * gate + 2 * sums,
    }


def gated_step_traffic(N: int, H: int, E: int, dtype: torch.dtype) -> dict[str, int]:
    """The same for a sampling step."""
    return {"gated_position": N * H * ((5 * E + 2) * dtype.itemsize + 2 * E * E * FLOAT32)}


def norm_traffic(
    N: int, L: int, D: int, x_type: torch.dtype, y_type: torch.dtype
) -> dict[str, int]:
    """The same for the norm of a residual sum of x and y, with dropout of y, in training."""
    rows, keys = N * L, N * KEYS
    x, y, statistics = rows * D * x_type.itemsize, rows * D * y_type.itemsize, 2 * rows * FLOAT32
    parameters = 2 * D * FLOAT32
    gradients = triton.cdiv(rows, norm.ROWS_OF_A_PROGRAM) * parameters
    return {
        "add_norm": 3 * x + y + statistics + parameters + keys,
        "add_norm_backward": 3 * x + y + statistics + parameters // 2 + gradients + keys,
    }


def relu_traffic(N: int, L: int, D: int, dtype: torch.dtype) -> dict[str, int]:
    """The same for ReLU with dropout."""
    tensor = N * L * D * dtype.itemsize
    return {"relu_drop": 2 * tensor + N * KEYS, "relu_drop_backward": 3 * tensor}


def loss_traffic(rows: int, K: int, dtype: torch.dtype) -> dict[str, int]:
    """The same for the loss."""
    parameters, others = 3 * K * rows * dtype.itemsize, rows * (1 + FLOAT32)
    return {"mixture_log_prob": parameters + others, "mixture_backward": 2 * parameters + others}


def convolution_traffic(N: int, L: int, D: int, T: int, dtype: torch.dtype) -> dict[str, int]:
    """The same for a short convolution to T offsets, and its gradients."""
    tensor, weight = N * L * D * dtype.itemsize, T * D * FLOAT32
    programs = N * triton.cdiv(L, convolution.POSITIONS_OF_A_PROGRAM)
    return {
        "convolve": 2 * tensor + weight,
        "convolve, of the gradient": 2 * tensor + weight,
        "weight_gradient": 2 * tensor + programs * weight,
    }


@dataclass
class Operation:
    """An operation, a function of an ops object and tensors, its traffic, and the least possible:
    that of a single kernel for each direction that loads its inputs and stores its results once."""

    function: Callable
    tensors: list[torch.Tensor]
    traffic: dict[str, int]
    least: int
    parameters: list[nn.Parameter]


def list_operations(
    N: int, L: int, H: int, E: int, dtype: torch.dtype, device: torch.device, n_steps: int
) -> Iterator[tuple[str, Operation]]:
    """Names and operations of a training step with N images, whose residual sums are float32, and
    of a sampling step with `n_steps` images."""
    D, b = H * E, dtype.itemsize

    def random(*shape, dtype=dtype):
        return torch.randn(shape, device=device).to(dtype)

    def step(ops, qkv, *state):
        with torch.no_grad():
            return ops.linear_step(qkv, state)

    state = [torch.ones(n_steps, H, *sizes, device=device) for sizes in ((E, E), (E,))]
    layer_norm = nn.LayerNorm(D, device=device)
    layer_norm.weight.data = random(D, dtype=torch.float32)
    weight = nn.Parameter(random(len(OFFSETS), D, dtype=torch.float32))

    def attend(ops, qkv):
        return ops.linear_attention(qkv)

    keys = torch.zeros(N, 2, dtype=torch.int32, device=device)

    def add_norm(ops, x, y):
        return ops.add_norm(x, y, layer_norm, (keys[: len(x)], THRESHOLD))

    def relu(ops, x):
        return relu_with_dropout(ops, x, (keys[: len(x)], THRESHOLD))

    values = torch.full((N, L), 127, dtype=torch.uint8, device=device)

    def log_prob(ops, parameters):
        return ops.log_prob(parameters, values[: len(parameters)])

    def convolve(ops, x):
        return ops.short_convolution(x, weight, OFFSETS)

    elements, f = N * L * D, torch.float32
    qkv, x = random(N, L, 3, H, E), random(N, L, D, dtype=f)
    traffic = attention_traffic(N, L, H, E, dtype)
    yield "attention", Operation(attend, [qkv], traffic, 11 * elements * b, [])
    traffic, parameters = norm_traffic(N, L, D, f, dtype), list(layer_norm.parameters())
    least = elements * (5 * FLOAT32 + 2 * b)
    yield "norm", Operation(add_norm, [x, random(N, L, D)], traffic, least, parameters)
    traffic = relu_traffic(N, L, 4 * D, dtype)
    least = sum(traffic.values())
    yield "ReLU", Operation(relu, [random(N, L, 4 * D)], traffic, least, [])
    traffic = loss_traffic(N * L, MIXTURES, dtype)
    least = sum(traffic.values())
    yield "loss", Operation(log_prob, [random(N, L, 3 * MIXTURES)], traffic, least, [])
    traffic = convolution_traffic(N, L, D, len(OFFSETS), f)
    yield "convolution", Operation(convolve, [x], traffic, 5 * elements * FLOAT32, [weight])
    traffic = step_traffic(n_steps, H, E, dtype)
    least = sum(traffic.values())
    tensors = [random(n_steps, 1, 3, H, E), *state]
    yield "sampling step", Operation(step, tensors, traffic, least, [])

    def attend_gated(ops, projected):
        return ops.gated_attention(projected, H)

    def gated_step(ops, projected, S):
        with torch.no_grad():
            return ops.gated_step(projected, H, (S,))

    W, traffic = 4 * D + 2 * H, gated_traffic(N, L, H, E, dtype)
    least = (14 * elements + 6 * N * L * H) * b
    yield "gated attention", Operation(attend_gated, [random(N, L, W)], traffic, least, [])
    traffic = gated_step_traffic(n_steps, H, E, dtype)
    least, tensors = sum(traffic.values()), [random(n_steps, 1, W), state[0]]
    yield "gated sampling step", Operation(gated_step, tensors, traffic, least, [])


def measure_kernels(
    config: dict, batch: int, n_steps: int, device: torch.device, copy_rate: float, rounds: int
) -> Iterator[dict]:
    """Each operation's error against float64, and its time and bandwidth against the plain form's:
    values and gradients, in both types."""
    for name, dtype in measure.DTYPES.items():
        sizes = batch, config["length"] - 1, config["n_heads"], 32
        for what, operation in list_operations(*sizes, dtype, device, n_steps):
            yield {"text": describe(f"{what}, {name}", operation, device, copy_rate, rounds)}


def describe(
    name: str, operation: Operation, device: torch.device, copy_rate: float, rounds: int
) -> str:
    ours, plain = TritonOps.__new__(TritonOps), PlainOps()
    errors = ", ".join(f"{error:.1e}" for error in relative_errors(operation, ours))
    candidates = {"triton": partial(run, operation, ours), "plain": partial(run, operation, plain)}
    seconds = measure.interleaved(candidates, rounds, device)
    traffic = sum(operation.traffic.values())
    rate = traffic / seconds["triton"]
    return (
        f"{name}: {1e3 * seconds['triton']:.3f} ms (plain {1e3 * seconds['plain']:.3f}), "
        f"{traffic / 1e6:.0f} MB at {rate / 1e9:.0f} GB/s, {rate / copy_rate:.0%} of a copy's; "
        f"errors {errors}"
    )


def run(operation: Operation, ops: PlainOps, tensors: list | None = None) -> list[torch.Tensor]:
    """The value and, if it has any, the gradients of an operation."""
    tensors = operation.tensors if tensors is None else tensors
    tensors = [x.detach().requires_grad_() for x in tensors]
    value = operation.function(ops, *tensors)
    if not value.requires_grad:
        return [value]
    gradient = torch.ones_like(value)
    return [value, *torch.autograd.grad(value, tensors + operation.parameters, gradient)]


def relative_errors(operation: Operation, ops: PlainOps) -> list[float]:
    """Of the value and the gradients, of the first image, against the plain form in float64."""
    found = run(operation, ops, [x[:1].clone() for x in operation.tensors])
    for parameter in operation.parameters:
        parameter.data = parameter.data.double()
    expected = run(operation, PlainOps(), [x[:1].double() for x in operation.tensors])
    for parameter in operation.parameters:
        parameter.data = parameter.data.float()
    return [
        ((x.double() - y.double()).abs().max() / y.abs().max()).item()
        for x, y in zip(found, expected, strict=True)
    ]


def main() -> int:
    """The table of docs/gpu.md."""
    print("| kernel | fp32 | bf16 |\n|---|---|---|")
    sizes = 1, 3071, 8, 32
    tables = [
        dict(list_operations(*sizes, dtype, torch.device("meta"), 1))
        for dtype in measure.DTYPES.values()
    ]
    for name, operation in tables[0].items():
        positions = 1 if name.endswith("sampling step") else sizes[1]
        both = [table[name] for table in tables]
        for kernel in operation.traffic:
            numbers = [f"{x.traffic[kernel] / positions:,.0f}" for x in both]
            print(f"| {name}: {kernel} | {' | '.join(numbers)} |")
        sums = [f"{sum(x.traffic.values()) / positions:,.0f}" for x in both]
        least = [f"{x.least / positions:,.0f}" for x in both]
        pairs = [f"{a} (least {b})" for a, b in zip(sums, least, strict=True)]
        print(f"| **{name}** | {' | '.join(pairs)} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
