"""Gated linear attention: linear attention whose sum S forgets.

The sum of linear attention only grows. Here a position first lets it decay by a factor a, then adds
to it, and reads it:

    S_i = a_i S_(i-1) + beta_i k_i v_i^T,    out_i = 2 sigmoid(gate_i) norm(S_i^T q_i)

The key k has unit length; a = exp(-softplus(decay)) and beta = sigmoid(beta) are numbers of each
head and position that depend on the input, as the decays of "Mamba-2" do (Dao and Gu, 2024). `norm`
divides a head's output by ten times its root mean square, where linear attention divides by a sum
of weights. A channel's gate, from the input too, makes a factor between 0 and 2.

Sizes: N images, L positions, H heads, E query/key size, M value size. Queries and keys are
(N, L, H, E), values, gates and outputs (N, L, H, M), decays and betas (N, L, H); the state is (S,)
with S (N, H, E, M).
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.functional import logsigmoid, pad

from layers.attention import at_least_float32, chunk_length, without_autocast

# Keeps keys and outputs of length 0 from dividing by 0.
LENGTH_EPSILON = 1e-6
# The root mean square of a head's output: about that of the averages that linear attention returns.
# Beside outputs of 1, which are as large as what they are added to, the model learns more slowly.
OUTPUT_RMS = 0.1
# Between these factors per position the decays of the heads begin, evenly in their logarithms:
# from a few bytes to some rows of an image.
FASTEST_DECAY, SLOWEST_DECAY = 1 / 4, 1 / 400
State = tuple[torch.Tensor]


def operands(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    decays: torch.Tensor,
    betas: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    """q, k, v, log a and beta of the equations above, in float32 or wider."""
    queries, keys, values, decays, betas = map(
        at_least_float32, (queries, keys, values, decays, betas)
    )
    keys = keys * (keys.square().sum(-1, keepdim=True) + LENGTH_EPSILON).rsqrt()
    return queries, keys, values, logsigmoid(-decays), betas.sigmoid()


def normalise(sums: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
    """The outputs (..., M) of S^T q: with root mean squares of OUTPUT_RMS, times the gates."""
    scales = OUTPUT_RMS * (sums.square().mean(-1, keepdim=True) + LENGTH_EPSILON).rsqrt()
    return 2 * at_least_float32(gates).sigmoid() * scales * sums


def gated_quadratic(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    decays: torch.Tensor,
    betas: torch.Tensor,
    gates: torch.Tensor,
    state: State | None = None,
) -> tuple[torch.Tensor, State]:
    """Gated linear attention as a masked product of all pairs: slow and obvious, the reference for
    the other forms. S_i is the sum of d_ij beta_j k_j v_j^T over j <= i, with d_ij the product of
    the decays from j + 1 to i.

    `state` holds S after the positions before the first. Returns the outputs and the state after
    the last position.
    """
    q, k, v, log_a, beta = operands(queries, keys, values, decays, betas)
    k = beta[..., None] * k
    since_start = log_a.cumsum(1).transpose(1, 2)  # (N, H, L): log d_i0
    weights = torch.einsum("nlhe,nshe->nhls", q, k) * decays_between(since_start)
    outputs = torch.einsum("nhls,nshm->nlhm", weights, v)
    until_end = (since_start[..., -1:] - since_start).exp()  # (N, H, L)
    S = torch.einsum("nhl,nlhe,nlhm->nhem", until_end, k, v)
    if state is not None:
        decay = since_start.exp()
        outputs = outputs + torch.einsum("nhl,nlhe,nhem->nlhm", decay, q, state[0])
        S = S + decay[..., -1, None, None] * state[0]
    return normalise(outputs, gates), (S,)


def decays_between(since_start: torch.Tensor) -> torch.Tensor:
    """d_ij of positions i and j <= i, else 0: (..., L, L), of log d_i0 (..., L)."""
    # The first tril keeps the exponential of what is masked from overflowing.
    return (since_start[..., :, None] - since_start[..., None, :]).tril().exp().tril()


def gated_chunked(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    decays: torch.Tensor,
    betas: torch.Tensor,
    gates: torch.Tensor,
    state: State | None = None,
    chunk: int | None = None,
) -> tuple[torch.Tensor, State]:
    """The same function in O(L): products of pairs inside a chunk, sums across chunks. Training,
    evaluation and prefill use this form. `chunk` positions go together, by default `chunk_length`.
    """
    N, L, H, E = queries.shape
    chunk = max(1, min(chunk or chunk_length(queries.device), L))

    def chunks(x):  # (N, L, H, ...) -> (N, H, chunks, C, ...)
        # Pad after the last position: a zero key changes no state, nor does a decay of 1.
        x = pad(x.movedim(1, -1), (0, -L % chunk)).movedim(-1, 1)
        return x.unflatten(1, (-1, chunk)).movedim(3, 1)

    with without_autocast(queries):
        given = operands(queries, keys, values, decays, betas)
        q, k, v, log_a, beta = map(chunks, given)
        k = beta[..., None] * k
        since_start = log_a.cumsum(-1)  # (N, H, chunks, C)
        until_end = (since_start[..., -1:] - since_start).exp()
        added = (until_end[..., None] * k).transpose(-2, -1) @ v  # (N, H, chunks, E, M)
        kept = since_start[..., -1, None, None].exp()  # of S, through a whole chunk
        (S,) = state or (k.new_zeros(N, H, E, values.shape[-1]),)
        before = []
        for i in range(added.shape[2]):
            before.append(S)
            S = kept[:, :, i] * S + added[:, :, i]
        weights = (q @ k.transpose(-2, -1)) * decays_between(since_start)
        outputs = weights @ v + (since_start.exp()[..., None] * q) @ torch.stack(before, dim=2)
        outputs = outputs.flatten(2, 3)[:, :, :L].transpose(1, 2)  # (N, L, H, M)
        return normalise(outputs, gates), (S,)


def gated_recurrent(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    decays: torch.Tensor,
    betas: torch.Tensor,
    gates: torch.Tensor,
    state: State,
) -> tuple[torch.Tensor, State]:
    """The same function for one position, L = 1: updates `state` in place."""
    (S,) = state
    with without_autocast(queries):
        given = operands(queries, keys, values, decays, betas)
        q, k, v, log_a, beta = (x[:, 0] for x in given)  # (N, H, E), (N, H, M) or (N, H)
        S.mul_(log_a.exp()[..., None, None])
        S.addcmul_((beta[..., None] * k)[..., :, None], v[..., None, :])
        return normalise((q[..., None, :] @ S).squeeze(-2), gates[:, 0])[:, None], state


def initialise_decays(projection: nn.Linear, n_heads: int) -> None:
    """Set the biases of the last 2H outputs of a linear layer, the decays and betas of the heads:
    decays of another time scale for each head, and betas of 1/2."""
    rates = torch.logspace(math.log10(FASTEST_DECAY), math.log10(SLOWEST_DECAY), n_heads)
    decays, betas = projection.bias.detach()[-2 * n_heads :].chunk(2)
    decays.copy_(rates.expm1().log())  # of which softplus is `rates`
    betas.zero_()


def split(projected: torch.Tensor, n_heads: int) -> Sequence[torch.Tensor]:
    """The arguments of the forms above, from queries, keys, gates, values, decays and betas side by
    side in `projected` (N, L, 4HE + 2H)."""
    rows, scalars = projected.split([projected.shape[-1] - 2 * n_heads, 2 * n_heads], dim=-1)
    queries, keys, gates, values = rows.unflatten(-1, (4, n_heads, -1)).unbind(2)
    return queries, keys, values, *scalars.chunk(2, dim=-1), gates


class GatedAttention(nn.Module):
    """Gated linear attention, with the same interface as `LinearAttention`.

    `ops` computes it, over a whole sequence or at one position (layers/ops.py).
    """

    def __init__(self, ops: Any, n_heads: int):
        super().__init__()
        self.ops, self.n_heads = ops, n_heads

    def empty_state(self, n_images: int, size: int, length: int, like: torch.Tensor) -> State:
        """The state (S,) before the first position; its size does not depend on `length`."""
        return (at_least_float32(like.new_zeros(n_images, self.n_heads, size, size)),)

    def forward(self, projected: torch.Tensor, state: State | None = None) -> torch.Tensor:
        """Queries, keys, gates and values of all heads, their decays and their betas, side by side,
        (N, L, 4HE + 2H) -> outputs (N, L, HE). The `state` is updated in place."""
        if state is not None and projected.shape[1] == 1:
            return self.ops.gated_step(projected, self.n_heads, state)
        return self.ops.gated_attention(projected, self.n_heads, state)
