"""Files of lines: texts in .txt, objects in .jsonl."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from opencola.errors import UserError


def read_lines(file: Path, what: str) -> Iterator[tuple[str, str]]:
    """The lines of a .txt or .jsonl file of `what`, but blank ones, each after the words for its place.

    Raises FileNotFoundError, and UserError for other files and for a line, which it names, that is not UTF-8.
    """
    if not file.is_file():
        raise FileNotFoundError(f"no such file: {file}")
    if file.suffix not in (".txt", ".jsonl"):
        raise UserError(f"{file}: {what} are in a .txt file, one in each line, or in a .jsonl file")
    for number, line in enumerate(file.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        place = f"{file}, line {number}"
        try:
            text = line.decode().removesuffix("\r")
        except UnicodeDecodeError as error:
            raise UserError(f"{place}: not UTF-8 at byte {error.start} of the line") from None
        if text.strip():
            yield place, text


def parse_json(line: str, place: str) -> Any:
    """What a line of a .jsonl file holds; raises ValueError, naming the place, where that is not JSON."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: not JSON: {error}") from None


def check_text(text: str, place: str) -> None:
    """Raise UserError where a string is no text: halves of surrogate pairs, bytes that are not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{place}: not valid Unicode at character {error.start}") from None
