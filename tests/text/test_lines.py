"""Files of lines: what is read, what is refused with its place, and what is written."""

import json
from pathlib import Path
from typing import Any

import pytest

from opencola.text.lines import (
    append_objects,
    check_text,
    dump,
    last_object,
    parse_json,
    read_lines,
    read_objects,
    write_objects,
)

OBJECTS: list[dict[str, Any]] = [
    {"text": "ö\u2028\u0085\x0c\n\r"},
    {"n": 1, "x": 0.1, "none": None},
    {"": [{"a": "b"}]},
]


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    write_objects(file, OBJECTS[:2])
    write_objects(file, OBJECTS[2:], append=True)
    assert list(read_objects(file)) == [(f"{file}, line {i}", value) for i, value in enumerate(OBJECTS, 1)]
    assert last_object(file) == OBJECTS[-1]
    text = file.read_bytes().decode()
    assert text.count("\n") == 3 and text.startswith('{"text": "ö\u2028')
    write_objects(file, OBJECTS[:1])
    assert file.read_text(encoding="utf-8") == f"{dump(OBJECTS[0])}\n"


def test_what_is_appended_is_there_at_once(tmp_path: Path) -> None:
    with (tmp_path / "x.jsonl").open("w", encoding="utf-8") as out:
        for count in (1, 2, 3):
            append_objects(out, OBJECTS[count - 1 : count])
            assert [value for _, value in read_objects(tmp_path / "x.jsonl")] == OBJECTS[:count]


def test_numbers_that_json_does_not_have(tmp_path: Path) -> None:
    assert dump({"a": float("nan")}) == '{"a": NaN}'
    with pytest.raises(ValueError):
        dump({"a": float("nan")}, finite=True)
    with (tmp_path / "x.jsonl").open("w") as out, pytest.raises(ValueError):
        append_objects(out, [{"a": float("inf")}], finite=True)


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_byte_order_marks_line_ends_and_blank_lines(tmp_path: Path, end: str, mark: str) -> None:
    file = tmp_path / "x.jsonl"
    file.write_bytes(f'{mark}{{"a": 1}}{end}{end} \t{end}{{"a": "\ufeff"}}'.encode())
    assert list(read_objects(file)) == [(f"{file}, line 1", {"a": 1}), (f"{file}, line 4", {"a": "\ufeff"})]
    texts = tmp_path / "x.txt"
    texts.write_bytes(f"{mark}a {end}{end} b\u2028c".encode())
    assert list(read_lines(texts, "texts")) == [(f"{texts}, line 1", "a "), (f"{texts}, line 3", " b\u2028c")]


def test_a_line_without_its_end_can_be_left_out(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"a": 1}\n{"a": 2}\n{"a"')
    assert [value["a"] for _, value in read_objects(tmp_path / "x.jsonl", ended=True)] == [1, 2]
    with pytest.raises(ValueError, match="line 3: not JSON"):
        list(read_objects(tmp_path / "x.jsonl"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"a": "\xff"}', r"not UTF-8 at byte 7 of the line \(0xff\)"),
        (b'{"a": "\xc3', r"not UTF-8 at byte 7 of the line \(0xc3\)"),
        (b'{"a": \0}', "NUL byte at byte 6 of the line: a binary file"),
        (b'{"a": 1', "not JSON: "),
        (b"[" * 100_000, "not JSON: "),
        (b"[1]", "expected an object, found list"),
        (b"null", "expected an object, found null"),
        (b"3", "expected an object, found int"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, line: bytes, message: str) -> None:
    file = tmp_path / "x.jsonl"
    file.write_bytes(b'{"a": 1}\n\n' + line + b"\n")
    objects = read_objects(file)
    assert next(objects)[1] == {"a": 1}
    with pytest.raises(ValueError, match=rf"x\.jsonl, line 3: {message}") as error:
        next(objects)
    assert "\n" not in str(error.value)


def test_files_that_are_none(tmp_path: Path) -> None:
    for read in (read_objects, lambda file: read_lines(file, "texts")):
        with pytest.raises(FileNotFoundError, match="no such file: .*nowhere.jsonl"):
            list(read(tmp_path / "nowhere.jsonl"))
    (tmp_path / "x.csv").touch()
    with pytest.raises(ValueError, match=r"x\.csv: texts are in a \.txt file, one in each line, or in a \.jsonl file"):
        list(read_lines(tmp_path / "x.csv", "texts"))
    (tmp_path / "x.jsonl").write_text("\n")
    with pytest.raises(ValueError, match=r"x\.jsonl is empty"):
        last_object(tmp_path / "x.jsonl")


def test_lines_are_replaced_as_a_whole(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    file.write_text("before")

    def lines() -> Any:
        yield {"a": "ä"}
        assert file.read_text() == "before"
        yield {"b": 1}

    write_objects(file, lines())
    assert file.read_text(encoding="utf-8") == '{"a": "ä"}\n{"b": 1}\n'
    assert list(tmp_path.iterdir()) == [file]


def test_what_is_no_text() -> None:
    check_text("ö\u2028😀", "here")
    for text in ("ab\ud800", json.loads('"ab\\udfff"')):
        with pytest.raises(ValueError, match="^here: not valid Unicode at character 2$"):
            check_text(text, "here")
    with pytest.raises(ValueError, match="^here: not JSON: "):
        parse_json("{", "here")
