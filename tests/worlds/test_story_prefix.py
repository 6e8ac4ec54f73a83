"""Which texts can become stories: by brute force in a tiny world, and on stories of the English one."""

import itertools
import random
from collections.abc import Iterator

import pytest

from opencola.worlds.stories import story
from opencola.worlds.story_prefix import can_begin
from opencola.worlds.story_world import Kind, Slot, Template, World

WORLD = World(
    variables={"who": ("tom", "ann", "anna"), "what": ("cat", "cow")},
    implied={"sex": ("who", {"tom": "m", "ann": "f", "anna": "f"})},
    slots={
        "who": Slot("who", {"tom": "Tom", "ann": "Ann", "anna": "Anna"}),
        "he": Slot("sex", {"m": "He", "f": "She"}),
        "child": Slot("sex", {"m": "boy", "f": "girl"}),
        "what": Slot("what", {"cat": "cat", "cow": "cow"}),
        "says": Slot("what", {"cat": "meow", "cow": "moo"}),
    },
    kinds=(
        Kind("start", (Template("{who} ran."), Template("A {child}, {who}, ran."))),
        Kind("pet", (Template("{he} had a {what}."),), chance=0.5),
        Kind("noise", (Template("It said {says}."), Template("{who} heard {says}.")), needs=frozenset({"what"})),
        Kind("extra", (Template("{who} laughed."),), chance=0.3),
        Kind("end", (Template("{he} left."), Template("{who} fed the {what}.", frozenset({"what"})))),
    ),
)


def all_stories() -> Iterator[str]:
    """Every story of that world, written by other means than the module's."""
    for who, what in itertools.product(*WORLD.variables.values()):
        he, child = ("He", "boy") if who == "tom" else ("She", "girl")
        name, says = who.capitalize(), {"cat": "meow", "cow": "moo"}[what]
        pets = (f"{he} had a {what}. It said {says}.", f"{he} had a {what}. {name} heard {says}.")
        for start, pet, extra in itertools.product(
            (f"{name} ran.", f"A {child}, {name}, ran."), (None, *pets), (None, f"{name} laughed.")
        ):
            for end in (f"{he} left.", *([f"{name} fed the {what}."] if pet else [])):
                yield " ".join(part for part in (start, pet, extra, end) if part)


STORIES = set(all_stories())
BEGINNINGS = {text[:end] for text in STORIES for end in range(len(text) + 1)}


def test_every_text_of_a_tiny_world() -> None:
    """All beginnings, and what comes of them by adding, changing or losing a character, or by joining two halves."""
    rng = random.Random(0)
    signs = sorted(set("".join(STORIES)))
    texts = set(BEGINNINGS)
    stories = [text.split(" ") for text in sorted(STORIES)]
    for text in sorted(BEGINNINGS):
        texts |= {text + sign for sign in signs}
        place = rng.randrange(len(text) + 1)
        texts |= {text[:place] + text[place + 1 :], text[:place] + rng.choice(signs) + text[place + 1 :]}
        other = rng.choice(stories)
        texts.add(" ".join([*text.split(" ")[:-1], *other[rng.randrange(len(other)) :]]))
    assert len(texts) > 20 * len(BEGINNINGS) and len(BEGINNINGS) > 500
    for text in texts:
        assert can_begin(text, WORLD) == (text in BEGINNINGS), text


@pytest.mark.parametrize("index", range(20))
def test_stories_of_the_english_world(index: int) -> None:
    tale = story(3, index)
    assert all(can_begin(tale.text[:end]) for end in range(len(tale.text) + 1))
    assert not can_begin(tale.text + " ") and not can_begin(tale.text + "\n")
    assert not can_begin(tale.text[: len(tale.sentences[0]) + 1] + tale.sentences[0])


@pytest.mark.parametrize(
    ("text", "fine"),
    [
        ("One rainy day, Tom went to the par", True),
        ("One rainy day, Tom went to the perk", False),
        ("one", False),
        (" One", False),
        ("Once a little boy named Anna", False),
        ("Once a little girl named Ann", True),
        ("Once a little girl named Anna lived near the park. His", False),
        ("Once a little girl named Anna lived near the park. Her best friend was a clever fox. The gardener", True),
        ("Once a little girl named Anna lived near the park. Her best friend was a clever fox. The farmer", False),
        ("Once a little girl named Anna lived near the park.  Her", False),
        ("Tom and his father", True),
        ("Tom and her", False),
    ],
)
def test_by_hand(text: str, fine: bool) -> None:
    assert can_begin(text) == fine
