"""What the Triton kernels compute, run by Triton's interpreter on CPU tensors.

tests/unit/test_gpu_kernels.py runs this file in a process with TRITON_INTERPRET=1. The
interpreter rounds to bfloat16 by truncation, which doubles the errors of a GPU.
"""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import interpreter

import gpu.ops
from benchmarks import gpu_kernels
from engine.sampling import plain_decoder, sample_recurrent
from gpu.attention import LinearAttention
from gpu.ops import SIZES_OF, TritonOps
from layers.attention import linear_quadratic
from layers.dropout import draw_keys
from layers.ops import PlainOps
from models import ImageTransformer, ModelConfig
from utils import UserError

TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 0.02}
TYPES = pytest.mark.parametrize("dtype", TOLERANCES, ids=["fp32", "bf16"])
ATTENTIONS = pytest.mark.parametrize("attention_type", SIZES_OF)
MODELS = pytest.mark.parametrize(
    "options",
    [{}, {"neighbours": True, "width": 8, "channels": 1}, {"attention_type": "gated-linear"}],
    ids=["linear", "neighbours", "gated"],
)
LENGTHS = pytest.mark.parametrize("length", [1, 31, 32, 33, 100])


TRITON = TritonOps.__new__(TritonOps)  # without the comparison, which has a test


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def close(x, expected, tolerance):
    """Whether the largest difference is within the tolerance, relative to the largest number."""
    assert x.shape == expected.shape
    difference = (x.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-30)
    assert difference <= tolerance, f"{difference:.1e}"


def make_qkv(dtype, length, E=16, n_images=2):
    return torch.randn(n_images, length, 3, 2, E).to(dtype)


def make_state(E=16):
    return torch.rand(2, 2, E, E), torch.rand(2, 2, E)


def differentiate(function, *tensors):
    """Outputs and state, and the gradients of all of them, weighted, in all tensors."""
    tensors = [x.detach().clone().requires_grad_() for x in tensors]
    results = function(*tensors)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, generator=generator) for x in results]
    total = sum((x.double() * w).sum() for x, w in zip(results, weights, strict=True))
    return [*results, *torch.autograd.grad(total, tensors)]


def reference(qkv, S, Z):
    outputs, state = linear_quadratic(*qkv.unbind(2), (S, Z))
    return outputs, *state


@TYPES
@LENGTHS
def test_linear_attention(dtype, length):
    """Outputs, states and gradients, the states' included, with an earlier state."""
    tensors = make_qkv(dtype, length), *make_state()
    ours = differentiate(LinearAttention.apply, *tensors)
    expected = differentiate(reference, *(x.double() for x in tensors))
    for x, y in zip(ours, expected, strict=True):
        close(x, y, TOLERANCES[dtype])


@pytest.mark.parametrize(
    ("size", "dtype"),
    [(32, torch.float32), (32, torch.bfloat16), (48, torch.float32), (128, torch.bfloat16)],
)
def test_sizes_of_heads(size, dtype):
    tensors = (
        make_qkv(dtype, 36, size, n_images=1)[:, :, :, :1],
        *(x[:1, :1] for x in make_state(size)),
    )
    ours = differentiate(LinearAttention.apply, *tensors)
    expected = differentiate(reference, *(x.double() for x in tensors))
    for x, y in zip(ours, expected, strict=True):
        close(x, y, TOLERANCES[dtype])


@TYPES
@pytest.mark.parametrize("size", [16, 48, 128])
@torch.no_grad()
def test_steps(dtype, size):
    """The recurrence, position by position: outputs and states, changed in place."""
    qkv, (S, Z) = make_qkv(dtype, 5, size), make_state(size)
    outputs, state = linear_quadratic(*qkv.double().unbind(2), (S.double(), Z.double()))
    ours = [TRITON.linear_step(x, (S, Z)) for x in qkv.split(1, dim=1)]
    assert ours[0].dtype == dtype
    close(torch.cat(ours, 1), outputs, TOLERANCES[dtype])
    for x, y in zip((S, Z), state, strict=True):
        close(x, y, 1e-6)


@torch.no_grad()
def test_step_with_extreme_numbers():
    """As below; NaN in a value or key of one head of one image stays in its outputs and state."""
    qkv, (S, Z) = make_qkv(torch.float32, 1), make_state()
    S, Z = 0 * S, 0 * Z
    qkv[0, 0, 1], qkv[1, 0, 1, 1, 3] = -80, torch.nan
    y = TRITON.linear_step(qkv, (S, Z))
    close(Z[0], torch.full_like(Z[0], -80).double().exp(), 1e-5)
    assert y[1, 0, 1].isnan().all()
    assert S[1, 1].isnan().any()
    assert not y[1, 0, 0].isnan().any()


