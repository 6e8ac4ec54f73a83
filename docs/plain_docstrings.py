"""Docstrings for the site: plain text, of which Markdown's signs must be kept from meaning anything.

An extension of griffe, which reads the package for mkdocstrings (mkdocs.yml). Code in backticks, lists and indented
blocks stay what they are.
"""

import re
from collections.abc import Iterator
from typing import Any

import griffe

SIGNS = re.compile(r"([\[\]<*_])")


def escaped(line: str) -> str:
    """A line whose signs outside backticks stand for themselves."""
    parts = line.split("`")
    return "`".join(part if n % 2 else SIGNS.sub(r"\\\1", part) for n, part in enumerate(parts))


def markdown(text: str) -> str:
    """A docstring as Markdown: what is indented below a line that ends in a colon, such as examples, is code."""

    def lines() -> Iterator[str]:
        code, before = False, ""
        for line in text.split("\n"):
            indented = line.startswith("  ") and bool(line.strip())
            if not code and indented and before.endswith(":") and not before.lstrip().startswith("- "):
                code = True
                yield from ("", "```text")
            elif code and line.strip() and not indented:
                code = False
                yield "```"
            yield line.removeprefix("  ") if code else line if line.startswith("    ") else escaped(line)
            before = line if line.strip() else before
        if code:
            yield "```"

    return "\n".join(lines())


class PlainDocstrings(griffe.Extension):
    """Rewrites every docstring as it is read."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Called for every object with its members."""
        if obj.docstring:
            obj.docstring.value = markdown(obj.docstring.value)
