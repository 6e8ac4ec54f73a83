"""Figures of files small enough to count by hand."""

import math
from pathlib import Path
from typing import Any

import pytest
from results_files import answer, answers, head, sample, scored, stories, write

from opencola.evaluation.reporting.results import Results, read_results
from opencola.evaluation.reporting.summary import Summary, pairs, rows, summarise, warnings
from opencola.evaluation.statistics import wilson
from opencola.evaluation.writing import held_out
from opencola.worlds.stories import last_word_choices

RIGHT, WRONG, LETTER, NONE = "on a hill", "in the sea", "(A)", "who knows?"


@pytest.fixture
def results(tmp_path: Path) -> Any:
    def make(name: str, *lines: Any) -> Results:
        return read_results(write(tmp_path / f"{name}.jsonl", *lines))

    return make


def by_figure(summary: Summary) -> dict[tuple[str, str], dict[str, Any]]:
    return {(row["task"], row["figure"]): row for row in rows([summary])}


def test_figures_of_one_model_by_hand(results: Any) -> None:
    """MMLU: 8 records, 3 right, 2 wrong, 3 name no option. HellaSwag: 4, 1 right, 1 the right letter only."""
    said = [RIGHT] * 3 + [WRONG] * 2 + [NONE] * 3
    swag = answers("hellaswag", [RIGHT, "(B)", WRONG, NONE])
    (found,) = summarise([results("a", head({"mmlu": 8, "hellaswag": 4}), *answers("mmlu", said), *swag)])
    assert [part.task.name for part in found.tasks] == ["mmlu", "hellaswag"]
    figures = by_figure(found)
    for (task, name), (hits, count) in {
        ("mmlu", "accuracy"): (3, 8),
        ("mmlu", "parse_rate"): (5, 8),
        ("mmlu", "accuracy_given_parse"): (3, 5),
        ("hellaswag", "accuracy"): (1, 4),
        ("hellaswag", "parse_rate"): (3, 4),
        ("hellaswag", "accuracy_given_parse"): (2, 3),
    }.items():
        row = figures[task, name]
        low, high = wilson(hits, count)
        assert (row["value"], row["count"], row["unit"]) == (pytest.approx(100 * hits / count), count, "%"), name
        assert (row["low"], row["high"]) == (pytest.approx(100 * low), pytest.approx(100 * high))
    corrected = figures["mmlu", "chance_corrected_accuracy"]
    assert corrected["value"] == pytest.approx(100 * (3 / 8 - 1 / 4) / (3 / 4))
    assert corrected["low"] == pytest.approx(100 * (wilson(3, 8)[0] - 1 / 4) / (3 / 4))
    assert figures["mmlu", "chance"]["value"] == 25
    average = figures[None, "tasks_average"]
    assert average["value"] == pytest.approx(100 * (3 / 8 + 1 / 4) / 2), "of tasks, not of records"
    assert average["tasks"] == ["mmlu", "hellaswag"]
    assert figures["mmlu", "records"]["value"] == figures["mmlu", "records"]["asked"] == 8
    assert warnings([found]) == [] and pairs([found]) == []
    assert not any(name.startswith("likelihood") for _, name in figures)


def test_likelihoods_count_where_the_right_option_is_known(results: Any) -> None:
    ways = [scored(True, False), scored(True, None), scored(False, False), None, scored(None, None)]
    lines = [answer("mmlu", i, NONE, way) for i, way in enumerate(ways)]
    (found,) = summarise([results("a", head({"mmlu": 5}, likelihood={"estimator": "ELBO, K = 8"}), *lines)])
    figures = by_figure(found)
    by_sum, by_byte = (figures["mmlu", f"likelihood_accuracy_{way}"] for way in ("by_sum", "by_byte"))
    assert (by_sum["value"], by_sum["count"]) == (pytest.approx(200 / 3), 3)
    assert (by_byte["value"], by_byte["count"]) == (0, 2)
    assert by_sum["estimator"] == "ELBO, K = 8" and "estimator" not in figures["mmlu", "accuracy"]
    assert figures["mmlu", "accuracy"]["value"] == 0, "likelihoods are no answers"


def test_two_models_on_the_same_records(results: Any) -> None:
    """Both right on 1, only the first on 6, neither on 1; two more were answered by one of them only."""
    one = results("a", head({"mmlu": 10}), *answers("mmlu", [RIGHT] * 7 + [WRONG] + [RIGHT]))
    other = results(
        "b",
        head({"mmlu": 10}, model="other"),
        *answers("mmlu", [RIGHT] + [WRONG] * 7),
        answer("mmlu", 9, RIGHT),
    )
    both = summarise([one, other])
    (pair,) = pairs(both)
    tested = pair.paired
    assert (pair.first, pair.second, pair.task.name, pair.count) == ("mine", "other", "mmlu", 8)
    assert (tested.both, tested.only_first, tested.only_second, tested.neither) == (1, 6, 0, 1)
    assert tested.p_value == 2 / 2**6
    (row,) = [row for row in rows(both) if row["figure"] == "difference"]
    assert row["models"] == ["mine", "other"] and row["p_value"] == 1 / 32
    assert (row["value"], row["unit"], row["count"]) == (75, "percentage points", 8)
    assert warnings(both) == [
        "mine is not finished; records: MMLU 9 of 10.",
        "other is not finished; records: MMLU 9 of 10.",
    ]
    (back,) = pairs(both[::-1])
    assert back.paired.difference == -tested.difference and back.first == "other"


