"""The short convolution with which every layer of a model with neighbours begins.

Attention sums over all earlier positions and separates single ones only with difficulty. A causal
depthwise convolution gives each position the inputs of the layer at the positions just before it
and around the byte above it; Fu et al., "Hungry Hungry Hippos" (2022), put one before linear
attention in the same way.
"""

import torch
from torch import nn


class ShortConvolution(nn.Module):
    """Adds to the inputs (N, P, D) of a layer those at earlier positions, weighted per channel.

    The offsets are positions of the sequence: at the ends of a row they reach into the next one.
    """

    def __init__(self, size, offsets, ops):
        super().__init__()
        self.ops, self.offsets = ops, tuple(offsets)
        self.register_buffer("steps_back", torch.tensor(offsets), persistent=False)  # (T,)
        self.weight = nn.Parameter(0.1 * torch.randn(len(offsets), size))  # (T, D)

    def empty_state(self, n_images):
        """The last inputs (N, R, D), zero before the first position; that of position p is in
        row p mod R, and R is one more than the largest offset."""
        return self.weight.new_zeros(n_images, max(self.offsets) + 1, self.weight.shape[1])

    def forward(self, x, positions, recent=None):
        """(N, P, D) at consecutive `positions` (P,) -> (N, P, D); `recent`, the last inputs before
        them, is updated in place."""
        if recent is None:
            return self.ops.short_convolution(x, self.weight, self.offsets)
        R, P = recent.shape[1], x.shape[1]
        if P == 1:
            recent.index_copy_(1, positions % R, x.to(recent.dtype))
            earlier = recent.index_select(1, (positions - self.steps_back) % R)  # (N, T, D)
            return x + (earlier * self.weight).sum(1, keepdim=True).to(x.dtype)
        before = (positions[:1] + torch.arange(-R, 0, device=x.device)) % R
        both = torch.cat([recent.index_select(1, before).to(x.dtype), x], dim=1)  # (N, R + P, D)
        last = (positions[-1:] + torch.arange(1 - R, 1, device=x.device)) % R
        recent.index_copy_(1, last, both[:, -R:].to(recent.dtype))
        return self.ops.short_convolution(both, self.weight, self.offsets)[:, R:]


def convolution_offsets(length, width, channels):
    """How many positions before its own a position reads: those of the bytes just before it, and of
    the same channel in the three pixels above the predicted one, which is one position on."""
    row = width * channels
    offsets = {1, 2, channels}
    offsets |= {row - 1 + channels * side for side in (-1, 0, 1)}
    return sorted(offset for offset in offsets if 0 < offset < max(2, length - 1))
