"""The model of a run: its backend, its operations, its weights, and the memory it needs."""

import math
from functools import partial

import torch

from cpu.build import try_compile
from cpu.ops import CompiledOps
from engine import distributed, restoring
from layers.ops import PlainOps
from models import ImageTransformer, ModelConfig
from utils import warn


def make_config(fields, image_shape):
    """The ModelConfig of `fields`, which lack those that follow from the image shape, (H, W) or
    (H, W, 3)."""
    length = math.prod(image_shape)
    if not fields.get("neighbours"):
        return ModelConfig(length, **fields)
    channels = 1 if len(image_shape) == 2 else image_shape[2]
    return ModelConfig(length, **fields, width=image_shape[1], channels=channels)


def choose_ops(config, device, required, purpose):
    """The operations of a native model: compiled on a CPU if possible, else plain.

    `required` is --compile, None for "if possible"; messages name the `purpose`, "training".
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
    """A lower bound of the bytes that training needs: weights, gradients and at least one moment;
    ten 2-byte activations per channel, layer and position of a batch; the images of an iteration.
    An evaluation keeps the weights, and the activations of one layer."""
    layers, per_parameter = (1, 4) if evaluate_only else (config.n_layers, 12)
    activations = 20 * layers * config.d_model * batch_size // distributed.world_size()
    images = config.length * (activations + batch_size * accumulate)
    return per_parameter * config.n_parameters + images


def sampling_memory(config, n_states):
    """A lower bound of the bytes that sampling needs: the weights, and the states of so many
    images."""
    # Keys and values of softmax attention may be bfloat16: two 2-byte numbers for each position.
    per_channel = config.length if config.attention_type == "full" else config.d_query
    per_channel += config.channels * config.width  # the last inputs of a short convolution, or 0
    states = n_states * config.n_layers * config.d_model * per_channel
    return 4 * (config.n_parameters + states)


def warn_about_threads(checkpoint, device):
    """Warn if the number of threads has changed: sums in another order are rounded differently."""
    threads = torch.get_num_threads()
    stored = checkpoint.get("threads", threads)
    if device.type == "cpu" and stored != threads:
        warn(
            f"this run used {stored} CPU threads and continues with {threads}: its numbers will "
            "differ in the last digits from those of an uninterrupted run"
        )
