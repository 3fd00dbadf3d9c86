"""The mixture of discretized logistics against exact probabilities."""

import math

import mpmath
import pytest
import torch
from helpers import EXTREME_MIXTURES

from layers import mixture

EVERY_KIND = pytest.mark.parametrize("kind", EXTREME_MIXTURES)


def make_parameters(kind, n=20, K=4, dtype=torch.float32):
    logit_size, mean_size, log_scale, log_scale_size = EXTREME_MIXTURES[kind]
    generator = torch.Generator().manual_seed(len(kind))
    logits, means, log_scales = torch.randn(3, n, K, generator=generator)
    return torch.cat(
        [logit_size * logits, mean_size * means, log_scale + log_scale_size * log_scales], dim=-1
    ).to(dtype)


def exact_log_prob(parameters, value):
    """log p(value) in 50 digits, from the definition: sums of sigma(a) - sigma(b)."""
    K = len(parameters) // 3
    with mpmath.workdps(50 + int(max(0, max(parameters[2 * K :])))):
        numbers = [mpmath.mpf(p) for p in parameters]
        total, normaliser = mpmath.mpf(0), mpmath.mpf(0)
        for logit, mean, log_scale in zip(
            numbers[:K], numbers[K : 2 * K], numbers[2 * K :], strict=True
        ):
            scale = mpmath.exp(max(log_scale, -7))
            x = mpmath.mpf(2 * value - 255) / 255

            # sigma(a) - sigma(b) is taken in the tail where it does not cancel.
            def tail(edge, sign, mean=mean, scale=scale):
                return 1 / (1 + mpmath.exp(sign * (edge - mean) / scale))

            upper, lower = x + mpmath.mpf(1) / 255, x - mpmath.mpf(1) / 255
            if value == 0:
                mass = tail(upper, -1)
            elif value == 255:
                mass = tail(lower, 1)
            elif mean > x:
                mass = tail(upper, -1) - tail(lower, -1)
            else:
                mass = tail(lower, 1) - tail(upper, 1)
            total += mpmath.exp(logit) * mass
            normaliser += mpmath.exp(logit)
        return float(mpmath.log(total) - mpmath.log(normaliser))


@EVERY_KIND
def test_masses_sum_to_one(kind):
    parameters = make_parameters(kind, dtype=torch.float64)
    sums = mixture.probabilities(parameters).sum(-1)
    torch.testing.assert_close(sums, torch.ones_like(sums), rtol=0, atol=1e-12)


@EVERY_KIND
def test_log_prob_equals_high_precision(kind):
    """float32 within 1e-4 nats of 50 digits, relative where a log-probability exceeds one nat."""
    parameters = make_parameters(kind)
    for value in (0, 1, 100, 128, 254, 255):
        actual = mixture.log_prob(parameters, torch.full((20,), value))
        expected = [exact_log_prob(p.tolist(), value) for p in parameters]
        torch.testing.assert_close(
            actual.double(), torch.tensor(expected).double(), rtol=1e-4, atol=1e-4
        )


@EVERY_KIND
def test_gradients_are_finite(kind):
    parameters = make_parameters(kind).requires_grad_()
    mixture.probabilities(parameters)
    values = torch.arange(256).expand(20, 256)
    mixture.log_prob(parameters[:, None].expand(-1, 256, -1), values).sum().backward()
    assert parameters.grad.isfinite().all()


def test_gradients_are_right():
    parameters = make_parameters("ordinary", n=3, dtype=torch.float64).requires_grad_()
    values = torch.tensor([0, 77, 255])
    assert torch.autograd.gradcheck(lambda p: mixture.log_prob(p, values), parameters)


def chi_square_p_value(counts, probabilities):
    """P(a deviation as large) of observed counts (256,); bins with under 10 expected are merged."""
    expected = probabilities * counts.sum()
    rare = expected < 10
    observed = torch.cat([counts[~rare], counts[rare].sum()[None]]).double()
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    keep = expected > 0
    statistic = ((observed - expected)[keep] ** 2 / expected[keep]).sum()
    degrees = keep.sum() - 1
    return torch.special.gammaincc(degrees / 2, statistic / 2).item()


@pytest.mark.parametrize("kind", ["ordinary", "narrow", "clamped", "wide"])
@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_samples_have_these_probabilities(kind, temperature):
    """The original sampled with the scales elu(s) + 1, which its loss did not use."""
    parameters = make_parameters(kind, n=1, dtype=torch.float64)
    noise = torch.rand(400_000, 2, dtype=torch.float64)
    samples = mixture.sample(parameters.expand(len(noise), -1), noise, temperature)
    logits, means, log_scales = mixture.split(parameters)
    hot = torch.cat([logits / temperature, means, log_scales + math.log(temperature)], dim=-1)
    counts = torch.bincount(samples, minlength=256)
    assert chi_square_p_value(counts, mixture.probabilities(hot)[0]) > 1e-4


def test_extreme_noise_gives_bytes():
    """A uniform number can be exactly 0, whose logit is minus infinity."""
    parameters = make_parameters("ordinary", n=2)
    noise = torch.tensor([[0.0, 0.0], [1 - 2**-24, 1 - 2**-24]])
    assert mixture.sample(parameters, noise).tolist() == [0, 255]


def test_first_byte_log_probs():
    counts = torch.zeros(256, dtype=torch.int64)
    counts[7] = 99
    log_probs = mixture.first_byte_log_probs(counts)
    assert math.isclose(log_probs.exp().sum(), 1)
    assert math.isclose(log_probs[7].exp(), (99 + 1 / 256) / 100)
    assert log_probs.isfinite().all()


@pytest.mark.parametrize("components", [5, 10, 30])
def test_spread_components_begin_side_by_side(components):
    """Means side by side, moved by the input by a fraction of the range. An ordinary
    initialisation puts all of them around grey."""
    torch.manual_seed(0)
    predictor = torch.nn.Linear(64, 3 * components)
    mixture.spread_components(predictor)
    parameters = predictor(torch.randn(50, 64)).detach()
    _, means, _ = mixture.split(parameters)
    places = torch.linspace(-1, 1, components) * (components - 1) / components
    assert (means - places).abs().mean() < 0.06
    probabilities = mixture.probabilities(parameters)
    entropy = -(probabilities * probabilities.log2()).sum(-1)
    assert entropy.mean() > 7  # bits, of 8; an ordinary one has 5
