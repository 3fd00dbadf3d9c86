"""The inner loop of the recurrent sampler compiled for the CPU: sampler.cpp, for one model."""

import ctypes
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.functional import pad

from cpu.build import load_library
from layers.convolution import convolution_offsets
from layers.neighbours import neighbour_count
from models import ImageTransformer, ModelConfig

SOURCE = "sampler.cpp"
# Bytes of images that one call of the library draws: enough that starting its threads costs
# nothing, few enough (a fifth of a second) for progress and Ctrl-C.
BYTES_AT_ONCE = 2048


def sizes(config: ModelConfig, precision: str) -> dict:
    """The sizes with which sampler.cpp is compiled for a model."""
    sizes = {"LAYERS": config.n_layers, "HEADS": config.n_heads, "SIZE": config.d_query}
    sizes |= {"MIXTURES": config.mixtures, "BF16": int(precision == "bf16")}
    if not config.neighbours:
        return sizes | {"NEIGHBOURS": 0, "CHANNELS": 1, "OFFSETS": 0}
    offsets = convolution_offsets(config.length, config.width, config.channels)
    sizes |= {"NEIGHBOURS": neighbour_count(config.channels), "CHANNELS": config.channels}
    return sizes | {"OFFSETS": ",".join(map(str, offsets))}


def pack(
    linears: Sequence[nn.Linear], panel: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias of the linear layers, concatenated, in the layout of sampler.cpp's Linear:
    (panels, inputs, panel), or for bfloat16 (panels, inputs / 2, panel, 2)."""
    weight = torch.cat([linear.weight for linear in linears])
    return pack_weights(weight, torch.cat([linear.bias for linear in linears]), panel, dtype)


def pack_weights(weight, bias, panel, dtype):
    weight, bias = weight.float(), bias.float()
    missing = -len(bias) % panel
    group = 2 if dtype == torch.bfloat16 else 1
    weight = pad(weight, (0, 0, 0, missing)).unflatten(0, (-1, panel)).unflatten(-1, (-1, group))
    return weight.transpose(1, 2).to(dtype), pad(bias, (0, missing))  # (panels, inputs, panel, .)


class CompiledDecoder:
    """A decoder of engine/sampling.py for a causal-linear model on the CPU.

    The weights are copied at construction. With bf16 the states' last inputs are bfloat16: those
    of a model whose linear layers are. Raises `UserError` if it cannot be compiled.
    """

    def __init__(self, model: ImageTransformer, precision: str):
        constants = sizes(model.config, precision)
        self.library, self.compile_seconds = load_library(SOURCE, constants)
        self.config = model.config
        self.dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        panel = torch.empty(1, dtype=torch.int64)
        self.library.call("panel_size", panel)
        with torch.no_grad():
            tensors = pack_model(model, panel.item(), self.dtype)
            self.tensors = [tensor.contiguous() for tensor in tensors]
        for tensor in self.tensors:
            check(tensor, tensor.dtype)

    def block(self, n_images: int) -> int:
        """How many bytes of each image one call should draw."""
        return max(1, BYTES_AT_ONCE // n_images)

    def __call__(self, batch, count: int) -> None:
        """Draw the next `count` bytes of the images of a `Batch`."""
        self.run(batch, count)

    def run(self, batch, count: int) -> torch.Tensor:
        """As `__call__`; returns the parameters (N, 3K) of the last byte drawn."""
        n, length = batch.images.shape
        first = batch.position.item()
        if first + count >= length:
            raise ValueError(f"{count} bytes after byte {first} are more than an image has")
        parameters = torch.empty(n, 3 * self.config.mixtures)
        failed = torch.empty(1, dtype=torch.int64)
        states = [tensor for state in batch.states for tensor in state.tensors]
        check(batch.images, torch.int64)
        check(batch.noise, torch.float32)
        for state in batch.states:
            for tensor in state.attention:
                check(tensor, torch.float32)
            if state.inputs is not None:
                check(state.inputs, self.dtype)
        pointers = addresses(self.tensors), addresses(states)
        tensors = batch.images, batch.noise, parameters
        numbers = n, length, first, first + count, batch.temperature, torch.get_num_threads()
        self.library.call("sample", *pointers, *tensors, *numbers, failed)
        batch.position += count
        batch.finite &= failed[0] < 0
        return parameters


def check(tensor: torch.Tensor, dtype: torch.dtype) -> None:
    """Raise a TypeError for a tensor whose memory sampler.cpp would misread."""
    if tensor.device.type != "cpu" or tensor.dtype != dtype or not tensor.is_contiguous():
        raise TypeError(
            f"the compiled sampler takes contiguous {dtype} tensors on the CPU, not {tensor.dtype} "
            f"on {tensor.device}"
        )


def pack_model(model: ImageTransformer, panel: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """The tensors of sampler.cpp's struct Model, in its order."""
    tensors = []
    for layer in model.transformer.layers:
        attention = layer.attention
        tensors += pack(attention.projections, panel, dtype)
        tensors += pack([attention.out_projection], panel, dtype)
        tensors += [layer.norm1.weight.float(), layer.norm1.bias.float()]
        tensors += pack([layer.linear1], panel, dtype) + pack([layer.linear2], panel, dtype)
        tensors += [layer.norm2.weight.float(), layer.norm2.bias.float()]
        if layer.convolution:
            tensors.append(layer.convolution.weight.float())
    tensors += [model.transformer.norm.weight.float(), model.transformer.norm.bias.float()]
    predictor, D = model.predictor, model.config.d_model
    hidden, neighbours = predictor.weight[:, :D], predictor.weight[:, D:]  # (3K, .)
    tensors += pack_weights(hidden, predictor.bias, panel, dtype)
    tensors += [model.value_embedding.weight.float(), model.pos_embedding.pe.float()]
    if model.neighbours:
        tensors += [model.neighbours.table.int(), model.neighbour_projection.weight.float().t()]
        tensors += [neighbours.float().t()]  # (C * W, 3K); the one before: (C * W, D)
    return tensors


def addresses(tensors):
    """A C array of the tensors' addresses."""
    return (ctypes.c_void_p * len(tensors))(*(tensor.data_ptr() for tensor in tensors))
