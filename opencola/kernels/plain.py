"""What a block of the Text VAE or of LLaMA does between its products, by kernels: in one pass over memory each.

For tensors that are `usable`. `layers/operations.py` defines what they compute; the gradients have no gradients of
their own. No number depends on how many rows or threads there are beside it, and gradients that are sums over rows not
on the threads.
"""

import ctypes
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from opencola.kernels.elementwise import threads_for, wanted
from opencola.kernels.library import function

BLOCK = 64  # of vector.h: rows whose sums are added up aside


def _room(x: Tensor, rows: int, *shape: int) -> Tensor:
    """For the sums over every BLOCK of the rows."""
    return x.new_empty(-(-rows // BLOCK), *shape)


def _rows(x: Tensor) -> int:
    return x.numel() // max(x.shape[-1], 1)


def layer_norm(
    x: Tensor,
    eps: float,
    gain: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """LayerNorm of the last axis of x (..., D), with gain and bias (D) or without both, plus residual (..., D)."""
    u: Tensor = _norm(x, None, gain, bias, residual, eps, True)[1]
    return u


def residual_rms_norm(h: Tensor, y: Tensor | None, eps: float, gain: Tensor) -> tuple[Tensor, Tensor]:
    """h + y, and its RMSNorm over the last axis with gain (D): h, y (..., D); h as it is where y is None."""
    out, u = _norm(h, y, gain, None, None, eps, False)
    return h if out is None else out, u


def _norm(
    h: Tensor,
    y: Tensor | None,
    gain: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    centred: bool,
) -> tuple[Any, Any]:
    """h + y (None without y), and the norm of that, plus residual."""
    y, residual = (None if x is None else x.expand_as(h) for x in (y, residual))
    if wanted(h, y, gain, bias, residual):
        both: tuple[Any, Any] = _Norm.apply(h, y, gain, bias, residual, eps, centred)
        return both
    return _norm_forward(h, y, gain, bias, residual, eps, centred, None)


def _norm_forward(
    h: Tensor,
    y: Tensor | None,
    gain: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    centred: bool,
    stats: Tensor | None,
) -> tuple[Tensor | None, Tensor]:
    h, (y, gain, bias, residual) = h.contiguous(), (_contiguous(x) for x in (y, gain, bias, residual))
    out, u = None if y is None else torch.empty_like(h), torch.empty_like(h)
    sizes = (_rows(h), h.shape[-1], eps, centred, threads_for(h))
    function("plain_norm", "ttt ttt tt llfll")(h, y, out, gain, bias, residual, u, stats, *sizes)
    return out, u


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


class _Norm(torch.autograd.Function):
    """(h, y, gain, bias, residual, eps, centred) -> (h + y or none, its norm plus residual)."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor | None, Tensor]:
        h, y, gain, bias, residual, eps, ctx.centred = inputs
        stats = h.new_empty(*h.shape[:-1], 2)
        out, u = _norm_forward(h, y, gain, bias, residual, eps, ctx.centred, stats)
        ctx.save_for_backward(h if out is None else out, gain, stats)
        ctx.set_materialize_grads(False)
        return out, u

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor | None, du: Tensor | None) -> tuple[Tensor | None, ...]:
        x, gain, stats = ctx.saved_tensors
        _, needs_y, needs_gain, needs_bias, needs_residual, *_ = ctx.needs_input_grad
        if du is None:
            return dout, dout, *(None,) * 5
        x, du, dout = x.contiguous(), du.contiguous(), _contiguous(dout)
        rows, width, dx = _rows(x), x.shape[-1], torch.empty_like(x)
        sums = _room(x, rows, 2, width) if needs_gain or needs_bias else None
        dgain, dbias = (x.new_empty(width) if need else None for need in (needs_gain, needs_bias))
        given = (dout, du, x, stats, _contiguous(gain), dx, dgain, dbias, sums)
        function("plain_norm_backward", "ttttt tttt llll")(*given, rows, width, ctx.centred, threads_for(x))
        return dx, dx if needs_y else None, dgain, dbias, du if needs_residual else None, None, None


def swiglu(x: Tensor, bias: Tensor | None, gate_first: bool) -> Tensor:
    """value * silu(gate), the halves of x + bias; x (..., 2 D), bias (2 D)."""
    if wanted(x, bias):
        out: Tensor = _SwiGLU.apply(x, bias, gate_first)
        return out
    return _swiglu(x.contiguous(), bias, gate_first)


def _swiglu(x: Tensor, bias: Tensor | None, gate_first: bool) -> Tensor:
    width = x.shape[-1] // 2
    y, gate = x.new_empty(*x.shape[:-1], width), 0 if gate_first else width
    function("swiglu", "ttt lll l")(x, _contiguous(bias), y, _rows(x), width, gate, threads_for(x))
    return y


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, gate_first: bool) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x, bias)
        ctx.gate_first = gate_first
        return _swiglu(x, bias, gate_first)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, bias = ctx.saved_tensors
        dy, dx, width, rows = dy.contiguous(), torch.empty_like(x), x.shape[-1] // 2, _rows(x)
        dbias = torch.empty_like(bias) if ctx.needs_input_grad[1] else None
        sums = None if dbias is None else _room(x, rows, 2 * width)
        given, gate = (dy, x, _contiguous(bias), dx, dbias, sums), 0 if ctx.gate_first else width
        function("swiglu_backward", "tttttt lll l")(*given, rows, width, gate, threads_for(x))
        return dx, dbias, None


class _Rows(ctypes.Structure):
    _fields_ = (("start", ctypes.c_void_p), *((step, ctypes.c_long) for step in ("sample", "head", "row")))


_SIZES = ("apart", "batch", "length", "heads", "shared", "half", "normed", "threads")
_NORMS = ("q_gain", "q_bias", "k_gain", "k_bias")


class _Call(ctypes.Structure):
    _fields_ = (
        ("qkv", ctypes.c_void_p),
        *((name, _Rows) for name in "qkv"),
        *((name, ctypes.c_void_p) for name in (*_NORMS, "cosine", "sine", "stats", "dqkv", "dnorms", "sums")),
        *((name, ctypes.c_long) for name in _SIZES),
        ("eps", ctypes.c_float),
    )


def rotated_heads(
    qkv: Tensor,
    heads: int,
    kv_heads: int,
    table: tuple[Tensor, Tensor],
    norms: tuple[Tensor | None, ...] | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries (B, R, heads, Dh), keys and values (B, R, kv_heads, Dh) of qkv (B, R, (heads + 2 kv_heads) Dh).

    norms: gain and bias of the LayerNorm of all queries of a row, and of its keys, each none for one without; table:
    `attention.rotary` of the rows. In memory heads come before rows.
    """
    several = *(norms or (None,) * 4), *table, heads, kv_heads, norms is not None, eps
    found = (
        _RotatedHeads.apply(qkv, *several) if wanted(qkv, *norms or ()) else _rotated_heads(qkv, *several, stats=None)
    )
    q, k, v = (x.transpose(1, 2) for x in found)
    return q, k, v


def _rotated_heads(qkv: Tensor, *others: Any, stats: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    *several, heads, kv_heads, normed, eps = others
    (batch, length, width), qkv = qkv.shape, qkv.contiguous()
    head_dim = width // (heads + 2 * kv_heads)
    q = qkv.new_empty(batch, heads, length, head_dim)
    k, v = (qkv.new_empty(batch, kv_heads, length, head_dim) for _ in range(2))
    _run("rotated_heads", qkv, (q, k, v), several, normed, eps, stats=stats)
    return q, k, v


def _run(name: str, qkv: Tensor, parts: Any, several: Any, normed: bool, eps: float, **others: Tensor | None) -> None:
    """Call a kernel with qkv (B, R, ·), parts q, k, v or their gradients (B, H, R, Dh), norms and table, and others."""
    (batch, heads, length, head_dim), shared = parts[0].shape, parts[1].shape[1]
    several = [_contiguous(x) for x in several]  # held while the kernel runs
    cosine = several[-2]
    apart = 0 if cosine.dim() == 3 or len(cosine) == 1 else cosine.stride(0)
    sizes = (apart, batch, length, heads, shared, head_dim // 2, normed, threads_for(qkv))
    pointers = dict(zip((*_NORMS, "cosine", "sine"), several, strict=True)) | others
    call = _Call(
        qkv=qkv.data_ptr(),
        eps=eps,
        **{name: _Rows(x.data_ptr(), *x.stride()[:3]) for name, x in zip("qkv", parts, strict=True)},
        **{name: None if x is None else x.data_ptr() for name, x in pointers.items()},
        **dict(zip(_SIZES, sizes, strict=True)),
    )
    function(name, "p")(ctypes.byref(call))


class _RotatedHeads(torch.autograd.Function):
    """(qkv, gain and bias of q's norm, of k's, cosine, sine, heads, kv_heads, normed, eps) -> q, k, v (B, H, R, Dh)."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, *others: Any) -> tuple[Tensor, ...]:
        qkv, stats = qkv.contiguous(), qkv.new_empty(*qkv.shape[:2], 2, 2)
        ctx.save_for_backward(qkv, stats, *others[:6])
        ctx.normed = others[-2]
        return _rotated_heads(qkv, *others, stats=stats)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        qkv, stats, *several = ctx.saved_tensors
        parts = [x if x.stride(-1) == 1 else x.contiguous() for x in gradients]
        dqkv, dnorms, sums = torch.empty_like(qkv), None, None
        sizes = [0 if x is None else len(x) for x in several[:4]]
        if any(ctx.needs_input_grad[1:5]):
            dnorms, sums = qkv.new_empty(sum(sizes)), _room(qkv, _rows(qkv), sum(sizes))
        others = {"stats": stats, "dqkv": dqkv, "dnorms": dnorms, "sums": sums}
        _run("rotated_heads_backward", qkv, parts, several, ctx.normed, 0, **others)
        of_norms = (None,) * 4 if dnorms is None else dnorms.split(sizes)
        return dqkv, *of_norms, *(None,) * 6
