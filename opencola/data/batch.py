"""A batch of token sequences: what training gives to a model."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch


@dataclass(frozen=True)
class Batch:
    """Sequences of tokens, and what is needed to draw randomness that does not depend on how they are batched."""

    tokens: torch.Tensor
    """(B, L) int64 token ids; padding (never scored) only where documents are packed whole."""
    ids: torch.Tensor
    """(B,) int64: each sequence's number in the endless stream, counted from 0."""
    seed: int
    """The run's seed."""
    step: int
    """Batches served before this one."""
    documents: torch.Tensor | None = None
    """(B, L) int64: a number for each document of a row, the same for all its tokens; attention then stays within a
    document. None: attention does not know of documents."""
    scored: torch.Tensor | None = None
    """(B, L) bool: tokens that count in the loss; all when None."""
    counts: Mapping[str, torch.Tensor] | None = None
    """Denominators of the loss's means, by name, where the batch is part of a larger one: what the whole step has,
    divided by the number of its parts. None: the batch is whole, and they are its own."""
    cut: int | None = None
    """Documents that lost their ends in these sequences; None: none can."""

    def is_scored(self) -> torch.Tensor:
        """(B, L) bool: tokens that count in the loss."""
        return torch.ones_like(self.tokens, dtype=torch.bool) if self.scored is None else self.scored

    def scored_share(self) -> torch.Tensor:
        """The share of the tokens that counts in the loss: a scalar from 0 to 1, 1 where all do."""
        if self.scored is None:
            return torch.ones((), device=self.tokens.device)
        return self.scored.float().mean()

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch with its tensors on `device`."""
        tensors: dict[str, Any] = {name: value.to(device) for name, value in self._tensors().items()}
        counts = None if self.counts is None else {name: value.to(device) for name, value in self.counts.items()}
        return replace(self, counts=counts, **tensors)

    def rows(self, chosen: slice) -> "Batch":
        """Some of the rows."""
        tensors: dict[str, Any] = {name: value[chosen] for name, value in self._tensors().items()}
        return replace(self, **tensors)

    def shard(self, rank: int, num_ranks: int) -> "Batch":
        """Every `num_ranks`-th row, from row `rank` on: what one process, or one of several passes, works on.

        Raises ValueError when the rows cannot be divided evenly.
        """
        if len(self.ids) % num_ranks:
            raise ValueError(f"a batch of {len(self.ids)} sequences cannot be divided among {num_ranks} processes")
        return self.rows(slice(rank, None, num_ranks))

    def _tensors(self) -> dict[str, torch.Tensor]:
        values = {name: getattr(self, name) for name in ("tokens", "ids", "documents", "scored")}
        return {name: value for name, value in values.items() if value is not None}


def divisor(count: torch.Tensor) -> torch.Tensor:
    """A count, maybe a mean of those of parts, to divide a sum over as many things by: 1 in place of 0."""
    return torch.where(count > 0, count, torch.ones_like(count))
