"""Command-line flags out of dataclasses, by tyro, with every mistake as one line."""

import contextlib
import io
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import tyro

from opencola.errors import UserError


@dataclass(frozen=True)
class RunFlags:
    """What to do about a run that is already there."""

    resume: bool = False
    """Go on where the run stopped; stages that are finished stay as they are."""
    overwrite: bool = False
    """Delete the run that is there, and start anew."""


@dataclass(frozen=True)
class OutputFlags:
    """How results are shown."""

    json: bool = False
    """Print results as JSON, one in a line, in place of tables; nothing else is then printed on standard output."""

    def say(self, text: str) -> None:
        """Print what is no result."""
        print(text, file=sys.stderr if self.json else sys.stdout)


def parse(target: Any, args: Sequence[str], **options: Any) -> Any:
    """`tyro.cli(target, args=args, **options)`, with mistakes as UserError of one line; --help still exits."""
    said = io.StringIO()
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(contextlib.redirect_stderr(said))
            if not {"-h", "--help"} & {*args}:  # where stdout is no terminal, tyro writes plain text
                stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
            return tyro.cli(target, args=args, **options)
    except SystemExit as stop:
        if not stop.code:
            raise
        raise UserError(_one_line(said.getvalue())) from None


def _one_line(said: str) -> str:
    """What tyro's message says, without its title, frame and advice; a guess at the right flag is kept."""
    _, message, *advice = re.split(r"^ +-+ *$", said, flags=re.MULTILINE)
    if "Missing from" in message:
        return "missing: " + ", ".join(re.findall(r"^ {6}(\S+)", message, re.MULTILINE))
    line = " ".join(message.split())
    guess = re.search(r"^  (?:Perhaps you meant|Arguments similar to).*:\s+(--\S+)", "".join(advice), re.MULTILINE)
    return f"{line}; did you mean {guess[1]}?" if guess else line
