"""Checkpoint files. This module alone knows what is in them.

A checkpoint has the three entries of the original experiment (`model_state`, `optimizer_state`,
`iteration`), so that its loader reads ours, and what else a run needs: `config` (the fields of
ModelConfig), `dataset` (its name and image_shape), `first_byte_counts` (256), `seed`, `settings`
(of the optimisation), `threads` (of the CPU), `measured` (the CPU and which precisions were faster
on it) and `format_version`.
"""

import glob
import os
import re
import warnings
import zipfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch

import datasets
from engine.optimizers import import_state
from engine.recipes import Settings
from files import FIELD, write_atomically
from models import ImageTransformer, ModelConfig
from options import COUNT, NOT_NEGATIVE, SEED, Number, options
from utils import UserError, one_line, say, warn

ORIGINAL = "model_state", "optimizer_state", "iteration"  # the original's entries
FORMAT_VERSION = 3  # 1 also had the optimiser's name as an entry of its own, 2 no `validation`


@dataclass(frozen=True)
class Checkpoint:
    """A model that was trained, and what a run needs to continue.

    What is None or empty is not known. That is everything for `NO_CHECKPOINT`, which is false, and
    all but the weights, the moments and the iteration for a checkpoint of the original.
    """

    model_state: dict[str, torch.Tensor] = field(default_factory=dict)
    optimizer_state: dict | None = None
    iteration: int = 0
    config: ModelConfig | None = None
    dataset: str | None = None
    image_shape: tuple[int, ...] | None = None
    first_byte_counts: torch.Tensor | None = None  # (256,), int64
    seed: int | None = None
    settings: dict[str, Any] = field(default_factory=dict)  # fields of Settings
    threads: int | None = None
    measured: dict[str, str] = field(default_factory=dict)  # engine.precision.Choices.stored
    path: Path | None = None

    def __bool__(self) -> bool:
        return bool(self.model_state)

    @classmethod
    def newest(cls, pattern: str | Path, missing_ok: bool = False) -> "Checkpoint":
        """The checkpoint `pattern`, or the newest readable one of a pattern with {}.

        Raises `UserError` if the file is missing, damaged or not a checkpoint, or if a pattern
        matches only such files or none; with `missing_ok`, no match gives `NO_CHECKPOINT`.
        """
        name = str(pattern)
        found = find_files(name)
        if not found and not missing_ok:
            raise UserError(f"no file matches {name}: give a checkpoint or a pattern")
        for path, older in zip_longest(found, found[1:]):
            try:
                checkpoint = cls.read(path)
                say(f"loaded {path}, iteration {checkpoint.iteration}")
                return checkpoint
            except UserError as error:
                if not older:
                    raise
                warn(f"{error}; falling back to {older}")
        return NO_CHECKPOINT

    @classmethod
    def read(cls, path: Path) -> "Checkpoint":
        """Read one file and validate its entries. Nothing in the file is executed."""
        entries = read_entries(path)
        version = entries.get("format_version", 0)
        if COUNT.accepts(version) and version > FORMAT_VERSION:
            raise UserError(f"{path} was written by a newer version: update this program")
        # Those of the original may come without moments.
        required = ("model_state", "iteration")
        if "format_version" in entries:
            required = ENTRIES.keys() - {"measured"}  # which version 3 did not have at first
        if missing := [name for name in ENTRIES if name in required and name not in entries]:
            raise UserError(f"{path} is not a checkpoint: it has no {' and no '.join(missing)}")
        for name, is_valid in ENTRIES.items():
            if name in entries and not is_valid(value := entries[name]):
                short = isinstance(value, (int, float, str)) and len(repr(value)) < 40
                shown = repr(value) if short else f"a {type(value).__name__}"
                raise not_valid(path, f"its {name} is {shown}, which is not valid")
        return cls.from_entries(entries, path)

    @classmethod
    def from_entries(cls, entries: dict, path: Path) -> "Checkpoint":
        """The checkpoint of valid entries. Raises `UserError` if they contradict each other."""
        known = {f.name: entries[f.name] for f in fields(cls) if f.name in entries}
        if "format_version" not in entries:
            checkpoint = cls(**{name: known[name] for name in ORIGINAL if name in known}, path=path)
            checkpoint.sizes()
            return checkpoint
        shape = tuple(entries["dataset"]["image_shape"])
        stored = entries["config"]
        values = {name: stored[name] for name in options(ModelConfig) if name in stored}
        config = ModelConfig.for_images(shape, **values)
        # A path is stored in UTF-8, whatever the encoding of file names here.
        name = os.fsdecode(entries["dataset"]["name"].encode("utf-8", "surrogateescape"))
        # What runs did before these settings existed.
        settings = {"validation": 0, "mean_rate": 0.03, **entries["settings"]}
        known |= {"config": config, "dataset": name, "image_shape": shape, "settings": settings}
        checkpoint = cls(**known, path=path)
        expected = {**vars(config), "d_model": config.d_model}
        seen = [*stored.items(), *checkpoint.sizes().items()]
        if any(expected[name] != value for name, value in seen):
            raise not_valid(path, "its config does not match its weights and images")
        return checkpoint

    def sizes(self) -> dict[str, int]:
        """n_layers, d_model, mixtures and, with a table of positions, length, from the weights."""
        state = self.model_state
        try:
            outputs = len(state["predictor.bias"])
            (d_model,) = state["transformer.norm.weight"].shape
            layers = {key.split(".")[2] for key in state if key.startswith("transformer.layers.")}
            sizes = {"n_layers": len(layers), "d_model": d_model, "mixtures": outputs // 3}
            if "pos_embedding.pe" in state:
                sizes["length"] = state["pos_embedding.pe"].shape[1] + 1
        except (KeyError, ValueError, IndexError, TypeError):
            raise UserError(f"{self.path} is not a checkpoint of an image transformer") from None
        return sizes

    def initial_weights(self) -> "Checkpoint":
        """A checkpoint of iteration 0, for a new run, that has nothing but the weights."""
        kept = {"config": self.config, "image_shape": self.image_shape, "path": self.path}
        return Checkpoint(self.model_state, **kept)

    @property
    def lr(self) -> float | None:
        """The learning rate of its iteration (with Muon, that of AdamW)."""
        groups = (self.optimizer_state or {}).get("param_groups") or [{}]
        rate = groups[-1].get("lr")
        return rate if NOT_NEGATIVE.accepts(rate) else None

    def model_options(self, n_heads: int | None = None, d_query: int | None = None) -> dict:
        """The options of ModelConfig that the checkpoint determines: those of its architecture, and
        for a run that continues also its dropout.

        One of the original does not determine the number of heads, since 8 heads of 32 and 4 of 64
        have equal shapes: `n_heads` or `d_query` must be given.
        """
        if not self:
            return {}
        if self.config:
            known = options(ModelConfig).values()
            fixed = [o.name for o in known if self.iteration or not o.may_change]
            return {name: getattr(self.config, name) for name in fixed}
        sizes = self.sizes()
        d_model = sizes["d_model"]
        if not (n_heads or d_query):
            problem = f"{self.path} does not determine how many heads its {d_model} channels have"
            raise UserError(f"{problem}: give --n_heads or --d_query")
        n_heads = n_heads or d_model // d_query
        d_query = d_query or d_model // n_heads
        if n_heads * d_query != d_model:
            product = f"--n_heads {n_heads} times --d_query {d_query} is {n_heads * d_query}"
            raise UserError(f"{self.path} has {d_model} channels: {product}")
        determined = {name: sizes[name] for name in ("n_layers", "mixtures")}
        return {**determined, "n_heads": n_heads, "d_query": d_query, "neighbours": False}

    def upgraded(self) -> "Checkpoint":
        """The same checkpoint with the weights of the original's older layout (--load_pytorch)
        renamed. There a layer's attention is torch's own: in_proj stacks the query, key and value
        projections.

        The position table is left out: the original, too, replaced it by the model's own. So are
        the temperatures that were once stored beside the weights.
        """
        if not any("self_attn." in name for name in self.model_state):
            problem = f"{self.path} has no self_attn weights"
            raise UserError(f"--load_pytorch: {problem}: leave the flag out")
        upgraded = {}
        for name, tensor in self.model_state.items():
            if name == "pos_embedding.pe" or name.endswith("self_attn.softmax_temp"):
                continue
            name = name.replace("self_attn.", "attention.").replace("out_proj.", "out_projection.")
            prefix, stacked, kind = name.partition("in_proj_")  # kind: weight or bias
            if stacked:
                for part, piece in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                    upgraded[f"{prefix}{part}_projection.{kind}"] = piece
            else:
                upgraded[name] = tensor
        return replace(self, model_state=upgraded)

    def restore_model(self, model: ImageTransformer) -> None:
        """Copy the weights and the histogram of first bytes to a model. Raises `UserError` unless
        every name and shape agrees and every number is finite."""
        self.check_finite()
        # Positions are not trained: if an upgraded layout has none, the model keeps its own.
        weights = {"pos_embedding.pe": model.pos_embedding.pe, **self.model_state}
        if difference := first_difference(model.state_dict(), weights):
            raise UserError(f"the weights in {self.path} do not fit the model: {difference}")
        model.load_state_dict(weights)
        if self.first_byte_counts is not None:
            model.first_byte_counts.copy_(self.first_byte_counts)

    def check_finite(self) -> None:
        for name, tensor in self.model_state.items():
            if not torch.isfinite(tensor).all():
                raise UserError(f"{self.path}: {name} is not finite: give an earlier checkpoint")

    def restore_optimizer(self, optimizer: Any) -> None:
        """Give the moments, if there are any, to an optimiser. Raises `UserError` for those of
        another model."""
        if not self.iteration:
            return  # a new run
        if not (self.optimizer_state and self.optimizer_state["state"]):
            return say("the checkpoint has no moments of the optimiser: they start at zero")
        try:
            import_state(optimizer, self.optimizer_state)
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            problem = f"the optimiser's state in {self.path} does not belong to this model"
            raise UserError(f"{problem}: {error}") from None

    def warn_about_threads(self, device: torch.device) -> None:
        """Warn if the number of threads changes: sums in another order are rounded differently."""
        threads = torch.get_num_threads()
        if device.type == "cpu" and self.threads not in (None, threads):
            warn(
                f"this run used {self.threads} CPU threads and continues with {threads}: its "
                "numbers will differ in the last digits from those of an uninterrupted run"
            )

    def save(self, pattern: str, keep: int | None = None) -> Path:
        """Write the file of this iteration; a crash leaves the old file or the new one. Returns its
        path.

        With `keep`, only that many files of the pattern up to this iteration remain; later ones
        belong to another run, or are damaged. If it raises OSError, the old files are intact; one
        that cannot be removed is a warning.
        """
        path = format_path(pattern, self.iteration)
        self.write(path)
        if keep and is_pattern(pattern):
            for _, old in [found for found in find(pattern) if found[0] <= self.iteration][keep:]:
                remove(old, folder=is_pattern(Path(pattern).parent))
        return path

    def export(self, path: Path) -> None:
        """Write a file without the moments of the optimiser, which are up to twice as large as the
        weights, and without the path of the data set. It loads wherever the checkpoint does. Raises
        OSError, and `UserError` for a weight that is not finite or a file that is neither empty nor
        an export."""
        self.check_finite()
        if path.exists() and path.stat().st_size > 0 and not is_export(path):
            raise UserError(f"--export {path} would replace another file: give another name")
        state = self.optimizer_state and {**self.optimizer_state, "state": {}}
        name = self.dataset and datasets.portable_name(self.dataset)
        replace(self, optimizer_state=state, dataset=name).write(path)

    def write(self, path: Path) -> None:
        entries = {"model_state": self.model_state, "iteration": self.iteration}
        if self.optimizer_state:
            entries["optimizer_state"] = self.optimizer_state
        if self.config:
            name = os.fsencode(self.dataset).decode("utf-8", "surrogateescape")
            entries |= {
                "config": vars(self.config),
                "dataset": {"name": name, "image_shape": list(self.image_shape)},
                "first_byte_counts": self.first_byte_counts,
                "seed": self.seed,
                "settings": self.settings,
                "threads": self.threads,
                "measured": self.measured,
                "format_version": FORMAT_VERSION,
            }
        write_atomically(path, lambda file: torch_save(entries, file), durable=True)


NO_CHECKPOINT = Checkpoint()


# What is in a file


def read_entries(path: Path) -> dict:
    """The entries of a file. Raises `UserError` if it cannot be read or holds something else."""
    try:
        with open(path, "rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, about pickles of other programs
            check_checksums(file)
            entries = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: give a checkpoint or a pattern") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): give another file") from None
    except Exception as error:  # torch raises many types for foreign files
        if names := unsafe_types(path):
            raise UserError(
                f"{path} holds {', '.join(names)}, which is not loaded because that could run "
                "code: if you trust the file, read it with torch.load(..., weights_only=False), "
                "and save it again with plain numbers, texts and tensors"
            ) from None
        # torch's own words would lead a user to turn weights_only off.
        reason = one_line(error, 120) if type(error) is ValueError else "torch cannot read it"
        raise not_valid(path, reason) from None
    return entries if isinstance(entries, dict) else {}


def is_export(path: Path) -> bool:
    """Whether a file is a checkpoint without moments of the optimiser."""
    try:
        entries = read_entries(path)
    except UserError:
        return False
    state = entries.get("optimizer_state")
    no_moments = state is None or (is_optimizer_state(state) and not state["state"])
    return is_model_state(entries.get("model_state")) and no_moments


def unsafe_types(path: Path) -> list[str]:
    """The names of what torch does not load with weights_only, in a file that is intact."""
    with suppress(Exception):
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))[:3]
    return []


