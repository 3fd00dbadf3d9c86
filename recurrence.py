"""The recurrent sampler compiled for this processor: recurrence.cpp, for one model's sizes."""

import ctypes

import torch
from torch.nn.functional import pad

from compiling import load_library
from sampling import check_finite, draw
from utils import UserError

SOURCE = "recurrence.cpp"
# Bytes of images that one call of the library draws: long enough that starting its threads does
# not count, short enough (a fifth of a second) for progress and Ctrl-C.
BYTES_AT_ONCE = 2048


def sizes(config, precision):
    """The constants of recurrence.cpp."""
    sizes = {"LAYERS": config.n_layers, "HEADS": config.n_heads, "SIZE": config.d_query}
    return sizes | {"MIXTURES": config.mixtures, "BF16": int(precision == "bf16")}


def pack(linears, panel, dtype):
    """Weight and bias of the layers, stacked, as recurrence.cpp reads them: `panel` outputs side
    by side, input after input, or for bfloat16 pair after pair of inputs."""
    weight = torch.cat([linear.weight for linear in linears]).float()
    bias = torch.cat([linear.bias for linear in linears]).float()
    missing = -len(bias) % panel
    group = 2 if dtype == torch.bfloat16 else 1
    weight = pad(weight, (0, 0, 0, missing)).unflatten(0, (-1, panel)).unflatten(-1, (-1, group))
    return weight.transpose(1, 2).to(dtype), pad(bias, (0, missing))  # (panels, inputs, panel, .)


class CompiledRecurrence:
    """A sampler, called as `sampling.sample_recurrent` is, for one causal-linear model."""

    def __init__(self, model, precision):
        constants = sizes(model.config, precision)
        self.compiled, self.seconds = load_library(SOURCE, constants)
        self.compiled.sample.restype = ctypes.c_int64
        self.model = model
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        with torch.no_grad():
            tensors = self.pack_model(self.compiled.panel(), dtype)
            self.tensors = [tensor.contiguous() for tensor in tensors]

    def pack_model(self, panel, dtype):
        """The tensors of recurrence.cpp's struct Model, in its order."""
        model, tensors = self.model, []
        for layer in model.transformer.layers:
            attention = layer.attention
            tensors += pack(attention.projections, panel, dtype)
            tensors += pack([attention.out_projection], panel, dtype)
            tensors += [layer.norm1.weight, layer.norm1.bias]
            tensors += pack([layer.linear1], panel, dtype) + pack([layer.linear2], panel, dtype)
            tensors += [layer.norm2.weight, layer.norm2.bias]
        tensors += [model.transformer.norm.weight, model.transformer.norm.bias]
        tensors += pack([model.predictor], panel, dtype)
        return [*tensors, model.value_embedding.weight, model.pos_embedding.pe]

    @torch.no_grad()
    def __call__(self, images, offset, noise, temperature=1.0, advance=lambda n: None):
        n, length = images.shape
        if offset == length:
            return
        parameters, states = self.model.prefill(images[:, :offset])
        finite = torch.tensor(True)
        images[:, offset] = draw(parameters, noise[:, offset], temperature, finite)
        check_finite(finite)
        advance(n)
        block = max(1, BYTES_AT_ONCE // n)
        for first in range(offset, length - 1, block):
            last = min(first + block, length - 1)
            self.run(images, first, last, noise, states, temperature)
            advance(n * (last - first))

    def run(self, images, first, last, noise, states, temperature=1.0):
        """Read bytes `first` to `last` - 1 of images (N, L), int64, and draw the byte after each,
        with `states` brought up to date, both in place; returns the parameters (N, 3K) of byte
        `last`. Raises `UserError` where parameters are not finite."""
        n, length = images.shape
        parameters = torch.empty(n, 3 * self.model.config.mixtures)
        sums = [tensor for state in states for tensor in state]
        for tensor in (images, noise, *sums):
            assert tensor.is_contiguous(), "recurrence.cpp reads contiguous tensors"
        failed = self.compiled.sample(
            *(pointers(self.tensors), pointers(sums)),
            *(ctypes.c_void_p(tensor.data_ptr()) for tensor in (images, noise, parameters)),
            *(ctypes.c_int64(number) for number in (n, length, first, last)),
            ctypes.c_float(temperature),
            ctypes.c_int64(torch.get_num_threads()),
        )
        if failed >= 0:
            raise UserError(f"the model's distribution of byte {failed} is not finite")
        return parameters


def pointers(tensors):
    """A C array of where the tensors' data begin."""
    return (ctypes.c_void_p * len(tensors))(*(tensor.data_ptr() for tensor in tensors))
