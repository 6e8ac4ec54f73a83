"""The settings of generation of a Plaid."""

from dataclasses import dataclass

from opencola.errors import UserError
from opencola.models.sampling import Sampling


@dataclass(frozen=True)
class PlaidSampling(Sampling):
    """Settings of generation."""

    owner = "a Plaid"

    steps: int = 16
    """Steps of ancestral sampling."""
    shift: float = 1.0
    """Time grid: t becomes shift t / (1 + (shift - 1) t), so that above 1 more steps are near the noise."""
    guidance: float = 1.0
    """Token guidance towards the prompt; 1: none, without the gradient."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_counts("steps")
        if self.shift <= 0:
            raise UserError(f"shift must be above 0, not {self.shift}")
