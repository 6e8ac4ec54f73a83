"""Documents from local files: `.txt`, `.jsonl`, `.parquet`, or a folder of these.

- `.txt`: one document, unless the file holds form feeds or lines that read `<|endoftext|>`: these separate documents.
- `.jsonl`: one JSON object a line, its text in a field (`text`, unless told otherwise); blank lines are skipped.
- `.parquet`: one document a row, its text in a column.
- a folder: all of these below it, sorted by path; hidden files and other kinds are passed over.

Text is UTF-8 and is kept as it stands, line ends included; a byte order mark at the front is dropped.
"""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from opencola.errors import UserError

Reader = Callable[[Any, str, str], str]
"""What to take of a row: called with the row, the name of a field and the place, as `text_of` is."""

SEPARATOR = re.compile(r"<\|endoftext\|>[ \t]*(?:\r?\n)?")
BYTE_ORDER_MARK = "\ufeff"


def text_of(row: Any, text_field: str, place: str) -> str:
    """The text of a row (a mapping) found at `place`; raises ValueError when it holds none that can be encoded."""
    text = field_of(row, text_field, place)
    if not isinstance(text, str):
        raise UserError(f"{place}: field {text_field!r} must be a string, but is {kind(text)}")
    check_text(text, f"{place}: field {text_field!r}")
    return text


def field_of(row: Any, field: str, place: str) -> Any:
    """The value of a row's field; raises ValueError, naming the place, where the row has none."""
    if not isinstance(row, dict):
        raise UserError(f"{place}: expected an object with a field {field!r}, found {kind(row)}")
    if field not in row:
        fields = ", ".join(map(str, row)) or "none"
        raise UserError(f"{place}: no field {field!r}; the fields are: {fields} (choose one with text_field)")
    return row[field]


def check_text(text: str, what: str) -> None:
    """Raise UserError for a string that cannot be encoded."""
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair, which no UTF-8 text can hold
        raise UserError(f"{what} holds half a surrogate pair at {error.start}") from error


def read_documents(path: str | Path, text_field: str = "text", read: Reader = text_of) -> list[str]:
    """Read the documents of a file or folder, in order, without those of white space alone.

    Everything is read and checked at once, so that a broken line fails here and not hours into a run. Errors as in
    `iter_documents`.
    """
    return list(iter_documents(path, text_field, read))


def iter_documents(path: str | Path, text_field: str = "text", read: Reader = text_of) -> Iterator[str]:
    """The documents of `read_documents`, one at a time: a file of any size takes the memory of its longest document.

    Raises FileNotFoundError when nothing is there, and UserError, naming file and line or byte, for what cannot be
    read: a binary file, bytes that are not UTF-8, broken JSON, a text field that is missing or not a string. Where
    another `read` takes something else of the rows than text, a .txt file is none of these.
    """
    place = Path(path)
    if not place.exists():
        raise FileNotFoundError(f"no such file or folder: {place}")
    if place.is_dir():
        files = [file for file in sorted(place.rglob("*")) if _is_readable(file, place)]
        if not files:
            raise UserError(f"no .txt, .jsonl or .parquet file in folder {place}")
    else:
        files = [place]
    texts = (text for file in files for text in _read_file(file, text_field, read) if text.strip())
    first = next(texts, None)
    if first is None:
        raise UserError(f"no documents in {place}: it is empty or holds only white space")
    yield first
    yield from texts


def _is_readable(file: Path, folder: Path) -> bool:
    hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
    return not hidden and file.suffix.lower() in (".txt", ".jsonl", ".parquet") and file.is_file()


def _read_file(file: Path, text_field: str, read: Reader) -> Iterator[str]:
    match file.suffix.lower():
        case ".txt" if read is not text_of:
            raise UserError(f"{file}: conversations are in .jsonl and .parquet files")
        case ".txt":
            return _read_txt(file)
        case ".jsonl":
            return _read_jsonl(file, text_field, read)
        case ".parquet":
            return _read_parquet(file, text_field, read)
        case _:
            raise UserError(f"{file}: cannot tell what it holds; give .txt, .jsonl, .parquet or a folder of these")


def _lines(file: Path) -> Iterator[str]:
    """Lines with their ends. Only "\n" ends one: str.splitlines would also cut at characters inside a JSON string."""
    start = 0
    with file.open("rb") as lines:
        for data in lines:
            nul = data.find(b"\0")
            if nul >= 0:
                raise UserError(f"{file}: NUL byte at byte {start + nul}: a binary file, or text that is not UTF-8")
            try:
                line = data.decode("utf-8")
            except UnicodeDecodeError as error:
                byte = f"byte {start + error.start} (0x{data[error.start]:02x})"
                raise UserError(f"{file}: not UTF-8 at {byte}") from error
            yield line if start else line.removeprefix(BYTE_ORDER_MARK)
            start += len(data)


def _read_txt(file: Path) -> Iterator[str]:
    parts: list[str] = []
    for line in _lines(file):
        first, *others = [""] * 2 if SEPARATOR.fullmatch(line) else line.split("\f")
        parts.append(first)
        for other in others:
            yield "".join(parts)
            parts = [other]
    yield "".join(parts)


def _read_jsonl(file: Path, text_field: str, read: Reader) -> Iterator[str]:
    for number, line in enumerate(_lines(file), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{file}, line {number}: not JSON: {error}") from error
        yield read(row, text_field, f"{file}, line {number}")


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


def kind(value: Any) -> str:
    """A value's type, for messages."""
    return "null" if value is None else type(value).__name__
