"""The commands that help texts, README, guide and recipes' headers show, as words of a command line."""

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

from command_line import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES += sorted((ROOT / "docs" / "guide").glob("*.md"))
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
CODE = [file for room in ("opencola", "examples", "experiments", "benchmarks") for file in (ROOT / room).rglob("*.py")]
# A command, maybe with variables and torchrun before it.
BEGINNING = re.compile(
    r"(?:[A-Z_]+=\S+ )*(?:torchrun (?:-\S+ (?:\d+ )?)*-m opencola|(?:\.venv/bin/)?python3? -m [a-z_.]+"
    r"|(?:\.venv/bin/)?python3? (?:examples|docs)/\S+|(?:\.venv/bin/)?opencola|make)(?= |$)"
)


def commands() -> Iterator[tuple[str, list[str]]]:
    """Every command that stands in a line of its own or in a recipe's header: where, and its words."""
    for file in PAGES:
        yield from found_in(file, lines_of_code(file.read_text(encoding="utf-8")))
    for file in CODE:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        texts = [ast.get_docstring(tree) or ""]
        texts += map(text_of, tree.body)
        for text in texts:
            yield from found_in(file, joined(text))
    for file in RECIPES:
        yield from found_in(file, [re.sub(r"^\S+:  +", "", line) for line in header(file)])


def spans() -> Iterator[tuple[str, list[str]]]:
    """Every command between backquotes in a line of text, maybe with parts in brackets or left out."""
    for file in PAGES:
        for span in re.findall(r"(?<!`)`([^`\n]+)`", file.read_text(encoding="utf-8")):
            yield from found_in(file, [span])


def text_of(node: ast.AST) -> str:
    """The text that a name is given here, such as a command's usage; "" where it is none."""
    match node:
        case ast.Assign(value=ast.Constant(value=str(text))):
            return text
    return ""


def header(file: Path) -> list[str]:
    """The comment on top of a recipe."""
    lines = file.read_text(encoding="utf-8").split("\n")
    top = lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))]
    return joined("\n".join(line.removeprefix("#").strip() for line in top))


def joined(text: str) -> list[str]:
    """Lines, those that end in a backslash with what follows."""
    return re.sub(r" *\\\n\s*", " ", text).split("\n")


def lines_of_code(text: str) -> list[str]:
    """The lines of a page's blocks of code, fenced or indented."""
    fenced = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return joined("\n".join(fenced)) + [line for line in joined(text) if line.startswith("    ")]


def found_in(file: Path, lines: list[str]) -> Iterator[tuple[str, list[str]]]:
    """The commands that lines begin with, alone or after `&&`; what is behind two blanks is said about them."""
    for line in lines:
        for part in line.strip().split(" && "):
            if BEGINNING.match(part):
                command = re.split(r"  +", part)[0]
                yield file.relative_to(ROOT).as_posix(), shlex.split(command, comments=True)


def after(words: list[str]) -> tuple[str, list[str]]:
    """The program, `opencola`, `make` or a module or file that Python runs, and what it is given."""
    words = [word.removeprefix(".venv/bin/") for word in words]
    for place, word in enumerate(words):
        if word in ("opencola", "make"):
            return word, words[place + 1 :]
        if word == "-m":
            return words[place + 1], words[place + 2 :]
        if word.endswith(".py"):
            return word, words[place + 1 :]
    raise AssertionError(f"no program in {words}")
