"""Who may see whom: one predicate on (query, key) index tensors each, and its dense mask."""

from collections.abc import Callable

import torch
from torch import Tensor

Predicate = Callable[[Tensor, Tensor], Tensor]


def block_causal(block_size: int) -> Predicate:
    """Position p sees position r iff block(p) >= block(r); block size 1 is strictly causal (official-format §3.4)."""
    return lambda query, key: query // block_size >= key // block_size


def clean_beside_noisy(num_clean: int, num_latents: int, block_size: int, first: int = 0) -> Predicate:
    """Packed training rows [clean | noisy copy 1 | noisy copy 2 ...] (model.md §3).

    Clean rows 0..num_clean-1 are block-causal among themselves; a row of a noisy copy (latents first..num_latents-1, a
    row each) sees the clean blocks before its own and its own block of its own copy.
    """
    length = num_latents - first

    def predicate(query: Tensor, key: Tensor) -> Tensor:
        query_noisy, key_noisy = query >= num_clean, key >= num_clean
        query_row, key_row = query - num_clean, key - num_clean
        query_block = torch.where(query_noisy, first + query_row % length, query) // block_size
        key_block = torch.where(key_noisy, first + key_row % length, key) // block_size
        same_copy = query_row // length == key_row // length
        history = ~key_noisy & torch.where(query_noisy, query_block > key_block, query_block >= key_block)
        return history | (query_noisy & key_noisy & same_copy & (query_block == key_block))

    return predicate


def same_document(documents: Tensor) -> Tensor:
    """Boolean mask (B, 1, R, R) of rows with documents (B, R): true where both are of one."""
    return (documents[:, :, None] == documents[:, None, :])[:, None]


def dense(predicate: Predicate, num_queries: int, num_keys: int, device: torch.device | None = None) -> Tensor:
    """Boolean mask (num_queries, num_keys), true where the query may see the key."""
    query = torch.arange(num_queries, device=device)[:, None]
    key = torch.arange(num_keys, device=device)[None, :]
    return predicate(query, key)
