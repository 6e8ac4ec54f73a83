"""Products by every implementation and their gradients, against float64; and how one of them is chosen."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from forked import Started
from torch import Tensor

from opencola.errors import UserError
from opencola.kernels import bfloat16, elementwise, library, matmul
from opencola.kernels.choice import Precision, invariant, products_in
from opencola.kernels.matmul import DIRECTIONS, IMPLEMENTATIONS, candidates
from opencola.layers import operations

ALL = [(precision, name) for precision, ways in IMPLEMENTATIONS.items() for name in ways]


@pytest.fixture
def forget() -> Iterator[None]:
    """Choices are made anew in this test, and after it."""
    matmul.choices.cache_clear()
    matmul.rates.cache_clear()
    yield
    matmul.choices.cache_clear()
    matmul.rates.cache_clear()


def results(x: Tensor, weight: Tensor, dy: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
    """A linear layer's output, and the gradients of x, weight and bias."""
    out = x @ weight.T + (0 if bias is None else bias)
    return out, dy @ weight, dy.flatten(0, 1).T @ x.flatten(0, 1), dy.sum((0, 1))


@pytest.mark.parametrize(("precision", "name"), ALL)
@pytest.mark.parametrize(
    ("rows", "depth", "columns"), [(1, 1, 1), (5, 7, 3), (33, 65, 17), (160, 96, 48), (3, 300, 130)]
)
def test_products_of_any_strides(precision: Precision, name: str, rows: int, depth: int, columns: int) -> None:
    if name not in candidates(precision):
        pytest.skip(f"{name} is not on this machine")
    by = IMPLEMENTATIONS[precision][name]
    a, b, bias = torch.randn(rows, depth), torch.randn(columns, depth), torch.randn(columns)
    exact = a.double() @ b.double().T + bias.double()
    most = 4e-6 * depth**0.5
    if precision == "bfloat16":  # factors and result may be rounded to 8 bits each
        most = 2**-9 * float((2 * a.abs() @ b.abs().T + exact.abs()).max() + 1)
    for left in (a, a.T.contiguous().T, torch.cat((a, a), -1)[:, :depth]):
        for right in (b, b.T.contiguous().T):
            out = by(left, right, bias)
            assert out.dtype == torch.float32 and out.shape == (rows, columns)
            torch.testing.assert_close(out.double(), exact, rtol=0, atol=most)
            torch.testing.assert_close(by(left, right, None).double(), exact - bias.double(), rtol=0, atol=most)


@pytest.mark.usefixtures("forget")
@pytest.mark.parametrize(("precision", "name"), ALL)
@pytest.mark.parametrize("with_bias", [True, False])
def test_a_linear_layer_and_its_gradients(
    precision: Precision, name: str, with_bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(matmul.VARIABLE, name)
    monkeypatch.setattr(matmul, "LEAST", 0)
    monkeypatch.setattr(matmul, "worthwhile", lambda *given: True)
    x, weight, dy = torch.randn(2, 40, 24), torch.randn(56, 24), torch.randn(2, 40, 56)
    bias = torch.randn(56) if with_bias else None
    given = [t.requires_grad_() for t in (x, weight, bias) if t is not None]
    with products_in(precision):
        out = matmul.linear(x, weight, bias)
    gradients = torch.autograd.grad(out, given, dy)  # in the precision of the forward pass
    wide = [t.detach().double() for t in (x, weight, dy)]
    exact = results(*wide, None if bias is None else bias.detach().double())
    sums = results(*(t.abs() for t in wide), torch.zeros(56).double())  # of the terms' sizes
    share = 3 * 2**-9 if precision == "bfloat16" else 1e-6
    for found, right, size in zip((out, *gradients), exact, sums, strict=False):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), right, rtol=0, atol=share * float(size.max()))


