"""The neighbours of the predicted byte: which they are, and the same model in every form."""

import copy

import pytest
import torch
from torch import nn

import models
from cpu.ops import CompiledOps
from cpu.sampler import CompiledDecoder
from engine.sampling import (
    Batch,
    EagerDecoder,
    image_noise,
    sample_recurrent,
)
from layers import neighbours
from layers.dropout import draw_keys
from layers.neighbours import Neighbours
from layers.ops import PlainOps
from models import NATIVE_ATTENTIONS, ImageTransformer, ModelConfig
from utils import UserError

SHAPES = {"grey": (6, 5, 1), "colour": (4, 3, 3)}  # height, width, channels
EVERY_SHAPE = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
ATTENTIONS = pytest.mark.parametrize("attention_type", NATIVE_ATTENTIONS)


def make_config(shape, **changes):
    height, width, channels = shape
    sizes = {"n_layers": 2, "n_heads": 2, "d_query": 6, "mixtures": 3, **changes}
    length = height * width * channels
    return ModelConfig(length, neighbours=True, width=width, channels=channels, **sizes)


def make_model(shape, ops=None, dtype=torch.float32, **changes):
    """A model whose predictor follows the neighbours, as a trained one's does."""
    torch.manual_seed(0)
    model = ImageTransformer(make_config(shape, **changes), ops)
    nn.init.normal_(model.predictor.weight, std=0.1)
    return model.to(dtype).eval()


def make_images(shape, n=3):
    """Random images (n, length), a third of whose bytes are background."""
    height, width, channels = shape
    images = torch.randint(0, 256, (n, height * width * channels))
    return images * (torch.rand(images.shape) < 0.7)


def places(channels):
    """(rows, columns, channel) from the predicted pixel of all that its window may hold."""
    reach = 3 if channels == 1 else 2
    rows, columns = range(-reach, 1), range(-reach, reach + 1)
    return {(y, x, c) for y in rows for x in columns for c in range(channels)}


