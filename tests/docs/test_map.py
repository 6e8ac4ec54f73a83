"""The guide's map of the files is what its script makes of them."""

import importlib.util
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
SCRIPT = ROOT / "docs" / "make_map.py"
spec = importlib.util.spec_from_file_location("make_map", SCRIPT)
assert spec is not None and spec.loader is not None
make_map = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make_map)


def test_the_page_is_what_the_script_makes() -> None:
    written = make_map.PAGE.read_text(encoding="utf-8")
    assert written == make_map.page(), "docs/guide/map.md is not what the files say: make map"


def test_rooms_come_in_the_order_of_imports(tmp_path: Path) -> None:
    for name, source in {
        "__init__.py": '"""A package."""\n',
        "zebra/__init__.py": "",
        "zebra/stripe.py": '"""A stripe.\n\nMore of it.\n"""\n',
        "zebra/fast.c": "/* A gallop,\n   in C. */\nint main(void) { return 0; }\n",
        "ape/arm.py": '"""An arm."""\n',
        "ape/hand/finger.py": '"""A finger."""\n',
        "other.py": '"""Another."""\n',
        "errors.py": '"""Errors."""\n',
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(source, encoding="utf-8")
    told = [line for line in make_map.lines(tmp_path, ["errors", "zebra", "ape"]) if line]
    top = tmp_path.name
    assert told == [
        f"## {top}",
        "- `errors.py`: Errors.",
        "- `__init__.py`: A package.",
        "- `other.py`: Another.",
        f"## {top}/zebra",
        "- `fast.c`: A gallop, in C.",
        "- `stripe.py`: A stripe.",
        f"## {top}/ape",
        "- `arm.py`: An arm.",
        f"## {top}/ape/hand",
        "- `finger.py`: A finger.",
    ]


def test_the_order_is_read_from_the_list_of_rooms(tmp_path: Path) -> None:
    file = tmp_path / "test_imports.py"
    file.write_text('import ast\n\nROOMS: list[str] = ["kernels", "models", "models.cola"]\n', encoding="utf-8")
    assert make_map.rooms(file) == ["kernels", "models", "models.cola"]
    file.write_text("ALLOWED = {}\n", encoding="utf-8")
    assert make_map.rooms(file) == []
