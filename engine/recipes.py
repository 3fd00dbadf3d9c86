"""The settings of the optimisation, and two recipes: named values of these and of the model."""

import math
from dataclasses import dataclass
from typing import Any

from engine.optimizers import MUON_WEIGHT_DECAY
from options import NOT_NEGATIVE, POSITIVE, Number, changeable, choose, option

# How each recipe differs from the defaults of `Settings` and `ModelConfig`.
RECIPES = {
    "paper": {},
    "fast": {
        "optimizer": "muon",
        "lr": 4e-3,
        "muon_lr": 0.02,
        "clip_norm": 0.0,
        "lr_schedule": "cosine",
        "warmup": 100,
        "dropout": 0.0,
        "neighbours": True,
    },
}
# What is different for colour images.
COLOUR = {"fast": {"attention_type": "gated-linear", "lr": 0.02, "mean_rate": 0.3}}
RATES = {"lr", "muon_lr"}  # in recipes, those for 1,600 iterations


@dataclass(frozen=True)
class Settings:
    """How a run optimises; stored in every checkpoint. The defaults are the paper's recipe."""

    recipe: str = option(
        "paper",
        tuple(RECIPES),
        "paper: RAdam at a constant rate; fast: Muon, a cosine schedule, no dropout, no clipping, "
        "--neighbours, and for colour images gated-linear attention and higher rates; each part "
        "can be overridden",
    )
    optimizer: str = option(
        "radam",
        ("radam", "adam", "muon"),
        "adam is AdamW; muon is Muon for the matrices in the layers and AdamW for the rest",
    )
    lr: float = changeable(
        1e-4,
        POSITIVE,
        "learning rate; with muon, that of AdamW; fast multiplies its default by "
        "(1600 / iterations)^0.3, at most 1.5",
    )
    muon_lr: float = changeable(
        0.02,
        POSITIVE,
        "learning rate of Muon; fast multiplies its default likewise",
        only_with=("optimizer", ("muon",)),
    )
    mean_rate: float = changeable(
        0.03,
        POSITIVE,
        "learning rate of the mixture's means beside Muon, relative to AdamW's",
        only_with=("optimizer", ("muon",)),
    )
    lr_schedule: str = changeable(
        "constant",
        ("constant", "cosine"),
        "constant, or a cosine that falls to 0 over --iterations",
    )
    warmup: int = changeable(
        0, Number(int, 0, 2**62), "raise the learning rate linearly over the first N iterations"
    )
    weight_decay: float = changeable(
        0.01, NOT_NEGATIVE, f"decoupled weight decay; that of Muon is {MUON_WEIGHT_DECAY}"
    )
    clip_norm: float = changeable(
        1.0, NOT_NEGATIVE, "clip the global gradient norm at X; 0 for no clipping"
    )
    validation: int = option(
        0,
        Number(int, 0, 2**62),
        "hold out N training images, chosen by the seed, and evaluate on them instead of the test "
        "images",
    )

    def rate_factor(self, iteration: int, iterations: int) -> float:
        """The factor of the learning rates at an iteration, from 1 to `iterations`: a linear
        warm-up and, with the cosine schedule, half a cosine down to 0."""
        factor = min(1.0, iteration / self.warmup) if self.warmup else 1.0
        if self.lr_schedule == "cosine":
            # iteration - 1: the first rate is the full one, and the last one is above 0.
            factor *= 0.5 * (1 + math.cos(math.pi * (iteration - 1) / iterations))
        return factor


def choose_recipe(
    given: dict, stored: dict, iterations: int, image_shape: tuple[int, ...] = ()
) -> dict[str, Any]:
    """The values that the recipe of a run sets; `given` and `stored` are options of `Settings`.

    The rates fall with the length of a run, since the best ones do: on digits, Muon's was about
    0.03 for 400 iterations and 0.02 for 1,600.
    """
    name = choose("recipe", given, stored, {"recipe": "paper"})
    values = RECIPES[name] | (COLOUR.get(name, {}) if len(image_shape) == 3 else {})
    factor = min(1.5, (1600 / iterations) ** 0.3)
    rates = {rate: float(f"{factor * values[rate]:.2g}") for rate in values.keys() & RATES}
    return {"recipe": name, **values, **rates}
