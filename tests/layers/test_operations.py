"""Every operation of a block by its kernel, in float32, against its function in torch, in float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from opencola.kernels import elementwise
from opencola.kernels.choice import Operation, invariant
from opencola.layers import operations
from opencola.layers.attention import rotary, turns
from opencola.layers.operations import (
    Linear,
    exact_gelu,
    gated,
    gated_norm,
    linear_gelu,
    linear_swiglu,
    modulated_norm,
    plain_norm,
    residual_rms_norm,
    rotated_heads,
    silu,
    split_heads,
)

pytestmark = pytest.mark.usefixtures("need_kernels")
EPS = 1e-5
Case = tuple[Operation[Any, Any], Callable[..., tuple[Any, ...]], list[tuple[int, ...]]]


def linear(weight: Tensor, bias: Tensor) -> Linear:
    """A layer whose parameters are these very tensors."""
    layer = Linear(weight.shape[1], weight.shape[0])
    del layer.weight, layer.bias
    layer.weight, layer.bias = weight, bias
    return layer


def cases(batch: int, rows: int, width: int, times: int) -> dict[str, Case]:
    """Of each operation: how its arguments come from tensors with gradients, and the shapes of these."""
    torch.manual_seed(4)
    index = torch.randint(times, (batch, rows))
    of_rows, of_times = (batch, rows, width), (times, width)
    turn = turns(rotary(torch.arange(rows), width, 10000.0, torch.float64), 2 * width)
    heads = [(batch, rows, 3 * 3 * 2 * width), *[(2 * width,)] * 4]

    def split(qkv: Tensor, *norms: Tensor) -> tuple[Any, ...]:
        return qkv, 3, norms, turn.to(torch.promote_types(qkv.dtype, torch.complex64)), EPS, rows // 2

    def rotated(qkv: Tensor, *norms: Tensor) -> tuple[Any, ...]:
        return qkv, 3, 1, rotary(torch.arange(rows), 2 * width, 1e4, qkv.dtype), norms or None, EPS

    of_row, wide = (width,), (batch, rows, 5 * 2 * width)
    return {
        "modulated_norm": (modulated_norm, lambda h, s, c: (h, s, c, index, EPS), [of_rows, of_times, of_times]),
        "modulated_norm with gain": (
            modulated_norm,
            lambda h, s, c, gain, bias: (h, s, c, index, EPS, gain, bias),
            [of_rows, of_times, of_times, (width,), (width,)],
        ),
        "gated_norm": (
            gated_norm,
            lambda h, g, y, s, c: (h, g, y, s, c, index, EPS),
            [of_rows, of_times, of_rows, of_times, of_times],
        ),
        "gated": (
            gated,
            lambda h, g, x, w, b: (h, g, linear(w, b), x, index),
            [of_rows, of_times, (batch, rows, 2 * width), (width, 2 * width), (width,)],
        ),
        "linear_gelu": (linear_gelu, lambda x, w, b: (x, w, b), [of_rows, (2 * width, width), (2 * width,)]),
        "split_heads": (split_heads, split, heads),
        "plain_norm": (plain_norm, lambda x: (x, EPS), [of_rows]),
        "plain_norm of all": (
            plain_norm,
            lambda x, gain, bias, r: (x, EPS, gain, bias, r),
            [of_rows, of_row, of_row, of_rows],
        ),
        "residual_rms_norm": (residual_rms_norm, lambda h, gain: (h, None, EPS, gain), [of_rows, of_row]),
        "residual_rms_norm of both": (
            residual_rms_norm,
            lambda h, y, gain: (h, y, EPS, gain),
            [of_rows, of_rows, of_row],
        ),
        "linear_swiglu": (
            linear_swiglu,
            lambda x, w, b: (x, w, b, False),
            [of_rows, (2 * width, width), (2 * width,)],
        ),
        "linear_swiglu without bias": (
            linear_swiglu,
            lambda x, w: (x, w, None, True),
            [of_rows, (2 * width, width)],
        ),
        "rotated_heads": (rotated_heads, rotated, [wide]),
        "rotated_heads with norms": (rotated_heads, rotated, [wide, *[(6 * width,)] * 2, *[(2 * width,)] * 2]),
    }


def values_and_gradients(run: Callable[..., Any], tensors: list[Tensor]) -> list[Tensor]:
    out = run(*tensors)
    out = out if isinstance(out, tuple) else (out,)
    torch.manual_seed(5)
    total = sum(((x * torch.randn(x.shape).to(x)).sum() for x in out), torch.zeros(()))
    return [*(x.detach() for x in out), *torch.autograd.grad(total, tensors)]


@pytest.mark.parametrize("times", [1, 3])
@pytest.mark.parametrize(("batch", "rows", "width"), [(2, 5, 6), (1, 33, 14), (3, 1, 2)])
@pytest.mark.parametrize("name", cases(1, 1, 2, 1))
def test_kernels_compute_what_torch_defines(name: str, batch: int, rows: int, width: int, times: int) -> None:
    operation, arguments, shapes = cases(batch, rows, width, times)[name]
    torch.manual_seed(6)
    drawn = [torch.randn(shape) for shape in shapes]
    drawn[0] = 2 * drawn[0] + 1

    def calls(run: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *tensors: run(*arguments(*tensors))

    reached: list[bool] = []
    kernel = operation.kernel

    def watched(*given: Any) -> Any:
        reached.append(True)
        return kernel(*given)

    operation.kernel = watched
    try:
        found = values_and_gradients(calls(operation), [x.clone().requires_grad_() for x in drawn])
        plain = values_and_gradients(calls(operation.reference), [x.clone().requires_grad_() for x in drawn])
        assert reached == [True]
        exact = values_and_gradients(calls(operation), [x.double().requires_grad_() for x in drawn])
        assert reached == [True]
        with torch.no_grad():
            silent = calls(operation)(*drawn)
    finally:
        operation.kernel = kernel
    for right, *others in zip(exact, found, plain, strict=True):
        for other in others:
            assert other.dtype == torch.float32
            torch.testing.assert_close(other.double(), right, rtol=0, atol=1e-5 * float(1 + right.abs().max()))
    for value, right in zip(silent if isinstance(silent, tuple) else (silent,), exact, strict=False):
        torch.testing.assert_close(value.double(), right, rtol=0, atol=1e-5 * float(1 + right.abs().max()))


def both(name: str, batch: int, rows: int, width: int, change: Callable[[list[Tensor]], list[Tensor]]) -> list[Any]:
    """Values and gradients by the kernel and by torch, of tensors that are changed before."""
    operation, arguments, shapes = cases(batch, rows, width, 3)[name]
    torch.manual_seed(6)
    tensors = [x.requires_grad_() for x in change([torch.randn(shape) for shape in shapes])]
    runs = (operation, operation.reference)
    return [values_and_gradients(lambda *x, run=run: run(*arguments(*x)), tensors) for run in runs]


@pytest.mark.parametrize(("batch", "rows"), [(0, 3), (2, 0)])
@pytest.mark.parametrize("name", cases(1, 1, 2, 1))
def test_there_may_be_no_rows(name: str, batch: int, rows: int) -> None:
    for value, right in zip(*both(name, batch, rows, 6, list), strict=True):
        assert value.shape == right.shape and not value.any() and not right.any()


@pytest.mark.parametrize("name", cases(1, 1, 2, 1))
def test_numbers_may_lie_at_any_address(name: str) -> None:
    def shifted(tensors: list[Tensor]) -> list[Tensor]:
        moved = [torch.empty(1 + x.numel())[1:].view_as(x).copy_(x) for x in tensors]
        assert all(x.data_ptr() % 16 == 4 for x in moved)
        return moved

    (found, _), (expected, _) = (both(name, 2, 5, 20, change) for change in (shifted, list))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("name", cases(1, 1, 2, 1))
def test_two_threads_compute_what_one_does(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every row's numbers alike; sums over rows in another order."""
    monkeypatch.setattr(elementwise, "SMALL", 0)
    one, _ = both(name, 3, 50, 10, list)
    torch.set_num_threads(2)
    try:
        two, _ = both(name, 3, 50, 10, list)
    finally:
        torch.set_num_threads(1)
    torch.testing.assert_close(two, one, rtol=1e-5, atol=1e-5)
    if name not in ("gated", "linear_gelu"):  # which hold torch's products
        of_rows = [(x, y) for x, y in zip(one, two, strict=True) if 3 in x.shape[:1] and x.dim() > 2]
        assert len(of_rows) > 1 and all(torch.equal(x, y) for x, y in of_rows)


