"""Where texts are cut, and the verdicts on tokens, with a tokenizer of single letters."""

import pytest

from opencola.evaluation.diagnosis import tasks
from opencola.evaluation.diagnosis.tasks import Cut, Run, Task
from opencola.text.tokenizer import Tokenizer

TOKENIZER = Tokenizer.train(["abc"], 258)
EOS, PAD = TOKENIZER.eos_id, TOKENIZER.pad_id
ALPHABET = "abcdefghijklmnopqrstuvwxyz"
TASK = Task("letters", (ALPHABET, "abcde"), ("abc", "abcd"), ALPHABET.startswith, lambda text: len(text) == 5)


def ids(text: str) -> list[int]:
    return TOKENIZER.encode(text)


def test_the_tokenizer_has_single_letters() -> None:
    assert len(ids(ALPHABET)) == 26 and EOS != PAD


@pytest.mark.parametrize(
    ("written", "failed", "tokens"),
    [
        (ids("cde"), False, 3),
        (ids("cdf") + ids("x"), True, 3),
        (ids("xcd"), True, 1),
        ([*ids("cde"), EOS, *ids("xyz")], False, 4),
        ([*ids("cd"), EOS], True, 3),
        ([EOS], True, 1),
        ([*ids("c"), PAD], True, 2),
        ([], False, 0),
        (ids("cé"), True, 3),
    ],
)
def test_judge(written: list[int], failed: bool, tokens: int) -> None:
    assert tasks.judge(TASK, TOKENIZER, Cut(7, tuple(ids("ab")), ()), written) == Run(7, failed, tokens)


def test_half_a_character_may_stand() -> None:
    task = Task("accents", (), (), "é!".startswith, bool)
    first, second = ids("é")
    assert tasks.may_stand(task, TOKENIZER, [first])
    assert tasks.judge(task, TOKENIZER, Cut(0, (), ()), [first, second, *ids("!?")]) == Run(0, True, 4)


@pytest.mark.parametrize(("chunk", "inside"), [(1, False), (4, False), (4, True), (30, False), (30, True)])
def test_cuts(chunk: int, inside: bool) -> None:
    found = tasks.cuts(TASK, TOKENIZER, 3, chunk, inside, 0)
    for number, (text, prompt) in enumerate(zip(TASK.texts, TASK.prompts, strict=True)):
        whole = (*ids(text), EOS)
        places = [len(cut.before) for cut in found if cut.text == number]
        for cut in found:
            assert cut.text != number or (cut.before + cut.after == whole and cut.before and cut.after)
        assert all((place % chunk != 0) == inside for place in places)
        behind = [p for p in range(len(prompt), len(whole)) if (p % chunk != 0) == inside]
        if behind:
            assert places == sorted(set(places)) and places[0] == behind[0] and set(places) <= set(behind)
            assert len(places) == min(3, len(behind))
    assert found == tasks.cuts(TASK, TOKENIZER, 3, chunk, inside, 0)
    if chunk == 1:
        assert found != tasks.cuts(TASK, TOKENIZER, 3, chunk, inside, 1)
    if (chunk, inside) == (30, False):
        assert found == []


def test_a_text_whose_blocks_end_within_its_prompt() -> None:
    task = Task("letters", ("abcde",), ("abcde",), ALPHABET.startswith, bool)
    (found,) = tasks.cuts(task, TOKENIZER, 3, 4, False, 0)
    assert found == Cut(0, tuple(ids("abcd")), (*ids("e"), EOS))


def test_places_of_a_run() -> None:
    cut, written = Cut(1, tuple(ids("abc")), ()), ids("defghx")
    run = tasks.judge(TASK, TOKENIZER, cut, written)
    assert run == Run(1, True, 6)
    whole = tuple(ids("abcdefghx"))
    assert tasks.places(cut, written, run, 4) == [Cut(1, whole[:p], whole[p:]) for p in (3, 4, 8)]
    assert tasks.places(cut, written, Run(1, False, 5), 4) == [Cut(1, whole[:p], whole[p:]) for p in (3, 4)]
    assert [len(one.before) for one in tasks.places(cut, written, run, 1)] == [3, 4, 5, 6, 7, 8]


def test_blind_guesses() -> None:
    found = tasks.cuts(TASK, TOKENIZER, 9, 1, False, 0)
    guessed = tasks.blind(found, 0)
    assert guessed == tasks.blind(found, 0) != tasks.blind(found, 1)
    assert [cut for cut, _ in guessed] == found * (len(guessed) // len(found)) and len(guessed) > 400
    assert {token for _, token in guessed} == {cut.after[0] for cut in found}
    right = sum(token == cut.after[0] for cut, token in guessed) / len(guessed)
    assert 0 < right < 0.3, "one of ten or so is right by chance"


@pytest.mark.parametrize("task", [tasks.stories(6), tasks.nests(6)], ids=lambda task: task.name)
def test_the_tasks_own_texts_are_right(task: Task) -> None:
    assert len(task.texts) == len(set(task.texts)) == 6
    for cut, text in zip(tasks.beginnings(task, TOKENIZER), task.texts, strict=True):
        assert TOKENIZER.decode(cut.before) + TOKENIZER.decode(cut.after) == text
        assert tasks.judge(task, TOKENIZER, cut, cut.after) == Run(cut.text, False, len(cut.after))
        assert tasks.judge(task, TOKENIZER, cut, [*cut.after[:-1], *ids("."), EOS]).failed
        assert tasks.judge(task, TOKENIZER, cut, [*cut.after[:-2], EOS]).failed
