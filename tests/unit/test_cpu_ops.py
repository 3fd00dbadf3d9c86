"""Dropout, and the compiled operations: equal to the plain ones in outputs, states, gradients."""

import copy
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from helpers import EXTREME_MIXTURES, ROOT
from loss_checks import check_loss, check_loss_of_nan
from torch import nn

from cpu.ops import CompiledOps
from layers import dropout
from layers.attention import linear_quadratic
from layers.ops import PlainOps
from models import ImageTransformer, ModelConfig

pytestmark = pytest.mark.slow
DTYPES = pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 1e-2)]
)
THRESHOLD = round(0.1 * 2**32)


PLAIN = PlainOps()


def compiled(size=8):
    """The compiled operations for heads of this size."""
    return CompiledOps(ModelConfig(30, n_heads=2, d_query=size))


def keys(n, seed=0):
    torch.manual_seed(seed)
    return dropout.draw_keys(n, "cpu").view(torch.int32).view(-1, 2)


def distance(x, y):
    return ((x.double() - y.double()).abs().max() / y.abs().max()).item()


@DTYPES
@pytest.mark.parametrize("size", [1, 6, 8, 32, 40, 64])
@pytest.mark.parametrize("length", [1, 50, 200])
def test_attention_and_its_gradients(dtype, tolerance, size, length):
    qkv = torch.randn(3, length, 3, 2, size).to(dtype).requires_grad_()
    exact = qkv.detach().double().requires_grad_()
    outputs = compiled(size).linear_attention(qkv)
    expected = linear_quadratic(*exact.unbind(2))[0]
    assert outputs.dtype == dtype
    assert distance(outputs, expected) < tolerance
    gradient = torch.randn_like(outputs)
    outputs.backward(gradient)
    expected.backward(gradient.double())
    for x, y in zip(qkv.grad.unbind(2), exact.grad.unbind(2), strict=True):
        assert (x.double() - y).abs().max() < 4 * tolerance * max(1, y.abs().max())


def test_every_feature_is_accurate():
    """To two units in the last place, and the rounding of x itself, which a CPU without fused
    multiply-adds passes on. After one position Z is phi of its key."""
    x = torch.linspace(-87, 13, 80_000).view(-1, 1, 8)  # (N, H, E)
    qkv = torch.zeros(len(x), 1, 3, 1, 8)
    qkv[:, 0, 1] = x
    Z = torch.zeros(len(x), 1, 8)
    compiled().linear_attention(qkv, (torch.zeros(len(x), 1, 8, 8), Z))
    expected = torch.where(x > 0, x.double() + 1, x.double().exp())
    assert ((Z / expected - 1).abs() < 2.4e-7 + 6e-8 * x.abs()).all()


@DTYPES
def test_two_parts_with_a_state_equal_one_pass(dtype, tolerance):
    qkv = torch.randn(2, 30, 3, 3, 8).to(dtype)
    expected, final = linear_quadratic(*qkv.double().unbind(2))
    state = torch.zeros(2, 3, 8, 8), torch.zeros(2, 3, 8)
    parts = [compiled().linear_attention(part, state) for part in qkv.split([11, 19], dim=1)]
    assert distance(torch.cat(parts, 1), expected) < tolerance
    for x, y in zip(state, final, strict=True):
        assert distance(x, y) < 2e-6


@DTYPES
@pytest.mark.parametrize("shape", [(1, 1, 2), (3, 7, 24), (2, 300, 256)])
@pytest.mark.parametrize("x_type", [torch.float32, None], ids=["float32", "same"])
@pytest.mark.parametrize("drop", [False, True], ids=["", "dropout"])
def test_the_norm_of_a_sum_and_its_gradients(dtype, tolerance, shape, x_type, drop):
    x, y = (3 * torch.randn(shape).to(t) for t in (x_type or dtype, dtype))
    module = nn.LayerNorm(shape[-1])
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    plain, gradient = copy.deepcopy(module).double(), torch.randn(shape).to(x.dtype)
    a, b, c, d = (z.clone().requires_grad_() for z in (x, y, x.double(), y.double()))
    noise = (keys(len(x)), THRESHOLD) if drop else None
    outputs = compiled().add_norm(a, b, module, noise)
    expected = PLAIN.add_norm(c, d, plain, noise)
    assert outputs.dtype == x.dtype
    assert distance(outputs, expected) < tolerance
    outputs.backward(gradient)
    expected.backward(gradient.double())
    own = [a.grad, b.grad, *(p.grad for p in module.parameters())]
    for p, q in zip(own, [c.grad, d.grad, *(p.grad for p in plain.parameters())], strict=True):
        assert (p.double() - q).abs().max() < 4 * tolerance * max(1, q.abs().max())


