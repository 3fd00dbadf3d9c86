"""The operations of a layer that also have a compiled form, here in plain PyTorch.

A model holds one such object and calls it. cpu/ops.py has the same operations compiled for the
CPU, and gpu/ops.py for NVIDIA GPUs.
"""

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.functional import pad, relu

from layers import mixture
from layers.attention import linear_chunked, linear_recurrent
from layers.dropout import Noise, drop
from layers.gated import gated_chunked, gated_recurrent, split


class PlainOps:
    """Any device, any floating-point type, with gradients. N images, L positions, D channels."""

    def linear(
        self,
        x: torch.Tensor,
        *layers: nn.Linear,
        activation: str | None = None,
        noise: Noise | None = None,
    ) -> torch.Tensor:
        """x (..., I) through one nn.Linear, or through several whose outputs are concatenated,
        (..., O), with `activation` None or "relu", then dropout if there is `noise`."""
        outputs = [layer(x) for layer in layers]
        x = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
        x = relu(x, inplace=not torch.is_grad_enabled()) if activation == "relu" else x
        return x if noise is None else self.dropout(x, *noise)

    def add_norm(
        self, x: torch.Tensor, y: torch.Tensor, norm: nn.LayerNorm, noise: Noise | None = None
    ) -> torch.Tensor:
        """The nn.LayerNorm `norm` of the residual sum x + y, (N, L, D), with dropout of y if there
        is `noise`."""
        return norm(x + (y if noise is None else self.dropout(y, *noise)))

    def feed_forward_block(
        self,
        x: torch.Tensor,
        first: nn.Linear,
        second: nn.Linear,
        norm: nn.LayerNorm,
        hidden_noise: Noise | None = None,
        noise: Noise | None = None,
    ) -> torch.Tensor:
        """The nn.LayerNorm `norm` of x (N, L, D) plus the outputs of two linear layers with a relu
        between them, with dropout of the hidden units and of the outputs if there is noise."""
        hidden = self.linear(x, first, activation="relu", noise=hidden_noise)  # (N, L, 4D)
        return self.add_norm(x, self.linear(hidden, second), norm, noise)

    def short_convolution(
        self, x: torch.Tensor, weight: torch.Tensor, offsets: Sequence[int]
    ) -> torch.Tensor:
        """x[:, l] plus the sum over t of weight[t] * x[:, l - offsets[t]], for x (N, L, D), T
        `offsets` and `weight` (T, D). Before the first position all is 0."""
        L, longest = x.shape[1], max(offsets)
        padded = pad(x, (0, 0, longest, 0))  # (N, longest + L, D)
        for offset, row in zip(offsets, weight.to(x.dtype), strict=True):
            start = longest - offset
            x = x + row * padded[:, start : start + L]
        return x

    def convolution_step(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        steps_back: torch.Tensor,
        recent: torch.Tensor,
        position: torch.Tensor,
    ) -> torch.Tensor:
        """As `short_convolution` of one position (1,), x (N, 1, D), in sampling. `recent` (R, N, D)
        holds the inputs of position p in row p mod R and is updated in place; the offsets are
        `steps_back` (T,), less than R."""
        R = len(recent)
        recent.index_copy_(0, position % R, x.transpose(0, 1).to(recent.dtype))
        earlier = recent.index_select(0, (position - steps_back) % R)  # (T, N, D)
        return x + (earlier * weight[:, None]).sum(0)[:, None].to(x.dtype)

    def dropout(self, x: torch.Tensor, keys: torch.Tensor, threshold: int) -> torch.Tensor:
        """As `layers.dropout.drop`: x (N, ...), keys (N, 2)."""
        return drop(x, keys, threshold)

    def linear_attention(
        self, qkv: torch.Tensor, state: Sequence[torch.Tensor] | None = None
    ) -> torch.Tensor:
        """Causal linear attention of queries, keys and values (N, L, 3, H, E): (N, L, H, E).

        `state`, the sums S (N, H, E, E) and Z (N, H, E) over earlier positions, is updated in
        place; without one, the sums start at zero.
        """
        outputs, final = linear_chunked(*qkv.unbind(2), state)
        update(state, final)
        return outputs

    def linear_step(self, qkv: torch.Tensor, state: Sequence[torch.Tensor]) -> torch.Tensor:
        """As `linear_attention` of one position, L = 1, in sampling."""
        return linear_recurrent(*qkv.unbind(2), state)[0]

    def gated_attention(
        self,
        projected: torch.Tensor,
        n_heads: int,
        state: Sequence[torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Gated linear attention of queries, keys, gates, values, decays and betas that are side by
        side in `projected` (N, L, 4HE + 2H): (N, L, HE).

        `state`, S (N, H, E, E) after the earlier positions, is updated in place; without one, it
        starts at zero.
        """
        outputs, final = gated_chunked(*split(projected, n_heads), state)
        update(state, final)
        return outputs.flatten(-2)

    def gated_step(
        self, projected: torch.Tensor, n_heads: int, state: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        """As `gated_attention` of one position, L = 1, in sampling."""
        return gated_recurrent(*split(projected, n_heads), state)[0].flatten(-2)

    def log_prob(self, parameters: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """As `layers.mixture.log_prob`: parameters (..., 3K) and bytes (...) -> (...), in nats."""
        return mixture.log_prob(parameters, values)


def update(state, final):
    """Write the final state into the given one, if there is one."""
    for old, new in zip(state or (), final, strict=False):
        old.copy_(new)
