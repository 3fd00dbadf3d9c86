"""Gated linear attention of a sequence on a GPU, in Triton, with its gradients. The names are those
of layers/gated.py; a program of its own computes a chunk of positions of a head of an image.

Forward: (1) what each chunk adds to S and what it keeps of it, (2) S before each chunk, one chunk
after the other, (3) the outputs of each chunk from S before it. Backward: the same with the
gradient of S, which runs from the last chunk to the first.

The decay from position j to i is exp(c_i - c_j), with c the running sum of log a in a chunk, so
none is more than 1. Keys have unit length only after the products, since the factor is a row's or
a column's. As in gpu/attention.py, products add in float32, and all the rest is float32.
"""

import torch
import triton
import triton.language as tl

from gpu.attention import locate, product
from gpu.operators import operator
from layers import gated

LENGTH_EPSILON = tl.constexpr(gated.LENGTH_EPSILON)
OUTPUT_RMS = tl.constexpr(gated.OUTPUT_RMS)
SIZES = 16, 32, 64, 128  # E
OPTIONS = {"num_warps": 4, "num_stages": 1}
CARRY_OPTIONS = {"num_warps": 2}
TILE = 256  # numbers of S that a program carries from chunk to chunk

# Programs address a head's columns in `projected` (N, L, W), W = 4HE + 2H: queries, keys, gates,
# values, decays, betas; or in outputs (N, L, HE). Its S is in sums (N, H, K + 1, E, E), whose rows
# belong to K chunks and to the state.


@triton.jit
def row_pointers(tensor, first, width, columns, C: tl.constexpr):
    """Pointers to columns of the C rows, of a `width`, from the row `first` on."""
    return tensor + first * width + tl.arange(0, C)[:, None] * width + columns


@triton.jit
def matrix_pointers(sums, head, row, K, rows, columns, E: tl.constexpr):
    """Pointers to a part of a row's S (E, E)."""
    start = sums + (head.to(tl.int64) * (K + 1) + row) * E * E
    return start + rows[:, None] * E + columns


@triton.jit
def log_decay(d):
    """log a = -softplus(d), to full precision where a is almost 1. NaN remains NaN."""
    e = tl.exp(-tl.abs(d))
    near = 1 + e
    log1p = tl.log(near) + (e - (near - 1)) / near  # the fraction is what rounding `near` lost
    return -(tl.maximum(d, 0) + log1p)


@triton.jit
def inverse_length(squares):
    """Of a key, whose squares add up to `squares`."""
    return tl.rsqrt(squares + LENGTH_EPSILON)


@triton.jit
def output_scale(y, axis: tl.constexpr, E: tl.constexpr):
    """What outputs are multiplied by to have a root mean square of OUTPUT_RMS."""
    return tl.rsqrt(tl.sum(y * y, axis) / E + LENGTH_EPSILON) * OUTPUT_RMS


@triton.jit
def load_column(projected, first, W, column, mask, C: tl.constexpr):
    """A column of decays or betas, before their functions, at C positions (C,); beyond the last
    position -inf: these forget nothing and add nothing."""
    pointers = projected + (first + tl.arange(0, C)) * W + column
    return tl.load(pointers, tl.reshape(mask, (C,)), -float("inf")).to(tl.float32)


@triton.jit
def load_decays(projected, first, h, H, W, mask, C: tl.constexpr):
    """log a at C positions (C,)."""
    return log_decay(load_column(projected, first, W, W - 2 * H + h, mask, C))


@triton.jit
def load_betas(projected, first, h, H, W, mask, C: tl.constexpr):
    """beta at C positions (C,)."""
    return tl.sigmoid(load_column(projected, first, W, W - H + h, mask, C))


@triton.jit
def gate(z):
    """What multiplies the outputs: never 0, since the gradient divides by it. NaN remains NaN."""
    z = z.to(tl.float32)
    return 2 * tl.sigmoid(tl.where(z < -80, -80.0, z))


@triton.jit
def decays_since_start(log_a):
    """The decay from the chunk's start to each position, its own included (C,)."""
    return tl.exp(tl.cumsum(log_a, 0))


@triton.jit
def decays_until_end(log_a):
    """The decay from each position to the chunk's end, its own not included (C,)."""
    return tl.exp(tl.cumsum(log_a, 0, reverse=True) - log_a)


