"""Sampling images byte by byte, in two ways that give the same images.

The noise depends on the image and the position: image i draws from (seed, i, repetition) alone, so
the same seed gives the same images with any batch size, among any others and in either way, up to
rounding. The repetition is 0 unless an image is completed several times.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import count, repeat

import numpy as np
import torch

from cpu import sampler as cpu_sampler
from cpu.build import try_compile
from engine import distributed
from engine.progress import SamplingProgress
from layers import mixture
from models import ImageTransformer
from utils import UserError, autocast, is_first_process

# Compiling takes two seconds, once, and saves some milliseconds per step of a batch.
STEPS_WORTH_COMPILING = 200
WARM_UP_BYTES = 3  # bytes drawn before a CUDA graph is captured, since libraries initialise lazily
BLOCK = 32  # bytes of each image between two checks and reports, which synchronise a GPU


def sample_images(model: ImageTransformer, n: int, **options) -> torch.Tensor | None:
    """New images (n, L), uint8; the model and `options` are those of `complete_images`."""
    noise = {name: options[name] for name in ("seed", "temperature") if name in options}
    index = range(n) if options.get("index") is None else options["index"]
    check_request(n, index, options.get("temperature", 1.0))
    return complete_images(model, first_bytes(model, index, **noise), 1, **options)


def first_bytes(
    model: ImageTransformer, index: Sequence[int], *, seed: int = 0, temperature: float = 1.0
) -> torch.Tensor:
    """Images (N, L), uint8, that are black but for their first byte, which is drawn from the
    histogram of first bytes in the training set. Their numbers are an `index` of N."""
    images = torch.zeros(len(index), model.config.length, dtype=torch.uint8)
    noise = image_noise(seed, index, 1, repetitions(index))[:, 0, 0]
    images[:, 0] = sample_first_byte(model.first_byte_counts.cpu(), noise, temperature)
    return images


def complete_images(
    model: ImageTransformer, images: torch.Tensor, offset: int, **options
) -> torch.Tensor | None:
    """Images (N, L), uint8, with all bytes from `offset`, at least 1, on drawn by the model. The
    `options` are those of `complete_batches`. Of several processes the first one gets the images,
    the others None."""
    batches = list(complete_batches(model, images, offset, **options))
    return torch.cat([images[:0].cpu(), *batches]) if is_first_process() else None


def complete_batches(
    model: ImageTransformer,
    images: torch.Tensor,
    offset: int,
    *,
    index: Sequence[int] | None = None,
    first: int = 0,
    seed: int = 0,
    temperature: float = 1.0,
    batch_size: int = 64,
    precision: str = "fp32",
    recompute: bool = False,
    compile: bool | None = None,
) -> Iterator[torch.Tensor | None]:
    """As `complete_images`, one batch after the other, from image number `first` on.

    The model is in evaluation mode. The noise of the images belongs to their numbers in the data
    set, the `index` (default: 0, 1, ...), and differs where a number comes again. `recompute`
    recomputes the prefix for every byte instead of keeping a state. `compile` is --compile. With
    "bf16" the weights of the model are rounded until the last batch. Of several processes each
    draws its shard of a batch, which is `batch_size` times as large as their number. Raises a
    ValueError for arguments that do not fit.
    """
    model.check_images(images)
    N, L = images.shape
    if not 1 <= offset <= L:
        raise ValueError(
            f"the offset is {offset} and should be from 1 to {L}: of a new image, too, "
            "the first byte is given (sample_images)"
        )
    index = range(N) if index is None else index
    check_request(N, index, temperature)
    if batch_size < 1 or precision not in ("fp32", "bf16"):
        problem = f"batches of {batch_size} images in {precision!r} cannot be drawn"
        raise ValueError(f'{problem}: give a batch_size of at least 1, and "fp32" or "bf16"')
    times = repetitions(index)
    device = model.first_byte_counts.device
    size = batch_size * distributed.world_size()
    batches = [range(start, min(start + size, N)) for start in range(first, N, size)]
    steps, given = len(batches) * (L - offset), 0  # of each image, how many bytes are only read
    if model.config.has_recurrence and not recompute:
        decoder = choose_decoder(model, precision, compile, steps)
        draw = partial(sample_recurrent, model, decoder=decoder)
        given = offset - 1 if offset < L else 0
    else:
        draw = partial(sample_recomputing, model)
    shards = [batch[distributed.shard(len(batch))] for batch in batches]
    progress = SamplingProgress(sum(map(len, shards)), L - offset, given)
    with converted_weights(model, precision), progress:
        for shard in shards:
            own = slice(shard.start, shard.stop)
            part = images[own].to(device).long()
            if shard:
                noise = image_noise(seed, index[own], L, times[own]).to(device)
                with autocast(device, precision):
                    draw(part, offset, noise, temperature, advance=progress.advance)
            batch = distributed.gather(part.to("cpu", torch.uint8))
            with progress.paused():
                yield batch


def check_request(n: int, index: Sequence[int], temperature: float) -> None:
    """Raise a ValueError unless `n` images with these numbers can be drawn at a temperature."""
    if n < 1 or len(index) != n:
        raise ValueError(f"{n} images with an index of {len(index)}: give one number for each")
    if not temperature > 0:
        raise ValueError(f"the temperature is {temperature} and should be above 0")


def repetitions(index: Iterable[int]) -> list[int]:
    """How often each number has occurred before in an index: [7, 3, 7] gives [0, 0, 1]."""
    counters = defaultdict(count)
    return [next(counters[i]) for i in index]


def choose_decoder(
    model: ImageTransformer, precision: str, compile: bool | None = None, steps: float = math.inf
) -> "EagerDecoder | cpu_sampler.CompiledDecoder":
    """The fastest decoder of a model on its device. On a CPU, with neither --compile nor
    --no-compile, it is compiled if that is worth the seconds for this number of `steps`. A float64
    model's is never compiled."""
    device = model.first_byte_counts.device
    if device.type != "cpu":
        return plain_decoder(model, torch.compile(model.step) if compile else None)
    decoder = None
    if model.has_constant_state and model.value_embedding.weight.dtype == torch.float32:
        cached = cpu_sampler.is_compiled(model.config, precision)
        if compile is not None or cached or steps >= STEPS_WORTH_COMPILING:
            build = partial(cpu_sampler.CompiledDecoder, model, precision)
            decoder = try_compile(build, compile, "sampling")
    return decoder or plain_decoder(model)


