"""The flags that both scripts share, and a parser with one-line errors.

Flags are tables {name: arguments of argparse's add_argument}, added with `add_flags`.
"""

import argparse
import difflib
import math
import os
import shutil
from dataclasses import MISSING, fields

from datasets import NAMES
from engine.recipes import RECIPES
from models import ATTENTIONS, NATIVE_ATTENTIONS, ModelConfig
from utils import UserError


class ArgumentParser(argparse.ArgumentParser):
    """argparse with one-line errors that suggest the flag that was meant.

    The parsed arguments have one more attribute, `given`: the names of the flags on the
    command line.
    """

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, formatter_class=HelpFormatter, **kwargs)

    def parse_args(self, argv=None):
        args, unknown = self.parse_known_args(argv)
        if unknown:
            flag = unknown[0].partition("=")[0]
            near = difflib.get_close_matches(flag, self._option_string_actions, 1)
            hint = f"did you mean {near[0]}?" if near else "see --help"
            raise UserError(f"unrecognized argument {unknown[0]}: {hint}")
        # argparse overwrites an existing attribute only if its flag is given.
        given = argparse.Namespace(**dict.fromkeys(vars(args)))
        self.parse_known_args(argv, given)
        args.given = {name for name, value in vars(given).items() if value is not None}
        return args

    def error(self, message):
        raise UserError(f"{message} (see --help)")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """A wide column for the flags; shows the default of a flag if it has one."""

    def __init__(self, prog):
        super().__init__(prog, max_help_position=34, width=min(100, shutil.get_terminal_size()[0]))

    def _get_help_string(self, action):
        # Compared with `is`: 0 is a default, but equals False.
        without = any(action.default is x for x in (None, False, argparse.SUPPRESS))
        if without or not action.option_strings or "(default" in action.help:
            return action.help
        return super()._get_help_string(action)


def add_flags(parser, flags, title=None, description=None):
    """Add a table of flags, as a group of its own if it has a title."""
    group = parser.add_argument_group(title, description) if title else parser
    for name, options in flags.items():
        group.add_argument(f"--{name}", **options)


def refuse_given(args, flags, reason):
    """Raise a `UserError` if one of these flags was given."""
    for name in flags:
        if name in args.given:
            raise UserError(f"--{name} has no effect {reason}: leave it out")


