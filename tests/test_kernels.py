"""Dropout, and the compiled kernels: equal to the slow forms in outputs, states and gradients."""

import copy

import pytest
import torch

import dropout
import kernels
from attention import linear_quadratic
from compiling import load_library
from models import ImageTransformer, ModelConfig, ResidualNorm

DTYPES = pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 1e-2)]
)
THRESHOLD = round(0.1 * 2**32)


def library(size):
    return load_library(kernels.SOURCE, {"SIZE": size})[0]


def keys(n, seed=0):
    torch.manual_seed(seed)
    return dropout.draw_keys(n, "cpu").view(torch.int32).view(-1, 2)


def distance(x, y):
    return ((x.double() - y.double()).abs().max() / y.abs().max()).item()


@DTYPES
@pytest.mark.parametrize("size", [1, 6, 8, 20, 32, 64])
@pytest.mark.parametrize("length", [1, 50, 200])
def test_attention_and_its_gradients(dtype, tolerance, size, length):
    together = torch.randn(3, length, 3, 2, size).to(dtype).requires_grad_()
    exact = together.detach().double().requires_grad_()
    outputs = kernels.Attend.apply(library(size), together)
    expected = linear_quadratic(*exact.unbind(2))[0]
    assert outputs.dtype == dtype
    assert distance(outputs, expected) < tolerance
    gradient = torch.randn_like(outputs)
    outputs.backward(gradient)
    expected.backward(gradient.double())
    for x, y in zip(together.grad.unbind(2), exact.grad.unbind(2), strict=True):
        assert (x.double() - y).abs().max() < 4 * tolerance * max(1, y.abs().max())


@DTYPES
def test_states_are_handed_on(dtype, tolerance):
    """One pass over two parts is one pass over the whole."""
    together = torch.randn(2, 30, 3, 3, 8).to(dtype)
    expected, final = linear_quadratic(*together.double().unbind(2))
    state = torch.zeros(2, 3, 8, 8), torch.zeros(2, 3, 8)
    parts = [
        kernels.forward(library(8), together[:, part], *state)
        for part in (slice(0, 11), slice(11, 30))
    ]
    assert distance(torch.cat(parts, 1), expected) < tolerance
    for x, y in zip(state, final, strict=True):
        assert distance(x, y) < 2e-6


@DTYPES
@pytest.mark.parametrize("shape", [(1, 1, 2), (3, 7, 24), (2, 300, 256)])
@pytest.mark.parametrize("x_type", [torch.float32, None], ids=["float32", "same"])
def test_the_norm_of_a_sum_and_its_gradients(dtype, tolerance, shape, x_type):
    x, y = (3 * torch.randn(shape).to(t) for t in (x_type or dtype, dtype))
    module = ResidualNorm(shape[-1])
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    plain, gradient = copy.deepcopy(module).double(), torch.randn(shape).to(x.dtype)
    a, b, c, d = (z.clone().requires_grad_() for z in (x, y, x.double(), y.double()))
    outputs, expected = kernels.residual_norm(library(8), module, a, b), plain(c, d)
    assert outputs.dtype == x.dtype
    assert distance(outputs, expected) < tolerance
    outputs.backward(gradient)
    expected.backward(gradient.double())
    own = [a.grad, b.grad, *(p.grad for p in module.parameters())]
    for p, q in zip(own, [c.grad, d.grad, *(p.grad for p in plain.parameters())], strict=True):
        assert (p.double() - q).abs().max() < 4 * tolerance * max(1, q.abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (3, 7, 5), (2, 300, 100)])
def test_both_dropouts_are_one(dtype, shape):
    """To the bit, in outputs and gradients."""
    x = torch.randn(shape).to(dtype).requires_grad_()
    y = x.detach().clone().requires_grad_()
    compiled = kernels.Drop.apply(library(8), x, keys(len(x)), THRESHOLD)
    plain = dropout.drop(y, keys(len(x)), THRESHOLD)
    gradient = torch.randn_like(x)
    compiled.backward(gradient)
    plain.backward(gradient)
    assert torch.equal(compiled, plain)
    assert torch.equal(x.grad, y.grad)


@pytest.mark.parametrize("p", [0.001, 0.1, 0.5, 0.9])
def test_dropout_drops_with_its_probability(p):
    """Within four standard deviations, over all images and in every column and row."""
    keep = dropout.keep_mask(keys(64), 16384, round(p * 2**32)).double()
    deviation = (p * (1 - p)) ** 0.5
    assert abs(keep.mean() - (1 - p)) < 4 * deviation / keep.numel() ** 0.5
    for dim, n in ((0, 64), (1, 16384)):
        spread = keep.mean(dim).std() / (deviation / n**0.5)
        assert 0.7 < spread < 1.3


def test_dropped_numbers_know_nothing_of_each_other():
    """Neighbours, images, calls and shifts are uncorrelated."""
    noise = dropout.DropoutNoise()
    torch.manual_seed(0)
    noise.start(dropout.draw_keys(8, "cpu"))
    masks = [dropout.keep_mask(noise.next_keys(), 2**17, 2**31).double() for _ in range(4)]
    masks = torch.cat(masks) - 0.5  # (32, 2^17)
    others = [masks.roll(shift, 1) for shift in (1, 2, 16, 256, 1024)] + [masks.roll(1, 0)]
    for other in others:
        correlation = 4 * (masks * other).mean(1)
        assert correlation.abs().max() < 5 / 2**8.5
    together = 4 * masks @ masks.T / 2**17 - torch.eye(32)
    assert together.abs().max() < 5 / 2**8.5


def test_dropout_keeps_the_mean_and_rests_in_evaluation():
    noise = dropout.DropoutNoise()
    noise.start(dropout.draw_keys(100, "cpu"))
    layer = dropout.Dropout(0.3, noise)
    x = torch.ones(100, 1000)
    assert abs(layer(x).mean() - 1) < 0.01
    assert torch.equal(layer.eval()(x), x)


def test_noise_belongs_to_the_image():
    """However a batch is cut, its images lose the same numbers."""
    model = ImageTransformer(ModelConfig(30, n_layers=2, n_heads=2, d_query=8)).train()
    images = torch.randint(0, 256, (6, 30))
    own = dropout.draw_keys(6, "cpu")
    whole = model.nats(images, own)
    parts = [model.nats(images[part], own[part]) for part in (slice(0, 2), slice(2, 6))]
    torch.testing.assert_close(torch.cat(parts), whole)
    assert not torch.allclose(model.nats(images), whole)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_accelerated_model_is_the_same_model(precision):
    config = ModelConfig(40, n_layers=2, n_heads=2, d_query=8, mixtures=3)
    images, own = torch.randint(0, 256, (5, 40)), dropout.draw_keys(5, "cpu")
    results = []
    for accelerated in (False, True):
        torch.manual_seed(0)
        model = ImageTransformer(config).train()
        if accelerated:
            kernels.accelerate(model)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            model.nats(images, own).sum().backward()
            parameters, _ = model.eval().prefill(images[:, :20])
        results.append([parameters, *(p.grad for p in model.parameters())])
    for x, y in zip(*results, strict=True):
        assert distance(x, y) < (1e-4 if precision == "fp32" else 0.1)
