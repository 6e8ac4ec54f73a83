"""The eight benchmark formats, asked of the story world: questions whose right answers are exactly known.

Questions are unfinished texts in the world's own words, so a model that has read nothing but stories can answer by
going on. A wrong option always contradicts what has been told or what the world's maps say.

| task | question | answer |
| --- | --- | --- |
| lambada | a story without its last word | that word |
| hellaswag | the beginning of a story | its next sentence, among four |
| story_cloze | a story without its ending | the ending, among two |
| mmlu | one sentence, cut where a map completes it (what a frog eats) | the completion, among four |
| obqa | an obstacle, and the remedy cut before its first telling word | that word, among four |
| siqa | a story in which a mood was told, cut before the mood that it turns into | that mood, among three |
| race | a story, then on a new line an ending cut before its last word | that word, among four |
| squad | the same, the story as context; the word stands in the story | that word |
"""

import random
from typing import Any

from opencola.errors import UserError
from opencola.worlds.stories import GRAMMAR, Story, parse_sentence, story
from opencola.worlds.story_world import Template

NUM_CHOICES = {"hellaswag": 4, "story_cloze": 2, "mmlu": 4, "obqa": 4, "siqa": 3, "race": 4}
CHANCE = {"lambada": 0.0, "squad": 0.0} | {task: 1 / number for task, number in NUM_CHOICES.items()}
"""Accuracy (a fraction of 1) of picking an option blindly; 0 where there are no options to pick from."""

_KINDS = {kind.name: kind for kind in GRAMMAR.world.kinds}


def records(task: str, count: int, seed: int) -> list[dict[str, Any]]:
    """`count` records of `task` as the evaluation reads them, determined by `seed` (record i also by i alone).

    Keys: `id`, `question`, `answer`; with options also `choices` and `answer_index`; for squad also `context`.
    Raises UserError for an unknown task.
    """
    if task not in CHANCE:
        raise UserError(f"unknown story task {task!r}: choose one of {', '.join(CHANCE)}")
    return [{"id": f"{task}-{seed}-{i}"} | _record(task, random.Random(f"{task} {seed} {i}")) for i in range(count)]


def _record(task: str, rng: random.Random) -> dict[str, Any]:
    tale = _told(task, rng)
    before = list(tale.sentences[:-1])
    match task:
        case "lambada":
            question, _, last = tale.text.rpartition(" ")
            return {"question": question, "answer": last.rstrip(".")}
        case "story_cloze":
            return _next_sentence(tale, len(before), task, rng)
        case "hellaswag":
            # from the third sentence on, nearly every one tells something again that it can get wrong
            enough = NUM_CHOICES[task] - 1
            late = range(2, len(tale.sentences))
            positions = [i for i in late if max(map(len, _contradictions(tale, i).values())) >= enough]
            return _next_sentence(tale, rng.choice(positions), task, rng)
        case "mmlu":
            template, slot = rng.choice(_MAPPED)
            return _cut(tale, template, slot, task, rng)
        case "obqa":
            position = tale.kinds.index("obstacle")
            template = rng.choice(_KINDS["remedy"].templates)
            slot = next(i for i, name in enumerate(GRAMMAR.slots[template]) if _variable(name) == "obstacle")
            return _cut(tale, template, slot, task, rng, tale.sentences[position] + " ")
        case "siqa":
            template = next(t for t in _KINDS["ending"].templates if GRAMMAR.slots[t][-1] == "relief")
            return _cut(tale, template, len(GRAMMAR.slots[template]) - 1, task, rng, " ".join(before) + " ")
    template = rng.choice(_endings(tale, task))
    slot = len(GRAMMAR.slots[template]) - 1
    if task == "race":
        return _cut(tale, template, slot, task, rng, " ".join(before) + "\n")
    stem = GRAMMAR.write(template, tale.variables, slot).rstrip()
    return {"context": " ".join(before), "question": stem, "answer": _surface(template, slot, tale.variables)}


def _told(task: str, rng: random.Random) -> Story:
    """A story that `task` can be asked of, from a stream that no corpus seed reaches."""
    while True:
        tale = story(-1 - rng.getrandbits(62), 0)
        told = " ".join(tale.sentences[:-1])
        if task == "obqa" and "obstacle" not in tale.kinds:
            continue
        if task == "siqa" and ("mood" not in tale.kinds or _relief(tale) in told):
            continue
        return tale


