"""Two successors of linear attention, whose sum S forgets: gated linear attention and the gated
delta rule.

The sum of linear attention only grows. In gated linear attention (the scalar decay of "Mamba-2",
Dao and Gu, 2024) it decays by a factor a at every position:

    S' = a S,    S = S' + beta k v^T,    out = norm(S^T q)

The gated delta rule (Yang et al., 2024) then also replaces what S' returns for the key, by a part
beta of the difference to the value:

    S = S' + beta k (v - S'^T k)^T

The key k has unit length; a = exp(-softplus(decay)) and beta = sigmoid(beta) are numbers of each
head and position. `norm` divides a head's output by ten times its root mean square, where linear
attention divides by a sum of weights.

Sizes: N images, L positions, H heads, E query/key size, M value size. Queries and keys are
(N, L, H, E), values and outputs (N, L, H, M), decays and betas (N, L, H); the state is (S,) with S
(N, H, E, M).
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.functional import logsigmoid, pad

from layers.attention import at_least_float32, without_autocast

# Keeps the lengths of keys and outputs that are 0 from dividing by 0.
LENGTH_EPSILON = 1e-6
CHUNK = 64  # positions that go together in `gated_chunked`
# The root mean square of a head's output: about that of the averages that linear attention returns.
# Beside outputs of 1, which are as large as what they are added to, the model learns more slowly.
OUTPUT_SIZE = 0.1
# Between these factors per position the decays of the heads begin, evenly in their logarithms:
# from a few bytes to some rows of an image.
FASTEST_DECAY, SLOWEST_DECAY = 1 / 4, 1 / 400
State = tuple[torch.Tensor]


def activate(
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


def normalise(outputs: torch.Tensor) -> torch.Tensor:
    """Outputs (..., M) of heads with root mean squares of OUTPUT_SIZE."""
    return (
        OUTPUT_SIZE * outputs * (outputs.square().mean(-1, keepdim=True) + LENGTH_EPSILON).rsqrt()
    )


def gated_loop(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    decays: torch.Tensor,
    betas: torch.Tensor,
    state: State | None = None,
    *,
    delta: bool,
) -> tuple[torch.Tensor, State]:
    """The equations position by position: slow and obvious, the reference for the other forms.

    `state` is that after the positions before the first. Returns the outputs and the state after
    the last position.
    """
    N, L, H, E = queries.shape
    q, k, v, log_a, beta = activate(queries, keys, values, decays, betas)
    (S,) = state or (k.new_zeros(N, H, E, values.shape[-1]),)
    outputs = []
    for i in range(L):
        S = log_a[:, i, :, None, None].exp() * S
        value = v[:, i] - torch.einsum("nhem,nhe->nhm", S, k[:, i]) if delta else v[:, i]
        S = S + torch.einsum("nh,nhe,nhm->nhem", beta[:, i], k[:, i], value)
        outputs.append(torch.einsum("nhem,nhe->nhm", S, q[:, i]))
    return normalise(torch.stack(outputs, dim=1)), (S,)


def gated_chunked(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    decays: torch.Tensor,
    betas: torch.Tensor,
    state: State | None = None,
    *,
    delta: bool,
    chunk: int = CHUNK,
) -> tuple[torch.Tensor, State]:
    """The same function in products of matrices, `chunk` positions at a time. Training,
    evaluation and prefill use this form.

    Rows u_i are added to S: S_i = S'_i + k_i u_i^T. Without the delta rule, u_i = beta_i v_i. With
    it, u_i = beta_i (v_i - S'_i^T k_i) depends on the earlier rows of the chunk, and on S_0, the
    state before it; with d_ij the product of the decays from j + 1 to i,

        u_i + beta_i sum_(j<i) d_ij (k_i . k_j) u_j = beta_i (v_i - d_i0 S_0^T k_i).

    This triangular system of equations is solved for the values and the keys before S_0 is known.
    """
    N, L, H, E = queries.shape
    chunk = max(1, min(chunk, L))

    def chunks(x):  # (N, L, H, ...) -> (N, H, chunks, C, ...)
        # Pad after the last position: a zero key changes no state, nor does a decay of 1.
        x = pad(x.movedim(1, -1), (0, -L % chunk)).movedim(-1, 1)
        return x.unflatten(1, (-1, chunk)).movedim(3, 1)

    with without_autocast(queries):
        activated = activate(queries, keys, values, decays, betas)
        q, k, v, log_a, beta = map(chunks, activated)
        since_start = log_a.cumsum(-1)  # (N, H, chunks, C), as are log_a and beta
        pairs = (since_start[..., :, None] - since_start[..., None, :]).tril().exp().tril()
        right = beta[..., None] * torch.cat([v, since_start.exp()[..., None] * k], dim=-1)
        if delta:
            system = (beta[..., None] * (k @ k.transpose(-2, -1)) * pairs).tril(-1)
            right = torch.linalg.solve_triangular(
                system + torch.eye(chunk, dtype=k.dtype, device=k.device),
                right,  # (N, H, chunks, C, M + E)
                upper=False,
                unitriangular=True,
            )
        from_values, from_keys = right.split([values.shape[-1], E], dim=-1)
        weights = (q @ k.transpose(-2, -1)) * pairs
        q = q * since_start.exp()[..., None]
        k = k * (since_start[..., -1:] - since_start).exp()[..., None]
        kept = since_start[..., -1].exp()[..., None, None]  # of S, through the whole chunk
        (S,) = state or (k.new_zeros(N, H, E, values.shape[-1]),)
        outputs = []
        for i in range(q.shape[2]):
            updates = from_values[:, :, i]  # (N, H, C, M)
            if delta:
                updates = updates - from_keys[:, :, i] @ S
            outputs.append(q[:, :, i] @ S + weights[:, :, i] @ updates)
            S = kept[:, :, i] * S + k[:, :, i].transpose(-2, -1) @ updates
        outputs = torch.cat(outputs, dim=2)[:, :, :L].transpose(1, 2)  # (N, L, H, M)
        return normalise(outputs), (S,)


def gated_recurrent(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    decays: torch.Tensor,
    betas: torch.Tensor,
    state: State,
    *,
    delta: bool,
) -> tuple[torch.Tensor, State]:
    """The same function for one position, L = 1: updates `state` in place."""
    (S,) = state
    with without_autocast(queries):
        activated = activate(queries, keys, values, decays, betas)
        q, k, v, log_a, beta = (x[:, 0] for x in activated)  # (N, H, E), (N, H, M) or (N, H)
        S.mul_(log_a.exp()[..., None, None])
        if delta:
            v = v - (k[..., None, :] @ S).squeeze(-2)  # (N, H, M)
        S.addcmul_((beta[..., None] * k)[..., :, None], v[..., None, :])
        return normalise((q[..., None, :] @ S).squeeze(-2))[:, None], state


def initialise_gates(projection: nn.Linear, n_heads: int) -> None:
    """Set the biases of the last 2H outputs of a linear layer, the decays and betas of the heads:
    decays of another time scale for each head, and betas of 1/2."""
    rates = torch.logspace(math.log10(FASTEST_DECAY), math.log10(SLOWEST_DECAY), n_heads)
    decays, betas = projection.bias.detach()[-2 * n_heads :].chunk(2)
    decays.copy_(rates.expm1().log())  # of which softplus is `rates`
    betas.zero_()


def split(projected: torch.Tensor, n_heads: int) -> Sequence[torch.Tensor]:
    """Queries, keys, values (N, L, H, E), decays and betas (N, L, H) that are side by side in
    `projected` (N, L, 3HE + 2H)."""
    qkv, gates = projected.split([projected.shape[-1] - 2 * n_heads, 2 * n_heads], dim=-1)
    return *qkv.unflatten(-1, (3, n_heads, -1)).unbind(2), *gates.chunk(2, dim=-1)


class GatedAttention(nn.Module):
    """Gated linear attention or, with `delta`, the gated delta rule, with the same interface as
    `LinearAttention`.

    `ops` computes it over a whole sequence (layers/ops.py).
    """

    def __init__(self, ops: Any, n_heads: int, delta: bool):
        super().__init__()
        self.ops, self.n_heads, self.delta = ops, n_heads, delta

    def empty_state(self, n_images: int, size: int, length: int, like: torch.Tensor) -> State:
        """The state (S,) before the first position; its size does not depend on `length`."""
        return (at_least_float32(like.new_zeros(n_images, self.n_heads, size, size)),)

    def forward(self, projected: torch.Tensor, state: State | None = None) -> torch.Tensor:
        """Queries, keys and values of all heads, their decays and their betas, side by side,
        (N, L, 3HE + 2H) -> outputs (N, L, HE). The `state` is updated in place."""
        if state is not None and projected.shape[1] == 1:
            parts = split(projected, self.n_heads)
            return gated_recurrent(*parts, state, delta=self.delta)[0].flatten(-2)
        return self.ops.gated_attention(projected, self.n_heads, state, delta=self.delta)
