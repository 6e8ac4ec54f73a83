"""Command-line flags out of dataclasses, by tyro, with every mistake as one line."""

import contextlib
import io
from collections.abc import Sequence
from typing import Any

import tyro


def parse(target: Any, args: Sequence[str], **options: Any) -> Any:
    """`tyro.cli(target, args=args, **options)`, with mistakes as ValueError of one line; --help still exits."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(target, args=args, **options)
    except SystemExit as stop:
        if not stop.code:
            raise
        raise ValueError(_one_line(said.getvalue())) from None


def _one_line(box: str) -> str:
    """What tyro's message box says, without its frame and advice."""
    lines = [line.strip("│ ") for line in box.splitlines()[1:-1]]
    end = next((i for i, line in enumerate(lines) if not line or line.startswith("──")), len(lines))
    message, advice = " ".join(lines[:end]), lines[end:]
    flags = [line.split()[0] for line in lines if line.startswith("--")]
    if message.startswith("Missing from"):
        return f"missing: {', '.join(flags)}"
    return f"{message}; did you mean {flags[0]}?" if "Perhaps you meant:" in advice and flags else message
