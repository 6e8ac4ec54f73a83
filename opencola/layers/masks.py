"""Who may see whom: one predicate on (query, key) index tensors each, and its dense mask."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Predicate = Callable[[Tensor, Tensor], Tensor]


def block_causal(block_size: int) -> Predicate:
    """Position p sees position r iff block(p) >= block(r); block size 1 is strictly causal (official-format §3.4)."""
    return lambda query, key: query // block_size >= key // block_size


@dataclass(frozen=True, eq=False)
class PackedRows:
    """Training rows [clean | noisy copy 1 | noisy copy 2 ...] and who of them sees whom (model.md §3).

    Clean rows are latents 0..num_clean-1, those of a copy latents first..num_latents-1. The rule stands here alone:
    dense masks, FlexAttention and biases evaluate it, and tests hold the kernel in C to it.
    """

    num_clean: int
    num_latents: int
    block_size: int
    copies: int = 1
    first: int = 0
    history: Tensor | None = None
    """(B,) bool: samples whose noisy rows see clean ones; all when None."""
    documents: Tensor | None = None
    """(B, N) int32: the document of each latent; rows see their own only."""

    @property
    def num_rows(self) -> int:
        """Of a sample."""
        return self.num_clean + self.copies * (self.num_latents - self.first)

    @property
    def samples(self) -> int | None:
        """How many there are, B, where they differ in what they see."""
        return next((len(x) for x in (self.history, self.documents) if x is not None), None)

    def visible(self, sample: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """Whether the sample's row `query` sees its row `key`; int64 indices that broadcast.

        A row sees the clean rows before its block, and its own block of its own part. Blocks are counted from the
        first row of a part.
        """
        (part, latent), (key_part, key_latent) = self._place(query), self._place(key)
        block, key_block = self._block(part, latent), self._block(key_part, key_latent)
        seen = ((key_part == 0) & (key_latent < block)) | ((key_part == part) & (key_block == block))
        if self.history is not None:
            seen = seen & (self.history[sample] | (part == 0) | (key_part > 0))
        if self.documents is not None:
            seen = seen & (self.documents[sample, latent] == self.documents[sample, key_latent])
        return seen

    def _place(self, row: Tensor) -> tuple[Tensor, Tensor]:
        """The part of a row, 0 where it is clean, else its copy, counted from 1; and its latent."""
        length, behind = max(self.num_latents - self.first, 1), row - self.num_clean
        part = torch.where(behind < 0, 0, 1 + behind // length)
        return part, torch.where(behind < 0, row, self.first + behind % length)

    def _block(self, part: Tensor, latent: Tensor) -> Tensor:
        """The first latent of a row's block."""
        start = torch.where(part > 0, self.first, 0)
        return latent - (latent - start) % self.block_size


def clean_beside_noisy(num_clean: int, num_latents: int, block_size: int, first: int = 0) -> Predicate:
    """The rule of `PackedRows` with any number of copies, alike for all samples."""
    rows = PackedRows(num_clean, num_latents, block_size, first=first)
    return lambda query, key: rows.visible(torch.zeros_like(query), query, key)


def same_document(documents: Tensor) -> Tensor:
    """Boolean mask (B, 1, R, R) of rows with documents (B, R): true where both are of one."""
    return (documents[:, :, None] == documents[:, None, :])[:, None]


def dense(predicate: Predicate, num_queries: int, num_keys: int, device: torch.device | None = None) -> Tensor:
    """Boolean mask (num_queries, num_keys), true where the query may see the key."""
    query = torch.arange(num_queries, device=device)[:, None]
    key = torch.arange(num_keys, device=device)[None, :]
    return predicate(query, key)