def test_what_is_compared_is_being_right_by_the_rule(results: Any) -> None:
    """HellaSwag wants the text; its letter is forgiven in the accuracy of parsed answers only."""
    said = {"a": WRONG, "b": "(B)"}
    files = [results(name, head({"hellaswag": 1}), *answers("hellaswag", [text])) for name, text in said.items()]
    one, other = (found.answers["hellaswag"][0] for found in files)
    assert not one.correct and not other.correct and other.agrees
    (pair,) = pairs(summarise(files))
    assert (pair.paired.neither, pair.paired.only_second) == (1, 0)


def test_records_of_one_id_that_ask_something_else_are_not_compared(results: Any) -> None:
    one = results("a", head({"mmlu": 2}), *answers("mmlu", [RIGHT, RIGHT]))
    lines = answers("mmlu", [WRONG, WRONG])
    lines[0] |= {"answer": "in a house"}
    lines[1] |= {"options": [*reversed(lines[1]["options"])]}
    assert pairs(summarise([one, results("b", head({"mmlu": 2}), *lines)])) == []
    assert pairs(summarise([one, results("b", head({"obqa": 2}), *answers("obqa", [WRONG] * 2))])) == []


def test_three_models_make_three_pairs(results: Any) -> None:
    files = [results(name, head({"mmlu": 1}, model=name), *answers("mmlu", [RIGHT])) for name in "abc"]
    assert [(pair.first, pair.second) for pair in pairs(summarise(files))] == [("a", "b"), ("a", "c"), ("b", "c")]


def test_models_of_one_name_are_told_apart(results: Any) -> None:
    files = [results(name, head({"mmlu": 1}, model=model)) for name, model in (("a", "m"), ("b", "n"), ("c", "m"))]
    assert [one.name for one in summarise(files)] == [f"m ({files[0].file})", "n", f"m ({files[2].file})"]


def test_a_run_without_records(results: Any) -> None:
    (found,) = summarise([results("a", head({"mmlu": 1200, "stories": 4, "last_word": 2, "samples": 3}))])
    assert found.tasks == [] and found.average is None and found.stories == {} and found.samples == []
    assert warnings([found]) == [
        "mine is not finished; records: MMLU 0 of 1,200, stories 0 of 4, last words 0 of 2, samples 0 of 3."
    ]
    assert {row["figure"] for row in rows([found])} == {"records"}


def test_story_tasks(results: Any) -> None:
    """Two of four stories are told as they were, and two stop after their prompts."""
    (found,) = summarise([results("a", head({"stories": 4, "last_word": 4}), *stories(4))])
    figures = by_figure(found)
    assert figures["stories", "consistent_stories"]["value"] == 50
    assert figures["stories", "consistent_stories"]["low"] == pytest.approx(100 * wilson(2, 4)[0])
    told = sum(len(tale.sentences) - 2 for tale in held_out(4)[::2])
    legal = figures["stories", "legal_sentences"]
    assert (legal["value"], legal["count"]) == (pytest.approx(100 * told / (told + 2)), told + 2)
    ends = [tale.text.rstrip(".!?").split()[-1] == "hill" for tale in held_out(4)]
    assert figures["last_word", "last_words"]["value"] == 25 * sum(ends)
    best = [max(last_word_choices(tale.text).values()) for tale in held_out(4)]
    assert figures["last_word", "last_words_ceiling"]["value"] == pytest.approx(25 * sum(best))


def test_samples_by_temperature(results: Any) -> None:
    judge = {"name": "judge", "tokens": 2, "bytes": 6}
    lines = [
        sample(1.0, 0, judge | {"nats": 1.0}),
        sample(1.0, 1, judge | {"nats": 2.0, "tokens": 4}),
        sample(0.5, 0, judge | {"nats": 1.0}),
        sample(0.5, 1),
        sample(None, 0),
    ]
    (found,) = summarise([results("a", head({"samples": 5}), *lines)])
    held, cold, warm = found.samples
    assert (held.temperature, held.count, held.perplexity, held.judge) == (None, 1, None, "")
    assert (cold.temperature, cold.count, cold.perplexity) == (0.5, 2, None), "not all are judged"
    assert (warm.count, warm.mean_tokens, warm.judge) == (2, 4.5, "judge")
    assert warm.perplexity == pytest.approx(math.exp(3 / 6))
