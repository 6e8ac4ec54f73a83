"""Every file in examples/ runs as its first lines say, from anywhere, and shows what it promises."""

import ast
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from forked import done

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
# Arguments that make it short, and what the output has.
SCRIPTS: dict[str, tuple[list[str], list[str]]] = {
    "generate.py": ([], ["Once a little girl named Mia", "One sunny day,|"]),
    "latents.py": ([], ["logSNR", "noise 0.0: 100% of the tokens"]),
    "score.py": ([], ["estimate by IWAE", "bits/byte"]),
    "train.py": (["words.txt", "3"], ["[1/2] vae", "[2/2] prior", "runs/example"]),
}


def python(*argv: str, cwd: Path) -> str:
    run = done([sys.executable, *argv], cwd)
    assert run.returncode == 0, run.stderr
    return run.stdout


def cells(kind: str) -> list[str]:
    notebook: dict[str, Any] = json.loads((EXAMPLES / "notebook.ipynb").read_text(encoding="utf-8"))
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == kind]


def test_all_are_tested() -> None:
    assert {file.name for file in EXAMPLES.iterdir() if file.is_file()} == {*SCRIPTS, "notebook.ipynb"}


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPLBACKEND", "Agg")
    (tmp_path / "words.txt").write_text("\n".join(f"The fox number {i} ran to the hill." for i in range(60)))
    arguments, expected = SCRIPTS[name]
    output = python(str(EXAMPLES / name), *arguments, cwd=tmp_path)
    for text in expected:
        assert text in output


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_are_short_and_say_what_they_cost(name: str) -> None:
    text = (EXAMPLES / name).read_text(encoding="utf-8")
    about = ast.get_docstring(ast.parse(text)) or ""
    assert len(text.splitlines()) < 40 and "one core" in about.split("\n")[0] and f"examples/{name}" in about


def test_notebook_runs_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPLBACKEND", "Agg")
    (tmp_path / "cells.py").write_text("\n".join(cells("code")), encoding="utf-8")
    output = python("cells.py", cwd=tmp_path)
    assert "nats (estimate)  Mia met a frog" in output and "logSNR" in output


def test_notebook_keeps_no_outputs_and_says_what_it_costs() -> None:
    notebook = json.loads((EXAMPLES / "notebook.ipynb").read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        assert not cell.get("outputs") and cell.get("execution_count") is None
    assert "half a minute of one core" in cells("markdown")[0]
