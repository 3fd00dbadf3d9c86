"""Flags that several scripts share, and a parser with one-line errors.

Flags are tables {name: arguments of argparse's add_argument}, added with `Parser.add_flags`.
"""

import argparse
import difflib
import os
import shutil
from collections.abc import Iterable
from functools import partial
from typing import Any, NoReturn

import options
from datasets import NAMES
from engine.checkpoint import Checkpoint
from engine.recipes import COLOUR, RECIPES, Settings
from models import NATIVE_ATTENTIONS, ModelConfig
from options import Number, Option, choose_all, typed
from utils import UserError


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors that suggest the flag that was meant.

    The parsed arguments have one more attribute, `given`: the names of the flags on the
    command line.
    """

    def __init__(self, **kwargs):
        width = min(100, shutil.get_terminal_size()[0])
        formatter = partial(argparse.HelpFormatter, max_help_position=34, width=width)
        super().__init__(allow_abbrev=False, formatter_class=formatter, **kwargs)

    def parse_args(self, argv: list[str] | None = None) -> argparse.Namespace:
        args, unknown = self.parse_known_args(argv)
        if unknown:
            flag = unknown[0].partition("=")[0]
            near = difflib.get_close_matches(flag, self._option_string_actions, cutoff=0.7)
            hint = f"did you mean {' or '.join(near)}?" if near else "see --help"
            raise UserError(f"unrecognized argument {unknown[0]}: {hint}")
        # argparse overwrites an existing attribute only if its flag is given.
        given = argparse.Namespace(**dict.fromkeys(vars(args)))
        self.parse_known_args(argv, given)
        args.given = {name for name, value in vars(given).items() if value is not None}
        return args

    def add_flags(self, title: str, flags: dict[str, dict], description: str | None = None) -> None:
        """Add a group of flags from a table."""
        group = self.add_argument_group(title, description)
        for name, flag in flags.items():
            group.add_argument(f"--{name}", **flag)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see --help)")


def refuse_given(args: argparse.Namespace, flags: Iterable[str], reason: str) -> None:
    """Raise a `UserError` if one of these flags was given."""
    for name in flags:
        if name in args.given:
            value = getattr(args, name)
            shown = typed(name, value) if isinstance(value, bool) else f"--{name}"
            raise UserError(f"{shown} has no effect {reason}: leave it out")


def flag(help: str, kind: Any = None, default: Any = None, **more: Any) -> dict:
    """The arguments of argparse's add_argument for a flag. Its `kind` is a `Number`, a tuple of
    choices, bool (for --x and --no-x), or a text that stands for the value in the help. The help
    shows the default if there is one."""
    if default is not None and "(default" not in help:
        help += f" (default: {default})"
    known = {"help": help, "default": default, **more}
    if isinstance(kind, Number):
        return {"type": kind, "metavar": "N" if kind.type is int else "X", **known}
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction, **known}
    if isinstance(kind, tuple):
        return {"choices": kind, **known}
    return {"metavar": kind, "type": path, **known}


def path(text: str) -> str:
    """An argparse type: a path or pattern, in which ~ is the home folder even if it was quoted."""
    if not text:
        raise argparse.ArgumentTypeError("it is empty: give a name, or leave the flag out")
    return os.path.expanduser(text)


def switch(help: str) -> dict:
    """The same for a flag without a value."""
    return {"action": "store_true", "help": help}


def option_flags(cls: type) -> dict[str, dict]:
    """The flags of the options of a dataclass. Their defaults are None: what is not given comes
    from a checkpoint, a recipe, or the dataclass."""
    known = options.options(cls).values()
    return {option.name: flag(option.help + default_text(option), option.kind) for option in known}


def default_text(option: Option) -> str:
    """The default of an option, and the fast recipe's value, for the help."""
    if option.default is None or option.default is False:  # 0 is a default, but equals False
        return ""
    text = f" (default: {option.default}"
    fast, colour = (recipes["fast"].get(option.name) for recipes in (RECIPES, COLOUR))
    texts = [] if fast in (None, option.default) else [f"{fast}"]
    texts += [] if colour is None else [f"{colour} for colour images"]
    return text + (f", fast: {', '.join(texts)}" if texts else "") + ")"


DATA = {
    "dataset": flag(
        f"{', '.join(NAMES)}, or a folder with train.npy and test.npy or with train/ and test/ "
        "holding image files; a trained model can complete and evaluate any images of its shape "
        "(default: the checkpoint's, else mnist)",
        "NAME|FOLDER",
    ),
    "dataset_directory": flag(
        "where data sets are, or are downloaded to (default: the environment variable "
        "DATASET_DIRECTORY, else ./data)",
        "FOLDER",
        os.getenv("DATASET_DIRECTORY") or "./data",
    ),
}
MODEL, SETTINGS = option_flags(ModelConfig), option_flags(Settings)
MODEL_TEXT = "For a new model or a checkpoint of the original; other checkpoints store these."
MACHINE = {
    "device": flag("auto (a GPU if there is one), cpu, cuda, cuda:N or mps", default="auto"),
    "precision": flag(
        "of the matrix products; attention sums and the loss remain fp32; auto: the faster one, "
        "which on a CPU is measured",
        ("fp32", "bf16", "auto"),
        "fp32",
    ),
    "backend": flag(
        "this program's layers, or those of pytorch-fast-transformers (make reference)",
        ("native", "fast-transformers"),
        "native",
    ),
}


def given_options(args: argparse.Namespace, cls: type) -> dict[str, Any]:
    """The options of a dataclass that were given as flags."""
    return {name: getattr(args, name) for name in options.options(cls) if name in args.given}


def choose_model(args: argparse.Namespace, checkpoint: Checkpoint, recipe: dict) -> dict[str, Any]:
    """The options of ModelConfig: each as given, else as stored in the checkpoint, else the
    recipe's or the default. Raises a `UserError` for flags that do not fit together."""
    stored = checkpoint.model_options(args.n_heads, args.d_query)
    values = choose_all(ModelConfig, given_options(args, ModelConfig), stored, recipe)
    if values["attention_type"] not in NATIVE_ATTENTIONS and args.backend == "native":
        problem = f"--attention_type {values['attention_type']} needs --backend fast-transformers"
        raise UserError(f"{problem}: give that, or use {' or '.join(NATIVE_ATTENTIONS)}")
    if (d_model := values["n_heads"] * values["d_query"]) % 4:
        product = f"--n_heads {values['n_heads']} times --d_query {values['d_query']} is {d_model}"
        reason = "it must be a multiple of 4, since half of it holds sines and cosines"
        raise UserError(f"{product}: {reason}")
    return values
