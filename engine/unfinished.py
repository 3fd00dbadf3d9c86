"""The finished images of a sampling in several batches, with which it continues after an
interruption.

They are kept in a folder, a file for each batch, until everything is written. The folder's name is
a digest of all that determines the images, so a command finds its own and never others: with other
weights, given bytes, numbers or seed it has another folder.
"""

import hashlib
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from datasets import write_array
from engine import distributed
from files import write_atomically
from utils import say, warn


class UnfinishedSamples(AbstractContextManager):
    """The images of an unfinished sampling, in a folder (None: they are not kept). The folder is
    removed at the end, but not if an exception leaves the context."""

    def __init__(self, path: Path | None, n_images: int):
        self.path, self.n_images = path, n_images
        self.count, self.failed = 0, False  # how many images are kept; whether others could not be

    def continue_with(
        self, draw: Callable[..., Iterator[torch.Tensor | None]]
    ) -> Iterator[torch.Tensor]:
        """The batches that are kept, then those of draw(first=n), which continues after n images.
        Of several processes only the first one gets any."""
        yield from self.read()
        for batch in draw(first=int(distributed.total(self.count)[0])):
            if batch is not None:
                self.keep(batch)
                yield batch

    def read(self) -> Iterator[torch.Tensor]:
        """The batches (n, L), uint8, that an interrupted sampling has kept."""
        while self.path and (file := self.file()).exists():
            try:
                batch = torch.from_numpy(np.load(file))
            except (ValueError, EOFError):
                warn(f"{file} is damaged: its images and later ones are drawn again")
                break
            self.count += len(batch)
            yield batch
        if self.count:
            say(f"continuing: {self.count} of {self.n_images} images were finished before")

    def keep(self, batch: torch.Tensor) -> None:
        """Keep a batch. A failure is a warning."""
        if not self.path or self.failed:
            return
        try:
            write_atomically(self.file(), partial(write_array, images=batch.numpy()), durable=True)
            self.count += len(batch)
        except OSError as error:
            warn(f"{error}: an interruption will lose the images from number {self.count} on")
            self.failed = True

    def file(self) -> Path:
        """The file of the next batch."""
        return self.path / f"{self.count}.npy"

    def __exit__(self, failure: type[BaseException] | None, *details: Any) -> None:
        if self.path and failure is None:
            shutil.rmtree(self.path, ignore_errors=True)
        elif self.path and self.count:
            kept = f"{self.count} of {self.n_images} images are finished, in {self.path}"
            say(f"{kept}: the same command continues with them")


def digest(*values: Any) -> str:
    """A hexadecimal digest of tensors and of values whose repr is unique, 16 characters."""
    sha = hashlib.sha256()
    for value in values:
        if isinstance(value, torch.Tensor):
            sha.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy())
        else:
            sha.update(repr(value).encode())
    return sha.hexdigest()[:16]
