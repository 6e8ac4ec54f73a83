"""The house rules that a reader relies on: imports point up the list of rooms, no circle, and files stay short.

Imports are read from the source with ``ast``, so those inside functions, under ``TYPE_CHECKING`` and through
``importlib.import_module("...")`` count too.
"""

import ast
import graphlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "opencola"
FILES = sorted(PACKAGE.rglob("*.py"))
MAX_LINES = 300

# A room imports itself and what stands before it, in the order data flows.
ROOMS = [
    "version",
    "errors",
    "ranges",
    "paths",
    "storage",
    "kernels",
    "layers",
    "text",
    "worlds",
    "data",
    "vae",
    "flow",
    "models",
    "checkpoints",
    "train",
    "evaluation",
    "run",
    "serve",
    "commands",
    "__init__",
    "__main__",
]
FAMILIES = ["models.cola", "models.ar", "models.llada", "models.plaid"]
KNOW_FAMILIES = ["models.build", "checkpoints"]
KNOW_COLA = ["evaluation.latents", "evaluation.diagnosis", "__init__"]


def within(name: str, place: str) -> bool:
    """Whether a dotted name is a place or below it."""
    return f"{name}.".startswith(f"{place}.")


def allowed(module: str, name: str) -> bool:
    """Whether ``module`` may import ``name``, both without the package's name: the list of rooms and its riders."""
    room, other = module.partition(".")[0], name.partition(".")[0]
    if other not in ROOMS or ROOMS.index(other) > ROOMS.index(room):
        return False
    if within(name, "commands"):
        return room == "__main__" or within(name, "commands.terminal")
    if room == "train" and other == "models":
        return within(name, "models.language_model")
    for family in FAMILIES:
        if within(name, family):
            know = [family, *KNOW_FAMILIES, *(KNOW_COLA if family == "models.cola" else [])]
            return any(within(module, place) for place in know)
    return True


def imported(source: str, module: str, is_package: bool = False) -> Iterator[tuple[int, str]]:
    """Yield (line, dotted name) for each import in ``source``, relative ones made absolute.

    ``from a import b`` gives ``a.b``: the source alone does not tell whether ``b`` is a module or a name in one.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")
                parents = parts[: len(parts) - node.level + is_package]
                base = ".".join([*parents, base] if base else parents)
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            function = node.func
            name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
            if name in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield node.lineno, node.args[0].value


def violations(source: str, module: str, is_package: bool = False) -> list[str]:
    """Say which imports of ``source``, the text of ``module`` (such as ``opencola.vae.text_vae``), break the rules."""
    inside = module.partition(".")[2] or "__init__"
    room = inside.partition(".")[0]
    if room not in ROOMS:
        return [f"{module}: '{room}' is not in the list of rooms; give it a place in ROOMS"]
    broken = []
    for line, name in imported(source, module, is_package):
        top, _, inner = name.partition(".")
        if top != "opencola":
            if room == "layers" and top != "torch" and top not in sys.stdlib_module_names:
                broken.append(f"{module}:{line}: layers imports '{name}', but it may use torch only")
        elif not allowed(inside, inner or "__init__"):
            broken.append(f"{module}:{line}: '{inside}' may not import '{name}'")
    return broken


def module_name(path: Path) -> str:
    parts = ("opencola", *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def circle(sources: dict[str, str]) -> list[str]:
    """Modules that import each other, the first again at the end; none where there is no circle."""

    def module_of(name: str) -> str | None:
        return next((known for known in (name, name.rpartition(".")[0]) if known in sources), None)

    graph = {
        module: {other for _, name in imported(source, module) if (other := module_of(name)) and other != module}
        for module, source in sources.items()
    }
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_point_up(path: Path) -> None:
    assert violations(path.read_text(encoding="utf-8"), module_name(path), path.name == "__init__.py") == []


def test_no_files_import_each_other() -> None:
    assert circle({module_name(path): path.read_text(encoding="utf-8") for path in FILES}) == []


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_files_are_short(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_LINES, f"{path} has {lines} lines; the limit is {MAX_LINES}"


def test_every_room_is_seen() -> None:
    """An empty list of files would let the tests above pass without looking at anything."""
    rooms = {module_name(path).split(".")[1] for path in FILES if path.parent != PACKAGE}
    assert rooms == {*ROOMS} - {"version", "errors", "ranges", "paths", "storage", "__init__", "__main__"}


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("opencola.layers.attention", "import opencola.text.tokenizer"),
        ("opencola.layers.attention", "import numpy as np"),
        ("opencola.data.corpus", "from opencola.models import sampling"),
        ("opencola.text.files", "from ..vae.text_vae import TextVAE"),
        ("opencola.vae.text_vae", "def f():\n    from opencola.flow.dit import BlockCausalDiT"),
        ("opencola.flow.dit", "from opencola import models"),
        ("opencola.flow.dit", "import opencola"),
        ("opencola.models.cola.model", "if TYPE_CHECKING:\n    from opencola.train.loop import train"),
        ("opencola.models.ar.model", "from opencola.models.llada.network import LLaDANetwork"),
        ("opencola.models.samples", "from opencola.models.cola.model import Cola"),
        ("opencola.train.loop", "from opencola.models.cola.model import Cola"),
        ("opencola.train.loop", "from opencola.models import build"),
        ("opencola.train.loop", "from opencola.models.language_model_cola import Cola"),
        ("opencola.evaluation.benchmarks.tasks", "from opencola.models.cola import score"),
        ("opencola.evaluation.latents.space", "from opencola.models.ar.model import AR"),
        ("opencola.run.stage", "from opencola.models.plaid.model import Plaid"),
        ("opencola.checkpoints.official", "import importlib\nimportlib.import_module('opencola.commands.main')"),
        ("opencola.run.recipe", "from ..commands.main import main"),
        ("opencola.commands.quality", "from opencola.commands.score import command"),
        ("opencola.helpers", "import torch"),
    ],
)
def test_violations_are_caught(module: str, source: str) -> None:
    assert len(violations(source, module)) == 1


def test_circles_are_caught() -> None:
    sources = {"opencola.a": "from opencola.b import x", "opencola.b": "if TYPE_CHECKING:\n    from opencola import a"}
    assert {*circle(sources)} == {"opencola.a", "opencola.b"}
    assert circle({"opencola.a": "from opencola.b import x", "opencola.b": "import opencola.c"}) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("opencola.layers.attention", "import math\nimport torch.nn.functional as F\nfrom .masks import causal"),
        ("opencola.data.corpus", "import torch\nimport numpy\nfrom opencola.text.tokenizer import Tokenizer"),
        ("opencola.vae.text_vae", "from opencola.layers import transformer\nfrom ..data.batch import Batch"),
        ("opencola.train.loop", "from opencola.data.batch import Batch\nfrom ..models.language_model import Loss"),
        ("opencola.train.loop", "from opencola.models import language_model"),
        ("opencola.checkpoints.own", "from opencola.models.llada.model import LLaDA"),
        ("opencola.evaluation.latents.tokens", "from opencola.models.cola import inspect"),
        ("opencola.commands.score", "from opencola.commands.terminal import ModelFlags"),
        ("opencola.commands.main", "from opencola.version import __version__\nfrom opencola.run.recipe import Recipe"),
    ],
)
def test_allowed_imports_pass(module: str, source: str) -> None:
    assert violations(source, module) == []
