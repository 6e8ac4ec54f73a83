"""The house rules that a reader relies on: imports point up the list of rooms, and files stay short.

Imports are read from the source with ``ast``, so those inside functions, under ``TYPE_CHECKING`` and through
``importlib.import_module("...")`` count too.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "opencola"
FILES = sorted(PACKAGE.rglob("*.py"))
MAX_LINES = 300

# Room -> what of ours it may import beside itself; a name allows everything below it. In the order data flows.
ALLOWED: dict[str, set[str]] = {
    "__init__": set(),
    "kernels": set(),
    "layers": {"kernels"},
    "text": set(),
    "vae": {"layers", "text"},
    "flow": {"layers"},
    "models": {"layers", "text", "vae", "flow"},
    "train": {"layers", "text", "models.language_model"},
    "evaluation": {"text", "models.language_model"},
    "interop": {"layers", "text", "vae", "flow", "models"},
}
ALLOWED["serve"] = {*ALLOWED, "interop"} - {"train", "evaluation"}
ALLOWED["flags"] = set()
ALLOWED["recipe"] = {*ALLOWED} - {"serve"}
ALLOWED["export"] = {"flags", "text", "vae", "flow", "interop"}
ALLOWED["checks"] = {"text", "models", "recipe"}
ALLOWED["stage"] = {*ALLOWED} - {"serve", "evaluation"}
ALLOWED["run"] = {*ALLOWED} - {"serve", "evaluation"}
ALLOWED["dry_run"] = {*ALLOWED} - {"serve", "evaluation"}
ALLOWED["console"] = {*ALLOWED} - {"serve", "evaluation"}
ALLOWED["tokenize"] = {"flags", "text"}
ALLOWED["latents"] = {"flags", "console", "layers", "text", "vae", "models", "evaluation", "interop"}
ALLOWED["inspect_text"] = {"flags", "console", "text", "vae", "flow", "models", "evaluation"}
ALLOWED["chat"] = {"flags", "console", "text", "models"}
ALLOWED["score"] = {"flags", "console", "text", "models", "interop"}
ALLOWED["report"] = {"flags", "evaluation"}
ALLOWED["quality"] = {"console", "score", "text", "models", "evaluation", "interop"}
ALLOWED["harness"] = {"interop"}
ALLOWED["conditions"] = {"text", "models", "evaluation"}
ALLOWED["diagnose"] = {"console", "conditions", "text", "models", "evaluation"}
ALLOWED["evaluate"] = {"console", "text", "models", "evaluation", "interop", "export"}
ALLOWED["demo"] = {"text", "models", "evaluation", "interop"}
ALLOWED["commands"] = {*ALLOWED}
ALLOWED["cli"] = {*ALLOWED}
ALLOWED["__main__"] = {"cli"}


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
    room = [*module.split("."), "__init__"][1]
    if room not in ALLOWED:
        return [f"{module}: '{room}' is not in the list of rooms; give it a place in ALLOWED"]
    found = []
    for line, name in imported(source, module, is_package):
        top, _, inner = name.partition(".")
        if top != "opencola":
            if room == "layers" and top != "torch" and top not in sys.stdlib_module_names:
                found.append(f"{module}:{line}: layers imports '{name}', but it may use torch only")
        elif inner == "__version__":
            continue
        elif not any(f"{inner}.".startswith(f"{allowed}.") for allowed in {room, *ALLOWED[room]}):
            found.append(f"{module}:{line}: '{room}' may not import '{name}'")
    return found


def module_name(path: Path) -> str:
    parts = ("opencola", *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_point_up(path: Path) -> None:
    assert violations(path.read_text(encoding="utf-8"), module_name(path), path.name == "__init__.py") == []


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_files_are_short(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_LINES, f"{path} has {lines} lines; the limit is {MAX_LINES}"


def test_every_room_is_seen() -> None:
    """An empty list of files would let the tests above pass without looking at anything."""
    rooms = {module_name(path).split(".")[1] for path in FILES if path.parent != PACKAGE}
    assert rooms >= {"layers", "text", "vae", "flow", "models", "train", "evaluation", "interop"}


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("opencola.layers.attention", "import opencola.text.corpus"),
        ("opencola.layers.attention", "import numpy as np"),
        ("opencola.text.corpus", "from opencola.layers import masks"),
        ("opencola.text.corpus", "from ..vae.text_vae import TextVAE"),
        ("opencola.vae.text_vae", "def f():\n    from opencola.flow.dit import BlockCausalDiT"),
        ("opencola.flow.dit", "from opencola import text"),
        ("opencola.flow.dit", "import opencola"),
        ("opencola.models.cola", "if TYPE_CHECKING:\n    from opencola.train.loop import train"),
        ("opencola.train.loop", "from opencola.models.cola import Cola"),
        ("opencola.train.loop", "from opencola.models import build"),
        ("opencola.train.loop", "from opencola.models.language_model_cola import Cola"),
        ("opencola.evaluation.tasks", "from opencola.train import checkpoint"),
        ("opencola.interop.official", "import importlib\nimportlib.import_module('opencola.cli')"),
        ("opencola.recipe", "from .cli import main"),
        ("opencola.helpers", "import torch"),
        ("opencola", "from .models import cola"),
    ],
)
def test_violations_are_caught(module: str, source: str) -> None:
    assert len(violations(source, module, is_package=module == "opencola")) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("opencola.layers.attention", "import math\nimport torch.nn.functional as F\nfrom .masks import causal"),
        ("opencola.text.corpus", "import torch\nimport numpy\nfrom opencola.text.tokenizer import Tokenizer"),
        ("opencola.vae.text_vae", "from opencola.layers import transformer\nfrom ..text.corpus import Batch"),
        ("opencola.train.loop", "from opencola.text.corpus import Batch\nfrom ..models.language_model import Loss"),
        ("opencola.train.loop", "from opencola.models import language_model"),
        ("opencola.cli", "from opencola import __version__\nfrom opencola.recipe import Recipe"),
    ],
)
def test_allowed_imports_pass(module: str, source: str) -> None:
    assert violations(source, module) == []
