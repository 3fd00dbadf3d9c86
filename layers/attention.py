"""Causal attention: linear ("Transformers are RNNs", Katharopoulos et al., 2020) and softmax.

Sizes: N images, L positions, H heads, E query/key size, M value size.
Queries and keys are (N, L, H, E), values and outputs (N, L, H, M).
"""

from typing import Any

import torch
from torch import nn
from torch.nn.functional import pad, relu, scaled_dot_product_attention

# Keeps the division finite when every feature of a query has underflowed.
EPSILON = 1e-6
State = tuple[torch.Tensor, torch.Tensor]  # the sums S (N, H, E, M) and Z (N, H, E)


def chunk_length(device: torch.device) -> int:
    """Positions in a chunk: enough for efficient matrix products, few enough that the quadratic
    part inside a chunk stays cheaper than the sums of size E x M. A GPU is limited by the memory
    traffic of both, which is least at about E (docs/gpu.md)."""
    return 64 if device.type == "cpu" else 32


def feature_map(x: torch.Tensor) -> torch.Tensor:
    """phi(x) = elu(x) + 1 (section 3.2.1 of the paper), in float32 or wider.

    Computed as exp(min(x, 0)) + max(x, 0): for negative x, the exponential less 1 plus 1 would
    have lost its digits, from x = -17 on all of them. The gradient at 0 is 1.
    """
    x = at_least_float32(x)
    positive = relu(x)
    return torch.exp(x - positive) + positive


def at_least_float32(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def without_autocast(x: torch.Tensor) -> torch.autocast:
    """Keeps the sums in float32: they run over a whole image, and in bfloat16 the contribution of
    a late byte would be rounded away."""
    return torch.autocast(x.device.type, enabled=False)


def linear_quadratic(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    state: State | None = None,
) -> tuple[torch.Tensor, State]:
    """Causal linear attention as a masked product of all pairs: slow and obvious, the reference
    for the other forms.

    out_i = phi(q_i)^T S_i / (phi(q_i) . Z_i) with S_i the sum of phi(k_j) v_j^T and Z_i the
    sum of phi(k_j) over j <= i (equations 9 to 12). `state` holds the sums over the positions
    before the first: S (N, H, E, M) and Z (N, H, E). Returns the outputs and the state after
    the last position.
    """
    queries, keys = feature_map(queries), feature_map(keys)
    weights = torch.einsum("nlhe,nshe->nhls", queries, keys).tril()
    numerators = torch.einsum("nhls,nshm->nlhm", weights, values)
    denominators = weights.sum(-1).transpose(1, 2)  # (N, L, H)
    S = torch.einsum("nlhe,nlhm->nhem", keys, values)
    Z = keys.sum(1)
    if state is not None:
        numerators = numerators + torch.einsum("nlhe,nhem->nlhm", queries, state[0])
        denominators = denominators + torch.einsum("nlhe,nhe->nlh", queries, state[1])
        S, Z = S + state[0], Z + state[1]
    return numerators / (denominators + EPSILON)[..., None], (S, Z)


def linear_chunked(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    state: State | None = None,
    chunk: int | None = None,
) -> tuple[torch.Tensor, State]:
    """The same function in O(L): products of pairs inside a chunk, sums across chunks.

    Takes any L and returns what `linear_quadratic` returns. Training, evaluation and prefill
    use this form. `chunk` positions go together, by default `chunk_length`.
    """
    N, L, H, E = queries.shape
    M = values.shape[-1]
    chunk = max(1, min(chunk or chunk_length(queries.device), L))

    def chunks(x):
        # Pad with zeros after the last position: a zero key adds nothing to any sum.
        x = pad(x, (0, 0, 0, 0, 0, -L % chunk))
        return x.view(N, -1, chunk, H, x.shape[-1]).permute(0, 3, 1, 2, 4)  # (N, H, chunks, C, .)

    with without_autocast(queries):
        queries, keys = chunks(feature_map(queries)), chunks(feature_map(keys))
        values = chunks(at_least_float32(values))
        S, Z = state or (keys.new_zeros(N, H, E, M), keys.new_zeros(N, H, E))
        # Entry c is the sum over all positions before chunk c; the last entry is the total.
        S = torch.cat([S[:, :, None], keys.transpose(-2, -1) @ values], dim=2).cumsum(2)
        Z = torch.cat([Z[:, :, None], keys.sum(-2)], dim=2).cumsum(2)

        weights = (queries @ keys.transpose(-2, -1)).tril()  # (N, H, chunks, C, C)
        numerators = weights @ values + queries @ S[:, :, :-1]
        denominators = weights.sum(-1, keepdim=True) + queries @ Z[:, :, :-1, :, None]
        outputs = numerators / (denominators + EPSILON)  # (N, H, chunks, C, M)
        outputs = outputs.permute(0, 2, 3, 1, 4).reshape(N, -1, H, M)[:, :L]
        return outputs, (S[:, :, -1], Z[:, :, -1])


def linear_recurrent(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, state: State
) -> tuple[torch.Tensor, State]:
    """The same function for one position, L = 1: updates `state` in place (equations 16 to 20)."""
    S, Z = state
    with without_autocast(queries):
        queries, keys = feature_map(queries[:, 0]), feature_map(keys[:, 0])  # (N, H, E)
        values = at_least_float32(values[:, 0])  # (N, H, M)
        S.addcmul_(keys[..., :, None], values[..., None, :])
        Z.add_(keys)
        numerators = (queries[..., None, :] @ S).squeeze(-2)  # (N, H, M)
        denominators = (queries * Z).sum(-1, keepdim=True) + EPSILON  # (N, H, 1)
        return (numerators / denominators)[:, None], state


class LinearAttention(nn.Module):
    """Causal linear attention, with the same interface as `SoftmaxAttention`.

    `ops` computes it, over a whole sequence or at one position (layers/ops.py).
    """

    def __init__(self, ops: Any, n_heads: int):
        super().__init__()
        self.ops, self.n_heads = ops, n_heads

    def empty_state(self, n_images: int, size: int, length: int, like: torch.Tensor) -> State:
        """The sums (S, Z) before the first position, for heads of a `size`; their own size does
        not depend on `length`."""
        S = like.new_zeros(n_images, self.n_heads, size, size)
        return at_least_float32(S), at_least_float32(S[..., 0].clone())

    def forward(self, projected: torch.Tensor, state: State | None = None) -> torch.Tensor:
        """Queries, keys and values of all heads side by side, (N, L, 3HE) -> outputs (N, L, HE).

        Attends to these positions and those already summed in `state`, updated in place.
        """
        qkv = projected.unflatten(-1, (3, self.n_heads, -1))  # (N, L, 3, H, E)
        if state is not None and qkv.shape[1] == 1:
            outputs = self.ops.linear_step(qkv, state)
        else:
            outputs = self.ops.linear_attention(qkv, state)
        return outputs.flatten(-2)  # (N, L, HE)


class KVCache:
    """The keys and values of all positions so far, in tensors allocated once."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor):
        self.keys, self.values, self.length = keys, values, 0  # (N, H, longest, E)

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Add (N, H, L, E) at the end; returns all keys and values so far."""
        start, self.length = self.length, self.length + keys.shape[2]
        self.keys[:, :, start : self.length] = keys
        self.values[:, :, start : self.length] = values
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]


