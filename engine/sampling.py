"""Sampling images byte by byte, in two ways that give the same images.

The noise depends on the image and the position: image number n draws from (seed, n) alone, so
the same seed gives the same images with any batch size and sampler, up to rounding.
"""

from dataclasses import dataclass

import numpy as np
import torch

from layers import mixture
from utils import UserError

# Bytes drawn before a CUDA graph is captured, since libraries initialise lazily.
WARM_UP_BYTES = 3
# Bytes of each image between two checks and progress reports of `EagerDecoder`; a GPU is
# synchronised once per block.
BLOCK = 32


def image_noise(seed, numbers, length):
    """Uniform noise (N, length, 2), float32 on [0, 1), of the images with these numbers."""
    draws = [np.random.default_rng((seed, n)).random((length, 2), np.float32) for n in numbers]
    return torch.from_numpy(np.stack(draws))


def sample_first_byte(counts, noise, temperature=1.0):
    """First bytes (N,), int64, drawn from the training set's `counts` (256,) with noise (N,)."""
    log_probs = mixture.first_byte_log_probs(counts)
    cumulative = torch.softmax(log_probs / temperature, dim=0).cumsum(0)
    return torch.searchsorted(cumulative[:-1].contiguous(), noise.double(), right=True)


@dataclass
class Batch:
    """Images that are being sampled. A decoder changes all but noise and temperature in place."""

    images: torch.Tensor  # (N, L), int64
    noise: torch.Tensor  # (N, L, 2), float32
    temperature: float
    position: torch.Tensor  # (1,), int64: the next byte to read
    states: list  # one per layer, after the bytes before `position`
    finite: torch.Tensor  # (), bool: whether every distribution so far was finite

    def draw(self, parameters, noise):
        """Bytes (N,) from distributions (N, 3K) with noise (N, 2), and 0 from those that are not
        finite, which `finite` then records without a device synchronisation."""
        known = parameters.isfinite()
        self.finite &= known.all()
        return mixture.sample(torch.where(known, parameters, 0), noise, self.temperature)

    def check_finite(self):
        if not self.finite:
            raise UserError(
                "the model's distribution of a byte is not finite because the weights are too "
                "large (the training diverged): give an earlier checkpoint"
            )


class EagerDecoder:
    """Draws bytes with `ImageTransformer.step`, or a compiled `step` of the same signature."""

    def __init__(self, model, step=None):
        self.step = step or model.step

    def block(self, n_images):
        """How many bytes of each image one call should draw."""
        return BLOCK

    def read(self, model, images, count):
        """The states after the first `count` bytes of images (N, L), read in one parallel pass."""
        return model.prefill(images[:, :count])[1] if count else model.empty_states(len(images))

    def __call__(self, batch, count):
        """Draw the next `count` bytes of the images of a `Batch`."""
        for _ in range(count):
            self.draw_next(batch)

    def draw_next(self, batch):
        """Read byte `position` of each image, draw the byte after it, and advance `position`.

        Everything happens in place and on the device, so a CUDA graph can replay it.
        """
        parameters = self.step(batch.images, batch.position, batch.states)
        batch.position += 1
        noise = batch.noise.index_select(1, batch.position).squeeze(1)  # (N, 2)
        batch.images.index_copy_(1, batch.position, batch.draw(parameters, noise)[:, None])


class GraphDecoder(EagerDecoder):
    """As `EagerDecoder`, replaying a CUDA graph: one launch per byte instead of hundreds.

    For models whose states keep their addresses. The graph belongs to one `Batch`.
    """

    batch = None

    def __call__(self, batch, count):
        if batch is not self.batch:
            self.batch, self.drawn, self.graph = batch, 0, None
        for _ in range(count):
            if self.drawn == WARM_UP_BYTES:
                self.graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(self.graph):
                    self.draw_next(batch)
            self.graph.replay() if self.graph else self.draw_next(batch)
            self.drawn += 1


@torch.no_grad()
def sample_recurrent(
    model, images, offset, noise, temperature=1.0, *, decoder=None, advance=lambda n: None
):
    """Fill in bytes `offset`, ... of `images` (N, L), int64, in place: the fast way.

    The `decoder` reads the given bytes but the last, and then reads the bytes from there on and
    draws those after them, one by one. `offset` is at least 1; `advance(n)` is called after each
    n bytes. Raises `UserError` if a distribution is not finite.
    """
    n, length = images.shape
    if offset == length:
        return
    decoder = decoder or EagerDecoder(model)
    states = decoder.read(model, images, offset - 1)
    position = torch.tensor([offset - 1], device=images.device)
    finite = torch.ones((), dtype=torch.bool, device=images.device)
    batch = Batch(images, noise, temperature, position, states, finite)
    block = decoder.block(n)
    for first in range(offset - 1, length - 1, block):
        count = min(block, length - 1 - first)
        decoder(batch, count)
        batch.check_finite()
        advance(n * count)


@torch.no_grad()
def sample_batched(model, images, offset, noise, temperature=1.0, *, advance=lambda n: None):
    """As `sample_recurrent`, recomputing the whole prefix for every byte: slow, for comparison."""
    finite = torch.ones((), dtype=torch.bool, device=images.device)
    batch = Batch(images, noise, temperature, None, None, finite)
    for position in range(offset, images.shape[1]):
        parameters = model.predict_next(images[:, :position])
        images[:, position] = batch.draw(parameters, noise[:, position])
        advance(len(images))
    batch.check_finite()
