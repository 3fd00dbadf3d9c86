"""The model of a run: its backend, its operations, its weights, and the memory it needs."""

import math
from functools import partial

import torch

from cpu.build import try_compile
from cpu.ops import CompiledOps
from layers.ops import PlainOps
from models import ImageTransformer, ModelConfig
from runs import distributed, restoring


def make_config(fields, image_shape):
    """The ModelConfig for images of this shape, (H, W) or (H, W, 3), and `fields` without those
    that follow from it."""
    length = math.prod(image_shape)
    if not fields.get("neighbours"):
        return ModelConfig(length, **fields)
    channels = 1 if len(image_shape) == 2 else image_shape[2]
    return ModelConfig(length, **fields, width=image_shape[1], channels=channels)


def choose_ops(config, device, required, purpose):
    """The operations of a native model: compiled on a CPU if possible, else plain.

    `required` is --compile, None for "if possible"; `purpose` is what for, in words.
    """
    if device.type != "cpu":
        return PlainOps()
    return try_compile(partial(CompiledOps, config), required, purpose) or PlainOps()


def build_model(config, device, *, backend, ops, seed, checkpoint, path):
    """The model of a --backend on the device, with the weights of a checkpoint, or with random
    ones from the seed if `checkpoint` is {}."""
    torch.manual_seed(seed)
    if backend == "native":
        model = ImageTransformer(config, ops)
    else:
        from reference.model import ReferenceTransformer  # not in requirements.txt

        model = ReferenceTransformer(config)
    model = model.to(device)
    if checkpoint:
        restoring.load_model_state(model, checkpoint, path)
    return model


def check_backend(backend, config, device, precision, compiled):
    """Raise a `UserError` for flags with which --backend cannot run this model."""
    if backend == "fast-transformers":
        from reference import model as reference  # not in requirements.txt

        reference.check(config, device, precision, compiled)


def training_memory(config, batch_size, accumulate, evaluate_only):
    """A lower bound of the bytes of training: weights, gradients and moments; ten 2-byte values
    per channel, layer and position of the images at a time; the images of an iteration. An
    evaluation keeps the activations of one layer only."""
    layers = 1 if evaluate_only else config.n_layers
    activations = 20 * layers * config.d_model * batch_size // distributed.world_size()
    return 16 * config.n_parameters + config.length * (activations + batch_size * accumulate)


def sampling_memory(config, n_images):
    """A lower bound of the bytes of sampling: the weights, and the states of the images."""
    per_channel = 2 * config.length if config.attention_type == "full" else config.d_query
    states = n_images * config.n_layers * config.d_model * per_channel
    return 4 * (config.n_parameters + states)
