"""Means over steps and processes: every figure weighs what it is a mean over."""

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from opencola.models.language_model import Loss
from opencola.train.distributed import mean
from opencola.train.sinks import Value


class Means:
    """Means of losses and other tensors over the steps that had them; entries that are not a number are left out."""

    def __init__(self) -> None:
        self._clear()

    def _clear(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._weights: dict[str, Tensor] = {}
        self._losses = 0
        self._terms: Counter[str] = Counter()  # losses that had each
        self._counted: set[str] = set()

    def add(self, values: Mapping[str, Tensor], weights: Mapping[str, Tensor] | None = None) -> None:
        """Take in a step's values: scalars or vectors, on any device (nothing is copied to the host here).

        weights: what they are means over, by name; 1 where there is none.
        """
        for name, value in values.items():
            value = value.detach().double()
            weight = torch.as_tensor(1.0 if weights is None else weights.get(name, 1.0)).to(value)
            self._sums[name] = self._sums.get(name, torch.zeros_like(value)) + weight * value.nan_to_num()
            self._weights[name] = self._weights.get(name, torch.zeros_like(value)) + weight * ~value.isnan()

    def add_loss(self, loss: Loss) -> None:
        """Take in a step's loss: its terms as loss/<term>, and its metrics."""
        self._losses += 1
        self._terms.update(loss.terms.keys())
        self._counted |= loss.terms.keys() & loss.counts.keys()
        self.add(named(loss.terms), named(loss.counts))
        self.add(loss.metrics, loss.counts)

    def take(self) -> dict[str, Value]:
        """The means over all processes, as plain numbers and lists, and start anew.

        None stands for no value, as JSON has no NaN. `loss` is the sum of its terms' means, each times the share of the
        steps that had it; None where nothing of what its terms count was there.
        """
        sums, weights = mean(self._sums), mean(self._weights)
        means = {name: plain((sums[name] / weights[name]).tolist()) for name in sums}
        if self._losses:
            means = {"loss": self._loss(means), **means}
        self._clear()
        return means

    def _loss(self, means: Mapping[str, Any]) -> float | None:
        if self._counted and all(means[f"loss/{name}"] is None for name in self._counted):
            return None
        parts = ((means[f"loss/{name}"], count / self._losses) for name, count in self._terms.items())
        return sum((value * share for value, share in parts if value is not None), start=0.0)


def named(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Terms of a loss, by the names that they have in records."""
    return {f"loss/{name}": value for name, value in values.items()}


def plain(value: Any) -> Value:
    """Numbers, or nested lists of them, with None for those that are not finite."""
    if isinstance(value, list):
        return [plain(entry) for entry in value]
    return value if math.isfinite(value) else None
