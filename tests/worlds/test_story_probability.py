import itertools
import math
from collections import Counter
from dataclasses import replace

import pytest

from opencola.worlds import stories
from opencola.worlds.stories import Grammar
from opencola.worlds.story_world import ENGLISH, Kind, Slot, Template, World

# Small enough to enumerate, and with every feature: implied gender told without its hero, a hero told only sometimes,
# optional kinds, kinds and templates with needs, an ending whose last word may be new.
TINY = World(
    variables={"hero": ("Tom", "Ben", "Mia"), "animal": ("cat", "owl"), "toy": ("ball", "kite")},
    implied={"gender": ("hero", {"Tom": "boy", "Ben": "boy", "Mia": "girl"})},
    slots={
        "hero": Slot("hero", {"Tom": "Tom", "Ben": "Ben", "Mia": "Mia"}),
        "He": Slot("gender", {"boy": "He", "girl": "She"}),
        "an_animal": Slot("animal", {"cat": "a cat", "owl": "an owl"}),
        "food": Slot("animal", {"cat": "fish", "owl": "mice"}),
        "toy": Slot("toy", {"ball": "ball", "kite": "kite"}),
    },
    kinds=(
        Kind("opening", (Template("{He} had {an_animal}."), Template("{hero} was at home."))),
        Kind("friend", (Template("{He} liked the {toy}."),), chance=0.25),
        Kind("meal", (Template("It ate {food}."),), needs=frozenset({"animal"})),
        Kind(
            "ending",
            (
                Template("So {hero} took the {toy}."),
                Template("So all was {food}."),
                Template("So all was well.", frozenset({"toy"})),
            ),
        ),
    ),
)


def enumerate_texts(world: World) -> dict[str, float]:
    """Text -> probability, by going through every draw the generator could make; shares no code with `Grammar`."""
    found: Counter[str] = Counter()

    def go(kinds: tuple[Kind, ...], told: set[str], text: str, chance: float, values: dict[str, str]) -> None:
        if not kinds:
            found[text.strip()] += chance
            return
        kind, rest = kinds[0], kinds[1:]
        if not kind.needs <= told:
            return go(rest, told, text, chance, values)
        if kind.chance < 1:
            go(rest, told, text, chance * (1 - kind.chance), values)
        templates = [t for t in kind.templates if t.needs <= told]
        for template in templates:
            sentence, new = template.text, set(told)
            for name, slot in world.slots.items():
                if "{" + name + "}" in sentence:
                    sentence = sentence.replace("{" + name + "}", slot.surface[values[slot.variable]])
                    new |= {slot.variable} | {i for i, (source, _) in world.implied.items() if source == slot.variable}
            go(rest, new, f"{text} {sentence}", chance * kind.chance / len(templates), values)

    draws = list(itertools.product(*world.variables.values()))
    for draw in draws:
        values = dict(zip(world.variables, draw, strict=True))
        values |= {name: table[values[source]] for name, (source, table) in world.implied.items()}
        go(world.kinds, set(), "", 1 / len(draws), values)
    return dict(found)


@pytest.fixture(scope="module")
def tiny() -> Grammar:
    return Grammar(TINY)


def chi_squared(counts: Counter[str], chances: dict[str, float]) -> float:
    """Pearson's statistic in standard deviations from its mean (its law is near normal for many cells)."""
    number = sum(counts.values())
    statistic = sum((counts[key] - number * p) ** 2 / (number * p) for key, p in chances.items())
    return (statistic - (len(chances) - 1)) / math.sqrt(2 * (len(chances) - 1))


def test_log_probability_equals_enumeration(tiny: Grammar) -> None:
    texts = enumerate_texts(TINY)
    assert len(texts) == 80
    assert math.fsum(texts.values()) == pytest.approx(1, abs=1e-12)
    for text, chance in texts.items():
        assert math.exp(tiny.log_probability(text)) == pytest.approx(chance, rel=1e-12), text
        assert tiny.check(text).consistent, text


def test_everything_outside_the_enumeration_is_refused(tiny: Grammar) -> None:
    texts = enumerate_texts(TINY)
    sentences = sorted({sentence for text in texts for sentence in stories.split_sentences(text)})
    refused = 0
    for length in (1, 2, 3):
        for chosen in itertools.product(sentences, repeat=length):
            text = " ".join(chosen)
            assert tiny.check(text).consistent == (text in texts), text
            assert math.isfinite(tiny.log_probability(text)) == (text in texts), text
            refused += text not in texts
    assert refused > 1000


def test_the_sampler_follows_the_enumeration(tiny: Grammar) -> None:
    texts = enumerate_texts(TINY)
    counts = Counter(tiny.story(1, i).text for i in range(20_000))
    assert set(counts) <= set(texts)
    assert abs(chi_squared(counts, texts)) < 4


def test_the_english_sampler_is_uniform_over_values_and_first_templates() -> None:
    counts: dict[str, Counter[str]] = {name: Counter() for name in [*ENGLISH.variables, "opening"]}
    for i in range(6000):
        tale = stories.story(3, i)
        for name in ENGLISH.variables:
            counts[name][tale.variables[name]] += 1
        template = stories.parse_sentence(tale.sentences[0]).template
        assert template is not None
        counts["opening"][template.text] += 1
    keys = ENGLISH.variables | {"opening": tuple(t.text for t in ENGLISH.kinds[0].templates)}
    for name, values in keys.items():
        assert abs(chi_squared(counts[name], {value: 1 / len(values) for value in values})) < 4.5, name


def test_log_probability_of_a_story_reckoned_by_hand() -> None:
    text = "Once a little boy named Tom lived near the farm. His best friend was a clever dog. "
    text += "Tom wanted to fly a red kite. He thanked his good friend, the dog."
    choices = 20 * 15 * 15 * 16 * 6 * 3 * 3 * 3 * 5  # hero animal place object colour; templates
    skipped = 0.4 * 0.3 * 0.6  # mood, obstacle, success
    assert stories.log_probability(text) == pytest.approx(math.log(skipped / choices), rel=1e-12)


def test_last_word_choices_equal_brute_force(tiny: Grammar) -> None:
    open_ended = 0
    for text in enumerate_texts(TINY):
        before = text[:-1].rpartition(" ")[0]
        chances = {word: math.exp(tiny.log_probability(f"{before} {word}.")) for word in tiny.words()}
        expected = {word: chance / sum(chances.values()) for word, chance in chances.items() if chance > 0}
        assert tiny.last_word_choices(text) == pytest.approx(expected)
        assert tiny.last_word_choices(f"{before} nonsense.") == pytest.approx(expected)
        open_ended += len(expected) > 1
    assert open_ended > 10


def test_a_world_with_mistakes_is_refused() -> None:
    with pytest.raises(ValueError, match="no slot is called 'nobody'"):
        Grammar(replace(TINY, kinds=(Kind("opening", (Template("{nobody} came."),)),)))
    with pytest.raises(ValueError, match="slot 'toy': two values share one surface"):
        Grammar(replace(TINY, slots=TINY.slots | {"toy": Slot("toy", {"ball": "toy", "kite": "toy"})}))
