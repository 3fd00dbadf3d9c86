"""An option is declared once: a field of a dataclass that carries its kind, its help and its rules.

`ModelConfig` (models.py) and `Settings` (engine/recipes.py) consist of such fields. Their flags,
the validation of what a checkpoint stores, and the choice of a run's values are derived from them.
"""

import dataclasses
import math
import sys
from argparse import ArgumentTypeError
from dataclasses import dataclass
from functools import partial
from typing import Any

from utils import UserError


@dataclass(frozen=True)
class Number:
    """The numbers of a type, int or float, from `low` (itself excluded with `above`) to `high`.

    Called with a text, as argparse does, it returns the number, or raises ArgumentTypeError.
    """

    type: type
    low: float = -math.inf
    high: float = math.inf
    above: bool = False

    def accepts(self, value: Any) -> bool:
        if type(value) not in (int, self.type) or not abs(value) <= sys.float_info.max:
            return False
        return self.low <= value <= self.high and not (self.above and value == self.low)

    def __call__(self, text: str) -> int | float:
        kind = "a whole number" if self.type is int else "a number"
        try:
            value = self.type(text)
        except ValueError:
            raise ArgumentTypeError(f"{text!r} is not {kind}") from None
        if not self.accepts(value):
            bounds = f"{'above' if self.above else 'at least'} {self.low}"
            bounds += "" if self.high == math.inf else f" and at most {self.high}"
            raise ArgumentTypeError(f"{text} is out of range: give {kind} {bounds}")
        return value


COUNT = Number(int, 1, 2**62)
PROBABILITY = Number(float, 0, 0.999)
POSITIVE = Number(float, 0, above=True)
NOT_NEGATIVE = Number(float, 0)
SEED = Number(int, 0, 2**63 - 1)


@dataclass(frozen=True)
class Option:
    """What is known of an option. Its `kind` is a `Number`, a tuple of choices, or bool.

    `only_with`, if given, is another option and its values with which this one has an effect.
    """

    name: str
    default: Any
    kind: Number | tuple[str, ...] | type[bool]
    help: str
    only_with: tuple[str, tuple[str, ...]] | None = None
    may_change: bool = False  # when a run continues

    def accepts(self, value: Any) -> bool:
        """Whether the option may have this value, of any type."""
        if isinstance(self.kind, Number):
            return self.kind.accepts(value) or (value is None and self.default is None)
        if self.kind is bool:
            return type(value) is bool
        return type(value) is str and value in self.kind


def option(default: Any, kind: Any, help: str, **rules: Any) -> Any:
    """A field of a dataclass that is an `Option`."""
    return dataclasses.field(default=default, metadata={"kind": kind, "help": help, **rules})


changeable = partial(option, may_change=True)  # an option that may change when a run continues


def options(cls: type) -> dict[str, Option]:
    """The options among the fields of a dataclass, by name."""
    fields = [field for field in dataclasses.fields(cls) if field.metadata]
    return {f.name: Option(f.name, f.default, **f.metadata) for f in fields}


def typed(name: str, value: Any) -> str:
    """The flag that gives an option a value."""
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no-{name}"
    return f"--{name} {value}"


def choose(name: str, given: dict, stored: dict, *others: dict, may_change: bool = False) -> Any:
    """The value of `name` in the first of some dictionaries that has it: what is `given` on the
    command line, what is `stored` in a checkpoint, then the others, such as a recipe.

    A value that contradicts the stored one is a `UserError`, unless the run `may_change` it.
    """
    if not may_change and name in given and given[name] != stored.get(name, given[name]):
        problem = f"{typed(name, given[name])} contradicts the checkpoint, whose {name} is "
        raise UserError(f"{problem}{stored[name]}: leave the flag out, or give another checkpoint")
    return next(values[name] for values in (given, stored, *others) if name in values)


def choose_all(cls: type, given: dict, stored: dict, recipe: dict) -> dict[str, Any]:
    """The value of every option of a dataclass by `choose`, at last its default. Raises a
    `UserError` for one that is given and has no effect beside the others."""
    chosen = {}
    for name, o in options(cls).items():
        other, values = o.only_with or (None, ())  # declared before
        if name in given and other and chosen[other] not in values:
            problem = f"--{name} has no effect with --{other} {chosen[other]}"
            raise UserError(f"{problem}: leave it out, or use --{other} {values[0]}")
        defaults = {name: o.default}
        chosen[name] = choose(name, given, stored, recipe, defaults, may_change=o.may_change)
    return chosen
