"""Whether a text can still become a story: the exact verdict on every single token that a model writes."""

import re
from collections.abc import Iterator, Mapping, Sequence

from opencola.worlds.story_world import ENGLISH, World

_PLACE = re.compile(r"\{(\w+)\}")
Told = Mapping[str, str]


def can_begin(text: str, world: World = ENGLISH) -> bool:
    """Whether a story of the world begins with `text`, which may end anywhere, inside a word too.

    Exact where every sentence but the last kind's can be followed by another one, as in the English world.
    """
    return _goes_on(world, 0, text, {})


def _goes_on(world: World, rank: int, rest: str, told: Told) -> bool:
    """Whether a sentence of the kinds from number `rank` on can begin with `rest`, given what was told before."""
    if rank == len(world.kinds):
        return False
    kind = world.kinds[rank]
    if kind.needs <= told.keys():
        for template in kind.templates:
            if not template.needs <= told.keys():
                continue
            for behind, known in _read(world, _PLACE.split(template.text), rest, told):
                if not behind or (behind[0] == " " and _goes_on(world, rank + 1, behind[1:], known)):
                    return True
        if kind.chance == 1:
            return False
    return _goes_on(world, rank + 1, rest, told)


def _read(world: World, pieces: Sequence[str], rest: str, told: Told) -> Iterator[tuple[str, Told]]:
    """What is left of `rest` behind the sentence of `pieces` (literal, slot, ..., literal), and what is told then.

    One pair for every reading; nothing is left where `rest` ends inside the sentence.
    """
    literal, *others = pieces
    if not rest.startswith(literal):
        if literal.startswith(rest):
            yield "", told
        return
    rest = rest[len(literal) :]
    if not others or not rest:
        yield rest, told
        return
    slot = world.slots[others[0]]
    for value, surface in slot.surface.items():
        if rest.startswith(surface) or surface.startswith(rest):
            known = _with(world, slot.variable, value, told)
            if known is not None:
                yield from _read(world, others[1:], rest[len(surface) :], known)


def _with(world: World, variable: str, value: str, told: Told) -> Told | None:
    """What is told once a variable has its value, and what that implies; None where it contradicts."""
    facts = {variable: value}
    facts |= {name: table[value] for name, (source, table) in world.implied.items() if source == variable}
    if any(told.get(name, fact) != fact for name, fact in facts.items()):
        return None
    return {**told, **facts}
