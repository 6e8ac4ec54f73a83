"""Which implementation of an operation runs: a function in torch defines it, a kernel stands in where it can."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, Generic, Literal, ParamSpec, TypeVar

from torch import Tensor

from opencola.kernels.library import on_cpu, usable

__all__ = ["Precision", "implemented_by", "on_cpu", "on_cuda", "precision", "products_in", "usable"]
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
