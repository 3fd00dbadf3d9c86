"""The cases of the comparison: a training step, sampling, and the cost of a byte of long images.

Each case is a function that a process of its own calls once; it returns a record.
"""

from collections.abc import Callable
from functools import partial

import torch

from benchmarks import measure
from benchmarks.comparison.methods import make_model, make_sampler
from benchmarks.training_speed import make_images, trainer
from cli.process import keep_freed_memory
from engine.training import NegativeLogLikelihood

# Where in an image bytes are drawn to extrapolate to all of it, and their weights in the mean:
# Simpson's rule, exact if the time is a polynomial of the position of up to third degree.
PLACES = {0.0: 1 / 6, 0.5: 4 / 6, 1.0: 1 / 6}
# An image that takes longer than this many times the seconds of a measurement is extrapolated.
LONGEST_IMAGE = 4
# Repetitions of the two lengths in `byte_cost`.
ROUNDS = 5


def training_step(name: str, fields: dict, seconds: float, device: torch.device) -> dict:
    """Time and peak memory of a step (forward, backward, RAdam) on one image, without dropout."""
    nll = NegativeLogLikelihood(make_model(name, fields, device))
    step = trainer(nll, make_images(nll.model, 1, device), "fp32")
    keep_freed_memory()
    before = measure.current_mb(device)
    step()
    time = measure.median_seconds(step, seconds, device)
    peak = measure.peak_mb(device)
    return {
        "method": name, "length": fields["length"], "seconds": time,
        "added_mb": peak - before, "process_mb": peak,
    }  # fmt: skip


def sampling(
    name: str, config: str, fields: dict, batch_size: int, seconds: float, device: torch.device
) -> dict:
    """Time and state of sampling whole images, from their second byte on.

    Images that take too long are extrapolated, and marked so, from bytes at their beginning,
    middle and end. Times are those of a byte of the whole batch.
    """
    keep_freed_memory()
    sampler = make_sampler(name, fields, batch_size, device)
    draw, states = sampler.draw, sampler.states
    drawn = fields["length"] - 1
    times = [time_at(draw, place, drawn, seconds, device) for place in PLACES]
    mean = sum(weight * time for weight, time in zip(PLACES.values(), times, strict=True))
    extrapolated = mean * drawn > LONGEST_IMAGE * seconds
    if not extrapolated:
        mean = measure.median_seconds(partial(draw, 1, drawn), seconds, device) / drawn
    return {
        "method": name, "config": config, "length": fields["length"], "batch": batch_size,
        "ms_per_byte": 1e3 * mean, "ms_at_places": [1e3 * time for time in times],
        "images_per_second": batch_size / (mean * drawn), "extrapolated": extrapolated,
        "state_mb": measure.state_bytes(states) / batch_size / 1e6 if states else None,
        "process_mb": measure.peak_mb(device),
    }  # fmt: skip


def time_at(
    draw: Callable, place: float, drawn: int, seconds: float, device: torch.device
) -> float:
    """Seconds per byte at a `place` between 0 and 1 of an image with `drawn` bytes to draw."""
    once = measure.timed(partial(draw, 1 + int(place * (drawn - 1)), 1), device)  # and a warm-up
    count = max(1, min(drawn // 8, int(seconds / 20 / once)))
    run = partial(draw, 1 + int(place * (drawn - count)), count)
    if count == 1:  # the same call again: as the median of two
        return min(once, measure.timed(run, device))
    return measure.median_seconds(run, seconds / 4, device) / count


def byte_cost(fields: dict, long: int, device: torch.device) -> dict:
    """Microseconds per byte of linear attention at the length of `fields` and at a longer one,
    measured alternately: of training steps on nearly equally many bytes, and of drawing an image.
    """
    keep_freed_memory()
    short, runs, n_bytes = fields["length"], {}, {}
    for length in (short, long):
        batch_size, size = round(long / length), {**fields, "length": length}
        nll = NegativeLogLikelihood(make_model("linear", size, device))
        images = make_images(nll.model, batch_size, device)
        draw = make_sampler("linear", size, 1, device).draw
        runs["training", length] = trainer(nll, images, "fp32")
        runs["sampling", length] = partial(draw, 1, length - 1)
        n_bytes |= {("training", length): batch_size * (length - 1)}
        n_bytes |= {("sampling", length): length - 1}
    seconds = measure.interleaved(runs, ROUNDS, device)
    us = {case: 1e6 * seconds[case] / n_bytes[case] for case in runs}
    what = {name: [us[name, short], us[name, long]] for name in ("training", "sampling")}
    return {"lengths": [short, long], **what}