class SoftmaxAttention(nn.Module):
    """Softmax attention, the paper's "full"; `scale` is 1 / sqrt(E) unless given."""

    def __init__(self, n_heads: int, scale: float | None = None, dropout: float = 0.0):
        super().__init__()
        self.n_heads, self.scale, self.dropout = n_heads, scale, dropout

    def empty_state(self, n_images: int, size: int, length: int, like: torch.Tensor) -> KVCache:
        """A cache with room for `length` positions."""
        shape = n_images, self.n_heads, length, size
        return KVCache(like.new_zeros(shape), like.new_zeros(shape))

    def forward(self, projected: torch.Tensor, state: KVCache | None = None) -> torch.Tensor:
        """As `LinearAttention.forward`; `state` is a `KVCache`, which grows."""
        qkv = projected.unflatten(-1, (3, self.n_heads, -1))  # (N, L, 3, H, E)
        queries, keys, values = (x.transpose(1, 2) for x in qkv.unbind(2))  # (N, H, L, E)
        past, L = 0, queries.shape[2]
        if state is not None:
            past = state.length
            keys, values = state.append(keys, values)
            queries, keys, values = (x.to(keys.dtype) for x in (queries, keys, values))
        # Position i attends to the whole past and to the new positions up to i. Without a past
        # that is the kernels' `is_causal`; a single position needs no mask.
        mask = None
        if past and L > 1:
            mask = torch.ones(L, past + L, dtype=torch.bool, device=queries.device).tril(past)
        outputs = scaled_dot_product_attention(
            queries,
            keys,
            values,
            mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=not past and L > 1,
            scale=self.scale,
        )
        return outputs.transpose(1, 2).flatten(-2)  # (N, L, HE)
