import itertools
import math
import random
import re
from collections import Counter
from dataclasses import replace

import pytest

from opencola.worlds import stories
from opencola.worlds.stories import GRAMMAR
from opencola.worlds.story_world import ENGLISH, with_article

NUM_STORIES = 2000


@pytest.fixture(scope="module")
def tales() -> list[stories.Story]:
    return [stories.story(7, i) for i in range(NUM_STORIES)]


def test_every_story_is_read_back(tales: list[stories.Story]) -> None:
    for tale in tales:
        assert stories.check(tale.text).consistent, tale.text
        assert math.isfinite(stories.log_probability(tale.text)), tale.text
        parsed = stories.parse(tale.text)
        assert [sentence.text for sentence in parsed] == list(tale.sentences) == stories.split_sentences(tale.text)
        assert [sentence.kind for sentence in parsed] == list(tale.kinds)
        for sentence in parsed:
            assert sentence.commits.items() <= tale.variables.items(), sentence


def test_stories_have_the_promised_size(tales: list[stories.Story]) -> None:
    tokens = [len(re.findall(r"\w+|[^\w\s]", tale.text)) for tale in tales]
    assert {len(tale.sentences) for tale in tales} == {4, 5, 6, 7, 8}
    assert 50 <= sum(tokens) / len(tokens) <= 65
    assert max(tokens) <= 90
    assert 18 < -sum(stories.log_probability(tale.text) for tale in tales) / len(tales) < 28


def test_words_are_exactly_those_that_stories_use(tales: list[stories.Story]) -> None:
    assert 300 <= len({word.lower() for word in stories.words()}) <= 600
    assert {word for tale in tales for word in re.findall(r"\w+", tale.text)} == stories.words()


def test_articles_fit_their_nouns(tales: list[stories.Story]) -> None:
    for tale in tales:
        for article, noun in re.findall(r"\b([Aa]n?) (\w+)", tale.text):
            assert (article.lower() == "an") == (noun[0] in "aeiou"), tale.text
    assert with_article("owl", first=True) == "An owl"


def test_a_sentence_has_one_reading() -> None:
    rng = random.Random(0)
    for template in GRAMMAR.slots:
        for _ in range(10):
            draw = {name: rng.choice(values) for name, values in ENGLISH.variables.items()}
            sentence = GRAMMAR.write(template, GRAMMAR.with_implied(draw))
            readers = [t.text for t, pattern in GRAMMAR._pattern.items() if pattern.fullmatch(sentence)]
            assert readers == [template.text], sentence
    for name, slot in ENGLISH.slots.items():  # so that the words of a slot end at one place only
        for one, other in itertools.permutations(slot.surface.values(), 2):
            assert not other.startswith(one + " "), name


def test_story_depends_on_seed_and_index_only() -> None:
    assert stories.story(0, 5) == stories.story(0, 5)
    assert len({stories.story(seed, index).text for seed in range(10) for index in range(10)}) == 100
    # Pinned: published models and numbers were made from this stream.
    assert stories.story(0, 0).text == (
        "Noah and his grandma spent every morning at the beach. His best friend was a clever monkey. "
        "The monkey saw that Noah was angry. Noah wanted to beat a red drum. "
        "But there was a fire between Noah and the drum. Noah took a bucket and soaked the fire. "
        "At home, he gave a lot of bananas to the monkey."
    )


STORY = (
    "One rainy day, Mia went to the farm. An owl flew over to her and said hello. Mia looked sad from the start. "
    "Mia wanted to fly an orange kite. On the way to the farm, a wall stopped the owl. "
    "Mia took a ladder and climbed the wall. In the end, Mia felt very happy."
)


@pytest.mark.parametrize(
    ("old", "new", "conflicts"),
    [
        ("stopped the owl", "stopped the cat", ["animal"]),
        ("An owl flew", "An owl ran", ["animal"]),
        ("Mia wanted", "Anna wanted", ["hero"]),
        ("Mia wanted", "Tom wanted", ["gender", "hero"]),
        ("over to her", "over to him", ["gender"]),
        ("fly an orange", "ride an orange", ["object"]),
        ("a ladder", "a mop", ["obstacle"]),
        ("very happy", "very calm", ["mood"]),
        ("In the end, Mia felt very happy", "Out in the sun, Mia thanked the clever owl", ["weather"]),
        ("In the end, Mia felt very happy", "They sang all the way home from the zoo", ["place"]),
    ],
)
def test_a_wrong_value_is_a_conflict_and_nothing_else(old: str, new: str, conflicts: list[str]) -> None:
    assert stories.check(STORY).consistent
    assert STORY.count(old) == 1
    verdict = stories.check(STORY.replace(old, new))
    assert verdict == replace(stories.check(STORY), conflicts=conflicts)
    assert not verdict.consistent
    assert stories.log_probability(STORY.replace(old, new)) == -math.inf


