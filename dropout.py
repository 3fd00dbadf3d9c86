"""Dropout whose noise belongs to an image: not to a batch, a device or a process.

A number is dropped if a hash of its place in the image's tensor and of two keys says so: a batch
that is cut into parts, over time or over processes, drops what the whole batch would.
"""

import torch
from torch import nn

# Apart from each other in every bit: 2^64 over the golden ratio, as a signed number.
KEY_STEP = -7046029254386353131


class DropoutNoise:
    """The keys of the images that go through a model, for each of its dropouts in turn."""

    def start(self, keys):
        """`keys` (N,), int64, one of each image of the batch, before its first dropout."""
        self.keys = keys

    def next_keys(self):
        """Keys (N, 2), int32, for the next dropout."""
        self.keys = self.keys + KEY_STEP
        return self.keys.view(torch.int32).view(-1, 2)


def draw_keys(n, device):
    """Keys (n,), int64, from torch's generator."""
    return torch.randint(-(2**63), 2**63 - 1, (n,), device=device)


def keep_mask(keys, size, threshold):
    """Whether each number of each image is kept, (N, size), bool, for `keys` (N, 2), int32: a hash
    of 32 bits (two rounds of the finaliser lowbias32) is at least `threshold`."""
    x = torch.arange(size, dtype=torch.int32, device=keys.device) ^ keys[:, :1]  # (N, size)
    x = mix(mix(x).add_(keys[:, 1:]))
    return x.add_(-(2**31)) >= threshold - 2**31  # compares as unsigned


def mix(x):
    """A permutation of 32 bits in which every bit of `x`, overwritten, changes half of all."""
    x ^= (x >> 16) & 0xFFFF  # torch's shift copies the sign
    x *= 0x7FEB352D
    x ^= (x >> 15) & 0x1FFFF
    x *= 0x846CA68B - 2**32
    x ^= (x >> 16) & 0xFFFF
    return x


def drop(x, keys, threshold):
    """x / (1 - p) where kept, 0 elsewhere; p is `threshold` / 2^32, x is (N, ...)."""
    keep = keep_mask(keys, x[0].numel(), threshold).view(x.shape)
    return torch.where(keep, x * scale(threshold), 0)


def scale(threshold):
    return 1 / (1 - threshold / 2**32)


class Dropout(nn.Module):
    """nn.Dropout on (N, ...), with the noise that it is given."""

    def __init__(self, p, noise):
        super().__init__()
        self.threshold, self.noise = round(p * 2**32), noise

    def forward(self, x):
        if not self.training or self.threshold == 0:
            return x
        return self.drop(x, self.noise.next_keys(), self.threshold)

    drop = staticmethod(drop)  # or a faster one