def test_only_the_gradients_that_are_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul, "LEAST", 0)
    asked: list[str] = []
    product = matmul.product
    monkeypatch.setattr(matmul, "product", lambda *given: asked.append(given[3]) or product(*given))
    x, weight = torch.randn(3, 4), torch.randn(5, 4)
    for wanted, directions in (((False, True), ["weight"]), ((True, False), ["input"])):
        matmul.linear(x.requires_grad_(wanted[0]), weight.requires_grad_(wanted[1])).sum().backward()
        assert asked == ["forward", *directions]
        asked.clear()


def test_gradients_have_gradients() -> None:
    x, weight, bias = (torch.randn(*shape).requires_grad_() for shape in ((3, 4), (5, 4), (5,)))

    def of_gradient(linear: object) -> tuple[Tensor, ...]:
        out = linear(x, weight, bias).sin()  # type: ignore[operator]
        (dx,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), (x, weight, bias))

    for found, right in zip(of_gradient(matmul.linear), of_gradient(torch.nn.functional.linear), strict=True):
        torch.testing.assert_close(found, right)


@pytest.mark.usefixtures("forget")
def test_the_fastest_is_chosen_and_torch_where_little_is_gained(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(matmul.VARIABLE, raising=False)
    even = dict.fromkeys(candidates("float32"), 100.0)
    measured = {
        f"{precision} {direction} {size}": {name: even[name] for name in candidates(precision)}
        for precision in IMPLEMENTATIONS
        for direction in DIRECTIONS
        for size in matmul.SIZES
    }
    measured["float32 forward large"]["onednn"] = 120.0
    measured["float32 input large"]["onednn"] = 109.0
    measured["bfloat16 input small"]["torch"] = 111.0
    measured["bfloat16 forward large"]["torch"] = 133.0  # over 120, too
    measured["bfloat16 weight large"]["onednn"] = 109.0
    monkeypatch.setattr(matmul, "measure", lambda threads: measured)
    chosen = matmul.choices(1)
    onednn = IMPLEMENTATIONS["float32"]["onednn"]
    assert {key for key, by in chosen.items() if by is onednn} == {("float32", "forward", "large")}
    cast = IMPLEMENTATIONS["bfloat16"]["torch"]
    in_bfloat16 = {("bfloat16", "input", "small"): cast, ("bfloat16", "forward", "large"): cast}
    assert {key: by for key, by in chosen.items() if by in IMPLEMENTATIONS["bfloat16"].values()} == in_bfloat16
    assert chosen["bfloat16", "forward", "small"] is IMPLEMENTATIONS["float32"]["torch"]
    x, small = torch.randn(4096, 512), torch.randn(512, 512)
    assert matmul.worthwhile(x, small) and not matmul.worthwhile(x[:256], small[:128])
    monkeypatch.setattr(matmul, "measure", lambda threads: pytest.fail("measured twice"))
    matmul.rates.cache_clear()
    assert matmul.rates(1) == measured
    for damaged in ("", "[]", "{}", json.dumps(measured | {"float32 input large": {"torch": -1.0}})):
        (file,) = tmp_path.glob("opencola/products-*.json")
        file.write_text(damaged)
        monkeypatch.setattr(matmul, "measure", lambda threads: measured)
        matmul.rates.cache_clear()
        assert matmul.rates(1) == measured and json.loads(file.read_text()) == measured


@pytest.mark.usefixtures("forget")
def test_the_environment_fixes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul, "measure", lambda threads: pytest.fail("measured"))
    monkeypatch.setenv(matmul.VARIABLE, "onednn")
    assert {*matmul.choices(1).values()} == {ways["onednn"] for ways in IMPLEMENTATIONS.values()}
    matmul.choices.cache_clear()
    monkeypatch.setenv(matmul.VARIABLE, "cublas")
    with pytest.raises(UserError, match="OPENCOLA_PRODUCTS is 'cublas', not one of torch, onednn, ours"):
        matmul.choices(1)


@pytest.mark.usefixtures("forget")
def test_rates_are_measured_where_no_folder_can_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "folders", lambda: iter([Path("/proc/none")]))
    monkeypatch.setattr(matmul, "SIZES", {"small": (8, 8, 8), "large": (16, 8, 8)})
    for of in matmul.rates(1).values():
        assert of["torch"] > 0 and {*of} <= {"torch", "onednn", "ours"}


