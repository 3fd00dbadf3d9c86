"""What --precision auto chooses on a CPU."""

import time
from functools import partial

import pytest
import torch

import utils
from engine import precision
from engine.precision import (
    Choices,
    fastest,
    layer_candidates,
    muon_candidates,
    sampling_candidates,
    seconds_of_calls,
)
from models import ImageTransformer, ModelConfig


def sleepers(**seconds):
    return {name: partial(time.sleep, duration) for name, duration in seconds.items()}


@pytest.mark.parametrize(
    ("usual", "other", "expected"), [(0.01, 0.005, "bf16"), (0.005, 0.01, "fp32")]
)
def test_the_faster_one_is_chosen(usual, other, expected):
    name, reason = fastest(sleepers(fp32=usual, bf16=other))
    assert name == expected
    assert "times as" in reason


@pytest.mark.parametrize("ratio", [1.05, 1.0, 0.5])
def test_noise_does_not_change_the_usual_choice(ratio, monkeypatch):
    """A difference of a few percent is no reason to round more."""
    monkeypatch.setattr(
        precision, "seconds_of_calls", lambda runs: {"fp32": ratio * 1e-3, "bf16": 1e-3}
    )
    assert fastest({})[0] == "fp32"


def test_the_first_calls_do_not_count():
    """They initialise libraries."""
    pauses = iter([0.2])
    seconds = seconds_of_calls({"fp32": lambda: time.sleep(next(pauses, 0.001)), "bf16": int})
    assert seconds["bf16"] < seconds["fp32"] < 0.1


def never():
    raise AssertionError("it was measured")


def test_what_is_given_is_not_measured():
    choices = Choices()
    assert choices.choose("training", "fp32", never) == "fp32"
    assert set(choices.stored) == {"machine"}


def test_choices_are_remembered_on_the_same_machine():
    """And one that this command has no use for is stored again."""
    first = Choices()
    made = first.choose("training", "auto", lambda: sleepers(fp32=0.003, bf16=0.001))
    second = Choices({**first.stored, "Muon": "fp32"})
    assert second.choose("training", "auto", never) == made == "bf16"
    assert second.stored == {**first.stored, "Muon": "fp32"}
    text = second.describe(torch.device("cpu"), {"training": "bf16", "evaluation": "fp32"})
    assert text.endswith("), bf16 (as before), evaluation in fp32")


@pytest.mark.parametrize("before", ["fp32", "bf16"])
def test_another_machine_measures_again_and_says_what_changes(before, caplog):
    caplog.set_level("INFO")
    choices = Choices({"machine": "of another kind", "training": before, "Muon": "fp32"})
    assert choices.choose("training", "auto", lambda: sleepers(fp32=0.003, bf16=0.001)) == "bf16"
    changes = [] if before == "bf16" else ["training: bf16 on this machine, fp32 on the one before"]
    assert caplog.messages == changes
    assert "Muon" not in choices.stored
    assert choices.stored["machine"] != "of another kind"


@pytest.mark.parametrize("attention_type", ["causal-linear", "gated-linear", "full"])
def test_measuring_changes_nothing(attention_type, monkeypatch):
    """No weight, gradient or buffer, and every candidate runs in its precision."""
    monkeypatch.setattr(utils, "has_bfloat16", lambda device: True)
    config = ModelConfig(
        20, n_layers=2, n_heads=2, d_query=8, attention_type=attention_type,
        neighbours=attention_type != "full", width=5, channels=1,
    )  # fmt: skip
    model = ImageTransformer(config).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for candidates in (
        layer_candidates(model, 3, train=True),
        layer_candidates(model, 3, train=False),
        sampling_candidates(model, 3, compile=False, steps=1),
        muon_candidates(model),
    ):
        assert set(candidates) == {"fp32", "bf16"}
        for run in candidates.values():
            run()
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert all(p.dtype == torch.float32 and p.grad is None for p in model.parameters())


def test_a_large_model_is_measured_with_fewer_positions():
    """Regression: a pass through all positions of a batch would take seconds."""
    config = ModelConfig(3072, n_layers=1, n_heads=8, d_query=32)
    model = ImageTransformer(config).eval()
    seen = []
    model.transformer.layers[0].register_forward_pre_hook(lambda layer, args: seen.append(args[0]))
    layer_candidates(model, 64, train=False)["fp32"]()
    assert 100 < seen[0][..., 0].numel() < 1000