@DTYPES
@pytest.mark.parametrize("shape", [(1, 1, 16), (3, 70, 48), (2, 311, 96), (1, 199, 64), (3, 7, 20)])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("drop", [False, True], ids=["", "dropout"])
def test_the_feed_forward_block_and_its_gradients(
    dtype, tolerance, shape, threads, drop, monkeypatch
):
    """In a part of a tile of rows, a part of a block, and several, of which one has an odd number
    of rows; and of a width that the fused form does not take. Without gradients the outputs are the
    same, bit for bit, but for their rounding under autocast. (Inputs and weights are numbers that
    bfloat16 has: rounding them would change the signs of some hidden units.)"""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    N, _, D = shape
    layers = nn.ModuleList([nn.Linear(D, 4 * D), nn.Linear(4 * D, D), nn.LayerNorm(D)])
    for parameter in layers[2].parameters():
        torch.nn.init.normal_(parameter)
    layers.bfloat16().float()
    plain, x = copy.deepcopy(layers).double(), torch.randn(shape).bfloat16().float()
    noise = [(keys(N, seed), THRESHOLD) if drop else None for seed in (1, 2)]
    a, b, gradient = x.clone().requires_grad_(), x.double().requires_grad_(), torch.randn(shape)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        outputs = compiled().feed_forward_block(a, *layers, *noise)
        with torch.no_grad():
            again = compiled().feed_forward_block(x.to(dtype), *layers, *noise)
    expected = PLAIN.feed_forward_block(b, *plain, *noise)
    assert (outputs.dtype, again.dtype) == (torch.float32, dtype)
    assert distance(outputs, expected) < tolerance
    assert distance(again, outputs) <= (0 if dtype == torch.float32 else tolerance)
    outputs.backward(gradient)
    expected.backward(gradient.double())
    own = [a.grad, *(p.grad for p in layers.parameters())]
    for p, q in zip(own, [b.grad, *(p.grad for p in plain.parameters())], strict=True):
        assert distance(p, q) < 5 * tolerance


@torch.no_grad()
def test_the_feed_forward_block_takes_bfloat16_weights_under_autocast():
    """Regression: sampling by recomputing in bf16 ended with a TypeError, since it converts the
    weights of linear layers."""
    x, (first, second, norm) = torch.randn(2, 3, 64).bfloat16(), make_layers(8)["block"]
    with torch.autocast("cpu", torch.bfloat16):
        expected = compiled().feed_forward_block(x, first, second, norm)
        outputs = compiled().feed_forward_block(x, first.bfloat16(), second.bfloat16(), norm)
    assert distance(outputs, expected) < 1e-2


def test_without_gradients_no_hidden_units_are_kept():
    """Regression: an evaluation wrote four times as much to memory as it returned."""
    ops, block, calls = compiled(), make_layers(8)["block"], []
    call, x = ops.library.call, torch.randn(2, 3, 64)
    ops.library = SimpleNamespace(call=lambda *args: (calls.append(args), call(*args)))
    ops.feed_forward_block(x, *block)
    with torch.no_grad():
        ops.feed_forward_block(x, *block)
    assert [args[9] is None for args in calls] == [False, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 7, 5), (2, 300, 100)])
@pytest.mark.parametrize("activation", [None, "relu"])
def test_both_dropouts_are_equal(dtype, shape, activation):
    """In outputs and gradients, after a product with the identity. (The compiled relu multiplies
    negative numbers by 1e-30.)"""
    layer = nn.Linear(shape[-1], shape[-1]).to(dtype)
    nn.init.eye_(layer.weight)
    nn.init.zeros_(layer.bias)
    x, gradient, results = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype), []
    for ops in (compiled(), PLAIN):
        y = x.clone().requires_grad_()
        outputs = ops.linear(y, layer, activation=activation, noise=(keys(len(x)), THRESHOLD))
        results.append([outputs, *torch.autograd.grad(outputs, y, gradient)])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-20)


