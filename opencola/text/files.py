"""Documents from local files: `.txt`, `.jsonl`, `.parquet`, or a folder of these.

- `.txt`: one document, unless the file holds form feeds or lines that read `<|endoftext|>`: these separate documents.
- `.jsonl`: one JSON object a line, its text in a field (`text`, unless told otherwise); blank lines are skipped.
- `.parquet`: one document a row, its text in a column.
- a folder: all of these below it, sorted by path; hidden files and other kinds are passed over, and `skipped` says so.
- a pipe (`-` is standard input): as `.jsonl` where its first line is an object, else as `.txt`; it can be read once.

`.txt` and `.jsonl` may be packed as `.gz` or `.zst`.

Text is kept as it stands, line ends included (see `opencola.text.lines`).
"""

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opencola.errors import UserError
from opencola.paths import home
from opencola.text.lines import (
    check_text,
    decoded_lines,
    holds_object,
    is_pipe,
    kind,
    parse_object,
    read_objects,
    unpacked_name,
)

Reader = Callable[[Mapping[str, Any], str, str], str]
"""What to take of a row: called with the row, the name of a field and the place, as `text_of` is."""

SEPARATOR = re.compile(r"<\|endoftext\|>[ \t]*(?:\r?\n)?")


@dataclass
class Blank:
    """Documents of white space alone, which are passed over and counted."""

    count: int = 0

    def passed_over(self, texts: Iterable[str]) -> Iterator[str]:
        """The other ones."""
        for text in texts:
            if text.strip():
                yield text
            else:
                self.count += 1

    def said(self, source: str) -> str:
        """How many there were in a source, in a line; empty where there were none."""
        return f"{self.count} documents of {source} hold only white space, and are passed over" * (self.count > 0)


def text_of(row: Mapping[str, Any], text_field: str, place: str) -> str:
    """The text of a row found at `place`; raises UserError when it holds none that can be encoded."""
    text = field_of(row, text_field, place)
    if not isinstance(text, str):
        raise UserError(f"{place}: field {text_field!r} must be a string, but is {kind(text)}")
    check_text(text, f"{place}: field {text_field!r}")
    return text


def field_of(row: Mapping[str, Any], field: str, place: str) -> Any:
    """The value of a row's field; raises UserError, naming the place, where the row has none."""
    if field not in row:
        fields = ", ".join(map(str, row)) or "none"
        raise UserError(f"{place}: no field {field!r}; the fields are: {fields} (choose one with text_field)")
    return row[field]


def read_documents(
    path: str | Path, text_field: str = "text", read: Reader = text_of, blank: Blank | None = None
) -> list[str]:
    """Read the documents of a file or folder, in order, without those of white space alone, which are `blank`.

    Everything is read and checked at once, so that a broken line fails here and not hours into a run. Errors as in
    `iter_documents`.
    """
    return list(iter_documents(path, text_field, read, blank))


def iter_documents(
    path: str | Path, text_field: str = "text", read: Reader = text_of, blank: Blank | None = None
) -> Iterator[str]:
    """The documents of `read_documents`, one at a time: a file of any size takes the memory of its longest document.

    Raises FileNotFoundError when nothing is there, and UserError, naming file and line, for what cannot be read:
    a binary file, bytes that are not UTF-8, broken JSON, a text field that is missing or not a string. Where
    another `read` takes something else of the rows than text, a .txt file is none of these.
    """
    place = home(path)
    if not place.exists() and not is_pipe(place):
        raise FileNotFoundError(f"no such file or folder: {place}")
    if place.is_dir():
        files = [file for file in sorted(place.rglob("*")) if _is_readable(file, place)]
        if not files:
            said = f": {line}" if (line := skipped(place)) else ""
            raise UserError(f"no .txt, .jsonl or .parquet file in folder {place}{said}")
    else:
        files = [place]
    blank = blank or Blank()
    texts = blank.passed_over(text for file in files for text in _read_file(file, text_field, read))
    first = next(texts, None)
    if first is None:
        raise UserError(f"no documents in {place}: it is empty or holds only white space")
    yield first
    yield from texts


