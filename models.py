"""The image transformer: bytes in, a mixture of logistics over the next byte out.

Sizes: N images, L positions (at most the bytes of an image), H heads, D = H * d_query channels,
K mixture components.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from layers import mixture
from layers.attention import KVCache, LinearAttention, SoftmaxAttention
from layers.convolution import ShortConvolution, convolution_offsets
from layers.dropout import Dropout, DropoutNoise, draw_keys
from layers.gated import GatedAttention, initialise_decays
from layers.neighbours import Neighbours
from layers.ops import PlainOps
from options import COUNT, POSITIVE, PROBABILITY, changeable, option

# How many positions go through the layers at once when no gradient is needed: this bounds the
# memory of long prefixes and keeps every tensor small enough for its memory to be reused.
POSITIONS_AT_ONCE = 2**12
CONSTANT_STATE = ("causal-linear", "gated-linear")  # do not need all earlier positions
NATIVE_ATTENTIONS = (*CONSTANT_STATE, "full")
ATTENTIONS = (*NATIVE_ATTENTIONS, "reformer")  # which needs pytorch-fast-transformers (reference/)
SOFTMAX = "attention_type", ("full", "reformer")  # with which an option has an effect
REFORMER = "attention_type", ("reformer",)


@dataclass(frozen=True)
class ModelConfig:
    """Everything that defines the model; stored in every checkpoint."""

    length: int  # bytes of an image
    attention_type: str = option(
        "causal-linear",
        ATTENTIONS,
        "linear, linear that forgets (gated), softmax (full), or with --backend fast-transformers "
        "reformer",
    )
    n_layers: int = option(4, COUNT, "transformer layers")
    n_heads: int = option(6, COUNT, "attention heads")
    d_query: int = option(32, COUNT, "size of a head's queries, keys and values")
    mixtures: int = option(10, COUNT, "components of the mixture of logistics that predicts a byte")
    dropout: float = changeable(0.1, PROBABILITY, "dropout in the layers")
    attention_dropout: float = changeable(
        0.1, PROBABILITY, "dropout of softmax's attention weights", only_with=SOFTMAX
    )
    softmax_temp: float | None = option(
        None, POSITIVE, "scale of q.k before softmax (default: 1/sqrt(d_query))", only_with=SOFTMAX
    )
    bits: int = option(32, COUNT, "hash bits (reformer only)", only_with=REFORMER)
    rounds: int = option(4, COUNT, "hashing rounds (reformer only)", only_with=REFORMER)
    chunk_size: int = option(32, COUNT, "queries per block (reformer only)", only_with=REFORMER)
    unmasked_reformer: bool = option(
        False, bool, "let a query attend to itself (reformer only)", only_with=REFORMER
    )
    neighbours: bool = option(
        False,
        bool,
        "show the network the pixels around the byte to be predicted: a masked convolution of the "
        "image, and a short convolution in each layer; the mixture's components begin side by side",
    )
    width: int = 0  # pixels per row, 0 without `neighbours`
    channels: int = 0  # bytes per pixel, 0 without `neighbours`

    @classmethod
    def for_images(cls, image_shape: tuple[int, ...], **values: Any) -> "ModelConfig":
        """The configuration for images of a shape, (H, W) or (H, W, 3), with these options."""
        if values.get("neighbours"):
            values |= {"width": image_shape[1], "channels": math.prod(image_shape[2:])}
        return cls(math.prod(image_shape), **values)

    @property
    def d_model(self) -> int:
        return self.n_heads * self.d_query

    @property
    def has_recurrence(self) -> bool:
        """Whether a position can be computed from a state of the positions before it."""
        return self.attention_type in NATIVE_ATTENTIONS

    @property
    def n_parameters(self) -> int:
        """The number of parameters, without those of `neighbours`."""
        layer = 12 * self.d_model**2 + 13 * self.d_model
        if self.attention_type == "gated-linear":
            layer += (self.d_model + 2 * self.n_heads) * (self.d_model + 1)
        rest = 130 * self.d_model + 3 * self.mixtures * (self.d_model + 1)
        return self.n_layers * layer + rest


@dataclass
class LayerState:
    """What a layer keeps of the positions so far, updated in place."""

    attention: tuple | KVCache
    inputs: torch.Tensor | None  # (R, N, D), the last inputs, for the short convolution

    @property
    def tensors(self) -> list[torch.Tensor]:
        """S, with causal linear attention Z and, with `neighbours`, the last inputs; not for
        softmax attention."""
        return [tensor for tensor in (*self.attention, self.inputs) if tensor is not None]


class PositionalEncoding(nn.Module):
    """Concatenates fixed sinusoids of the position to the embedded bytes, to which "Attention is
    all you need" (section 3.5) adds them."""

    def __init__(self, size: int, length: int):
        super().__init__()
        positions = torch.arange(length, dtype=torch.float64)
        frequencies = 10000 ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
        angles = torch.outer(positions, frequencies)  # (L, size / 2)
        # Sine on the even channels, cosine on the odd ones.
        table = torch.stack([angles.sin(), angles.cos()], dim=-1).view(length, size)
        self.register_buffer("pe", table.float()[None])

    def forward(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """(N, P, D/2) of bytes at `positions` (P,) of the image -> (N, P, D)."""
        return torch.cat([x, self.pe[:, positions].expand_as(x)], dim=-1)


class AttentionLayer(nn.Module):
    """Multi-head causal attention with its projections."""

    def __init__(self, config: ModelConfig, ops: PlainOps):
        super().__init__()
        D = config.d_model
        self.ops, H = ops, config.n_heads
        gated = config.attention_type == "gated-linear"
        self.query_projection = nn.Linear(D, D)
        self.key_projection = nn.Linear(D, D)
        # Decays and betas follow the values, so that no layer of the original fits.
        self.value_projection = nn.Linear(D, D + (2 * H if gated else 0))
        self.out_projection = nn.Linear(D, D)
        self.gate_projection = nn.Linear(D, D) if gated else None
        if gated:
            self.attend = GatedAttention(ops, H)
            initialise_decays(self.value_projection, H)
        elif config.attention_type == "causal-linear":
            self.attend = LinearAttention(ops, H)
        else:
            self.attend = SoftmaxAttention(H, config.softmax_temp, config.attention_dropout)

    @property
    def projections(self) -> list[nn.Linear]:
        gates = [self.gate_projection] if self.gate_projection else []
        return [self.query_projection, self.key_projection, *gates, self.value_projection]

    def forward(self, x: torch.Tensor, state: tuple | KVCache | None) -> torch.Tensor:
        projected = self.ops.linear(x, *self.projections)  # (N, L, 3D), or 4D + 2H if gated
        return self.ops.linear(self.attend(projected, state), self.out_projection)


class EncoderLayer(nn.Module):
    """Attention, then a feed-forward network of width 4D, each followed by a residual sum and a
    layer norm; with `neighbours`, a short convolution before them."""

    def __init__(self, config: ModelConfig, noise: DropoutNoise, ops: PlainOps):
        super().__init__()
        D = config.d_model
        self.ops, self.convolution = ops, None
        if config.neighbours:
            offsets = convolution_offsets(config.length, config.width, config.channels)
            self.convolution = ShortConvolution(D, offsets, ops)
        self.attention = AttentionLayer(config, ops)
        self.linear1 = nn.Linear(D, 4 * D)
        self.linear2 = nn.Linear(4 * D, D)
        self.norm1 = nn.LayerNorm(D)
        self.norm2 = nn.LayerNorm(D)
        self.dropout = Dropout(config.dropout, noise)

    def forward(
        self, x: torch.Tensor, positions: torch.Tensor, state: LayerState | None = None
    ) -> torch.Tensor:
        if self.convolution:
            x = self.convolution(x, positions, state and state.inputs)
        attended = self.attention(x, state and state.attention)
        x = self.ops.add_norm(x, attended, self.norm1, self.dropout())
        noise = self.dropout(), self.dropout()
        return self.ops.feed_forward_block(x, self.linear1, self.linear2, self.norm2, *noise)

    def empty_state(self, n_images: int, config: ModelConfig, like: torch.Tensor) -> LayerState:
        """The `LayerState` before the first position; `like` has its type and device."""
        sizes = n_images, config.d_query, config.length - 1
        inputs = self.convolution and self.convolution.empty_state(n_images, like)
        return LayerState(self.attention.attend.empty_state(*sizes, like=like), inputs)


class Transformer(nn.Module):
    """The stack of layers and a final norm."""

    def __init__(self, config: ModelConfig, noise: DropoutNoise, ops: PlainOps):
        super().__init__()
        layers = (EncoderLayer(config, noise, ops) for _ in range(config.n_layers))
        self.layers = nn.ModuleList(layers)
        self.norm = nn.LayerNorm(config.d_model)

    def forward(
        self, x: torch.Tensor, positions: torch.Tensor, states: list[LayerState | None]
    ) -> torch.Tensor:
        for layer, state in zip(self.layers, states, strict=True):
            x = layer(x, positions, state)
        return self.norm(x)


class ImageTransformer(nn.Module):
    """Predicts every byte of an image from the bytes before it.

    The parameters have the names of the original experiment's checkpoints. `ops` computes the
    layers: `PlainOps`, or the compiled operations of cpu/ops.py and gpu/ops.py.
    """

    def __init__(self, config: ModelConfig, ops: PlainOps | None = None):
        super().__init__()
        self.config, self.ops = config, ops or PlainOps()
        # How often each byte starts a training image. Not in the checkpoints of the original.
        counts = torch.zeros(256, dtype=torch.int64)
        self.register_buffer("first_byte_counts", counts, persistent=False)
        half = config.d_model // 2
        # The last byte is predicted but never read, hence L - 1 positions.
        self.pos_embedding = PositionalEncoding(half, config.length - 1)
        self.value_embedding = nn.Embedding(256, half)
        self.noise = DropoutNoise()
        self.transformer = Transformer(config, self.noise, self.ops)
        self.neighbours, n_features = None, 0
        if config.neighbours:
            self.neighbours = Neighbours(config.length, config.width, config.channels)
            n_features = self.neighbours.size
            self.neighbour_projection = nn.Linear(n_features, config.d_model, bias=False)
            nn.init.normal_(self.neighbour_projection.weight, std=0.2)
        # The predictor reads the neighbours too, so that a mean can follow the byte beside it.
        self.predictor = nn.Linear(config.d_model + n_features, 3 * config.mixtures)
        if config.neighbours:
            nn.init.zeros_(self.predictor.weight[:, config.d_model :].detach())
            mixture.spread_components(self.predictor)

    def parameters_at(
        self,
        images: torch.Tensor,
        positions: torch.Tensor,
        states: list[LayerState] | None = None,
        keys: torch.Tensor | None = None,
        last_only: bool = False,
    ) -> torch.Tensor:
        """Parameters (N, P, 3K) of the distribution of the byte after each of the consecutive
        `positions` (P,) of images (N, L); with `last_only`, of the byte after the last (N, 1, 3K).

        The positions continue after the `states`, one per layer, which are updated in place.
        `keys` (N,), int64, determine each image's dropout; by default torch's generator does.
        """
        if self.training:
            self.noise.start(draw_keys(len(images), images.device) if keys is None else keys)
        x = self.value_embedding(images.index_select(1, positions).long())  # (N, P, D/2)
        x = self.pos_embedding(x, positions)
        if self.neighbours:
            neighbours = self.neighbours(images, positions)  # (N, P, features)
            projected = self.ops.linear(neighbours, self.neighbour_projection)
            x = x + projected
        x = self.encode(x, positions, states)  # (N, P, D)
        if self.neighbours:  # in the type of the products, which under autocast is the shorter one
            x = torch.cat([part.to(projected.dtype) for part in (x, neighbours)], dim=-1)
        return self.ops.linear(x[:, -1:] if last_only else x, self.predictor)

    def encode(
        self, x: torch.Tensor, positions: torch.Tensor, states: list[LayerState] | None
    ) -> torch.Tensor:
        """The transformer: (N, P, D) at `positions` (P,) -> (N, P, D)."""
        return self.transformer(x, positions, states or [None] * self.config.n_layers)

    def forward(self, images: torch.Tensor, keys: torch.Tensor | None = None) -> torch.Tensor:
        """Parameters (N, L, 3K) of the distribution of the byte after each of `images` (N, L)."""
        return self.parameters_at(images, positions_of(images), keys=keys)

    def check_images(self, images: torch.Tensor) -> None:
        """Raise a ValueError unless these are whole images (N, length), N > 0, of integers."""
        if not torch.is_tensor(images) or images.dtype not in (torch.uint8, torch.int64):
            kind = images.dtype if torch.is_tensor(images) else type(images).__name__
            raise ValueError(f"images are {kind} and should be a tensor, uint8 or int64")
        shape = tuple(images.shape)
        if len(shape) != 2 or not shape[0] or shape[1] != self.config.length:
            raise ValueError(f"images are {shape} and should be (N, {self.config.length}), N > 0")

    def nll(self, images: torch.Tensor, keys: torch.Tensor | None = None) -> torch.Tensor:
        """-log p(image | its first byte), (N,), in nats, of whole images (N, length)."""
        return self.nll_per_byte(images, keys).sum(-1)

    def first_byte_nll(self, images: torch.Tensor) -> torch.Tensor:
        """-log p(first byte), (N,), float64, in nats, of images (N, L) on any device."""
        counts = self.first_byte_counts.to(images.device)
        return -mixture.first_byte_log_probs(counts)[images[:, 0].long()]

    def nll_per_byte(self, images: torch.Tensor, keys: torch.Tensor | None = None) -> torch.Tensor:
        """-log p(byte | those before it), (N, length - 1), in nats, of whole images (N, length)."""
        return -self.ops.log_prob(self(images[:, :-1], keys), images[:, 1:])

    def predict_next(self, prefix: torch.Tensor) -> torch.Tensor:
        """Parameters (N, 3K) of the byte after `prefix` (N, P), P > 0, without any state."""
        positions = positions_of(prefix)
        parts = prefix.split(max(1, POSITIONS_AT_ONCE // prefix.shape[1]))
        parameters = [self.parameters_at(part, positions, last_only=True) for part in parts]
        return torch.cat(parameters)[:, 0]

    def prefill(self, prefix: torch.Tensor) -> tuple[torch.Tensor, list[LayerState]]:
        """As `predict_next`, and the states after the prefix, for `step`."""
        states = self.empty_states(len(prefix))
        for positions in positions_of(prefix).split(max(1, POSITIONS_AT_ONCE // len(prefix))):
            parameters = self.parameters_at(prefix, positions, states, last_only=True)
        return parameters[:, 0], states

    def step(
        self, images: torch.Tensor, position: torch.Tensor, states: list[LayerState]
    ) -> torch.Tensor:
        """Read byte `position`, a tensor (1,), of images (N, L); updates `states` in place.

        Returns the parameters (N, 3K) of the byte after it, without a device synchronisation.
        """
        return self.parameters_at(images, position, states)[:, 0]

    @property
    def has_constant_state(self) -> bool:
        """Whether the states are tensors that keep their addresses and never grow."""
        return self.config.attention_type in CONSTANT_STATE

    def empty_states(self, n_images: int) -> list[LayerState]:
        """One state per layer, for `n_images` images before their first byte is read."""
        like = self.predictor.weight
        return [layer.empty_state(n_images, self.config, like) for layer in self.transformer.layers]


def positions_of(images: torch.Tensor) -> torch.Tensor:
    """The positions (L,) of images (N, L)."""
    return torch.arange(images.shape[1], device=images.device)