def test_processes_that_start_together_choose_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import json; from opencola.kernels import matmul; print(json.dumps(matmul.rates(1)))"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("OPENCOLA_KERNELS", "0")
    both = [Started([sys.executable, "-c", code]) for _ in range(2)]
    first, second = (process.communicate(300)[0] for process in both)
    assert first == second and json.loads(first).keys() == {
        f"{precision} {direction} {size}"
        for precision in IMPLEMENTATIONS
        for direction in DIRECTIONS
        for size in matmul.SIZES
    }


def test_models_multiply_by_what_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the precision of the context, and by torch inside of `switched_off`, where operations are counted."""
    precisions: list[Precision] = []
    product = matmul.product
    monkeypatch.setattr(matmul, "product", lambda *given: precisions.append(given[4]) or product(*given))
    monkeypatch.setattr(operations.linear, "worthwhile", lambda *given: True)
    layer, x = operations.Linear(4, 6), torch.randn(2, 4)
    layer(x)
    layer(x, "gelu")
    with products_in("bfloat16"):
        layer.product(x).sum().backward()
    with library.switched_off():
        layer(x)
    assert precisions == ["float32", "float32", "bfloat16", "bfloat16"]


@pytest.mark.usefixtures("forget")
@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_products_of_stacks(kind: Precision, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(matmul.VARIABLE, "onednn")
    monkeypatch.setattr(matmul, "LEAST", 0)
    a, b = torch.randn(3, 10, 40), torch.randn(3, 40, 7).mT
    with products_in(kind):
        assert matmul.stacks_worthwhile(a, b) == (kind == "float32" or bfloat16.available())
        out = operations.product_of_stacks(a, b)
    share = 2**-7 if kind == "bfloat16" else 1e-6
    sizes = a.double().abs() @ b.double().abs().mT
    torch.testing.assert_close(out.double(), a.double() @ b.double().mT, rtol=0, atol=share * float(sizes.max()))


@pytest.mark.usefixtures("need_kernels")
def test_large_activations_are_as_exact_as_small_ones() -> None:
    x = torch.cat((torch.linspace(-40, 40, 999), torch.tensor([-1e4, 1e4, torch.inf, -88.0])))
    right = torch.nn.functional.gelu(x.double(), approximate="tanh")
    torch.testing.assert_close(elementwise.gelu(x).double(), right, rtol=1e-6, atol=1e-9)


@pytest.mark.usefixtures("need_kernels")
def test_in_invariant_functions_sums_have_one_order_and_parameters_are_packed_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    packed: list[Tensor] = []
    pack = matmul.rows.pack
    monkeypatch.setattr(matmul.rows, "pack", lambda weight: packed.append(weight) or pack(weight))
    weight, other = torch.nn.Parameter(torch.randn(40, 70)), torch.randn(40, 70)
    x, dy = torch.randn(2, 30, 70, requires_grad=True), torch.randn(2, 30, 40)

    @invariant
    def run(rows: slice) -> tuple[Tensor, ...]:
        out = operations.linear(x[:, rows], weight)
        with torch.no_grad():
            assert torch.equal(operations.linear(x[:, rows], weight), out)
        (dx,) = torch.autograd.grad(out, x, dy[:, rows])
        return out.detach(), dx[:, rows], operations.linear(x[:, rows], other).detach()

    whole = run(slice(0, 30))
    assert len(packed) == 2 and packed[0] is weight and packed[1]._base is weight
    for value, exact in zip(whole, (x @ weight.T, dy @ weight, x @ other.T), strict=True):
        torch.testing.assert_close(value, exact.detach(), rtol=0, atol=3e-5)
    monkeypatch.setattr(matmul, "PACKED_BYTES", weight.nbytes - 1)
    for few in (1, 2, 5, 9, 17):
        for value, right in zip(run(slice(30 - few, 30)), whole, strict=True):
            assert torch.equal(value, right[:, 30 - few :])
    assert len(packed) == 2
