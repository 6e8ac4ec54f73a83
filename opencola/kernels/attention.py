"""Attention of packed training rows by `attention.c`: float32 on a CPU, only the pairs that may see each other."""

import ctypes
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from opencola.kernels.library import TILE, function


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
_SIZES = ("samples", "heads", "channels", "asking", "block", "clean", "copies", "length", "first")


class _Call(ctypes.Structure):
    _fields_ = (
        *((name, _Rows) for name in _TENSORS),
        ("log_sums", ctypes.c_void_p),
        *((name, ctypes.c_long) for name in _SIZES),
        *((name, ctypes.c_void_p) for name in ("history", "documents", "scratch")),
        *((name, ctypes.c_long) for name in ("scratch_each", "threads")),
        ("scale", ctypes.c_float),
    )


def attend_packed(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, past: tuple[Tensor, Tensor] | None) -> Tensor:
    """Rows q (B, Q, H, Dh), the last Q of those of k and v (B, R, H, Dh) -> (B, Q, H, Dh), all float32 on a CPU.

    past: keys and values (B, Nc, H, Dh) of the clean rows, where these are not the first rows of k and v; they get no
    gradient. Raises ValueError for other numbers of rows than the pattern's.
    """
    samples, asking, heads, channels = q.shape
    num_clean, copies, num_latents = pattern.num_clean, pattern.copies, pattern.num_latents
    num_rows = (0 if past is not None else num_clean) + copies * (num_latents - pattern.first)
    expected: list[tuple[Tensor | None, tuple[int, ...]]] = [
        *((x, (samples, num_rows, heads, channels)) for x in (k, v)),
        *((x, (samples, num_clean, heads, channels)) for x in past or ()),
        (pattern.history, (samples,)),
        (pattern.documents, (samples, num_latents)),
    ]
    if asking > num_rows or any(x is not None and x.shape != shape for x, shape in expected):
        raise ValueError(
            f"rows {[*q.shape]}, {[*k.shape]}, {[*v.shape]} or what goes with them are not those of {num_clean} clean "
            f"latents and {copies} copies of latents {pattern.first} to {num_latents}"
        )
    extra = -channels % TILE
    tensors = [F.pad(x, (0, extra)) if extra else x for x in (q, k, v, *(past or ()))]
    q, k, v, *clean = (x if x.stride(-1) == 1 else x.contiguous() for x in tensors)
    out: Tensor = _Packed.apply(q, k, v, pattern, clean, channels**-0.5)
    return out[..., :channels] if extra else out


class _Packed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, past: list[Tensor], scale: float
    ) -> Tensor:
        out, log_sums = q.new_empty(q.shape), q.new_empty(q.shape[0], q.shape[2], q.shape[1])
        tensors = dict(zip(("q", "k", "v", "past_k", "past_v"), (q, k, v, *past), strict=False))
        _run("attend_packed", pattern, scale, log_sums, tensors | {"out": out})
        ctx.save_for_backward(*tensors.values(), log_sums)
        ctx.pattern, ctx.scale = pattern, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        *saved, log_sums = ctx.saved_tensors
        tensors = dict(zip(("q", "k", "v", "past_k", "past_v"), saved, strict=False))
        tensors["gradient"] = gradient if gradient.stride(-1) == 1 else gradient.contiguous()
        results = {f"d{name}": _heads_first(tensors[name]) for name in ("q", "k", "v")}
        _run("attend_packed_backward", ctx.pattern, ctx.scale, log_sums, tensors | results)
        return *results.values(), None, None, None


def _heads_first(like: Tensor) -> Tensor:
    """Space of that shape, (B, R, H, Dh), a head's rows next to each other."""
    return torch.empty_like(like.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)


def _run(name: str, pattern: Pattern, scale: float, log_sums: Tensor, tensors: dict[str, Tensor]) -> None:
    samples, asking, heads, channels = tensors["q"].shape
    threads = torch.get_num_threads()
    most_keys = pattern.num_clean + 2 * pattern.block_size + TILE  # of a tile: clean ones, and the blocks it touches
    scratch = torch.empty(threads, TILE * (3 * channels + 2 * most_keys))
    history, documents = (None if x is None else x.contiguous() for x in (pattern.history, pattern.documents))
    call = _Call(
        **{name: _Rows(x.data_ptr(), *x.stride()[:3]) for name, x in tensors.items()},
        log_sums=log_sums.data_ptr(),
        samples=samples,
        heads=heads,
        channels=channels,
        asking=asking,
        block=pattern.block_size,
        clean=pattern.num_clean,
        copies=pattern.copies,
        length=pattern.num_latents - pattern.first,
        first=pattern.first,
        history=None if history is None else history.data_ptr(),
        documents=None if documents is None else documents.data_ptr(),
        scratch=scratch.data_ptr(),
        scratch_each=scratch.shape[1],
        threads=threads,
        scale=scale,
    )
    function(name, "p")(ctypes.byref(call))
