"""Checkpoints: written whole or not at all, found by pattern, loaded without running code.

A checkpoint has the original experiment's three entries (`model_state`, `optimizer_state`,
`iteration`), so that its loader reads ours, and what makes it complete: `config` (the fields
of ModelConfig), `dataset` (its name and image_shape), `first_byte_counts` (256), `seed`,
`optimizer` (its name) and `format_version`.
"""

import math
import os
import re
import tempfile
import time
import warnings
from contextlib import suppress
from pathlib import Path

import torch

from checking import CHECKS, check_sums, is_count
from models import ModelConfig
from reporting import warn
from utils import UserError

FORMAT_VERSION = 1
# A temporary file not written to for so long, in seconds, was left by a run that was killed.
ABANDONED = 3600


def is_pattern(name):
    """Whether the name has a place for the iteration, such as weights.{}.pth."""
    return re.search(r"\{[^{}]*\}", name) is not None


def format_path(pattern, iteration):
    """The path of an iteration's checkpoint."""
    try:
        return Path(pattern.format(iteration))
    except (IndexError, KeyError, ValueError) as error:
        raise UserError(
            f"{pattern} is no pattern for checkpoints ({error}): "
            "write one {} for the iteration, as in weights.{}.pth"
        ) from None


def find(pattern):
    """The files that match a pattern, as (iteration, path), newest first."""
    folder, name = Path(pattern).parent, Path(pattern).name
    found = []
    if folder.is_dir():
        for path in folder.iterdir():
            if match := re.fullmatch(expression(name), path.name, re.ASCII):
                found.append((int(match[1]), path))
    return sorted(found, reverse=True)


def expression(name):
    """The regular expression of the names that a pattern makes."""
    return r"(\d{1,20})".join(re.escape(part) for part in re.split(r"\{[^{}]*\}", name))


def save(pattern, checkpoint, keep=None):
    """Write a checkpoint for its iteration, durably: a crash leaves the old file or the new one.

    With `keep`, only that many files of the pattern stay up to this iteration: later ones are of
    another run, or damaged. Raises OSError, and then leaves what was there.
    """
    iteration = checkpoint["iteration"]
    path = format_path(pattern, iteration)
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(path.parent, pattern)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name + ".", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            write({**checkpoint, "format_version": FORMAT_VERSION}, file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~umask())  # mkstemp makes files that only their owner reads
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    sync_folder(path.parent)
    if keep and is_pattern(pattern):
        for _, old in [found for found in find(pattern) if found[0] <= iteration][keep:]:
            old.unlink(missing_ok=True)
    return path


def write(checkpoint, file):
    """torch.save, which hides what a disk says behind an error of its own."""
    try:
        torch.save(checkpoint, file)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise OSError(str(error).strip().partition("\n")[0]) from None


def remove_abandoned(folder, pattern):
    """Remove what runs of this pattern were writing when they were killed."""
    name = re.compile(expression(Path(pattern).name) + r"\.\w+\.tmp")
    for path in folder.iterdir():
        with suppress(FileNotFoundError):  # another run's, which is in its place by now
            if name.fullmatch(path.name) and time.time() - path.stat().st_mtime > ABANDONED:
                path.unlink()


def umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def sync_folder(folder):
    """Flush the renaming itself."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def load_newest(name):
    """The checkpoint `name`, or the newest readable one of a pattern, and its path.

    Returns (None, None) where nothing matches a pattern. Raises `UserError` for a file that is
    missing, damaged or something else, and where a pattern matches only such files.
    """
    if not is_pattern(name) or Path(name).exists():
        return load(name), Path(name)
    candidates = find(name)
    for i, (_, path) in enumerate(candidates):
        try:
            return load(path), path
        except UserError as error:
            if i == len(candidates) - 1:
                raise
            warn(f"{error}; going back to {candidates[i + 1][1]}")
    return None, None


def load(path):
    """Read one checkpoint, checked to be one. Nothing in the file is executed."""
    try:
        with open(path, "rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, about foreign pickles
            check_sums(file)
            checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: give a checkpoint or a pattern") from None
    except Exception as error:  # torch raises every kind for files that are not its own
        raise damaged(path, str(error).strip().partition("\n")[0][:120] or type(error).__name__)
    entries = checkpoint if isinstance(checkpoint, dict) else {}
    version = entries.get("format_version", 0)
    if is_count(version) and version > FORMAT_VERSION:
        raise UserError(f"{path} was written by a newer version of this program: update it")
    needed = CHECKS if "format_version" in entries else ("model_state", "iteration")
    if missing := [name for name in needed if name not in entries]:
        raise UserError(f"{path} is not a checkpoint: it has no {' and no '.join(missing)}")
    for name, is_valid in CHECKS.items():
        if name in entries and not is_valid(entries[name]):
            raise damaged(path, f"its {name} is none")
    return checkpoint


def damaged(path, reason):
    return UserError(f"{path} is damaged or not a checkpoint ({reason}): delete it or give another")


def upgrade_layout(checkpoint, path):
    """Rename, in place, the weights of the original's older layout (its --load_pytorch), where
    attention was torch's own: in_proj stacks the query, key and value projections.

    The table of positions is left out: the original, too, replaced it by the model's own.
    """
    upgraded = {}
    for name, tensor in checkpoint["model_state"].items():
        prefix, found, rest = name.partition("self_attn.")
        kind = rest.rpartition("in_proj_")[2]  # weight or bias
        if found and rest.startswith("in_proj_"):
            for part, piece in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                upgraded[f"{prefix}attention.{part}_projection.{kind}"] = piece
        elif found:
            # Old temperatures, once stored beside the weights, are left out too.
            if rest != "softmax_temp":
                rest = rest.replace("out_proj.", "out_projection.")
                upgraded[f"{prefix}attention.{rest}"] = tensor
        elif name != "pos_embedding.pe":
            upgraded[name] = tensor
    if not any("self_attn." in name for name in checkpoint["model_state"]):
        raise UserError(f"--load_pytorch: {path} has no self_attn weights: leave the flag out")
    checkpoint["model_state"] = upgraded


def stored_config(checkpoint, path, n_heads=None, d_query=None):
    """The fields of ModelConfig that a checkpoint ({} for none) knows.

    One of the original's does not know the number of heads, since 8 of 32 and 4 of 64 have
    equal tensors: --n_heads or --d_query must say it.
    """
    if not checkpoint:
        return {}
    seen = config_from_tensors(checkpoint["model_state"], path)
    d_model = seen["d_model"]
    if "format_version" in checkpoint:
        config = vars(ModelConfig(**checkpoint["config"]))
        seen["length"] = math.prod(checkpoint["dataset"]["image_shape"])
        told = {**config, "d_model": config["n_heads"] * config["d_query"]}
        if any(told[name] != size for name, size in seen.items()):
            raise damaged(path, "its config is not that of its weights and images")
        return config
    if not (n_heads or d_query):
        raise UserError(
            f"{path} does not say how many heads its {d_model} channels are: "
            "give --n_heads or --d_query"
        )
    n_heads = n_heads or d_model // d_query
    d_query = d_query or d_model // n_heads
    if n_heads * d_query != d_model:
        raise UserError(
            f"{path} has {d_model} channels: --n_heads {n_heads} times --d_query {d_query} is "
            f"{n_heads * d_query}"
        )
    sizes = {name: seen[name] for name in ("n_layers", "mixtures")}
    return {**sizes, "n_heads": n_heads, "d_query": d_query}


def config_from_tensors(state, path="the checkpoint"):
    """What the shapes of a `model_state` show: n_layers, d_model, mixtures and, where it has
    positions, length."""
    try:
        outputs, d_model = state["predictor.weight"].shape
        layers = {name.split(".")[2] for name in state if name.startswith("transformer.layers.")}
        seen = {"n_layers": len(layers), "d_model": d_model, "mixtures": outputs // 3}
        if "pos_embedding.pe" in state:
            seen["length"] = state["pos_embedding.pe"].shape[1] + 1
    except (KeyError, ValueError, IndexError):
        raise UserError(f"{path} is not a checkpoint of an image transformer") from None
    return seen


def optimizer_state(optimizer):
    """The state of an optimiser, with what the original's RAdam looks up in a group it loads."""
    state = optimizer.state_dict()
    for group in state["param_groups"]:
        group |= {"max_grad_norm": 1.0, "buffer": [[None, None, None] for _ in range(10)]}
    return state


def import_optimizer_state(state, optimizer):
    """Give an optimiser the moments of a saved state, ours or the original's, in order.

    The optimiser's own groups stay: torch would take over those of the file, and the original's
    have no decoupled_weight_decay, so that the decay would turn into the other kind. Raises
    ValueError for moments of another model.
    """
    names = [name for group in state["param_groups"] for name in group["params"]]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if len(names) != len(parameters):
        raise ValueError(f"it has {len(names)} parameters, not {len(parameters)}")
    imported = {}
    for i, (name, parameter) in enumerate(zip(names, parameters, strict=True)):
        moments = state["state"].get(name)
        if not moments:
            continue  # never trained
        for key in ("exp_avg", "exp_avg_sq"):
            if moments[key].shape != parameter.shape:
                raise ValueError(f"parameter {i} has another shape")
            if not moments[key].isfinite().all():
                raise ValueError(f"a moment of parameter {i} is not finite")
        step = torch.as_tensor(moments["step"], dtype=torch.float32)
        imported[i] = {**moments, "step": step}
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": imported, "param_groups": groups})


def load_model_state(model, checkpoint, path):
    """Copy the weights into the model; every name and shape must agree, every number be finite."""
    for name, tensor in checkpoint["model_state"].items():
        if not torch.isfinite(tensor).all():
            raise UserError(f"{path}: {name} is not finite, the run diverged: give an earlier one")
    # The positions are no weights: where an upgraded layout has none, the model's own stay.
    state = {"pos_embedding.pe": model.pos_embedding.pe, **checkpoint["model_state"]}
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        first = str(error).strip().split("\n")[1:2] or [str(error)]
        raise UserError(
            f"the weights in {path} are not those of the model asked for: {first[0].strip()[:200]}"
        ) from None
