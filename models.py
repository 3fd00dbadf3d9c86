"""The image transformer: bytes in, a mixture of logistics over the next byte out.

Sizes: N images, L positions (the bytes of an image, at most), H heads, D = H * d_query the
model size, K mixture components.
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import relu

import mixture
from attention import LinearAttention, SoftmaxAttention
from dropout import Dropout, DropoutNoise, draw_keys

# Positions that go through the layers at once where no gradient is needed: bounds the memory of
# long prefixes, and keeps every tensor small enough for the allocator to use its memory again.
POSITIONS_AT_ONCE = 2**12


@dataclass(frozen=True)
class ModelConfig:
    """All that defines the model; stored in every checkpoint. The defaults live here alone."""

    length: int  # bytes of an image
    attention_type: str = "causal-linear"
    n_layers: int = 4
    n_heads: int = 6
    d_query: int = 32
    mixtures: int = 10
    dropout: float = 0.1
    softmax_temp: float | None = None  # multiplies q.k; None is 1 / sqrt(d_query)
    attention_dropout: float = 0.1
    bits: int = 32
    rounds: int = 4
    chunk_size: int = 32
    unmasked_reformer: bool = False

    @property
    def d_model(self):
        return self.n_heads * self.d_query

    @property
    def n_parameters(self):
        layer = 12 * self.d_model**2 + 13 * self.d_model
        rest = 130 * self.d_model + 3 * self.mixtures * (self.d_model + 1)
        return self.n_layers * layer + rest


class PositionalEncoding(nn.Module):
    """Appends fixed sinusoids of the position to the embedded bytes ("Attention is all you need",
    section 3.5; here concatenated, not added)."""

    def __init__(self, size, length):
        super().__init__()
        position = torch.arange(length, dtype=torch.float64)[:, None]
        frequency = 10000 ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
        angles = position * frequency  # (L, size / 2)
        # Sine on the even, cosine on the odd channels.
        table = torch.stack([angles.sin(), angles.cos()], dim=-1).view(length, size)
        self.register_buffer("pe", table.float()[None])

    def forward(self, x, position):
        """(N, L, D/2) whose first byte is number `position` of the image -> (N, L, D)."""
        rows = self.pe[:, position + torch.arange(x.shape[1], device=x.device)]
        return torch.cat([x, rows.expand_as(x)], dim=-1)


class AttentionLayer(nn.Module):
    """Projections to H heads, causal attention, and back."""

    def __init__(self, config):
        super().__init__()
        D = config.d_model
        self.n_heads = config.n_heads
        self.query_projection = nn.Linear(D, D)
        self.key_projection = nn.Linear(D, D)
        self.value_projection = nn.Linear(D, D)
        self.out_projection = nn.Linear(D, D)
        if config.attention_type == "causal-linear":
            self.attend = LinearAttention()
        else:
            self.attend = SoftmaxAttention(config.softmax_temp, config.attention_dropout)

    @property
    def projections(self):
        return self.query_projection, self.key_projection, self.value_projection

    def forward(self, x, state):
        heads = [project(x).unflatten(-1, (self.n_heads, -1)) for project in self.projections]
        outputs = self.attend(*heads, state)  # queries, keys, values (N, L, H, E)
        return self.out_projection(outputs.flatten(-2))  # (N, L, D)


class ResidualNorm(nn.LayerNorm):
    """Layer norm of a residual sum."""

    def forward(self, x, y):
        return super().forward(x + y)


class LinearRelu(nn.Linear):
    """max(0, Wx + b)"""

    def forward(self, x):
        return relu(super().forward(x), inplace=not torch.is_grad_enabled())


class EncoderLayer(nn.Module):
    """Attention, then a feed-forward network of width 4D; the norm follows each residual sum."""

    def __init__(self, config, noise):
        super().__init__()
        D = config.d_model
        self.attention = AttentionLayer(config)
        self.linear1 = LinearRelu(D, 4 * D)
        self.linear2 = nn.Linear(4 * D, D)
        self.norm1 = ResidualNorm(D)
        self.norm2 = ResidualNorm(D)
        self.dropout = Dropout(config.dropout, noise)

    def forward(self, x, state):
        x = self.norm1(x, self.dropout(self.attention(x, state)))
        y = self.dropout(self.linear1(x))
        return self.norm2(x, self.dropout(self.linear2(y)))


class Transformer(nn.Module):
    """The stack of layers and a final norm."""

    def __init__(self, config, noise):
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(config, noise) for _ in range(config.n_layers))
        self.norm = nn.LayerNorm(config.d_model)

    def forward(self, x, states):
        for layer, state in zip(self.layers, states, strict=True):
            x = layer(x, state)
        return self.norm(x)


class ImageTransformer(nn.Module):
    """Predicts every byte of an image from the bytes before it.

    The parameters carry the names of the original experiment's checkpoints.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        half = config.d_model // 2
        # The last byte is predicted, never read: L - 1 positions.
        self.pos_embedding = PositionalEncoding(half, config.length - 1)
        self.value_embedding = nn.Embedding(256, half)
        self.noise = DropoutNoise()
        self.transformer = Transformer(config, self.noise)
        self.predictor = nn.Linear(config.d_model, 3 * config.mixtures)

    def features(self, images, position=0, states=None, keys=None):
        """Last hidden layer (N, L, D) of bytes (N, L) that begin at `position`, an int or a tensor.

        With `states`, a list of one state a layer, the bytes go on where the states stopped,
        and the states are brought up to date in place. `keys` (N,), int64, decide what dropout
        drops of each image; without them torch's generator does.
        """
        if self.training:
            self.noise.start(draw_keys(len(images), images.device) if keys is None else keys)
        x = self.pos_embedding(self.value_embedding(images.long()), position)
        return self.transformer(x, states or [None] * self.config.n_layers)

    def forward(self, images, keys=None):
        """Parameters (N, L, 3K) of the distribution of the byte after each of `images` (N, L)."""
        return self.predictor(self.features(images, keys=keys))

    def nats(self, images, keys=None):
        """-log p(image | its first byte), (N,), in nats, of whole images (N, length)."""
        return -mixture.log_prob(self(images[:, :-1], keys), images[:, 1:]).sum(-1)

    def predict(self, prefix):
        """Parameters (N, 3K) of the byte after `prefix` (N, P), P > 0, computed from nothing."""
        parts = prefix.split(max(1, POSITIONS_AT_ONCE // prefix.shape[1]))
        return torch.cat([self.predictor(self.features(part)[:, -1]) for part in parts])

    def prefill(self, prefix):
        """As `predict`, and the states after the prefix, for `step`."""
        states = self.empty_states(len(prefix))
        position = 0
        for part in prefix.split(max(1, POSITIONS_AT_ONCE // len(prefix)), dim=1):
            hidden = self.features(part, position, states)
            position += part.shape[1]
        return self.predictor(hidden[:, -1]), states

    def step(self, values, position, states):
        """Read one more byte of each image, (N,), number `position`; updates `states` in place.

        Returns the parameters (N, 3K) of the byte after it. With `position` a tensor (1,), no
        number visits the host.
        """
        return self.predictor(self.features(values[:, None], position, states)[:, 0])

    @property
    def has_constant_state(self):
        """Whether the states are tensors that stay where they are and never grow."""
        return self.config.attention_type == "causal-linear"

    def empty_states(self, n_images):
        """One state a layer, of `n_images` images of which nothing was read."""
        config = self.config
        sizes = n_images, config.n_heads, config.d_query, config.length - 1
        return [
            layer.attention.attend.empty_state(*sizes, like=self.predictor.weight)
            for layer in self.transformer.layers
        ]
