"""An operation is its function in torch, unless a kernel takes its tensors; layers know of kernels by that alone."""

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import opencola
from opencola.kernels import library
from opencola.kernels.choice import Operation, implemented_by, invariant, is_invariant, on_cuda, packs
from opencola.layers import cache, few_rows, operations, packed

ROOT = Path(opencola.__file__).parent
IN_C = {f"opencola.kernels.{path.stem}" for path in (ROOT / "kernels").glob("*.py")} - {
    "opencola.kernels.choice",
    "opencola.kernels.library",
}
SHOWS_THEM = (ROOT / "commands" / "kernels.py",)
OPERATIONS = {
    name: operation
    for module in (operations, cache, packed, few_rows)
    for name, operation in vars(module).items()
    if isinstance(operation, Operation)
}


def is_seam(node: ast.expr) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "implemented_by"


def past_the_seam(source: str) -> list[str]:
    """Names of kernels that a file uses outside of `implemented_by(...)` and of what is named in one."""
    tree = ast.parse(source)
    names = {"usable"}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if node.module in IN_C or f"{node.module}.{alias.name}" in IN_C:
                    names.add(alias.asname or alias.name)
        elif isinstance(node, ast.Import):
            names |= {alias.asname or "opencola" for alias in node.names if alias.name in IN_C}
    seams = [node for node in ast.walk(tree) if isinstance(node, ast.expr) and is_seam(node)]
    inside = {node for seam in seams for node in ast.walk(seam)}
    kernels = {node.id for node in inside if isinstance(node, ast.Name)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name in kernels:
            inside |= {*ast.walk(node)}
    used = [node for node in ast.walk(tree) if node not in inside]
    found = [node.id for node in used if isinstance(node, ast.Name) and node.id in names]
    return found + [node.attr for node in used if isinstance(node, ast.Attribute) and node.attr == "usable"]


@pytest.mark.parametrize(
    "path",
    [path for path in ROOT.rglob("*.py") if path.parent != ROOT / "kernels" and path not in SHOWS_THEM],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_kernels_are_named_at_the_seam_only(path: Path) -> None:
    assert past_the_seam(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("from opencola.kernels import elementwise\ny = elementwise.gelu(x)", ["elementwise"]),
        ("from opencola.kernels.rows import pack as p\ndef f(x):\n    return p(x)", ["p"]),
        ("from opencola.kernels.library import usable\nif usable(x):\n    y = 1", ["usable"]),
        ("from opencola.kernels import library\ny = library.usable(x)", ["usable"]),
        ("import opencola.kernels.rows\nopencola.kernels.rows.pack(x)", ["opencola"]),
        ("from opencola.kernels import rows\n@implemented_by(rows.pack)\ndef f(x):\n    return x", []),
        (
            "from opencola.kernels import rows\ndef k(x):\n    return rows.pack(x)\n@implemented_by(k)\ndef f(x): ...",
            [],
        ),
    ],
)
def test_a_way_past_the_seam_is_caught(source: str, names: list[str]) -> None:
    assert past_the_seam(source) == names


def test_all_operations_are_known() -> None:
    blocks = {"modulated_norm", "gated_norm", "gated", "linear_gelu", "split_heads"}
    blocks |= {"plain_norm", "residual_rms_norm", "linear_swiglu", "rotated_heads"}
    products = {"linear", "linear_cross_entropy", "product_of_stacks"}
    attentions = {"prefix_attention", "packed_attention", "block_causal_attention"}
    assert {*OPERATIONS} == blocks | products | attentions | {"for_few_rows", "silu", "exact_gelu"}


@pytest.mark.parametrize("name", OPERATIONS)
def test_kernels_have_the_arguments_of_the_function(name: str) -> None:
    operation = OPERATIONS[name]
    expected = list(inspect.signature(operation.reference).parameters)
    while isinstance(operation, Operation):
        arguments = inspect.signature(operation.kernel).parameters
        assert len(arguments) >= len(expected)
        assert all(x.default is not x.empty for x in [*arguments.values()][len(expected) :])
        if operation.kernel.__name__ == "<lambda>":
            assert [*arguments] == expected
        operation = operation.function


@pytest.mark.usefixtures("need_kernels")
def test_the_kernel_runs_where_it_takes_all_tensors_and_is_worthwhile() -> None:
    @implemented_by(lambda x, several=(), n=1: "kernel", worthwhile=lambda x, several=(), n=1: n > 0)
    def operation(x: Tensor, several: tuple[Tensor | None, ...] = (), n: int = 1) -> str:
        """Says which."""
        return "torch"

    x = torch.ones(2)
    assert operation(x) == operation(x, (x, None)) == operation(x=x, n=2) == "kernel"
    assert operation(x, (torch.ones(2).long(), torch.ones(2) + 0j)) == "kernel"
    assert operation.reference(x) == operation.reference(x, n=2) == "torch"
    for no in (x.double(), x.bfloat16(), x.int(), x.bool()):
        assert operation(no) == operation(x, (x, no)) == operation(x, several=(no,)) == "torch"
    assert operation(x, n=0) == "torch"
    with torch.autocast("cpu"):
        assert operation(x) == "torch"
    assert operation.__name__ == "operation" and operation.__doc__ == "Says which."


def test_the_upper_of_several_kernels_is_asked_first() -> None:
    asked: list[int] = []

    @implemented_by(lambda x: "upper", takes=lambda x: asked.append(1) or len(x) == 1)
    @implemented_by(lambda x: "lower", takes=lambda x: asked.append(2) or len(x) < 3)
    def operation(x: Tensor) -> str:
        return "torch"

    assert [operation(torch.ones(n)) for n in (1, 2, 3)] == ["upper", "lower", "torch"]
    assert asked == [1, 1, 2, 1, 2] and operation.reference(torch.ones(1)) == "torch"
    assert not on_cuda(torch.ones(1))


def test_torch_compile_takes_the_function_in_torch_without_a_break() -> None:
    h, shift, index = torch.randn(1, 3, 5), torch.randn(1, 5), torch.zeros(1, 3).long()
    compiled = torch.compile(operations.modulated_norm, fullgraph=True, backend="eager")
    expected = operations.modulated_norm.reference(h, shift, shift, index, 1e-5)
    assert torch.equal(compiled(h, shift, shift, index, 1e-5), expected)


@pytest.mark.usefixtures("need_kernels")
def test_only_an_invariant_function_that_runs_has_packs() -> None:
    @invariant
    def inner() -> object:
        return packs()

    @invariant
    def outer() -> tuple[object, object]:
        return packs(), inner()

    @invariant
    def several(fail: bool = False) -> Iterator[object]:
        yield packs()
        yield inner()
        if fail:
            raise KeyError("gone")

    mine, inner_most = outer()
    assert mine == {} and inner_most is mine and inner() is not mine and packs() is None
    first, second = several(), several(fail=True)
    found = [next(first), next(second), next(first), next(second)]
    assert found[0] is found[2] and found[1] is found[3] and found[0] is not found[1] and packs() is None
    assert next(first, "over") == "over"
    with pytest.raises(KeyError, match="gone"):
        next(second)
    assert packs() is None and (inner.__name__, several.__name__) == ("inner", "several")
    assert is_invariant(torch.device("cpu")) and not is_invariant(torch.device("cuda"))
    with library.switched_off():
        assert not is_invariant(torch.device("cpu")) and inner() is None and next(several()) is None