def test_steps_with_gradients_are_plain():
    qkv = make_qkv(torch.float32, 1).requires_grad_()
    TRITON.linear_step(qkv, make_state()).sum().backward()
    assert qkv.grad.isfinite().all()


@MODELS
@torch.no_grad()
def test_sampled_bytes_equal_the_plain_ones(options):
    """Of a small model, prefill included."""
    torch.manual_seed(2)
    plain = ImageTransformer(config(**options)).eval()
    ours = ImageTransformer(config(**options), TRITON).eval()
    ours.load_state_dict(plain.state_dict())
    images, noise = torch.randint(256, (2, 64)), torch.rand(2, 64, 2)
    drawn = []
    for model in (plain, ours):
        drawn.append(images.clone())
        sample_recurrent(model, drawn[-1], 40, noise)
    assert torch.equal(*drawn)
    assert not torch.equal(drawn[0], images)


@pytest.mark.parametrize("split", [1, 31, 32, 33, 99])
def test_split_and_resumed(split):
    """The ops object updates the state in place."""
    qkv, S, Z = make_qkv(torch.float32, 100), torch.zeros(2, 2, 16, 16), torch.zeros(2, 2, 16)
    parts = [TRITON.linear_attention(part, (S, Z)) for part in (qkv[:, :split], qkv[:, split:])]
    outputs, state = linear_quadratic(*qkv.double().unbind(2))
    for x, y in ((torch.cat(parts, 1), outputs), (S, state[0]), (Z, state[1])):
        close(x, y, 1e-6)


@TYPES
def test_keys_and_queries_down_to_minus_80(dtype):
    """The features are as small as 2e-35: none of their digits may be lost to the 1 in elu(x) + 1,
    and nothing may overflow."""
    qkv = make_qkv(dtype, 70)
    qkv[:, :, :2] = torch.linspace(-80, 1, qkv[:, :, :2].numel()).view_as(qkv[:, :, :2])
    zeros = torch.zeros(2, 2, 16, 16), torch.zeros(2, 2, 16)
    ours = differentiate(LinearAttention.apply, qkv, *zeros)
    expected = differentiate(reference, *(x.double() for x in (qkv, *zeros)))
    for x, y in zip(ours[:4], expected[:4], strict=True):
        close(x, y, 5 * TOLERANCES[dtype])
    keys = make_qkv(torch.float32, 1)
    keys[:, :, 1] = -80
    Z = LinearAttention.apply(keys, *zeros)[2]
    close(Z, torch.full_like(Z, -80).double().exp(), 1e-5)


@TYPES
@pytest.mark.parametrize("what", [0, 1, 2], ids=["query", "key", "value"])
def test_nan_stays_nan(dtype, what):
    """In the outputs from its position on (a query's: of its position), and in the gradients."""
    qkv = make_qkv(dtype, 40)
    qkv[0, 5, what, 0, 3] = torch.nan
    qkv.requires_grad_()
    outputs, _, Z = LinearAttention.apply(qkv, None, None)
    assert outputs[0, 5, 0].isnan().any()
    assert outputs[0, 35, 0].isnan().any() == (what > 0)
    assert not outputs[1].isnan().any()
    assert Z.isnan().any() == (what == 1)
    outputs.sum().backward()
    assert qkv.grad[0, 5, :, 0].isnan().any()


def test_gradient_of_the_state_alone():
    """The outputs need not take part in the loss."""
    qkv = make_qkv(torch.float32, 40).requires_grad_()
    _, S, _ = LinearAttention.apply(qkv, None, None)
    x = qkv.detach().double().requires_grad_()
    expected = torch.autograd.grad(linear_quadratic(*x.unbind(2))[1][0].square().sum(), x)[0]
    close(torch.autograd.grad(S.square().sum(), qkv)[0], expected, 1e-6)


def make_noise(n_images):
    return draw_keys(n_images, "cpu").view(torch.int32).view(-1, 2), round(0.3 * 2**32)


