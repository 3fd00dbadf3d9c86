"""The inner loop of the recurrent sampler compiled for the CPU: sampler.cpp, for one model."""

import ctypes
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.functional import pad

from cpu.build import is_cached, load_library
from cpu.dot import COMPARISON, multiplies_pairs
from cpu.ops import check_shape
from layers.convolution import convolution_offsets
from layers.neighbours import neighbour_count
from models import ImageTransformer, ModelConfig
from utils import UserError

SOURCE = "sampler.cpp"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Bytes of images that one call of the library draws: enough that starting its threads costs
# nothing, few enough (at most a second or two) for progress and Ctrl-C.
BYTES_AT_ONCE = 2048


def is_compiled(config: ModelConfig, precision: str) -> bool:
    """Whether all libraries that a decoder of the model needs are in the cache."""
    try:
        compared = precision == "fp32" or is_cached(*COMPARISON)
        return compared and is_cached(SOURCE, sizes(config, precision))
    except UserError:  # the first one cannot be loaded
        return False


def sizes(config: ModelConfig, precision: str) -> dict:
    """The sizes with which sampler.cpp is compiled for a model."""
    sizes = {"LAYERS": config.n_layers, "HEADS": config.n_heads, "SIZE": config.d_query}
    sizes |= {"GATED": int(config.attention_type == "gated-linear")}
    sizes |= {"MIXTURES": config.mixtures, "BF16": int(precision == "bf16")}
    sizes |= {"DOT": int(precision == "bf16" and multiplies_pairs())}
    weights = config.n_layers * 12 * config.d_model**2
    sizes |= {"WEIGHT_BYTES": weights * DTYPES[precision].itemsize}
    if not config.neighbours:
        return sizes | {"NEIGHBOURS": 0, "CHANNELS": 1, "OFFSETS": 0}
    sizes |= {"NEIGHBOURS": neighbour_count(config.channels), "CHANNELS": config.channels}
    return sizes | {"OFFSETS": ",".join(map(str, offsets(config)))}


def offsets(config):
    """Those of the short convolution of a model with neighbours."""
    return convolution_offsets(config.length, config.width, config.channels)


