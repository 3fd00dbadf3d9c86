"""Sampling images byte by byte, two ways that give the same images (recurrence.py has a third).

Noise belongs to an image and a position: image number n draws from (seed, n) alone, so the
same seed gives the same pictures whatever the batch size and the sampler, up to the rounding
of floating point.
"""

from functools import partial

import numpy as np
import torch

import mixture
from utils import UserError

# Bytes sampled before a GPU's work on a byte is recorded: its libraries set themselves up.
WARM_UP_BYTES = 3


def image_noise(seed, numbers, length):
    """Uniform noise (N, length, 2), float32 on [0, 1), of the images with these numbers."""
    draws = [np.random.default_rng((seed, n)).random((length, 2), np.float32) for n in numbers]
    return torch.from_numpy(np.stack(draws))


def sample_first_byte(counts, noise, temperature=1.0):
    """First bytes (N,), int64, drawn from the training set's `counts` (256,) with noise (N,)."""
    log_probs = mixture.first_byte_log_probs(counts)
    cumulative = torch.softmax(log_probs / temperature, dim=0).cumsum(0)
    return torch.searchsorted(cumulative[:-1].contiguous(), noise.double(), right=True)


def draw(parameters, noise, temperature, finite):
    """Bytes (N,), int64, from distributions (N, 3K), and 0 from those that are not finite, which
    `finite`, a tensor of one bool, then tells: in place, since no number may visit the host."""
    known = parameters.isfinite()
    finite &= known.all()
    return mixture.sample(torch.where(known, parameters, 0), noise, temperature)


def check_finite(finite):
    if not finite:
        raise UserError(
            "the model's distribution of a byte is not finite: its weights are too large, the "
            "training diverged: give an earlier checkpoint"
        )


@torch.no_grad()
def sample_recurrent(model, images, offset, noise, temperature=1.0, advance=lambda n: None):
    """Fill in bytes `offset`, ... of `images` (N, L), int64, in place: the fast way.

    The given bytes go through the model in one parallel pass, the generated ones one by one
    with a state of constant size. `offset` is at least 1; `advance` is told of finished bytes.
    """
    n, length = images.shape
    if offset == length:
        return
    parameters, states = model.prefill(images[:, :offset])
    finite = torch.ones((), dtype=torch.bool, device=images.device)
    images[:, offset] = draw(parameters, noise[:, offset], temperature, finite)
    advance(n)
    position = torch.tensor([offset], device=images.device)
    step = partial(next_byte, model, images, position, noise, states, temperature, finite)
    for drawn in range(1, length - offset):
        if drawn == WARM_UP_BYTES and images.is_cuda and model.has_constant_state:
            step = record(step)
        step()
        advance(n)
    check_finite(finite)


def next_byte(model, images, position, noise, states, temperature, finite):
    """Read byte `position`, a tensor (1,), of each image, draw the byte after it, and move on.

    Everything happens in place and on the device: a CUDA graph can repeat it.
    """
    values = images.index_select(1, position).squeeze(1)  # (N,)
    parameters = model.step(values, position, states)
    position += 1
    noise = noise.index_select(1, position).squeeze(1)  # (N, 2)
    images.index_copy_(1, position, draw(parameters, noise, temperature, finite)[:, None])


def record(step):
    """`step` as a CUDA graph: one launch a byte instead of some hundred, and no Python."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


@torch.no_grad()
def sample_batched(model, images, offset, noise, temperature=1.0, advance=lambda n: None):
    """As `sample_recurrent`, recomputing the whole prefix for every byte: slow, and the same."""
    finite = torch.ones((), dtype=torch.bool, device=images.device)
    for position in range(offset, images.shape[1]):
        parameters = model.predict(images[:, :position])
        images[:, position] = draw(parameters, noise[:, position], temperature, finite)
        advance(len(images))
    check_finite(finite)


SAMPLERS = {"batched": sample_batched, "recurrent": sample_recurrent}