@triton.jit
def decayed(weights, log_a, C: tl.constexpr):
    """The weights (C, C) of positions j for i times the decay from j to i, 0 where j > i, even if
    they were NaN."""
    c, total = tl.arange(0, C), tl.cumsum(log_a, 0)
    between = tl.exp(total[:, None] - total[None, :])
    return tl.where(c[:, None] >= c, weights * between, 0.0)


@triton.jit
def gated_sum_chunks(
    projected, sums, kept, L, H, W, E: tl.constexpr, C: tl.constexpr, B: tl.constexpr
):
    """What each chunk adds to S, into row chunk + 1 of `sums`, and the factor that it keeps of S
    before it, `kept` (N, H, K)."""
    chunk, K, head, first, h, mask, e = locate(L, H, C, E)
    dtype: tl.constexpr = projected.dtype.element_ty
    log_a = load_decays(projected, first, h, H, W, mask, C)
    beta = load_betas(projected, first, h, H, W, mask, C)
    tl.store(kept + head.to(tl.int64) * K + chunk, tl.exp(tl.sum(log_a, 0)))
    k = tl.load(row_pointers(projected, first, W, (H + h) * E + e, C), mask, 0.0).to(tl.float32)
    k *= (decays_until_end(log_a) * beta * inverse_length(tl.sum(k * k, 1)))[:, None]
    for start in range(0, E, B):
        j = start + tl.arange(0, B)
        v = tl.load(row_pointers(projected, first, W, (3 * H + h) * E + j, C), mask, 0.0)
        S = product(tl.trans(k), v, dtype)
        tl.store(matrix_pointers(sums, head, chunk + 1, K, e, j, E), S)


@triton.jit
def gated_carry(sums, kept, K, E: tl.constexpr, TILE: tl.constexpr, BACKWARD: tl.constexpr):
    """Row r + 1 of `sums` plus the kept part of row r, from the first row to the last. A row
    belongs to the chunk before it, or backward to the chunk after it."""
    head = tl.program_id(0).to(tl.int64)
    row = sums + head * (K + 1) * E * E + tl.program_id(1) * TILE + tl.arange(0, TILE)
    S = tl.load(row)
    for r in range(K):
        row += E * E
        chunk = K - 1 - r if BACKWARD else r
        S = tl.load(kept + head * K + chunk) * S + tl.load(row)
        tl.store(row, S)


@triton.jit
def gated_attend(
    projected, sums, outputs, scales, L, H, W, E: tl.constexpr, C: tl.constexpr, B: tl.constexpr
):
    """The outputs (N, L, HE), and what normalised them, `scales` (N, L, H), from S before each
    chunk, row chunk of `sums`."""
    chunk, K, head, first, h, mask, e = locate(L, H, C, E)
    dtype: tl.constexpr = projected.dtype.element_ty
    weights, y = tl.zeros((C, C), tl.float32), tl.zeros((C, E), tl.float32)
    squares = tl.zeros((C,), tl.float32)
    for start in range(0, E, B):
        j = start + tl.arange(0, B)
        q = tl.load(row_pointers(projected, first, W, h * E + j, C), mask, 0.0)
        k = tl.load(row_pointers(projected, first, W, (H + h) * E + j, C), mask, 0.0)
        weights += product(q, tl.trans(k), dtype)
        y += product(q, tl.load(matrix_pointers(sums, head, chunk, K, j, e, E)), dtype)
        k = k.to(tl.float32)
        squares += tl.sum(k * k, 1)
    log_a = load_decays(projected, first, h, H, W, mask, C)
    beta = load_betas(projected, first, h, H, W, mask, C)
    weights = decayed(weights * (beta * inverse_length(squares))[None, :], log_a, C)
    v = tl.load(row_pointers(projected, first, W, (3 * H + h) * E + e, C), mask, 0.0)
    y = decays_since_start(log_a)[:, None] * y + product(weights, v, dtype)
    scale = output_scale(y, 1, E)[:, None]
    tl.store(row_pointers(scales, first, H, h + tl.arange(0, 1), C), scale, mask)
    z = tl.load(row_pointers(projected, first, W, (2 * H + h) * E + e, C), mask, 0.0)
    y = (gate(z) * scale * y).to(dtype)
    tl.store(row_pointers(outputs, first, H * E, h * E + e, C), y, mask)


