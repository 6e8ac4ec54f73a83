"""Products of matrices on a CPU, forward and backward, each by the implementation that is the fastest on this machine.

Which one that is, is measured when it is first needed (`rates`, a second or two) and kept in the cache folder, so that
later runs compute alike. OPENCOLA_PRODUCTS in the environment fixes it: torch, onednn or ours.
"""

import contextlib
import functools
import hashlib
import itertools
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from filelock import FileLock
from torch import Tensor
from torch.nn import Parameter

from opencola.errors import UserError
from opencola.kernels import bfloat16, library, rows
from opencola.kernels.choice import Precision, packs, precision
from opencola.kernels.elementwise import wanted
from opencola.storage import write_text

Direction = Literal["forward", "input", "weight"]
Rates = dict[str, dict[str, float]]
"""GFLOP/s by "precision direction size" and implementation."""

VARIABLE = "OPENCOLA_PRODUCTS"
DIRECTIONS: tuple[Direction, ...] = ("forward", "input", "weight")
SIZES = {"small": (960, 128, 384), "large": (2048, 256, 1024)}
"""(rows, in, out) of the products that are timed. In between, a product counts as the nearer one."""
MARGIN = 1.1
"""How much faster than torch another implementation, or than float32 bfloat16, must be: less may be chance."""
PACKED_BYTES = 1 << 30
"""Of parameters in another order, at most; with more, products bring what they need into order each time."""
NO_INDEX = torch.empty(0)
LEAST = 1 << 22
"""Operations of a product below which torch has it: all the rest weighs more."""


