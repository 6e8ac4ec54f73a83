"""What an adaptive block does between its products, by kernels: forward and backward in one pass over memory each.

For tensors that are `usable`. `layers/operations.py` defines what they compute; the gradients have no gradients of
their own.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from opencola.kernels.library import function

SMALL = 1 << 15  # numbers; fewer are not worth a second thread


def threads_for(x: Tensor) -> int:
    """How many a tensor's numbers are worth."""
    return 1 if x.numel() < SMALL else torch.get_num_threads()


def wanted(*inputs: Tensor | None) -> bool:
    """Whether gradients are."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)


def gelu(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """GELU in its tanh form of x + bias; x (..., D), bias (D)."""
    if wanted(x, bias):
        out: Tensor = _Gelu.apply(x, bias)
        return out
    return _gelu(x.contiguous(), bias)


def _gelu(x: Tensor, bias: Tensor | None) -> Tensor:
    width, y = x.shape[-1], torch.empty_like(x)
    if width:
        function("gelu", "ttt ll l")(x, bias, y, x.numel() // width, width, threads_for(x))
    return y


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x, bias)
        return _gelu(x, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, bias = ctx.saved_tensors
        dy, dx, width, threads = dy.contiguous(), torch.empty_like(x), x.shape[-1], threads_for(x)
        sums = x.new_zeros(threads, 2, width) if ctx.needs_input_grad[1] else None
        rows = x.numel() // max(width, 1)
        function("gelu_backward", "ttttt ll l")(dy, x, bias, dx, sums, rows, width, threads)
        return dx, None if sums is None else sums[:, 0].sum(0)


def modulated_norm(
    h: Tensor,
    shift: Tensor,
    scale: Tensor,
    index: Tensor,
    eps: float,
    gain: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """norm(h) (1 + scale) + shift, the norm over the last axis, with gain and bias (D) or without both.

    h (B, R, D); shift, scale (M, D), of which a row takes the one at index, int64 broadcastable to (B, R); not read
    where M is 1.
    """
    if gain is not None:  # for the few times rather than the many rows
        assert bias is not None
        shift, scale = torch.addcmul(shift, bias, 1 + scale), gain * (1 + scale) - 1
    return _residual_norm(h, None, None, None, shift, scale, index, eps)[1]


def gated(h: Tensor, gate: Tensor, y: Tensor, index: Tensor, bias: Tensor | None = None) -> Tensor:
    """h + gate (y + bias): h, y (B, R, D); gate (M, D) at index as in `modulated_norm`; bias (D)."""
    return _residual_norm(h, y, bias, gate, None, None, index, 0.0)[0]


def gated_norm(
    h: Tensor,
    gate: Tensor,
    y: Tensor,
    shift: Tensor,
    scale: Tensor,
    index: Tensor,
    eps: float,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`gated` and the `modulated_norm` of that."""
    return _residual_norm(h, y, bias, gate, shift, scale, index, eps)


def _residual_norm(
    h: Tensor,
    y: Tensor | None,
    bias: Tensor | None,
    gate: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    index: Tensor,
    eps: float,
) -> tuple[Any, Any]:
    counts = {len(x) for x in (gate, shift, scale) if x is not None}
    if len(counts) > 1:
        raise ValueError(f"gate, shift and scale are of different numbers of times: {sorted(counts)}")
    places = None if counts == {1} else index.expand(h.shape[:-1]).contiguous()
    if wanted(h, y, bias, gate, shift, scale):
        both: tuple[Any, Any] = _ResidualNorm.apply(h, y, bias, gate, shift, scale, places, eps)
        return both
    return _residual_norm_forward(h, y, bias, gate, shift, scale, places, eps, None)


