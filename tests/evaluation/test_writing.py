import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from opencola.evaluation.statistics import share, wilson
from opencola.evaluation.writing import (
    Writer,
    continuation_shares,
    continue_stories,
    find_faults,
    held_out,
    judge,
    last_word_scores,
    mean_log_probability,
    predict_last_words,
    write_records,
)
from opencola.worlds.stories import log_probability, story

STORIES = held_out(20)


def writer(text: Callable[[int, str], str]) -> Writer:
    """A writer that gives out `text` of a prompt's place and of what really follows there."""

    def write(prompts: Sequence[str], max_new_tokens: int) -> list[str]:
        assert max_new_tokens == 7
        for tale, prompt in zip(STORIES, prompts, strict=True):
            assert tale.text.startswith(prompt)
        return [text(i, STORIES[i].text[len(prompt) :]) for i, prompt in enumerate(prompts)]

    return write


truth = writer(lambda i, rest: rest)
garbage = writer(lambda i, rest: " Colourless green ideas sleep.")
half = writer(lambda i, rest: rest if i % 2 else " Colourless green ideas sleep.")


def test_the_true_continuations_are_perfect() -> None:
    records = continue_stories(STORIES, truth, 7)
    shares = continuation_shares(records)
    assert {name: value.value for name, value in shares.items()} == dict.fromkeys(shares, 1.0)
    assert shares["legal_sentences"].count == sum(len(tale.sentences) - 2 for tale in STORIES)
    assert shares["consistent_stories"].count == 20
    assert all(not record.fault and not any(sentence.fault for sentence in record.sentences) for record in records)
    assert [record.log_probability for record in records] == [log_probability(tale.text) for tale in STORIES]
    means = mean_log_probability(records)
    assert means["consistent"] == means["held_out"] == pytest.approx(sum(log_probability(s.text) for s in STORIES) / 20)


def test_garbage_scores_nothing() -> None:
    records = continue_stories(STORIES, garbage, 7)
    shares = continuation_shares(records)
    assert shares["legal_sentences"].value == shares["consistent_stories"].value == shares["complete"].value == 0
    assert shares["original_continuations"].value == 0
    assert shares["distinct_continuations"].value == 1 / 20
    assert mean_log_probability(records)["consistent"] is None
    assert {record.fault for record in records} == {"1 illegal sentence"}


def test_half_right_is_half() -> None:
    shares = continuation_shares(continue_stories(STORIES, half, 7))
    assert shares["consistent_stories"].value == shares["original_continuations"].value == 0.5
    written = [len(tale.sentences) - 2 for tale in STORIES[1::2]]
    assert shares["legal_sentences"].value == pytest.approx(sum(written) / (sum(written) + 10))
    assert shares["distinct_continuations"].value == 11 / 20


def test_an_unfinished_sentence_and_an_empty_text_count_as_illegal() -> None:
    prompt = " ".join(STORIES[0].sentences[:2])
    rest = STORIES[0].text[len(prompt) :]
    cut = judge(prompt, rest[:-3], rest)
    assert cut.legal == (*[True] * (len(STORIES[0].sentences) - 3), False)
    assert not cut.consistent and not cut.complete and cut.log_probability is None
    empty = judge(prompt, "", rest)
    assert empty.legal == (False,) and not empty.consistent and empty.fault == "nothing written"


def test_a_story_that_skips_its_middle_lacks_a_part() -> None:
    tale = STORIES[0]
    prompt = " ".join(tale.sentences[:2])
    assert judge(prompt, f" {tale.sentences[-1]}", "").fault == "a part is missing"


def test_faults_name_the_sentence_and_what_it_changes() -> None:
    first, second = "Once a little boy named Tom lived near the park.", "His best friend was a clever dog."
    ending = "He thanked his good friend, the {}."
    assert [s.fault for s in find_faults(f"{first} {second} {ending.format('dog')}")] == ["", "", ""]
    # each sentence that differs from the first telling is at fault, not only the first of them
    other = "At home, he gave a lot of milk to the cat."
    faults = [s.fault for s in find_faults(f"{first} {second} {ending.format('cat')} {other}")]
    assert faults[2] == "another animal than before"
    assert faults[3].startswith("another animal than before")
    assert [s.fault for s in find_faults(f"{second} {first}")] == ["", "out of place"]
    record = judge(f"{first} {second}", f" {ending.format('cat')}", "")
    assert record.conflicts == ("animal",) and "animal changed" in record.fault


def test_last_words() -> None:
    accuracy, ceiling, of_determined = last_word_scores(predict_last_words(STORIES, truth, 7))
    assert accuracy.value == 1 and 0 < ceiling <= 1 and of_determined == 1 / ceiling
    assert last_word_scores(predict_last_words(STORIES, garbage, 7))[0].value == 0
    records = predict_last_words(STORIES, half, 7)
    assert [record.correct for record in records] == [False, True] * 10
    assert last_word_scores(records)[0].value == 0.5


def test_a_last_word_must_stand_alone() -> None:
    glued = predict_last_words(STORIES, writer(lambda i, rest: rest.strip()), 7)
    assert not any(record.correct for record in glued), "without its space it continues the word before"
    longer = predict_last_words(STORIES, writer(lambda i, rest: rest.rstrip(".") + "s."), 7)
    assert not any(record.correct for record in longer)
    right = predict_last_words(STORIES, writer(lambda i, rest: rest + " And so on."), 7)
    assert all(record.correct for record in right)


def test_prompts_end_before_the_last_word() -> None:
    for tale, record in zip(STORIES, predict_last_words(STORIES, truth, 7), strict=True):
        assert f"{record.prompt} {record.answer}." == tale.text


@pytest.mark.parametrize(
    ("hits", "total", "low", "high"),
    [  # Wilson's interval at 95 %, from independent tables
        (0, 10, 0.0, 0.2775),
        (5, 10, 0.2366, 0.7634),
        (10, 10, 0.7225, 1.0),
        (81, 263, 0.2553, 0.3662),
        (0, 0, 0.0, 1.0),
    ],
)
def test_wilson(hits: int, total: int, low: float, high: float) -> None:
    assert wilson(hits, total) == pytest.approx((low, high), abs=6e-5)


def test_wilson_solves_its_equation() -> None:
    for end in wilson(37, 200):
        assert abs(37 / 200 - end) == pytest.approx(1.959964 * math.sqrt(end * (1 - end) / 200))


def test_share_without_cases() -> None:
    assert (share(0, 0).value, share(0, 0).count) == (0.0, 0)


def test_held_out_stories_are_no_corpus_stories() -> None:
    assert held_out(3) == STORIES[:3]
    corpus = {story(seed, i).text for seed in range(5) for i in range(200)}
    assert corpus.isdisjoint(tale.text for tale in held_out(200))
    with pytest.raises(ValueError, match="seed 0 may have been trained on"):
        held_out(3, seed=0)


def test_records_are_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "evaluation.jsonl"
    write_records(path, continue_stories(STORIES, half, 7), predict_last_words(STORIES, truth, 7))
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [record["measure"] for record in records] == ["continuation"] * 20 + ["last_word"] * 20
    assert records[0]["continuation"] == " Colourless green ideas sleep." and records[0]["log_probability"] is None
    assert records[1]["consistent"] and records[1]["prompt"] + records[1]["continuation"] == STORIES[1].text
    assert records[20]["correct"]