def plain_decoder(model: ImageTransformer, step: Callable | None = None) -> "EagerDecoder":
    """The fastest decoder in PyTorch; `step` is a compiled form of the model's."""
    graph = model.first_byte_counts.is_cuda and model.has_constant_state
    return (GraphDecoder if graph else EagerDecoder)(model, step)


def convert_weights(model: ImageTransformer, precision: str) -> None:
    """With "bf16", round the weights of linear layers once; autocast would for every byte."""
    for module in model.modules() if precision == "bf16" else ():
        if isinstance(module, torch.nn.Linear):
            module.bfloat16()


@contextmanager
def converted_weights(model: ImageTransformer, precision: str) -> Iterator[None]:
    """`convert_weights` until the context ends."""
    weights = [(parameter, parameter.data) for parameter in model.parameters()]
    convert_weights(model, precision)
    try:
        yield
    finally:
        for parameter, data in weights:
            parameter.data = data


def image_noise(
    seed: int, index: Iterable[int], length: int, repetitions: Iterable[int] = repeat(0)
) -> torch.Tensor:
    """Uniform noise (N, length, 2), float32 on [0, 1), of the images with these numbers."""
    keys = zip(repeat(seed), index, repetitions, strict=False)
    draws = [np.random.default_rng(key).random((length, 2), np.float32) for key in keys]
    return torch.from_numpy(np.stack(draws))


def sample_first_byte(
    counts: torch.Tensor, noise: torch.Tensor, temperature: float = 1.0
) -> torch.Tensor:
    """First bytes (N,), int64, drawn from the training set's `counts` (256,) with noise (N,)."""
    log_probs = mixture.first_byte_log_probs(counts)
    cumulative = torch.softmax(log_probs / temperature, dim=0).cumsum(0)
    return torch.searchsorted(cumulative[:-1].contiguous(), noise.double(), right=True)


