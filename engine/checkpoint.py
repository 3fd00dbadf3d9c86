"""Checkpoint files: written atomically, found by pattern, loaded without executing code.

A checkpoint has the three entries of the original experiment (`model_state`, `optimizer_state`,
`iteration`), so that its loader reads ours, and what else a run needs: `config` (the fields
of ModelConfig), `dataset` (its name and image_shape), `first_byte_counts` (256), `seed`,
`optimizer` (its name), `settings` (of the optimisation), `threads` (of the CPU) and
`format_version`.
"""

import re
import warnings
from itertools import zip_longest
from pathlib import Path

import torch

import datasets
from engine.checkpoint_schema import CHECKS, OPTIONAL, check_checksums, is_count
from utils import UserError, one_line, say, warn, write_atomically

FORMAT_VERSION = 1
# What a checkpoint of the original must have; the moments of its optimiser may be missing.
ORIGINAL = ("model_state", "iteration")


def is_pattern(name):
    """Whether the name has a {} for the iteration, such as weights.{}.pth."""
    return re.search(r"\{[^{}]*\}", name) is not None


def format_path(pattern, iteration):
    """The path of an iteration's checkpoint."""
    try:
        return Path(pattern.format(iteration))
    except (IndexError, KeyError, ValueError) as error:
        raise UserError(
            f"{pattern} is not a valid checkpoint pattern ({error}): "
            "write one {} for the iteration, as in weights.{}.pth"
        ) from None


def find(pattern):
    """The files that match a pattern, as (iteration, path), highest iteration first."""
    folder, name = Path(pattern).parent, Path(pattern).name
    found = []
    if folder.is_dir():
        for path in folder.iterdir():
            if match := re.fullmatch(expression(name), path.name, re.ASCII):
                found.append((int(match[1]), path))
    return sorted(found, reverse=True)


def expression(name):
    """The regular expression that matches the file names of a pattern."""
    return r"(\d{1,20})".join(re.escape(part) for part in re.split(r"\{[^{}]*\}", name))


def save(pattern, checkpoint, keep=None):
    """Write a checkpoint for its iteration; a crash leaves the old file or the new one.

    With `keep`, only that many files of the pattern up to this iteration remain; later ones
    belong to another run, or are damaged. If it raises OSError, the old files are intact.
    """
    iteration = checkpoint["iteration"]
    path = format_path(pattern, iteration)
    content = {**checkpoint, "format_version": FORMAT_VERSION}
    write_atomically(path, lambda file: write(content, file), durable=True)
    if keep and is_pattern(pattern):
        for _, old in [found for found in find(pattern) if found[0] <= iteration][keep:]:
            old.unlink(missing_ok=True)
    return path


def export(path, checkpoint):
    """Write a checkpoint without the moments of its optimiser, which are up to twice as large as
    the weights, and without the path of its data set. Everything else stays, so that it loads
    wherever the checkpoint does. Raises OSError."""
    content = dict(checkpoint)
    if "optimizer_state" in content:
        content["optimizer_state"] = {**content["optimizer_state"], "state": {}}
    if dataset := content.get("dataset"):
        content["dataset"] = {**dataset, "name": datasets.portable_name(dataset["name"])}
    write_atomically(path, lambda file: write(content, file), durable=True)


def write(checkpoint, file):
    """torch.save, raising the OSError behind a RuntimeError of torch."""
    try:
        torch.save(checkpoint, file)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise OSError(one_line(error)) from None


def load_newest(name, or_none=False):
    """The checkpoint `name`, or the newest readable one of a pattern, and its path.

    Raises `UserError` if the file is missing, damaged or not a checkpoint, or if a pattern matches
    only such files or none; with `or_none`, no match gives ({}, None).
    """
    if not is_pattern(name) or Path(name).exists():
        found = [Path(name)]
    else:
        found = [path for _, path in find(name)]
    if not found and not or_none:
        raise UserError(f"no file matches {name}: give a checkpoint or a pattern")
    for path, older in zip_longest(found, found[1:]):
        try:
            checkpoint = load(path)
        except UserError as error:
            if not older:
                raise
            warn(f"{error}; falling back to {older}")
        else:
            say(f"loaded {path}, iteration {checkpoint['iteration']}")
            return checkpoint, path
    say(f"no file matches {name}: starting from scratch")
    return {}, None


def load(path):
    """Read one checkpoint and validate its entries. Nothing in the file is executed."""
    try:
        with open(path, "rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, about pickles of other programs
            check_checksums(file)
            checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: give a checkpoint or a pattern") from None
    except Exception as error:  # torch raises many types for foreign files
        first_line = str(error).strip().partition("\n")[0][:120]
        raise damaged(path, first_line or type(error).__name__) from None
    entries = checkpoint if isinstance(checkpoint, dict) else {}
    version = entries.get("format_version", 0)
    if is_count(version) and version > FORMAT_VERSION:
        raise UserError(f"{path} was written by a newer version: update this program")
    required = CHECKS.keys() - OPTIONAL if "format_version" in entries else ORIGINAL
    if missing := [name for name in CHECKS if name in required and name not in entries]:
        raise UserError(f"{path} is not a checkpoint: it has no {' and no '.join(missing)}")
    for name, is_valid in CHECKS.items():
        if name in entries and not is_valid(entries[name]):
            raise damaged(path, f"its {name} is not valid")
    return checkpoint


def damaged(path, reason):
    return UserError(f"{path} is damaged or not a checkpoint ({reason}): delete it or give another")