def neighbour(byte, place, shape):
    """The byte at a place relative to a byte of an image, or -1 if there is none before it."""
    (height, width, channels), (dy, dx, channel) = shape, place
    y, x = divmod(byte // channels, width)
    other = ((y + dy) * width + x + dx) * channels + channel
    return other if 0 <= y + dy < height and 0 <= x + dx < width and other < byte else -1


@pytest.mark.parametrize("shape", [(6, 5, 1), (9, 8, 1), (1, 7, 1), (7, 1, 1), (4, 3, 3),
                                   (5, 6, 3), (1, 4, 3), (4, 1, 3), (2, 2, 3)])  # fmt: skip
def test_the_neighbours_are_the_known_bytes_of_a_window(shape):
    """All of them, each once. A weight belongs to a place relative to the predicted byte, wherever
    that is; -1 stands for what is outside of the image, or not known yet."""
    height, width, channels = shape
    length = height * width * channels
    table, window = neighbours.neighbour_table(length, width, channels), neighbours.window(channels)
    assert table.shape == (length - 1, len(window)) == (length - 1, len(set(window)))
    assert {p for b in range(length) for p in places(channels) if neighbour(b, p, shape) >= 0} <= {
        *window
    }
    for byte in range(1, length):
        expected = [neighbour(byte, place, shape) for place in window]
        assert table[byte - 1].tolist() == expected


@EVERY_SHAPE
def test_a_neighbour_is_its_value(shape):
    """In the features of the predicted byte's own channel; those of the others, and of what is
    not there, are 0."""
    images, (_, width, channels) = make_images(shape), shape
    length, window = images.shape[1], neighbours.window(channels)
    module = Neighbours(length, width, channels).double()
    features = module(images, torch.arange(length - 1))  # (N, L - 1, C * W)
    assert features.shape == (3, length - 1, module.size)
    features = features.unflatten(-1, (channels, -1))
    for byte in range(1, length):
        expected = torch.zeros(3, channels, len(window))
        for i, place in enumerate(window):
            if (other := neighbour(byte, place, shape)) >= 0:
                expected[:, byte % channels, i] = images[:, other] / 128 - 1
        assert torch.equal(features[:, byte - 1], expected.double())


@EVERY_SHAPE
@ATTENTIONS
def test_a_byte_changes_no_earlier_distribution_and_not_its_own(shape, attention_type):
    model, images = make_model(shape, attention_type=attention_type), make_images(shape)
    length = images.shape[1]
    before = model(images[:, :-1])  # row i is the distribution of byte i + 1
    for byte in range(length):
        changed = images.clone()
        changed[:, byte] = (changed[:, byte] + 100) % 256
        after = model(changed[:, :-1])
        assert torch.equal(before[:, :byte], after[:, :byte])
        if byte < length - 1:
            assert not torch.allclose(before[:, byte], after[:, byte])


def test_the_distribution_of_a_byte_follows_the_pixel_above_it():
    """And what its window holds, alone: here the predictor sees nothing else."""
    model, images = make_model(SHAPES["grey"]), make_images(SHAPES["grey"])
    with torch.no_grad():
        model.predictor.weight[:, : model.config.d_model] = 0
    changed = images.clone()
    changed[:, 12] = (changed[:, 12] + 100) % 256
    differ = (model(images[:, :-1]) != model(changed[:, :-1])).any(-1).any(0)  # (L - 1,)
    seen = {byte for byte in range(1, 30) for place in places(1)
            if neighbour(byte, place, SHAPES["grey"]) == 12}  # fmt: skip
    assert {i + 1 for i in differ.nonzero().flatten().tolist()} == seen


@EVERY_SHAPE
@ATTENTIONS
@pytest.mark.parametrize("at_once", [4, 10**6])
def test_every_prefix_equals_the_parallel_model(shape, attention_type, at_once, monkeypatch):
    """`prefill`, `predict_next` and the steps after each prefix, to rounding in float64."""
    monkeypatch.setattr(models, "POSITIONS_AT_ONCE", at_once)
    model = make_model(shape, dtype=torch.float64, attention_type=attention_type)
    images = make_images(shape)
    length = images.shape[1]
    with torch.no_grad():
        expected = model(images[:, :-1])
        for prefix in (1, 2, 7, length // 2, length - 1):
            parameters, states = model.prefill(images[:, :prefix])
            rows = [parameters]
            for position in range(prefix, length - 1):
                rows.append(model.step(images, torch.tensor([position]), states))
            actual = torch.stack(rows, 1)
            torch.testing.assert_close(actual, expected[:, prefix - 1 :], rtol=1e-10, atol=1e-10)
            parameters = model.predict_next(images[:, :prefix])
            torch.testing.assert_close(parameters, expected[:, prefix - 1], rtol=1e-10, atol=1e-10)


@pytest.mark.slow
@EVERY_SHAPE
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("bf16", 0.1)])
def test_compiled_operations_give_the_same_outputs_and_gradients(shape, precision, tolerance):
    """Of every parameter, with dropout."""
    images, keys = make_images(shape, 5), draw_keys(5, "cpu")
    results = []
    for ops in (PlainOps(), CompiledOps(make_config(shape))):
        model = make_model(shape, ops, dropout=0.2).train()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            model.nll(images, keys).sum().backward()
            with torch.no_grad():
                parameters, _ = model.eval().prefill(images[:, :20])
        gradients = {name: p.grad for name, p in model.named_parameters()}
        results.append({"prefill": parameters, **gradients})
    assert "neighbour_projection.weight" in results[0]
    for name, expected in results[0].items():
        assert expected.abs().max() > 0, name
        difference = (results[1][name].double() - expected.double()).abs().max()
        assert difference < tolerance * expected.double().abs().max(), name


def sized_model(kind, sizes):
    """Each of these takes seconds to compile, so that tests share them."""
    names = "n_layers", "n_heads", "d_query", "mixtures"
    return make_model(SHAPES[kind], **dict(zip(names, sizes, strict=True)))


