"""What every model family offers: a loss to train on and, for whole models, generation."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from opencola.text.corpus import Batch


@dataclass(frozen=True)
class Loss:
    """A training loss: `total` is the sum of the weighted `terms`; `metrics` are detached figures to report."""

    total: Tensor
    terms: dict[str, Tensor]
    metrics: dict[str, Tensor]


class Trainable(Protocol):
    """What the training loop needs of a model beside being a module."""

    def loss(self, batch: Batch) -> Loss:
        """Loss of a batch; draws depend on (batch.seed, purpose, batch.ids) alone."""
        ...

    def learning_rate_ratios(self) -> dict[str, float]:
        """Factors on the learning rate by parameter-name prefix; others have 1."""
        ...
