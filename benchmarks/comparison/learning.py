"""The same small model trained with each attention, for equally long: bits/dim over images and
minutes.

One run answers both questions, since its rate is constant: its evaluations after equally many
images compare the methods by images, its last one by minutes.
"""

from collections.abc import Callable

import torch._dynamo  # An optimiser would import it during its first, timed step.

import datasets
from benchmarks import measure
from benchmarks.comparison.methods import make_model
from engine.optimizers import make_optimizer
from engine.recipes import Settings
from engine.training import NegativeLogLikelihood, evaluate, train_step
from utils import to_device

METHODS = ["linear", "gated linear", "gated delta", "softmax", "reformer (library)"]
SEEDS = [0, 1]
MODEL = {"length": 784, "n_layers": 3, "n_heads": 3}
BATCH_SIZE = 16
# Ten times the paper's rate, for runs of minutes.
SETTINGS = Settings(lr=1e-3)
# The first evaluation comes after this many images, each next one after twice as many.
FIRST_EVALUATION = 256


def learn(
    name: str, seed: int, seconds: float, test_images: int, device: torch.device, advance: Callable
) -> dict:
    """Train for the given seconds, not counting evaluations on the first `test_images` test images;
    `advance(seconds)` is called after each step. Returns a record with the evaluations."""
    data, test = (datasets.load("mnist-10k", ".", train=train) for train in (True, False))
    model, test = make_model(name, MODEL, device, seed=seed), test.images[:test_images]
    model.first_byte_counts.copy_(data.first_byte_counts())
    nll = NegativeLogLikelihood(model)
    optimizer = make_optimizer(nll.model, SETTINGS)
    spent, images, points, next_evaluation = 0.0, 0, [], FIRST_EVALUATION
    while spent < seconds:
        step = training_step(nll, optimizer, data, images // BATCH_SIZE, seed, device)
        time = measure.timed(step, device)
        advance(min(time, seconds - spent))
        spent, images = spent + time, images + BATCH_SIZE
        if images == next_evaluation or spent >= seconds:
            bits, _ = evaluate(nll, test, batch_size=BATCH_SIZE, precision="fp32")
            points.append({"images": images, "seconds": spent, "bits_per_dim": bits})
            next_evaluation *= 2
    return {"method": name, "seed": seed, "points": points}


def training_step(
    nll: NegativeLogLikelihood,
    optimizer: torch.optim.Optimizer,
    data: datasets.ImageDataset,
    iteration: int,
    seed: int,
    device: torch.device,
) -> Callable:
    """A function that does the step of an iteration, counted from 0."""

    def step():
        images = to_device(data.batch(iteration, BATCH_SIZE, seed), device)
        train_step(nll, optimizer, images, seed=seed, iteration=iteration + 1, accumulate=1,
                   precision="fp32", clip_norm=SETTINGS.clip_norm)  # fmt: skip

    nll.train()
    return step


def runs_by_method(runs: list[dict]) -> dict[str, list]:
    """{method: the evaluations of each seed}."""
    methods = {}
    for run in runs:
        methods.setdefault(run["method"], []).append(run["points"])
    return methods


def after_images(runs: list[list[dict]], images: int) -> list[dict]:
    """The evaluation after this number of images of each of the runs, lists of evaluations."""
    return [point for points in runs for point in points if point["images"] == images]


def common_images(runs: list[list[dict]]) -> list[int]:
    """The numbers of images after which all runs were evaluated, ascending."""
    return sorted(set.intersection(*({point["images"] for point in points} for points in runs)))
