"""Causal linear attention of a sequence on a GPU, in Triton: every chunk of positions of every head
of every image is a program of its own.

Forward: (1) the sums S and Z of each chunk, (2) their running sums over the chunks, by torch,
(3) the outputs of each chunk from the sums before it. Backward: the same with the sums R and r of
the queries' gradients, which run from the last chunk to the first.

Sums and divisions are float32. Matrix products take operands of the inputs' type and add in
float32: bfloat16 on tensor cores, or float32 as three products of TF32 parts ("tf32x3").
"""

import torch
import triton
import triton.language as tl

from layers.attention import EPSILON

SIZES = 16, 32, 64, 128  # E
# Triton's interpreter multiplies bfloat16 operands as if their bits were integers.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)

# Programs address a head's row in a tensor (N, L, 3, H, E); its sums, one row of E * E + E numbers,
# in a tensor (N, H, K + 1, E * E + E), whose rows belong to K chunks and to the state.


@triton.jit
def features(x, mask):
    """phi(x) in float32, 0 where the mask is: beyond the last position. NaN remains NaN."""
    x = x.to(tl.float32)
    return tl.where(mask, tl.where(x > 0, x + 1, tl.exp(x)), 0.0)


@triton.jit
def feature_gradient(x):
    """phi'(x)."""
    x = x.to(tl.float32)
    return tl.where(x > 0, 1.0, tl.exp(x))


@triton.jit
def product(a, b, dtype: tl.constexpr):
    """a @ b in float32, of operands rounded to `dtype`."""
    a, b = a.to(dtype), b.to(dtype)
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="tf32x3")


@triton.jit
def locate(L, H, E: tl.constexpr, C: tl.constexpr):
    """This program's chunk, the number of chunks K, the image-and-head n * H + h, offsets of the
    chunk's queries in qkv and of its rows in (N, L, H, E) and (N, L, H), and the mask (C, 1) of its
    positions."""
    K = tl.cdiv(L, C)
    program = tl.program_id(0)
    h, chunk, n = program % H, program // H % K, program // H // K
    positions = chunk * C + tl.arange(0, C)
    rows = (n.to(tl.int64) * L + positions) * H + h  # in (N, L, H)
    columns = tl.arange(0, E)
    row_offsets = rows[:, None] * E + columns
    qkv_offsets = (3 * (rows - h) + h)[:, None] * E + columns
    return chunk, K, n * H + h, qkv_offsets, row_offsets, rows, (positions < L)[:, None]


@triton.jit
def sum_pointers(sums, head, row, K, E: tl.constexpr):
    """Pointers to a row's S (E, E) and Z (E,)."""
    start = sums + (head.to(tl.int64) * (K + 1) + row) * (E * E + E)
    e = tl.arange(0, E)
    return start + e[:, None] * E + e, start + E * E + e


@triton.jit
def sum_chunks(qkv, sums, L, H, E: tl.constexpr, C: tl.constexpr):
    """S = phi(k)^T v and Z of each chunk, into row chunk + 1 of `sums`."""
    chunk, K, head, offsets, _, _, mask = locate(L, H, E, C)
    dtype: tl.constexpr = qkv.dtype.element_ty
    k = features(tl.load(qkv + offsets + H * E, mask, 0.0), mask)
    v = tl.load(qkv + offsets + 2 * H * E, mask, 0.0)
    S, Z = sum_pointers(sums, head, chunk + 1, K, E)
    tl.store(S, product(tl.trans(k), v, dtype))
    tl.store(Z, tl.sum(k, 0))


@triton.jit
def attend(qkv, sums, outputs, scales, L, H, EPSILON, E: tl.constexpr, C: tl.constexpr):
    """The outputs (N, L, H, E), and 1 / (phi(q) . Z + EPSILON), `scales` (N, L, H), from the sums
    before each chunk, row chunk of `sums`."""
    chunk, K, head, offsets, row_offsets, rows, mask = locate(L, H, E, C)
    dtype: tl.constexpr = qkv.dtype.element_ty
    q = features(tl.load(qkv + offsets, mask, 0.0), mask)
    k = features(tl.load(qkv + offsets + H * E, mask, 0.0), mask)
    v = tl.load(qkv + offsets + 2 * H * E, mask, 0.0)
    S, Z = sum_pointers(sums, head, chunk, K, E)
    c = tl.arange(0, C)
    weights = tl.where(c[:, None] >= c, product(q, tl.trans(k), dtype), 0.0)
    numerators = product(weights, v, dtype) + product(q, tl.load(S), dtype)
    denominators = tl.sum(weights, 1) + tl.sum(q * tl.load(Z)[None, :], 1)
    scale = 1 / (denominators + EPSILON)
    tl.store(outputs + row_offsets, (numerators * scale[:, None]).to(dtype), mask)
    tl.store(scales + rows[:, None], scale[:, None], mask)


@triton.jit
def load_gradient(gradient, outputs, scales, row_offsets, rows, mask):
    """The gradients of a chunk's numerators (C, E) and denominators (C,)."""
    g = tl.load(gradient + row_offsets, mask, 0.0).to(tl.float32)
    g *= tl.load(scales + rows[:, None], mask, 0.0)
    return g, -tl.sum(g * tl.load(outputs + row_offsets, mask, 0.0).to(tl.float32), 1)


