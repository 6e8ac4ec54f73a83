"""The file of results: a line about the run, and one for every record; written so that a run may be cut off anywhere.

Records are appended to a draft as they are made, in any order. When all are there, the file is written in order, and
renamed when it is whole: nothing in it tells how often, or where, the run was cut off. Until then the results of an
earlier run stay; where there is a draft, it alone tells how far the run is.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from opencola.checkpoints.settings import without_others
from opencola.errors import UserError
from opencola.storage import draft_of, write_text
from opencola.text.lines import append_objects, dump, parse_object

RESULTS = "results.jsonl"
DRAFT = draft_of(Path(RESULTS)).name
SHOWN = 4
"""Differences that a message names."""

Key = tuple[str, int]
"""Task, and place in it."""


class ResultsWriter:
    """The results of a run in a folder, as far as they are there, and as they come.

    Attributes: `keys` of all records that there shall be, in order; `lines`, the records that there are, as written.
    """

    def __init__(
        self, folder: Path, header: Mapping[str, Any], sizes: Mapping[str, int], overwrite: bool = False
    ) -> None:
        """header: what is to be told of the run, JSON; sizes: how many records each task has, in the file's order.

        overwrite: begin anew, whatever there is. Without it, raises UserError where the folder holds the results of a
        run that is told of otherwise, naming what differs.
        """
        self.folder = folder
        self.header = dump(header, finite=True)
        self.keys: list[Key] = [(task, index) for task, size in sizes.items() for index in range(size)]
        self.lines: dict[Key, str]
        there = [file for file in (folder / DRAFT, folder / RESULTS) if file.exists() and not overwrite]
        self.lines = next((lines for file in there if (lines := self._read(file)) is not None), {})

    def _read(self, file: Path) -> dict[Key, str] | None:
        """The records in a file, where lines that are damaged or cut off are none; None of a draft of nobody's."""
        first, *rest = file.read_bytes().split(b"\n")
        header = _parse(first)
        if header is None and file.name == DRAFT and not any(rest):  # cut off in its first line
            return None
        if header is None:
            raise UserError(f"{file}: line 1 is damaged, so that nobody knows of which run it is: --overwrite it")
        now = json.loads(self.header)
        if isinstance(header.get("settings"), dict) and isinstance(now.get("settings"), dict):
            header["settings"] = without_others(header["settings"], now["settings"])
        if changes := list(differences(header, now)):
            more = f", and {len(changes) - SHOWN} more" if len(changes) > SHOWN else ""
            raise UserError(
                f"{file} is of another run: {'; '.join(changes[:SHOWN])}{more}. Choose another --out, or --overwrite it"
            )
        wanted, lines = set(self.keys), {}
        for line in rest[:-1]:  # what stands behind the last line's end was cut off
            match _parse(line):
                case {"task": str(task), "index": int(index)} if (task, index) in wanted:
                    lines[task, index] = line.decode()
        return lines

    def open(self) -> TextIO:
        """The draft, with the records that there are, open for more. Close it before `finish`."""
        self._write(self.folder / DRAFT, self.lines)
        return (self.folder / DRAFT).open("a", encoding="utf-8", newline="\n")

    def append(self, draft: TextIO, records: Sequence[Mapping[str, Any]]) -> None:
        """Add records. Raises ValueError for numbers that JSON does not have."""
        append_objects(draft, records, finite=True)
        self.lines |= {(record["task"], record["index"]): dump(record) for record in records}

    def finish(self) -> None:
        """Write the file of results, all records being there, and delete the draft."""
        self._write(self.folder / RESULTS, self.keys)
        (self.folder / DRAFT).unlink(missing_ok=True)

    def _write(self, file: Path, keys: Iterable[Key]) -> None:
        write_text(file, "".join(f"{line}\n" for line in (self.header, *(self.lines[key] for key in keys))))

    def records(self) -> Iterator[dict[str, Any]]:
        """The records that there are, in order."""
        return (json.loads(self.lines[key]) for key in self.keys if key in self.lines)


def differences(there: Any, now: Any, name: str = "") -> Iterator[str]:
    """In which fields two JSON values differ, in words."""
    if isinstance(there, dict) and isinstance(now, dict):
        for key in dict.fromkeys([*now, *there]):
            yield from differences(there.get(key), now.get(key), f"{name}.{key}".removeprefix("."))
    elif there != now:
        yield f"{name} is {_short(there)} there, {_short(now)} now"


def _short(value: Any) -> str:
    text = dump(value)
    return text if len(text) <= 40 else f"{text[:36]} ..."


def _parse(line: bytes) -> dict[str, Any] | None:
    """The object in a line; None in a damaged one."""
    try:
        return parse_object(line.decode(), "")
    except ValueError:
        return None
