"""Records of a run: a file of JSON lines, and TensorBoard."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from utils import UserError, is_first_process, warn


class Metrics:
    """Writes records to a file of JSON lines and to TensorBoard; both are optional.

    The run continues after the iteration `start`, which the records of the file hold, so that its
    readers can leave out what was written of later iterations before.
    """

    def __init__(self, path: str | None = None, log_dir: str | None = None, start: int = 0):
        if not is_first_process():
            path = log_dir = None
        self.start = start
        self.path, self.board = path, open_tensorboard(log_dir, start) if log_dir else None
        if path:
            Path(path).parent.mkdir(parents=True, exist_ok=True)

    def write(self, split: str, iteration: int, **values: float) -> None:
        """Write one record; a failure is a warning."""
        try:
            if self.path:
                place = {"iteration": iteration, "split": split, "start": self.start}
                append_line(self.path, {**place, **values})
            if self.board:
                for name, value in values.items():
                    self.board.add_scalar(f"{split}/{name}", value, iteration)
                self.board.flush()
        except OSError as error:
            warn(f"the metrics of iteration {iteration} cannot be written ({error.strerror})")

    def write_image(self, name: str, iteration: int, image: np.ndarray) -> None:
        """Add an image (H, W, 3), uint8, to TensorBoard; a failure is a warning."""
        if not self.board:
            return
        try:
            self.board.add_image(name, image, iteration, dataformats="HWC")
            self.board.flush()
        except OSError as error:
            warn(f"the image of iteration {iteration} cannot be written ({error.strerror})")


def append_line(path: str, record: dict[str, Any]) -> None:
    """Append a line of JSON to a file, whose last line may be incomplete if a run was killed."""
    with open(path, "ab+") as file:
        cut_off = file.tell() and (file.seek(-1, os.SEEK_END), file.read())[1] != b"\n"
        file.write((b"\n" if cut_off else b"") + json.dumps(record).encode() + b"\n")


def open_tensorboard(log_dir: str, start: int) -> Any:
    """A writer of TensorBoard events of the iterations after `start`, which replace those that were
    written before. Raises a `UserError` if TensorBoard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        way_out = "pip install tensorboard, or use --metrics_file"
        raise UserError(f"--log_dir needs TensorBoard: {way_out}") from None
    try:
        return SummaryWriter(log_dir, purge_step=start + 1)
    except UnicodeEncodeError:
        raise UserError(
            f"--log_dir {log_dir}: TensorBoard cannot write to this name in this locale: "
            "set LC_ALL=C.UTF-8, or give another folder"
        ) from None