class Packing(NamedTuple):
    """How product.h's Linear lays out weights."""

    panel: int  # outputs side by side
    lanes: int  # those of the last panel are padded to a multiple of this
    dtype: torch.dtype

    def pack(self, linears: Sequence[nn.Linear]) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight and bias of the linear layers, concatenated."""
        weight = torch.cat([linear.weight for linear in linears])
        return self.pack_weights(weight, torch.cat([linear.bias for linear in linears]))

    def pack_weights(self, weight, bias):
        missing = -len(bias) % self.lanes
        group = 2 if self.dtype == torch.bfloat16 else 1
        panels = pad(weight.float(), (0, 0, 0, missing)).split(self.panel)  # (<= panel, inputs)
        panels = [  # (inputs / group, <= panel, group)
            rows.unflatten(1, (-1, group)).transpose(0, 1).flatten() for rows in panels
        ]
        return torch.cat(panels).to(self.dtype), pad(bias.float(), (0, missing))


class CompiledDecoder:
    """A decoder of engine/sampling.py for a model with a constant state on the CPU.

    The weights are copied at construction. With bf16 the states' last inputs are bfloat16: those
    of a model whose linear layers are. Raises `UserError` if it cannot be compiled.
    """

    def __init__(self, model: ImageTransformer, precision: str):
        constants = sizes(model.config, precision)
        self.library, self.compile_seconds = load_library(SOURCE, constants)
        self.config = model.config
        self.dtype = DTYPES[precision]
        panel_sizes = torch.empty(2, dtype=torch.int64)
        self.library.call("panel_sizes", panel_sizes)
        with torch.no_grad():
            tensors = pack_model(model, Packing(*panel_sizes.tolist(), self.dtype))
            self.tensors = [tensor.contiguous() for tensor in tensors]
        for tensor in self.tensors:
            check(tensor, tensor.dtype, tensor.shape)

    def block(self, n_images: int) -> int:
        """How many bytes of each image one call should draw."""
        return max(1, BYTES_AT_ONCE // n_images)

    def __call__(self, batch: Any, count: int) -> None:
        """Draw the next `count` bytes of the images of a `Batch`."""
        self.run(batch, count)

    def run(self, batch: Any, count: int) -> torch.Tensor:
        """As `__call__`; returns the parameters (N, 3K) of the last byte drawn."""
        first = batch.position.item()
        parameters = torch.empty(len(batch.images), 3 * self.config.mixtures)
        draw = batch.noise, parameters, batch.temperature
        batch.finite &= self.loop(batch.images, batch.states, first, first + count, *draw)
        batch.position += count
        return parameters

    def read(
        self, model: ImageTransformer, images: torch.Tensor, count: int, advance: Callable
    ) -> list:
        """The states after the first `count` bytes of images (N, L), int64.

        The loop takes the sums of each byte in the order in which it does when it draws, so their
        rounding does not depend on the batch, as it would in a parallel pass.
        """
        states, block = model.empty_states(len(images)), self.block(len(images))
        for first in range(0, count, block):
            last = min(first + block, count)
            self.loop(images, states, first, last)
            advance(len(images) * (last - first), drawn=False)
        return states

    def loop(self, images, states, first, last, noise=None, parameters=None, temperature=1.0):
        """Read bytes `first` to `last` - 1 and, with noise, draw the byte after each; whether all
        distributions were finite. Raises TypeError or ValueError for what it would misread."""
        n, length = len(images), self.config.length
        if not 0 <= first <= last < length:
            raise ValueError(f"bytes {first} to {last} are not in an image of {length}")
        check(images, torch.int64, (n, length))
        if images.min() < 0 or images.max() > 255:
            raise ValueError("an image has a value that is no byte, 0 to 255")
        if noise is not None:
            check(noise, torch.float32, (n, length, 2))
        self.check_states(states, n)
        states = addresses([tensor for state in states for tensor in state.tensors])
        failed = torch.empty(1, dtype=torch.int64)
        tensors = addresses(self.tensors), states, images, noise, parameters
        numbers = n, length, first, last, temperature, torch.get_num_threads()
        self.library.call("sample", *tensors, *numbers, failed)
        return failed[0] < 0

    def check_states(self, states, n):
        if len(states) != self.config.n_layers:
            raise ValueError(f"there are {len(states)} states of {self.config.n_layers} layers")
        heads, size = self.config.n_heads, self.config.d_query
        for state in states:
            for tensor, sizes in zip(state.attention, [(size, size), (size,)], strict=False):
                check(tensor, torch.float32, (n, heads, *sizes))
            if self.config.neighbours:
                recent = max(offsets(self.config)) + 1
                check(state.inputs, self.dtype, (recent, n, heads * size))


def check(tensor: torch.Tensor, dtype: torch.dtype, shape: Sequence[int]) -> None:
    """Raise a TypeError or a ValueError for a tensor whose memory sampler.cpp would misread."""
    if tensor.device.type != "cpu" or tensor.dtype != dtype or not tensor.is_contiguous():
        raise TypeError(
            f"the compiled sampler takes contiguous {dtype} tensors on the CPU, not {tensor.dtype} "
            f"on {tensor.device}"
        )
    check_shape(tensor, shape)


def pack_model(model: ImageTransformer, packing: Packing) -> list[torch.Tensor]:
    """The tensors of sampler.cpp's struct Model, in its order."""
    tensors, pack = [], packing.pack
    for layer in model.transformer.layers:
        attention = layer.attention
        tensors += pack(attention.projections)
        tensors += pack([attention.out_projection])
        tensors += [layer.norm1.weight.float(), layer.norm1.bias.float()]
        tensors += pack([layer.linear1]) + pack([layer.linear2])
        tensors += [layer.norm2.weight.float(), layer.norm2.bias.float()]
        if layer.convolution:
            tensors.append(layer.convolution.weight.float())
    tensors += [model.transformer.norm.weight.float(), model.transformer.norm.bias.float()]
    predictor, D = model.predictor, model.config.d_model
    hidden, neighbours = predictor.weight[:, :D], predictor.weight[:, D:]  # (3K, .)
    tensors += packing.pack_weights(hidden, predictor.bias)
    tensors += [model.value_embedding.weight.float(), model.pos_embedding.pe.float()]
    if model.neighbours:
        tensors += [model.neighbours.table.int(), model.neighbour_projection.weight.float().t()]
        tensors += [neighbours.float().t()]  # (C * W, 3K); the one before: (C * W, D)
    return tensors


def addresses(tensors):
    """A C array of the tensors' addresses."""
    return (ctypes.c_void_p * len(tensors))(*(tensor.data_ptr() for tensor in tensors))
