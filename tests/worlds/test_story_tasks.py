import re
from collections import Counter

import pytest

from opencola.worlds import stories
from opencola.worlds.story_tasks import CHANCE, NUM_CHOICES, records
from opencola.worlds.story_world import ANIMALS, MOODS, OBJECTS, OBSTACLES

COUNT = 200
TASKS = ("lambada", "mmlu", "obqa", "hellaswag", "race", "siqa", "squad", "story_cloze")


@pytest.fixture(scope="module")
def asked() -> dict[str, list[dict]]:
    return {task: records(task, COUNT, seed=5) for task in TASKS}


def test_the_eight_tasks_have_their_chance_levels() -> None:
    assert set(CHANCE) == set(TASKS)
    assert (CHANCE["lambada"], CHANCE["squad"], CHANCE["story_cloze"], CHANCE["siqa"]) == (0, 0, 1 / 2, 1 / 3)
    assert {CHANCE[task] for task in ("mmlu", "obqa", "hellaswag", "race")} == {1 / 4}


@pytest.mark.parametrize("task", TASKS)
def test_records_are_determined_by_the_seed(task: str, asked: dict[str, list[dict]]) -> None:
    assert records(task, 10, seed=5) == asked[task][:10]
    assert [r["question"] for r in records(task, 10, seed=6)] != [r["question"] for r in asked[task][:10]]
    assert len({record["id"] for record in asked[task]}) == COUNT


@pytest.mark.parametrize("task", sorted(NUM_CHOICES))
def test_options_are_distinct_and_answers_evenly_placed(task: str, asked: dict[str, list[dict]]) -> None:
    number = NUM_CHOICES[task]
    for record in asked[task]:
        assert len(record["choices"]) == len(set(record["choices"])) == number
        assert record["choices"][record["answer_index"]] == record["answer"]
    places = Counter(record["answer_index"] for record in asked[task])
    assert set(places) == set(range(number))
    assert sum((places[i] - COUNT / number) ** 2 / (COUNT / number) for i in places) < 20  # chi-squared, 1 to 3 degrees


def test_lambada_answers_complete_the_story(asked: dict[str, list[dict]]) -> None:
    for record in asked["lambada"]:
        text = f"{record['question']} {record['answer']}."
        assert stories.check(text).consistent
        assert max(stories.last_word_choices(text).values()) == pytest.approx(1)


@pytest.mark.parametrize("task", ["hellaswag", "story_cloze"])
def test_wrong_sentences_are_legal_but_contradict_the_story(task: str, asked: dict[str, list[dict]]) -> None:
    for record in asked[task]:
        for choice in record["choices"]:
            verdict = stories.check(f"{record['question']} {choice}")
            assert verdict.order_legal
            assert all(verdict.legal)
            assert (not verdict.conflicts) == (choice == record["answer"]), record
            assert task == "hellaswag" or verdict.complete


def test_no_option_is_the_odd_one_out(asked: dict[str, list[dict]]) -> None:
    """The true sentence must not be the one from which each other differs in a variable of its own."""
    for record in asked["hellaswag"]:
        facts = [stories.parse_sentence(choice).commits for choice in record["choices"]]
        varying = {name for name in facts[0] if len({fact[name] for fact in facts}) > 1}
        assert varying <= {"hero", "gender"} or len(varying) == 1, record


@pytest.mark.parametrize("task", ["race", "siqa"])
def test_only_the_answer_completes_the_story(task: str, asked: dict[str, list[dict]]) -> None:
    for record in asked[task]:
        for choice in record["choices"]:
            text = record["question"].replace("\n", " ") + f" {choice}."
            assert stories.check(text).consistent == (choice == record["answer"]), record
        assert record["question"].count("\n") == (task == "race")
    assert len({record["question"].split()[-1] for record in asked["race"]}) > 6  # many kinds of question


def test_siqa_asks_for_moods_that_the_story_did_not_give_away(asked: dict[str, list[dict]]) -> None:
    for record in asked["siqa"]:
        assert set(record["choices"]) <= set(MOODS.values())
        assert f"{record['answer']} " not in record["question"]


def test_squad_answers_stand_in_the_context(asked: dict[str, list[dict]]) -> None:
    for record in asked["squad"]:
        assert record["answer"] in re.findall(r"\w+", record["context"])
        text = f"{record['context']} {record['question']} {record['answer']}."
        assert stories.check(text).consistent
        assert max(stories.last_word_choices(text).values()) == pytest.approx(1)


def test_mmlu_answers_are_what_the_maps_say(asked: dict[str, list[dict]]) -> None:
    pairs = [{one: (other,) for one, other in of.items()} for of in (OBJECTS, MOODS)]
    groups = [(kind, {name, *of[name]}) for kind, of in enumerate((ANIMALS, OBSTACLES, *pairs)) for name in of]
    kinds = set()
    for record in asked["mmlu"]:
        words, answer = set(re.findall(r"\w+", record["question"])), record["answer"].split()[-1]
        ((kind, group),) = [found for found in groups if answer in found[1]]
        assert (group - {answer}) & words, record
        kinds.add(kind)
    assert kinds == {0, 1, 2, 3}


def test_obqa_answers_are_the_tool_or_the_deed_of_the_obstacle(asked: dict[str, list[dict]]) -> None:
    for record in asked["obqa"]:
        obstacle = stories.parse(record["question"])[0].commits["obstacle"]
        for choice in record["choices"]:
            assert (choice.split()[-1] in OBSTACLES[obstacle]) == (choice == record["answer"]), record


def test_an_unknown_task_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown story task 'glue': choose one of"):
        records("glue", 1, seed=0)