def skipped(path: str | Path) -> str:
    """Which files of a folder are not read as documents, by their kinds, in a line; empty where all are, and for what
    is no folder.

    Hidden files and folders count as one kind.
    """
    place = Path(path)
    kinds: dict[str, list[Path]] = {}
    for file in sorted(place.rglob("*")) if place.is_dir() else ():
        if file.is_file() and not _is_readable(file, place):
            name = "hidden" if _is_hidden(file, place) else "".join(file.suffixes[-2:]).lower() or "no ending"
            kinds.setdefault(name, []).append(file)
    if not kinds:
        return ""
    named = ", ".join(f"{len(files)} {name} ({files[0].relative_to(place)})" for name, files in kinds.items())
    count = sum(map(len, kinds.values()))
    return f"{count} files in {place} are not read, as they are not .txt, .jsonl or .parquet: {named}"


def _is_readable(file: Path, folder: Path) -> bool:
    return not _is_hidden(file, folder) and ending(file) in (".txt", ".jsonl", ".parquet") and file.is_file()


def _is_hidden(file: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(folder).parts)


def ending(file: Path) -> str:
    """What says what a file holds: its name's end in small letters, of a packed one that before .gz or .zst."""
    held = unpacked_name(file).suffix.lower()
    return "" if held == ".parquet" != file.suffix.lower() else held  # which is packed inside


def _read_file(file: Path, text_field: str, read: Reader) -> Iterator[str]:
    if is_pipe(file):
        return _read_pipe(file, text_field, read)
    match ending(file):
        case ".txt" if read is not text_of:
            raise UserError(f"{file}: conversations are in .jsonl and .parquet files")
        case ".txt":
            return _read_txt(decoded_lines(file))
        case ".jsonl":
            return _read_jsonl(file, text_field, read)
        case ".parquet":
            return _read_parquet(file, text_field, read)
        case _:
            raise UserError(f"{file}: cannot tell what it holds; give .txt, .jsonl, .parquet or a folder of these")


def _read_pipe(file: Path, text_field: str, read: Reader) -> Iterator[str]:
    lines = decoded_lines(file)
    begun: list[tuple[str, str]] = []
    for line in lines:
        begun.append(line)
        if line[1].strip():
            break
    lines = itertools.chain(begun, lines)
    if begun and holds_object(file, begun[-1][1]):
        return (read(parse_object(line, place), text_field, place) for place, line in lines if line.strip())
    return _read_txt(lines)


def _read_txt(lines: Iterable[tuple[str, str]]) -> Iterator[str]:
    parts: list[str] = []
    separated = False
    for _, line in lines:
        first, *others = [""] * 2 if SEPARATOR.fullmatch(line) else line.split("\f")
        parts.append(first)
        for other in others:
            text = "".join(parts)
            if separated or text.strip():  # what is blank before the first separator is no document
                yield text
            separated = True
            parts = [other]
    text = "".join(parts)
    if not separated or text.strip():  # nor is what is blank behind the last one
        yield text


def _read_jsonl(file: Path, text_field: str, read: Reader) -> Iterator[str]:
    return (read(row, text_field, place) for place, row in read_objects(file))


def _read_parquet(file: Path, text_field: str, read: Reader) -> Iterator[str]:
    from pyarrow import ArrowException  # here, because it takes a moment to load and few need it
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(file) as table:
            columns = table.schema_arrow.names
            if text_field not in columns:
                names = ", ".join(columns) or "none"
                raise UserError(f"{file}: no column {text_field!r}; the columns are: {names} (choose with text_field)")
            number = 0
            for batch in table.iter_batches(columns=[text_field]):
                for row in batch.to_pylist():
                    number += 1
                    yield read(row, text_field, f"{file}, row {number}")
    except (ArrowException, OSError, UnicodeDecodeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{file}: not a readable parquet file: {reason}") from error
