"""KVCache: the keys and values of committed rows, a value passed in and out."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from opencola.kernels import rows as kernels
from opencola.kernels.choice import implemented_by
from opencola.layers.attention import Attend, attention

FEW = 8  # rows of a call below which the kernel takes one at a time: how many there are must not depend on the batch
ROUND = 48  # key counts are rounded up to whole steps of matrix kernels, so that padding never changes a sum's order


def whole_steps(rows: int) -> int:
    """Rows to compute, or to see: whole steps of matrix kernels, so that padding never changes the order of a sum."""
    return -(-rows // ROUND) * ROUND


Alone = tuple[Tensor, Tensor, Tensor]
"""Keys and values (A, R, H, Dh) of samples that see only these rows, and limits (A, R) that say so."""


def _by_kernel(q: Tensor, k: Tensor, v: Tensor, limits: Tensor, bias: Any, alone: Alone | None = None) -> Tensor:
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    few = q.shape[1] < FEW
    kernels.prefix_attention(q[: len(limits)], k, v, limits, out[: len(limits)], few)
    if alone is not None:
        kernels.prefix_attention(q[len(limits) :], *alone, out[len(limits) :], few)
    return out


@implemented_by(_by_kernel, worthwhile=lambda *_: not torch.is_grad_enabled())
def prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    limits: Tensor,
    bias: Callable[[torch.dtype], Tensor],
    alone: Alone | None = None,
) -> Tensor:
    """softmax(q kᵀ / sqrt(Dh)) v where a row of q (B + A, R, H, Dh) sees the first `limits` (B, R) of T keys.

    k, v (B, T, H, Dh); bias: of a type, what hides the others in the scores (B, 1, R, T or fewer); alone: of the last A
    samples of q, where there are such.
    """
    hidden = bias(q.dtype)
    k, v = (x[:, : hidden.shape[-1]].to(q.dtype) for x in (k, v))
    out = attention(q[: len(limits)], k, v, hidden)
    return out if alone is None else torch.cat((out, attention(q[len(limits) :], *alone[:2])))


@dataclass(frozen=True)
class KVCache:
    """Finished (normalised, rotated) keys and values of every layer, with a length per sample.

    A read places the call's rows behind the committed ones, where no later reader looks, so nothing is concatenated;
    `append` returns the cache that counts them. The values share their rows: an older one stays valid, but a read
    through it overwrites what newer ones have appended.
    """

    keys: list[Tensor]  # per layer (B, capacity, H, Dh)
    values: list[Tensor]
    lengths: Tensor  # (B,) committed rows of each sample

    @classmethod
    def empty(
        cls, like: Tensor, batch: int, num_layers: int, num_heads: int, head_dim: int, capacity: int
    ) -> "KVCache":
        """Room for `capacity` rows a sample, with the dtype and device of `like`."""
        shape = (batch, num_heads, whole_steps(capacity), head_dim)  # a head's rows one after another: read so
        keys, values = ([like.new_zeros(shape).transpose(1, 2) for _ in range(num_layers)] for _ in range(2))
        return cls(keys, values, torch.zeros(batch, dtype=torch.long, device=like.device))

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        return sum(x.nbytes for x in (*self.keys, *self.values))

    def append(self, counts: Tensor | int) -> "KVCache":
        """Commit the first `counts` rows of the last read, per sample (B,) or for all."""
        return replace(self, lengths=self.lengths + counts)

    def select(self, rows: Tensor) -> "KVCache":
        """The cache of the samples `rows` (indices), copied."""
        return KVCache([k[rows] for k in self.keys], [v[rows] for v in self.values], self.lengths[rows])

    def join(self, other: "KVCache") -> "KVCache":
        """The cache of these samples and those of another of the same layers, copied, with the room of the larger."""

        def joined(a: Tensor, b: Tensor) -> Tensor:
            rows = max(a.shape[1], b.shape[1])
            both = a.new_zeros(len(a) + len(b), a.shape[2], rows, a.shape[3]).transpose(1, 2)
            both[: len(a), : a.shape[1]], both[len(a) :, : b.shape[1]] = a, b
            return both

        keys, values = (list(map(joined, a, b)) for a, b in ((self.keys, other.keys), (self.values, other.values)))
        return KVCache(keys, values, torch.cat((self.lengths, other.lengths)))

    def positions(self, num_rows: int) -> Tensor:
        """Positions (B, num_rows) of rows that follow the committed ones."""
        return self.lengths[:, None] + torch.arange(num_rows, device=self.lengths.device)

    def attend(self, num_rows: int, block_size: int | None, alone: int = 0) -> Attend:
        """Pattern of rows that follow the committed ones: they see what is committed and, block-causally, each other.

        block_size: as in `masks.block_causal`, counted from position 0; None: the rows are one block. alone: that many
        further samples at the end of the batch see only their own rows (the unconditional branch of guidance).
        """
        write, slots = self.writer(num_rows), self.positions(num_rows)
        length = int(self.lengths.max()) + num_rows
        limits = (self.lengths[:, None] + num_rows).repeat(1, num_rows)
        if block_size is not None:
            limits = torch.minimum((slots // block_size + 1) * block_size, limits)
        own = limits.new_full((alone, num_rows), num_rows)
        length = whole_steps(length)

        @functools.cache  # once for all layers, and not where the kernel needs none
        def bias(dtype: torch.dtype) -> Tensor:
            unseen = torch.arange(length, device=slots.device) >= limits[..., None]
            zeros = torch.zeros(unseen.shape, dtype=dtype, device=unseen.device)
            return zeros.masked_fill_(unseen, -torch.inf)[:, None]

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            batch = len(q) - alone
            keys, values = write(layer, k[:batch], v[:batch])
            return prefix_attention(q, keys, values, limits, bias, (k[batch:], v[batch:], own) if alone else None)

        return attend

    def writer(self, num_rows: int) -> Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]:
        """What puts a layer's keys and values (B, num_rows, H, Dh) behind the committed ones, and returns them all.

        Raises ValueError where there is no room.
        """
        length = int(self.lengths.max()) + num_rows
        if self.keys and length > self.keys[0].shape[1]:
            raise ValueError(f"cache holds {self.keys[0].shape[1]} rows, {length} asked for")
        slots, first = self.positions(num_rows), int(self.lengths.min())
        place: tuple[Any, ...] = (torch.arange(len(self.lengths), device=slots.device)[:, None], slots)
        if first + num_rows == length:  # all alike: a slice is four times as fast
            place = (slice(None), slice(first, length))

        def write(layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            keys, values = self.keys[layer], self.values[layer]
            keys[place], values[place] = k.to(keys.dtype), v.to(values.dtype)
            return keys, values

        return write
