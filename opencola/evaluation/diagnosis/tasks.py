"""What `opencola diagnose` has a model write: texts of which every single token can be judged exactly.

A run is what a model writes after a beginning of a text. Its tokens are judged one by one, up to the first after which
no text of the task can go on: the failure. Failures per judged token do not depend on how long runs are.
"""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from opencola.evaluation.writing import PROMPT_SENTENCES, held_out
from opencola.text.tokenizer import UNFINISHED, Tokenizer
from opencola.worlds import brackets, story_prefix
from opencola.worlds.stories import log_probability

BLIND = 400  # guesses at least


@dataclass(frozen=True)
class Task:
    """Whole `texts` of a language, each with the `prompt` that it begins with, and the language itself: `can_begin`
    says whether any text begins so, `is_whole` whether it is one."""

    name: str
    texts: tuple[str, ...]
    prompts: tuple[str, ...]
    can_begin: Callable[[str], bool]
    is_whole: Callable[[str], bool]


@dataclass(frozen=True)
class Cut:
    """A place in a text: the tokens `before` it, its number `text`, and the tokens `after` it, the end of text last."""

    text: int
    before: tuple[int, ...]
    after: tuple[int, ...]


@dataclass(frozen=True)
class Run:
    """What was written after a beginning of text number `text`: whether it failed, and how many tokens were judged."""

    text: int
    failed: bool
    tokens: int


def stories(count: int) -> Task:
    """Held-out stories of the story world; a prompt is the first two sentences."""
    tales = held_out(count)
    prompts = tuple(" ".join(tale.sentences[:PROMPT_SENTENCES]) for tale in tales)
    return Task("stories", tuple(tale.text for tale in tales), prompts, story_prefix.can_begin, is_story)


def is_story(text: str) -> bool:
    """Whether the story world can tell this text."""
    return math.isfinite(log_probability(text))


def nests(count: int) -> Task:
    """Nests of brackets; a prompt ends with the first closing one, after which all is determined."""
    texts = tuple(brackets.nest(-1, index) for index in range(count))
    return Task("brackets", texts, tuple(map(brackets.prompt, texts)), brackets.can_begin, brackets.is_nest)


def cuts(task: Task, tokenizer: Tokenizer, per_text: int, chunk: int, inside: bool, seed: int) -> list[Cut]:
    """Up to `per_text` places of each text: between blocks of `chunk` tokens or, with `inside`, within one.

    The first one behind the prompt is always among them, because there is much to choose from; the others are drawn. A
    text without such a place behind its prompt is cut at its last one, if it has any.
    """
    all_cuts = []
    for number, (text, prompt) in enumerate(zip(task.texts, task.prompts, strict=True)):
        ids = (*tokenizer.encode(text), tokenizer.eos_id)
        places = [place for place in range(1, len(ids)) if bool(place % chunk) == inside]
        first, *others = [place for place in places if place >= len(tokenizer.encode(prompt))] or places[-1:] or [0]
        rng = random.Random(f"{seed} {number}")  # the same texts are cut alike, however many there are
        chosen = sorted([first, *rng.sample(others, min(per_text - 1, len(others)))])
        all_cuts += [Cut(number, ids[:place], ids[place:]) for place in chosen if place]
    return all_cuts


def beginnings(task: Task, tokenizer: Tokenizer) -> list[Cut]:
    """Every text cut behind its prompt."""
    starts = []
    for number, (text, prompt) in enumerate(zip(task.texts, task.prompts, strict=True)):
        first, rest = tokenizer.encode_pair(prompt, text.removeprefix(prompt))
        starts.append(Cut(number, tuple(first), (*rest, tokenizer.eos_id)))
    return starts


def blind(cuts: Sequence[Cut], seed: int) -> list[tuple[Cut, int]]:
    """Every cut with tokens that stand behind cuts, drawn: the guess of a writer that does not read the text.

    As many for each cut as make some hundreds in all.
    """
    rng, guesses = random.Random(seed), []
    for _ in range(1 + BLIND // max(1, len(cuts))):
        guesses += [(cut, rng.choice(cuts).after[0]) for cut in cuts]
    return guesses


def judge(task: Task, tokenizer: Tokenizer, cut: Cut, written: Sequence[int]) -> Run:
    """The verdict on tokens written at a cut; those behind an end of text are not looked at."""
    for count in range(1, len(written) + 1):
        if is_over(task, tokenizer, cut, written[:count]):
            return Run(cut.text, not may_stand(task, tokenizer, [*cut.before, *written[:count]]), count)
    return Run(cut.text, False, len(written))


def is_over(task: Task, tokenizer: Tokenizer, cut: Cut, written: Sequence[int]) -> bool:
    """Whether tokens written at a cut hold an end of text or a failure."""
    return tokenizer.eos_id in written or not may_stand(task, tokenizer, [*cut.before, *written])


def may_stand(task: Task, tokenizer: Tokenizer, ids: Sequence[int]) -> bool:
    """Whether a text of the task begins with these tokens, or is they, where the last one ends the text.

    The last one must be text or the end of it: other special tokens leave no trace in texts, but have no place there.
    """
    if ids[-1] == tokenizer.eos_id:
        return task.is_whole(tokenizer.decode(ids[:-1]))
    return tokenizer.decode(ids[-1:]) != "" and task.can_begin(tokenizer.decode(ids).rstrip(UNFINISHED))


def places(cut: Cut, written: Sequence[int], run: Run, chunk: int) -> list[Cut]:
    """The places at which a run began a block: its own text cut there, up to the block in which it ended."""
    ids, first = (*cut.before, *written), len(cut.before)
    starts = [place for place in range(first, first + run.tokens) if place == first or place % chunk == 0]
    return [Cut(cut.text, ids[:place], ids[place:]) for place in starts]
