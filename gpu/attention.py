"""Causal linear attention of a sequence on a GPU, in Triton. A program of its own computes some
columns of a chunk of positions of a head of an image.

Forward: (1) the sums S and Z of each chunk, (2) their running sums over the chunks, by torch,
(3) the outputs of each chunk from the sums before it. Backward: the same with the sums R and r of
the queries' gradients, which run from the last chunk to the first.

Sums and divisions are float32. Matrix products take operands of the inputs' type and add in
float32: bfloat16 on tensor cores, or float32 as three products of TF32 parts ("tf32x3").
"""

import torch
import triton
import triton.language as tl

from gpu.operators import operator
from layers.attention import EPSILON

SIZES = range(16, 129, 16)  # E
# Of the compiler. More stages would copy a loop's next loads to shared memory in advance.
OPTIONS = {"num_warps": 4, "num_stages": 1}
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
def feature_gradient(phi):
    """phi'(x) of phi(x), which is x + 1 above 1, and exp(x) below."""
    return tl.where(phi > 1, 1.0, phi)


@triton.jit
def product(a, b, dtype: tl.constexpr):
    """a @ b in float32, of operands rounded to `dtype`."""
    a, b = a.to(dtype), b.to(dtype)
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="tf32x3")


@triton.jit
def locate(L, H, C: tl.constexpr, B: tl.constexpr):
    """This program's chunk, the number of chunks K, the image-and-head n * H + h, the first
    position n * L + l in all images, h, the mask (C, 1) of the chunk's positions, and the program's
    columns (B,)."""
    K = tl.cdiv(L, C)
    program = tl.program_id(0)
    h, chunk, n = program % H, program // H % K, program // H // K
    mask = (chunk * C + tl.arange(0, C) < L)[:, None]
    columns = tl.program_id(1) * B + tl.arange(0, B)
    return chunk, K, n * H + h, n.to(tl.int64) * L + chunk * C, h, mask, columns


@triton.jit
def row_pointers(tensor, first, h, heads, columns, E: tl.constexpr, C: tl.constexpr):
    """Pointers to columns of head h of `heads` at the C positions from `first` on."""
    rows = tl.arange(0, C)[:, None] * (heads * E)
    return tensor + (first * heads + h) * E + rows + columns


@triton.jit
def matrix_pointers(sums, head, row, K, rows, columns, E: tl.constexpr):
    """Pointers to a part of a row's S (E, E)."""
    start = sums + (head.to(tl.int64) * (K + 1) + row) * (E * E + E)
    return start + rows[:, None] * E + columns


@triton.jit
def vector_pointers(sums, head, row, K, columns, E: tl.constexpr):
    """Pointers to a part of a row's Z (E,)."""
    start = sums + (head.to(tl.int64) * (K + 1) + row) * (E * E + E)
    return start + E * E + columns


@triton.jit
def load_features(qkv, first, h, H, columns, mask, E: tl.constexpr, C: tl.constexpr):
    """phi of columns of the queries, or of the keys with H + h instead of h."""
    return features(tl.load(row_pointers(qkv, first, h, 3 * H, columns, E, C), mask, 0.0), mask)


@triton.jit
def load_gradient(
    gradient, outputs, scales, first, h, H, columns, mask, E: tl.constexpr, C: tl.constexpr
):
    """The gradients of columns of the numerators, and what they add to the denominators'."""
    one = tl.arange(0, 1)
    g = tl.load(row_pointers(gradient, first, h, H, columns, E, C), mask, 0.0).to(tl.float32)
    g *= tl.load(row_pointers(scales, first, h, H, one, 1, C), mask, 0.0)
    y = tl.load(row_pointers(outputs, first, h, H, columns, E, C), mask, 0.0).to(tl.float32)
    return g, -tl.sum(g * y, 1)


@triton.jit
def sum_chunks(qkv, sums, L, H, E: tl.constexpr, C: tl.constexpr, B: tl.constexpr):
    """S = phi(k)^T v and Z of each chunk, into row chunk + 1 of `sums`; B rows of S a program."""
    chunk, K, head, first, h, mask, b = locate(L, H, C, B)
    dtype: tl.constexpr = qkv.dtype.element_ty
    k = load_features(qkv, first, H + h, H, b, mask, E, C)
    tl.store(vector_pointers(sums, head, chunk + 1, K, b, E), tl.sum(k, 0))
    for start in range(0, E, B):
        j = start + tl.arange(0, B)
        v = tl.load(row_pointers(qkv, first, 2 * H + h, 3 * H, j, E, C), mask, 0.0)
        S = product(tl.trans(k), v, dtype)
        tl.store(matrix_pointers(sums, head, chunk + 1, K, b, j, E), S)


