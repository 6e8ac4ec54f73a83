"""The numbers that a configuration may hold: each field carries its range, and one function checks them all.

steps: Annotated[int, Range(1)] = 1000
dropout: Share = 0.1

def __post_init__(self) -> None:
    check(self)
"""

import dataclasses
import functools
import math
import types
import typing
from dataclasses import dataclass
from typing import Annotated, Any

from opencola.errors import UserError

LARGEST = 2**31 - 1
"""Of counts and sizes."""


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`; without `low` itself where `above`. Neither infinity nor what is no number."""

    low: float = -math.inf
    high: float = math.inf
    above: bool = False

    def __contains__(self, value: float) -> bool:
        return math.isfinite(value) and self.low <= value <= self.high and not (self.above and value == self.low)

    def __str__(self) -> str:
        low = f"above {self.low:g}" if self.above else f"at least {self.low:g}"
        bounds = [low] * (self.low > -math.inf) + [f"at most {self.high:g}"] * (self.high not in (math.inf, LARGEST))
        return " and ".join(bounds) or "finite"


Count = Annotated[int, Range(1, LARGEST)]
"""At least one."""
Size = Annotated[int, Range(0, LARGEST)]
"""A count that may be 0."""
Seed = Annotated[int, Range(0, 2**63 - 1)]
Share = Annotated[float, Range(0, 1)]
Positive = Annotated[float, Range(0, above=True)]
NotNegative = Annotated[float, Range(0)]
Finite = Annotated[float, Range()]


def check(config: Any, flags: bool = False) -> None:
    """Raise UserError, naming the field, for a number of a dataclass that is out of its range, or is no number.

    flags: name fields as the command line does, `--num-samples`.
    """
    for field, kind, allowed, optional in ranged(config.__class__):
        value = getattr(config, field)
        if value is None and optional:
            continue
        name = f"--{field.replace('_', '-')}" if flags else field
        if _is_tuple(kind) and not isinstance(value, tuple):
            raise UserError(f"{name} must be a list of numbers, but is {value!r}")
        values = value if _is_tuple(kind) else (value,)
        number = int if _element(kind) is int else (int, float)
        for each in values:
            if isinstance(each, bool) or not isinstance(each, number):
                what = "a whole number" if number is int else "a number"
                raise UserError(f"{name} must be {what}, {allowed}, but is {each!r}")
            if each not in allowed:
                raise UserError(f"{name} must be {allowed}, but is {each!r}")


@functools.cache
def ranged(config: type) -> tuple[tuple[str, Any, Range, bool], ...]:
    """The fields of a dataclass that carry a range: name, type, range, and whether it may be None."""
    hints = typing.get_type_hints(config, include_extras=True)
    fields = []
    for field in dataclasses.fields(config):
        parts, optional = _parts(hints[field.name])
        for part in parts:
            inner = typing.get_args(part)[0] if typing.get_origin(part) is tuple else part
            for note in getattr(inner, "__metadata__", ()):
                if isinstance(note, Range):
                    fields.append((field.name, part, note, optional))
    return tuple(fields)


def _parts(hint: Any) -> tuple[list[Any], bool]:
    """The alternatives of a type, and whether None is among them."""
    alternatives = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    return [part for part in alternatives if part is not type(None)], type(None) in alternatives


def _is_tuple(hint: Any) -> bool:
    return typing.get_origin(hint) is tuple


def _element(hint: Any) -> Any:
    """The type of the number, or of the numbers in a tuple."""
    inner = typing.get_args(hint)[0] if _is_tuple(hint) else hint
    return typing.get_args(inner)[0]
