"""Attention of packed training rows by `attention.c`: float32 on a CPU, only the pairs that may see each other."""

import ctypes
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from opencola import kernels

TILE = 16  # attention.c's


@dataclass(frozen=True)
class Pattern:
    """Rows [clean | copy 1 | copy 2 ...]: a row sees the clean blocks before its own and its own block of its part."""

    num_clean: int
    num_latents: int
    block_size: int
    copies: int
    first: int
    """The latent with which a copy begins."""
    history: Tensor | None
    """(B,) bool: samples whose noisy rows see clean ones; all when None."""
    documents: Tensor | None
    """(B, N) int32: rows see their own document only."""


class _Rows(ctypes.Structure):
    _fields_ = (("start", ctypes.c_void_p), *((step, ctypes.c_long) for step in ("sample", "row", "head")))


_TENSORS = ("q", "k", "v", "past_k", "past_v", "out", "gradient", "dq", "dk", "dv")
_NUMBERS = ("samples", "heads", "channels", "asking", "block", "clean", "copies", "length", "first")


class _Call(ctypes.Structure):
    _fields_ = (
        *((name, _Rows) for name in _TENSORS),
        ("log_sums", ctypes.c_void_p),
        *((name, ctypes.c_long) for name in _NUMBERS),
        *((name, ctypes.c_void_p) for name in ("history", "documents", "scratch")),
        *((name, ctypes.c_long) for name in ("scratch_each", "threads")),
        ("scale", ctypes.c_float),
    )


def attend_packed(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, past: tuple[Tensor, Tensor] | None) -> Tensor:
    """Rows q (B, Q, H, Dh), the last Q of those of k and v (B, R, H, Dh) -> (B, Q, H, Dh), float32.

    past: keys and values (B, Nc, H, Dh) of the clean rows, where these are not the first rows of k and v. They get no
    gradient.
    """
    channels = q.shape[-1]
    extra = -channels % TILE
    if extra:
        q, k, v = (F.pad(x, (0, extra)) for x in (q, k, v))
        past = None if past is None else (F.pad(past[0], (0, extra)), F.pad(past[1], (0, extra)))
    out: Tensor = _Packed.apply(q, k, v, pattern, past, channels**-0.5)
    return out[..., :channels] if extra else out


class _Packed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        pattern: Pattern,
        past: tuple[Tensor, Tensor] | None,
        scale: float,
    ) -> Tensor:
        out, log_sums = q.new_empty(q.shape), q.new_empty(q.shape[0], q.shape[2], q.shape[1])
        _run("attend_packed", pattern, past, scale, log_sums, q=q, k=k, v=v, out=out)
        ctx.save_for_backward(q, k, v, log_sums)
        ctx.pattern, ctx.past, ctx.scale = pattern, past, scale
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, log_sums = ctx.saved_tensors
        dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
        tensors = {"q": q, "k": k, "v": v, "gradient": gradient, "dq": dq, "dk": dk, "dv": dv}
        _run("attend_packed_backward", ctx.pattern, ctx.past, ctx.scale, log_sums, **tensors)
        return dq, dk, dv, None, None, None


def _run(
    name: str,
    pattern: Pattern,
    past: tuple[Tensor, Tensor] | None,
    scale: float,
    log_sums: Tensor,
    **tensors: Tensor,
) -> None:
    if past is not None:
        tensors["past_k"], tensors["past_v"] = past
    tensors = {name: x if x.stride(-1) == 1 else x.contiguous() for name, x in tensors.items()}
    samples, asking, heads, channels = tensors["q"].shape
    threads = torch.get_num_threads()
    keys = (
        pattern.num_clean + 2 * pattern.block_size + TILE
    )  # at most, of a tile: clean ones, and the blocks it touches
    scratch = torch.empty(threads, TILE * (3 * channels + 2 * keys))
    length = pattern.num_latents - pattern.first
    sizes = (samples, heads, channels, asking)
    layout = (pattern.block_size, pattern.num_clean, pattern.copies, length, pattern.first)
    marks = (None if x is None else x.data_ptr() for x in (pattern.history, pattern.documents))
    call = _Call(
        **{name: _Rows(x.data_ptr(), *x.stride()[:3]) for name, x in tensors.items()},
        log_sums=log_sums.data_ptr(),
        **dict(zip(_NUMBERS, (*sizes, *layout), strict=True)),
        **dict(zip(("history", "documents"), marks, strict=True)),
        scratch=scratch.data_ptr(),
        scratch_each=scratch.shape[1],
        threads=threads,
        scale=scale,
    )
    getattr(kernels.library(), name)(ctypes.byref(call))