@pytest.mark.parametrize("odd", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", cases(1, 1, 2, 1))
def test_what_is_not_finite_is_so_where_torch_has_it(name: str, odd: float) -> None:
    def spoil(tensors: list[Tensor]) -> list[Tensor]:
        tensors[0][0, 1, 3] = odd
        return tensors

    for value, right in zip(*both(name, 2, 3, 20, spoil), strict=True):
        assert torch.equal(value.isfinite(), right.isfinite())
        assert name.startswith(("linear", "gated")) or torch.equal(value.isnan(), right.isnan())


ACTIVATIONS = ((exact_gelu, F.gelu), (silu, F.silu))


@pytest.mark.parametrize(("operation", "plain"), ACTIVATIONS)
def test_activations_do_not_depend_on_the_place_of_a_number(operation: Any, plain: Callable[..., Tensor]) -> None:
    x = torch.cat((3 * torch.randn(1000), torch.tensor([0.0, -0.0, 100.0, -100.0, 1e30, -1e30])))
    whole = invariant(operation)(x)
    torch.testing.assert_close(whole.double(), plain(x.double()), rtol=1e-6, atol=1e-6)
    assert torch.equal(operation(x), plain(x))
    for size in (1, 5, 16, 31):
        for first in (0, 3, 400):
            assert torch.equal(invariant(operation)(x[first : first + size]), whole[first : first + size])


def test_denormal_numbers_are_numbers() -> None:
    x = torch.tensor([1e-39, -3e-40, 1e-44, 0.0]).repeat(5)
    torch.testing.assert_close(elementwise.gelu(x), x / 2, rtol=0, atol=1e-45)
    one, index = torch.ones(1, 20), torch.zeros(1, 1, dtype=torch.long)
    assert torch.equal(elementwise.gated(x[None, None], one, x[None, None], index)[0, 0], 2 * x)


def test_every_operation_has_a_case() -> None:
    known = {case[0].__name__ for case in cases(1, 1, 2, 1).values()}
    of_its_own = {"linear", "product_of_stacks", "linear_cross_entropy"}  # tests/kernels/test_{matmul,vocabulary}.py
    of_parts = {operation.__name__ for operation, _ in ACTIVATIONS}
    every = {name for name, value in vars(operations).items() if isinstance(value, Operation)}
    assert known | of_its_own | of_parts == every
