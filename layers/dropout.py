"""Dropout with keys for each image, so that the noise does not depend on how a batch is split.

Whether an element is dropped is decided by a hash of its index within the image's tensor and of
two keys of the image. A batch that is split, over time or over processes, therefore drops the
same elements as the whole batch.
"""

import torch
from torch import nn

# Successive keys differ in about half of their bits: 2^64 / golden ratio, as a signed integer.
KEY_STEP = -7046029254386353131
Noise = tuple[torch.Tensor, int]  # the keys (N, 2), int32, of images, and the threshold, p * 2^32


class DropoutNoise:
    """The keys of the images in a batch, with new ones for each dropout layer of the model."""

    def start(self, keys: torch.Tensor) -> None:
        """Begin a forward pass with `keys` (N,), int64, one for each image of the batch."""
        self.keys = keys

    def next_keys(self) -> torch.Tensor:
        """Keys (N, 2), int32, for the next dropout layer."""
        self.keys = self.keys + KEY_STEP
        return self.keys.view(torch.int32).view(-1, 2)


def draw_keys(n: int, device: torch.device | str) -> torch.Tensor:
    """Keys (n,), int64, from torch's generator."""
    return torch.randint(-(2**63), 2**63 - 1, (n,), device=device)


def keep_mask(keys: torch.Tensor, size: int, threshold: int) -> torch.Tensor:
    """Which elements of each image are kept, (N, size), bool, for `keys` (N, 2), int32: those
    whose 32-bit hash (two rounds of the finaliser lowbias32) is at least `threshold`."""
    x = torch.arange(size, dtype=torch.int32, device=keys.device) ^ keys[:, :1]  # (N, size)
    x = mix(mix(x).add_(keys[:, 1:]))
    return x.add_(-(2**31)) >= threshold - 2**31  # an unsigned comparison


def mix(x: torch.Tensor) -> torch.Tensor:
    """A bijection of 32-bit integers, in place, in which flipping one bit of `x` flips each bit of
    the result with probability 1/2."""
    x ^= (x >> 16) & 0xFFFF  # torch's shift is arithmetic
    x *= 0x7FEB352D
    x ^= (x >> 15) & 0x1FFFF
    x *= 0x846CA68B - 2**32
    x ^= (x >> 16) & 0xFFFF
    return x


def drop(x: torch.Tensor, keys: torch.Tensor, threshold: int) -> torch.Tensor:
    """x / (1 - p) where kept, x * 0 elsewhere (NaN is kept); p is `threshold` / 2^32, x is
    (N, ...)."""
    return x * keep_mask(keys, x[0].numel(), threshold).view(x.shape) * scale(threshold)


def scale(threshold: int) -> float:
    return 1 / (1 - threshold / 2**32)


class Dropout(nn.Module):
    """The noise of one dropout in the model, with which the operations before it end."""

    def __init__(self, p: float, noise: DropoutNoise):
        super().__init__()
        self.threshold, self.noise = round(p * 2**32), noise

    def forward(self) -> Noise | None:
        """Without dropout, in evaluation or if p is 0, None."""
        if not self.training or self.threshold == 0:
            return None
        return self.noise.next_keys(), self.threshold