@pytest.mark.parametrize("noisy", [False, True], ids=["", "dropout"])
@pytest.mark.parametrize("y_type", TOLERANCES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", [(1, 1, 64), (2, 35, 24), (1, 70, 96)], ids=str)
@TYPES
def test_norm_of_a_sum(dtype, y_type, shape, noisy):
    """The gradients have the types of their tensors; the same elements are dropped."""
    noise = make_noise(shape[0]) if noisy else None
    norm = nn.LayerNorm(shape[-1])
    norm.weight.data.uniform_(), norm.bias.data.normal_()
    exact = copy.deepcopy(norm).double()
    x, y = torch.randn(shape).to(dtype), torch.randn(shape).to(y_type)

    def normalise(ops, norm, *tensors):
        tensors = [t.detach().clone().requires_grad_() for t in tensors]
        z = ops.add_norm(*tensors, norm, noise)
        return z, *torch.autograd.grad((z * z.cos()).sum(), [*tensors, *norm.parameters()])

    ours = normalise(TRITON, norm, x, y)
    expected = normalise(PlainOps(), exact, x.double(), y.double())
    assert [t.dtype for t in ours[:3]] == [dtype, dtype, y_type]
    for a, b in zip(ours, expected, strict=True):
        close(a, b, 2e-6 if a.dtype == dtype == torch.float32 else 0.05)
    assert not noisy or (ours[2][expected[2] == 0] == 0).all()


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 35, 40)], ids=str)
@TYPES
def test_relu_with_dropout(dtype, shape):
    """The elements that the plain form drops, and no others."""
    noise = make_noise(shape[0])

    def relu(ops, x):
        return [gpu.ops.relu_with_dropout(ops, x, noise)]

    x = torch.randn(shape).to(dtype)
    ours = differentiate(partial(relu, TRITON), x)
    expected = differentiate(partial(relu, PlainOps()), x.double())
    for a, b in zip(ours, expected, strict=True):
        assert a.dtype == dtype
        assert torch.equal(a == 0, b == 0)
        close(a, b, 1e-6 if dtype == torch.float32 else 0.01)


def test_nan_passes_dropout():
    x = torch.full((2, 3, 40), torch.nan)
    norm, noise = nn.LayerNorm(40), make_noise(2)
    assert gpu.ops.relu_with_dropout(TRITON, x, noise).isnan().all()
    assert TRITON.add_norm(torch.zeros_like(x), x, norm, noise).isnan().all()


# Sizes of random logits and means, and means and sizes of log-scales: below their minimum, far
# above the range of bytes, means far outside it, and one component that has all the weight.
MIXTURES = {
    "ordinary": (1, 1, -2, 1),
    "narrow": (1, 0.7, -7.5, 1),
    "very-narrow": (1, 0.7, -60, 20),
    "wide": (1, 1, 12, 2),
    "flat": (1, 1, 95, 5),
    "far": (3, 300, -4, 3),
    "one-sided": (500, 1, -3, 2),
}
BYTES = torch.tensor([0, 1, 100, 254, 255], dtype=torch.uint8)


def make_mixture(kind, n, K, dtype):
    logit_size, mean_size, log_scale, log_scale_size = MIXTURES[kind]
    logits, means, log_scales = torch.randn(3, n, len(BYTES), K)
    parts = logit_size * logits, mean_size * means, log_scale + log_scale_size * log_scales
    return torch.cat(parts, dim=-1).to(dtype)


@pytest.mark.parametrize("kind", MIXTURES)
@TYPES
def test_loss(dtype, kind):
    """Values and gradients, of the smallest and largest bytes too. A rounding error of a mean is
    1e-4 of a narrow scale."""
    parameters, values = make_mixture(kind, 7, 5, dtype), BYTES.expand(7, -1)

    def log_prob(ops, x):
        return [ops.log_prob(x, values)]

    ours = differentiate(partial(log_prob, TRITON), parameters)
    expected = differentiate(partial(log_prob, PlainOps()), parameters.double())
    assert [t.dtype for t in ours] == [torch.float32, dtype]
    assert ours[0].shape == values.shape
    tolerances = 2e-6, 3e-4 if dtype == torch.float32 else 0.01
    for a, b, tolerance in zip(ours, expected, tolerances, strict=True):
        assert ((a.double() - b).abs() <= tolerance * (1 + b.abs())).all()


@pytest.mark.parametrize("what", [0, 1, 2], ids=["logit", "mean", "log-scale"])
@pytest.mark.parametrize("K", [1, 3, 10])
def test_loss_of_nan(K, what):
    """NaN in one byte's parameters, or all of its logits minus infinity, stays there."""
    parameters = make_mixture("ordinary", 1, K, torch.float32)[0]
    parameters[1, what * K] = torch.nan
    parameters[2, :K] = -torch.inf
    parameters.requires_grad_()
    log_probs = TRITON.log_prob(parameters, BYTES)
    assert log_probs.isnan().tolist() == [False, True, True, False, False]
    log_probs.sum().backward()
    assert parameters.grad.isnan().any(1).tolist() == [False, True, True, False, False]


