"""The attention methods that are compared, and models and samplers of them."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from engine import construction
from engine.checkpoint import NO_CHECKPOINT
from engine.construction import load_model
from engine.sampling import black_images, choose_decoder, empty_batch, sample_recomputing
from layers.attention import KVCache
from layers.ops import PlainOps
from models import ImageTransformer, ModelConfig
from utils import UserError, say


@dataclass(frozen=True)
class Method:
    """One way to train and to sample."""

    attention_type: str
    backend: str = "native"
    recurrent: bool = False  # samples with a state; else the prefix is recomputed for every byte


METHODS = {
    "softmax": Method("full"),
    "softmax, KV cache": Method("full", recurrent=True),
    "linear": Method("causal-linear", recurrent=True),
    "gated linear": Method("gated-linear", recurrent=True),
    "linear (library)": Method("causal-linear", "fast-transformers", recurrent=True),
    "reformer (library)": Method("reformer", "fast-transformers"),
}


def available_methods(device: torch.device) -> list[str]:
    """The names of the methods that can run here: pytorch-fast-transformers may be missing."""
    names = list(METHODS)
    for name, method in METHODS.items():
        try:
            construction.check_backend(method.backend, make_config(name, {"length": 64}), device,
                                   "fp32", None)  # fmt: skip
        except UserError as error:
            say(f"without {name}: {error}")
            names.remove(name)
    return names


def trained_methods(names: list[str]) -> list[str]:
    """Those of the names that train differently: a KV cache is for sampling only."""
    return [name for name in names if name != "softmax, KV cache"]


def make_config(name: str, fields: dict) -> ModelConfig:
    """The ModelConfig of a method, with `fields` of the size, without any dropout: with attention
    dropout torch's CPU kernel of softmax attention stores all pairs of positions."""
    attention_type = METHODS[name].attention_type
    return ModelConfig(**fields, attention_type=attention_type, dropout=0.0, attention_dropout=0.0)


def make_model(
    name: str, fields: dict, device: torch.device, ops: PlainOps | None = None, seed: int = 0
) -> ImageTransformer:
    """A model of the method with random weights, with compiled operations where main.py and
    prediction.py use them, or with `ops`."""
    config, method = make_config(name, fields), METHODS[name]
    if method.backend == "native":
        ops = ops or construction.choose_ops(config, device, None, name)
    return load_model(
        NO_CHECKPOINT, config, device=device, backend=method.backend, ops=ops, seed=seed
    )


@dataclass
class Sampler:
    """A batch of images that one method draws.

    `draw(position, count)` draws bytes after the first `position` bytes. These are black unless
    they were drawn, and after a jump the states are not those of the bytes before it: neither
    changes the time.
    """

    draw: Callable
    images: torch.Tensor  # (N, L), int64
    states: list


def make_sampler(name: str, fields: dict, batch_size: int, device: torch.device) -> Sampler:
    """The `Sampler` of a method, with random weights."""
    if METHODS[name].recurrent:
        model = make_model(name, fields, device, PlainOps()).eval()
        batch = empty_batch(model, batch_size)
        draw = partial(draw_recurrently, choose_decoder(model, "fp32"), batch)
        return Sampler(draw, batch.images, batch.states)
    model = make_model(name, fields, device).eval()
    images, noise = black_images(batch_size, fields["length"], device)
    return Sampler(partial(draw_recomputing, model, images, noise), images, [])


def draw_recomputing(model, images, noise, position, count):
    sample_recomputing(model, images[:, : position + count], position, noise)


@torch.no_grad()
def draw_recurrently(decoder, batch, position, count):
    batch.position.fill_(position - 1)  # the next byte to read
    for state in batch.states:
        cache = getattr(state, "attention", None)
        if isinstance(cache, KVCache):
            cache.length = position - 1
    decoder(batch, count)