@triton.jit
def sum_gradients(qkv, outputs, scales, gradient, sums, L, H, E: tl.constexpr, C: tl.constexpr):
    """R = phi(q)^T g and r of each chunk, the gradients of S and Z, into row K - chunk of `sums`:
    they are added from the last chunk to the first."""
    chunk, K, head, offsets, row_offsets, rows, mask = locate(L, H, E, C)
    dtype: tl.constexpr = qkv.dtype.element_ty
    q = features(tl.load(qkv + offsets, mask, 0.0), mask)
    g, g_sum = load_gradient(gradient, outputs, scales, row_offsets, rows, mask)
    R, r = sum_pointers(sums, head, K - chunk, K, E)
    tl.store(R, product(tl.trans(q), g, dtype))
    tl.store(r, tl.sum(q * g_sum[:, None], 0))


@triton.jit
def backpropagate(
    qkv, sums, outputs, scales, gradient, gradient_sums, gradients,
    L, H, E: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """The gradients of qkv, from those of the outputs, the sums before each chunk, and the sums of
    gradients after it."""
    chunk, K, head, offsets, row_offsets, rows, mask = locate(L, H, E, C)
    dtype: tl.constexpr = qkv.dtype.element_ty
    x_q = tl.load(qkv + offsets, mask, 0.0)
    x_k = tl.load(qkv + offsets + H * E, mask, 0.0)
    v = tl.load(qkv + offsets + 2 * H * E, mask, 0.0)
    q, k = features(x_q, mask), features(x_k, mask)
    g, g_sum = load_gradient(gradient, outputs, scales, row_offsets, rows, mask)
    S, Z = sum_pointers(sums, head, chunk, K, E)
    R, r = sum_pointers(gradient_sums, head, K - 1 - chunk, K, E)
    c = tl.arange(0, C)
    causal = c[:, None] >= c

    d_weights = tl.where(causal, product(g, tl.trans(v), dtype) + g_sum[:, None], 0.0)
    d_q = product(d_weights, k, dtype) + product(g, tl.trans(tl.load(S)), dtype)
    d_q += g_sum[:, None] * tl.load(Z)[None, :]
    tl.store(gradients + offsets, (d_q * feature_gradient(x_q)).to(dtype), mask)

    R = tl.load(R)
    d_k = product(tl.trans(d_weights), q, dtype) + product(v, tl.trans(R), dtype)
    d_k += tl.load(r)[None, :]
    tl.store(gradients + offsets + H * E, (d_k * feature_gradient(x_k)).to(dtype), mask)

    weights = tl.where(causal, product(q, tl.trans(k), dtype), 0.0)
    d_v = product(tl.trans(weights), g, dtype) + product(k, R, dtype)
    tl.store(gradients + offsets + 2 * H * E, d_v.to(dtype), mask)


def chunk_length(E: int) -> int:
    """Positions in a chunk."""
    return 64 if E <= 32 else 32


def n_warps(E: int) -> int:
    return 4


class LinearAttention(torch.autograd.Function):
    """qkv (N, L, 3, H, E) and a state, S (N, H, E, E) and Z (N, H, E) or None twice -> outputs
    (N, L, H, E) of the type of qkv, and the state after them."""

    @staticmethod
    def forward(ctx, qkv, S, Z):
        qkv = qkv.contiguous()
        N, L, _, H, E = qkv.shape
        C = chunk_length(E)
        sums = new_sums(qkv, S, Z)
        outputs = qkv.new_empty(N, L, H, E)
        scales = qkv.new_empty(N, L, H, dtype=torch.float32)
        grid, options = (sums.shape[2] - 1) * N * H, {"E": E, "C": C, "num_warps": n_warps(E)}
        sum_chunks[(grid,)](qkv, sums, L, H, **options)
        sums.cumsum_(2)
        attend[(grid,)](qkv, sums, outputs, scales, L, H, EPSILON, **options)
        ctx.save_for_backward(qkv, sums, outputs, scales)
        ctx.set_materialize_grads(False)
        return outputs, *state_in(sums)

    @staticmethod
    def backward(ctx, gradient, d_S, d_Z):
        qkv, sums, outputs, scales = ctx.saved_tensors
        N, L, _, H, E = qkv.shape
        gradient = torch.zeros_like(outputs) if gradient is None else gradient.contiguous()
        gradient_sums, gradients = new_sums(qkv, d_S, d_Z), torch.empty_like(qkv)
        grid = (sums.shape[2] - 1) * N * H
        options = {"E": E, "C": chunk_length(E), "num_warps": n_warps(E)}
        sum_gradients[(grid,)](qkv, outputs, scales, gradient, gradient_sums, L, H, **options)
        gradient_sums.cumsum_(2)
        backpropagate[(grid,)](
            *(qkv, sums, outputs, scales, gradient, gradient_sums, gradients, L, H), **options
        )
        needs_S, needs_Z = ctx.needs_input_grad[1:]
        d_S, d_Z = state_in(gradient_sums)
        return gradients, d_S if needs_S else None, d_Z if needs_Z else None


def new_sums(qkv: torch.Tensor, S: torch.Tensor | None, Z: torch.Tensor | None) -> torch.Tensor:
    """Sums (N, H, K + 1, E * E + E), whose first row is a state, None for 0."""
    N, L, _, H, E = qkv.shape
    K = triton.cdiv(L, chunk_length(E))
    sums = qkv.new_empty(N, H, K + 1, E * E + E, dtype=torch.float32)
    for x, part in ((S, sums[:, :, 0, : E * E]), (Z, sums[:, :, 0, E * E :])):
        part.zero_() if x is None else part.copy_(x.flatten(2))
    return sums


def state_in(sums: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """S (N, H, E, E) and Z (N, H, E) of the last row of sums."""
    E = int(sums.shape[-1] ** 0.5)  # of E * E + E
    last = sums[:, :, -1]
    return last[..., : E * E].unflatten(-1, (E, E)).clone(), last[..., E * E :].clone()
