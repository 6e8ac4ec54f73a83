"""One protocol for every model: it is given prompts, writes, and what it wrote is judged (evaluation.md).

Nothing here knows a model: `AnswerWriter` and `Scorer` are any callables that do what their words say. What they draw
depends on the ids that they are given, and an id is the place of a record in its task: neither batches nor processes,
nor what was done before, change a record.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

from opencola.errors import NotFiniteError, UserError
from opencola.evaluation.benchmarks.tasks import TASKS, Question, Task
from opencola.evaluation.statistics import Share, share, tasks_average
from opencola.evaluation.writing import Continuation, LastWord, Writer
from opencola.worlds.stories import Story

T = TypeVar("T")
AnswerWriter = Callable[[Sequence[str], Sequence[int]], list[str]]
"""Prompts and their ids -> what the model writes after each, unchanged."""
Scorer = Callable[[Sequence[tuple[str, str]], Sequence[int]], list[float]]
"""(prompt, continuation) pairs and their ids -> log-probabilities of the continuations in nats."""

RIGHT = "right"
"""What the model wrote was: of a story, consistent as a whole."""
NOT_FINITE = "not_finite"
"""Field of the records of which something is not finite: what."""
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
    """Of every item's options, none where they are not finite; None where they were not scored."""
    faults: Mapping[int, str] = field(default_factory=dict)
    """What was not finite, by the item's id, where that is allowed."""


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


def answer(
    batch: ItemBatch, write: AnswerWriter, score: Scorer | None = None, allow_not_finite: bool = False
) -> Answers:
    """Have a model write after all prompts and, with `score`, score a space and each option in their place.

    All options of a record are scored under its own id: what is drawn is the same for all of them. allow_not_finite:
    where that is raised, the items are done one by one, and those at fault have written "", or have no scores.
    """
    choices = batch.choices or ()

    def written(places: Sequence[int]) -> list[str]:
        return write([batch.prompts[place] for place in places], [batch.ids[place] for place in places])

    def scored(places: Sequence[int]) -> list[list[float]]:
        assert score is not None
        pairs = [(batch.prompts[place], f" {choice}") for place in places for choice in choices[place]]
        nats = iter(score(pairs, [batch.ids[place] for place in places for _ in choices[place]]))
        return [[next(nats) for _ in choices[place]] for place in places]

    faults: dict[int, str] = {}
    texts = _each(written, batch.ids, "", faults if allow_not_finite else None)
    if score is None or batch.choices is None:
        return Answers(batch, texts, None, faults)
    return Answers(batch, texts, _each(scored, batch.ids, [], faults if allow_not_finite else None), faults)


def _each(
    act: Callable[[Sequence[int]], list[T]], ids: Sequence[int], none: T, faults: dict[int, str] | None
) -> list[T]:
    """What `act` makes of all places; with `faults`, one by one where that is not finite, and `none` with the fault."""
    places = range(len(ids))
    try:
        return act(places)
    except NotFiniteError:
        if faults is None:
            raise
    made: list[T] = []
    for place in places:
        try:
            made += act([place])
        except NotFiniteError as error:
            made.append(none)
            faults[ids[place]] = str(error)
    return made


def to_records(job: Job, answers: Answers) -> list[dict[str, Any]]:
    """The records of a batch's items, as they stand in the file of results."""
    nats = answers.nats if answers.nats is not None else [None] * len(answers.texts)
    return [
        {"record": job.kind, "task": job.name, "index": i, **job.judge(i, text, sums), **fault_of(answers, i)}
        for i, text, sums in zip(answers.batch.ids, answers.texts, nats, strict=True)
    ]


def fault_of(answers: Answers, item: int) -> dict[str, str]:
    """The field of a record that is not finite; others lack it."""
    return {NOT_FINITE: answers.faults[item]} if item in answers.faults else {}


def count_not_finite(records: Sequence[Mapping[str, Any]]) -> Counter[str]:
    """How many records of each task are not finite."""
    return Counter(record["task"] for record in records if NOT_FINITE in record)


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

    gold: the right option, None where that is not known. No sums at all stand for what is not finite: nothing is
    chosen. Raises UserError for a figure that is not finite.
    """
    sizes = [len(choice.encode()) for choice in choices]
    if not sums:
        right = None if gold is None else False
        none = {"choice_sum": None, "choice_per_byte": None, "correct_sum": right, "correct_per_byte": right}
        return {"sum": [None] * len(choices), "bytes": sizes, **none}
    if not all(map(math.isfinite, sums)):
        raise UserError(f"log-probabilities {list(sums)} are not all finite: the weights are damaged, or diverged")
    sums = [round(nats, DIGITS) for nats in sums]
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


def of_benchmarks(shares: Mapping[tuple[str, str], Share]) -> dict[str, Share]:
    """The shares that are averaged over benchmarks, by task."""
    names = {task.name for task in TASKS}
    return {task: share for (task, title), share in shares.items() if task in names and title == RIGHT}


def figures(records: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """The shares of `summary` as objects for JSON, and the benchmarks' average last, where there are any."""
    shares, bad = summary(records), count_not_finite(records)
    for (task, title), value in shares.items():
        yield {"task": task, "measure": title, **asdict(value), NOT_FINITE: bad[task]}
    if right := of_benchmarks(shares):
        yield {"task": None, "measure": "tasks average", "value": tasks_average([*right.values()]), "tasks": [*right]}
