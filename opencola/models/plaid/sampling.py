"""The settings of generation of a Plaid."""

from dataclasses import dataclass

from opencola.models.sampling import Sampling
from opencola.ranges import Count, Finite, Positive


@dataclass(frozen=True)
class PlaidSampling(Sampling):
    """Settings of generation."""

    owner = "a Plaid"
    left_to_right = False

    steps: Count = 16
    """Steps of ancestral sampling."""
    shift: Positive = 1.0
    """Time grid: t becomes shift t / (1 + (shift - 1) t), so that above 1 more steps are near the noise."""
    guidance: Finite = 1.0
    """Token guidance towards the prompt; 1: none, without the gradient."""

    @property
    def work(self) -> int:
        """As in the base class."""
        return self.steps
