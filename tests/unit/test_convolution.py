"""The short convolution: where it looks, and the same results in every form."""

import pytest
import torch

from cpu.ops import CompiledOps
from layers.convolution import ShortConvolution, convolution_offsets
from layers.ops import PlainOps
from models import ModelConfig


def slow_convolution(x, weight, offsets):
    """One position and one offset after the other."""
    y = x.clone()
    for i in range(x.shape[1]):
        for offset, row in zip(offsets, weight, strict=True):
            if i >= offset:
                y[:, i] = y[:, i] + row * x[:, i - offset]
    return y


def make_inputs(offsets, dtype, positions=17):
    torch.manual_seed(0)
    x = torch.randn(3, positions, 8, dtype=dtype, requires_grad=True)
    return x, torch.randn(len(offsets), 8, requires_grad=True)


def test_grey_offsets_are_the_bytes_before_and_three_above():
    """Position p predicts byte p + 1: the byte above that is 27 positions before p in a row of 28
    pixels, and the one before p is one."""
    assert convolution_offsets(784, 28, 1) == [1, 2, 26, 27, 28]


def test_colour_offsets_keep_the_channel():
    """Byte p + 1 of a row of 32 pixels: the same channel above it is 96 bytes before."""
    offsets = convolution_offsets(3072, 32, 3)
    assert offsets == [1, 2, 3, 92, 95, 98]
    assert {(offset + 1) % 3 for offset in offsets[3:]} == {0}


@pytest.mark.parametrize("shape", [(2, 1, 1), (1, 2, 1), (1, 1, 3), (3, 1, 3), (1, 9, 1)])
def test_offsets_of_tiny_images_are_inside_them(shape):
    height, width, channels = shape
    offsets = convolution_offsets(height * width * channels, width, channels)
    assert offsets
    assert offsets == sorted(set(offsets))
    assert offsets[0] > 0
    assert offsets[-1] < max(2, height * width * channels - 1)


@pytest.mark.parametrize("offsets", [(1,), (1, 2, 5, 6, 7), (3, 16), (1, 40)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "compiled"])
def test_outputs_and_gradients_are_the_slow_ones(offsets, dtype, tolerance, compiled):
    ops = CompiledOps(ModelConfig(30, d_query=4)) if compiled else PlainOps()
    x, weight = make_inputs(offsets, dtype)
    slow = [x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()]
    y, expected = ops.short_convolution(x, weight, offsets), slow_convolution(*slow, offsets)
    assert y.dtype == dtype
    factor = torch.randn_like(expected)
    (y * factor.to(dtype)).sum().backward()
    (expected * factor.to(dtype)).sum().backward()
    for actual, right in [(y, expected), (x.grad, slow[0].grad), (weight.grad, slow[1].grad)]:
        assert (actual - right).abs().max() <= tolerance * max(1, right.abs().max())


def test_threads_do_not_change_the_gradients():
    """The gradient of the weights is a sum over images: its order is fixed."""
    ops, results = CompiledOps(ModelConfig(30, d_query=4)), []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            x, weight = make_inputs((1, 5), torch.float32)
            ops.short_convolution(x, weight, (1, 5)).square().sum().backward()
            results.append((x.grad, weight.grad))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("parts", [[17], [1] * 17, [9, 1, 7], [1, 2, 3, 11], [16, 1]])
def test_parts_of_a_sequence_give_what_the_whole_gives(parts):
    """With the last inputs as a ring, whatever the lengths of the parts."""
    module = ShortConvolution(8, (1, 4, 6), PlainOps()).double()
    x, _ = make_inputs((1,), torch.float64)
    x = x.detach()
    expected = slow_convolution(x, module.weight, module.offsets)
    recent, start, outputs = module.empty_state(3, x), 0, []
    assert recent.shape == (7, 3, 8)
    for length in parts:
        positions = torch.arange(start, start + length)
        outputs.append(module(x[:, positions], positions, recent))
        start += length
    torch.testing.assert_close(torch.cat(outputs, 1), expected, rtol=1e-12, atol=1e-12)
    for position in range(17 - 7, 17):
        assert torch.equal(recent[position % 7], x[:, position])


@pytest.mark.parametrize("change", ["rows", "float64", "weight"])
def test_tensors_that_the_compiled_form_would_misread_are_an_error(change):
    ops = CompiledOps(ModelConfig(30, d_query=4))
    x, weight = make_inputs((1, 2), torch.float32)
    if change == "rows":
        weight = weight[:1]
    elif change == "float64":
        x = x.double()
    else:
        weight = weight.bfloat16()
    with pytest.raises((TypeError, ValueError)):
        ops.short_convolution(x, weight, (1, 2))