# Layers, heads, size of a head, mixtures: those that fill the registers' lanes, and others.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "sizes"), [("grey", (1, 1, 4, 1)), ("colour", (2, 3, 20, 5)), ("grey", (1, 1, 64, 30))]
)
def test_the_compiled_sampler_draws_the_images_of_the_plain_one(kind, sizes):
    """Byte for byte, of one image and of many."""
    model, shape = sized_model(kind, sizes), SHAPES[kind]
    decoder = CompiledDecoder(model, "fp32")
    for n_images in (1, 37):
        expected = make_images(shape, n_images)
        images, noise = expected.clone(), image_noise(5, range(n_images), expected.shape[1])
        sample_recurrent(model, expected, 3, noise, temperature=1.3)
        sample_recurrent(model, images, 3, noise, temperature=1.3, decoder=decoder)
        assert torch.equal(images, expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "sizes", "precision", "tolerance"),
    [("grey", (1, 1, 64, 30), "fp32", 1e-5), ("colour", (2, 4, 16, 3), "bf16", 2e-2)],
    ids=["grey-fp32", "colour-bf16"],
)
def test_the_compiled_samplers_distributions_are_the_steps(kind, sizes, precision, tolerance):
    """After every byte; and so are the states in the end, when the last inputs have wrapped."""
    model, images = sized_model(kind, sizes), make_images(SHAPES[kind], 9)
    length, decoder = images.shape[1], CompiledDecoder(model, precision)
    noise, states = image_noise(0, range(9), length), model.empty_states(9)
    own = copy.deepcopy(states)
    if precision == "bf16":  # as in a model that convert_weights has rounded
        for state in own:
            state.inputs = state.inputs.bfloat16()
    for position in range(length - 1):
        with torch.no_grad():
            expected = model.step(images, torch.tensor([position]), states)
        at = torch.tensor([position])
        parameters = decoder.run(Batch(images.clone(), noise, 1.0, at, own, torch.tensor(True)), 1)
        torch.testing.assert_close(parameters, expected, rtol=tolerance, atol=tolerance)
    if precision == "fp32":
        tensors = [[x for state in each for x in state.tensors] for each in (own, states)]
        torch.testing.assert_close(*tensors, rtol=tolerance, atol=tolerance)


@pytest.mark.slow
def test_both_samplers_stop_at_a_weight_of_the_neighbours_that_is_not_finite():
    """Those of the predictor are added after the product that the compiled sampler looks at in a
    model without neighbours."""
    shape, errors = SHAPES["grey"], []
    model = sized_model("grey", (1, 1, 4, 1))
    with torch.no_grad():
        model.predictor.weight[0, -2] = torch.inf  # of (-3, 3), which only later rows have
    for decoder in (EagerDecoder(model), CompiledDecoder(model, "fp32")):
        images = make_images(shape, 2)
        noise = image_noise(0, range(2), images.shape[1])
        with pytest.raises(UserError, match="not finite") as error:
            sample_recurrent(model, images, 2, noise, decoder=decoder)
        errors.append(str(error.value))
    assert errors[0] == errors[1]


def test_a_new_models_predictor_does_not_look_at_the_neighbours_yet():
    """Its weights of them start at 0, the projection's do not: both learn."""
    model = ImageTransformer(make_config(SHAPES["grey"]))
    assert model.predictor.weight.shape == (9, 12 + model.neighbours.size)
    assert not model.predictor.weight[:, 12:].any()
    model.nll(make_images(SHAPES["grey"])).sum().backward()
    assert model.predictor.weight.grad[:, 12:].any()
    assert model.neighbour_projection.weight.grad.any()


@ATTENTIONS
def test_the_originals_loader_refuses_a_model_with_neighbours(attention_type):
    """Loudly: it loads with strict=False and swallows ValueError and KeyError, after which it
    would sample from random weights."""
    model = make_model(SHAPES["grey"], attention_type=attention_type)
    config = ModelConfig(
        30, n_layers=2, n_heads=2, d_query=6, mixtures=3, attention_type=attention_type
    )
    original = ImageTransformer(config)
    with pytest.raises(RuntimeError, match=r"size mismatch for predictor\.weight"):
        original.load_state_dict(model.state_dict(), strict=False)
