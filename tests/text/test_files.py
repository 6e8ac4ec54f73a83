"""Local files: what counts as a document, and one clear line for every file that cannot be read."""

import gzip
import random
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from opencola.text.files import Blank, read_documents, skipped


def zst(content: bytes) -> bytes:
    packed: bytes = pa.Codec("zstd").compress(content, asbytes=True)
    return packed


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("one\n\ntwo\n", ["one\n\ntwo\n"]),
        ("one\n<|endoftext|>\ntwo\n<|endoftext|>", ["one\n", "two\n"]),
        ("one\r\n<|endoftext|> \r\ntwo\r\n", ["one\r\n", "two\r\n"]),
        ("one\n\ftwo", ["one\n", "two"]),
        ("\f \n\f one", [" one"]),
        ("a <|endoftext|> b", ["a <|endoftext|> b"]),
        ("<|endoftext|> b", ["<|endoftext|> b"]),
        ("\ufeffone \ufeff", ["one \ufeff"]),
    ],
)
def test_text_file_is_one_document_unless_separated(tmp_path: Path, content: str, expected: list[str]) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(content.encode())
    assert read_documents(file) == expected


def test_jsonl_skips_blank_lines_and_blank_texts(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes('\ufeff{"body": "one\u2028\\n"}\r\n\n  \n{"body": " \\n"}\n{"body": "zwei \\u00e9"}'.encode())
    assert read_documents(file, "body") == ["one\u2028\n", "zwei é"]


def test_packed_files_are_read_and_others_are_told(tmp_path: Path) -> None:
    (tmp_path / "README.txt").write_text("read me")
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"one\n<|endoftext|>\ntwo"))
    (tmp_path / "b.jsonl.GZ").write_bytes(gzip.compress(b'{"text": "three"}\n'))
    assert read_documents(tmp_path) == ["read me", "one\n", "two", "three"] and skipped(tmp_path) == ""
    for name in ("c.csv", "d.csv", "e.parquet.gz", ".hidden.txt", "LICENSE"):
        (tmp_path / name).write_text("x")
    assert len(read_documents(tmp_path)) == 4
    assert re.fullmatch(
        r"5 files in .* are not read, as they are not .txt, .jsonl or .parquet: "
        r"1 hidden \(.hidden.txt\), 1 no ending \(LICENSE\), 2 .csv \(c.csv\), 1 .parquet.gz \(e.parquet.gz\)",
        skipped(tmp_path),
    )
    assert skipped(tmp_path / "c.csv") == skipped(tmp_path / "nowhere") == ""


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt.gz", b"no gzip"),
        ("a.txt.gz", gzip.compress(b"some text" * 99, mtime=0)[:-9]),
        ("a.txt.zst", b"no frame"),
        ("a.txt.zst", zst(random.randbytes(999).hex().encode())[:-99]),
    ],
)
def test_files_that_cannot_be_unpacked(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name}: cannot be unpacked: "):
        read_documents(tmp_path)


def test_zst_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.txt.zst").write_bytes(zst(b"one\n<|endoftext|>\n") + zst("zwei é".encode()))  # as `zstd a b` does
    (tmp_path / "b.jsonl.ZST").write_bytes(zst(b'{"text": "three"}\n' * 9999))
    assert read_documents(tmp_path) == ["one\n", "zwei é", *["three"] * 9999]


@pytest.mark.parametrize(
    ("content", "count"),
    [
        ("one\n<|endoftext|>\ntwo\n<|endoftext|>\n\n", 0),
        ("<|endoftext|>\none", 0),
        ("\f \n\f one", 1),
        ("one<|endoftext|>\n\f\f\ntwo", 1),
        ("one\f\f\n\ftwo\f", 2),
    ],
)
def test_blank_documents_between_others_are_counted(tmp_path: Path, content: str, count: int) -> None:
    blank = Blank()
    (tmp_path / "a.txt").write_text(content)
    read_documents(tmp_path, blank=blank)
    assert blank.count == count and (f"{count} documents of x hold" in blank.said("x")) == (count > 0)
    (tmp_path / "b.txt").write_text(" \n")
    (tmp_path / "c.jsonl").write_text('{"text": ""}\n\n{"text": " "}\n')
    pq.write_table(pa.table({"text": ["", "x", " "]}), tmp_path / "d.parquet")
    read_documents(tmp_path, blank=(more := Blank()))
    assert more.count == count + 5


