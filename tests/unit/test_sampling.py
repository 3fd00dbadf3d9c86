"""The samplers: equal to each other, correct at every offset, independent of batching."""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from engine import sampling
from engine.sampling import (
    GraphDecoder,
    complete_images,
    image_noise,
    sample_first_byte,
    sample_images,
    sample_recomputing,
    sample_recurrent,
)
from engine.surprisal import surprisal
from layers import mixture
from models import NATIVE_ATTENTIONS, ImageTransformer, ModelConfig
from utils import UserError

LENGTH = 30
BOTH = pytest.mark.parametrize(
    "sampler", [sample_recomputing, sample_recurrent], ids=["batched", "recurrent"]
)


@pytest.fixture(params=NATIVE_ATTENTIONS)
def model(request):
    config = ModelConfig(
        LENGTH, attention_type=request.param, n_layers=2, n_heads=2, d_query=8, mixtures=3
    )
    return ImageTransformer(config).double().eval()


def test_float64_is_sampled_in_float64(model, monkeypatch):
    """Regression: with a compiled sampler in the cache, which is of float32, it was a TypeError."""
    monkeypatch.setattr(sampling.cpu_sampler, "is_compiled", lambda *key: True)
    assert torch.equal(sample_images(model, 2), sample_images(model, 2, compile=False))


@pytest.mark.parametrize("neighbours", [False, True], ids=["plain", "neighbours"])
def test_bfloat16_is_undone(neighbours):
    """Regression: after a sampling in bfloat16 the model's weights had two types, and its next use
    in float32 was a RuntimeError or a TypeError."""
    changes = {"neighbours": True, "width": 6, "channels": 1} if neighbours else {}
    model = ImageTransformer(ModelConfig(LENGTH, n_layers=1, n_heads=2, d_query=8, **changes))
    image = torch.zeros(1, LENGTH, dtype=torch.uint8)
    images, bits = sample_images(model.eval(), 2), surprisal(model, image)
    sample_images(model, 2, precision="bf16")
    assert torch.equal(surprisal(model, image), bits)
    assert torch.equal(sample_images(model, 2), images)


@pytest.mark.parametrize("images", [torch.rand(1, LENGTH), np.zeros((1, LENGTH), np.uint8)])
def test_images_are_integers(model, images):
    """Regression: numbers from 0 to 1 were taken for bytes, and an array was an AttributeError."""
    for use in (lambda: surprisal(model, images), lambda: complete_images(model, images, 5)):
        with pytest.raises(ValueError, match="should be a tensor, uint8 or int64"):
            use()


def test_no_index_is_the_default_one(model):
    """Regression: None, the default of `complete_images`, was a TypeError."""
    assert torch.equal(sample_images(model, 2, index=None), sample_images(model, 2))


def draw(sampler, model, offset, numbers=range(5), seed=3, **kwargs):
    images = torch.full((len(numbers), LENGTH), 99)
    images[:, :offset] = torch.arange(offset) * 8
    sampler(model, images, offset, image_noise(seed, numbers, LENGTH), **kwargs)
    return images


@BOTH
@pytest.mark.parametrize("offset", [1, 7, LENGTH - 1, LENGTH])
def test_every_byte_comes_from_its_own_distribution(model, sampler, offset):
    """And the given ones stay. The original drew the last byte from the distribution of the byte
    before it."""
    images = draw(sampler, model, offset)
    assert torch.equal(images[:, :offset], (torch.arange(offset) * 8).expand(5, -1))
    noise = image_noise(3, range(5), LENGTH)
    with torch.no_grad():
        parameters = model(images[:, :-1])
    expected = mixture.sample(parameters, noise[:, 1:])
    assert torch.equal(images[:, offset:], expected[:, offset - 1 :])


def test_blocks_of_any_size_draw_the_same(model, monkeypatch):
    expected = draw(sample_recomputing, model, 4)
    for size in (1, 7, LENGTH - 5, 100):
        monkeypatch.setattr(sampling, "BLOCK", size)
        assert torch.equal(draw(sample_recurrent, model, 4), expected)


def test_a_low_temperature_draws_the_most_likely_bytes(model):
    """As the temperature goes to 0, samples become the rounded mean of the likeliest component."""
    images = [draw(sample_recurrent, model, 1, seed=s, temperature=1e-6) for s in (1, 2)]
    assert torch.equal(*images)


