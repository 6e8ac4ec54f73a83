"""Rotary positions and attention patterns. Rows are laid out (B, R, H, Dh): batch, row, head, head width.

A pattern is an `Attend`: a function of (layer, q, k, v) that a transformer calls once a layer. What a row may see lives
in the pattern, so one transformer serves training, prefill and cached generation.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
Rotary = tuple[Tensor, Tensor]


def rotary(positions: Tensor, dim: int, base: float, dtype: torch.dtype = torch.float32) -> Rotary:
    """Cosines and sines (..., R, 1, dim / 2) of position * base^(-2j/dim); positions (..., R) are integers."""
    wide = torch.promote_types(dtype, torch.float32)
    frequencies = base ** (-torch.arange(0, dim, 2, device=positions.device, dtype=wide) / dim)
    angles = positions.to(wide)[..., None, None] * frequencies
    return angles.cos(), angles.sin()


def turns(table: Rotary, head_dim: int) -> Tensor:
    """Complex factors (..., R, 1, head_dim / 2) of pairs of channels: those of the table, then ones."""
    turn = torch.complex(*table)
    passing = turn.new_ones(*turn.shape[:-1], head_dim // 2 - turn.shape[-1])
    return torch.cat((turn, passing), dim=-1)


def rotate_pairs(x: Tensor, turn: Tensor) -> Tensor:
    """Rotate the interleaved pairs (2j, 2j+1) of the first channels; the rest pass (official-format §3.3).

    One complex product of the whole head by `turns`: six times as fast as slices and sums on a CPU.
    """
    pairs = torch.view_as_complex(x.to(turn.real.dtype).unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turn).flatten(-2)


def rotate_halves(x: Tensor, table: Rotary) -> Tensor:
    """Rotate channel j of the first half with channel j of the second (official-format §4.2)."""
    cos, sin = table
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q kᵀ / sqrt(Dh)) v per head.

    q (B, R, H, Dh); k, v (B, T, H or 1, Dh); mask broadcastable to (B, H, R, T), true where seen,
    or what is added to the scores. Returns q's shape.
    """
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if k.shape[1] != q.shape[1]:
        k, v = k.expand(-1, q.shape[1], -1, -1), v.expand(-1, q.shape[1], -1, -1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def masked(mask: Tensor | None) -> Attend:
    """Every row of the call attends within the call under one mask."""
    return lambda layer, q, k, v: attention(q, k, v, mask)


def packed(
    num_clean: int,
    num_latents: int,
    block_size: int,
    copies: int,
    history: Tensor | None = None,
    device: torch.device | None = None,
    span: int = 64,
) -> Attend:
    """Packed training rows [clean | noisy copy 1 | ...] without work on pairs that see nothing of each other.

    A row sees the clean blocks before its own, and its own block of its own part (model.md §3): so one rule serves the
    clean rows and the noisy ones. Equals `masked(dense(clean_beside_noisy(...)))`. history (B,), bool: samples whose
    noisy rows may see the clean rows; all when not given. span: rows that meet one range of clean keys, as far as any
    of them sees; long sequences are cut into such spans.
    """
    place = torch.arange(num_latents, device=device)
    place = torch.cat((place[:num_clean], place.repeat(copies)))
    blind = (place[:, None] // block_size <= place[None, :num_clean] // block_size)[None]  # (1, R, Nc)
    if history is not None:
        noisy = torch.arange(len(place), device=device) >= num_clean
        blind = blind | (noisy[:, None] & ~history[:, None, None])
    bias = torch.zeros(blind.shape, device=device).masked_fill_(blind, -torch.inf)[:, None]  # (1 or B, 1, R, Nc)
    spans = [(0, len(place), num_clean)]
    if num_latents > 2 * span:
        step = -(-span // block_size) * block_size
        starts = [(0, num_clean), *((num_clean + c * num_latents, num_latents) for c in range(copies))]
        spans = [
            (start + first, start + min(first + step, length), min(first + step - block_size, num_clean))
            for start, length in starts
            for first in range(0, length, step)
        ]

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        batch, rows, heads, width = q.shape
        skipped = k.shape[1] - rows  # the clean rows do not ask in the last layer, where they are of no use
        q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q * width**-0.5, k, v))  # (B * H, R, Dh)
        k_clean, v_clean = k[:, :num_clean].mT, v[:, :num_clean]
        own = _within_blocks(q, k[:, skipped:], block_size)
        seen: list[Tensor] = []
        weights: list[Tensor] = []
        for first, end, num_keys in spans:
            if end <= skipped:
                continue
            start = max(first, skipped)
            asking = slice(start - skipped, end - skipped)
            scores = (q[:, asking] @ k_clean[..., :num_keys]).unflatten(0, (batch, heads))
            scores = scores + bias[:, :, start:end, :num_keys].to(scores)
            weights_here = torch.cat((scores.flatten(0, 1), own[:, asking]), dim=-1)
            weights_here = weights_here.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(v.dtype)
            seen.append(weights_here[..., :num_keys] @ v_clean[:, :num_keys])
            weights.append(weights_here[..., num_keys:])
        out = torch.cat(seen, dim=1) + _weigh_blocks(torch.cat(weights, dim=1), v[:, skipped:], block_size)
        return out.unflatten(0, (batch, heads)).transpose(1, 2)

    return attend


def _within_blocks(q: Tensor, k: Tensor, block_size: int) -> Tensor:
    """Scores (..., R, S) of rows (..., R, Dh) with the keys of their own block."""
    if block_size == 1:  # a product of 1 x 1 matrices is slow
        return (q * k).sum(-1, keepdim=True)
    q, k = (x.unflatten(-2, (-1, block_size)) for x in (q, k))
    return (q @ k.mT).flatten(-3, -2)


def _weigh_blocks(weights: Tensor, v: Tensor, block_size: int) -> Tensor:
    """Sums (..., R, Dh) of the values of each row's own block, under weights (..., R, S)."""
    if block_size == 1:
        return weights * v
    return (weights.unflatten(-2, (-1, block_size)) @ v.unflatten(-2, (-1, block_size))).flatten(-3, -2)
