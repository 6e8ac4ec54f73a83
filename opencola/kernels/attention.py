"""Attention of packed training rows by `attention.c`: float32 on a CPU, only the pairs that may see each other."""

import ctypes
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from opencola.kernels.library import TILE, function


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


def attend_packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past: tuple[Tensor, Tensor] | None,
    num_clean: int,
    num_latents: int,
    block_size: int,
    copies: int,
    first: int,
    history: Tensor | None,
    documents: Tensor | None,
) -> Tensor:
    """Rows q (B, Q, H, Dh), the last Q of those of k and v (B, R, H, Dh) -> (B, Q, H, Dh), all float32 on a CPU.

    past: keys and values (B, Nc, H, Dh) of the clean rows, where these are not the first rows of k and v; they get no
    gradient. The other arguments are the fields of `layers/masks.PackedRows`. Raises ValueError for other numbers of
    rows than theirs.
    """
    samples, asking, heads, channels = q.shape
    length = num_latents - first
    num_rows = (0 if past is not None else num_clean) + copies * length
    expected: list[tuple[Tensor | None, tuple[int, ...]]] = [
        *((x, (samples, num_rows, heads, channels)) for x in (k, v)),
        *((x, (samples, num_clean, heads, channels)) for x in past or ()),
        (history, (samples,)),
        (documents, (samples, num_latents)),
    ]
    if asking > num_rows or any(x is not None and x.shape != shape for x, shape in expected):
        raise ValueError(
            f"rows {[*q.shape]}, {[*k.shape]}, {[*v.shape]} or what goes with them are not those of {num_clean} clean "
            f"latents and {copies} copies of latents {first} to {num_latents}"
        )
    sizes = {"block": block_size, "clean": num_clean, "copies": copies, "length": length, "first": first}
    marks = {"history": history, "documents": documents}
    extra = -channels % TILE
    tensors = [F.pad(x, (0, extra)) if extra else x for x in (q, k, v, *(past or ()))]
    q, k, v, *clean = (x if x.stride(-1) == 1 else x.contiguous() for x in tensors)
    out: Tensor = _Packed.apply(q, k, v, clean, sizes, marks, channels**-0.5)
    return out[..., :channels] if extra else out


class _Packed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, past: list[Tensor], *of_rows: Any) -> Tensor:
        out, log_sums = q.new_empty(q.shape), q.new_empty(q.shape[0], q.shape[2], q.shape[1])
        tensors = dict(zip(("q", "k", "v", "past_k", "past_v"), (q, k, v, *past), strict=False))
        _run("attend_packed", log_sums, tensors | {"out": out}, *of_rows)
        ctx.save_for_backward(*tensors.values(), log_sums)
        ctx.of_rows = of_rows
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        *saved, log_sums = ctx.saved_tensors
        tensors = dict(zip(("q", "k", "v", "past_k", "past_v"), saved, strict=False))
        tensors["gradient"] = gradient if gradient.stride(-1) == 1 else gradient.contiguous()
        results = {f"d{name}": _heads_first(tensors[name]) for name in ("q", "k", "v")}
        _run("attend_packed_backward", log_sums, tensors | results, *ctx.of_rows)
        return *results.values(), None, None, None, None


def _heads_first(like: Tensor) -> Tensor:
    """Space of that shape, (B, R, H, Dh), a head's rows next to each other."""
    return torch.empty_like(like.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)


def _run(
    name: str,
    log_sums: Tensor,
    tensors: dict[str, Tensor],
    sizes: dict[str, int],
    marks: dict[str, Tensor | None],
    scale: float,
) -> None:
    samples, asking, heads, channels = tensors["q"].shape
    threads = torch.get_num_threads()
    most_keys = sizes["clean"] + 2 * sizes["block"] + TILE  # of a tile: clean ones, and the blocks it touches
    scratch = torch.empty(threads, TILE * (3 * channels + 2 * most_keys))
    marks = {mark: None if x is None else x.contiguous() for mark, x in marks.items()}  # held while the kernel runs
    call = _Call(
        **{name: _Rows(x.data_ptr(), *x.stride()[:3]) for name, x in tensors.items()},
        **{mark: None if x is None else x.data_ptr() for mark, x in marks.items()},
        **sizes,
        log_sums=log_sums.data_ptr(),
        samples=samples,
        heads=heads,
        channels=channels,
        asking=asking,
        scratch=scratch.data_ptr(),
        scratch_each=scratch.shape[1],
        threads=threads,
        scale=scale,
    )
    function(name, "p")(ctypes.byref(call))