def test_first_bytes_follow_the_histogram():
    counts = torch.zeros(256, dtype=torch.int64)
    counts[[0, 10, 255]] = torch.tensor([500, 300, 200])
    noise = torch.from_numpy(np.linspace(0, 1, 10_001)[:-1].astype(np.float32))
    drawn = torch.bincount(sample_first_byte(counts, noise), minlength=256)
    expected = torch.tensor([5000, 3000, 2000])
    assert (drawn[[0, 10, 255]] - expected).abs().max() <= 20  # the pseudo-count shifts a few


class RecordedGraph(TorchDispatchMode):
    """Stands in for torch.cuda.CUDAGraph on the CPU: as a context it records operations, which then
    have no effect; `replay` repeats them on the same memory, whatever Python would do by then."""

    def __enter__(self):
        self.operations, self.before = [], []
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.is_mutable:
            self.before += [(x, x.clone()) for x in tree_leaves(args) if torch.is_tensor(x)]
        result = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, result))
        return result

    def __exit__(self, *exception):
        super().__exit__(*exception)
        for tensor, values in reversed(self.before):
            tensor.copy_(values)

    def replay(self):
        for func, args, kwargs, result in self.operations:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if torch.is_tensor(old) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@pytest.fixture
def recorded_graphs(monkeypatch):
    monkeypatch.setattr(torch.cuda, "CUDAGraph", RecordedGraph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: graph)


@pytest.mark.parametrize("neighbours", [False, True], ids=["plain", "neighbours"])
def test_a_graph_draws_the_same_images(neighbours, recorded_graphs):
    """Of several batches, each of which needs a graph of its own."""
    shape = {"neighbours": True, "width": 5, "channels": 1} if neighbours else {}
    model = small_model(**shape)
    decoder = GraphDecoder(model)
    for offset in (5, 12):
        expected = draw(sample_recomputing, model, offset)
        assert torch.equal(draw(sample_recurrent, model, offset, decoder=decoder), expected)
        assert decoder.drawn == LENGTH - offset


def small_model(**changes):
    sizes = {"n_layers": 2, "n_heads": 2, "d_query": 8, "mixtures": 3}
    model = ImageTransformer(ModelConfig(LENGTH, **sizes, **changes)).double().eval()
    torch.nn.init.normal_(model.predictor.weight)  # distributions that depend on the image
    return model


@pytest.mark.parametrize("sampler", [sample_recurrent, sample_recomputing])
@pytest.mark.parametrize("place", ["predictor", "transformer.layers.1.linear2"])
def test_distributions_that_are_not_finite_are_an_error(sampler, place):
    """Finite weights that are so large that activations overflow."""
    config = ModelConfig(LENGTH, n_layers=2, n_heads=2, d_query=8, mixtures=3)
    model = ImageTransformer(config).eval()
    model.get_submodule(place).weight.data.fill_(3e38)
    images = torch.zeros(2, LENGTH, dtype=torch.int64)
    with pytest.raises(UserError, match="not finite"):
        sampler(model, images, 1, image_noise(0, range(2), LENGTH))


REQUESTS = {
    "none": lambda model: sample_images(model, 0),
    "index": lambda model: sample_images(model, 2, index=[1]),
    "temperature": lambda model: sample_images(model, 2, temperature=-1),
    "batch size": lambda model: sample_images(model, 2, batch_size=0),
    "precision": lambda model: sample_images(model, 2, precision="auto"),
    "offset": lambda model: complete_images(model, torch.zeros(2, LENGTH).byte(), 0),
    "length": lambda model: complete_images(model, torch.zeros(2, LENGTH - 1).byte(), 3),
    "one image": lambda model: surprisal(model, torch.zeros(LENGTH).byte()),
    "no images": lambda model: surprisal(model, torch.zeros(0, LENGTH).byte()),
}


@pytest.mark.parametrize("request_images", REQUESTS.values(), ids=REQUESTS)
def test_what_cannot_be_drawn_is_a_value_error(request_images):
    """Regression: from Python, a temperature below 0 drew noise, a batch size below 0 drew nothing,
    an unknown precision was a KeyError, and of two numbers of images the smaller one counted; the
    others were errors of torch."""
    model = ImageTransformer(ModelConfig(LENGTH, n_layers=1, n_heads=1, d_query=8)).eval()
    with pytest.raises(ValueError, match=r"images|offset|temperature"):
        request_images(model)
