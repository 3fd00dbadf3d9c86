"""The recurrence of gated linear attention at one position on a GPU, in Triton: the state is read
and written once."""

import torch
import triton
import triton.language as tl

from gpu.gated import gate, head_size, inverse_length, log_decay, output_scale
from gpu.operators import operator


@triton.jit
def gated_position(projected, outputs, S, H, W, E: tl.constexpr):
    """projected (N, W) -> outputs (N, HE); updates the state in place. A program owns a head of an
    image."""
    head = tl.program_id(0).to(tl.int64)  # n * H + h
    e = tl.arange(0, E)
    row, scalars = projected + head // H * W, W - 2 * H + head % H
    row_of_head = row + head % H * E + e
    q = tl.load(row_of_head).to(tl.float32)
    k = tl.load(row_of_head + H * E).to(tl.float32)
    z = tl.load(row_of_head + 2 * H * E)
    v = tl.load(row_of_head + 3 * H * E).to(tl.float32)
    a = tl.exp(log_decay(tl.load(row + scalars).to(tl.float32)))
    k *= tl.sigmoid(tl.load(row + scalars + H).to(tl.float32)) * inverse_length(tl.sum(k * k, 0))
    pointers = S + head * E * E + e[:, None] * E + e
    s = a * tl.load(pointers) + k[:, None] * v[None, :]
    tl.store(pointers, s)
    y = tl.sum(q[:, None] * s, 0)
    y *= gate(z) * output_scale(y, 0, E)
    tl.store(outputs + head * E + e, y.to(outputs.dtype.element_ty))


def step_options(E: int) -> dict[str, int]:
    """A thread holds at most 32 numbers of S."""
    return {"num_warps": max(1, E * E // 1024)}


@operator("outputs", "S")
def gated_step(projected: torch.Tensor, outputs: torch.Tensor, S: torch.Tensor) -> None:
    """Fills outputs and updates the state."""
    N, H, E, _ = S.shape
    W = projected.shape[2]
    gated_position[(N * H,)](projected, outputs, S, H, W, E=E, **step_options(E))


def step(projected: torch.Tensor, n_heads: int, S: torch.Tensor) -> torch.Tensor:
    """projected (N, 1, 4HE + 2H) and the state S (N, H, E, E), float32, updated in place ->
    outputs (N, 1, HE) of the type of `projected`. Without gradients."""
    if not (S.is_contiguous() and S.dtype == torch.float32):
        raise TypeError("a state should be contiguous and float32")
    projected = projected.contiguous()
    N, _, W = projected.shape
    outputs = projected.new_empty(N, 1, n_heads * head_size(W, n_heads))
    gated_step(projected, outputs, S)
    return outputs
