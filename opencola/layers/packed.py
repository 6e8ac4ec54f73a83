"""Attention of the packed training rows [clean | noisy copy 1 | ...] (model.md §3): only pairs that may see each other.

And of clean rows alone, which is block-causal attention (`block_causal`).

Who sees whom is said by `masks.PackedRows`; spans of rows and keys, biases and tiles are derived from it.
Where the clean rows stay the same from call to call, their keys and values are a `Past`, and noisy rows come alone.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from opencola.kernels.attention import attend_packed
from opencola.kernels.choice import implemented_by, on_cuda, packs
from opencola.layers.attention import Attend, attention
from opencola.layers.masks import PackedRows, same_document

_compiled = functools.cache(torch.compile)
Past = dict[int, tuple[Tensor, Tensor]]
"""Keys and values (B, Nc, H, Dh) of the clean rows by layer. No gradient reaches them."""


def packed(
    num_clean: int,
    num_latents: int,
    block_size: int,
    copies: int,
    history: Tensor | None = None,
    documents: Tensor | None = None,
    span: int = 64,
    past: Past | None = None,
    first: int = 0,
) -> Attend:
    """Pattern of the `PackedRows` of these sizes, of which every part that asks must be whole blocks.

    documents (B, N), int64. span: rows that meet one range of clean keys, as far as any of them sees. past: of the
    clean rows, which then are not among the rows.
    """
    rows = PackedRows(num_clean, num_latents, block_size, copies, first, history, _numbers(documents))
    shared = Shared(rows, span)
    return lambda layer, q, k, v: packed_attention(q, k, v, None if past is None else past[layer], shared)


def block_causal(num_rows: int, block_size: int, documents: Tensor | None = None) -> Attend:
    """Pattern of rows that see their own block of block_size rows, and those before.

    documents (B, R), int64: each row's, beyond which it sees nothing.
    """
    clean = Clean(PackedRows(num_rows, num_rows, block_size, copies=0, documents=documents))
    return lambda layer, q, k, v: block_causal_attention(q, k, v, clean)


def _numbers(documents: Tensor | None) -> Tensor | None:
    return None if documents is None else documents.unique(return_inverse=True)[1].int()


class Shared:
    """The rows, and what implementations derive from them for all layers, when first asked for."""

    def __init__(self, rows: PackedRows, span: int = 64) -> None:
        self.rows = rows
        self.plan = functools.cache(functools.partial(make_plan, rows, span))
        self.block_mask = functools.cache(functools.partial(_block_mask, rows))


def flexible(q: Tensor, k: Tensor, v: Tensor, past: tuple[Tensor, Tensor] | None, shared: Shared) -> Tensor:
    """`packed_attention` by FlexAttention, which skips tiles that nobody sees; compiled where it runs on CUDA."""
    from torch.nn.attention.flex_attention import flex_attention

    if past is not None:
        k, v = (torch.cat(both, dim=1) for both in zip(past, (k, v), strict=True))
    mask = shared.block_mask(q.shape[1], k.shape[1], q.device)
    run: Any = _compiled(flex_attention) if q.is_cuda else flex_attention
    out: Tensor = run(*(x.transpose(1, 2) for x in (q, k, v)), block_mask=mask)
    return out.transpose(1, 2)


def _block_mask(rows: PackedRows, queries: int, keys: int, device: torch.device) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    skipped = keys - queries  # the clean rows do not ask in the last layer, nor where they are past
    visible: Callable[..., Tensor] = lambda b, h, query, key: rows.visible(b, query + skipped, key)  # noqa: E731
    return create_block_mask(visible, rows.samples, None, queries, keys, device=str(device))


class Clean:
    """Clean rows alone, and what implementations derive from them for all layers, when first asked for."""

    def __init__(self, rows: PackedRows) -> None:
        self.rows = rows
        self._mask: Tensor | None = None
        self._numbered: PackedRows | None = None

    @property
    def in_both_directions(self) -> bool:
        """Whether there is one block alone, in which torch's attention is the faster."""
        return self.rows.block_size >= self.rows.num_rows

    def mask(self, device: torch.device) -> Tensor | None:
        """What sees what, (R, R), or (B, 1, R, R) where samples differ; None where all rows see all."""
        if self.in_both_directions:
            return None if self.rows.documents is None else same_document(self.rows.documents)
        if self._mask is None:
            sample = torch.arange(self.rows.samples or 1, device=device)[:, None, None]
            row = torch.arange(self.rows.num_rows, device=device)
            seen = self.rows.visible(sample, row[:, None], row)
            self._mask = seen if self.rows.samples is None else seen[:, None]
        return self._mask

    def numbered(self) -> PackedRows:
        """The rows, with documents of int32."""
        if self._numbered is None:
            self._numbered = replace(self.rows, documents=_numbers(self.rows.documents))
        return self._numbered