def test_parquet_reads_one_column(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    texts = [f"document {i}" for i in range(23)]
    table = pa.table({"n": list(range(24)), "body": [*texts, " "]})
    pq.write_table(table, file, row_group_size=5)
    assert read_documents(file, "body") == texts


def test_folder_is_read_recursively_in_order(tmp_path: Path) -> None:
    (tmp_path / "b" / "c").mkdir(parents=True)
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "b" / "c" / "one.TXT").write_text("second")
    (tmp_path / "z.txt").write_text("last")
    (tmp_path / "a.jsonl").write_text('{"text": "first"}')
    pq.write_table(pa.table({"text": ["third", "fourth"]}), tmp_path / "b" / "d.parquet")
    (tmp_path / "b" / "notes.md").write_text("passed over")
    (tmp_path / "b" / "empty.txt").write_text("")
    (tmp_path / ".hidden" / "x.txt").write_text("passed over")
    assert read_documents(tmp_path) == ["first", "second", "third", "fourth", "last"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", r"no documents in .*a\.txt"),
        ("a.txt", b" \n\f\n", r"no documents in .*a\.txt"),
        ("a.txt", b"abc\0def", r"a\.txt, line 1: NUL byte at byte 3 of the line: a binary file"),
        ("a.txt", "abc".encode("utf-16"), r"a\.txt, line 1: NUL byte at byte 3"),
        ("a.txt", b"caf\xe9 au lait", r"a\.txt, line 1: not UTF-8 at byte 3 of the line \(0xe9\)"),
        ("a.txt", "é".encode()[:1], r"a\.txt, line 1: not UTF-8 at byte 0 of the line \(0xc3\)"),
        ("a.jsonl", b"\n\n", r"no documents in .*a\.jsonl"),
        ("a.jsonl", b'{"text": "a"}\n{"text": ', r"a\.jsonl, line 2: not JSON: "),
        ("a.jsonl", b"[" * 100_000, r"a\.jsonl, line 1: not JSON: "),
        ("a.jsonl", b'{"text": "a"}\n\n{"body": "b", "id": 1}', r"a\.jsonl, line 3: no field 'text'; .*: body, id \("),
        ("a.jsonl", b"{}", r"a\.jsonl, line 1: no field 'text'; the fields are: none"),
        ("a.jsonl", b'{"text": 3}', r"a\.jsonl, line 1: field 'text' must be a string, but is int"),
        ("a.jsonl", b'{"text": null}', r"a\.jsonl, line 1: field 'text' must be a string, but is null"),
        ("a.jsonl", b'["text"]', r"a\.jsonl, line 1: expected an object, found list"),
        ("a.jsonl", b'{"text": "ab\\ud800"}', r"a\.jsonl, line 1: field 'text': not valid Unicode at character 2"),
        ("a.jsonl", b'{"text": "\xff"}', r"a\.jsonl, line 1: not UTF-8 at byte 10 of the line \(0xff\)"),
        ("a.parquet", b"", r"a\.parquet: not a readable parquet file: "),
        ("a.parquet", b"PAR1 and then nothing PAR1", r"a\.parquet: not a readable parquet file: "),
        ("a.csv", b"text", r"a\.csv: cannot tell what it holds; give \.txt, \.jsonl, \.parquet or a folder"),
    ],
)
def test_unreadable_files_are_named_in_one_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_documents(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_parquet_without_the_column_and_with_other_types(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    pq.write_table(pa.table({"id": [1, 2], "body": ["a", None]}), file)
    with pytest.raises(ValueError, match=r"a\.parquet: no column 'text'; the columns are: id, body"):
        read_documents(file)
    with pytest.raises(ValueError, match=r"a\.parquet, row 1: field 'id' must be a string, but is int"):
        read_documents(file, "id")
    with pytest.raises(ValueError, match=r"a\.parquet, row 2: field 'body' must be a string, but is null"):
        read_documents(file, "body")


def test_truncated_parquet(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [str(i) * 50 for i in range(2000)]}), file)
    data = bytearray(file.read_bytes())
    data[100:1000] = bytes(900)  # the footer is whole, the pages are not
    file.write_bytes(data)
    with pytest.raises(ValueError, match=r"a\.parquet: not a readable parquet file: "):
        read_documents(file)


def test_missing_paths_and_empty_folders(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no such file or folder: .*nowhere"):
        read_documents(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"no \.txt, \.jsonl or \.parquet file in folder"):
        read_documents(tmp_path)
    (tmp_path / "a.txt").touch()
    with pytest.raises(ValueError, match="no documents in"):
        read_documents(tmp_path)