@dataclass
class Batch:
    """Images that are being sampled. A decoder changes all but noise and temperature in place."""

    images: torch.Tensor  # (N, L), int64
    noise: torch.Tensor  # (N, L, 2), float32
    temperature: float
    position: torch.Tensor  # (1,), int64: the next byte to read
    states: list  # one per layer, after the bytes before `position`
    finite: torch.Tensor  # (), bool: whether every distribution so far was finite

    def draw(self, parameters: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Bytes (N,) from distributions (N, 3K) with noise (N, 2), and 0 from those that are not
        finite, which `finite` then records without a device synchronisation."""
        known = parameters.isfinite()
        self.finite &= known.all()
        return mixture.sample(torch.where(known, parameters, 0), noise, self.temperature)

    def check_finite(self) -> None:
        if not self.finite:
            problem = "the model's distribution of a byte is not finite: the training diverged"
            raise UserError(f"{problem}: give an earlier checkpoint")


def empty_batch(model: ImageTransformer, n: int) -> Batch:
    """A `Batch` of n images at their first byte, to measure the speed of a decoder."""
    device = model.first_byte_counts.device
    images, noise = black_images(n, model.config.length, device)
    position = torch.zeros(1, dtype=torch.int64, device=device)
    finite = torch.ones((), dtype=torch.bool, device=device)
    return Batch(images, noise, 1.0, position, model.empty_states(n), finite)


def black_images(n: int, length: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Black images (n, length), int64, and noise (n, length, 2) to draw them with."""
    images = torch.zeros(n, length, dtype=torch.int64, device=device)
    return images, image_noise(0, [0], length).expand(n, -1, -1).contiguous().to(device)


class EagerDecoder:
    """Draws bytes with `ImageTransformer.step`, or a compiled `step` of the same signature."""

    def __init__(self, model: ImageTransformer, step: Callable | None = None):
        self.step = step or model.step

    def block(self, n_images: int) -> int:
        """How many bytes of each image one call should draw."""
        return BLOCK

    def read(
        self, model: ImageTransformer, images: torch.Tensor, count: int, advance: Callable
    ) -> list:
        """The states after the first `count` bytes of images (N, L), read in one parallel pass."""
        if not count:
            return model.empty_states(len(images))
        states = model.prefill(images[:, :count])[1]
        advance(len(images) * count, drawn=False)
        return states

    def __call__(self, batch: Batch, count: int) -> None:
        """Draw the next `count` bytes of the images of a `Batch`."""
        for _ in range(count):
            self.draw_next(batch)

    def draw_next(self, batch: Batch) -> None:
        """Read byte `position` of each image, draw the byte after it, and advance `position`.

        Everything happens in place and on the device, so a CUDA graph can replay it.
        """
        parameters = self.step(batch.images, batch.position, batch.states)
        batch.position += 1
        noise = batch.noise.index_select(1, batch.position).squeeze(1)  # (N, 2)
        batch.images.index_copy_(1, batch.position, batch.draw(parameters, noise)[:, None])


class GraphDecoder(EagerDecoder):
    """As `EagerDecoder`, replaying a CUDA graph: one launch per byte instead of hundreds.

    For models whose states keep their addresses. The graph belongs to one `Batch`.
    """

    batch = None

    def __call__(self, batch: Batch, count: int) -> None:
        if batch is not self.batch:
            self.batch, self.drawn, self.graph = batch, 0, None
        for _ in range(count):
            if self.drawn == WARM_UP_BYTES:
                self.graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(self.graph):
                    self.draw_next(batch)
            self.graph.replay() if self.graph else self.draw_next(batch)
            self.drawn += 1


def ignore_progress(n: int, drawn: bool = True) -> None:
    """The default `advance` of the samplers."""


@torch.no_grad()
def sample_recurrent(
    model: ImageTransformer,
    images: torch.Tensor,
    offset: int,
    noise: torch.Tensor,
    temperature: float = 1.0,
    *,
    decoder: EagerDecoder | None = None,
    advance: Callable = ignore_progress,
) -> None:
    """Fill in bytes `offset`, ... of `images` (N, L), int64, in place: the fast way.

    The `decoder` reads the given bytes but the last, and then reads the bytes from there on and
    draws those after them, one by one. `offset` is at least 1; `advance(n)` is called after each
    n bytes that were drawn, `advance(n, drawn=False)` after those that were read. Raises
    `UserError` if a distribution is not finite.
    """
    n, length = images.shape
    if offset == length:
        return
    decoder = decoder or EagerDecoder(model)
    states = decoder.read(model, images, offset - 1, advance)
    position = torch.tensor([offset - 1], device=images.device)
    finite = torch.ones((), dtype=torch.bool, device=images.device)
    batch = Batch(images, noise, temperature, position, states, finite)
    block = decoder.block(n)
    for first in range(offset - 1, length - 1, block):
        count = min(block, length - 1 - first)
        decoder(batch, count)
        batch.check_finite()
        advance(n * count)


@torch.no_grad()
def sample_recomputing(
    model: ImageTransformer,
    images: torch.Tensor,
    offset: int,
    noise: torch.Tensor,
    temperature: float = 1.0,
    *,
    advance: Callable = ignore_progress,
) -> None:
    """As `sample_recurrent`, recomputing the whole prefix for every byte: slow, for comparison."""
    finite = torch.ones((), dtype=torch.bool, device=images.device)
    batch = Batch(images, noise, temperature, None, None, finite)
    for position in range(offset, images.shape[1]):
        parameters = model.predict_next(images[:, :position])
        images[:, position] = batch.draw(parameters, noise[:, position])
        advance(len(images))
    batch.check_finite()
