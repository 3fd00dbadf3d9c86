"""The neighbours of the predicted byte: which they are, and the same model in every form."""

import copy

import pytest
import torch
from torch import nn

import models
from cpu import sampler
from cpu.ops import CompiledOps
from cpu.sampler import CompiledDecoder
from engine.sampling import (
    Batch,
    EagerDecoder,
    image_noise,
    sample_first_byte,
    sample_recomputing,
    sample_recurrent,
)
from layers import neighbours
from layers.dropout import draw_keys
from layers.neighbours import Neighbours
from layers.ops import PlainOps
from models import ImageTransformer, ModelConfig
from prediction import store_as_bfloat16
from utils import UserError

SHAPES = {"grey": (6, 5, 1), "colour": (4, 3, 3)}  # height, width, channels
EVERY_SHAPE = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
ATTENTIONS = pytest.mark.parametrize("attention_type", ["causal-linear", "full"])


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


def slow_neighbours(byte, shape):
    """The bytes that a byte of an image may look at, by looking at every one of the image."""
    height, width, channels = shape
    reach = 3 if channels == 1 else 2
    places = [(y, x, c) for y in range(height) for x in range(width) for c in range(channels)]
    y, x, _ = places[byte]
    return {
        other
        for other, (row, column, _) in enumerate(places)
        if other < byte and y - reach <= row and abs(column - x) <= reach
    }


def row_of(table, byte):
    """The row of the table for a predicted byte: the one after the position before it."""
    return table[byte - 1].tolist()


@pytest.mark.parametrize("shape", [(6, 5, 1), (9, 8, 1), (1, 7, 1), (7, 1, 1), (4, 3, 3),
                                   (5, 6, 3), (1, 4, 3), (4, 1, 3), (2, 2, 3)])  # fmt: skip
def test_the_neighbours_are_the_known_bytes_of_a_window(shape):
    """All of them, each once, and -1 for the others: outside of the image, or not known yet."""
    height, width, channels = shape
    length = height * width * channels
    table = neighbours.neighbour_table(length, width, channels)
    assert table.shape == (length - 1, neighbours.neighbour_count(channels))
    for byte in range(1, length):
        known = [other for other in row_of(table, byte) if other >= 0]
        assert len(known) == len(set(known))
        assert set(known) == slow_neighbours(byte, shape)
        assert max(known, default=0) < byte


def test_a_column_of_the_table_is_one_direction():
    """A weight belongs to a place relative to the predicted byte, wherever that is: left, above
    left, above and above right of a grey pixel; the pixel's red and the left pixel's for colour."""
    table = neighbours.neighbour_table(56, 8, 1)
    places = neighbours.window(1)
    for byte in range(1, 56):
        row, column = divmod(byte, 8)
        expected = {
            (0, -1): byte - 1 if column else -1,
            (-1, -1): byte - 9 if row and column else -1,
            (-1, 0): byte - 8 if row else -1,
            (-1, 1): byte - 7 if row and column < 7 else -1,
            (-3, 3): byte - 21 if row > 2 and column < 5 else -1,
        }
        for (dy, dx), other in expected.items():
            assert row_of(table, byte)[places.index((dy, dx, 0))] == other, (byte, dy, dx)
    table = neighbours.neighbour_table(60, 4, 3)
    places = neighbours.window(3)
    for byte in range(1, 60):
        pixel, channel = divmod(byte, 3)
        for c in range(2):
            own = pixel * 3 + c if c < channel else -1
            assert row_of(table, byte)[places.index((0, 0, c))] == own
        for c in range(3):
            left = (pixel - 1) * 3 + c if pixel % 4 else -1
            assert row_of(table, byte)[places.index((0, -1, c))] == left


@EVERY_SHAPE
def test_a_neighbour_is_its_value(shape):
    """In the features of the predicted byte's own channel; those of the others, and of what is
    not there, are 0."""
    images, (_, width, channels) = make_images(shape), shape
    length = images.shape[1]
    module = Neighbours(length, width, channels).double()
    features = module(images, torch.arange(length - 1))  # (N, L - 1, C * W)
    assert features.shape == (3, length - 1, module.size)
    features = features.unflatten(-1, (channels, -1))
    for byte in range(1, length):
        expected = torch.zeros(3, channels, len(neighbours.window(channels)))
        for place, other in enumerate(row_of(module.table, byte)):
            if other >= 0:
                expected[:, byte % channels, place] = images[:, other] / 128 - 1
        assert torch.equal(features[:, byte - 1], expected.double())


