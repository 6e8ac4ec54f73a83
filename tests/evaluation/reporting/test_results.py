import json
from pathlib import Path
from typing import Any

import pytest
from results_files import answer, answers, head, sample, scored, stories, write

from opencola.evaluation.reporting.results import read_results
from opencola.evaluation.writing import continuation_shares, held_out, judge


def test_what_was_written_is_read(tmp_path: Path) -> None:
    first, second = answers("mmlu", ["on a hill", "B"])
    told = stories(4)
    rows = [head({"mmlu": 2, "obqa": 3, "stories": 4, "last_word": 4, "samples": 3}), second, *told, first]
    rows += [sample(1.0, 0), sample(None, 0), sample(0.5, 0, {"name": "j", "nats": 2, "tokens": 1, "bytes": 6})]
    file = write(tmp_path / "results.jsonl", *rows)
    file.write_text(file.read_text().replace("\n", "\n\n"))
    found = read_results(file)
    assert found.run == rows[0]
    assert [one.id for one in found.answers["mmlu"]] == ["mmlu-0", "mmlu-1"], "in the order of their indices"
    assert found.answers["obqa"] == () and [*found.answers] == ["mmlu", "obqa"]
    one, other = found.answers["mmlu"]
    assert (one.correct, one.generation, one.gold, other.choice) == (True, "on a hill", 1, 1)
    assert len(found.stories) == len(found.last_words) == 4
    tale = held_out(1)[0]
    prompt = " ".join(tale.sentences[:2])
    assert found.stories[0] == judge(prompt, tale.text[len(prompt) :], tale.text[len(prompt) :])
    assert continuation_shares(found.stories)["original_continuations"].value == 0.5
    assert [one.temperature for one in found.samples] == [None, 0.5, 1.0]
    assert found.counts == {"mmlu": (2, 2), "obqa": (0, 3), "stories": (4, 4), "last_word": (4, 4), "samples": (3, 3)}
    assert found.unfinished == {"obqa": (0, 3)}


DAMAGED: list[tuple[dict[str, Any], str]] = [
    ({"record": "answers"}, "field 'record' is 'answers', not one of answer, story"),
    ({"task": "obqa"}, "field 'task' is 'obqa', which the run in line 1 does not have"),
    ({"task": "stories"}, "field 'task' is 'stories', which"),
    ({"task": None}, "field 'task' is None, not of type str"),
    ({"correct": 1}, "field 'correct' is 1, not of type bool"),
    ({"index": True}, "field 'index' is True, not of type int"),
    ({"index": 0}, "field 'index' is 0, as in an earlier record of mmlu"),
    ({"choice": "B"}, "field 'choice' is 'B', not of type"),
    ({"options": ["a", 1]}, r"field 'options' is \['a', 1\], not a list of texts"),
    ({"options": None}, "field 'options' is None, not of type list"),
    ({"id": 1.5}, "field 'id' is 1.5, not of type"),
    ({"generation": None}, "field 'generation' is None"),
    ({"likelihood": {"sum": []}}, "likelihood: field 'correct_sum' is missing"),
    ({"likelihood": scored(True, None) | {"correct_sum": "yes"}}, "field 'correct_sum' is 'yes'"),
]


@pytest.mark.parametrize(("change", "message"), DAMAGED)
def test_a_damaged_answer_is_named(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    rows = [head({"mmlu": 2, "stories": 1}), *answers("mmlu", ["on a hill", "B"])]
    rows[2] |= change
    with pytest.raises(ValueError, match=f"results.jsonl, line 3.*{message}"):
        read_results(write(tmp_path / "results.jsonl", *rows))


@pytest.mark.parametrize("name", [name for name in answer("mmlu", 0, "") if name not in ("prompt", "truncated")])
def test_a_missing_field_is_named(name: str, tmp_path: Path) -> None:
    row = answer("mmlu", 0, "B")
    del row[name]
    with pytest.raises(ValueError, match=f"line 2: field '{name}' is missing"):
        read_results(write(tmp_path / "results.jsonl", head({"mmlu": 1}), row))


@pytest.mark.parametrize(
    ("number", "change", "message"),
    [
        (0, {"legal": [1]}, "field 'legal'"),
        (0, {"conflicts": [1]}, "field 'conflicts'"),
        (0, {"sentences": [1]}, "field 'sentences' holds 1"),
        (0, {"sentences": [{"text": "a"}]}, "sentences: field 'fault' is missing"),
        (0, {"log_probability": "x"}, "field 'log_probability'"),
        (1, {"probability": None}, "field 'probability'"),
        (2, {"temperature": [1]}, "field 'temperature'"),
        (2, {"judge": {"name": "j", "nats": 1.0, "tokens": "x", "bytes": 1}}, "judge: field 'tokens'"),
    ],
)
def test_other_damaged_records_are_named(number: int, change: dict[str, Any], message: str, tmp_path: Path) -> None:
    rows = [head({"stories": 1, "last_word": 1, "samples": 1}), *stories(1), sample(1.0, 0)]
    rows[number + 1] |= change
    with pytest.raises(ValueError, match=f"results.jsonl, line {number + 2}.*{message}"):
        read_results(write(tmp_path / "results.jsonl", *rows))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"record": "answer"}, "not the head of a results file"),
        ({"model": None}, "field 'model' is None"),
        ({"seed": True}, "field 'seed' is True"),
        ({"tasks": {"chess": {"records": 1}}}, "field 'tasks': unknown task 'chess'"),
        ({"tasks": {"mmlu": 1}}, "field 'tasks': mmlu is 1, not an object"),
        ({"tasks": {"mmlu": {}}}, "tasks, mmlu: field 'records' is missing"),
        ({"likelihood": {}}, "likelihood: field 'estimator' is missing"),
    ],
)
def test_a_damaged_head_is_named(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"results.jsonl, line 1.*{message}"):
        read_results(write(tmp_path / "results.jsonl", head({"mmlu": 1}) | change))


def test_files_that_hold_something_else(tmp_path: Path) -> None:
    file = tmp_path / "results.jsonl"
    with pytest.raises(FileNotFoundError):
        read_results(file)
    for text, message in (
        ("", "results.jsonl: no results"),
        ("[1]\n", "line 1: expected an object, found list"),
        (json.dumps(head({"mmlu": 1})), "results.jsonl: no results"),  # cut off
        (json.dumps(head({"mmlu": 1})) + '\n{"record": "ans\n', "line 2: not JSON"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_results(file)
    file.write_bytes(b"\xff\xfe\n")
    with pytest.raises(ValueError, match="line 1: not UTF-8 at byte 0"):
        read_results(file)
    file.write_text("[" * 100_000 + "\n")
    with pytest.raises(ValueError, match="line 1: not JSON"):
        read_results(file)


@pytest.mark.parametrize("cut", [1, 2, 20, 100])
def test_a_draft_that_was_cut_off_is_not_finished(cut: int, tmp_path: Path) -> None:
    """`opencola evaluate` takes nothing for a record whose line has no end, either."""
    file = write(tmp_path / "results.draft.jsonl", head({"mmlu": 2}), *answers("mmlu", ["on a hill", "B"]))
    file.write_text(file.read_text()[:-cut])
    found = read_results(file)
    assert found.unfinished == {"mmlu": (1, 2)} and found.answers["mmlu"][0].correct
