"""The surprisal of a byte: the bits that it costs. A byte that the model expects costs few."""

import torch

from layers.mixture import NATS_PER_BIT, first_byte_log_probs
from models import POSITIONS_AT_ONCE
from utils import UserError, autocast


@torch.no_grad()
def surprisal(model, images, *, precision, device):
    """-log2 p(byte | the bytes before it), (N, L - 1), float64, in bits, of the bytes of images
    (N, L) after their first; a few images at a time to bound the memory. Its mean is bits/dim.

    Raises `UserError` if one is not finite.
    """
    with autocast(device, precision):
        parts = images.split(max(1, POSITIONS_AT_ONCE // images.shape[1]))
        nats = torch.cat([model.nll_per_byte(part.to(device)).cpu() for part in parts])
    if not nats.isfinite().all():
        raise UserError("the model's probabilities are not finite: its weights have diverged")
    return nats.double() / NATS_PER_BIT


def first_byte_surprisal(images, counts):
    """-log2 p(first byte), (N, 1), float64, in bits, of images (N, L), with the histogram `counts`
    (256,) of first bytes in the training set."""
    return -first_byte_log_probs(counts)[images[:, :1].long()] / NATS_PER_BIT