def test_order_gaps_and_endings_are_judged() -> None:
    parts = stories.split_sentences(STORY)
    swapped = stories.check(" ".join([*parts[:3], parts[4], parts[3], *parts[5:]]))
    assert (all(swapped.legal), swapped.order_legal, swapped.complete, swapped.conflicts) == (True, False, True, [])
    twice = stories.check(" ".join([*parts[:4], parts[3], *parts[4:]]))
    assert (twice.order_legal, twice.complete) == (False, True)
    moodless = stories.check(" ".join(parts[:2] + parts[3:]))  # the ending speaks of a mood that nobody told
    assert (moodless.order_legal, moodless.complete) == (False, True)
    for gap in (0, 1, 3, 5, 6):  # opening, friend, wish, remedy of a told obstacle, ending
        verdict = stories.check(" ".join(parts[:gap] + parts[gap + 1 :]))
        assert all(verdict.legal) and not verdict.complete and not verdict.consistent, gap
    assert not stories.check(" ".join(parts[:4] + parts[5:])).order_legal  # a remedy without its obstacle


def test_deleting_any_word_is_noticed() -> None:
    words = STORY.split(" ")
    for i in range(len(words)):
        mutated = " ".join(words[:i] + words[i + 1 :])
        assert not stories.check(mutated).consistent, mutated
    verdict = stories.check(STORY.replace(" over to her", " to her").replace("an orange", "a orange"))
    assert verdict.legal == [True, False, True, False, True, True, True]


def test_check_and_probability_agree_on_mutated_stories(tales: list[stories.Story]) -> None:
    rng, verdicts = random.Random(0), Counter[bool]()
    vocabulary = sorted(stories.words())
    for tale in tales[:1000]:
        parts = list(tale.sentences)
        other = rng.choice(tales)
        match rng.randrange(4):
            case 0:
                words = tale.text.split(" ")
                words[rng.randrange(len(words))] = rng.choice(vocabulary)
                text = " ".join(words)
            case 1:
                i, j = rng.randrange(len(parts)), rng.randrange(len(parts))
                parts[i], parts[j] = parts[j], parts[i]
                text = " ".join(parts)
            case 2:
                parts.pop(rng.randrange(len(parts)))
                text = " ".join(parts)
            case _:
                text = " ".join([*parts[:-1], other.sentences[-1]])
        verdict = stories.check(text).consistent
        assert verdict == math.isfinite(stories.log_probability(text)), text
        verdicts[verdict] += 1
    assert min(verdicts[True], verdicts[False]) > 50


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        ".",
        "...!?",
        "Tom",
        "Tom.",
        "\n\n",
        "\x00\ufffd",
        "猫。猫。",
        STORY.upper(),
        "a" * 10_000,
        "The " * 3000 + ".",
    ],
)
def test_junk_is_judged_not_raised(text: str) -> None:
    verdict = stories.check(text)
    assert not verdict.consistent
    assert not any(verdict.legal)
    assert stories.log_probability(text) == -math.inf


def test_log_probability_is_of_the_exact_text() -> None:
    for text in (STORY + " ", STORY.replace(". ", ".  ", 1), STORY.replace(". ", ".\n", 1)):
        assert stories.log_probability(text) == -math.inf


def test_last_words_are_determined_by_the_earlier_text(tales: list[stories.Story]) -> None:
    for tale in tales[:200]:
        last = tale.text[:-1].rpartition(" ")[2]
        assert stories.last_word_choices(tale.text) == {last: pytest.approx(1)}
    endings = Counter(tale.text[:-1].rpartition(" ")[2] for tale in tales)
    assert len(endings) > 70 and max(endings.values()) < 0.04 * len(tales)


@pytest.mark.parametrize("text", ["", "Tom", "No story begins so.", "One rainy day, Mia went to the farm."])
def test_last_word_choices_refuse_what_is_no_story(text: str) -> None:
    with pytest.raises(ValueError):
        stories.last_word_choices(text)
