"""On a GPU: attention against float64 on the CPU, and samples against those of the CPU."""

import copy

import pytest
import torch
from helpers import DEVICE

from engine.sampling import (
    EagerDecoder,
    GraphDecoder,
    convert_weights,
    image_noise,
    sample_recomputing,
    sample_recurrent,
)
from layers.attention import LinearAttention, SoftmaxAttention, linear_chunked
from layers.gated import GatedAttention
from layers.ops import PlainOps
from models import ImageTransformer, ModelConfig
from utils import autocast

pytestmark = pytest.mark.cuda
N, L, H, E = 2, 150, 4, 32
LENGTH = 120
# The largest error, relative to the largest number of a tensor.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
TIE = 1e-4  # the error of a distribution's parameters that rounding may make
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp32", "bf16"])
# Grey images of 12 x 10, or the bytes of a sequence.
MODELS = {
    "linear": {},
    "gated-linear": {"attention_type": "gated-linear"},
    "neighbours": {"neighbours": True, "width": 10, "channels": 1},
    "full": {"attention_type": "full"},
}
EVERY_MODEL = pytest.mark.parametrize("kind", MODELS)


def assert_close(actual, expected, dtype):
    for a, e in zip(actual, expected, strict=True):
        a, e = a.double().cpu(), e.double().cpu()
        assert (a - e).abs().max() <= TOLERANCE[dtype] * e.abs().max()


def rounded(shape, dtype):
    """Random numbers that `dtype` holds, in float64, so that only arithmetic makes errors."""
    return torch.randn(shape).to(dtype).double()


def outputs_and_gradients(attention, projected, weights):
    projected = projected.detach().requires_grad_()
    outputs = attention(projected)
    return [outputs, *torch.autograd.grad((outputs * weights).sum(), projected)]


ATTENTIONS = {
    "linear": LinearAttention(PlainOps(), H),
    "gated-linear": GatedAttention(PlainOps(), H),
    "full": SoftmaxAttention(H),
}


def make_projected(kind, dtype):
    """What an attention takes: (N, L, 3HE), or (N, L, 4HE + 2H) if it is gated."""
    return rounded((N, L, H * (4 * E + 2 if kind.startswith("gated") else 3 * E)), dtype)


@DTYPES
@pytest.mark.parametrize("kind", ATTENTIONS)
def test_attention_and_its_gradients(kind, dtype):
    attention = ATTENTIONS[kind]
    projected, weights = make_projected(kind, dtype), rounded((N, L, H * E), dtype)
    expected = outputs_and_gradients(attention, projected, weights)
    there = [x.to(DEVICE, dtype) for x in (projected, weights)]
    assert_close(outputs_and_gradients(attention, *there), expected, dtype)


@DTYPES
@pytest.mark.parametrize("chunk", [None, 16, 64])
def test_sums_of_linear_attention(chunk, dtype):
    """S and Z after a part with a given state, and its outputs."""
    inputs = [rounded((N, L, H, E), dtype) for _ in range(3)]
    state = rounded((N, H, E, E), dtype), rounded((N, H, E), dtype).abs()
    outputs, sums = linear_chunked(*inputs, state)
    there = [x.to(DEVICE, dtype) for x in inputs]
    state = [x.to(DEVICE, torch.float32) for x in state]
    actual, actual_sums = linear_chunked(*there, state, chunk=chunk)
    assert {x.dtype for x in actual_sums} == {torch.float32}
    assert_close([actual, *actual_sums], [outputs, *sums], dtype)


@DTYPES
@pytest.mark.parametrize("kind", ATTENTIONS)
@torch.no_grad()
def test_prefill_and_steps(kind, dtype):
    """Outputs, and the state or the keys and values, of a prefix and then single positions."""
    attention, projected = ATTENTIONS[kind], make_projected(kind, dtype)
    results = []
    for x in (projected, projected.to(DEVICE, dtype)):
        state = attention.empty_state(N, E, L, like=x)
        parts = [attention(part, state) for part in x.split([L - 3, 1, 1, 1], dim=1)]
        kept = (state.keys, state.values) if kind == "full" else state
        results.append([torch.cat(parts, dim=1), *kept])
    assert_close(*reversed(results), dtype)


def make_model(kind):
    """A model with random weights whose distributions depend on the image."""
    config = ModelConfig(LENGTH, n_layers=2, n_heads=2, d_query=32, **MODELS[kind])
    model = ImageTransformer(config).eval()
    torch.nn.init.normal_(model.predictor.weight, std=0.1)
    return model


def draw(sampler, model, device, precision="fp32", offset=7, n=6, **options):
    """Images (n, LENGTH) on the CPU."""
    images = torch.zeros(n, LENGTH, dtype=torch.int64)
    images[:, :offset] = 30 * torch.arange(offset)
    images, noise = images.to(device), image_noise(3, range(n), LENGTH).to(device)
    with autocast(device, precision):
        sampler(model, images, offset, noise, **options)
    return images.cpu()


def explain(actual, expected, model):
    """Where an image first differs from the expected one, the byte must be a tie, which an error
    of TIE decides. Later bytes follow the earlier ones."""
    noise = image_noise(3, range(len(expected)), LENGTH)
    for image in (actual != expected).any(1).nonzero().flatten().tolist():
        at = (actual[image] != expected[image]).nonzero()[0].item()
        with torch.no_grad():
            parameters = model.double().cpu()(expected[image : image + 1, :at])[0, -1]
        assert is_tie(parameters, noise[image, at].double()), f"byte {at} of image {image}"


def is_tie(parameters, noise):
    """Whether the choice of a component, or the byte it gives, depends on a relative error of TIE
    in the parameters (3K,) of a distribution."""
    logits, means, log_scales = parameters.chunk(3)
    cumulative = logits.softmax(-1).cumsum(-1)
    if (cumulative[:-1] - noise[0]).abs().min() < TIE:
        return True
    component = (noise[0] >= cumulative[:-1]).sum()
    x = means[component] + log_scales[component].clamp(min=-7).exp() * torch.logit(noise[1])
    value = (x + 1) * 127.5
    return (value - value.floor() - 0.5).abs() < TIE * (127.5 + value.abs())


@EVERY_MODEL
@pytest.mark.parametrize("sampler", [sample_recurrent, sample_recomputing])
def test_samples_are_those_of_the_cpu(kind, sampler):
    """The same seed draws the same images, up to ties."""
    model = make_model(kind)
    expected = draw(sample_recurrent, model, torch.device("cpu"))
    actual = draw(sampler, copy.deepcopy(model).to(DEVICE), DEVICE)
    explain(actual, expected, model)
    assert (actual == expected).all(1).float().mean() >= 0.5


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs CUDA graphs")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("kind", "compiled"),
    [
        ("linear", False),
        ("gated-linear", False),
        ("neighbours", False),
        ("neighbours", True),
    ],
)
def test_a_graph_equals_the_plain_loop(kind, precision, compiled):
    """Bit for bit; for two batches, each of which has a graph of its own."""
    model = make_model(kind).to(DEVICE)
    if precision == "bf16":
        convert_weights(model, "bf16")
    torch._dynamo.reset()
    step = torch.compile(model.step) if compiled else None
    plain, graph = EagerDecoder(model, step), GraphDecoder(model, step)
    for offset in (7, 30):
        expected, actual = (
            draw(sample_recurrent, model, DEVICE, precision, offset, decoder=decoder)
            for decoder in (plain, graph)
        )
        assert torch.equal(actual, expected)