def test_features_are_exact_in_bfloat16():
    """So that both precisions see the same bytes."""
    images = torch.arange(256).repeat(2, 1)
    module, positions = Neighbours(256, 16, 1), torch.arange(255)
    features = module(images, positions)
    assert torch.equal(features.bfloat16().float(), features)
    assert torch.equal(module.bfloat16()(images, positions).float(), features)


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
    seen = {byte for byte in range(1, 30) if 12 in slow_neighbours(byte, SHAPES["grey"])}
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
        for prefix in range(1, length):
            parameters, states = model.prefill(images[:, :prefix])
            rows = [parameters]
            for position in range(prefix, length - 1):
                rows.append(model.step(images, torch.tensor([position]), states))
            actual = torch.stack(rows, 1)
            torch.testing.assert_close(actual, expected[:, prefix - 1 :], rtol=1e-10, atol=1e-10)
            parameters = model.predict_next(images[:, :prefix])
            torch.testing.assert_close(parameters, expected[:, prefix - 1], rtol=1e-10, atol=1e-10)


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


@pytest.mark.parametrize(
    ("name", "attention_type"), [("colour", "causal-linear"), ("grey", "full")]
)
def test_torch_can_compile_training_and_steps(name, attention_type):
    """As without neighbours: whole graphs, without a break."""
    torch._dynamo.reset()  # graphs of another length would make this one's variable
    shape = SHAPES[name]
    changes = {"attention_type": attention_type, "dropout": 0.2, "attention_dropout": 0.0}
    model, images = make_model(shape, **changes).train(), make_images(shape)
    keys = draw_keys(3, "cpu")
    compiled = torch.compile(model.nll, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(images, keys), model.nll(images, keys))
    if attention_type == "causal-linear":
        model.eval()
        step = torch.compile(model.step, backend="aot_eager", fullgraph=True)
        states, own = model.empty_states(3), model.empty_states(3)
        with torch.no_grad():
            for i in range(4):
                position = torch.tensor([i])
                expected = model.step(images, position, states)
                torch.testing.assert_close(step(images, position, own), expected)


# Layers, heads, size of a head, mixtures: those that fill the registers' lanes, and others.
SIZES = [(1, 1, 4, 1), (2, 3, 20, 5), (1, 1, 64, 30)]


@EVERY_SHAPE
@pytest.mark.parametrize("sizes", SIZES, ids=lambda sizes: "x".join(map(str, sizes)))
def test_the_compiled_sampler_draws_the_images_of_the_plain_one(shape, sizes):
    """Byte for byte, of one image and of many."""
    names = "n_layers", "n_heads", "d_query", "mixtures"
    model = make_model(shape, **dict(zip(names, sizes, strict=True)))
    decoder = CompiledDecoder(model, "fp32")
    for n_images in (1, 37):
        expected = make_images(shape, n_images)
        images, noise = expected.clone(), image_noise(5, range(n_images), expected.shape[1])
        sample_recurrent(model, expected, 3, noise, temperature=1.3)
        sample_recurrent(model, images, 3, noise, temperature=1.3, decoder=decoder)
        assert torch.equal(images, expected)


def keep_inputs_in_bfloat16(states):
    """As in the states of a model that store_as_bfloat16 has rounded."""
    for state in states:
        state.inputs = state.inputs.bfloat16()


