"""What --compile compiles on a GPU, traced here on the CPU, against the same code uncompiled.

The graphs run in PyTorch: generating code for them would take minutes.
"""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.utils import counters

import main
from engine.sampling import image_noise, plain_decoder, sample_recurrent
from layers.dropout import draw_keys
from models import ImageTransformer, ModelConfig

pytestmark = pytest.mark.slow
CUDA = torch.device("cuda")
COMPILE = SimpleNamespace(compile=True)
SHAPE = {"neighbours": True, "width": 5, "channels": 1}
LENGTH = 20


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """Graphs of earlier tests would make a size of this one's variable."""
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))


def make_model(**changes):
    sizes = {"n_layers": 1, "n_heads": 2, "d_query": 8, "mixtures": 3}
    return ImageTransformer(ModelConfig(LENGTH, **{**sizes, **changes}))


@pytest.mark.parametrize(
    "changes",
    [
        {"dropout": 0.2, **SHAPE},
        {"attention_type": "gated-linear"},
        {"attention_type": "gated-delta"},
        {"attention_type": "full", "attention_dropout": 0.0},
    ],
    ids=["linear", "gated-linear", "gated-delta", "full"],
)
def test_training_and_evaluation(changes):
    """main.py's loss: values and gradients, and an evaluation of another number of images."""
    model, keys = make_model(**changes).train(), draw_keys(3, "cpu")
    images = torch.randint(0, 256, (3, LENGTH), dtype=torch.uint8)
    results, nll = [], main.parallel_nll(model, COMPILE, CUDA)
    for function in (nll, model.nll):
        model.zero_grad()
        losses = function(images, keys)
        losses.sum().backward()
        results.append([losses, *(p.grad for p in model.parameters())])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(nll(images[:2]), model.nll(images[:2]))
    assert not counters["graph_break"]


def test_sampling():
    """prediction.py's step, which the CUDA graph records: the same images, from one graph."""
    model = make_model(**SHAPE).eval()
    decoder = plain_decoder(model, torch.compile(model.step))
    noise, images = image_noise(0, range(3), LENGTH), torch.zeros(2, 3, LENGTH, dtype=torch.int64)
    sample_recurrent(model, images[0], 4, noise)
    sample_recurrent(model, images[1], 4, noise, decoder=decoder)
    assert torch.equal(*images)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
