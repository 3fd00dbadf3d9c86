"""How far a run is: progress bars on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from tqdm import tqdm

from engine import distributed
from engine.metrics import Metrics
from layers.mixture import NATS_PER_BIT
from utils import is_first_process, say

SECONDS_PER_LINE = 10  # between lines of progress without a terminal


def progress_bar(**kwargs) -> tqdm:
    """A tqdm bar on a terminal; elsewhere a silent one (its `disable` is True)."""
    shown = sys.stderr.isatty() and is_first_process()
    return tqdm(dynamic_ncols=True, disable=not shown, **kwargs)


def track(items: Sequence, description: str) -> Iterator:
    """The items, with progress: a bar on a terminal, elsewhere a line every ten seconds."""
    shown = time.perf_counter()
    with progress_bar(total=len(items), desc=description, leave=False) as bar:
        for n, item in enumerate(items, 1):
            yield item
            bar.update()
            if bar.disable and time.perf_counter() - shown > SECONDS_PER_LINE:
                shown = time.perf_counter()
                say(f"{description} {n} of {len(items)}")


class TrainingLog(AbstractContextManager):
    """The progress bar or plain lines of training, and the training records of the metrics.

    Losses stay on the device until they are shown, every `frequency` iterations and on a bar
    once a second, because reading one waits for the device.
    """

    def __init__(
        self,
        metrics: Metrics,
        start: int,
        iterations: int,
        images_per_iteration: int,
        frequency: int,
    ):
        self.metrics, self.iterations = metrics, iterations
        self.images_per_iteration, self.frequency = images_per_iteration, frequency
        self.losses = []
        self.start = self.shown = self.window = time.perf_counter()
        self.bar = progress_bar(total=iterations, initial=start, unit="it")

    def __exit__(self, *exception: Any) -> None:
        self.bar.close()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """A context whose time does not count in the training speed."""
        start = time.perf_counter()
        yield
        self.window += time.perf_counter() - start

    def step(self, iteration: int, loss: torch.Tensor, rates: dict[str, float]) -> None:
        """Record an iteration: its loss in nats per byte, and its learning rates by name."""
        self.losses.append(loss)
        self.iteration, self.rates = iteration, rates
        self.bar.update()
        if iteration % self.frequency == 0:
            self.write()
        elif not self.bar.disable and time.perf_counter() - self.shown > 1:
            self.bar.set_postfix_str(self.summary()[0])

    def summary(self) -> tuple[str, dict[str, float]]:
        """The losses since the last record, as text and as values."""
        self.shown = time.perf_counter()
        bits = torch.stack(self.losses).mean().item() / NATS_PER_BIT
        rate = len(self.losses) * self.images_per_iteration / (self.shown - self.window)
        text = f"{bits:.4f} bits/dim, lr {self.rates['lr']:.3g}, {rate:.1f} images/s"
        return text, {"bits_per_dim": bits, **self.rates, "images_per_second": rate}

    def write(self) -> None:
        """Write a record of the losses since the last one, if there are any."""
        if not self.losses:
            return
        text, values = self.summary()
        if self.bar.disable:
            images_left = (self.iterations - self.iteration) * self.images_per_iteration
            minutes, seconds = divmod(round(images_left / values["images_per_second"]), 60)
            left = f"{minutes // 60}:{minutes % 60:02}:{seconds:02} left"
            say(f"iteration {self.iteration} of {self.iterations}: {text}, {left}")
        else:
            self.bar.set_postfix_str(text)
        self.record("train", self.iteration, values)
        self.losses, self.window = [], time.perf_counter()

    def record(self, split: str, iteration: int, values: dict[str, float]) -> None:
        """Write values to the metrics, with the images trained on and the seconds so far."""
        images, seconds = iteration * self.images_per_iteration, time.perf_counter() - self.start
        self.metrics.write(split, iteration, images=images, **values, seconds=seconds)


class SamplingProgress(AbstractContextManager):
    """The speed of this process, on a bar or in plain lines, and at the end that of all.

    `drawn` and `given` are the bytes of each image that are drawn and that are read before."""

    def __init__(self, n_images: int, drawn: int, given: int):
        self.n_images, self.bytes_per_image = n_images, drawn
        self.total, self.done, self.count = n_images * (drawn + given), 0, 0
        self.start = self.shown = time.perf_counter()
        self.bar = progress_bar(total=self.total, unit=" bytes", unit_scale=True)

    def __exit__(self, failure: type[BaseException] | None, *details: Any) -> None:
        self.bar.close()
        if failure:
            return
        self.n_images, self.count = map(int, distributed.total(self.n_images, self.count))
        if self.count:
            images = "1 image" if self.n_images == 1 else f"{self.n_images} images"
            say(f"sampled {images}, {self.count} bytes, {self.speed()}")

    @contextmanager
    def paused(self) -> Iterator[None]:
        """A context whose time does not count in the speed."""
        start = time.perf_counter()
        yield
        self.start += time.perf_counter() - start

    def advance(self, n: int, drawn: bool = True) -> None:
        """Count n more bytes, which were drawn, or else read."""
        self.done += n
        self.count += n * drawn
        self.bar.update(n)
        if not self.bar.disable:
            self.bar.set_postfix_str(self.speed().rpartition(", ")[2], refresh=False)
        elif time.perf_counter() - self.shown > SECONDS_PER_LINE:
            self.shown = time.perf_counter()
            say(f"{self.done} of {self.total} bytes, {self.speed()}")

    def speed(self) -> str:
        seconds = time.perf_counter() - self.start
        rate = self.count / seconds
        return f"{seconds:.1f} s, {rate:.0f} bytes/s, {rate / self.bytes_per_image:.3g} images/s"
