"""Batches, ids, choices and records, with a model that is a table."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import pytest

from opencola.errors import NotFiniteError
from opencola.evaluation.benchmarks.answering import (
    Answers,
    Ask,
    Job,
    about_stories,
    answer,
    benchmark,
    choose,
    figures,
    make_batches,
    summary,
    to_records,
)
from opencola.evaluation.benchmarks.tasks import Question, find_task
from opencola.evaluation.writing import continue_stories, held_out, predict_last_words

OBQA = find_task("obqa")
SHOTS = [Question(i, f"q{i}?", "a", ("a", "b", "c", "d")) for i in range(2)]
RECORDS = [
    Question("x", "Which?", "blue sky", ("red", "blue sky", "ö", "green"), answer_index=1),
    Question("y", "", "B", ("red", "blue", "so", "green"), prompt="READY \n", few_shot_prefix="BEFORE "),
    Question("z", "Which other, of them all?", "nothing", ("red", "blue", "so", "green")),
]


def echo(prompts: Sequence[str], ids: Sequence[int]) -> list[str]:
    return [f" {i}: {prompt[:3]}" for i, prompt in zip(ids, prompts, strict=True)]


def all_records(job: Job, size: int, **model: Any) -> list[dict[str, Any]]:
    batches = [answer(batch, model.get("write", echo), model.get("score")) for batch in make_batches(job, size)]
    found = [record for answers in batches for record in to_records(job, answers)]
    return sorted(found, key=lambda record: record["index"])


@pytest.mark.parametrize("size", [1, 2, 3, 50])
def test_records_are_the_same_in_batches_of_any_size(size: int) -> None:
    job = benchmark(OBQA, RECORDS, SHOTS)
    assert all_records(job, size) == all_records(job, 1)
    batches = make_batches(job, size)
    assert sorted(i for batch in batches for i in batch.ids) == [0, 1, 2]
    assert max(len(batch.ids) for batch in batches) == min(size, 3)
    lengths = [len(prompt) for batch in batches for prompt in batch.prompts]
    assert lengths == sorted(lengths, reverse=True)


def test_prompts_ids_and_verdicts() -> None:
    said = {0: " BLUE  sky.\nQuestion:", 1: "\n(b)", 2: "whatever\nB"}
    asked: dict[int, str] = {}

    def write(prompts: Sequence[str], ids: Sequence[int]) -> list[str]:
        asked.update(zip(ids, prompts, strict=True))
        return [said[i] for i in ids]

    first, second, third = all_records(benchmark(OBQA, RECORDS, SHOTS), 2, write=write)
    assert asked == {0: OBQA.prompt(RECORDS[0], SHOTS), 1: "BEFORE READY \n", 2: OBQA.prompt(RECORDS[2], SHOTS)}
    assert list(first) == [
        "record", "task", "index", "id", "prompt", "generation", "truncated", "choice", "gold", "correct", "parsed",
        "agrees", "answer", "options", "likelihood",
    ]  # fmt: skip
    assert json.loads(json.dumps(first)) == {
        "record": "answer", "task": "obqa", "index": 0, "id": "x", "prompt": asked[0], "generation": said[0],
        "truncated": " BLUE  sky.", "choice": 1, "gold": 1, "correct": True, "parsed": True, "agrees": True,
        "answer": "blue sky", "options": ["red", "blue sky", "ö", "green"], "likelihood": None,
    }  # fmt: skip
    assert (second["choice"], second["gold"], second["correct"], second["prompt"]) == (1, 1, True, asked[1])
    assert (third["truncated"], third["choice"], third["gold"], third["correct"]) == ("whatever", None, None, False)


def test_likelihoods_are_of_a_space_and_the_option_under_the_records_id() -> None:
    table = {"red": -3.0, "blue sky": -4.0, "ö": -2.5, "green": -9.0000004, "blue": -8.0, "so": -3.0}
    calls: list[tuple[str, str, int]] = []

    def score(pairs: Sequence[tuple[str, str]], ids: Sequence[int]) -> list[float]:
        calls.extend((prompt, option, i) for (prompt, option), i in zip(pairs, ids, strict=True))
        assert all(option.startswith(" ") for _, option in pairs)
        return [table[option[1:]] for _, option in pairs]

    job = benchmark(OBQA, RECORDS, SHOTS)
    first, second, third = (record["likelihood"] for record in all_records(job, 2, score=score))
    assert sorted(calls) == sorted((job.prompts[i], f" {o}", i) for i, r in enumerate(RECORDS) for o in r.choices)
    # per byte: -1, -0.5, -1.25 (ö has two bytes), -1.8
    assert first == {
        "sum": [-3.0, -4.0, -2.5, -9.0], "bytes": [3, 8, 2, 5], "choice_sum": 2, "choice_per_byte": 1,
        "correct_sum": False, "correct_per_byte": True,
    }  # fmt: skip
    # per byte: -1, -2, -1.5, -1.8; of equals the first; gold is mapped from "B"
    assert second == {
        "sum": [-3.0, -8.0, -3.0, -9.0], "bytes": [3, 4, 2, 5], "choice_sum": 0, "choice_per_byte": 0,
        "correct_sum": False, "correct_per_byte": False,
    }  # fmt: skip
    assert (third["correct_sum"], third["correct_per_byte"]) == (None, None)


def test_what_is_not_finite_is_found_item_by_item_and_counted() -> None:
    def write(prompts: Sequence[str], ids: Sequence[int]) -> list[str]:
        if 1 in ids:
            raise NotFiniteError(f"sample 1 of {len(ids)}")
        return [f"\n{'blue sky' if i == 0 else 'other'}" for i in ids]

    def score(pairs: Sequence[tuple[str, str]], ids: Sequence[int]) -> list[float]:
        if 2 in ids:
            raise NotFiniteError(f"record 2 of {len({*ids})}")
        return [-float(len(option)) for _, option in pairs]

    job = benchmark(OBQA, RECORDS, SHOTS)
    whole = [answer(batch, write, score, True) for batch in make_batches(job, 3)]
    first, second, third = sorted(to_records(job, whole[0]), key=lambda record: record["index"])
    assert "not_finite" not in first and first["correct"] and first["likelihood"]["choice_sum"] == 2
    assert (second["generation"], second["correct"], second["not_finite"]) == ("", False, "sample 1 of 1")
    assert second["likelihood"]["sum"] == [-4.0, -5.0, -3.0, -6.0]
    assert (third["generation"], third["not_finite"]) == ("\nother", "record 2 of 1")
    assert third["likelihood"] == {
        "sum": [None] * 4, "bytes": [3, 4, 2, 5], "choice_sum": None, "choice_per_byte": None, "correct_sum": None,
        "correct_per_byte": None,
    }  # fmt: skip
    assert choose([], ["a", "b"], 1)["correct_sum"] is False
    lines = list(figures([first, second, third]))
    assert [line["not_finite"] for line in lines[:-1]] == [2] * 3
    assert lines[-1] == {"task": None, "measure": "tasks average", "value": 1 / 3, "tasks": ["obqa"]}
    for asked, message in ((score, "sample 1 of 3"), (None, "sample 1 of 3")):
        with pytest.raises(NotFiniteError, match=message):
            answer(make_batches(job, 3)[0], write, asked)


def test_choices_of_empty_options_and_of_figures_that_are_none() -> None:
    assert choose([-2.0, -1.0], ["", "a"], 1)["choice_per_byte"] == 1
    with pytest.raises(ValueError, match="not all finite"):
        choose([-2.0, float("nan")], ["a", "b"], 1)
    with pytest.raises(ValueError, match="not all finite"):
        choose([-2.0, float("-inf")], ["a", "b"], 1)


def test_tasks_without_options_are_not_scored() -> None:
    def score(pairs: Sequence[tuple[str, str]], ids: Sequence[int]) -> list[float]:
        raise AssertionError

    job = benchmark(find_task("lambada"), [Question(0, "Once upon a", "time")], [])
    (record,) = all_records(job, 1, score=score, write=lambda prompts, ids: [" Time and"])
    assert record["correct"] and record["likelihood"] is None and record["prompt"] == "Once upon a"


def test_stories_are_judged_as_by_themselves() -> None:
    stories = held_out(5)
    texts = [tale.text[len(" ".join(tale.sentences[:2])) :] for tale in stories]
    texts[3] = " The moon ate it."
    words = [" " + tale.text.split()[-1] for tale in stories]
    words[1] = " moon."
    asked: list[tuple[str, Ask, list[str], int]] = [
        ("stories", continue_stories, texts, 40),
        ("last_word", predict_last_words, words, 3),
    ]
    for name, ask, said, budget in asked:
        job = about_stories(name, "story", stories, ask, budget)

        def write(prompts: Sequence[str], ids: Sequence[int], said: list[str] = said) -> list[str]:
            return [said[i] for i in ids]

        found = all_records(job, 2, write=write)
        expected = ask(stories, lambda prompts, budget, said=said: said, budget)
        head = [{"record": "story", "task": name, "index": i} for i in range(5)]
        assert found == [one | asdict(record) for one, record in zip(head, expected, strict=True)]
        assert job.prompts == tuple(record.prompt for record in expected)
        assert [batch.max_new_tokens for batch in make_batches(job, 3)] == [budget, budget]
        assert all_records(job, 2, write=write, score=lambda pairs, ids: []) == found


def test_summary_counts_what_is_right() -> None:
    def one(task: str, right: bool, likelihood: tuple[bool | None, bool] | None = None) -> dict[str, Any]:
        scored = None if likelihood is None else dict(zip(("correct_sum", "correct_per_byte"), likelihood, strict=True))
        return {"record": "answer", "task": task, "correct": right, "likelihood": scored}

    records = [one("b", True, (True, True)), one("b", False, (None, False)), one("a", False)]
    records += [{"record": "story", "task": "stories", "consistent": True, "complete": False}]
    shares = {key: (share.value, share.count) for key, share in summary(records).items()}
    assert shares == {
        ("b", "right"): (0.5, 2), ("b", "likeliest option"): (1.0, 1), ("b", "likeliest option, per byte"): (0.5, 2),
        ("a", "right"): (0.0, 1), ("stories", "right"): (1.0, 1),
    }  # fmt: skip
    assert next(iter(shares)) == ("b", "right")


def test_another_number_of_texts_than_prompts_is_an_error() -> None:
    (batch,) = make_batches(benchmark(OBQA, RECORDS, SHOTS), 3)
    with pytest.raises(ValueError):
        to_records(benchmark(OBQA, RECORDS, SHOTS), Answers(batch, ["a"], None))
