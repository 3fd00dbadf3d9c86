"""The path of a GPU without one: tensors on device "cuda" that have types and shapes but no values.

They find a tensor left on the CPU, a wrong type, and an operation that waits for the GPU.
"""

from contextlib import contextmanager
from unittest.mock import patch

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from engine.optimizers import make_optimizer
from engine.recipes import Settings
from engine.sampling import (
    Batch,
    EagerDecoder,
    convert_weights,
    sample_recomputing,
    sample_recurrent,
)
from models import ImageTransformer, ModelConfig
from utils import autocast

CUDA = torch.device("cuda")
N, OFFSET = 4, 5
# Attention, and height, width and channels of images whose neighbours are read.
MODELS = {
    "linear": ("causal-linear", None),
    "linear-neighbours": ("causal-linear", (6, 5, 1)),
    "linear-colour": ("causal-linear", (4, 3, 3)),
    "gated-linear": ("gated-linear", None),
    "gated-delta": ("gated-delta", None),
    "gated-delta-colour": ("gated-delta", (4, 3, 3)),
    "full": ("full", None),
    "full-neighbours": ("full", (6, 5, 1)),
}
EVERY_MODEL = pytest.mark.parametrize("kind", MODELS)
# Operations whose result the CPU has to wait for.
WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique"}


def make_model(kind):
    attention_type, shape = MODELS[kind]
    sizes = {"attention_type": attention_type, "n_layers": 1, "n_heads": 2, "d_query": 8}
    if shape:
        sizes |= {"neighbours": True, "width": shape[1], "channels": shape[2]}
    return ImageTransformer(ModelConfig(36 if kind == "linear-colour" else 30, **sizes)).eval()


@contextmanager
def fake_cuda(model):
    """A context of tensors without values and of bfloat16 autocast as on a GPU. Moves to "cuda"
    what `model.to` would move; whatever else the model holds stays on the CPU."""
    gpu = [
        patch("torch.cuda.amp.common.amp_definitely_not_available", lambda: False),
        patch("torch.cuda.is_bf16_supported", lambda: True),
    ]
    with gpu[0], gpu[1], FakeTensorMode(), autocast(CUDA, "bf16"):
        for module in model.modules():
            for name, value in module.named_parameters(recurse=False):
                module._parameters[name] = nn.Parameter(on_cuda(value))
            for name, value in module.named_buffers(recurse=False):
                module._buffers[name] = on_cuda(value)
        yield


def on_cuda(tensor):
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=CUDA)


class OnTheGpuAlone(TorchDispatchMode):
    """Fails at an operation that reads or writes a tensor on the CPU, or that waits for the GPU;
    `types` has the types of each operation's tensors."""

    def __init__(self):
        super().__init__()
        self.types = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        tensors = [x for x in tree_leaves((args, kwargs, result)) if torch.is_tensor(x)]
        assert name not in WAITING, f"{name} waits for the GPU"
        assert all(x.device.type == "cuda" for x in tensors), f"{name} has a tensor on the CPU"
        masks = name.startswith("index") and any(x.dtype == torch.bool for x in tensors[1:])
        assert not masks, f"{name} waits for the GPU to count a mask"
        self.types.setdefault(name, set()).update(x.dtype for x in tensors)
        return result


def make_images(model):
    return torch.zeros(N, model.config.length, dtype=torch.uint8, device=CUDA)


def assert_product_types(types, attention_type):
    """bfloat16 in linear layers; float32 in the sums of linear attentions. (Softmax attention has a
    kernel of its own, which only a real GPU chooses.)"""
    assert types.get("mm", set()) | types.get("addmm", set()) == {torch.bfloat16}
    if attention_type != "full":
        assert types["bmm"] == {torch.float32}


