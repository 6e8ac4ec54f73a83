"""Command-line flags out of dataclasses, by tyro, with every mistake as one line."""

import contextlib
import io
import itertools
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from opencola.errors import UserError
from opencola.paths import home

VALUE = "\ufdd0"
"""Stands before a word that begins with - and is a value all the same; Unicode has it for such internal uses."""
FLAG = re.compile(r"--?[^\W\d][\w.-]*(=.*)?", re.DOTALL)
REGISTRY = ConstructorRegistry()


@dataclass(frozen=True)
class RunFlags:
    """What to do about a run that is already there."""

    resume: bool = False
    """Go on where the run stopped; stages that are finished stay as they are."""
    overwrite: bool = False
    """Start anew where a run is there: its checkpoints and records go when training begins, its model stays until
    another one is whole."""


@dataclass(frozen=True)
class OutputFlags:
    """How results are shown."""

    json: bool = False
    """Print results as JSON, one in a line, in place of tables; nothing else is then printed on standard output."""

    def say(self, text: str) -> None:
        """Print what is no result."""
        print(text, file=sys.stderr if self.json else sys.stdout)


def parse(target: Any, args: Sequence[str], **options: Any) -> Any:
    """`tyro.cli(target, args=args, **options)`, with mistakes as UserError of one line; --help still exits.

    A number out of its range (`opencola.ranges`) is named by its flag. In paths, `~` is the home folder. What is no
    flag may stand behind flags of many values, too, as the last word.
    """
    args = marked(args)
    try:
        return _parse(target, args, **options)
    except UserError as error:
        first = next((place for place, word in enumerate(args) if word.startswith("-")), len(args))
        *words, last = args or ["-"]
        # a flag must not lose its only value
        is_value = words[-1:] and words[-1].startswith("-") and not str(error).startswith("Unrecognized options:")
        if options.get("return_unknown_args") or last.startswith("-") or is_value:
            raise
        with contextlib.suppress(UserError):
            return _parse(target, [*words[:first], last, *words[first:]], **options)
        raise


def marked(args: Sequence[str]) -> list[str]:
    """A command line with the mark of `value` before what can only be one: a word with spaces, and `--` behind a flag
    or at the end, where there is nothing to set apart."""
    places = range(1, len(args))
    alone = {place for place in places if place == len(args) - 1 or re.fullmatch(r"--[^=]+", args[place - 1])}
    return [
        value(word)
        if (word == "--" and place in alone) or (re.match(r"--?\S*\s", word) and not FLAG.fullmatch(word))
        else word
        for place, word in enumerate(args)
    ]


def _parse(target: Any, args: Sequence[str], **options: Any) -> Any:
    said = io.StringIO()
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(contextlib.redirect_stderr(said))
            if not {"-h", "--help"} & {*args}:  # where stdout is no terminal, tyro writes plain text
                stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
            return tyro.cli(target, args=args, registry=REGISTRY, **options)
    except SystemExit as stop:
        if not stop.code:
            raise
        line = _by_flag(_one_line(said.getvalue().replace(VALUE, "")), args)
        raise UserError(line + advice(line, args)) from None


def value(word: str) -> str:
    """A word of a command line that is a value, whatever it begins with, as `parse` takes it."""
    return f"{VALUE}{word}" if re.match(r"-(?![\d.])", word) else word


def words_of(values: dict[str, Any], prefix: str = "--") -> list[str]:
    """Nested values as flags: {"a": {"b": 1, "c": [2, 3]}} -> --a.b=1 --a.c 2 3."""
    words: list[str] = []
    for key, entries in values.items():
        if isinstance(entries, dict):
            words += words_of(entries, f"{prefix}{key}.")
        elif isinstance(entries, list | tuple):
            words += [f"{prefix}{key}", *(value(str(entry)) for entry in entries)]
        else:
            words.append(f"{prefix}{key}={entries}")
    return words


@REGISTRY.primitive_rule
def _text(kind: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[str] | None:
    """Texts: without the mark of `value`."""
    if kind.type is not str:
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="STR",
        instance_from_str=lambda words: words[0].removeprefix(VALUE),
        is_instance=lambda given: isinstance(given, str),
        str_from_instance=lambda text: [text],
    )


@REGISTRY.primitive_rule
def _path(kind: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Path] | None:
    """Paths: of the user's home folder, where they begin with ~."""
    if kind.type is not Path:
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATH",
        instance_from_str=lambda words: home(words[0].removeprefix(VALUE)),
        is_instance=lambda given: isinstance(given, Path),
        str_from_instance=lambda path: [str(path)],
    )


def _one_line(said: str) -> str:
    """What tyro's message says, without its title, frame and advice; a guess at the right flag is kept."""
    _, message, *advice = re.split(r"^ +-+ *$", said, flags=re.MULTILINE)
    if "Missing from" in message:
        return "missing: " + ", ".join(re.findall(r"^ {6}(\S+)", message, re.MULTILINE))
    line = " ".join(message.split())
    guess = re.search(r"^  (?:Perhaps you meant|Arguments similar to).*:\s+(--\S+)", "".join(advice), re.MULTILINE)
    return f"{line}; did you mean {guess[1]}?" if guess else line


def advice(line: str, args: Sequence[str]) -> str:
    """How to give a value that was taken for a flag, where the word before it is a flag without a value."""
    if "did you mean" in line:
        return ""
    for flag, word in itertools.pairwise(args):
        unknown = line.startswith("Unrecognized options:") and word in line
        pair = word.startswith("-") and flag.startswith("--") and "=" not in flag
        if pair and (unknown or f"argument '{flag}'" in line):
            return f"; if {word} is a value: {flag}={word}"
    return ""


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