@pytest.mark.parametrize("p", [0.001, 0.1, 0.5, 0.9])
def test_dropout_drops_with_its_probability(p):
    """Within four standard deviations, over all images and in every column and row."""
    keep = dropout.keep_mask(keys(64), 16384, round(p * 2**32)).double()
    deviation = (p * (1 - p)) ** 0.5
    assert abs(keep.mean() - (1 - p)) < 4 * deviation / keep.numel() ** 0.5
    for dim, n in ((0, 64), (1, 16384)):
        spread = keep.mean(dim).std() / (deviation / n**0.5)
        assert 0.7 < spread < 1.3


def test_dropout_masks_are_uncorrelated():
    """Between neighbouring elements, images, calls and shifts."""
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


def test_dropout_keeps_the_mean_and_is_off_in_evaluation():
    noise = dropout.DropoutNoise()
    noise.start(dropout.draw_keys(100, "cpu"))
    layer = dropout.Dropout(0.3, noise)
    assert abs(PLAIN.dropout(torch.ones(100, 1000), *layer()).mean() - 1) < 0.01
    assert layer.eval()() is None


def test_dropout_does_not_depend_on_the_batch():
    """However a batch is split, the same elements of its images are dropped."""
    model = ImageTransformer(ModelConfig(30, n_layers=2, n_heads=2, d_query=8)).train()
    images = torch.randint(0, 256, (6, 30))
    own = dropout.draw_keys(6, "cpu")
    whole = model.nll(images, own)
    parts = [model.nll(images[part], own[part]) for part in (slice(0, 2), slice(2, 6))]
    torch.testing.assert_close(torch.cat(parts), whole)
    assert not torch.allclose(model.nll(images), whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", EXTREME_MIXTURES)
def test_the_loss_and_its_gradients(kind, dtype):
    check_loss(compiled(), kind, dtype)


@pytest.mark.parametrize("what", [0, 1, 2], ids=["logit", "mean", "log-scale"])
@pytest.mark.parametrize("K", [1, 3, 10, 40])
def test_the_loss_of_nan(K, what):
    check_loss_of_nan(compiled(), K, what)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_compiled_model_is_the_same_model(precision):
    config = ModelConfig(40, n_layers=2, n_heads=2, d_query=8, mixtures=3)
    images, own = torch.randint(0, 256, (5, 40)), dropout.draw_keys(5, "cpu")
    results = []
    for ops in (PLAIN, CompiledOps(config)):
        torch.manual_seed(0)
        model = ImageTransformer(config, ops).train()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            model.nll(images, own).sum().backward()
            parameters, _ = model.eval().prefill(images[:, :20])
        results.append([parameters, *(p.grad for p in model.parameters())])
    for x, y in zip(*results, strict=True):
        assert distance(x, y) < (1e-4 if precision == "fp32" else 0.1)


def permuted(x):
    """The same values with the first two dimensions exchanged in memory."""
    return x.transpose(0, 1).contiguous().transpose(0, 1)


WIDTH = 2 * (4 * 8 + 2)  # two heads of 8, with their gates
OPERATIONS = {
    "linear": lambda ops, x, layers: ops.linear(x, *layers["linear"]),
    "relu": lambda ops, x, layers: ops.linear(x, layers["linear"][0], activation="relu"),
    "add_norm": lambda ops, x, layers: ops.add_norm(x, x, layers["norm"]),
    "relu with dropout": lambda ops, x, layers: ops.linear(
        x, layers["linear"][0], activation="relu", noise=(keys(len(x)), THRESHOLD)
    ),
    "add_norm with dropout": lambda ops, x, layers: ops.add_norm(
        x, x, layers["norm"], (keys(len(x)), THRESHOLD)
    ),
    "feed_forward_block": lambda ops, x, layers: ops.feed_forward_block(
        x[..., :64], *layers["block"]
    ),
    "linear_attention": lambda ops, x, layers: ops.linear_attention(
        x[..., :48].unflatten(-1, (3, 2, -1))
    ),
    "gated_attention": lambda ops, x, layers: ops.gated_attention(x, 2),
    "log_prob": lambda ops, x, layers: ops.log_prob(
        x[..., :66], torch.arange(x.shape[1]).expand(x.shape[:2])
    ),
}
EVERY_OPERATION = pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)