@triton.jit
def attend(
    qkv, sums, outputs, scales, L, H, EPSILON, E: tl.constexpr, C: tl.constexpr, B: tl.constexpr
):
    """The outputs (N, L, H, E), and 1 / (phi(q) . Z + EPSILON), `scales` (N, L, H), from the sums
    before each chunk, row chunk of `sums`."""
    chunk, K, head, first, h, mask, b = locate(L, H, C, B)
    dtype: tl.constexpr = qkv.dtype.element_ty
    weights, numerators = tl.zeros((C, C), tl.float32), tl.zeros((C, B), tl.float32)
    denominators = tl.zeros((C,), tl.float32)
    for start in range(0, E, B):
        j = start + tl.arange(0, B)
        q = load_features(qkv, first, h, H, j, mask, E, C)
        k = load_features(qkv, first, H + h, H, j, mask, E, C)
        S = tl.load(matrix_pointers(sums, head, chunk, K, j, b, E))
        Z = tl.load(vector_pointers(sums, head, chunk, K, j, E))
        weights += product(q, tl.trans(k), dtype)
        numerators += product(q, S, dtype)
        denominators += tl.sum(q * Z[None, :], 1)
    c = tl.arange(0, C)
    weights = tl.where(c[:, None] >= c, weights, 0.0)
    v = tl.load(row_pointers(qkv, first, 2 * H + h, 3 * H, b, E, C), mask, 0.0)
    numerators += product(weights, v, dtype)
    scale = (1 / (denominators + tl.sum(weights, 1) + EPSILON))[:, None]
    tl.store(row_pointers(scales, first, h, H, tl.arange(0, 1), 1, C), scale, mask)
    y = (numerators * scale).to(dtype)
    tl.store(row_pointers(outputs, first, h, H, b, E, C), y, mask)