@pytest.mark.parametrize(
    ("shape", "offsets"),
    [((1, 1, 64), (1,)), ((2, 35, 24), (1, 3, 30)), ((1, 300, 70), (1, 3, 98))],
    ids=["1", "35", "300"],
)
@TYPES
def test_short_convolution(dtype, shape, offsets):
    def convolve(ops, x, weight):
        return [ops.short_convolution(x, weight, offsets)]

    tensors = torch.randn(shape).to(dtype), torch.randn(len(offsets), shape[-1])
    ours = differentiate(partial(convolve, TRITON), *tensors)
    expected = differentiate(partial(convolve, PlainOps()), *(t.double() for t in tensors))
    assert [t.dtype for t in ours] == [dtype, dtype, torch.float32]
    for a, b in zip(ours, expected, strict=True):
        close(a, b, TOLERANCES[dtype])


@TYPES
@torch.no_grad()
def test_convolution_steps(dtype):
    """Outputs, and the last inputs, whose rows are used again after the last."""
    offsets, weight = torch.tensor([1, 2, 5]), torch.randn(3, 70)
    ours, plain = torch.randn(2, 6, 3, 70).unbind()
    plain.copy_(ours)
    for position in range(13):
        x = torch.randn(3, 1, 70).to(dtype)
        arguments = weight, offsets, ours, torch.tensor([position])
        y = TRITON.convolution_step(x, *arguments)
        expected = PlainOps().convolution_step(x.float(), *arguments[:2], plain, arguments[3])
        assert y.dtype == dtype
        close(y, expected.double(), TOLERANCES[dtype])
        assert torch.equal(ours, plain)


@ATTENTIONS
def test_training_equals_the_plain_form(attention_type):
    """Every gradient of a model with neighbours and dropout."""
    options = {"attention_type": attention_type, "neighbours": True, "width": 4, "channels": 3}
    losses, gradients = [], []
    for ops in (PlainOps(), TRITON):
        torch.manual_seed(0)
        model = ImageTransformer(ModelConfig(24, n_layers=2, n_heads=2, d_query=16, **options), ops)
        images = torch.randint(256, (2, 24))
        losses.append(model.train().nll(images, torch.arange(2)).sum())
        losses[-1].backward()
        gradients.append({name: p.grad.double() for name, p in model.named_parameters()})
    close(losses[1].detach(), losses[0].detach().double(), 1e-5)
    for name, gradient in gradients[0].items():
        largest = gradient.abs().max().clamp(min=1e-3)
        assert (gradients[1][name] - gradient).abs().max() < 1e-4 * largest, name


def small_model(attention_type):
    """With dropout and every kernel, for images of three rows."""
    torch.manual_seed(0)
    options = {"neighbours": True, "width": 5, "channels": 1, "mixtures": 3, "dropout": 0.2}
    options["attention_type"] = attention_type
    return ImageTransformer(ModelConfig(15, n_layers=1, n_heads=2, d_query=16, **options), TRITON)


def small_loss(model, nll):
    """The loss of two images and its gradients."""
    images = torch.arange(30, dtype=torch.uint8).view(2, 15) * 8
    losses = nll(images, torch.tensor([1, -2]))
    return losses, *torch.autograd.grad(losses.sum(), list(model.parameters()))