def make_layers(width, dtype=torch.float32):
    torch.manual_seed(1)
    layers = {
        "linear": nn.ModuleList(nn.Linear(width, 5) for _ in range(3)),
        "norm": nn.LayerNorm(width),
        "block": nn.ModuleList([nn.Linear(64, 256), nn.Linear(256, 64), nn.LayerNorm(64)]),
    }
    return nn.ModuleDict(layers).to(dtype)


@EVERY_OPERATION
@pytest.mark.parametrize("permute_gradient", [False, True], ids=["gradient", "permuted-gradient"])
def test_tensors_that_are_not_contiguous_give_correct_results(operation, permute_gradient):
    """The C++ functions read consecutive rows, whatever the strides of a tensor are."""
    x, layers = torch.randn(4, 9, WIDTH), make_layers(WIDTH)
    results = []
    for ops, y in ((PLAIN, x), (compiled(), permuted(x))):
        y = y.detach().requires_grad_()
        outputs = operation(ops, y, layers)
        gradient = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(2))
        outputs.backward(permuted(gradient) if permute_gradient else gradient)
        results.append([outputs, y.grad])
    assert not y.is_contiguous()
    for expected, actual in zip(*results, strict=True):
        assert distance(actual, expected) < 2e-6


def test_keys_that_are_not_contiguous_give_the_right_mask():
    """The C++ function would read keys of other images."""
    x, layer, norm = torch.randn(6, 3, 50), nn.Linear(50, 50), nn.LayerNorm(50)
    both = [(own, THRESHOLD) for own in (keys(6), permuted(keys(6)))]
    rows = [compiled().linear(x, layer, activation="relu", noise=noise) for noise in both]
    assert torch.equal(*rows)
    assert torch.equal(*(compiled().add_norm(x, x, norm, noise) for noise in both))


def test_a_state_that_is_not_contiguous_is_refused():
    """It is updated in place: the update of a contiguous copy would be lost."""
    S, Z = torch.zeros(2, 3, 8, 8), torch.zeros(2, 3, 8)
    for state in ((permuted(S), Z), (S, permuted(Z))):
        with pytest.raises(TypeError, match="contiguous"):
            compiled().linear_attention(torch.randn(2, 5, 3, 3, 8), state)


UNREADABLE = pytest.mark.parametrize(
    ("target", "word"),
    [(torch.float64, "float64"), (torch.float16, "float16"), (torch.device("meta"), "meta")],
    ids=["float64", "float16", "meta"],
)


@EVERY_OPERATION
@UNREADABLE
def test_tensors_of_another_type_or_device_are_a_type_error(operation, target, word):
    """Regression: the C++ functions read float64 as float32, and crashed on the address of a tensor
    on another device."""
    with pytest.raises(TypeError, match=word):
        operation(compiled(), torch.randn(2, 5, WIDTH).to(target), make_layers(WIDTH))


@pytest.mark.parametrize("name", ["linear", "relu", "add_norm", "feed_forward_block"])
@UNREADABLE
def test_parameters_of_another_type_or_device_are_a_type_error(name, target, word):
    """Regression: only the type of the inputs was checked."""
    with pytest.raises(TypeError, match=word):
        OPERATIONS[name](compiled(), torch.randn(2, 5, WIDTH), make_layers(WIDTH).to(target))


@UNREADABLE
def test_states_and_keys_of_another_type_or_device_are_a_type_error(target, word):
    """Regression: only the type of the inputs was checked."""
    S, Z = torch.zeros(2, 3, 8, 8), torch.zeros(2, 3, 8)
    for state in ((S.to(target), Z), (S, Z.to(target))):
        with pytest.raises(TypeError, match=word):
            compiled().linear_attention(torch.randn(2, 5, 3, 3, 8), state)
    x, norm, noise = torch.randn(2, 3, 5), nn.LayerNorm(5), (keys(2).to(target), THRESHOLD)
    with pytest.raises(TypeError, match=word):
        compiled().add_norm(x, x, norm, noise)
    with pytest.raises(TypeError, match=word):
        compiled().linear(x, nn.Linear(5, 5), activation="relu", noise=noise)


def with_nan(x, dtype=torch.float32):
    """x with one NaN that all bits of the mantissa make: rounding must not carry it over to 0."""
    x = x.clone()
    x.view(-1)[3] = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)
    return x.to(dtype)


