"""Rows as the datasets of the Hub have them, written for these tests, and what becomes of them."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from opencola.evaluation.benchmarks.hub import MAPPINGS, SOURCES, read_hub, to_questions
from opencola.evaluation.benchmarks.tasks import TASKS, find_task, read_demonstrations, read_questions

DEVELOPMENT = Path("/work/shared/data/eval")

ROWS: Mapping[str, Mapping[str, Any]] = {
    "lambada": {"text": "“Why?”\nshe said. He gave no\nreason"},
    "mmlu": {"question": "2 + 2 is ", "subject": "arithmetic", "choices": ["3", "4", "5", "6"], "answer": 1},
    "obqa": {
        "id": "8-376",
        "question_stem": "Ice is made of",
        "choices": {"text": ["air", "sand", "water", "wood"], "label": ["A", "B", "C", "D"]},
        "answerKey": "C",
    },
    "hellaswag": {
        "ind": 24, "activity_label": "Roofing", "ctx_a": "A man sits on a roof.", "ctx_b": "he",
        "ctx": "A man sits on a roof. he", "endings": ["flies off.", "sings.", "eats it.", "fixes a tile."],
        "source_id": "activitynet~v_x", "split": "val", "split_type": "indomain", "label": "3",
    },
    "race": {
        "example_id": "high1.txt", "article": "Ann has a dog.\nIt barks. \n", "question": " What does the dog do? ",
        "options": ["It runs.", "It barks.", "It eats.", "It sleeps."], "answer": "B",
    },
    "siqa": {
        "context": "Tracy gave Kim a book.", "question": "How would Kim feel?",
        "answerA": "sad", "answerB": "glad", "answerC": "tired", "label": "2\n",
    },
    "squad": {
        "id": "56be", "title": "Rome", "context": "Rome is old.", "question": "What is Rome?",
        "answers": {"text": ["old", "very old"], "answer_start": [8, 8]},
    },
    "story_cloze": {
        "InputStoryid": "a1-b2", "InputSentence1": "It rained.", "InputSentence2": "Ann ran.",
        "InputSentence3": "She fell.", "InputSentence4": "She got up.", "RandomFifthSentenceQuiz1": "She was dry.",
        "RandomFifthSentenceQuiz2": "She was wet.", "AnswerRightEnding": "2",
    },
}  # fmt: skip
QUESTIONS = {
    "lambada": "“Why?”\nshe said. He gave no",
    "mmlu": "Question: 2 + 2 is \n(A) 3\n(B) 4\n(C) 5\n(D) 6\nAnswer:",
    "obqa": "Question: Ice is made of\n(A) air\n(B) sand\n(C) water\n(D) wood\nAnswer:",
    "hellaswag": (
        "Context: A man sits on a roof. he\n(A) flies off.\n(B) sings.\n(C) eats it.\n(D) fixes a tile.\nAnswer:"
    ),
    "race": (
        "Article: Ann has a dog.\nIt barks. What does the dog do?\nOptions:\n"
        "(A) It runs.\n(B) It barks.\n(C) It eats.\n(D) It sleeps.\nAnswer:"
    ),
    "siqa": "Question: How would Kim feel?\n(A) sad\n(B) glad\n(C) tired\nAnswer:",
    "squad": "Context: Rome is old.\nQuestion: What is Rome?\nAnswer:",
    "story_cloze": "Story: It rained. Ann ran. She fell. She got up.\n(A) She was dry.\n(B) She was wet.\nEnd:",
}
ANSWERS = {
    "lambada": "reason", "mmlu": "4", "obqa": "water", "hellaswag": "fixes a tile.", "race": "It barks.",
    "siqa": "glad", "squad": "old", "story_cloze": "She was wet.",
}  # fmt: skip
IDS = {"lambada": [1, 2], "squad": ["56be"] * 2, "story_cloze": ["a1-b2"] * 2}


def test_every_task_has_a_mapping() -> None:
    assert [*MAPPINGS] == [task.name for task in TASKS]
    assert {*SOURCES} | {"story_cloze"} == {*MAPPINGS}


@pytest.mark.parametrize("name", ROWS)
def test_a_row_becomes_a_question_and_its_answer(name: str) -> None:
    task = find_task(name)
    first, second = to_questions(task, [ROWS[name]] * 2, "rows")
    assert (task.ask(first), first.answer) == (QUESTIONS[name], ANSWERS[name])
    assert [first.id, second.id] == IDS.get(name, [0, 1])
    if task.options:
        assert first.answer_index is not None and first.choices[first.answer_index] == first.answer
    assert task.prompt(first, read_demonstrations()[name]).endswith(task.ask(first))
    assert task.grade(first, f" {first.answer}\n").correct


@pytest.mark.parametrize("name", ROWS)
def test_the_mapped_row_is_a_line_of_the_tasks_file(name: str, tmp_path: Path) -> None:
    """The same record comes from JSONL, fields and all; the development records have the same fields."""
    task = find_task(name)
    made = MAPPINGS[name](ROWS[name], 0)
    (tmp_path / f"{name}.jsonl").write_text(json.dumps(made) + "\n")
    assert read_questions(tmp_path, task) == [*to_questions(task, [ROWS[name]], "rows")]
    if DEVELOPMENT.exists():
        shipped = json.loads((DEVELOPMENT / f"{name}.jsonl").read_text().split("\n")[0])
        assert {*shipped} == {*made}
        if name != "story_cloze":
            assert type(shipped["id"]) is type(made["id"])


@pytest.mark.parametrize("name", ROWS)
def test_a_row_of_another_kind_is_named(name: str) -> None:
    row = dict(ROWS[name])
    lacking = next(iter(row)) if name in ("lambada", "squad", "story_cloze") else "choices"
    lacking = {"hellaswag": "label", "race": "options", "siqa": "answerC"}.get(name, lacking)
    del row[lacking]
    with pytest.raises(ValueError, match=f"rows, row 1: not as .*'{lacking}'"):
        list(to_questions(find_task(name), [ROWS[name], row], "rows"))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("mmlu", {"answer": -1}),  # as in splits without labels
        ("mmlu", {"answer": 4}),
        ("hellaswag", {"label": ""}),
        ("race", {"answer": "E"}),
        ("siqa", {"label": "0"}),
        ("obqa", {"answerKey": "X"}),
        ("squad", {"answers": {"text": [], "answer_start": []}}),
        ("lambada", {"text": "alone"}),
        ("mmlu", {"choices": ["a", "b"]}),
        ("mmlu", {"question": None}),
    ],
)
def test_a_row_without_an_answer_is_refused(name: str, change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="rows, row 0: "):
        list(to_questions(find_task(name), [{**ROWS[name], **change}], "rows"))


def test_the_hub_is_asked_for_the_right_split_and_no_more_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    given = []

    def load_dataset(*place: Any, **options: Any) -> Any:
        asked.append((place, options))
        name = next(name for name, source in SOURCES.items() if source.dataset == place[0])
        for number in range(5):
            given.append(number)
            yield ROWS[name]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    for name in SOURCES:
        assert len(read_hub(find_task(name), 2)) == 2
    assert given == [0, 1] * len(SOURCES)
    assert len(read_hub(find_task("mmlu"))) == 5
    place, options = asked[1]
    assert place == ("cais/mmlu", "all")
    assert options["split"] == "test" and options["streaming"] is True and options["revision"] is None
    assert asked[0][1]["revision"] == "refs/convert/parquet" and asked[0][1]["data_dir"] == "default"


def test_the_hub_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*place: Any, **options: Any) -> Any:
        raise ConnectionError("Couldn't reach 'cais/mmlu'\nand a long story")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(ValueError, match="cannot read cais/mmlu: Couldn't reach 'cais/mmlu'; without.*mmlu.jsonl$"):
        read_hub(find_task("mmlu"), 1)


def test_an_empty_dataset_and_a_limit_of_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=lambda *place, **options: []))
    with pytest.raises(ValueError, match="cais/mmlu, test: no records"):
        read_hub(find_task("mmlu"))
    with pytest.raises(ValueError, match="at least 1, but is 0"):
        read_hub(find_task("mmlu"), 0)


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="MMLU from the Hub needs the package datasets: pip install"):
        read_hub(find_task("mmlu"), 1)


def test_story_cloze_needs_no_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    (tmp_path / "val.csv").write_text(csv_text())
    assert len(read_hub(find_task("story_cloze"), None, tmp_path / "val.csv")) == 2


def csv_text() -> str:
    columns = ROWS["story_cloze"]
    rows = [columns, {**columns, "InputStoryid": "c3", "InputSentence1": 'She said, "No."', "AnswerRightEnding": "1"}]
    quoted = [",".join('"' + value.replace('"', '""') + '"' for value in row.values()) for row in rows]
    return "\n".join([",".join(columns), *quoted]) + "\n"


def test_story_clozes_own_file(tmp_path: Path) -> None:
    task, file = find_task("story_cloze"), tmp_path / "cloze_test_val.csv"
    file.write_text("\ufeff" + csv_text())
    one, other = read_hub(task, None, file)
    assert (one.id, one.answer, other.id, other.answer) == ("a1-b2", "She was wet.", "c3", "She was dry.")
    assert other.question == 'She said, "No." Ann ran. She fell. She got up.'
    assert read_hub(task, 1, file) == [one]
    file.write_text(csv_text().replace("AnswerRightEnding", "Other"))  # the tests of 2018 have no answers
    with pytest.raises(ValueError, match=r"cloze_test_val.csv, row 0: not as Story Cloze's rows.*'AnswerRightEnding'"):
        read_hub(task, None, file)
    file.write_text("")
    with pytest.raises(ValueError, match="no records"):
        read_hub(task, None, file)
    file.write_bytes(csv_text().encode().replace(b"No.", b"\xff"))
    with pytest.raises(ValueError, match="cloze_test_val.csv: not a CSV file in UTF-8"):
        read_hub(task, None, file)
    with pytest.raises(ValueError, match="authors give it out on request"):
        read_hub(task)
    with pytest.raises(FileNotFoundError):
        read_hub(task, None, tmp_path / "none.csv")