@ATTENTIONS
def test_compiled_training(attention_type):
    """One graph, whose operators the compiler does not look into."""
    torch._dynamo.reset()
    model = small_model(attention_type).train()
    expected = small_loss(model, model.nll)
    counters.clear()
    compiled = torch.compile(model.nll, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(small_loss(model, compiled), expected)
    assert counters["stats"]["unique_graphs"] == 1


@ATTENTIONS
def test_compiled_sampling(attention_type):
    """The step that a CUDA graph records, which updates its states in place."""
    torch._dynamo.reset()
    model = small_model(attention_type).eval()
    noise, images = torch.rand(2, 15, 2), torch.zeros(2, 2, 15, dtype=torch.int64)
    sample_recurrent(model, images[0], 4, noise)
    counters.clear()
    step = torch.compile(model.step, backend="aot_eager", fullgraph=True)
    sample_recurrent(model, images[1], 4, noise, decoder=plain_decoder(model, step))
    assert torch.equal(*images)
    assert images.any()
    assert counters["stats"]["unique_graphs"] == 1


class Operators(TorchDispatchMode):
    """The operators of the kernels that are called, with copies of their first arguments."""

    def __init__(self):
        super().__init__()
        self.calls = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "image_transformers" and func not in self.calls:
            copies = [x.clone() if torch.is_tensor(x) else x for x in args]
            self.calls[func] = copies
        return func(*args, **(kwargs or {}))


def test_operators(monkeypatch):
    """What they write to is what they say they write to, and they work on fake tensors."""
    with monkeypatch.context() as patch, Operators() as operators:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        for attention_type in SIZES_OF:
            model = small_model(attention_type).train()
            small_loss(model, model.nll)
            with torch.no_grad():
                image = torch.zeros(1, 15, dtype=torch.int64)
                model.eval().step(image, torch.tensor([0]), model.empty_states(1))
    assert len(operators.calls) == 15
    for function, arguments in operators.calls.items():
        checks = "test_schema", "test_faketensor"  # the others are about gradients and compiling
        torch.library.opcheck(function, arguments, test_utils=checks)


def config(**options):
    return ModelConfig(64, **{"n_layers": 1, "n_heads": 2, "d_query": 16, **options})


@MODELS
def test_operations_that_agree_are_accepted(options):
    TritonOps(config(**options), torch.device("cpu"))


def test_other_types_are_refused():
    with pytest.raises(TypeError, match=r"not torch\.float64"):
        TRITON.linear_attention(make_qkv(torch.float64, 4))


def test_operations_that_disagree_are_refused(monkeypatch):
    """In a gradient alone."""

    class Wrong(PlainOps):
        def linear_attention(self, qkv, state=None):
            return super().linear_attention(qkv, state) + 0.01 * (qkv - qkv.detach())[:, :, 0]

    monkeypatch.setattr(gpu.ops, "PlainOps", Wrong)
    with pytest.raises(UserError, match=r"attention in torch\.float32 differs by"):
        TritonOps(config(), torch.device("cpu"))


def test_heads_of_another_size_are_refused():
    with pytest.raises(UserError, match="heads of 24"):
        TritonOps(config(d_query=24), torch.device("cpu"))


class Traffic(dict):
    """The distinct bytes that each kernel loads and stores, {kernel name: bytes}."""

    def __init__(self, monkeypatch):
        builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
        load, store = builder.create_masked_load, builder.create_masked_store
        call = executor.__call__

        def counted_load(builder, pointers, mask, *arguments):
            self.add("load", pointers, mask)
            return load(builder, pointers, mask, *arguments)

        def counted_store(builder, pointers, value, mask, *arguments):
            self.add("store", pointers, mask)
            return store(builder, pointers, value, mask, *arguments)

        def counted_call(executor, *arguments, **options):
            self.addresses = {}
            call(executor, *arguments, **options)
            count = sum(size * len(found) for (_, size), found in self.addresses.items())
            name = executor.fn.__name__
            self[name] = self.get(name, 0) + count

        monkeypatch.setattr(builder, "create_masked_load", counted_load)
        monkeypatch.setattr(builder, "create_masked_store", counted_store)
        monkeypatch.setattr(executor, "__call__", counted_call)

    def add(self, direction, pointers, mask):
        addresses = pointers.data[mask.data.astype(bool)]
        size = pointers.get_element_ty().primitive_bitwidth // 8
        self.addresses.setdefault((direction, size), set()).update(addresses.tolist())


@TYPES
def test_traffic(dtype, monkeypatch):
    """As on paper, from which docs/speed.md has its table."""
    traffic = Traffic(monkeypatch)
    for _, operation in gpu_kernels.list_operations(1, 100, 2, 16, dtype, torch.device("cpu"), 2):
        traffic.clear()
        gpu_kernels.run(operation, TRITON)
        expected = {}
        for name, count in operation.traffic.items():
            if not name.startswith("cumulative"):  # sums are torch's
                name = name.partition(",")[0]
                expected[name] = expected.get(name, 0) + count
        assert traffic.keys() == expected.keys()
        for name, count in expected.items():
            tolerance = 0.02 * (name == "weight_gradient")  # which does not need the last inputs
            assert traffic[name] == pytest.approx(count, rel=tolerance), name


def test_kernels_are_measured():
    """As `make gpu` does. Regression: the reference in float64 was given float32 parameters."""
    sizes = {"length": 20, "n_heads": 1}
    records = list(gpu_kernels.measure_kernels(sizes, 1, 2, torch.device("cpu"), 1e10, 1))
    assert len(records) == 16
    for record in records:
        errors = record["text"].partition("errors ")[2].split(", ")
        tolerance = 1e-4 if ", fp32" in record["text"] else 0.1  # relative to a few numbers
        assert all(float(error) < tolerance for error in errors), record
