"""A picture of samples while a model trains: the same images, drawn again as it improves."""

import numpy as np
import torch

from engine import sampling
from engine.checkpoint import format_path
from engine.metrics import Metrics
from engine.pictures import partial_image, save_image, tile
from models import ImageTransformer
from utils import say, warn

COLUMNS = 8  # few, so that a picture takes little of the time of training


class SampleGrid:
    """A row of new images, and completions of the first images (N, L), uint8, of a data set with
    images of a shape (H, W) or (H, W, 3).

    The noise is that of prediction.py with --seed 0. Weights are not rounded and torch's generators
    are not used, so drawing a picture does not change the training.
    """

    def __init__(
        self, pattern: str, images: torch.Tensor, shape: tuple[int, ...], compile: bool | None
    ):
        self.pattern, self.real, self.shape = pattern, images[:COLUMNS].cpu(), shape
        self.given = images.shape[1] // 2  # bytes of each completed image
        self.compile, self.decoder = compile, None

    def write(self, model: ImageTransformer, iteration: int, metrics: Metrics) -> None:
        """Draw the grid with a model in evaluation mode, and write it to the file of an iteration
        and to TensorBoard. A failure to write is a warning."""
        grid, path = self.draw(model), format_path(self.pattern, iteration)
        try:
            save_image(path, grid)
            say(f"iteration {iteration}: drew {path}")
        except OSError as error:
            warn(f"{path} cannot be written ({error.strerror or error})")
        metrics.write_image("samples", iteration, grid)

    def draw(self, model: ImageTransformer) -> np.ndarray:
        """The grid, (H', W', 3), uint8: a row of new images, and rows of the given parts of images,
        their completions, and the real images."""
        if not isinstance(self.decoder, sampling.EagerDecoder):  # a compiled one copies the weights
            self.decoder = sampling.choose_decoder(model, "fp32", self.compile)
        first = sampling.first_bytes(model, range(len(self.real)))
        new, completed = self.complete(model, first, 1), self.complete(model, self.real, self.given)
        real = self.real.view(-1, *self.shape).numpy()
        given = [partial_image(image, self.given, self.given) for image in real]
        return tile([new, given, completed, real])

    def complete(self, model: ImageTransformer, images: torch.Tensor, offset: int) -> np.ndarray:
        """Images (N, L) with all bytes from `offset` on drawn by the model, as (N, *shape)."""
        device = model.first_byte_counts.device
        noise = sampling.image_noise(0, range(len(images)), images.shape[1]).to(device)
        images = images.to(device, torch.int64)
        sampling.sample_recurrent(model, images, offset, noise, decoder=self.decoder)
        return images.to("cpu", torch.uint8).view(-1, *self.shape).numpy()
