"""Files of lines: texts in .txt, JSON objects in .jsonl; all that reads or writes them does it here.

Only "\\n" ends a line (a JSON string may hold other line separators), and "\\r" before it belongs to the end. Text is
UTF-8; a byte order mark at the front is dropped. Files that end in .gz or .zst are unpacked as they are read.
"""

import contextlib
import gzip
import io
import json
import sys
import zlib
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TextIO, cast

from opencola.errors import UserError
from opencola.paths import is_stream
from opencola.storage import written

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
PACKED = (".gz", ".zst")


def is_pipe(file: Path) -> bool:
    """Whether lines come from a program: `-`, which is standard input, /dev/stdin, or a named pipe."""
    return file == Path("-") or is_stream(file)


def holds_object(file: Path, line: str) -> bool:
    """Whether a line is a JSON object, and no text: as the file's name says; in a pipe those that begin like one."""
    return unpacked_name(file).suffix == ".jsonl" or (is_pipe(file) and line.lstrip().startswith("{"))


def decoded_lines(file: Path) -> Iterator[tuple[str, str]]:
    """The lines of a file with their ends, each after the words for its place; memory is that of one line.

    Raises FileNotFoundError, and UserError for a line, which it names, that is binary or not UTF-8.
    """
    piped = file == Path("-")
    if not piped and not file.exists():
        raise FileNotFoundError(f"no such file: {file}")
    with contextlib.nullcontext(sys.stdin.buffer) if piped else opened(file) as lines:
        for number, line in enumerate(lines, 1):
            place = f"{file}, line {number}"
            line = line.removeprefix(BYTE_ORDER_MARK) if number == 1 else line
            if (nul := line.find(b"\0")) >= 0:
                raise UserError(f"{place}: NUL byte at byte {nul} of the line: a binary file, or text that is no UTF-8")
            try:
                yield place, line.decode()
            except UnicodeDecodeError as error:
                byte = f"byte {error.start} of the line (0x{line[error.start]:02x})"
                raise UserError(f"{place}: not UTF-8 at {byte}") from None


def unpacked_name(file: Path) -> Path:
    """A file's name without the .gz or .zst that says how it is packed: what it holds follows from that."""
    return file.with_suffix("") if file.suffix.lower() in PACKED else file


@contextmanager
def opened(file: Path) -> Iterator[IO[bytes]]:
    """A file to read bytes from, unpacked where it is packed.

    Raises UserError for one that cannot be unpacked, as it is damaged or cut off.
    """
    packing = file.suffix.lower()
    broken: tuple[type[Exception], ...] = (gzip.BadGzipFile, EOFError, zlib.error)
    try:
        with contextlib.ExitStack() as stack:
            if packing == ".gz":
                yield cast(IO[bytes], stack.enter_context(gzip.open(file)))
            elif packing == ".zst":
                import pyarrow  # here, because it takes a moment to load and few need it

                broken = (OSError,)
                packed = stack.enter_context(pyarrow.input_stream(file, compression="zstd"))
                yield cast(IO[bytes], stack.enter_context(io.BufferedReader(packed)))
            else:
                yield stack.enter_context(file.open("rb"))
    except broken as error:
        raise UserError(f"{file}: cannot be unpacked: {' '.join(str(error).split())}") from error


def read_lines(file: Path, what: str) -> Iterator[tuple[str, str]]:
    """The lines of a .txt or .jsonl file of `what`, or of a pipe, but blank ones, each after the words for its place.

    Raises UserError for other files, and errors as `decoded_lines`.
    """
    if file.exists() and not is_pipe(file) and unpacked_name(file).suffix not in (".txt", ".jsonl"):
        raise UserError(f"{file}: {what} are in a .txt file, one in each line, or in a .jsonl file")
    for place, line in decoded_lines(file):
        if line.strip():
            yield place, line.removesuffix("\n").removesuffix("\r")


def read_objects(file: Path, ended: bool = False) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a .jsonl file, each after the words for its place; blank lines are skipped.

    ended: leave out a last line without a line end, which was cut off while it was written. Raises UserError, naming
    file and line, for a line that is no JSON object, and errors as `decoded_lines`.
    """
    for place, line in decoded_lines(file):
        if line.strip() and (line.endswith("\n") or not ended):
            yield place, parse_object(line, place)


def last_object(file: Path) -> dict[str, Any]:
    """The last object of a .jsonl file. Raises UserError where there is none, and errors as `read_objects`."""
    last = deque((value for _, value in read_objects(file)), maxlen=1)
    if not last:
        raise UserError(f"{file} is empty")
    return last.pop()


def parse_json(line: str, place: str) -> Any:
    """What a line of a .jsonl file holds; raises UserError, naming the place, where that is not JSON."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: not JSON: {error}") from None


def parse_object(line: str, place: str) -> dict[str, Any]:
    """The object that a line holds; raises UserError, naming the place, where it is none."""
    value = parse_json(line, place)
    if not isinstance(value, dict):
        raise UserError(f"{place}: expected an object, found {kind(value)}")
    return value


def dump(value: Any, finite: bool = False) -> str:
    """A value as one line of JSON, without a line end.

    finite: raise ValueError for a number that JSON does not have, which is otherwise written as NaN or Infinity.
    """
    return json.dumps(value, ensure_ascii=False, allow_nan=not finite)


def write_objects(file: Path, objects: Iterable[Mapping[str, Any]], append: bool = False) -> None:
    """Write a .jsonl file whole, or leave the old one; with `append`, add to it."""
    with file.open("a", encoding="utf-8", newline="\n") if append else written(file) as out:
        append_objects(out, objects)


def append_objects(out: TextIO, objects: Iterable[Mapping[str, Any]], finite: bool = False) -> None:
    """Write objects to an open .jsonl file, and have the system know of them at once. finite: as of `dump`."""
    out.writelines(f"{dump(value, finite)}\n" for value in objects)
    out.flush()


def check_text(text: str, place: str) -> None:
    """Raise UserError where a string is no text: halves of surrogate pairs, which JSON can spell, and bytes of a
    command line that are not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{place}: not valid Unicode at character {error.start}") from None


def kind(value: Any) -> str:
    """A value's type, for messages."""
    return "null" if value is None else type(value).__name__
