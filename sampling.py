"""Sampling images byte by byte, two ways that give the same images.

Noise belongs to an image and a position: image number n draws from (seed, n) alone, so the
same seed gives the same pictures whatever the batch size and the sampler, up to the rounding
of floating point.
"""

import numpy as np
import torch

import mixture


def image_noise(seed, numbers, length):
    """Uniform noise (N, length, 2), float32 on [0, 1), of the images with these numbers."""
    draws = [np.random.default_rng((seed, n)).random((length, 2), np.float32) for n in numbers]
    return torch.from_numpy(np.stack(draws))


def sample_first_byte(counts, noise, temperature=1.0):
    """First bytes (N,), int64, drawn from the training set's `counts` (256,) with noise (N,)."""
    log_probs = mixture.first_byte_log_probs(counts)
    cumulative = torch.softmax(log_probs / temperature, dim=0).cumsum(0)
    return torch.searchsorted(cumulative[:-1].contiguous(), noise.double(), right=True)


@torch.no_grad()
def sample_recurrent(model, images, offset, noise, temperature=1.0, advance=lambda n: None):
    """Fill in bytes `offset`, ... of `images` (N, L), int64, in place: the fast way.

    The given bytes go through the model in one parallel pass, the generated ones one by one
    with a state of constant size. `offset` is at least 1; `advance` is told of finished bytes.
    """
    length = images.shape[1]
    if offset < length:
        parameters, states = model.prefill(images[:, :offset])
    for position in range(offset, length):
        images[:, position] = mixture.sample(parameters, noise[:, position], temperature)
        if position + 1 < length:
            parameters = model.step(images[:, position], position, states)
        advance(len(images))


@torch.no_grad()
def sample_batched(model, images, offset, noise, temperature=1.0, advance=lambda n: None):
    """As `sample_recurrent`, recomputing the whole prefix for every byte: slow, and the same."""
    for position in range(offset, images.shape[1]):
        parameters = model.predict(images[:, :position])
        images[:, position] = mixture.sample(parameters, noise[:, position], temperature)
        advance(len(images))


SAMPLERS = {"batched": sample_batched, "recurrent": sample_recurrent}
