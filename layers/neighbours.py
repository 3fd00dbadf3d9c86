"""The bytes around the one to be predicted, as numbers: the input of a masked convolution.

An image is read row by row as one sequence, so the pixel above the next one is a whole row back.
Linear maps of the neighbouring values are added to the input and the output of the network, so that
it need not learn where these values are.
"""

import torch
from torch import nn

# How far, in pixels, the window reaches left, right and up, {channels: pixels}.
REACH = {1: 3, 3: 2}


class Neighbours(nn.Module):
    """The known bytes, from -1 to 1, in a window around the byte after each position.

    For colour images each channel of the predicted byte has its own features (those of the other
    channels are 0), so that a linear map has separate weights for each channel.
    """

    def __init__(self, length: int, width: int, channels: int):
        super().__init__()
        self.channels = channels
        table = neighbour_table(length, width, channels)
        self.register_buffer("table", table, persistent=False)  # (L - 1, W)
        channel = torch.arange(1, length) % channels
        one_hot = nn.functional.one_hot(channel, channels).float()
        self.register_buffer("channel", one_hot, persistent=False)  # (L - 1, C)

    @property
    def size(self) -> int:
        """The number of features of a position."""
        return self.channels * self.table.shape[1]

    def forward(self, images: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Features (N, P, size) of the bytes after `positions` (P,) of images (N, L)."""
        table = self.table[positions]  # (P, W)
        # Neighbours outside the image read the first byte, and are multiplied by 0.
        values = images.index_select(1, table.clamp(min=0).flatten())
        values = values.unflatten(1, table.shape).to(self.channel.dtype)  # (N, P, W)
        # 128 and not 127.5: these fractions are exact in bfloat16.
        features = (values - 128) / 128 * (table >= 0)  # (N, P, W)
        if self.channels == 1:
            return features
        channel = self.channel[positions]  # (P, C)
        return (channel[:, :, None] * features[:, :, None]).flatten(-2)  # (N, P, C * W)


def window(channels: int) -> list[tuple[int, int, int]]:
    """The neighbours (rows down, pixels to the right, channel), relative to the predicted pixel."""
    reach = REACH[channels]
    pixels = [(0, -left) for left in range(1, reach + 1)]
    pixels += [(-up, side) for up in range(1, reach + 1) for side in range(-reach, reach + 1)]
    places = [(*pixel, c) for pixel in pixels for c in range(channels)]
    return places + [(0, 0, c) for c in range(channels - 1)]  # earlier channels of the same pixel


def neighbour_count(channels: int) -> int:
    """The number W of neighbours of a byte."""
    return len(window(channels))


def neighbour_table(length: int, width: int, channels: int) -> torch.Tensor:
    """Indices (L - 1, W) of the neighbours of the byte after each position, -1 for none."""
    byte = torch.arange(1, length)  # the predicted bytes
    row, column, channel = byte // channels // width, byte // channels % width, byte % channels
    columns = []
    for dy, dx, c in window(channels):
        y, x = row + dy, column + dx
        known = (y >= 0) & (x >= 0) & (x < width) & ((dy != 0) | (dx != 0) | (c < channel))
        columns.append(torch.where(known, (y * width + x) * channels + c, -1))
    return torch.stack(columns, dim=-1)
