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


def rotate_pairs(x: Tensor, table: Rotary) -> Tensor:
    """Rotate the interleaved pairs (2j, 2j+1) of the first channels; the rest pass (official-format §3.3).

    One complex product of the whole head, with ones for what passes: six times as fast as slices and sums on a CPU.
    """
    cos, sin = table
    turn = torch.complex(cos, sin)
    passing = turn.new_ones(*turn.shape[:-1], x.shape[-1] // 2 - turn.shape[-1])
    pairs = torch.view_as_complex(x.to(cos.dtype).unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * torch.cat((turn, passing), dim=-1)).flatten(-2)


def rotate_halves(x: Tensor, table: Rotary) -> Tensor:
    """Rotate channel j of the first half with channel j of the second (official-format §4.2)."""
    cos, sin = table
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q kᵀ / sqrt(Dh)) v per head.

    q (B, R, H, Dh); k, v (B, T, H or 1, Dh); mask broadcastable to (B, H, R, T), true where seen. Returns q's shape.
    """
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if k.shape[1] != q.shape[1]:
        k, v = k.expand(-1, q.shape[1], -1, -1), v.expand(-1, q.shape[1], -1, -1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def masked(mask: Tensor | None) -> Attend:
    """Every row of the call attends within the call under one mask."""
    return lambda layer, q, k, v: attention(q, k, v, mask)


def packed(num_clean: int, num_latents: int, block_size: int, history: Tensor | None = None) -> Attend:
    """Packed training rows [clean | noisy copy 1 | ...] without work on pairs of noisy blocks (model.md §3).

    Equals `masked(dense(clean_beside_noisy(...)))`. history (B,), bool: samples whose noisy rows may see the clean
    rows; all when not given.
    """

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        batch, _, heads, width = q.shape
        clean_queries = q.shape[1] - (k.shape[1] - num_clean)  # none in the last layer, where they are of no use
        block = torch.arange(num_latents, device=q.device) // block_size
        clean_block = block[:num_clean]
        clean_mask = clean_block[:, None] >= clean_block[None, :]
        before = block[:, None] > clean_block[None, :]
        if history is not None:
            before = before & history[:, None, None, None, None]

        q_clean, q_noisy = q.split([clean_queries, q.shape[1] - clean_queries], dim=1)
        k_clean, k_noisy = k.split([num_clean, k.shape[1] - num_clean], dim=1)
        v_clean, v_noisy = v.split([num_clean, v.shape[1] - num_clean], dim=1)
        q_noisy, k_noisy, v_noisy = (
            x.reshape(batch, -1, num_latents, heads, width).permute(0, 3, 1, 2, 4) for x in (q_noisy, k_noisy, v_noisy)
        )  # (B, H, copies, N, Dh)
        blocks = (batch, heads, -1, num_latents // block_size, block_size, width)
        k_own, v_own = k_noisy.reshape(blocks), v_noisy.reshape(blocks)
        q_noisy = q_noisy * width**-0.5
        own_scores = (q_noisy.reshape(blocks) @ k_own.transpose(-1, -2)).flatten(-3, -2)  # (B, H, copies, N, S)
        if num_clean == 0:
            weights = own_scores.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(v.dtype)
            noisy = (weights.unflatten(-2, (-1, block_size)) @ v_own).flatten(-3, -2)
            return noisy.permute(0, 2, 3, 1, 4).flatten(1, 2)

        k_history, v_history = k_clean.transpose(1, 2), v_clean.transpose(1, 2)  # (B, H, Nc, Dh)
        copies = q_noisy.shape[2]
        scores = (q_noisy.flatten(2, 3) @ k_history.transpose(-1, -2)).unflatten(2, (copies, num_latents))
        scores = scores.masked_fill(~before, -torch.inf)
        weights = torch.cat((scores, own_scores), dim=-1)
        weights = weights.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(v.dtype)
        seen, own = weights.split([num_clean, block_size], dim=-1)
        noisy = (seen.flatten(2, 3) @ v_history).unflatten(2, (copies, num_latents))
        noisy = noisy + (own.unflatten(-2, (-1, block_size)) @ v_own).flatten(-3, -2)
        noisy = noisy.permute(0, 2, 3, 1, 4).flatten(1, 2)
        if not clean_queries:
            return noisy
        clean = attention(q_clean, k_clean, v_clean, clean_mask)
        return torch.cat((clean, noisy), dim=1)

    return attend