NAN_OPERATIONS = {**OPERATIONS, "short_convolution": lambda ops, x, layers: ops.short_convolution(
    x, torch.ones(2, WIDTH), (1, 2))}  # fmt: skip


@pytest.mark.parametrize("operation", NAN_OPERATIONS.values(), ids=NAN_OPERATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_stays_nan(operation, dtype):
    """Regression: a NaN in queries or keys, before oneDNN's relu, or stored in bfloat16 became a
    finite number."""
    layers = make_layers(WIDTH)
    layers["linear"].to(dtype)
    x = with_nan(torch.randn(2, 9, WIDTH), dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        outputs = operation(compiled(), x, layers)
    assert outputs[0].isnan().any()
    assert not outputs[1].isnan().any()


def test_a_nan_is_stored_in_bfloat16():
    """Regression: NaN plus the rounding overflowed to -0. (The norm's input is float32.)"""
    x = with_nan(torch.randn(2, 3, WIDTH))
    outputs = compiled().add_norm(
        x, torch.zeros(2, 3, WIDTH).bfloat16(), make_layers(WIDTH)["norm"]
    )
    assert outputs[0, 0].isnan().all()
    qkv = with_nan(torch.randn(1, 4, 3, 2, 8), torch.bfloat16)
    assert compiled().linear_attention(qkv)[0, 0, 0].isnan().all()


@pytest.mark.parametrize("ops", [PLAIN, None], ids=["plain", "compiled"])
def test_dropout_keeps_nan(ops):
    """As nn.Dropout: a dropped NaN is 0 * NaN."""
    x, noise, ops = torch.full((2, 3, 50), torch.nan), (keys(2), THRESHOLD), ops or compiled()
    assert ops.linear(x, nn.Linear(50, 50), activation="relu", noise=noise).isnan().all()
    assert ops.add_norm(torch.zeros(2, 3, 50), x, nn.LayerNorm(50), noise).isnan().all()


REFUSED = {
    "keys": lambda ops: ops.add_norm(
        *torch.randn(2, 3, 4, 8), nn.LayerNorm(8), (keys(2), THRESHOLD)
    ),
    "keys of relu": lambda ops: ops.linear(
        torch.randn(3, 4, 8), nn.Linear(8, 8), activation="relu", noise=(keys(2), THRESHOLD)
    ),
    "keys of hidden units": lambda ops: ops.feed_forward_block(
        torch.randn(3, 4, 64), *make_layers(8)["block"], (keys(2), THRESHOLD)
    ),
    "norm": lambda ops: ops.add_norm(*torch.randn(2, 3, 4, 8), nn.LayerNorm(4)),
    "offsets": lambda ops: ops.short_convolution(torch.randn(2, 5, 8), torch.ones(1, 8), (-3,)),
    "taps": lambda ops: ops.short_convolution(torch.randn(2, 5, 8), torch.ones(2, 8), (1,)),
    "qkv": lambda ops: ops.linear_attention(torch.randn(2, 5, 2, 2, 8)),
    "size": lambda ops: ops.linear_attention(torch.randn(2, 5, 3, 2, 9)),
    "bytes": lambda ops: ops.log_prob(torch.randn(2, 5, 30), torch.zeros(2, 4).byte()),
    "gates": lambda ops: ops.gated_attention(torch.randn(2, 5, 64), 2),
    "state": lambda ops: ops.gated_attention(torch.randn(2, 5, 68), 2, (torch.zeros(2, 2, 8, 7),)),
}


@pytest.mark.parametrize("operation", REFUSED.values(), ids=REFUSED)
def test_shapes_that_would_be_misread_are_a_value_error(operation):
    """Regression: keys of fewer images, among others, were read beyond their end."""
    with pytest.raises(ValueError, match=r"should be|compiled for|later positions"):
        operation(compiled())


def test_large_heads_work_with_small_stacks():
    """Regression: three matrices of a head were on the stack: a head of 900 crashed, and one of
    256 where threads have 512 kB."""
    command = ["ulimit -s 512; exec", sys.executable, ROOT / "main.py", "--dataset", "digits"]
    command += ["--n_layers", 1, "--n_heads", 1, "--d_query", 1024, "--iterations", 1]
    command += ["--batch_size", 1, "--evaluate_images", 1, "--device", "cpu", "--compile"]
    done = subprocess.run(" ".join(map(str, command)), shell=True, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
