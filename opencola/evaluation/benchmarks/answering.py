"""One protocol for every model: it is given prompts, writes, and what it wrote is judged (evaluation.md).

Nothing here knows a model: `AnswerWriter` and `Scorer` are any callables that do what their words say. What they draw
depends on the ids that they are given, and an id is the place of a record in its task: neither batches nor processes,
nor what was done before, change a record.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from opencola.errors import UserError
from opencola.evaluation.benchmarks.tasks import Question, Task
from opencola.evaluation.statistics import Share, share
from opencola.evaluation.writing import Continuation, LastWord, Writer
from opencola.worlds.stories import Story

AnswerWriter = Callable[[Sequence[str], Sequence[int]], list[str]]
"""Prompts and their ids -> what the model writes after each, unchanged."""
Scorer = Callable[[Sequence[tuple[str, str]], Sequence[int]], list[float]]
"""(prompt, continuation) pairs and their ids -> log-probabilities of the continuations in nats."""

RIGHT = "right"
"""What the model wrote was: of a story, consistent as a whole."""
DIGITS = 6
"""Decimals of a log-probability in a record: in float64 the last ones depend on what was computed together."""


@dataclass(frozen=True)
class Job:
    """What a model is asked, item by item, and what is made of what it writes."""

    name: str
    """Its task: the field `task` of its records."""
    kind: str
    """The field `record` of its records."""
    prompts: tuple[str, ...]
    """Of every item; an item's place is its id."""
    judge: Callable[[int, str, Sequence[float] | None], dict[str, Any]]
    """(item, generation, log-probabilities of its options where they were scored) -> the other fields of its record."""
    choices: tuple[tuple[str, ...], ...] | None = None
    """Options of every item; None: it has none to score."""
    max_new_tokens: int | None = None
    """Its own budget; None: the protocol's."""


@dataclass(frozen=True)
class ItemBatch:
    """Some of a job's items, to be done together."""

    job: str
    ids: tuple[int, ...]
    prompts: tuple[str, ...]
    choices: tuple[tuple[str, ...], ...] | None
    max_new_tokens: int | None


@dataclass(frozen=True)
class Answers:
    """What a model made of a batch."""

    batch: ItemBatch
    texts: list[str]
    nats: list[list[float]] | None
    """Of every item's options; None where they were not scored."""


def make_batches(job: Job, size: int) -> list[ItemBatch]:
    """All items of a job, `size` at a time: prompts of like length, which cost little padding, the longest first."""
    order = sorted(range(len(job.prompts)), key=lambda i: -len(job.prompts[i]))
    parts = [tuple(order[first : first + size]) for first in range(0, len(order), size)]
    return [
        ItemBatch(
            job.name,
            ids,
            tuple(job.prompts[i] for i in ids),
            tuple(job.choices[i] for i in ids) if job.choices is not None else None,
            job.max_new_tokens,
        )
        for ids in parts
    ]


def answer(batch: ItemBatch, write: AnswerWriter, score: Scorer | None = None) -> Answers:
    """Have a model write after all prompts and, with `score`, score a space and each option in their place.

    All options of a record are scored under its own id: what is drawn is the same for all of them.
    """
    texts = write(batch.prompts, batch.ids)
    if score is None or batch.choices is None:
        return Answers(batch, texts, None)
    asked = list(zip(batch.ids, batch.prompts, batch.choices, strict=True))
    pairs = [(prompt, f" {choice}") for _, prompt, choices in asked for choice in choices]
    nats = iter(score(pairs, [i for i, _, choices in asked for _ in choices]))
    return Answers(batch, texts, [[next(nats) for _ in choices] for choices in batch.choices])


def to_records(job: Job, answers: Answers) -> list[dict[str, Any]]:
    """The records of a batch's items, as they stand in the file of results."""
    nats = answers.nats if answers.nats is not None else [None] * len(answers.texts)
    return [
        {"record": job.kind, "task": job.name, "index": i, **job.judge(i, text, sums)}
        for i, text, sums in zip(answers.batch.ids, answers.texts, nats, strict=True)
    ]


def benchmark(task: Task, records: Sequence[Question], demonstrations: Sequence[Question]) -> Job:
    """A benchmark's records, to be answered. Raises UserError for another number of demonstrations than it takes."""

    def judge(item: int, generation: str, sums: Sequence[float] | None) -> dict[str, Any]:
        record = records[item]
        grade = task.grade(record, generation)
        gold = grade.gold if record.answer_index is None else record.answer_index
        return {
            "id": record.id,
            "prompt": prompts[item],
            "generation": generation,
            "truncated": grade.text,
            "choice": grade.choice,
            "gold": grade.gold,
            "correct": grade.correct,
            "parsed": grade.parsed,
            "agrees": grade.agrees,
            "answer": record.answer,
            "options": record.choices,
            "likelihood": None if sums is None else choose(sums, record.choices, gold),
        }

    prompts = tuple(task.prompt(record, demonstrations) for record in records)
    choices = tuple(record.choices for record in records) if task.options else None
    return Job(task.name, "answer", prompts, judge, choices)


def choose(sums: Sequence[float], choices: Sequence[str], gold: int | None) -> dict[str, Any]:
    """The option of the largest log-probability, and that of the largest one per byte of its text; the first of equals.

    gold: the right option, None where that is not known. Raises UserError for a figure that is not finite.
    """
    if not all(map(math.isfinite, sums)):
        raise UserError(f"log-probabilities {list(sums)} are not all finite: the weights are damaged, or diverged")
    sums = [round(nats, DIGITS) for nats in sums]
    sizes = [len(choice.encode()) for choice in choices]
    per_byte = [nats / max(1, size) for nats, size in zip(sums, sizes, strict=True)]
    by_sum, by_byte = sums.index(max(sums)), per_byte.index(max(per_byte))
    return {
        "sum": sums,
        "bytes": sizes,
        "choice_sum": by_sum,
        "choice_per_byte": by_byte,
        "correct_sum": None if gold is None else by_sum == gold,
        "correct_per_byte": None if gold is None else by_byte == gold,
    }


Ask = Callable[[Sequence[Story], Writer, int], Sequence[Continuation] | Sequence[LastWord]]
"""`stories.continue_stories` or `stories.predict_last_words`."""


def about_stories(name: str, kind: str, stories: Sequence[Story], ask: Ask, max_new_tokens: int) -> Job:
    """Something that is asked of held-out stories."""

    def judge(item: int, generation: str, _: Sequence[float] | None) -> dict[str, Any]:
        (answered,) = ask(stories[item : item + 1], lambda prompts, budget: [generation], max_new_tokens)
        return asdict(answered)

    unanswered = ask(stories, lambda prompts, budget: [""] * len(prompts), max_new_tokens)
    return Job(name, kind, tuple(item.prompt for item in unanswered), judge, max_new_tokens=max_new_tokens)


def summary(records: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], Share]:
    """The shares of right records, by task and by what is right, in the records' order."""
    right_by: dict[tuple[str, str], list[bool]] = {}
    for record in records:
        right = {RIGHT: record["consistent"] if record["record"] == "story" else record["correct"]}
        if likelihood := record.get("likelihood"):
            right |= {"likeliest option": likelihood["correct_sum"]}
            right |= {"likeliest option, per byte": likelihood["correct_per_byte"]}
        for title, value in right.items():
            right_by.setdefault((record["task"], title), []).extend([value] if value is not None else [])
    return {key: share(sum(values), len(values)) for key, values in right_by.items()}
