"""Products of float32 matrices in bfloat16 with sums in float32, on CPUs that have the instructions."""

import ctypes
import functools

import torch
from torch import Tensor

from opencola.kernels.library import NotCompiled, function

SMALL = 1 << 21  # products of two numbers; fewer are not worth a second thread


@functools.cache
def ways() -> int:
    """0 where there are no such products here, 1 where vectors do them, 2 where tiles can, too."""
    try:
        count: int = function("bfloat16_ways", "", ctypes.c_long)()
    except NotCompiled:
        return 0
    return count


def available() -> bool:
    """Whether `product` works here."""
    return ways() > 0


def product(a: Tensor, b: Tensor, *, tiles: bool = True) -> Tensor:
    """a bᵀ: a (..., M, K), b (..., N, K), float32 on a CPU, the same leading dimensions -> (..., M, N), contiguous.

    Both are rounded to bfloat16, to nearest even; denormal numbers count as zeros. Sums are float32, each in one order,
    however many rows or threads there are. Transposed views are read as they are. tiles: False does without them even
    where they are, for tests.
    """
    (*lead, rows, depth), columns = a.shape, b.shape[-2]
    if b.shape[:-2] != a.shape[:-2] or b.shape[-1] != depth:
        raise ValueError(f"matrices of shapes {tuple(a.shape)} and {tuple(b.shape)} do not fit")
    out = a.new_empty(*lead, rows, columns)
    if not (out.numel() and depth):
        return out.zero_()
    a, b = _stack(a), _stack(b)
    work = out.numel() * depth
    threads = 1 if work < SMALL else torch.get_num_threads()
    function("bfloat16_product", "ttt llll lll lll ll")(
        a, b, out, len(a), rows, columns, depth, *a.stride(), *b.stride(), tiles, threads
    )
    return out


def _stack(x: Tensor) -> Tensor:
    """Of three dimensions, one of the last two contiguous."""
    x = x[None] if x.dim() == 2 else x.flatten(0, -3)
    return x if 1 in x.stride()[1:] else x.contiguous()
