"""Models with Triton operations, under torch.compile too, and how the operations are compared and
measured; run by Triton's interpreter as in triton_cases.py."""

import pytest
import torch
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import interpreter
from triton_cases import TRITON, TYPES, close, make_qkv, seed  # noqa: F401

import gpu.ops
from benchmarks import gpu_kernels
from engine.sampling import plain_decoder, sample_recurrent
from gpu.ops import SIZES_OF, TritonOps
from layers.ops import PlainOps
from models import ImageTransformer, ModelConfig
from utils import UserError

ATTENTIONS = pytest.mark.parametrize("attention_type", SIZES_OF)
MODELS = pytest.mark.parametrize(
    "options",
    [{}, {"neighbours": True, "width": 8, "channels": 1}, {"attention_type": "gated-linear"}],
    ids=["linear", "neighbours", "gated"],
)


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
    """As on paper, from which docs/gpu.md has its table."""
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
