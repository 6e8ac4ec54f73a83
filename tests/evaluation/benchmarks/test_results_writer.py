"""The file of results: cut off anywhere, damaged, or of another run."""

import json
from pathlib import Path
from typing import Any

import pytest

from opencola.evaluation.benchmarks.results_writer import DRAFT, RESULTS, ResultsWriter, differences

HEADER = {"record": "run", "settings": {"steps": 16, "stop": ("ä",)}, "tasks": {"b": {}, "a": {}}}
SIZES = {"b": 2, "a": 1}
RECORDS = [{"task": "a", "index": 0, "text": "ö\u2028\n"}, {"task": "b", "index": 1}, {"task": "b", "index": 0}]


def write(folder: Path, records: list[dict[str, Any]], finish: bool = True) -> None:
    results = ResultsWriter(folder, HEADER, SIZES)
    with results.open() as draft:
        results.append(draft, records)
    if finish:
        results.finish()


@pytest.fixture
def whole(tmp_path: Path) -> bytes:
    """The file of a run that was not disturbed."""
    write(tmp_path / "whole", RECORDS)
    return (tmp_path / "whole" / RESULTS).read_bytes()


def test_settings_of_other_families_in_an_earlier_file_are_no_difference(tmp_path: Path) -> None:
    earlier = HEADER | {"settings": {**HEADER["settings"], "solver": "euler", "block_length": 16}}  # type: ignore[dict-item]
    results = ResultsWriter(tmp_path, earlier, SIZES)
    with results.open() as draft:
        results.append(draft, RECORDS)
    results.finish()
    assert len(ResultsWriter(tmp_path, HEADER, SIZES).lines) == 3
    with pytest.raises(ValueError, match=r'settings.stop is \["ä"\] there, \["b"\] now'):
        ResultsWriter(tmp_path, HEADER | {"settings": {"steps": 16, "stop": ["b"]}}, SIZES)
    with pytest.raises(ValueError, match="settings.odd is 3 there, null now"):
        odd = HEADER | {"settings": {**HEADER["settings"], "odd": 3}}  # type: ignore[dict-item]
        with ResultsWriter(tmp_path / "odd", odd, SIZES).open():
            ResultsWriter(tmp_path / "odd", HEADER, SIZES)


def test_order_is_that_of_tasks_and_indices(whole: bytes, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in whole.decode().split("\n")[:-1]]
    assert rows[0] == json.loads(json.dumps(HEADER))
    assert rows[1:] == [RECORDS[2], RECORDS[1], RECORDS[0]]
    assert "ö\u2028\\n".encode() in whole
    assert [file.name for file in (tmp_path / "whole").iterdir()] == [RESULTS]
    results = ResultsWriter(tmp_path / "whole", HEADER, SIZES)
    assert list(results.lines) == results.keys and list(results.records()) == rows[1:]


def test_a_draft_cut_off_at_any_byte_loses_only_what_is_cut(whole: bytes, tmp_path: Path) -> None:
    write(tmp_path, RECORDS, finish=False)
    content = (tmp_path / DRAFT).read_bytes()
    ends = [i for i, byte in enumerate(content) if byte == ord("\n")]
    for cut in sorted({0, 1, 60, 160, *(end + place for end in ends for place in (-1, 0, 1))}):
        (tmp_path / DRAFT).write_bytes(content[:cut])
        results = ResultsWriter(tmp_path, HEADER, SIZES)
        assert len(results.lines) == max(0, sum(end < cut for end in ends) - 1)
        missing = [record for record in RECORDS if (record["task"], record["index"]) not in results.lines]
        with results.open() as draft:
            results.append(draft, missing)
        assert len((tmp_path / DRAFT).read_bytes()) == len(content)
        results.finish()
        assert (tmp_path / RESULTS).read_bytes() == whole and not (tmp_path / DRAFT).exists()
        (tmp_path / RESULTS).unlink()