def remove(path: Path, folder: bool) -> None:
    """Remove an old checkpoint and, with `folder`, its folder if that is empty then. A failure is a
    warning."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        return warn(f"the old checkpoint {path} cannot be removed ({error.strerror})")
    if folder:
        with suppress(OSError):  # not empty
            path.parent.rmdir()


def not_valid(path: Path, reason: str) -> UserError:
    return UserError(f"{path} is damaged or not a checkpoint ({reason}): give another file")


def check_checksums(file: Any) -> None:
    """Raise ValueError if the file is a zip archive, as torch writes, whose checksums do not
    match: torch does not verify them. torch never compresses, so a compressed one is refused."""
    if zipfile.is_zipfile(file):  # else written by a torch before 1.6, or by another program
        with zipfile.ZipFile(file) as content:
            if any(info.compress_type != zipfile.ZIP_STORED for info in content.infolist()):
                raise ValueError("compressed")
            if bad := content.testzip():
                raise ValueError(f"the checksum of {bad} does not match")
    file.seek(0)


def torch_save(entries: dict, file: Any) -> None:
    """torch.save, raising the OSError behind a RuntimeError of torch."""
    try:
        torch.save(entries, file)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise OSError(one_line(error)) from None


def is_weight(x: Any) -> bool:
    """Whether it is a plain CPU tensor with as many elements in memory as in its shape."""
    if not (isinstance(x, torch.Tensor) and x.layout == torch.strided and x.is_floating_point()):
        return False
    return x.device.type == "cpu" and x.nbytes <= x.untyped_storage().nbytes()


def is_model_state(x: Any) -> bool:
    return isinstance(x, dict) and all(
        isinstance(name, str) and is_weight(tensor) for name, tensor in x.items()
    )


def is_optimizer_state(x: Any) -> bool:
    """Whether it has the structure that `import_state` reads."""
    match x:
        case {"state": dict(), "param_groups": list(groups)}:
            return all(isinstance(g, dict) and isinstance(g.get("params"), list) for g in groups)
    return False


def has_options(cls: type, *others: str) -> Callable[[Any], bool]:
    """Whether an entry is a dictionary of valid options of a dataclass, and of `others`, sizes."""
    kinds = {name: option.accepts for name, option in options(cls).items()}
    kinds |= dict.fromkeys(others, Number(int, 0).accepts)

    def is_valid(x: Any) -> bool:
        known = isinstance(x, dict) and x.keys() <= kinds.keys()
        return known and all(kinds[name](value) for name, value in x.items())

    return is_valid


def is_dataset(x: Any) -> bool:
    match x:
        case {"name": str(), "image_shape": list(shape)}:
            return all(map(COUNT.accepts, shape)) and (len(shape) == 2 or shape[2:] == [3])
    return False


def is_measured(x: Any) -> bool:
    if not isinstance(x, dict) or not all(isinstance(value, str) for value in x.values()):
        return False
    return all(x[part] in ("fp32", "bf16") for part in x.keys() - {"machine"})


def is_histogram(x: Any) -> bool:
    plain = isinstance(x, torch.Tensor) and x.dtype == torch.int64 and x.shape == (256,)
    return plain and bool((x >= 0).all())


# The entries of a file, and what each must be.
ENTRIES: dict[str, Callable[[Any], bool]] = {
    "model_state": is_model_state,
    "optimizer_state": is_optimizer_state,
    "iteration": Number(int, 0, 2**63 - 1).accepts,
    "config": has_options(ModelConfig, "length", "width", "channels"),
    "dataset": is_dataset,
    "first_byte_counts": is_histogram,
    "seed": SEED.accepts,
    "settings": has_options(Settings),
    "threads": COUNT.accepts,
    "measured": is_measured,
    "format_version": COUNT.accepts,
}


def is_pattern(name: str | Path) -> bool:
    """Whether the name has a {} for the iteration, such as weights.{}.pth."""
    return FIELD.search(str(name)) is not None


def format_path(pattern: str, iteration: int) -> Path:
    """The path of an iteration's checkpoint."""
    path = FIELD.sub(lambda field: field[0].format(iteration), pattern)
    if "{" in path or "}" in path:
        raise UserError(
            f"{pattern} is not a valid pattern: write {{}} for the iteration, as in "
            "weights.{}.pth or run/{}/weights.pth"
        )
    if path.endswith(os.sep):
        raise UserError(f"{pattern} is a folder: add the name of a file, as in {path}{{}}.pth")
    return Path(path)