def _onednn(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    out: Tensor = torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")
    return out


def _torch(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    return a @ b.T if bias is None else torch.addmm(bias, a, b.T)


def _ours(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    return rows.product(a, packed(b), bias, len(b), NO_INDEX)


def packed(b: Tensor) -> Tensor:
    """In an `invariant` function, a parameter or its transpose as `rows.pack` has put it in order there; else b."""
    parameter, known = b if isinstance(b, Parameter) else b._base, packs()
    if known is None or not isinstance(parameter, Parameter):
        return b
    key = id(b) if b is parameter else (id(parameter), b.storage_offset(), b.shape, b.stride())
    if key not in known:
        if sum(own.nbytes for _, own in known.values()) + b.nbytes > PACKED_BYTES:
            return b
        known[key] = parameter, rows.pack(b)
    return known[key][1]


def _tiles(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    out = bfloat16.product(a, b)
    return out if bias is None else out.add_(bias)


def _cast(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    out = (a.bfloat16() @ b.bfloat16().T).float()
    return out if bias is None else out.add_(bias)


def _implicit(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    setting: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before, setting.fp32_precision = setting.fp32_precision, "bf16"
    try:
        return _torch(a, b, bias)
    finally:
        setting.fp32_precision = before


Implementation = Callable[[Tensor, Tensor, Tensor | None], Tensor]
IMPLEMENTATIONS: dict[Precision, dict[str, Implementation]] = {
    "float32": {"torch": _torch, "onednn": _onednn, "ours": _ours},
    "bfloat16": {"torch": _cast, "onednn": _implicit, "ours": _tiles},
}
"""By name: (M, K) times the transpose of (N, K), both strided as they come, plus a bias (N): (M, N), all float32."""


def candidates(kind: Precision) -> dict[str, Implementation]:
    """Those that this machine has."""
    ours = bfloat16.available() if kind == "bfloat16" else library.library() is not None
    there = {"torch": True, "onednn": torch.backends.mkldnn.is_available(), "ours": ours}
    return {name: by for name, by in IMPLEMENTATIONS[kind].items() if there[name]}


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., in) times weight (out, in), plus bias (out): (..., out), float32."""
    if packs() is not None and not wanted(x, weight, bias):
        return _ours(x, weight, bias)
    out: Tensor = _Linear.apply(x, weight, bias, precision())
    return out


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, kind: Precision) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.precision = kind
        flat = x.reshape(-1, x.shape[-1])
        return product(flat, weight, bias, "forward", kind).view(*x.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs, kind = ctx.needs_input_grad, ctx.precision
        flat, dflat = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
        if torch.is_grad_enabled():  # the gradient is to have gradients of its own
            return dy @ weight, dflat.T @ flat, dflat.sum(0) if needs[2] else None, None
        dx = product(dflat, weight.T, None, "input", kind).view_as(x) if needs[0] else None
        dw = product(dflat.T, flat.T, None, "weight", kind) if needs[1] else None
        return dx, dw, dflat.sum(0) if needs[2] else None, None


def product(a: Tensor, b: Tensor, bias: Tensor | None, direction: Direction, kind: Precision) -> Tensor:
    """a (M, K) times the transpose of b (N, K), plus bias (N), as `direction` of a linear layer."""
    return chosen(2 * a.numel() * len(b), direction, kind)(a, b, bias)


def chosen(operations: int, direction: Direction, kind: Precision) -> Implementation:
    """Whose products of so many operations are the fastest; in an `invariant` function, ours."""
    if packs() is not None:
        return _ours
    if operations < LEAST:
        return _torch
    small, large = (2 * math.prod(shape) for shape in SIZES.values())
    size = "small" if operations**2 < small * large else "large"
    return choices(torch.get_num_threads())[kind, direction, size]


def worthwhile(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    """Whether torch alone would be slower than `linear`, or not `invariant` where that is wanted."""
    if packs() is not None:
        return True
    operations = 2 * x.numel() * len(weight)
    return operations >= LEAST and any(chosen(operations, way, precision()) is not _torch for way in DIRECTIONS)


def product_of_stacks(a: Tensor, b: Tensor) -> Tensor:
    """a (S, M, K) times the transposes of b (S, N, K): (S, M, N). No gradients."""
    by = _of_stacks(a, b)
    if by is _tiles:
        return bfloat16.product(a, b)
    return torch.stack([by(one, other, None) for one, other in zip(a, b, strict=True)])


def stacks_worthwhile(a: Tensor, b: Tensor) -> bool:
    """Whether torch alone would be slower than `product_of_stacks`."""
    return _of_stacks(a, b) is not _torch


def _of_stacks(a: Tensor, b: Tensor) -> Implementation:
    """In bfloat16 only tiles gain, as they take all matrices of a stack in one call."""
    if precision() == "bfloat16":
        return _tiles if bfloat16.available() else _torch
    return chosen(2 * a[:1].numel() * b.shape[1], "forward", "float32")


@functools.cache
def choices(threads: int) -> dict[tuple[Precision, Direction, str], Implementation]:
    """The implementation for each precision, direction and size. Raises UserError for an unknown one in `VARIABLE`.

    For bfloat16 it is float32's where the processor gains nothing by the other.
    """
    fixed, names = os.environ.get(VARIABLE), IMPLEMENTATIONS["float32"]
    if fixed and fixed not in names:
        raise UserError(f"{VARIABLE} is {fixed!r}, not one of {', '.join(names)}")
    used: dict[tuple[Precision, Direction, str], Implementation] = {}
    wide, narrow = candidates("float32"), candidates("bfloat16")
    for direction, size in itertools.product(DIRECTIONS, SIZES):
        if fixed:
            used["float32", direction, size] = wide.get(fixed, wide["torch"])
            used["bfloat16", direction, size] = narrow.get(fixed, narrow["torch"])
            continue
        of_wide, of_narrow = (rates(threads)[f"{kind} {direction} {size}"] for kind in IMPLEMENTATIONS)
        best = max(of_wide, key=lambda name: of_wide[name])
        used["float32", direction, size] = wide[best if of_wide[best] > MARGIN * of_wide["torch"] else "torch"]
        best = max(of_narrow, key=lambda name: of_narrow[name])
        gains = of_narrow[best] > MARGIN * max(of_wide.values())
        used["bfloat16", direction, size] = narrow[best] if gains else used["float32", direction, size]
    return used


@functools.cache
def rates(threads: int) -> Rates:
    """What was measured with so many threads: once, by the first process that asked."""
    for folder in library.folders():
        with contextlib.suppress(OSError):  # no room, or no right to write
            library.make_folder(folder)
            file = folder / f"products-{_key()}-{threads}.json"
            with FileLock(f"{file}.lock"):
                try:
                    return _read(file)
                except (OSError, ValueError):
                    measured = measure(threads)
                    write_text(file, json.dumps(measured, indent=1))
                    return measured
    return measure(threads)


def _key() -> str:
    """What rates depend on, but for the threads: program, kernels and machine."""
    kernels = library.library()
    file = "none" if kernels is None else os.path.basename(kernels._name)
    parts = (torch.__version__, file, bfloat16.ways(), sorted(SIZES.items()))
    return hashlib.sha256(repr(parts).encode() + library.processor()).hexdigest()[:16]


def _read(file: Path) -> Rates:
    """Raises ValueError for a file that is not one of rates."""
    read = json.loads(file.read_text(encoding="utf-8"))
    for kind, direction, size in itertools.product(IMPLEMENTATIONS, DIRECTIONS, SIZES):
        try:
            if not all(float(read[f"{kind} {direction} {size}"][name]) > 0 for name in candidates(kind)):
                raise ValueError(f"{file} holds rates that are not above 0")
        except (KeyError, TypeError) as error:
            raise ValueError(f"{file} lacks rates: {error!r}") from error
    rates: Rates = read
    return rates


def measure(threads: int, repeats: int = 3) -> Rates:
    """The rate of every implementation, GFLOP/s, at each of `SIZES`: the best of several, taken in turns."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.no_grad():
            return dict(_measured(repeats))
    finally:
        torch.set_num_threads(before)


def _measured(repeats: int) -> Iterator[tuple[str, dict[str, float]]]:
    for size, (count, inputs, outputs) in SIZES.items():
        x, weight, dy = torch.zeros(count, inputs), torch.zeros(outputs, inputs), torch.zeros(count, outputs)
        for x_or_other in (x, weight, dy):
            x_or_other.uniform_(-1, 1, generator=torch.Generator().manual_seed(0))
        factors = {"forward": (x, weight), "input": (dy, weight.T), "weight": (dy.T, x.T)}
        for direction, kind in itertools.product(DIRECTIONS, IMPLEMENTATIONS):
            a, b = factors[direction]
            ways = {name: functools.partial(by, a, b, None) for name, by in candidates(kind).items()}
            operations, seconds = 2e-9 * count * inputs * outputs, in_turns(ways, repeats + 1)
            yield f"{kind} {direction} {size}", {name: operations / least for name, least in seconds.items()}


def in_turns(ways: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """The least seconds of each of several ways, run one after the other, so often: what slows one slows all."""
    seconds = dict.fromkeys(ways, math.inf)
    for _ in range(repeats):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            seconds[name] = min(seconds[name], time.perf_counter() - start)
    return seconds
