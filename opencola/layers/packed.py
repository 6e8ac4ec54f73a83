"""Attention of the packed training rows [clean | noisy copy 1 | ...] (model.md §3): only pairs that may see each other.

A row sees the clean blocks before its own, and its own block of its own part: one rule for clean rows and noisy ones.
Where the clean rows stay the same from call to call, their keys and values are a `Past`, and noisy rows come alone.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from opencola.kernels import library
from opencola.kernels.attention import Pattern, attend_packed
from opencola.layers.attention import Attend
from opencola.layers.masks import Predicate, clean_beside_noisy

Past = list[tuple[Tensor, Tensor]]
"""Keys and values (B, Nc, H, Dh) of the clean rows in every layer. No gradient reaches them."""


def packed(
    num_clean: int,
    num_latents: int,
    block_size: int,
    copies: int,
    history: Tensor | None = None,
    documents: Tensor | None = None,
    device: torch.device | None = None,
    span: int = 64,
    past: Past | None = None,
    first: int = 0,
) -> Attend:
    """Pattern of packed rows; equals `masked(dense(clean_beside_noisy(...)))` with these further bounds.

    history (B,), bool: samples whose noisy rows may see the clean rows; all when not given. documents (B, N), int64:
    the document of each latent; rows then see their own document only. span: rows that meet one range of clean keys, as
    far as any of them sees. past: of the clean rows, which then are not among the rows; first: the latent with
    which every noisy copy begins, the first of a block. On CUDA FlexAttention does the same from the predicate.
    """
    if device is not None and device.type == "cuda":
        predicate = clean_beside_noisy(num_clean, num_latents, block_size, first)
        return flexible(predicate, num_clean, copies, history, documents, past, first)
    pattern = Pattern(num_clean, num_latents, block_size, copies, first, history, _numbered(documents))
    plan = functools.cache(lambda: _plan(pattern, device, span, past is not None))

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        before = None if past is None else past[layer]
        if library.usable(q, k, v, *(before or ())):
            return attend_packed(q, k, v, pattern, before)
        rows = _rows_first(q, k, v)
        clean_rows = None if before is None else _rows_first(*before)
        out: Tensor = _PackedAttention.apply(*rows, plan(), len(q), clean_rows)
        return out.unflatten(0, (len(q), -1)).transpose(1, 2)

    return attend


def _numbered(documents: Tensor | None) -> Tensor | None:
    return None if documents is None else documents.unique(return_inverse=True)[1].int()


def flexible(
    predicate: Predicate,
    num_clean: int,
    copies: int,
    history: Tensor | None,
    documents: Tensor | None,
    past: Past | None = None,
    first: int = 0,
) -> Attend:
    """The packed pattern by FlexAttention, which skips tiles that nobody sees; compiled where it runs on CUDA."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    of_rows = None
    if documents is not None:
        of_rows = torch.cat((documents[:, :num_clean], documents[:, first:].repeat(1, copies)), dim=1)

    def seen(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        visible = predicate(query, key)
        if history is not None:
            visible = visible & (history[b] | (query < num_clean) | (key >= num_clean))
        if of_rows is not None:
            visible = visible & (of_rows[b, query] == of_rows[b, key])
        return visible

    different = history if of_rows is None else of_rows
    batch = None if different is None else len(different)
    masks: dict[int, Any] = {}

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if past is not None:
            k, v = (torch.cat(both, dim=1) for both in zip(past[layer], (k, v), strict=True))
        skipped = k.shape[1] - q.shape[1]  # the clean rows do not ask in the last layer, nor where they are past
        if skipped not in masks:
            behind: Callable[..., Tensor] = lambda b, h, query, key: seen(b, h, query + skipped, key)  # noqa: E731
            masks[skipped] = create_block_mask(behind, batch, None, q.shape[1], k.shape[1], device=str(q.device))
        run: Any = flex_attention
        if q.is_cuda:
            run = _compiled(flex_attention)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out: Tensor = run(q, k, v, block_mask=masks[skipped])
        return out.transpose(1, 2)

    return attend


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function)


@dataclass(frozen=True)
class _Plan:
    """What of the packed pattern is the same in all layers."""

    spans: tuple[tuple[int, int, int], ...]  # (first row, end, clean keys that some of these rows see)
    block_size: int
    bias: Tensor  # (1 or B, 1, R, Nc): 0 where a row sees a clean key, else -inf
    own_bias: Tensor | None  # (B, 1, R, S): the same for the keys of a row's own block


