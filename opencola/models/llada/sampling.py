"""The settings of generation of a LLaDA."""

from dataclasses import dataclass
from typing import Literal

from opencola.models.sampling import Sampling
from opencola.ranges import Count, Finite


@dataclass(frozen=True)
class LLaDASampling(Sampling):
    """Settings of generation."""

    owner = "a LLaDA"
    left_to_right = False

    steps: Count = 16
    """Steps of unmasking per block, of which a block has at most one a token."""
    block_length: Count = 16
    """Tokens of a block; blocks are unmasked from left to right."""
    remasking: Literal["low_confidence", "random"] = "low_confidence"
    """Which of the proposed tokens stay masked: the least probable ones, or any."""
    guidance: Finite = 1.0
    """Classifier-free guidance; 1: none, without the second pass."""

    @property
    def work(self) -> int:
        """As in the base class: a pass is as long as the block, which never takes more of them than it has tokens."""
        return self.block_length
