"""Which precision is faster on this machine, measured before a run: float32, or products of
bfloat16 numbers. A CPU's instruction sets do not say it.
"""

import time
from collections.abc import Callable
from copy import deepcopy
from functools import partial

import torch
from torch import nn

from cpu.build import find_compiler
from engine import distributed
from engine.optimizers import Muon
from engine.sampling import choose_decoder, convert_weights, empty_batch, plain_decoder
from models import ImageTransformer
from utils import autocast, cpu_name, not_emulated, say

SECONDS = 0.1  # of a measurement, if three rounds do not take longer
OPERATIONS = 5e8  # at most, of floating-point numbers in the forward pass of a measurement
# What is not usual has to be faster by this factor: the choice should not depend on the noise of
# the measurement.
MARGIN = 1.1


class Choices:
    """The precision of each part of a run on a CPU: of its "training", for example.

    On the machine of the run that is continued, they are what its checkpoint stores, since a
    continued run should compute what an uninterrupted one does. On another they are measured.
    """

    def __init__(self, stored: dict[str, str] | None = None):
        self.before, self.reasons = stored or {}, {}
        self.made = {"machine": cpu_name()}
        self.moved = distributed.any_of(self.before.get("machine") != cpu_name())

    @property
    def stored(self) -> dict[str, str]:
        """The machine and the precisions, for a checkpoint; also those that this command had no use
        for."""
        return self.made if self.moved else {**self.before, **self.made}

    def choose(self, part: str, precision: str, candidates: Callable[[], dict]) -> str:
        """The precision of a part: the given one, or for "auto" the faster one. `candidates`
        returns one or two functions that compute the same, {precision: function}, the usual one
        first."""
        if precision != "auto":
            return precision
        before = self.before.get(part)
        if before and not self.moved:
            precision, self.reasons[part] = before, "as before"
        else:
            precision, self.reasons[part] = fastest(candidates())
        if before not in (None, precision):
            say(f"{part}: {precision} on this machine, {before} on the one before")
        self.made[part] = precision
        return precision

    def describe(self, device: torch.device, precisions: dict[str, str]) -> str:
        """A device and {part: precision} in words: "cpu (2 threads), bf16 (1.9 times as fast as
        fp32), evaluation in fp32"."""
        n = torch.get_num_threads()
        threads = f" ({n} thread{'s' if n > 1 else ''})" if device.type == "cpu" else ""
        (first, precision), *others = precisions.items()
        reason = f" ({self.reasons[first]})" if self.reasons.get(first) else ""
        changes = (f", {part} in {other}" for part, other in others if other != precision)
        return f"machine: {device}{threads}, {precision}{reason}{''.join(changes)}"


def fastest(candidates: dict[str, Callable]) -> tuple[str, str]:
    """The name of the only function, or of the faster one of two, and then how much faster it is in
    words. The first one is chosen unless the second one is faster by MARGIN."""
    if len(candidates) == 1:
        return *candidates, ""
    (usual, first), (other, second) = seconds_of_calls(candidates).items()
    if first > MARGIN * second:
        return other, f"{first / second:.1f} times as fast as {usual}"
    return usual, f"{other} would take {second / first:.1f} times as long"


def seconds_of_calls(candidates: dict[str, Callable]) -> dict[str, float]:
    """The time of each function's fastest call, summed over all processes. They are called
    alternately, so that a slow phase of the machine affects both."""
    times = {name: [] for name in candidates}
    start, rounds = time.perf_counter(), 0
    while rounds < 3 or time.perf_counter() - start < SECONDS:
        rounds += 1
        for name, run in candidates.items():
            began = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - began)
    fastest = (min(calls[1:]) for calls in times.values())  # the first ones initialise libraries
    return dict(zip(times, distributed.total(*fastest), strict=True))


def layer_candidates(model: ImageTransformer, n: int, train: bool) -> dict[str, Callable]:
    """The first layer's outputs at the positions of n images, or at fewer positions in a model that
    is too large for a quick measurement; to `train`, the gradients, too."""
    D, layer = model.config.d_model, model.transformer.layers[0]
    most = max(1, int(OPERATIONS / (24 * D**2)))  # 12 D^2 weights, a sum and a product each
    length = min(model.config.length - 1, most)
    x = torch.randn(min(n, most // length), length, D).requires_grad_(train)

    @torch.set_grad_enabled(train)
    def run(precision):
        with autocast(x.device, precision):
            y = layer(x, torch.arange(length))
        if train:
            torch.autograd.grad(y.float().sum(), [x, *layer.parameters()])

    names = not_emulated(x.device, "fp32", "bf16")
    return {precision: partial(run, precision) for precision in names}


def sampling_candidates(
    model: ImageTransformer, n: int, compile: bool | None, steps: float
) -> dict[str, Callable]:
    """A byte of n images; `compile` and `steps` are those of `choose_decoder`. Also in bfloat16
    without instructions for it: with few images, reading the weights takes most of the time."""

    @torch.no_grad()
    def run(precision, decoder, batch):
        batch.position.zero_()
        with autocast(batch.images.device, precision):
            decoder(batch, 1)

    runs = {}
    # Where nothing can be compiled, `complete_batches` will say so, once.
    plain = compile is False or (compile is None and not find_compiler())
    for precision in ("fp32", "bf16"):
        copied = deepcopy(model)
        decoder = None if plain else choose_decoder(copied, precision, compile, steps)
        decoder = decoder or plain_decoder(copied)
        convert_weights(copied, precision)
        runs[precision] = partial(run, precision, decoder, empty_batch(copied, n))
    return runs


def muon_candidates(model: ImageTransformer) -> dict[str, Callable]:
    """Muon's update of a feed-forward network's weight."""
    weight = nn.Parameter(torch.randn_like(model.transformer.layers[0].linear1.weight))
    weight.grad = torch.randn_like(weight)
    names = not_emulated(weight.device, "bf16", "fp32")
    return {precision: Muon([weight], 0.0, 0.0, precision).step for precision in names}
