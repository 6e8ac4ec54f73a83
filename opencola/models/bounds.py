"""Scores that are means over draws, as those of LLaDA and Plaid are: their settings, and what they do not give."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from opencola.errors import UserError
from opencola.ranges import Count, Seed, check


@dataclass(frozen=True)
class BoundScoring:
    """How texts are scored."""

    samples: Count = 128
    """Number of draws K for every text: of the masked tokens, or of time and noise."""
    rows: Count = 32
    """Number of draws to evaluate at a time: memory; no figure depends on it."""
    seed: Seed = 0
    """Seed of all draws, which depend on it, the text's id and the draw's number alone."""

    def __post_init__(self) -> None:
        check(self)

    @classmethod
    def quick(cls) -> "BoundScoring":
        """Settings that cost little."""
        return cls(samples=16)

    @property
    def texts_at_a_time(self) -> int:
        """How many to score together."""
        return max(1, self.rows // self.samples)


def no_log_probabilities(model: object, text: Sequence[int], count: int) -> Tensor:
    """Raises UserError: what a text's log-probability is bounded by does not tell that of a token."""
    raise UserError(f"a {type(model).__name__} has no exact log-probabilities of tokens")
