"""The native model against pytorch-fast-transformers: outputs, gradients, recurrences."""

import importlib
import sys

import pytest
import torch
from helpers import require_library
from torch.nn.functional import interpolate

import datasets
from engine.sampling import image_noise, sample_recomputing, sample_recurrent
from models import ImageTransformer, ModelConfig
from utils import UserError

pytestmark = pytest.mark.slow
SMALL = {"n_layers": 2, "n_heads": 2, "d_query": 8, "mixtures": 3, "bits": 4, "chunk_size": 8}
NO_DROPOUT = {"dropout": 0.0, "attention_dropout": 0.0}
NATIVE = ["causal-linear", "full"]
DIGIT = 64  # bytes of one of the embedded digits


@pytest.fixture(scope="module")
def reference():
    """The module under test. Without its library a test is skipped; in CI it fails."""
    require_library()
    return importlib.import_module("reference.model")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Two threads gain nothing on tiny models, and if other work shares the cores they wait for
    each other twenty times longer than they compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_config(attention_type="causal-linear", length=DIGIT, **changes):
    return ModelConfig(
        length=length, attention_type=attention_type, **{**SMALL, **NO_DROPOUT, **changes}
    )


def make_pair(reference, config, seed=0):
    """The native model and the library's, with the same weights."""
    torch.manual_seed(seed)
    native = ImageTransformer(config)
    library = reference.ReferenceTransformer(config)
    library.load_state_dict(native.state_dict())
    return native.eval(), library.eval()


def make_reference(reference, config, seed=0):
    torch.manual_seed(seed)
    return reference.ReferenceTransformer(config).eval()


def digits(n, length=DIGIT):
    """Real images (n, length), uint8: digits, enlarged to MNIST's or to CIFAR-10's shape."""
    images = datasets.load("digits", ".", True).images[:n]
    if length == DIGIT:
        return images
    side, channels = {784: (28, 1), 3072: (32, 3)}[length]
    large = interpolate(images.view(n, 1, 8, 8).float(), size=side, mode="bilinear")
    return large.byte().permute(0, 2, 3, 1).expand(-1, -1, -1, channels).flatten(1)  # (n, length)


def relative(a, b, scale=None):
    """The largest difference, relative to the largest magnitude of the first (max norms)."""
    scale = a.abs().max() if scale is None else scale
    return ((a - b).abs().max() / scale).item()


def gradient_scale(model, name):
    """The max norm of a parameter's gradient, to compare with.

    Softmax ignores what is added to all keys alike: the gradient of the key bias is zero up to
    rounding, which is compared with the gradient of the key weight instead.
    """
    if model.config.attention_type == "full" and name.endswith("key_projection.bias"):
        name = name.replace("bias", "weight")
    return model.get_parameter(name).grad.abs().max()


def test_the_missing_library_is_a_one_line_error_that_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "fast_transformers", None)
    monkeypatch.setitem(sys.modules, "fast_transformers.builders", None)
    monkeypatch.delitem(sys.modules, "reference.model", raising=False)
    with pytest.raises(UserError, match="make reference") as error:
        importlib.import_module("reference.model")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("length", [784, 3072], ids=["783 bytes", "3071 bytes"])
@pytest.mark.parametrize("attention_type", NATIVE)
def test_outputs_and_every_gradient_are_the_librarys(reference, attention_type, length):
    native, library = make_pair(reference, make_config(attention_type, length))
    images = digits(2, length)
    assert relative(native(images[:, :-1]), library(images[:, :-1])) < 1e-4
    for model in (native, library):
        (model.nll(images).mean() / (length - 1)).backward()
    for name, parameter in native.named_parameters():
        scale = gradient_scale(native, name)
        assert scale > 0, name
        assert relative(parameter.grad, library.get_parameter(name).grad, scale) < 1e-4, name


