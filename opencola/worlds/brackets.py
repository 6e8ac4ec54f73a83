"""Nests of brackets: a tiny language whose every closing bracket is determined by what came before.

A nest opens brackets of three kinds, and then closes them all, the last one first: "( [ ( ) ] )". Behind its first
closing bracket there is no choice, so completing a nest asks for nothing but memory.
"""

import hashlib
import random
from collections.abc import Sequence

PAIRS = {"(": ")", "[": "]", "{": "}"}
MIN_DEPTH, MAX_DEPTH = 2, 6


def closed(opened: Sequence[str]) -> str:
    """The nest that opens these brackets."""
    return " ".join([*opened, *(PAIRS[bracket] for bracket in reversed(opened))])


def nest(seed: int, index: int) -> str:
    """Nest number `index` of the endless corpus `seed`: 2 to 6 brackets, opened and closed."""
    digest = hashlib.blake2b(f"nest {seed} {index}".encode(), digest_size=16).digest()
    rng = random.Random(int.from_bytes(digest, "big"))
    return closed(rng.choices([*PAIRS], k=rng.randint(MIN_DEPTH, MAX_DEPTH)))


def prompt(text: str) -> str:
    """A nest up to its first closing bracket: the rest is determined."""
    return text[: len(text) // 2 + 2]


def can_begin(text: str) -> bool:
    """Whether a nest begins with `text`, which may end anywhere."""
    opened = [bracket for bracket in text if bracket in PAIRS]
    closing = any(bracket in PAIRS.values() for bracket in text)
    return closed(opened).startswith(text) and (MIN_DEPTH if closing else 0) <= len(opened) <= MAX_DEPTH


def is_nest(text: str) -> bool:
    """Whether `text` is a whole nest."""
    opened = [bracket for bracket in text if bracket in PAIRS]
    return MIN_DEPTH <= len(opened) <= MAX_DEPTH and text == closed(opened)
