"""The surprisal of a byte: the bits that it costs. A byte that the model expects costs few."""

import torch

from engine.progress import track
from layers.mixture import NATS_PER_BIT
from models import POSITIONS_AT_ONCE, ImageTransformer
from utils import UserError, autocast


@torch.no_grad()
def surprisal(
    model: ImageTransformer, images: torch.Tensor, *, precision: str = "fp32"
) -> torch.Tensor:
    """-log2 p(byte | the bytes before it), float64, in bits, of every byte of images (N, L), uint8:
    (N, L) on the CPU. The mean over all but the first byte is the paper's bits/dim.

    The first byte's probability comes from the histogram of first bytes in the training set.
    Raises `UserError` if one is not finite, and a ValueError for images of another shape.
    """
    model.check_images(images)
    device = model.first_byte_counts.device
    nats = [model.first_byte_nll(images)[:, None].cpu()]
    parts = images.split(max(1, POSITIONS_AT_ONCE // images.shape[1]))  # bounds the memory
    with autocast(device, precision):
        others = [
            model.nll_per_byte(part.to(device)).cpu().double()
            for part in track(parts, "evaluating batch")
        ]
    nats = torch.cat([*nats, torch.cat(others)], dim=1)
    if not nats.isfinite().all():
        raise UserError("the model's probabilities are not finite: its weights have diverged")
    return nats / NATS_PER_BIT