@triton.jit
def sum_gradients(
    qkv, outputs, scales, gradient, sums, L, H,
    E: tl.constexpr, C: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """R = phi(q)^T g and r of each chunk, the gradients of S and Z, into row K - chunk of `sums`:
    they are added from the last chunk to the first."""
    chunk, K, head, first, h, mask, b = locate(L, H, C, B)
    dtype: tl.constexpr = qkv.dtype.element_ty
    q = load_features(qkv, first, h, H, b, mask, E, C)
    g_sum = tl.zeros((C,), tl.float32)
    for start in range(0, E, B):
        j = start + tl.arange(0, B)
        g, part = load_gradient(gradient, outputs, scales, first, h, H, j, mask, E, C)
        g_sum += part
        R = product(tl.trans(q), g, dtype)
        tl.store(matrix_pointers(sums, head, K - chunk, K, b, j, E), R)
    r = tl.sum(q * g_sum[:, None], 0)
    tl.store(vector_pointers(sums, head, K - chunk, K, b, E), r)


@triton.jit
def backpropagate(
    qkv, sums, outputs, scales, gradient, gradient_sums, gradients, L, H,
    E: tl.constexpr, C: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """The gradients of qkv, from those of the outputs, the sums before each chunk, and the sums of
    gradients after it."""
    chunk, K, head, first, h, mask, b = locate(L, H, C, B)
    later = K - 1 - chunk
    dtype: tl.constexpr = qkv.dtype.element_ty
    weights, d_weights = tl.zeros((C, C), tl.float32), tl.zeros((C, C), tl.float32)
    d_q, d_k = tl.zeros((C, B), tl.float32), tl.zeros((C, B), tl.float32)
    d_v, g_sum = tl.zeros((C, B), tl.float32), tl.zeros((C,), tl.float32)
    for start in range(0, E, B):
        j = start + tl.arange(0, B)
        q = load_features(qkv, first, h, H, j, mask, E, C)
        k = load_features(qkv, first, H + h, H, j, mask, E, C)
        v = tl.load(row_pointers(qkv, first, 2 * H + h, 3 * H, j, E, C), mask, 0.0)
        g, part = load_gradient(gradient, outputs, scales, first, h, H, j, mask, E, C)
        g_sum += part
        weights += product(q, tl.trans(k), dtype)
        d_weights += product(g, tl.trans(v), dtype)
        S = tl.load(matrix_pointers(sums, head, chunk, K, b, j, E))
        d_q += product(g, tl.trans(S), dtype)
        R = tl.load(matrix_pointers(gradient_sums, head, later, K, b, j, E))
        d_k += product(v, tl.trans(R), dtype)
        R = tl.load(matrix_pointers(gradient_sums, head, later, K, j, b, E))
        d_v += product(k, R, dtype)

    c = tl.arange(0, C)
    causal = c[:, None] >= c
    q = load_features(qkv, first, h, H, b, mask, E, C)
    k = load_features(qkv, first, H + h, H, b, mask, E, C)
    g, _ = load_gradient(gradient, outputs, scales, first, h, H, b, mask, E, C)
    d_v += product(tl.trans(tl.where(causal, weights, 0.0)), g, dtype)
    tl.store(row_pointers(gradients, first, 2 * H + h, 3 * H, b, E, C), d_v.to(dtype), mask)
    d_weights = tl.where(causal, d_weights + g_sum[:, None], 0.0)
    Z = tl.load(vector_pointers(sums, head, chunk, K, b, E))
    d_q += product(d_weights, k, dtype) + g_sum[:, None] * Z[None, :]
    d_q = (d_q * feature_gradient(q)).to(dtype)
    tl.store(row_pointers(gradients, first, h, 3 * H, b, E, C), d_q, mask)
    r = tl.load(vector_pointers(gradient_sums, head, later, K, b, E))
    d_k += product(tl.trans(d_weights), q, dtype) + r[None, :]
    d_k = (d_k * feature_gradient(k)).to(dtype)
    tl.store(row_pointers(gradients, first, H + h, 3 * H, b, E, C), d_k, mask)


def sizes(E: int, dtype: torch.dtype) -> dict[str, int]:
    """C positions in a chunk and B columns in a program, for heads of size E: the most that no
    architecture's compiler spills from registers to memory (python -m benchmarks.gpu_compile)."""
    if dtype == torch.float32:
        return {"E": E, "C": 32, "B": 16}
    return {"E": E, "C": 64, "B": 32 if E == 32 else 16}


def launch(kernel: triton.JITFunction, qkv: torch.Tensor, *arguments) -> None:
    """Run the programs of a kernel; `arguments` are between qkv and L."""
    N, L, _, H, E = qkv.shape
    constants = sizes(E, qkv.dtype)
    grid = triton.cdiv(L, constants["C"]) * N * H, E // constants["B"]
    numbers = (L, H, EPSILON) if kernel is attend else (L, H)
    kernel[grid](qkv, *arguments, *numbers, **constants, **OPTIONS)


@operator("sums", "outputs", "scales")
def attention_forward(
    qkv: torch.Tensor, sums: torch.Tensor, outputs: torch.Tensor, scales: torch.Tensor
) -> None:
    """Fills sums, after their first row, outputs and scales."""
    launch(sum_chunks, qkv, sums)
    sums.cumsum_(2)
    launch(attend, qkv, sums, outputs, scales)


@operator("gradient_sums", "gradients")
def attention_backward(
    qkv: torch.Tensor,
    sums: torch.Tensor,
    outputs: torch.Tensor,
    scales: torch.Tensor,
    gradient: torch.Tensor,
    gradient_sums: torch.Tensor,
    gradients: torch.Tensor,
) -> None:
    """Fills gradient_sums, after their first row, and gradients."""
    launch(sum_gradients, qkv, outputs, scales, gradient, gradient_sums)
    gradient_sums.cumsum_(2)
    launch(backpropagate, qkv, sums, outputs, scales, gradient, gradient_sums, gradients)


class LinearAttention(torch.autograd.Function):
    """qkv (N, L, 3, H, E) and a state, S (N, H, E, E) and Z (N, H, E) or None twice -> outputs
    (N, L, H, E) of the type of qkv, and the state after them."""

    @staticmethod
    def forward(ctx, qkv, S, Z):
        qkv = qkv.contiguous()
        N, L, _, H, E = qkv.shape
        outputs = qkv.new_empty(N, L, H, E)
        scales = qkv.new_empty(N, L, H, dtype=torch.float32)
        sums = new_sums(qkv, S, Z)
        attention_forward(qkv, sums, outputs, scales)
        ctx.save_for_backward(qkv, sums, outputs, scales)
        ctx.set_materialize_grads(False)
        return outputs, *state_in(sums, E)

    @staticmethod
    def backward(ctx, gradient, d_S, d_Z):
        qkv, sums, outputs, scales = ctx.saved_tensors
        gradient = torch.zeros_like(outputs) if gradient is None else gradient.contiguous()
        gradient_sums, gradients = new_sums(qkv, d_S, d_Z), torch.empty_like(qkv)
        tensors = qkv, sums, outputs, scales, gradient, gradient_sums, gradients
        attention_backward(*tensors)
        needs_S, needs_Z = ctx.needs_input_grad[1:]
        d_S, d_Z = state_in(gradient_sums, qkv.shape[-1])
        return gradients, d_S if needs_S else None, d_Z if needs_Z else None


def new_sums(qkv: torch.Tensor, S: torch.Tensor | None, Z: torch.Tensor | None) -> torch.Tensor:
    """Sums (N, H, K + 1, E * E + E), whose first row is a state, None for 0."""
    N, L, _, H, E = qkv.shape
    K = triton.cdiv(L, sizes(E, qkv.dtype)["C"])
    sums = qkv.new_empty(N, H, K + 1, E * E + E, dtype=torch.float32)
    for x, part in ((S, sums[:, :, 0, : E * E]), (Z, sums[:, :, 0, E * E :])):
        part.zero_() if x is None else part.copy_(x.flatten(2))
    return sums


def state_in(sums: torch.Tensor, E: int) -> tuple[torch.Tensor, torch.Tensor]:
    """S (N, H, E, E) and Z (N, H, E) of the last row of sums."""
    last = sums[:, :, -1]
    return last[..., : E * E].unflatten(-1, (E, E)).clone(), last[..., E * E :].clone()
