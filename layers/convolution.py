"""The short convolution with which every layer of a model with neighbours begins.

Attention sums over all earlier positions and separates single ones only with difficulty. A causal
depthwise convolution gives each position the inputs of the layer at the positions just before it
and around the byte above it; Fu et al., "Hungry Hungry Hippos" (2022), put one before linear
attention in the same way.
"""

from collections.abc import Sequence

import torch
from torch import nn

from layers.ops import PlainOps


class ShortConvolution(nn.Module):
    """Adds to the inputs (N, P, D) of a layer those at earlier positions, weighted per channel.

    The offsets count positions of the sequence, so at either end of a row some of them reach into
    a row beside it.
    """

    def __init__(self, size: int, offsets: Sequence[int], ops: PlainOps):
        super().__init__()
        self.ops, self.offsets = ops, tuple(offsets)
        self.register_buffer("steps_back", torch.tensor(offsets), persistent=False)  # (T,)
        self.weight = nn.Parameter(0.1 * torch.randn(len(offsets), size))  # (T, D)

    def empty_state(self, n_images: int, like: torch.Tensor) -> torch.Tensor:
        """The last inputs (R, N, D), zero before the first position; those of position p are in
        row p mod R, and R is one more than the largest offset. `like` has their type and device."""
        return like.new_zeros(max(self.offsets) + 1, n_images, self.weight.shape[1])

    def forward(
        self, x: torch.Tensor, positions: torch.Tensor, recent: torch.Tensor | None = None
    ) -> torch.Tensor:
        """(N, P, D) at consecutive `positions` (P,) -> (N, P, D); `recent`, the last inputs before
        them (R, N, D), is updated in place."""
        if recent is None:
            return self.ops.short_convolution(x, self.weight, self.offsets)
        R, P = len(recent), x.shape[1]
        inputs = x.transpose(0, 1)  # (P, N, D)
        if P == 1:
            steps = self.weight, self.steps_back
            return self.ops.convolution_step(x, *steps, recent, positions)
        before = (positions[:1] + torch.arange(-R, 0, device=x.device)) % R
        both = torch.cat([recent.index_select(0, before).to(x.dtype), inputs])  # (R + P, N, D)
        last = (positions[-1:] + torch.arange(1 - R, 1, device=x.device)) % R
        recent.index_copy_(0, last, both[-R:].to(recent.dtype))
        both = both.transpose(0, 1).contiguous()  # (N, R + P, D)
        return self.ops.short_convolution(both, self.weight, self.offsets)[:, R:]


def convolution_offsets(length: int, width: int, channels: int) -> list[int]:
    """How many positions back the convolution reads: to the bytes just before, and to the same
    channel of the pixel above the predicted byte and of that pixel's left and right neighbours. The
    predicted byte is one position ahead."""
    row = width * channels
    offsets = {1, 2, channels}
    offsets |= {row - 1 + channels * side for side in (-1, 0, 1)}
    return sorted(offset for offset in offsets if 0 < offset < max(2, length - 1))