def number(convert, low=-math.inf, high=math.inf, above=False):
    """An argparse type: a number from `low` (excluded with `above`) to `high`."""
    bounds = f"{'above' if above else 'at least'} {low}"
    bounds += "" if high == math.inf else f" and at most {high}"
    kind = "a whole number" if convert is int else "a number"

    def parse(text):
        try:
            value = convert(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not {kind}") from None
        if not (low <= value <= high and math.isfinite(value)) or (above and value == low):
            raise argparse.ArgumentTypeError(f"{text} is out of range: give {kind} {bounds}")
        return value

    return parse


positive_int = number(int, 1, 2**62)
COUNT = {"type": positive_int, "metavar": "N"}
PROBABILITY = {"type": number(float, 0, 0.999), "metavar": "P"}
POSITIVE = {"type": number(float, 0, above=True), "metavar": "X"}
NOT_NEGATIVE = {"type": number(float, 0), "metavar": "X"}
SEED = {"type": number(int, 0, 2**63 - 1), "metavar": "N"}

DATA = {
    "dataset": {
        "metavar": "NAME|FOLDER",
        "help": f"{', '.join(NAMES)}, or a folder with train.npy and test.npy or with train/ and "
        "test/ holding image files; a trained model can complete and evaluate any images of its "
        "shape (default: the checkpoint's, else mnist)",
    },
    "dataset_directory": {
        "metavar": "FOLDER",
        "default": os.getenv("DATASET_DIRECTORY", "./data"),
        "help": "where data sets are, or are downloaded to (default: the environment variable "
        "DATASET_DIRECTORY, else ./data)",
    },
}

MODEL = {
    "attention_type": {
        "choices": ATTENTIONS,
        "help": "linear, softmax (full), or with --backend fast-transformers one of the others",
    },
    "n_layers": {**COUNT, "help": "transformer layers"},
    "n_heads": {**COUNT, "help": "attention heads"},
    "d_query": {**COUNT, "help": "size of a head's queries, keys and values"},
    "mixtures": {**COUNT, "help": "components of the mixture of logistics that predicts a byte"},
    "dropout": {**PROBABILITY, "help": "dropout in the layers"},
    "attention_dropout": {**PROBABILITY, "help": "dropout of softmax's attention weights"},
    "softmax_temp": {
        **POSITIVE,
        "help": "scale of q.k before the softmax (default: 1/sqrt(d_query))",
    },
    "bits": {**COUNT, "help": "hash bits (reformer only)"},
    "rounds": {**COUNT, "help": "hashing rounds (reformer only)"},
    "chunk_size": {**COUNT, "help": "queries per block (reformer), bytes seen (local)"},
    "unmasked_reformer": {
        "action": "store_true",
        "help": "let a query attend to itself (reformer only)",
    },
    "neighbours": {
        "action": argparse.BooleanOptionalAction,
        "help": "show the network the pixels around the byte to be predicted: a masked "
        "convolution of the image, and a short convolution in each layer; the mixture's "
        "components begin side by side",
    },
}
# Fields of ModelConfig that follow from the data set.
OF_THE_IMAGES = ("length", "width", "channels")
FAST_MODEL = RECIPES["fast"][1]
SOFTMAX_ATTENTIONS = ["full", "reformer", "exact-topk", "local"]
# Flags that only some attention types use.
ONLY_FOR = {
    "softmax_temp": SOFTMAX_ATTENTIONS,
    "attention_dropout": SOFTMAX_ATTENTIONS,
    "bits": ["reformer"],
    "rounds": ["reformer"],
    "chunk_size": ["reformer", "local"],
    "unmasked_reformer": ["reformer"],
}
# A run may continue with another dropout; anything else would be another model.
MAY_CHANGE = ("dropout", "attention_dropout")


def add_model_flags(parser, more=None):
    """The architecture, and `more` flags.

    Every default is None: what is not given comes from a checkpoint, else from `ModelConfig`.
    """
    defaults = {field.name: field.default for field in fields(ModelConfig)}
    flags = {}
    for name, options in MODEL.items():
        flags[name] = {**options, "default": None}
        if defaults[name] not in (MISSING, None, False):
            fast = f", fast: {FAST_MODEL[name]}" if name in FAST_MODEL else ""
            flags[name]["help"] = f"{options['help']} (default: {defaults[name]}{fast})"
    description = "For a new model or a checkpoint of the original; other checkpoints store these."
    add_flags(parser, {**flags, **(more or {})}, "model", description)


def model_fields(args, stored, recipe=None):
    """The fields of ModelConfig, except those that follow from the images: those `stored` in a
    checkpoint, else the flags, else the `recipe`'s.

    A flag that contradicts the checkpoint, or has no effect, is a `UserError`.
    """
    names = [field.name for field in fields(ModelConfig) if field.name not in OF_THE_IMAGES]
    given = {name: value for name in names if (value := getattr(args, name)) is not None}
    for name, value in given.items():
        if name not in MAY_CHANGE and stored.get(name, value) != value:
            raise UserError(
                f"{typed(name, value)} contradicts the checkpoint, whose {name} is "
                f"{stored[name]}: leave the flag out, or give another checkpoint"
            )
    known = stored or recipe or {}
    chosen = {**{name: known[name] for name in names if name in known}, **given}
    check_model(ModelConfig(length=2, **chosen), given, args.backend)
    return chosen


def typed(name, value):
    """A model flag as it is typed."""
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no-{name}"
    return f"--{name} {value}"


def check_model(config, given, backend):
    """Raise a `UserError` for flags that do not fit together."""
    for name in given:
        if config.attention_type not in ONLY_FOR.get(name, (config.attention_type,)):
            raise UserError(
                f"--{name} has no effect with --attention_type {config.attention_type}: "
                f"leave it out, or use --attention_type {ONLY_FOR[name][0]}"
            )
    if config.attention_type not in NATIVE_ATTENTIONS and backend == "native":
        raise UserError(
            f"--attention_type {config.attention_type} needs --backend fast-transformers: "
            "give that, or use causal-linear or full"
        )
    if config.d_model % 4:
        raise UserError(
            f"--n_heads {config.n_heads} times --d_query {config.d_query} is {config.d_model}: "
            "it must be a multiple of 4, since half of it holds sines and cosines"
        )


MACHINE = {
    "device": {
        "default": "auto",
        "help": "auto (a GPU if there is one), cpu, cuda, cuda:N or mps",
    },
    "precision": {
        "choices": ["fp32", "bf16", "bf16-emulated", "auto"],
        "default": "fp32",
        "help": "of the matrix products; attention sums and the loss remain fp32; bf16-emulated: "
        "bf16 even if the device has no bfloat16 instructions, which is slow; auto: bf16 if it "
        "has them",
    },
    "backend": {
        "choices": ["native", "fast-transformers"],
        "default": "native",
        "help": "this program's layers, or those of pytorch-fast-transformers (make reference)",
    },
}


def add_machine_flags(parser, compile_help, more=None):
    """Where and how to compute."""
    compile_flag = {"action": argparse.BooleanOptionalAction, "help": compile_help}
    add_flags(parser, {**MACHINE, "compile": compile_flag, **(more or {})}, "machine")
