"""The numbers that a configuration may hold: each field carries its range, and one function checks them all.

steps: Annotated[int, Range(1)] = 1000
dropout: Share = 0.1

def __post_init__(self) -> None:
    check(self)
"""

import dataclasses
import functools
import math
import sys
import types
import typing
from dataclasses import dataclass
from typing import Annotated, Any

from opencola.errors import UserError

LARGEST = 2**31 - 1
"""Of counts and sizes."""
LARGEST_64 = 2**63 - 1
"""Of seeds, and of counts of a corpus."""


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`; without `low` itself where `above`, without `high` where `below`.

    Neither infinity nor what is no number.
    """

    low: float = -math.inf
    high: float = math.inf
    above: bool = False
    below: bool = False

    def __contains__(self, value: float) -> bool:
        if not abs(value) <= sys.float_info.max:  # of a whole number, too, which may be larger than any float
            return False
        return self.low <= value <= self.high and value not in self._left_out()

    def _left_out(self) -> tuple[float, ...]:
        return (self.low,) * self.above + (self.high,) * self.below

    def __str__(self) -> str:
        return self.said(self.high in (math.inf, LARGEST, LARGEST_64))

    def said(self, open_end: bool) -> str:
        """What is allowed, in words; open_end: without the upper bound."""
        bounds = [f"{'above' if self.above else 'at least'} {self.low}"] * (self.low > -math.inf)
        bounds += [f"{'below' if self.below else 'at most'} {self.high}"] * (not open_end)
        return " and ".join(bounds) or "finite"

    def to_be(self, value: Any) -> str:
        """What is allowed, in words, to say to whom has given `value`."""
        too_large = isinstance(value, int | float) and math.inf > value > self.high
        return self.said(open_end=False) if too_large else str(self)


Count = Annotated[int, Range(1, LARGEST)]
"""At least one."""
Size = Annotated[int, Range(0, LARGEST)]
"""A count that may be 0."""
Many = Annotated[int, Range(1, LARGEST_64)]
"""A count of documents or tokens of a corpus."""
Seed = Annotated[int, Range(0, LARGEST_64)]
Share = Annotated[float, Range(0, 1)]
Decay = Annotated[float, Range(0, 1, below=True)]
"""Of a moving average: what it keeps at a step."""
Positive = Annotated[float, Range(0, above=True)]
NotNegative = Annotated[float, Range(0)]
Finite = Annotated[float, Range()]


def check(config: Any) -> None:
    """Raise UserError, naming the field, for a number of a dataclass that is out of its range, or is no number.

    Of fields that come from the command line or a recipe, `run.flags` makes flags and keys of their names.
    """
    for field, kind, allowed, optional in ranged(config.__class__):
        value = getattr(config, field)
        if value is None and optional:
            continue
        if _is_tuple(kind) and not isinstance(value, tuple):
            raise UserError(f"{field} must be a list of numbers, but is {value!r}")
        values = value if _is_tuple(kind) else (value,)
        number = int if _element(kind) is int else (int, float)
        for each in values:
            if isinstance(each, bool) or not isinstance(each, number):
                what = "a whole number" if number is int else "a number"
                raise UserError(f"{field} must be {what}, {allowed}, but is {each!r}")
            if each not in allowed:
                raise UserError(f"{field} must be {allowed.to_be(each)}, but is {each!r}")


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