@pytest.mark.parametrize("temperature", [None, 0.7])
def test_softmax_temperature_multiplies_as_in_the_library(reference, temperature):
    """A wrong temperature, such as one that divides, would train and look almost right."""
    native, library = make_pair(reference, make_config("full", softmax_temp=temperature))
    images = digits(4)[:, :-1]
    assert relative(native(images), library(images)) < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("attention_type", NATIVE)
def test_recurrences_agree_step_by_step(reference, attention_type):
    native, library = make_pair(reference, make_config(attention_type))
    images = digits(3)
    whole = native(images[:, :-1])
    results = [model.prefill(images[:, :5]) for model in (native, library)]
    for position in range(5, DIGIT):
        for parameters, _ in results:
            assert relative(whole[:, position - 1], parameters) < 1e-4, position
        if position < DIGIT - 1:
            results = [
                (model.step(images, torch.tensor([position]), states), states)
                for model, (_, states) in zip((native, library), results, strict=True)
            ]


@pytest.mark.parametrize("attention_type", ["causal-linear", "full", "reformer"])
def test_a_seed_gives_both_backends_the_same_initial_weights(reference, attention_type):
    config = make_config(attention_type)
    library = make_reference(reference, config, seed=4).state_dict()
    torch.manual_seed(4)
    for name, weights in ImageTransformer(config).state_dict().items():
        assert torch.equal(weights, library[name]), name


@torch.no_grad()
@pytest.mark.parametrize("attention_type", NATIVE)
def test_a_prefix_is_predicted_as_in_the_whole_image(reference, attention_type):
    model = make_reference(reference, make_config(attention_type))
    images = digits(3)
    whole = model(images[:, :-1])
    for length in (1, 2, 8, 9, 33, 63):
        assert relative(whole[:, length - 1], model.predict_next(images[:, :length])) < 1e-5


@pytest.mark.parametrize("length", [63, 64], ids=["part of a chunk left over", "whole chunks"])
def test_reformer_gets_no_gradient_from_later_bytes(reference, length):
    """A byte attends neither to later bytes nor to the padding of the last chunk.

    Which of the earlier bytes it attends to does depend on the hashes of all, in the library
    as in the Reformer's paper: outputs may change with a later byte, their gradients may not.
    """
    model = make_reference(reference, make_config("reformer", length=65))
    x = torch.randn(2, length, model.config.d_model, requires_grad=True)
    model.encode_hashed(x)[:, :40].square().sum().backward()
    assert x.grad[:, :40].abs().sum(-1).min() > 0
    assert x.grad[:, 40:].abs().max() == 0


@torch.no_grad()
@pytest.mark.parametrize("chunk_size", [63, 200])
def test_the_padding_of_a_chunk_has_no_effect(reference, chunk_size):
    """If one chunk holds the image, a byte sees all earlier ones, so a prefix, padded to the chunk,
    must be predicted as in the whole image. Padding with zeros would give NaN if a query has no
    bias: the library divides by their norm."""
    model = make_reference(reference, make_config("reformer", chunk_size=chunk_size))
    for layer in model.transformer.layers:
        layer.attention.query_projection.bias.zero_()
    images = digits(3)
    whole = model(images[:, :-1])
    for length in (1, 2, 31, 62, 63):
        assert relative(whole[:, length - 1], model.predict_next(images[:, :length])) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize(
    ("flag", "value"),
    [("bits", 1), ("rounds", 1), ("chunk_size", 16), ("unmasked_reformer", 1), ("softmax_temp", 2)],
)
def test_every_reformer_flag_has_an_effect(reference, flag, value):
    """The original parsed two of them and ignored them."""
    images, usual = digits(2)[:, :-1], make_config("reformer")
    outputs = make_reference(reference, usual)(images)
    assert torch.equal(outputs, make_reference(reference, usual)(images))
    changed = make_config("reformer", **{flag: value})
    assert not torch.equal(outputs, make_reference(reference, changed)(images))