def _plan(pattern: Pattern, device: torch.device | None, span: int, past: bool) -> _Plan:
    num_clean, block_size, documents = pattern.num_clean, pattern.block_size, pattern.documents
    copy = range(pattern.first, pattern.num_latents)
    parts = [range(0 if past else num_clean), *[copy] * pattern.copies]
    place = torch.cat([torch.arange(part.start, part.stop, device=device) for part in parts])
    clean = torch.arange(num_clean, device=device)
    blind = (place[:, None] // block_size <= clean // block_size)[None]  # (1, R, Nc)
    if pattern.history is not None:
        noisy = torch.arange(len(place), device=device) >= len(parts[0])
        blind = blind | (noisy[:, None] & ~pattern.history[:, None, None])
    own_bias = None
    if documents is not None:
        of_rows = documents[:, place]
        blind = blind | (of_rows[:, :, None] != documents[:, None, :num_clean])
        within = of_rows.unflatten(1, (-1, block_size))
        own_bias = _bias((within[..., :, None] != within[..., None, :]).flatten(1, 2))  # (B, 1, R, S)
    return _Plan(tuple(_spans(parts, num_clean, block_size, span)), block_size, _bias(blind), own_bias)


def _bias(blind: Tensor) -> Tensor:
    return torch.zeros(blind.shape, device=blind.device).masked_fill_(blind, -torch.inf)[:, None]


def _spans(parts: Sequence[range], num_clean: int, block_size: int, span: int) -> Iterator[tuple[int, int, int]]:
    if max(part.stop for part in parts) <= 2 * span:
        yield 0, sum(len(part) for part in parts), num_clean
        return
    step, start = -(-span // block_size) * block_size, 0
    for part in parts:
        for first in range(0, len(part), step):
            end = min(first + step, len(part))
            yield start + first, start + end, min(part.start + first + step - block_size, num_clean)
        start += len(part)


def _rows_first(*several: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.transpose(1, 2).flatten(0, 1) for x in several)  # (B, R, H, Dh) -> (B * H, R, Dh)


class _PackedAttention(torch.autograd.Function):
    """Rows q (B * H, Q, Dh), the last Q of the rows of k and v (B * H, R, Dh) -> (B * H, Q, Dh).

    past: keys and values (B * H, Nc, Dh) of the clean rows, where these are not the first rows of k and v.
    Its gradient is written out because autograd's own spends most of its time on zeros for the slices of k and v.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, plan: _Plan, batch: int, past: tuple[Tensor, ...] | None
    ) -> Tensor:
        scale, skipped, wide = q.shape[-1] ** -0.5, k.shape[1] - q.shape[1], torch.promote_types(q.dtype, torch.float32)
        own = _within_blocks(q, k[:, skipped:], plan.block_size) * scale
        if plan.own_bias is not None:
            own = (own.unflatten(0, (batch, -1)) + plan.own_bias[:, :, skipped:].to(own)).flatten(0, 1)
        out, spans, all_weights = torch.empty_like(q), _asking(plan, skipped), []
        k_clean, v_clean = (k, v) if past is None else past
        for asking, rows, n in spans:
            scores = q.new_empty(len(q), asking.stop - asking.start, n + plan.block_size)
            scores[..., :n].unflatten(0, (batch, -1)).copy_(plan.bias[:, :, rows, :n])
            _add_product(scores[..., :n], q[:, asking], k_clean[:, :n].mT, alpha=scale)
            scores[..., n:] = own[:, asking]
            weights = scores.softmax(-1, dtype=wide).to(q.dtype)
            own[:, asking] = weights[..., n:]
            torch.bmm(weights[..., :n], v_clean[:, :n], out=out[:, asking])
            all_weights.append(weights)
        ctx.save_for_backward(q, k, v, *all_weights)
        ctx.spans, ctx.block_size, ctx.past = spans, plan.block_size, past
        return out.add_(_weigh_blocks(own, v[:, skipped:], plan.block_size))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *all_weights = ctx.saved_tensors
        scale, skipped, size = q.shape[-1] ** -0.5, k.shape[1] - q.shape[1], ctx.block_size
        wide = torch.promote_types(q.dtype, torch.float32)
        k_clean, v_clean = (k, v) if ctx.past is None else ctx.past
        gradient = gradient.contiguous()
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        down = _within_blocks(gradient, v[:, skipped:], size)  # gradient of the own block's weights, then of its scores
        own = torch.empty_like(down)
        for (asking, _, n), weights in zip(ctx.spans, all_weights, strict=True):
            dw = torch.empty_like(weights)
            torch.bmm(gradient[:, asking], v_clean[:, :n].mT, out=dw[..., :n])
            dw[..., n:] = down[:, asking]
            ds = torch._softmax_backward_data(dw.to(wide), weights.to(wide), -1, wide).to(q.dtype)
            own[:, asking], down[:, asking] = weights[..., n:], ds[..., n:]
            _add_product(dq[:, asking], ds[..., :n], k_clean[:, :n], beta=0, alpha=scale)
            if ctx.past is None:
                _add_product(dk[:, :n], ds[..., :n].mT, q[:, asking], alpha=scale)
                _add_product(dv[:, :n], weights[..., :n].mT, gradient[:, asking])
        down *= scale
        dq += _weigh_blocks(down, k[:, skipped:], size)
        dk[:, skipped:] += _weigh_blocks(down, q, size, transposed=True)
        dv[:, skipped:] += _weigh_blocks(own, gradient, size, transposed=True)
        return dq, dk, dv, None, None, None


def _add_product(to: Tensor, a: Tensor, b: Tensor, **factors: float) -> None:
    """to = beta to + alpha a b, in place, and so that torch's counter of operations sees it (it knows no baddbmm_)."""
    torch.baddbmm(to, a, b, **factors, out=to)


def _asking(plan: _Plan, skipped: int) -> list[tuple[slice, slice, int]]:
    """The spans as (rows of the query, rows of the pattern, clean keys), without rows that do not ask."""
    cut = [(max(first, skipped), end, n) for first, end, n in plan.spans if end > skipped]
    return [(slice(first - skipped, end - skipped), slice(first, end), n) for first, end, n in cut]


def _within_blocks(q: Tensor, k: Tensor, block_size: int) -> Tensor:
    """Products (..., R, S) of rows (..., R, Dh) with those of their own block."""
    if block_size == 1:  # a product of 1 x 1 matrices is slow
        return (q * k).sum(-1, keepdim=True)
    q, k = (x.unflatten(-2, (-1, block_size)) for x in (q, k))
    return (q @ k.mT).flatten(-3, -2)


def _weigh_blocks(weights: Tensor, v: Tensor, block_size: int, transposed: bool = False) -> Tensor:
    """Sums (..., R, Dh) of the rows v of each row's own block, under weights (..., R, S) or their transposes."""
    if block_size == 1:
        return weights * v
    weights, v = (x.unflatten(-2, (-1, block_size)) for x in (weights, v))
    return ((weights.mT if transposed else weights) @ v).flatten(-3, -2)
