"""The settings of the optimisation, and two recipes that set them."""

import math
import sys
from dataclasses import dataclass, fields, replace

from utils import UserError

OPTIMIZERS = ("radam", "adam", "muon")
SCHEDULES = ("constant", "cosine")


@dataclass(frozen=True)
class Settings:
    """How a run optimises; stored in every checkpoint. The defaults are the paper's recipe."""

    recipe: str = "paper"
    optimizer: str = "radam"
    lr: float = 1e-4
    muon_lr: float = 0.02  # of the layers' matrices, with muon
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    lr_schedule: str = "constant"
    warmup: int = 0  # iterations

    def rate_factor(self, iteration, iterations):
        """The factor of the learning rates at an iteration, from 1 to `iterations`: a linear
        warm-up and, with the cosine schedule, half a cosine down to 0."""
        factor = min(1.0, iteration / self.warmup) if self.warmup else 1.0
        if self.lr_schedule == "cosine":
            # iteration - 1: the first rate is the full one, and the last one is above 0.
            factor *= 0.5 * (1 + math.cos(math.pi * (iteration - 1) / iterations))
        return factor


# What each recipe sets: settings of the optimisation (the rates of "fast" for 1,600 iterations),
# and fields of ModelConfig.
RECIPES = {
    "paper": (Settings(), {}),
    "fast": (
        Settings(
            "fast", "muon", lr=4e-3, muon_lr=0.02, clip_norm=0.0, lr_schedule="cosine", warmup=100
        ),
        {"dropout": 0.0, "neighbours": True},
    ),
}


def recipe_settings(recipe, iterations):
    """What a recipe sets for a run of so many iterations.

    The rates of "fast" fall with the length of the run, since the best ones do: Muon's was about
    0.03 for 400 iterations and 0.02 for 1,600.
    """
    settings = RECIPES[recipe][0]
    if recipe == "paper":
        return settings
    factor = min(1.5, (1600 / iterations) ** 0.3)
    rates = {name: factor * getattr(settings, name) for name in ("lr", "muon_lr")}
    return replace(settings, **{name: float(f"{rate:.2g}") for name, rate in rates.items()})


def choose_settings(given, stored, iterations):
    """The settings of a run of `iterations`: those `given` as flags, else those `stored` in its
    checkpoint ({} for none), else those of the recipe.

    A run keeps its recipe and optimiser; rates and schedule may change when it continues.
    """
    for name in ("recipe", "optimizer"):
        if name in stored and given.get(name, stored[name]) != stored[name]:
            raise UserError(
                f"--{name} {given[name]} contradicts the checkpoint, whose run has {stored[name]}: "
                "leave the flag out, or start another run"
            )
    recipe = stored.get("recipe", given.get("recipe", "paper"))
    settings = replace(recipe_settings(recipe, iterations), **{**stored, **given})
    if "muon_lr" in given and settings.optimizer != "muon":
        raise UserError(
            f"--muon_lr has no effect with --optimizer {settings.optimizer}: leave it out"
        )
    return settings


def stored_settings(checkpoint):
    """The settings stored in a checkpoint. Older checkpoints have only the optimiser: their recipe
    was always the paper's."""
    if "settings" in checkpoint or "optimizer" not in checkpoint:
        return checkpoint.get("settings", {})
    return {"recipe": "paper", "optimizer": checkpoint["optimizer"]}


def choose_seed(given, checkpoint):
    """The seed of a run, which stays the same when it continues."""
    stored = checkpoint.get("seed")
    if None not in (given, stored) and given != stored:
        raise UserError(
            f"--seed {given} contradicts the checkpoint, whose run has {stored}: "
            "leave the flag out, or start another run"
        )
    return next(value for value in (stored, given, 0) if value is not None)


def is_settings(x):
    """Whether a checkpoint's entry has the names and types of `Settings`."""
    if not (isinstance(x, dict) and set(x) <= {field.name for field in fields(Settings)}):
        return False
    numbers = [x.get(name, 0) for name in ("lr", "muon_lr", "weight_decay", "clip_norm")]
    warmup = x.get("warmup", 0)
    return (
        x.get("recipe", "paper") in tuple(RECIPES)  # a tuple: x may be unhashable
        and x.get("optimizer", "radam") in OPTIMIZERS
        and x.get("lr_schedule", "constant") in SCHEDULES
        and all(type(n) in (int, float) and 0 <= n <= sys.float_info.max for n in numbers)
        and (type(warmup) is int and 0 <= warmup < 2**63)
    )