def _relief(tale: Story) -> str:
    return GRAMMAR.world.slots["relief"].surface[tale.variables["mood"]]


def _variable(slot: str) -> str:
    return GRAMMAR.world.slots[slot].variable


def _surface(template: Template, slot: int, variables: dict[str, str]) -> str:
    name = GRAMMAR.slots[template][slot]
    return GRAMMAR.world.slots[name].surface[variables[_variable(name)]]


def _mapped_slots() -> list[tuple[Template, int]]:
    """Every (template, slot) where the sentence so far tells a slot's variable in another word already."""
    mapped_slots = []
    for template, names in GRAMMAR.slots.items():
        for i, name in enumerate(names):
            mapped = _variable(name) in map(_variable, names[:i])
            if mapped and len(GRAMMAR.world.slots[name].surface) >= NUM_CHOICES["mmlu"]:
                mapped_slots.append((template, i))
    return mapped_slots


_MAPPED = _mapped_slots()


def _endings(tale: Story, task: str) -> list[Template]:
    """The endings that `tale` could have had; for squad, those whose last word its earlier sentences hold."""
    before = tale.sentences[:-1]
    told = {variable for sentence in before for variable in parse_sentence(sentence).commits}
    held = set(" ".join(before).replace(".", "").replace(",", "").split())
    possible = [template for template in _KINDS["ending"].templates if template.needs <= told]
    if task == "squad":
        names = {template: len(GRAMMAR.slots[template]) - 1 for template in possible}
        possible = [t for t, slot in names.items() if _surface(t, slot, tale.variables) in held]
    return possible


def _cut(tale: Story, template: Template, slot: int, task: str, rng: random.Random, before: str = "") -> dict[str, Any]:
    """The question `before` + `template` cut before its slot number `slot`, with the slot's words as options."""
    surfaces = GRAMMAR.world.slots[GRAMMAR.slots[template][slot]].surface
    answer = _surface(template, slot, tale.variables)
    wrong = rng.sample([surface for surface in surfaces.values() if surface != answer], NUM_CHOICES[task] - 1)
    question = before + GRAMMAR.write(template, tale.variables, slot).rstrip()
    return {"question": question} | _options(answer, wrong, rng)


def _next_sentence(tale: Story, position: int, task: str, rng: random.Random) -> dict[str, Any]:
    """The question of what sentence number `position` is, after all sentences before it.

    All wrong options change one and the same variable, so that the options alone do not give the right one away.
    """
    possible = [wrong for wrong in _contradictions(tale, position).values() if len(wrong) >= NUM_CHOICES[task] - 1]
    wrong = rng.sample(rng.choice(possible), NUM_CHOICES[task] - 1)
    return {"question": " ".join(tale.sentences[:position])} | _options(tale.sentences[position], wrong, rng)


def _contradictions(tale: Story, position: int) -> dict[str, list[str]]:
    """Variable -> sentence number `position` with that one changed, in every way that earlier sentences contradict."""
    right = parse_sentence(tale.sentences[position])
    assert right.template is not None, f"the story world cannot read its own sentence {right.text!r}"
    told: dict[str, str] = {}
    for sentence in tale.sentences[:position]:
        told |= parse_sentence(sentence).commits
    by_variable = {}
    for variable, values in GRAMMAR.world.variables.items():
        changed = [GRAMMAR.with_implied(tale.variables | {variable: value}) for value in values]
        sentences = dict.fromkeys(
            GRAMMAR.write(right.template, variables) for variables in changed
        )  # distinct, in order
        by_variable[variable] = [sentence for sentence in sentences if _disagrees(sentence, told)]
    return by_variable


def _disagrees(sentence: str, told: dict[str, str]) -> bool:
    return any(told.get(variable, value) != value for variable, value in parse_sentence(sentence).commits.items())


def _options(answer: str, wrong: list[str], rng: random.Random) -> dict[str, Any]:
    position = rng.randrange(len(wrong) + 1)
    choices = [*wrong[:position], answer, *wrong[position:]]
    return {"choices": choices, "answer": answer, "answer_index": position}