@EVERY_SHAPE
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("bf16", 2e-2)])
def test_the_compiled_samplers_distributions_are_the_steps(shape, precision, tolerance):
    """After every byte."""
    model, images = make_model(shape, n_heads=4, d_query=16), make_images(shape, 9)
    length, decoder = images.shape[1], CompiledDecoder(model, precision)
    noise, states = image_noise(0, range(9), length), model.empty_states(9)
    own = copy.deepcopy(states)
    if precision == "bf16":
        keep_inputs_in_bfloat16(own)
    for position in range(length - 1):
        with torch.no_grad():
            expected = model.step(images, torch.tensor([position]), states)
        at = torch.tensor([position])
        parameters = decoder.run(Batch(images.clone(), noise, 1.0, at, own, torch.tensor(True)), 1)
        torch.testing.assert_close(parameters, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_last_inputs_that_the_compiled_sampler_would_misread_are_a_type_error(precision):
    model, images = make_model(SHAPES["grey"]), make_images(SHAPES["grey"])
    noise, states = image_noise(0, range(3), images.shape[1]), model.empty_states(3)
    if precision == "fp32":
        keep_inputs_in_bfloat16(states)
    batch = Batch(images, noise, 1.0, torch.tensor([0]), states, torch.tensor(True))
    with pytest.raises(TypeError, match="the compiled sampler takes contiguous"):
        CompiledDecoder(model, precision)(batch, 5)


def test_a_rounded_model_keeps_its_last_inputs_in_bfloat16():
    """And its sums in float32: so the compiled sampler with bf16 reads them."""
    model = make_model(SHAPES["grey"])
    store_as_bfloat16(model)
    for state in model.empty_states(2):
        assert [x.dtype for x in state.tensors] == [torch.float32] * 2 + [torch.bfloat16]


@EVERY_SHAPE
def test_the_states_after_the_compiled_sampler_are_those_of_the_steps(shape):
    """Of attention and of the convolution, also where the last inputs have wrapped around."""
    model, images = make_model(shape), make_images(shape, 9)
    noise, states, own = (
        image_noise(0, range(9), images.shape[1]),
        *(model.empty_states(9) for _ in "ab"),
    )
    at = torch.tensor([0])
    CompiledDecoder(model, "fp32")(Batch(images, noise, 1.0, at, own, torch.tensor(True)), 25)
    with torch.no_grad():
        for position in range(25):
            model.step(images, torch.tensor([position]), states)
    for state, expected in zip(own, states, strict=True):
        assert len(state.tensors) == 3
        for tensor, right in zip(state.tensors, expected.tensors, strict=True):
            torch.testing.assert_close(tensor, right, rtol=1e-5, atol=1e-5)


@EVERY_SHAPE
def test_both_plain_samplers_draw_the_same(shape):
    """The batched one reads the whole prefix again for every byte."""
    model, images = make_model(shape), make_images(shape)
    counts = torch.bincount(images[:, 0], minlength=256)
    noise = image_noise(3, range(3), images.shape[1])
    images[:, 0] = sample_first_byte(counts, noise[:, 0, 0])
    others = images.clone()
    sample_recurrent(model, images, 1, noise)
    sample_recomputing(model, others, 1, noise)
    assert torch.equal(images, others)


def test_both_samplers_stop_at_a_weight_of_the_neighbours_that_is_not_finite():
    """Those of the predictor are added after the product that the compiled sampler looks at in a
    model without neighbours."""
    shape, errors = SHAPES["grey"], []
    model = make_model(shape)
    with torch.no_grad():
        model.predictor.weight[0, -2] = torch.inf  # of (-3, 3), which only later rows have
    for decoder in (EagerDecoder(model), CompiledDecoder(model, "fp32")):
        images = make_images(shape, 2)
        noise = image_noise(0, range(2), images.shape[1])
        with pytest.raises(UserError, match="not finite") as error:
            sample_recurrent(model, images, 2, noise, decoder=decoder)
        errors.append(str(error.value))
    assert errors[0] == errors[1]


def test_libraries_of_the_sampler_differ_by_what_they_look_at():
    """Else the one of a model without neighbours would draw for a model with them."""
    without = ModelConfig(30, n_layers=2, n_heads=2, d_query=6, mixtures=3)
    compiled = [sampler.sizes(config, "fp32") for config in
                (without, make_config(SHAPES["grey"]), make_config(SHAPES["colour"]))]  # fmt: skip
    assert len({tuple(sizes.items()) for sizes in compiled}) == 3


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


def test_the_table_is_not_in_a_checkpoint():
    """It follows from the config."""
    names = make_model(SHAPES["grey"]).state_dict().keys()
    plain = ImageTransformer(ModelConfig(30, n_layers=2, n_heads=2, d_query=6, mixtures=3))
    convolutions = {f"transformer.layers.{i}.convolution.weight" for i in range(2)}
    assert names - plain.state_dict().keys() == {"neighbour_projection.weight", *convolutions}