def find_files(name: str) -> list[Path]:
    """The file itself or, for a pattern, those that match it, highest iteration first."""
    if is_pattern(name) and not Path(name).exists():
        return [path for _, path in find(name)]
    return [Path(name)]


def find(pattern: str) -> list[tuple[int, Path]]:
    """The files that match a pattern, as (iteration, path), highest iteration first."""
    parts = FIELD.split(str(Path(pattern)))[::2]  # what is between the fields
    regex = re.compile(r"(\d{1,20})".join(map(re.escape, parts)), re.ASCII)
    found = []
    for path in glob.iglob("*".join(map(glob.escape, parts))):
        match = regex.fullmatch(path)
        iterations = set(map(int, match.groups())) if match else ()
        if len(iterations) == 1:
            found.append((*iterations, Path(path)))
    return sorted(found, reverse=True)


def first_difference(expected: dict, weights: dict) -> str | None:
    """How the names and shapes of `weights` differ from those expected, in words, or None."""
    if missing := expected.keys() - weights.keys():
        return f"{min(missing)} is missing"
    if unknown := weights.keys() - expected.keys():
        return f"{min(unknown)} is not part of the model"
    for name, tensor in expected.items():
        if tensor.shape != weights[name].shape:
            return f"{name} is {list(weights[name].shape)} and should be {list(tensor.shape)}"
    return None
