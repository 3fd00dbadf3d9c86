"""The settings of the optimisation, and two recipes: named values of these and of the model."""

import math
from dataclasses import dataclass
from typing import Any

from engine.optimizers import MEAN_RATE, MUON_WEIGHT_DECAY
from options import NOT_NEGATIVE, POSITIVE, Number, choose, option


@dataclass(frozen=True)
class Recipe:
    """Values of options of `Settings` and `ModelConfig` that differ from the defaults.

    The rates, named in `scaled`, are those for 1,600 iterations; they fall with the length of a
    run, since the best ones do: Muon's was about 0.03 for 400 iterations and 0.02 for 1,600.
    """

    name: str
    values: dict[str, Any]
    scaled: tuple[str, ...] = ()

    def values_for(self, iterations: int) -> dict[str, Any]:
        """The values for a run of the given number of iterations."""
        factor = min(1.5, (1600 / iterations) ** 0.3)
        rates = {name: float(f"{factor * self.values[name]:.2g}") for name in self.scaled}
        return {"recipe": self.name, **self.values, **rates}


PAPER = Recipe("paper", {})
FAST = Recipe(
    "fast",
    {
        "optimizer": "muon",
        "lr": 4e-3,
        "muon_lr": 0.02,
        "clip_norm": 0.0,
        "lr_schedule": "cosine",
        "warmup": 100,
        "dropout": 0.0,
        "neighbours": True,
    },
    scaled=("lr", "muon_lr"),
)
RECIPES = {recipe.name: recipe for recipe in (PAPER, FAST)}


@dataclass(frozen=True)
class Settings:
    """How a run optimises; stored in every checkpoint. The defaults are the paper's recipe."""

    recipe: str = option(
        PAPER.name,
        tuple(RECIPES),
        "paper: RAdam at a constant rate; fast: Muon, a cosine schedule, no dropout, no clipping, "
        "and --neighbours; each part can be overridden",
    )
    optimizer: str = option(
        "radam",
        ("radam", "adam", "muon"),
        "adam is AdamW; muon is Muon for the matrices in the layers and AdamW for the rest",
    )
    lr: float = option(
        1e-4,
        POSITIVE,
        f"learning rate; with muon, that of AdamW, and {MEAN_RATE} of it for the mixture's means; "
        "fast multiplies its default by (1600 / iterations)^0.3, at most 1.5",
        may_change=True,
    )
    muon_lr: float = option(
        0.02,
        POSITIVE,
        "learning rate of Muon; fast multiplies its default likewise",
        only_with=("optimizer", ("muon",)),
        may_change=True,
    )
    lr_schedule: str = option(
        "constant",
        ("constant", "cosine"),
        "constant, or a cosine that falls to 0 over --iterations",
        may_change=True,
    )
    warmup: int = option(
        0,
        Number(int, 0, 2**62),
        "raise the learning rate linearly over the first N iterations",
        may_change=True,
    )
    weight_decay: float = option(
        0.01,
        NOT_NEGATIVE,
        f"decoupled weight decay; that of Muon is {MUON_WEIGHT_DECAY}",
        may_change=True,
    )
    clip_norm: float = option(
        1.0, NOT_NEGATIVE, "clip the global gradient norm at X; 0 for no clipping", may_change=True
    )

    def rate_factor(self, iteration: int, iterations: int) -> float:
        """The factor of the learning rates at an iteration, from 1 to `iterations`: a linear
        warm-up and, with the cosine schedule, half a cosine down to 0."""
        factor = min(1.0, iteration / self.warmup) if self.warmup else 1.0
        if self.lr_schedule == "cosine":
            # iteration - 1: the first rate is the full one, and the last one is above 0.
            factor *= 0.5 * (1 + math.cos(math.pi * (iteration - 1) / iterations))
        return factor


def choose_recipe(given: dict, stored: dict, iterations: int) -> dict[str, Any]:
    """The values that the recipe of a run sets; `given` and `stored` are options of `Settings`."""
    name = choose("recipe", given, stored, {"recipe": PAPER.name})
    return RECIPES[name].values_for(iterations)
