"""The kernels of generation, whose rows are few: products with packed weights, attention to prefixes."""

import ctypes

import torch
from torch import Tensor

from opencola.kernels.library import function


def pack(weight: Tensor) -> Tensor:
    """A weight (N, K) in the order in which `product` reads it: one row of numbers."""
    weight = _in_lines(weight.detach())
    packed = weight.new_empty(function("packed_size", "ll", ctypes.c_long)(*weight.shape))
    function("pack", "tt llll")(weight, packed, *weight.shape, *weight.stride())
    return packed


def _in_lines(weight: Tensor) -> Tensor:
    return weight if 1 in weight.stride() and 0 not in weight.stride() else weight.contiguous()


def product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    columns: int,
    index: Tensor,
    *,
    norm: tuple[Tensor, Tensor, float] | None = None,
    gelu: bool = False,
    residual: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """x (..., K) times a weight (columns, K), plus bias: (..., columns). Every sum has one order, however many rows.

    weight: as `pack` gives it, or as it is, which with few rows takes twice as long.

    norm: (shift, scale, eps), with which x is first normalised (without gain), times 1 + scale, plus shift; gelu: the
    tanh form, of the result; residual: (h, gate), h (..., columns): the result is h + gate * product. Shift, scale and
    gate (M, ·) belong to distinct times, of which a row takes the one at its index (int64, a number a row; not read
    where M is 1), and may be parts of one tensor's rows.
    """
    x, depth = x.contiguous(), x.shape[-1]
    out = x.new_empty(*x.shape[:-1], columns)
    shift, scale, eps = norm or (None, None, 0.0)
    h, gate = (None, None) if residual is None else (residual[0].contiguous(), residual[1])
    several = gate if shift is None else shift
    stride = 0 if several is None or len(several) == 1 else several.stride(0)
    sizes, parts = (x.numel() // depth, columns, depth), (shift, scale, gate, h)
    weight = weight if weight.dim() == 1 else _in_lines(weight)
    steps = weight.stride() if weight.dim() > 1 else (0, 0)
    places = index.contiguous() if stride else None
    function("product", "ttt lll ll tttttt lfll")(
        x, weight, out, *sizes, *steps, *parts, places, bias, stride, eps, gelu, torch.get_num_threads()
    )
    return out


def prefix_attention(q: Tensor, k: Tensor, v: Tensor, limits: Tensor, out: Tensor, few: bool = False) -> None:
    """softmax(q kᵀ / sqrt(Dh)) v into out (B, R, H, Dh), contiguous, where a row sees the first `limits` keys.

    few: take rows one by one, not TILE side by side, in sums of another order. No row depends on what it does not see.
    q (B, R, H, Dh); k, v (B, T, H or fewer that divide H, Dh); limits (B, R) int64, each from 1 to T.
    """
    if k.stride() != v.stride() or k.stride(-1) != 1:
        k, v = k.contiguous(), v.contiguous()
    q = q if q.stride(-1) == 1 else q.contiguous()
    batch, rows, heads, width = q.shape
    strides = ctypes.c_int64 * 3
    steps = strides(*q.stride()[:3]), strides(*k.stride()[:3])
    function("prefix_attention", "ttttt lllll pp ll")(
        q, k, v, out, limits, batch, rows, heads, k.shape[2], width, *steps, few, torch.get_num_threads()
    )
