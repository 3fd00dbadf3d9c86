"""Mixtures of discretized logistics over a byte (PixelCNN++, Salimans et al., 2017, section 2.1).

A distribution is a vector of 3K parameters, [logits | means | log-scales]. Bytes are mapped
to [-1, 1], so each byte is a bin of width 2/255; the first bin extends to minus infinity and the
last to plus infinity. Everything is computed in float32 or wider, whatever the parameters' type.
"""

import math

import torch
from torch import nn
from torch.nn.functional import log_softmax, logsigmoid

NATS_PER_BIT = math.log(2)
# A scale of exp(-7) is an eighth of a bin: narrower logistics fit no better, and their gradients
# explode.
MIN_LOG_SCALE = -7.0
BIN_WIDTH = 2 / 255
# A lower bound of the widths (in scales), to avoid 0 / 0: below it expm1(x) rounds to x.
TINY = 1e-30


def split(parameters: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits, means and log-scales, each (..., K), of parameters (..., 3K)."""
    parameters = parameters.to(torch.promote_types(parameters.dtype, torch.float32))
    logits, means, log_scales = parameters.chunk(3, dim=-1)
    return logits, means, log_scales.clamp(min=MIN_LOG_SCALE)


def mean_rows(predictor: nn.Linear) -> list[torch.Tensor]:
    """The rows of weight (K, D) and bias (K,) of a linear layer to 3K parameters that compute the
    means, as views without a gradient."""
    K = predictor.out_features // 3
    return [tensor.detach()[K : 2 * K] for tensor in (predictor.weight, predictor.bias)]


@torch.no_grad()
def spread_components(predictor: nn.Linear) -> None:
    """Initialise a linear layer to 3K parameters so that the K logistics lie side by side over the
    bytes, with scales of half their distance, and their means hardly depend on the input."""
    K = predictor.out_features // 3
    weight, bias = mean_rows(predictor)
    weight *= 0.1
    bias.copy_((2 * torch.arange(K) + 1) / K - 1)  # their distance is 2 / K
    predictor.bias[2 * K :] = -math.log(K)


def log_prob(parameters: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Log-probability in nats, (...), of the bytes `values` (...), any integer type.

    The mass sigma(a) - sigma(b) between the edges of a bin is computed in logarithms,
    log sigma(a) + log sigma(-b) + log(1 - exp(b - a)), so that nothing cancels or underflows;
    the last term is log(width) + log((1 - exp(-width)) / width) with the width a - b.
    """
    logits, means, log_scales = split(parameters)
    values = values[..., None].to(means.dtype)  # (..., 1) beside (..., K)
    # Both edges are computed from integers: one rounding each before the mean is subtracted.
    upper = (2 * values - 254) / 255
    lower = (2 * values - 256) / 255
    inverse_scales = torch.exp(-log_scales)
    below_upper = logsigmoid((upper - means) * inverse_scales)
    above_lower = logsigmoid((means - lower) * inverse_scales)
    widths = (BIN_WIDTH * inverse_scales).clamp(min=TINY)
    log_widths = math.log(BIN_WIDTH) - log_scales + torch.log(-torch.expm1(-widths) / widths)
    inside = below_upper + above_lower + log_widths
    log_masses = torch.where(
        values == 0, below_upper, torch.where(values == 255, above_lower, inside)
    )
    return torch.logsumexp(log_softmax(logits, dim=-1) + log_masses, dim=-1)


def probabilities(parameters: torch.Tensor) -> torch.Tensor:
    """The 256 probabilities, (..., 256), of parameters (..., 3K)."""
    values = torch.arange(256, device=parameters.device)
    return log_prob(parameters[..., None, :], values.expand(*parameters.shape[:-1], 256)).exp()


def sample(parameters: torch.Tensor, noise: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """Bytes (...), int64, drawn with `noise` (..., 2), uniform on [0, 1).

    The first number selects a component; the second is mapped by the inverse of that
    component's cumulative distribution function. A temperature divides the logits and
    multiplies the scales.
    """
    logits, means, log_scales = split(parameters)
    noise = noise.to(means.dtype)
    cumulative = torch.softmax(logits / temperature, dim=-1).cumsum(-1)  # (..., K)
    # The last sum may round to less than 1, so only the first K - 1 are compared.
    component = (noise[..., :1] >= cumulative[..., :-1]).sum(-1, keepdim=True)  # (..., 1)
    mean = means.gather(-1, component).squeeze(-1)
    scale = log_scales.gather(-1, component).squeeze(-1).exp() * temperature
    scale = scale.clamp(max=torch.finfo(scale.dtype).max)  # infinity times 0 would be nan
    x = mean + scale * torch.logit(noise[..., 1])
    return torch.round((x + 1) * 127.5).clamp(0, 255).long()


def first_byte_log_probs(counts: torch.Tensor) -> torch.Tensor:
    """Log-probabilities (256,), float64, in nats, of the first byte of an image.

    `counts` (256,) is the histogram of first bytes in the training set. One pseudo-count, spread
    evenly over the 256 bytes, keeps every probability positive.
    """
    counts = counts.double()
    return torch.log((counts + 1 / 256) / (counts.sum() + 1))
