"""Command-line flags out of dataclasses, by tyro, with every mistake as one line."""

import contextlib
import io
import re
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


def parse(target: Any, args: Sequence[str], **options: Any) -> Any:
    """`tyro.cli(target, args=args, **options)`, with mistakes as UserError of one line; --help still exits.

    A number out of its range (`opencola.ranges`) is named by its flag.
    """
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
        raise UserError(_by_flag(_one_line(said.getvalue()), args)) from None


def _one_line(said: str) -> str:
    """What tyro's message says, without its title, frame and advice; a guess at the right flag is kept."""
    _, message, *advice = re.split(r"^ +-+ *$", said, flags=re.MULTILINE)
    if "Missing from" in message:
        return "missing: " + ", ".join(re.findall(r"^ {6}(\S+)", message, re.MULTILINE))
    line = " ".join(message.split())
    guess = re.search(r"^  (?:Perhaps you meant|Arguments similar to).*:\s+(--\S+)", "".join(advice), re.MULTILINE)
    return f"{line}; did you mean {guess[1]}?" if guess else line


def _by_flag(line: str, args: Sequence[str]) -> str:
    """A message of `ranges.check`, which knows fields only, with the flag that the value came from."""
    parts = re.fullmatch(r"Error parsing (\S+): (\w+)( must be .*, but is .*)", line)
    if parts is None:
        return line
    group, field, rest = parts.groups()
    given = {word.partition("=")[0] for word in args}
    names = [f"--{name}" for name in (f"{group}.{field}", field)]  # of some groups flags have no prefix
    spelled = [spelling for name in names for spelling in (name, name.replace("_", "-")) if spelling in given]
    return (spelled[0] if spelled else names[0]) + rest
