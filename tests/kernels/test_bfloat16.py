"""Products in bfloat16 against float64 products of the rounded numbers, by tiles and by vectors."""

import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from opencola.kernels import bfloat16

if not bfloat16.available():
    pytest.skip("this processor has no bfloat16 products, or there are no kernels", allow_module_level=True)

Product = Callable[[Tensor, Tensor], Tensor]


@pytest.fixture(params=[True, False], ids=["tiles", "vectors"])
def product(request: pytest.FixtureRequest) -> Product:
    if request.param and bfloat16.ways() < 2:
        pytest.skip("this processor has no tiles, or this system does not let processes use them")
    return lambda a, b: bfloat16.product(a, b, tiles=request.param)


def check(out: Tensor, a: Tensor, b: Tensor) -> None:
    """Against the exact product: at most half a unit in the last place for each of the terms, and less for many."""
    a, b = (x.bfloat16().double() for x in (a, b))
    bound = a.abs() @ b.abs().mT * min(a.shape[-1], 64) * 2.0**-24
    assert out.is_contiguous() and out.dtype == torch.float32 and bool(((out - a @ b.mT).abs() <= bound).all())


def matrix(rows: int, columns: int, transposed: bool) -> Tensor:
    return torch.randn(columns, rows).T if transposed else torch.randn(rows, columns)


@pytest.mark.parametrize("depth", [1, 2, 31, 32, 33, 400, 1100])
@pytest.mark.parametrize("transposed", [(False, False), (False, True), (True, True), (True, False)])
def test_products_of_any_shape(product: Product, transposed: tuple[bool, bool], depth: int) -> None:
    for rows, columns in [(1, 1), (15, 17), (16, 33), (17, 15), (33, 129), (129, 16), (70, 600)]:
        a, b = matrix(rows, depth, transposed[0]), matrix(columns, depth, transposed[1])
        check(product(a, b), a, b)


@pytest.mark.parametrize("transposed", [False, True])
def test_a_right_side_of_several_parts(product: Product, transposed: bool) -> None:
    for columns, depth in [(1040, 1000), (530, 990), (2000, 300)]:
        a, b = matrix(70, depth, transposed), matrix(columns, depth, transposed)
        check(product(a, b), a, b)


@pytest.mark.parametrize("transposed", [False, True])
def test_a_number_is_the_same_among_any_rows_and_by_any_threads(product: Product, transposed: bool) -> None:
    for rows, columns, depth in [(150, 200, 1100), (33, 400, 300), (5, 900, 600)]:
        a, b = matrix(rows, depth, transposed), matrix(columns, depth, transposed)
        out = product(a, b)
        assert all(torch.equal(out[i], product(a[i, None], b)[0]) for i in (0, rows // 2, rows - 1))
        assert torch.equal(out[:, 1:7], product(a, b[1:7]))
        torch.set_num_threads(2)
        try:
            assert torch.equal(out, product(a, b))
        finally:
            torch.set_num_threads(1)


def test_products_without_numbers(product: Product) -> None:
    for rows, columns, depth in [(0, 3, 4), (3, 0, 4), (3, 4, 0), (0, 0, 0)]:
        assert torch.equal(product(torch.ones(rows, depth), torch.ones(columns, depth)), torch.zeros(rows, columns))


def test_stacks_and_views(product: Product) -> None:
    a, b = torch.randn(3, 2, 40, 50), torch.randn(3, 2, 20, 50)
    check(product(a, b), a, b)
    check(product(a.mT, torch.ones(3, 2, 7, 40)), a.mT, torch.ones(3, 2, 7, 40))
    check(product(a[0, :1].expand(4, -1, -1), b[:2].flatten(0, 1)), a[0, :1].expand(4, -1, -1), b[:2].flatten(0, 1))
    a, b = torch.randn(2001)[1:].view(40, 50), torch.randn(90, 80)
    check(product(a, b[3:70, 5:55]), a, b[3:70, 5:55])  # from odd addresses, and part of rows
    check(product(a, b[10:60, 7:].T), a, b[10:60, 7:].T)
    check(product(a[::2, ::2], b[::3, :75:3]), a[::2, ::2], b[::3, :75:3])
    with pytest.raises(ValueError, match="do not fit"):
        product(a, b)


def test_numbers_are_rounded_to_nearest_even_and_what_is_not_finite_stays_so(product: Product) -> None:
    special = [1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, -1 - 2**-8, 3.4e38, torch.inf, -torch.inf, 1e-30, 0.0]
    x, one = torch.tensor(special)[:, None], torch.ones(1, 1)
    for view in (x, x.T.contiguous().T):
        assert torch.equal(product(view, one), view.bfloat16().float())
        assert torch.equal(product(one, view), view.bfloat16().float().T)
    for bits in (0x7F800001, 0x7FFFFFFF, 0x7FC00000):  # whatever of them is rounded away
        nan = torch.tensor([[bits]], dtype=torch.int32).view(torch.float32)
        assert product(nan, one).isnan() and product(one, nan).isnan()
    a, b = torch.randn(40, 70), torch.randn(50, 70)
    a[3, 69], b[5, 2] = torch.nan, torch.inf
    bad = torch.zeros(40, 50, dtype=torch.bool)
    bad[3], bad[:, 5] = True, True
    out = product(a, b)
    assert torch.equal(~out.isfinite(), bad) and bool(out[3].isnan().all())


def test_denormal_numbers_count_as_zeros(product: Product) -> None:
    assert torch.equal(product(torch.tensor([[1e-40]]), torch.tensor([[1e30]])), torch.zeros(1, 1))


@pytest.mark.parametrize("threads", [1, 2])
def test_torchs_own_products_go_on_in_between(product: Product, threads: int) -> None:
    a, b = torch.randn(100, 72), torch.randn(48, 72)
    expected, torchs = product(a, b), a.bfloat16() @ b.bfloat16().T
    torch.set_num_threads(threads)
    try:
        for _ in range(20):
            assert torch.equal(a.bfloat16() @ b.bfloat16().T, torchs)
            assert torch.equal(product(a, b), expected)
    finally:
        torch.set_num_threads(1)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_products_after_a_fork(product: Product) -> None:
    a, b = torch.randn(100, 72), torch.randn(48, 72)
    expected = product(a, b)
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(product(a, b), expected) else 3)
    assert os.waitpid(child, 0)[1] == 0
    assert torch.equal(product(a, b), expected)
