"""The same model, with the same interface, built from pytorch-fast-transformers: the reference
implementation.

The parameters have the names of models.py, so a checkpoint of either loads in the other. What is
said about the library refers to 0.4.0, its last version.
"""

import torch

from models import GATED, ImageTransformer, ModelConfig
from options import typed
from utils import UserError

try:
    from fast_transformers.builders import RecurrentEncoderBuilder, TransformerEncoderBuilder
    from fast_transformers.causal_product import CausalDotProduct
    from fast_transformers.masking import TriangularCausalMask
except ImportError as error:  # not installed, or built against another torch
    problem = f"--backend fast-transformers cannot import its library ({error})"
    raise UserError(f"{problem}: `make reference` installs it") from None


def attention_options(config: ModelConfig) -> dict:
    """The library's arguments of an attention."""
    if config.attention_type == "causal-linear":
        return {}
    softmax = {"softmax_temp": config.softmax_temp, "attention_dropout": config.attention_dropout}
    if config.attention_type == "full":
        return softmax
    hashing = {"bits": config.bits, "rounds": config.rounds, "chunk_size": chunk_size(config)}
    # "masked" hides a query from itself, unless it can see nothing else.
    return {**softmax, **hashing, "masked": not config.unmasked_reformer}


def chunk_size(config: ModelConfig) -> int:
    """--chunk_size, or the length of a sequence: a longer chunk would hold only padding."""
    return min(config.chunk_size, config.length - 1)


def check(config: ModelConfig, device: torch.device, precision: str, compiled: bool | None) -> None:
    """Raise a `UserError` for flags with which the library cannot run this model."""
    if config.attention_type in GATED:
        problem = "pytorch-fast-transformers does not have it"
        raise UserError(f"--attention_type {config.attention_type}: {problem}: change the backend")
    if config.neighbours:
        problem = "the layers of pytorch-fast-transformers have no short convolutions"
        raise UserError(f"--neighbours: {problem}: give --no-neighbours")
    if compiled is not None:
        way_out = "leave it out, or change the backend"
        raise UserError(f"{typed('compile', compiled)} is for --backend native: {way_out}")
    if config.attention_type != "causal-linear":
        return
    # Its kernels are float32 only, built for the CPU and perhaps for CUDA.
    if not CausalDotProduct.dot.get(device.type):
        problem = "the installed pytorch-fast-transformers has no kernels of causal-linear for it"
        raise UserError(f"--device {device}: {problem}: use --device cpu")
    if precision != "fp32":
        problem = "the kernels of pytorch-fast-transformers for causal-linear are fp32 only"
        raise UserError(f"--precision {precision}: {problem}: leave it out")


def build(builder: type, config: ModelConfig) -> torch.nn.Module:
    """An encoder of the library, parallel or recurrent, of this configuration."""
    return builder.from_kwargs(
        attention_type=config.attention_type,
        n_layers=config.n_layers,
        n_heads=config.n_heads,
        query_dimensions=config.d_query,
        value_dimensions=config.d_query,
        feed_forward_dimensions=4 * config.d_model,
        dropout=config.dropout,
        **attention_options(config),
    ).get()


def share_layers(source: torch.nn.Module, target: torch.nn.Module) -> None:
    """Make the target use the source's leaf modules, and so its weights and its dropout."""
    for name, module in source.named_modules():
        if not any(module.children()):
            parent, _, child = name.rpartition(".")
            setattr(target.get_submodule(parent), child, module)


class ReferenceTransformer(ImageTransformer):
    """`ImageTransformer` with the layers of pytorch-fast-transformers.

    Its initial weights are those of the native model with the same seed.
    """

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        weights = self.transformer.state_dict()
        self.transformer = build(TransformerEncoderBuilder, config)
        self.transformer.load_state_dict(weights)
        if config.has_recurrence:
            recurrence = build(RecurrentEncoderBuilder, config)
            share_layers(self.transformer, recurrence)
            # A tuple hides it from torch, which would list the shared weights twice.
            self.recurrence = (recurrence,)

    def encode(self, x: torch.Tensor, positions: torch.Tensor, states: list | None) -> torch.Tensor:
        """(N, L, D) -> (N, L, D), as the native model: by the parallel encoder or, with `states`,
        by the recurrent one, position after position, updating them in place. The library draws
        its dropout from torch's generator, not from the images' keys."""
        if states is None:
            reformer = self.config.attention_type == "reformer"
            return self.encode_hashed(x) if reformer else self.encode_all(x)
        (recurrence,), outputs = self.recurrence, []
        for row in x.unbind(1):  # (N, D)
            output, states[:] = recurrence(row, states)
            outputs.append(output)
        return torch.stack(outputs, dim=1)

    def encode_all(self, x: torch.Tensor) -> torch.Tensor:
        """(N, L, D) -> (N, L, D), every position from itself and those before it."""
        return self.transformer(x, attn_mask=TriangularCausalMask(x.shape[1], device=x.device))

    def encode_hashed(self, x: torch.Tensor) -> torch.Tensor:
        """As `encode_all`, for the reformer, which the library implements for whole chunks only.

        Copies of the last position fill the last chunk. They come after all others, so the causal
        mask hides them, and unlike zeros they have norms that the library can divide by. Which of
        the earlier positions share a chunk still depends on the hashes of all positions, as in the
        Reformer's paper: later bytes may change an output, though none is attended to.
        In evaluation every call draws the same hashes, so that neither its results nor the
        samples depend on the batch size.
        """
        L = x.shape[1]
        filling = x[:, -1:].expand(-1, -L % chunk_size(self.config), -1)
        devices = [x.device] if x.is_cuda else []
        with torch.random.fork_rng(devices, enabled=not self.training):
            if not self.training:
                torch.manual_seed(0)
            return self.encode_all(torch.cat([x, filling], dim=1))[:, :L]

    @property
    def has_constant_state(self) -> bool:
        """The library's states are new tensors after every byte."""
        return False

    def empty_states(self, n_images: int) -> list:
        """One state per layer; the library's initial state is None."""
        return [None] * self.config.n_layers