def _by_kernel(q: Tensor, k: Tensor, v: Tensor, clean: Clean) -> Tensor:
    if k.shape[2] < q.shape[2]:
        k, v = (x.expand(-1, -1, q.shape[2], -1) for x in (k, v))
    return attend_packed(q, k, v, None, **vars(clean.numbered()))


@implemented_by(_by_kernel, worthwhile=lambda q, k, v, clean: not clean.in_both_directions or packs() is not None)
def block_causal_attention(q: Tensor, k: Tensor, v: Tensor, clean: Clean) -> Tensor:
    """Rows q (B, R, H, Dh) and k, v (B, R, H or 1, Dh), clean ones only -> like q."""
    return attention(q, k, v, clean.mask(q.device))


@implemented_by(lambda q, k, v, past, shared: attend_packed(q, k, v, past, **vars(shared.rows)))
@implemented_by(flexible, takes=on_cuda)
def packed_attention(q: Tensor, k: Tensor, v: Tensor, past: tuple[Tensor, Tensor] | None, shared: Shared) -> Tensor:
    """Rows q (B, Q, H, Dh), the last Q of the rows; k, v (B, R, H, Dh), without the clean rows of `past` -> like q."""
    plan = shared.plan(past is not None, q.device)
    clean = None if past is None else _rows_first(*past)
    out: Tensor = _PackedAttention.apply(*_rows_first(q, k, v), plan, len(q), clean)
    return out.unflatten(0, (len(q), -1)).transpose(1, 2)


def leave_uncompiled() -> None:
    """Have torch.compile call `packed_attention` instead of tracing what it does; see `randomness.leave_uncompiled`."""
    global packed_attention
    packed_attention = torch.compiler.disable(packed_attention)


@dataclass(frozen=True)
class Plan:
    """Visible pairs as those of a row with clean keys of other blocks, span by span, and those with its own block."""

    spans: tuple[tuple[int, int, int], ...]  # (first row, end, clean keys that some of these rows see)
    block_size: int
    bias: Tensor  # (1 or B, 1, R, Nc): 0 where a row sees a clean key of another block, else -inf
    own_bias: Tensor | None  # (B, 1, R, S): the same for the keys of a row's own block; None where it sees all


def make_plan(rows: PackedRows, span: int, past: bool, device: torch.device) -> Plan:
    """The plan of all rows, or of those behind the `past` ones."""
    size, start = rows.block_size, rows.num_clean if past else 0
    sample = torch.arange(rows.samples or 1, device=device)[:, None, None]
    query = torch.arange(start, rows.num_rows, device=device)[None, :, None]
    begin = torch.where(query < rows.num_clean, 0, rows.num_clean)  # of a part; copies are whole blocks
    block, clean = query - (query - begin) % size, torch.arange(rows.num_clean, device=device)
    others = rows.visible(sample, query, clean) & (block != clean // size * size)
    own = None
    if rows.documents is not None:
        own = _bias(rows.visible(sample, query, block + torch.arange(size, device=device)))
    return Plan(tuple(_spans(rows, span, past)), size, _bias(others), own)


def _bias(seen: Tensor) -> Tensor:
    return torch.zeros(seen.shape, device=seen.device).masked_fill_(~seen, -torch.inf)[:, None]


def _spans(rows: PackedRows, span: int, past: bool) -> Iterator[tuple[int, int, int]]:
    copy = range(rows.first, rows.num_latents)
    parts, num_clean = [range(0 if past else rows.num_clean), *[copy] * rows.copies], rows.num_clean
    if max(part.stop for part in parts) <= 2 * span:
        yield 0, sum(len(part) for part in parts), num_clean
        return
    step, start = -(-span // rows.block_size) * rows.block_size, 0
    for part in parts:
        for first in range(0, len(part), step):
            end = min(first + step, len(part))
            yield start + first, start + end, min(part.start + first + step - rows.block_size, num_clean)
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
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, plan: Plan, batch: int, past: tuple[Tensor, ...] | None
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


def _asking(plan: Plan, skipped: int) -> list[tuple[slice, slice, int]]:
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
