"""Write docs/guide/map.md: every file of the package with the first line of its docstring, in the order of rooms.

    python docs/make_map.py

The order is the list ROOMS in tests/test_imports.py; what is not on it comes behind, by name.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "opencola"
PAGE = ROOT / "docs" / "guide" / "map.md"
HEAD = """# Map

Every file of the package, room by room. Imports point up this list only (`tests/test_imports.py`), so that it can be
read from the top. `make map` makes this page of the files' docstrings.
"""


def rooms(tests: Path = ROOT / "tests" / "test_imports.py") -> list[str]:
    """The rooms' dotted names in the order of imports; none where the file has no list ROOMS."""
    for node in ast.parse(tests.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any(isinstance(target, ast.Name) and target.id == "ROOMS" for target in targets):
                return [*ast.literal_eval(node.value)]
    return []


def first_line(path: Path) -> str:
    """Of a module's docstring or, in C, of the comment on top; "" where there is none."""
    source = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        about = ast.get_docstring(ast.parse(source)) or ""
    else:
        found = re.match(r"/\*\s*(.*?)(\n\s*\n|\*/)", source, re.DOTALL)
        about = " ".join(found[1].split()) if found else ""
    return about.split("\n")[0].strip()


def place(name: str, order: list[str]) -> tuple[int, str]:
    """What a module or folder of this dotted name is sorted by: the room that it lies in, then its name."""
    parts = name.split(".")
    inside = [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
    return next((order.index(room) for room in inside if room in order), len(order)), name


def folders(package: Path, order: list[str]) -> list[tuple[str, list[Path]]]:
    """(dotted name, files) of every folder with files to tell of, "" for the package itself, in the order of rooms."""
    found: dict[str, list[Path]] = {}
    for path in package.rglob("*"):
        if path.suffix in (".py", ".c", ".h") and "__pycache__" not in path.parts and first_line(path):
            found.setdefault(".".join(path.parent.relative_to(package).parts), []).append(path)
    for name, files in found.items():
        files.sort(key=lambda path: (*place(f"{name}.{path.stem}".lstrip("."), order), path.suffix))
    return sorted(found.items(), key=lambda item: place(item[0], order) if item[0] else (-1, ""))


def lines(package: Path, order: list[str]) -> Iterator[str]:
    """The page's, below its head."""
    for name, files in folders(package, order):
        yield from ("", f"## {'/'.join([package.name, *filter(None, name.split('.'))])}", "")
        yield from (f"- `{path.name}`: {first_line(path)}" for path in files)


def page(package: Path = PACKAGE, order: list[str] | None = None) -> str:
    """The whole page."""
    return HEAD + "\n".join([*lines(package, rooms() if order is None else order), ""])


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"{PAGE.relative_to(ROOT)}: written")