@pytest.mark.parametrize(
    "damage",
    [b"\x00\x00\x00", b"{", b"[1]", b'{"task": ["a"], "index": 0}', b'{"task": "a", "index": 7}', b"\xff{}",
     b'{"task": "c", "index": 0}', b'{"task": "a"}', b'"'],
)  # fmt: skip
@pytest.mark.parametrize("place", [1, 2, 3])
def test_damaged_lines_are_made_again(whole: bytes, tmp_path: Path, damage: bytes, place: int) -> None:
    lines = whole.split(b"\n")
    lines[place] = damage
    (tmp_path / RESULTS).write_bytes(b"\n".join(lines))
    results = ResultsWriter(tmp_path, HEADER, SIZES)
    assert len(results.lines) == 2
    with results.open() as draft:
        results.append(draft, RECORDS)
    results.finish()
    assert (tmp_path / RESULTS).read_bytes() == whole


def test_earlier_results_stay_until_the_new_ones_are_whole(whole: bytes, tmp_path: Path) -> None:
    """Of the same run, and of another: overwritten, cut off, gone on with, and only then replaced."""
    other = HEADER | {"settings": {"steps": 8, "stop": ()}}
    for header in (HEADER, other):
        (tmp_path / RESULTS).write_bytes(whole)
        results = ResultsWriter(tmp_path, header, SIZES, overwrite=True)
        assert not results.lines
        with results.open() as draft:
            results.append(draft, [RECORDS[0] | {"text": "new"}])
        assert (tmp_path / RESULTS).read_bytes() == whole
        results = ResultsWriter(tmp_path, header, SIZES)
        assert [json.loads(line)["text"] for line in results.lines.values()] == ["new"], "the draft alone counts"
        with results.open() as draft:
            results.append(draft, RECORDS[1:])
        assert (tmp_path / RESULTS).read_bytes() == whole
        results.finish()
        assert b'"new"' in (tmp_path / RESULTS).read_bytes() and not (tmp_path / DRAFT).exists()
    (tmp_path / RESULTS).write_bytes(whole)
    ResultsWriter(tmp_path, other, SIZES, overwrite=True).open().close()
    with pytest.raises(ValueError, match=f"{DRAFT} is of another run: settings.steps is 8 there, 16 now"):
        ResultsWriter(tmp_path, HEADER, SIZES)
    assert (tmp_path / RESULTS).read_bytes() == whole


def test_a_damaged_first_line_is_an_error(whole: bytes, tmp_path: Path) -> None:
    for name in (RESULTS, DRAFT):
        (tmp_path / name).write_bytes(b"{" + whole)
        with pytest.raises(ValueError, match=rf"{name}: line 1 is damaged.*--overwrite"):
            ResultsWriter(tmp_path, HEADER, SIZES)
        (tmp_path / name).unlink()
    (tmp_path / RESULTS).write_bytes(b"")
    with pytest.raises(ValueError, match="line 1 is damaged"):
        ResultsWriter(tmp_path, HEADER, SIZES)


def test_another_run_is_refused_and_what_differs_is_named(whole: bytes, tmp_path: Path) -> None:
    (tmp_path / RESULTS).write_bytes(whole)
    other = {**HEADER, "settings": {"steps": 8, "stop": ("ä",)}, "tasks": {"b": {"records": 3}, "a": {}}}
    with pytest.raises(ValueError, match="another run") as error:
        ResultsWriter(tmp_path, other, SIZES)
    assert "settings.steps is 16 there, 8 now; tasks.b.records is null there, 3 now. Choose" in str(error.value)
    assert (tmp_path / RESULTS).read_bytes() == whole
    many = {f"f{i}": i for i in range(9)}
    with pytest.raises(ValueError, match=r"f3 is null there, 3 now, and 8 more"):
        ResultsWriter(tmp_path, many, SIZES)


def test_differences_in_words() -> None:
    assert list(differences({"a": 1, "b": {"c": [1], "d": "x" * 99}}, {"a": 1, "b": {"c": [1, 2]}})) == [
        "b.c is [1] there, [1, 2] now",
        'b.d is "' + "x" * 35 + " ... there, null now",
    ]
    assert list(differences({"a": {}}, {"a": 3})) == ["a is {} there, 3 now"]


def test_what_is_no_number_of_json_is_never_written(tmp_path: Path) -> None:
    results = ResultsWriter(tmp_path, HEADER, SIZES)
    with results.open() as draft, pytest.raises(ValueError):
        results.append(draft, [{"task": "a", "index": 0, "nats": float("nan")}])