@EVERY_MODEL
def test_training_loss(kind):
    """With dropout; the optimiser is the fused one."""
    model = make_model(kind).train()
    with fake_cuda(model), OnTheGpuAlone() as gpu:
        keys = torch.zeros(N, dtype=torch.int64, device=CUDA)
        losses = model.nll(make_images(model), keys)
        assert (losses.dtype, losses.shape, losses.requires_grad) == (torch.float32, (N,), True)
        assert_product_types(gpu.types, model.config.attention_type)
        for name in ("adam", "muon"):
            groups = make_optimizer(model, Settings(optimizer=name)).param_groups
            assert groups[-1]["fused"]


@EVERY_MODEL
@torch.no_grad()
def test_evaluation_and_forward_pass(kind):
    model = make_model(kind)
    with fake_cuda(model), OnTheGpuAlone() as gpu:
        losses = model.nll(make_images(model))
        assert (losses.dtype, losses.shape) == (torch.float32, (N,))
        assert_product_types(gpu.types, model.config.attention_type)
        parameters = model(make_images(model)[:, :-1])
        assert parameters.shape == (N, model.config.length - 1, 30)
        assert parameters.dtype == torch.bfloat16


def tensors_of(states):
    for state in states:
        attention = state.attention
        yield from attention if isinstance(attention, tuple) else (attention.keys, attention.values)
        if state.inputs is not None:
            yield state.inputs


@EVERY_MODEL
@pytest.mark.parametrize("at_once", [2, 100])
@torch.no_grad()
def test_prefill(kind, at_once, monkeypatch):
    """In one or several parts; the states stay float32."""
    monkeypatch.setattr("models.POSITIONS_AT_ONCE", at_once * N)
    model = make_model(kind)
    with fake_cuda(model), OnTheGpuAlone():
        parameters, states = model.prefill(make_images(model)[:, :OFFSET])
        assert parameters.shape == (N, 30)
        assert {tensor.dtype for tensor in tensors_of(states)} == {torch.float32}


def new_batch(model, position=OFFSET):
    """Images whose first OFFSET bytes are given."""
    images = make_images(model).long()
    noise = torch.zeros(*images.shape, 2, device=CUDA)
    position = torch.full((1,), position, device=CUDA)
    finite = torch.ones((), dtype=torch.bool, device=CUDA)
    return Batch(images, noise, 1.0, position, model.prefill(images[:, :OFFSET])[1], finite)


def describe(batch):
    tensors = [batch.images, batch.noise, batch.position, batch.finite, *tensors_of(batch.states)]
    return [(tensor.dtype, tensor.shape, tensor.device) for tensor in tensors]


@EVERY_MODEL
@torch.no_grad()
def test_sampled_bytes(kind):
    """With the weights as prediction.py stores them; the batch keeps its types and shapes."""
    model = make_model(kind)
    convert_weights(model, "bf16")
    with fake_cuda(model):
        batch = new_batch(model)
        before, decoder = describe(batch), EagerDecoder(model)
        with OnTheGpuAlone() as gpu:
            for _ in range(3):
                decoder.draw_next(batch)
        assert describe(batch) == before
        assert_product_types(gpu.types, model.config.attention_type)
        if model.has_constant_state:
            for state in batch.states:
                assert {sums.dtype for sums in state.attention} == {torch.float32}
                assert state.inputs is None or state.inputs.dtype == torch.bfloat16


@pytest.mark.slow
@EVERY_MODEL
@pytest.mark.parametrize("sampler", [sample_recurrent, sample_recomputing])
def test_whole_images(kind, sampler, monkeypatch):
    """The last bytes of them; without the check of finiteness, which reads a value."""
    monkeypatch.setattr(Batch, "check_finite", lambda batch: None)
    model = make_model(kind)
    with fake_cuda(model), torch.no_grad():
        images = make_images(model).long()
        sampler(model, images, images.shape[1] - 4, torch.zeros(*images.shape, 2, device=CUDA))


@torch.no_grad()
def test_autocast_keeps_no_converted_weights():
    """Regression: a CUDA graph went on reading those that the end of the context had freed; on the
    CPU they would be out of date."""
    layer, x = nn.Linear(4, 4), torch.ones(1, 4)
    with autocast(torch.device("cpu"), "bf16"):
        before = layer(x)
        layer.weight.add_(1)
        assert not torch.equal(layer(x), before)
