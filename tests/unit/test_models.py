"""The model: parameter names, equality of its parallel and recurrent forms, learning."""

import math

import pytest
import torch

import datasets
import models
from layers import mixture
from models import NATIVE_ATTENTIONS, ImageTransformer, ModelConfig

ATTENTIONS = pytest.mark.parametrize("attention_type", NATIVE_ATTENTIONS)


def make_model(length=40, dtype=torch.float64, **kwargs):
    config = ModelConfig(length, **{"n_layers": 3, "n_heads": 2, "d_query": 6, **kwargs})
    return ImageTransformer(config).to(dtype).eval()


def make_images(n=3, length=40):
    return torch.randint(0, 256, (n, length))


def test_state_has_the_names_and_shapes_of_the_original():
    model = ImageTransformer(ModelConfig(784, n_layers=2, n_heads=8, mixtures=10))
    expected = {
        "pos_embedding.pe": (1, 783, 128),
        "value_embedding.weight": (256, 128),
        "transformer.norm.weight": (256,),
        "transformer.norm.bias": (256,),
        "predictor.weight": (30, 256),
        "predictor.bias": (30,),
    }
    for i in range(2):
        layer = f"transformer.layers.{i}"
        for name in ("query", "key", "value", "out"):
            expected[f"{layer}.attention.{name}_projection.weight"] = (256, 256)
            expected[f"{layer}.attention.{name}_projection.bias"] = (256,)
        expected[f"{layer}.linear1.weight"] = (1024, 256)
        expected[f"{layer}.linear1.bias"] = (1024,)
        expected[f"{layer}.linear2.weight"] = (256, 1024)
        expected[f"{layer}.linear2.bias"] = (256,)
        for norm in ("norm1", "norm2"):
            expected[f"{layer}.{norm}.weight"] = (256,)
            expected[f"{layer}.{norm}.bias"] = (256,)
    assert {name: tuple(x.shape) for name, x in model.state_dict().items()} == expected


def test_gated_weights_do_not_load_in_the_originals_model():
    """Not even with strict=False, with which the original loads: further entries alone would be
    ignored, and the weights then be used with another attention."""
    gated, original = (make_model(attention_type=x) for x in ("gated-linear", "causal-linear"))
    with pytest.raises(RuntimeError, match="value_projection"):
        original.load_state_dict(gated.state_dict(), strict=False)


def test_the_configuration_gives_the_number_of_parameters():
    for config, millions in (
        (ModelConfig(784, n_layers=8, n_heads=8), 6.36),  # the paper's
        (ModelConfig(20, n_layers=3, n_heads=2, d_query=6, mixtures=5), 0.01),
        (ModelConfig(784, "gated-linear", n_layers=8, n_heads=8), 6.92),
    ):
        size = sum(p.numel() for p in ImageTransformer(config).parameters())
        assert (config.n_parameters, round(size / 1e6, 2)) == (size, millions)


def test_positions_are_sinusoids():
    table = ImageTransformer(ModelConfig(50, n_heads=2, d_query=8)).pos_embedding.pe
    for position in (0, 1, 48):
        for channel in range(8):
            angle = position / 10000 ** (channel // 2 * 2 / 8)
            expected = math.cos(angle) if channel % 2 else math.sin(angle)
            assert math.isclose(table[0, position, channel], expected, abs_tol=1e-6)


@ATTENTIONS
def test_recurrence_equals_the_parallel_model_over_a_whole_image(attention_type):
    model, images = make_model(attention_type=attention_type), make_images()
    expected = model(images[:, :-1])
    states = model.empty_states(len(images))
    steps = [model.step(images, torch.tensor([i]), states) for i in range(39)]
    torch.testing.assert_close(torch.stack(steps, 1), expected, rtol=1e-10, atol=1e-10)


@ATTENTIONS
@pytest.mark.parametrize("at_once", [1, 7, 10**6])
@pytest.mark.parametrize("prefix", [1, 2, 17, 39])
def test_prefill_and_predict_equal_the_parallel_model(attention_type, prefix, at_once, monkeypatch):
    """For any number of positions at once; the states continue correctly."""
    monkeypatch.setattr(models, "POSITIONS_AT_ONCE", at_once)
    model, images = make_model(attention_type=attention_type), make_images()
    expected = model(images[:, :-1])
    parameters, states = model.prefill(images[:, :prefix])
    torch.testing.assert_close(parameters, expected[:, prefix - 1], rtol=1e-10, atol=1e-10)
    parameters = model.predict_next(images[:, :prefix])
    torch.testing.assert_close(parameters, expected[:, prefix - 1], rtol=1e-10, atol=1e-10)
    if prefix < 39:
        parameters = model.step(images, torch.tensor([prefix]), states)
        torch.testing.assert_close(parameters, expected[:, prefix], rtol=1e-10, atol=1e-10)


@ATTENTIONS
def test_a_byte_changes_no_earlier_prediction(attention_type):
    model, images = make_model(attention_type=attention_type), make_images()
    changed = images.clone()
    changed[:, 20] = (changed[:, 20] + 128) % 256
    before, after = model(images[:, :-1]), model(changed[:, :-1])
    assert torch.equal(before[:, :20], after[:, :20])
    assert not torch.allclose(before[:, 20:], after[:, 20:])


def test_the_loss_sums_over_all_bytes_but_the_first():
    model, images = make_model(), make_images()
    log_probs = mixture.probabilities(model(images[:, :-1])).log()
    expected = -log_probs.gather(-1, images[:, 1:, None]).sum((1, 2))
    torch.testing.assert_close(model.nll(images), expected)


@pytest.mark.slow
@ATTENTIONS
def test_a_tiny_model_overfits_one_batch(attention_type):
    """From 8 bits to few: gradients flow through every part of the model and the loss.

    The final loss depends on how a CPU rounds: 0.6 to 0.8 bits in six runs.
    """
    images = datasets.load("digits", ".", True).images[:2, :24]
    sizes = {"n_layers": 2, "n_heads": 2, "d_query": 16, "dropout": 0.0, "attention_dropout": 0.0}
    model = make_model(24, torch.float32, attention_type=attention_type, **sizes).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, 500)
    for _ in range(500):
        loss = model.nll(images).mean() / 23
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    assert loss.item() / math.log(2) < 1.5
