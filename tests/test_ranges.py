"""Numbers carry their ranges, and messages name field, value and what is allowed."""

import math
from dataclasses import dataclass
from typing import Annotated, Any

import pytest

from opencola.errors import UserError
from opencola.ranges import Count, Decay, Finite, NotNegative, Positive, Range, Seed, Share, Size, check


@dataclass(frozen=True)
class Config:
    count: Count = 1
    size: Size = 0
    seed: Seed = 0
    share: Share = 0.5
    positive: Positive = 1.0
    rate: NotNegative = 0
    shift: Finite = -3.0
    odd: Annotated[float, Range(-1, 1, above=True)] = 1.0
    limit: Count | None = None
    several: tuple[NotNegative, ...] = (0.0, 1.0)
    decay: Decay = 0.9
    pair: tuple[Share, Share] = (0.1, 0.9)
    name: str = "x"

    def __post_init__(self) -> None:
        check(self)


def test_what_is_allowed() -> None:
    Config()
    Config(count=2**31 - 1, seed=2**63 - 1, share=1, positive=1e-300, limit=7, several=(), odd=-0.99)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("count", 0, "count must be at least 1, but is 0"),
        ("count", 1.0, "count must be a whole number, at least 1, but is 1.0"),
        ("count", True, "count must be a whole number, at least 1, but is True"),
        ("count", "", "count must be a whole number, at least 1, but is ''"),
        ("count", [1], r"count must be a whole number, at least 1, but is \[1\]"),
        ("count", 2**31, "count must be at least 1 and at most 2147483647, but is 2147483648"),
        ("size", -1, "size must be at least 0, but is -1"),
        ("seed", 2**64, "seed must be at least 0 and at most 9223372036854775807, but is 18446744073709551616"),
        ("decay", 1, "decay must be at least 0 and below 1, but is 1"),
        ("shift", 10**400, f"shift must be finite, but is {10**400}"),
        ("share", 1.1, "share must be at least 0 and at most 1, but is 1.1"),
        ("share", math.nan, "share must be at least 0 and at most 1, but is nan"),
        ("positive", 0, "positive must be above 0, but is 0"),
        ("positive", math.inf, "positive must be above 0, but is inf"),
        ("rate", -1e-9, "rate must be at least 0, but is -1e-09"),
        ("shift", -math.inf, "shift must be finite, but is -inf"),
        ("odd", -1, "odd must be above -1 and at most 1, but is -1"),
        ("limit", 0, "limit must be at least 1, but is 0"),
        ("limit", "", "limit must be a whole number, at least 1, but is ''"),
        ("several", (0.0, -2.0), "several must be at least 0, but is -2.0"),
        ("several", 3.0, "several must be a list of numbers, but is 3.0"),
        ("pair", (0.0, 2.0), "pair must be at least 0 and at most 1, but is 2.0"),
    ],
)
def test_what_is_not(field: str, value: Any, message: str) -> None:
    with pytest.raises(UserError, match=f"^{message}$"):
        Config(**{field: value})