def _residual_norm_forward(
    h: Tensor,
    y: Tensor | None,
    bias: Tensor | None,
    gate: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    index: Tensor | None,
    eps: float,
    stats: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    h, y, gate = h.contiguous(), None if y is None else y.contiguous(), _rows(gate)
    shift, scale = _alike(shift, scale)
    out, u = None if y is None else torch.empty_like(h), None if shift is None else torch.empty_like(h)
    to_norm = (shift, scale, _stride(scale), index, u, stats)
    sizes = (h.numel() // h.shape[-1], h.shape[-1], eps, threads_for(h))
    function("residual_norm", "ttttlt ttlt tt llf l")(h, y, bias, gate, _stride(gate), out, *to_norm, *sizes)
    return out, u


def _rows(x: Tensor | None) -> Tensor | None:
    return x if x is None or x.stride(-1) == 1 else x.contiguous()


def _stride(x: Tensor | None) -> int:
    return 0 if x is None else x.stride(0)


def _alike(x: Tensor | None, y: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Both with one stride from row to row."""
    x, y = _rows(x), _rows(y)
    return (x, y) if x is None or y is None or x.stride(0) == y.stride(0) else (x.contiguous(), y.contiguous())


class _ResidualNorm(torch.autograd.Function):
    """(h, y, bias, gate, shift, scale, index, eps) -> (out or none, u or none)."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor | None, Tensor | None]:
        h, y, bias, gate, shift, scale, index, eps = inputs
        stats = None if scale is None else h.new_empty(*h.shape[:-1], 2)
        out, u = _residual_norm_forward(h, y, bias, gate, shift, scale, index, eps, stats)
        ctx.save_for_backward(h if out is None else out, stats, scale, y, bias, gate, index)
        ctx.set_materialize_grads(False)
        return out, u

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor | None, du: Tensor | None) -> tuple[Tensor | None, ...]:
        out, stats, scale, y, bias, gate, index = ctx.saved_tensors
        if dout is None and du is None:
            return (None,) * 8
        out, gate, scale = out.contiguous(), _rows(gate), _rows(scale)
        dout, du, y = (None if x is None else x.contiguous() for x in (dout, du, y))
        width, threads, needs = out.shape[-1], threads_for(out), ctx.needs_input_grad
        count = next(len(x) for x in (gate, scale) if x is not None)
        dh, dy = dout if du is None else torch.empty_like(out), torch.empty_like(out) if needs[1] else None
        sums = out.new_zeros(threads, 4, count + 1, width) if any(needs[2:6]) else None
        came = (dout, du, out, stats, scale, _stride(scale))
        gates = (y, bias, gate, _stride(gate), index, dh, dy, sums)
        function("residual_norm_backward", "tttt tl tttl t ttt lll l")(
            *came, *gates, count, out.numel() // width, width, threads
        )
        if sums is None:
            return dh, dy, *(None,) * 6
        dshift, dscale, dgate, total = sums[:, :, :-1].sum(0)
        dbias = (gate * total).sum(0) if needs[2] else None
        gradients = (dgate, dshift, dscale)
        return dh, dy, dbias, *(x if need else None for x, need in zip(gradients, needs[3:6], strict=True)), None, None


def split_heads(
    qkv: Tensor, heads: int, norms: tuple[Tensor, Tensor, Tensor, Tensor], turn: Tensor, eps: float, skip: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries without the first `skip` rows, keys and values (B, R, H, Dh), in memory heads before rows.

    qkv (B, R, 3 H Dh); norms: gain and bias (Dh) of the norm of q's heads, and of k's; turn complex64 (R, 1, Dh / 2) or
    (1 or B, R, 1, Dh / 2): factors of their pairs.
    """
    if wanted(qkv, *norms):
        several = _SplitHeads.apply(qkv, *norms, heads, turn, eps, skip)
    else:
        several = _split_heads(qkv, norms, heads, turn, eps, skip, None)
    q, k, v = (x.transpose(1, 2) for x in several)
    return q, k, v


def _turn(turn: Tensor) -> tuple[Tensor, int]:
    """The factors as numbers, and how many lie between those of two samples."""
    numbers = torch.view_as_real(turn.resolve_conj()).contiguous()
    return numbers, 0 if turn.dim() == 3 or len(turn) == 1 else numbers.stride(0)


def _split_heads(
    qkv: Tensor, norms: tuple[Tensor, ...], heads: int, turn: Tensor, eps: float, skip: int, stats: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    qkv, (batch, rows, width), (factors, stride) = qkv.contiguous(), qkv.shape, _turn(turn)
    head_dim = width // (3 * heads)
    q = qkv.new_empty(batch, heads, rows - skip, head_dim)
    k, v = (qkv.new_empty(batch, heads, rows, head_dim) for _ in range(2))
    to = (q, k, v, stats, batch, rows, skip, heads, head_dim, eps, threads_for(qkv))
    function("split_heads", "t tttt tl tttt lllllf l")(qkv, *norms, factors, stride, *to)
    return q, k, v


class _SplitHeads(torch.autograd.Function):
    """(qkv, gain and bias of q's norm, of k's, heads, turn, eps, skip) -> q, k, v (B, H, R, Dh)."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, *others: Any) -> tuple[Tensor, ...]:
        *norms, heads, turn, eps, skip = others
        stats = qkv.new_empty(*qkv.shape[:2], 2, heads, 2)
        ctx.save_for_backward(qkv, norms[0], norms[2], turn, stats)
        ctx.skip = skip
        return _split_heads(qkv, tuple(norms), heads, turn, eps, skip, stats)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *of: Tensor) -> tuple[Tensor | None, ...]:
        qkv, q_gain, k_gain, turn, stats = ctx.saved_tensors
        dq, dk, dv = (x.contiguous() for x in of)
        batch, heads, rows, head_dim = dk.shape
        qkv, (factors, stride), threads = qkv.contiguous(), _turn(turn), threads_for(qkv)
        dqkv = torch.empty_like(qkv)
        sums = qkv.new_zeros(threads, 2, 4, head_dim) if any(ctx.needs_input_grad[1:5]) else None
        given = (dq, dk, dv, qkv, q_gain, k_gain, factors, stride, stats)
        sizes = (batch, rows, ctx.skip, heads, head_dim, threads)
        function("split_heads_backward", "tttt tt tlt tt lllll l")(*given, dqkv, sums, *sizes)
        dnorms = (None,) * 4 if sums is None else sums[:, 0].sum(0).unbind()
        return dqkv, *dnorms, None, None, None, None