@torch.no_grad()
def test_unmasked_reformer_lets_a_byte_attend_to_itself(reference):
    """The original's flag is a store_false for "masked": it is easily inverted.

    The second byte of a masked model sees the first alone, so its own value does not matter.
    """
    from fast_transformers.masking import LengthMask

    def outputs(unmasked, value):
        config = make_config("reformer", n_layers=1, unmasked_reformer=unmasked)
        layer = make_reference(reference, config).transformer.layers[0].attention
        torch.manual_seed(0)
        x = torch.randn(1, 8, config.d_model)
        values = torch.cat([x[:, :1], torch.full_like(x[:, 1:2], value), x[:, 2:]], dim=1)
        lengths = LengthMask(torch.tensor([8]))
        return layer(x, x, values, reference.TriangularCausalMask(8), lengths, lengths)[:, 1]

    assert torch.equal(outputs(False, 1.0), outputs(False, 2.0))
    assert not torch.equal(outputs(True, 1.0), outputs(True, 2.0))


def test_the_reformer_trains(reference):
    """It shares queries and keys: only the key projection gets no gradient."""
    model = make_reference(reference, make_config("reformer", dropout=0.1)).train()
    data, losses = datasets.load("digits", ".", True), []
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for iteration in range(40):
        loss = model.nll(data.batch(iteration, 4, seed=0)).mean() / (DIGIT - 1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < sum(losses[:5]) - 0.5
    for name, parameter in model.named_parameters():
        unused = "key_projection" in name
        assert (parameter.grad is None) if unused else parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("attention_type", NATIVE)
def test_fifty_training_steps_give_the_same_losses(reference, attention_type):
    config, data = make_config(attention_type), datasets.load("digits", ".", True)
    ours, theirs = [], []
    for model, losses in zip(make_pair(reference, config), (ours, theirs), strict=True):
        optimizer = torch.optim.Adam(model.train().parameters(), lr=1e-3)
        for iteration in range(50):
            loss = model.nll(data.batch(iteration, 4, seed=0)).mean() / (DIGIT - 1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert sum(ours[-5:]) < sum(ours[:5]) - 0.5, "nothing was learned: nothing was compared"
    assert theirs == pytest.approx(ours, rel=1e-3)


def complete(model, numbers, sampler=sample_recomputing, offset=5):
    """The digits with these numbers, completed after `offset` bytes."""
    images = digits(8)[numbers].long()
    sampler(model, images, offset, image_noise(0, numbers, DIGIT))
    return images


@pytest.mark.parametrize("attention_type", NATIVE)
def test_both_backends_and_both_samplers_draw_the_same_images(reference, attention_type):
    pair = make_pair(reference, make_config(attention_type))
    samplers = sample_recomputing, sample_recurrent
    first, *others = (complete(m, [0, 1, 2], sampler) for m in pair for sampler in samplers)
    assert len(first.unique()) > 20, "constant images would be trivially equal"
    assert all(torch.equal(first, other) for other in others)


def test_the_reformer_samples_in_batches_of_any_size(reference):
    """If every call drew new hash planes, an image would depend on its batch."""
    model = make_reference(reference, make_config("reformer", dropout=0.1))
    together = complete(model, [0, 1, 2])
    assert torch.equal(together[:, :5], digits(3)[:, :5].long())
    torch.manual_seed(5)
    assert torch.equal(together, torch.cat([complete(model, [n]) for n in range(3)]))


def test_what_the_library_does_not_have_is_refused(reference):
    with pytest.raises(UserError, match=r"gated-linear.*change the backend"):
        reference.check(make_config("gated-linear"), torch.device("cpu"), "fp32", None)


def test_a_device_without_kernels_is_refused_before_it_starts(reference):
    """The library itself would fail by calling None."""
    flags = torch.device("mps"), "fp32", None
    reference.check(make_config("full"), *flags)
    with pytest.raises(UserError, match=r"--device mps.*no kernels"):
        reference.check(make_config("causal-linear"), *flags)