@triton.jit
def gated_sum_gradients(
    projected, outputs, scales, gradient, unscaled, sums, gradients, L, H, W,
    E: tl.constexpr, C: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """The gradients of the gates; those of the outputs before they are normalised, `unscaled`
    (N, L, HE); and what these add to the gradient R of S before each chunk, into row K - chunk of
    `sums`, which are added from the last chunk to the first."""
    chunk, K, head, first, h, mask, e = locate(L, H, C, E)
    dtype: tl.constexpr = projected.dtype.element_ty
    y = tl.load(row_pointers(outputs, first, H * E, h * E + e, C), mask, 0.0).to(tl.float32)
    g = tl.load(row_pointers(gradient, first, H * E, h * E + e, C), mask, 0.0).to(tl.float32)
    scale = tl.load(row_pointers(scales, first, H, h + tl.arange(0, 1), C), mask, 0.0)
    factor = gate(tl.load(row_pointers(projected, first, W, (2 * H + h) * E + e, C), mask, 0.0))
    y, g = y / factor, g * factor  # of what is normalised
    d_z = (y * g * (1 - factor / 2)).to(dtype)
    tl.store(row_pointers(gradients, first, W, (2 * H + h) * E + e, C), d_z, mask)
    g = scale * (g - (tl.sum(y * g, 1) / (E * OUTPUT_RMS * OUTPUT_RMS))[:, None] * y)
    tl.store(row_pointers(unscaled, first, H * E, h * E + e, C), g.to(dtype), mask)
    log_a = load_decays(projected, first, h, H, W, mask, C)
    g *= decays_since_start(log_a)[:, None]
    for start in range(0, E, B):
        j = start + tl.arange(0, B)
        q = tl.load(row_pointers(projected, first, W, h * E + j, C), mask, 0.0)
        R = product(tl.trans(q), g, dtype)
        tl.store(matrix_pointers(sums, head, K - chunk, K, j, e, E), R)


@triton.jit
def gated_backpropagate(
    projected, sums, gradient, gradient_sums, gradients, L, H, W,
    E: tl.constexpr, C: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """The other gradients of `projected`, from those of the outputs before they are normalised, S
    before each chunk, and the gradient R of S after it.

    With c measured from the chunk's start, exp(c) multiplies queries and what the chunk keeps of S,
    and divides keys. So the gradient of c_i is q.dq - (beta k).d(beta k), of the last c also that
    of S after the chunk, and the gradient of log a_i is the sum of those of c from i on. Summed
    over a chunk, not over a whole image, the rounding errors stay small."""
    chunk, K, head, first, h, mask, _ = locate(L, H, C, E)
    later = K - 1 - chunk
    dtype: tl.constexpr = projected.dtype.element_ty
    weights, d_weights = tl.zeros((C, C), tl.float32), tl.zeros((C, C), tl.float32)
    squares = tl.zeros((C,), tl.float32)
    for start in range(0, E, B):
        j = start + tl.arange(0, B)
        q = tl.load(row_pointers(projected, first, W, h * E + j, C), mask, 0.0)
        k = tl.load(row_pointers(projected, first, W, (H + h) * E + j, C), mask, 0.0)
        v = tl.load(row_pointers(projected, first, W, (3 * H + h) * E + j, C), mask, 0.0)
        g = tl.load(row_pointers(gradient, first, H * E, h * E + j, C), mask, 0.0)
        weights += product(q, tl.trans(k), dtype)
        d_weights += product(g, tl.trans(v), dtype)
        k = k.to(tl.float32)
        squares += tl.sum(k * k, 1)

    d = load_column(projected, first, W, W - 2 * H + h, mask, C)
    log_a, beta = log_decay(d), load_betas(projected, first, h, H, W, mask, C)
    until_end, inverse = decays_until_end(log_a), inverse_length(squares)
    factor = beta * inverse
    pairs = decayed(weights * d_weights, log_a, C)
    weights, d_weights = decayed(weights, log_a, C), decayed(d_weights, log_a, C)
    k_d_k = tl.sum(pairs, 0)  # of keys before they are scaled, and the gradients of beta k
    d_c = tl.sum(pairs * factor[None, :], 1) - factor * k_d_k

    later_k_d_k = tl.zeros((C,), tl.float32)
    for start in range(0, E, B):
        b = start + tl.arange(0, B)
        d_v = tl.zeros((C, B), tl.float32)
        for inner in range(0, E, B):
            j = inner + tl.arange(0, B)
            k = tl.load(row_pointers(projected, first, W, (H + h) * E + j, C), mask, 0.0)
            R = tl.load(matrix_pointers(gradient_sums, head, later, K, j, b, E))
            d_v += product(k, R, dtype)
        d_v *= until_end[:, None]
        v = tl.load(row_pointers(projected, first, W, (3 * H + h) * E + b, C), mask, 0.0)
        later_k_d_k += tl.sum(d_v * v.to(tl.float32), 1)
        g = tl.load(row_pointers(gradient, first, H * E, h * E + b, C), mask, 0.0)
        d_v = factor[:, None] * (d_v + product(tl.trans(weights), g, dtype))
        pointers = row_pointers(gradients, first, W, (3 * H + h) * E + b, C)
        tl.store(pointers, d_v.to(dtype), mask)
    d_beta = inverse * (k_d_k + later_k_d_k)
    d_c -= factor * later_k_d_k

    d_last = tl.sum(factor * later_k_d_k, 0)
    kept = tl.exp(tl.sum(log_a, 0))
    for start in range(0, E, B):
        b = start + tl.arange(0, B)
        d_q, d_k = tl.zeros((C, B), tl.float32), tl.zeros((C, B), tl.float32)
        for inner in range(0, E, B):
            j = inner + tl.arange(0, B)
            v = tl.load(row_pointers(projected, first, W, (3 * H + h) * E + j, C), mask, 0.0)
            g = tl.load(row_pointers(gradient, first, H * E, h * E + j, C), mask, 0.0)
            S = tl.load(matrix_pointers(sums, head, chunk, K, b, j, E))
            R = tl.load(matrix_pointers(gradient_sums, head, later, K, b, j, E))
            d_q += product(g, tl.trans(S), dtype)
            d_k += product(v, tl.trans(R), dtype)
            d_last += kept * tl.sum(S * R)
        q = tl.load(row_pointers(projected, first, W, h * E + b, C), mask, 0.0)
        k = tl.load(row_pointers(projected, first, W, (H + h) * E + b, C), mask, 0.0)
        k = k.to(tl.float32)
        d_q *= decays_since_start(log_a)[:, None]
        d_c += tl.sum(d_q * q.to(tl.float32), 1)
        d_q += product(d_weights, factor[:, None] * k, dtype)
        pointers = row_pointers(gradients, first, W, h * E + b, C)
        tl.store(pointers, d_q.to(dtype), mask)
        d_k = until_end[:, None] * d_k + product(tl.trans(d_weights), q, dtype)
        d_k = factor[:, None] * (d_k - (d_beta * inverse)[:, None] * k)
        pointers = row_pointers(gradients, first, W, (H + h) * E + b, C)
        tl.store(pointers, d_k.to(dtype), mask)

    d_log_a = tl.cumsum(d_c, 0, reverse=True) + d_last
    pointers = gradients + (first + tl.arange(0, C)) * W + W - 2 * H + h
    mask = tl.reshape(mask, (C,))
    tl.store(pointers, (-d_log_a * tl.sigmoid(d)).to(dtype), mask)
    tl.store(pointers + H, (d_beta * beta * (1 - beta)).to(dtype), mask)


def sizes(E: int, dtype: torch.dtype) -> dict[str, int]:
    """C positions in a chunk and B columns at a time, for heads of size E: the most that no
    architecture's compiler spills from registers to memory (python -m benchmarks.gpu_compile)."""
    return {"E": E, "C": 32 if dtype == torch.float32 or E > 64 else 64, "B": 16}


def head_size(width: int, n_heads: int) -> int:
    """E of `projected`, (N, L, 4HE + 2H)."""
    return (width - 2 * n_heads) // (4 * n_heads)


def launch(kernel: triton.JITFunction, projected: torch.Tensor, n_heads: int, *arguments) -> None:
    """Run the programs of a kernel; `arguments` are between `projected` and L."""
    N, L, W = projected.shape
    constants = sizes(head_size(W, n_heads), projected.dtype)
    grid = (triton.cdiv(L, constants["C"]) * N * n_heads,)
    kernel[grid](projected, *arguments, L, n_heads, W, **constants, **OPTIONS)


def carry(sums: torch.Tensor, kept: torch.Tensor, backward: bool) -> None:
    """Add the kept part of each row (N, H, K + 1, E, E) to the next, in place."""
    N, H, rows, E, _ = sums.shape
    constants = {"E": E, "TILE": TILE, "BACKWARD": backward}
    gated_carry[(N * H, E * E // TILE)](sums, kept, rows - 1, **constants, **CARRY_OPTIONS)


@operator("sums", "kept", "outputs", "scales")
def gated_forward(
    projected: torch.Tensor,
    sums: torch.Tensor,
    kept: torch.Tensor,
    outputs: torch.Tensor,
    scales: torch.Tensor,
) -> None:
    """Fills sums, after their first row, and the others."""
    n_heads = scales.shape[2]
    launch(gated_sum_chunks, projected, n_heads, sums, kept)
    carry(sums, kept, backward=False)
    launch(gated_attend, projected, n_heads, sums, outputs, scales)


@operator("unscaled", "gradient_sums", "gradients")
def gated_backward(
    projected: torch.Tensor,
    sums: torch.Tensor,
    kept: torch.Tensor,
    outputs: torch.Tensor,
    scales: torch.Tensor,
    gradient: torch.Tensor,
    unscaled: torch.Tensor,
    gradient_sums: torch.Tensor,
    gradients: torch.Tensor,
) -> None:
    """Fills `unscaled`, the gradients of the outputs before they are normalised, gradient_sums,
    after their first row, and gradients."""
    n_heads = scales.shape[2]
    tensors = outputs, scales, gradient, unscaled, gradient_sums, gradients
    launch(gated_sum_gradients, projected, n_heads, *tensors)
    carry(gradient_sums, kept, backward=True)
    launch(gated_backpropagate, projected, n_heads, sums, unscaled, gradient_sums, gradients)


class GatedAttention(torch.autograd.Function):
    """projected (N, L, 4HE + 2H), H and a state S (N, H, E, E) or None -> outputs (N, L, HE) of
    the type of `projected`, and the state after them."""

    @staticmethod
    def forward(ctx, projected, n_heads, S):
        projected = projected.contiguous()
        N, L, W = projected.shape
        sums = new_sums(projected, n_heads, S)
        kept = sums.new_empty(N, n_heads, sums.shape[2] - 1)
        outputs = projected.new_empty(N, L, n_heads * head_size(W, n_heads))
        scales = sums.new_empty(N, L, n_heads)
        gated_forward(projected, sums, kept, outputs, scales)
        ctx.save_for_backward(projected, sums, kept, outputs, scales)
        ctx.set_materialize_grads(False)
        return outputs, sums[:, :, -1].clone()

    @staticmethod
    def backward(ctx, gradient, d_S):
        projected, sums, kept, outputs, scales = ctx.saved_tensors
        gradient = torch.zeros_like(outputs) if gradient is None else gradient.contiguous()
        n_heads, unscaled, gradients = scales.shape[2], *map(torch.empty_like, (outputs, projected))
        gradient_sums = new_sums(projected, n_heads, d_S)
        tensors = projected, sums, kept, outputs, scales, gradient
        gated_backward(*tensors, unscaled, gradient_sums, gradients)
        return gradients, None, gradient_sums[:, :, -1] if ctx.needs_input_grad[2] else None


def new_sums(projected: torch.Tensor, n_heads: int, S: torch.Tensor | None) -> torch.Tensor:
    """Sums (N, H, K + 1, E, E), whose first row is a state, None for 0."""
    N, L, W = projected.shape
    E = head_size(W, n_heads)
    K = triton.cdiv(L, sizes(E, projected.dtype)["C"])
    sums = projected.new_empty(N, n_heads, K + 1, E, E, dtype=torch.float32)
    sums[:, :, 0] = 0 if S is None else S
    return sums
