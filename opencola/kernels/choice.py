"""Which implementation of an operation runs: a function in torch defines it, a kernel stands in where it can."""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, Generic, Literal, ParamSpec, TypeVar, cast

import torch
from torch import Tensor

from opencola.kernels.library import on_cpu, usable

__all__ = [
    "Precision",
    "adding_to",
    "implemented_by",
    "invariant",
    "is_invariant",
    "on_cpu",
    "on_cuda",
    "packs",
    "precision",
    "products_in",
    "usable",
]
Precision = Literal["float32", "bfloat16"]

P = ParamSpec("P")
R = TypeVar("R")


class Operation(Generic[P, R]):
    """A function with a second implementation. `reference` is the function alone, without any other implementation."""

    def __init__(
        self,
        function: Callable[P, R],
        kernel: Callable[..., Any],
        takes: Callable[..., bool],
        worthwhile: Callable[..., bool] | None,
    ) -> None:
        self.reference: Callable[P, R] = function.reference if isinstance(function, Operation) else function
        self.function, self.kernel, self.takes, self.worthwhile = function, kernel, takes, worthwhile
        functools.update_wrapper(self, self.reference)

    def __call__(self, *arguments: P.args, **named: P.kwargs) -> R:
        """The kernel's result where it takes the tensors, else the function's."""
        values = (*arguments, *named.values()) if named else arguments
        if self.takes(*_tensors(values)) and (self.worthwhile is None or self.worthwhile(*arguments, **named)):
            result: R = self.kernel(*arguments, **named)
            return result
        return self.function(*arguments, **named)


def _tensors(values: tuple[Any, ...]) -> list[Tensor]:
    """Those among the values and in tuples of them."""
    tensors: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            tensors.append(value)
        elif isinstance(value, tuple):
            tensors += _tensors(value)
    return tensors


def implemented_by(
    kernel: Callable[..., Any],
    takes: Callable[..., bool] = usable,
    worthwhile: Callable[..., bool] | None = None,
) -> Callable[[Callable[P, R]], Operation[P, R]]:
    """Decorate a function in torch, the definition of an operation, with a kernel of the same arguments and results.

    takes: whether the kernel can take the operation's tensors, given all of them, those in tuples too; for kernels in C
    `usable`, for other code for a CPU `on_cpu`, for CUDA `on_cuda`. worthwhile: whether it is faster, asked with the
    arguments of the call. With several decorators the upper one is asked first.
    """
    return lambda function: Operation(function, kernel, takes, worthwhile)


def on_cuda(*tensors: Tensor) -> bool:
    """Whether all of them are on a CUDA device."""
    return all(x.is_cuda for x in tensors)


_precision: Precision = "float32"


def precision() -> Precision:
    """Of products of float32 matrices on a CPU, here."""
    return _precision


@contextlib.contextmanager
def products_in(kind: Precision) -> Iterator[None]:
    """Within this context products of float32 matrices on a CPU, and their gradients, are computed in this precision.

    bfloat16: large ones have their factors rounded to it; sums and all else stay float32.
    """
    global _precision
    before, _precision = _precision, kind
    try:
        yield
    finally:
        _precision = before


Packs = dict[Any, tuple[Tensor, Tensor]]
"""Weights in the order of the kernels' products, by what tells weights from each other; with each the weight itself."""
_packs: ContextVar[Packs | None] = ContextVar("packs", default=None)  # threads must not leave theirs to others


def packs() -> Packs | None:
    """Of the `invariant` function that runs, which may add to them; None outside of any."""
    return _packs.get()


def is_invariant(place: torch.device) -> bool:
    """Whether numbers of float32 at a place are the same whatever is computed together, in `invariant` functions."""
    return place.type == "cpu" and usable()


def invariant(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate a function, or one that yields, in which no number of a sample depends on others, nor on the threads.

    That is, in float32 where it `is_invariant`: every sum then has one order. Elsewhere, and in other types, products
    of matrices add up as torch sees fit. While it runs, no parameter may change.
    """
    if not inspect.isgeneratorfunction(function):

        @functools.wraps(function)
        def whole(*arguments: P.args, **named: P.kwargs) -> R:
            with adding_to({}):
                return function(*arguments, **named)

        return whole

    @functools.wraps(function)
    def step_by_step(*arguments: P.args, **named: P.kwargs) -> Iterator[Any]:
        steps, own = function(*arguments, **named), Packs()
        while True:
            with adding_to(own):
                try:
                    step = next(steps)
                except StopIteration:
                    return
            yield step

    return cast(Callable[P, R], step_by_step)


@contextlib.contextmanager
def adding_to(own: Packs) -> Iterator[None]:
    """Within this context all is as in an `invariant` function, whose packs are these; an inner one adds to an outer
    one's."""
    outer = packs()
    before = _packs.set((own if outer is None else outer) if usable() else None)
    try:
        yield
    finally:
        _packs.reset(before)
