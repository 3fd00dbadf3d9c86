"""The settings of the optimisation: the schedule, who decides, and what a checkpoint may hold."""

import math
from dataclasses import asdict, fields
from itertools import pairwise

import pytest
import torch

from engine.recipes import RECIPES, Settings, choose_settings, is_settings
from models import ModelConfig
from utils import UserError

FAST = RECIPES["fast"][0]


def test_the_defaults_are_the_papers_recipe():
    settings, model = RECIPES["paper"]
    assert settings == Settings()
    assert (settings.recipe, settings.optimizer, settings.lr) == ("paper", "radam", 1e-4)
    assert model == {}


def test_recipes_name_themselves_and_fields_that_exist():
    for name, (settings, model) in RECIPES.items():
        assert settings.recipe == name
        assert is_settings(asdict(settings))
        assert model.keys() <= {field.name for field in fields(ModelConfig)}


def test_a_constant_rate():
    assert {Settings().rate_factor(i, 10) for i in range(1, 11)} == {1.0}


def test_a_linear_warm_up():
    """The first iteration moves already, and the last of the warm-up has the whole rate."""
    settings = Settings(warmup=4)
    factors = [settings.rate_factor(i, 100) for i in range(1, 7)]
    assert factors == [0.25, 0.5, 0.75, 1, 1, 1]


def test_the_rates_of_the_fast_recipe_fall_with_the_length_of_the_run():
    """Those of long runs were too high; what a flag or a checkpoint says stays as it is."""
    lengths = [1, 400, 1600, 13000, 10**6]
    chosen = [choose_settings({"recipe": "fast"}, {}, length) for length in lengths]
    assert [settings.muon_lr for settings in chosen] == [0.03, 0.03, 0.02, 0.011, 0.0029]
    assert [settings.lr for settings in chosen] == [0.006, 0.006, 0.004, 0.0021, 0.00058]
    given = choose_settings({"recipe": "fast", "lr": 0.5}, {}, 10**6)
    assert (given.lr, given.muon_lr) == (0.5, 0.0029)
    assert choose_settings({}, asdict(FAST), 10**6) == FAST
    assert choose_settings({}, {}, 10**6) == Settings()


@pytest.mark.parametrize("iterations", [1, 2, 10, 937500])
def test_a_cosine_falls_from_1_and_still_moves_at_the_end(iterations):
    settings = Settings(lr_schedule="cosine")
    assert settings.rate_factor(1, iterations) == 1
    last = settings.rate_factor(iterations, iterations)
    assert 0 < last <= 3 / iterations**2
    places = sorted({1 + iterations * part // 16 for part in range(16)})
    factors = [settings.rate_factor(i, iterations) for i in places]
    assert all(a > b for a, b in pairwise(factors))


def test_the_middle_of_a_cosine_is_one_half():
    assert math.isclose(Settings(lr_schedule="cosine").rate_factor(51, 100), 0.5)


def test_a_warm_up_multiplies_the_cosine():
    settings, cosine = Settings(lr_schedule="cosine", warmup=10), Settings(lr_schedule="cosine")
    for i in range(1, 101):
        expected = min(1, i / 10) * cosine.rate_factor(i, 100)
        assert math.isclose(settings.rate_factor(i, 100), expected)


def test_a_flag_comes_before_the_checkpoint_and_that_before_the_recipe():
    stored = {**asdict(FAST), "lr": 1e-3, "warmup": 7}
    settings = choose_settings({"lr": 5e-4}, stored, 1600)
    assert (settings.lr, settings.warmup, settings.muon_lr) == (5e-4, 7, FAST.muon_lr)
    assert choose_settings({}, {}, 1600) == Settings()
    assert choose_settings({"recipe": "fast"}, {}, 1600) == FAST
    assert choose_settings({"recipe": "fast", "optimizer": "adam"}, {}, 1600).optimizer == "adam"
    assert choose_settings({"lr": 1.0}, {}, 1600).lr == 1.0


def test_settings_that_are_not_stored_are_the_recipes():
    """Those of a checkpoint that knows its recipe, or only its optimiser."""
    assert choose_settings({}, {"recipe": "fast"}, 1600) == FAST
    assert choose_settings({}, {"optimizer": "adam"}, 1600) == Settings(optimizer="adam")


def test_what_a_run_began_with_may_be_repeated():
    given = {"recipe": "fast", "optimizer": "muon"}
    assert choose_settings(given, asdict(FAST), 1600) == FAST


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ({"recipe": "paper"}, "--recipe paper contradicts"),
        ({"optimizer": "adam"}, "--optimizer adam contradicts"),
        ({"optimizer": "radam"}, "--optimizer radam contradicts"),
    ],
    ids=["recipe", "adam", "radam"],
)
def test_a_run_keeps_its_recipe_and_optimiser(given, names):
    with pytest.raises(UserError, match=names):
        choose_settings(given, asdict(FAST), 1600)


@pytest.mark.parametrize("others", [{}, {"optimizer": "adam"}, {"recipe": "fast",
                                                                "optimizer": "adam"}])  # fmt: skip
def test_the_rate_of_muon_needs_muon(others):
    with pytest.raises(UserError, match="--muon_lr has no effect"):
        choose_settings({"muon_lr": 0.01, **others}, {}, 1600)
    assert choose_settings({"muon_lr": 0.01, "optimizer": "muon"}, {}, 1600).muon_lr == 0.01
    assert choose_settings({"muon_lr": 0.01}, {"optimizer": "muon"}, 1600).muon_lr == 0.01


@pytest.mark.parametrize("settings", [{}, {"lr": 1}, {"optimizer": "muon"}, {"warmup": 0}])
def test_entries_that_are_settings(settings):
    """Also without some of them, as from an earlier version."""
    assert is_settings(settings)


WRONG = [
    None, [], "paper", [("lr", 1.0)], {"unknown": 1}, {1: 1}, {"lr": "1"}, {"lr": None},
    {"lr": True}, {"lr": -1e-4}, {"lr": math.nan}, {"lr": math.inf}, {"muon_lr": -math.inf},
    {"lr": torch.ones(())}, {"lr": [1.0]}, {"muon_lr": "0.02"}, {"weight_decay": -1},
    {"weight_decay": math.nan}, {"clip_norm": -1.0}, {"clip_norm": math.nan}, {"warmup": -1},
    {"lr": 10**400}, {"warmup": 2.5}, {"warmup": 2**70},
    {"warmup": "2"}, {"warmup": math.nan}, {"recipe": "slow"}, {"recipe": None},
    {"recipe": ["fast"]}, {"recipe": {}}, {"optimizer": "sgd"}, {"optimizer": 3},
    {"optimizer": ["muon"]}, {"lr_schedule": "linear"}, {"lr_schedule": None},
    {"lr_schedule": ["cosine"]},
]  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_entries_that_are_not_settings(wrong):
    """Without an exception, whatever they are."""
    changed = {**asdict(FAST), **wrong} if isinstance(wrong, dict) else wrong
    assert not is_settings(changed)
