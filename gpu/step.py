"""The recurrence of causal linear attention at one position on a GPU, in Triton: the state is read
and written once."""

import torch
import triton
import triton.language as tl

from gpu.attention import features
from gpu.operators import operator
from layers.attention import EPSILON

# Programs own a head of an image, B columns of its S at a time.
OPTIONS = {"num_warps": 1}


def sizes(E: int) -> dict[str, int]:
    """Rows of S are loaded in a number that is a power of 2."""
    return {"E": E, "ROWS": triton.next_power_of_2(E), "B": 16 if E % 32 else 32}


@triton.jit
def read_position(
    qkv, outputs, S, Z, H, EPSILON, E: tl.constexpr, ROWS: tl.constexpr, B: tl.constexpr
):
    """Equations 16 to 20: qkv (N, 3, H, E) -> outputs (N, H, E); updates the state in place."""
    head = tl.program_id(0).to(tl.int64)  # n * H + h
    e = tl.arange(0, ROWS)
    mask = e < E
    row = qkv + (head + head // H * 2 * H) * E
    q = features(tl.load(row + e, mask, 0.0), mask)
    k = features(tl.load(row + H * E + e, mask, 0.0), mask)
    z = tl.load(Z + head * E + e, mask, 0.0) + k
    tl.store(Z + head * E + e, z, mask)
    scale = 1 / (tl.sum(q * z, 0) + EPSILON)
    for start in range(0, E, B):
        m = start + tl.arange(0, B)
        v = tl.load(row + 2 * H * E + m).to(tl.float32)
        pointers = S + head * E * E + e[:, None] * E + m
        s = tl.load(pointers, mask[:, None], 0.0) + k[:, None] * v[None, :]
        tl.store(pointers, s, mask[:, None])
        y = tl.sum(q[:, None] * s, 0) * scale
        tl.store(outputs + head * E + m, y.to(outputs.dtype.element_ty))


@operator("outputs", "S", "Z")
def attention_step(
    qkv: torch.Tensor, outputs: torch.Tensor, S: torch.Tensor, Z: torch.Tensor
) -> None:
    """Fills outputs and updates the state."""
    N, H, E = Z.shape
    read_position[(N * H,)](qkv, outputs, S, Z, H, EPSILON, **sizes(E), **OPTIONS)


def step(qkv: torch.Tensor, S: torch.Tensor, Z: torch.Tensor) -> torch.Tensor:
    """qkv (N, 1, 3, H, E) and the state S (N, H, E, E), Z (N, H, E), float32, updated in place ->
    outputs (N, 1, H, E) of the type of qkv. Without gradients."""
    if not (S.is_contiguous() and Z.is_contiguous() and S.dtype == Z.dtype == torch.float32):
        raise TypeError("a state should be contiguous and float32")
    qkv = qkv.contiguous()
    outputs = torch.empty_like(qkv[:, :, 0], memory_format=torch.contiguous_format)
    attention_step(qkv, outputs, S, Z)
    return outputs
