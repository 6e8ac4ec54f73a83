"""Results files, as `opencola evaluate` writes them: one JSON object a line, first the run, then its records."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import Any

from opencola.errors import UserError
from opencola.evaluation.benchmarks.answering import NOT_FINITE
from opencola.evaluation.benchmarks.tasks import TASKS
from opencola.evaluation.writing import Continuation, LastWord, Sentence
from opencola.text.lines import read_objects

STORIES, LAST_WORD, SAMPLES = "stories", "last_word", "samples"
KINDS = {"answer": None, "story": STORIES, "last_word": LAST_WORD, "sample": SAMPLES}
"""Records, and the task that each belongs to; answers name theirs."""


@dataclass(frozen=True)
class Answer:
    """The answer to a question, and its grade (see `grading.Grade`)."""

    id: str | int
    prompt: str
    generation: str
    choice: int | None
    gold: int | None
    correct: bool
    parsed: bool
    agrees: bool
    answer: str
    options: tuple[str, ...]
    likelihood: Mapping[str, Any] | None
    """Each option's log-probability (`sum`, nats) and length (`bytes`), the likeliest by either, whether that is
    right (`correct_sum`, `correct_per_byte`; None where the right option is not known)."""


@dataclass(frozen=True)
class WrittenSample:
    """A text that the model wrote unprompted; temperature None: a held-out one. `judge`: its `name`, `nats` (-log p),
    `tokens` and `bytes`; None: not judged."""

    temperature: float | None
    text: str
    num_tokens: int
    judge: Mapping[str, Any] | None


@dataclass(frozen=True)
class Results:
    """What a results file holds, records by task in the order of their indices."""

    file: Path
    run: Mapping[str, Any]
    answers: Mapping[str, Sequence[Answer]]
    """Of every task of the run that is one of `tasks.TASKS`, maybe none yet."""
    stories: Sequence[Continuation]
    last_words: Sequence[LastWord]
    samples: Sequence[WrittenSample]
    not_finite: Mapping[str, int] = field(default_factory=dict)
    """Records of which something is not finite, by task, where there are any."""

    @property
    def counts(self) -> dict[str, tuple[int, int]]:
        """Of every task of the run: records that are there, and that there should be."""
        there = {STORIES: len(self.stories), LAST_WORD: len(self.last_words), SAMPLES: len(self.samples)}
        there |= {name: len(answers) for name, answers in self.answers.items()}
        return {name: (there[name], facts["records"]) for name, facts in self.run["tasks"].items()}

    @property
    def unfinished(self) -> dict[str, tuple[int, int]]:
        """Those that lack records."""
        return {name: (there, asked) for name, (there, asked) in self.counts.items() if there < asked}


def read_results(file: Path) -> Results:
    """Read a results file, or the draft of a run that goes on; blank lines are skipped.

    What stands behind the last line's end was cut off while it was written, and counts as a record that is not there.
    Raises FileNotFoundError, and UserError, naming file, line and field, for what is no such file: another first line,
    a record of a task that the run did not have, a field that is missing or of another type, a record that came before.
    """
    run: dict[str, Any] | None = None
    by_task: dict[str, dict[tuple[float, int], Any]] = {}
    not_finite: Counter[str] = Counter()
    for place, row in read_objects(file, ended=True):
        if run is None:
            run = _run(row, place)
            by_task = {name: {} for name in run["tasks"]}
            continue
        kind = _take(row, "record", str, place)
        if kind not in KINDS:
            raise UserError(f"{place}: field 'record' is {kind!r}, not one of {', '.join(KINDS)}")
        task = KINDS[kind] or _take(row, "task", str, place)
        if task not in by_task or (kind == "answer") != (task in _names()):
            raise UserError(f"{place}: field 'task' is {task!r}, which the run in line 1 does not have")
        record = _READ[kind](row, place)
        # samples are counted anew at each temperature, held-out ones (None) too
        series = -1.0 if not isinstance(record, WrittenSample) or record.temperature is None else record.temperature
        key = (series, _take(row, "index", int, place))
        if key in by_task[task]:
            raise UserError(f"{place}: field 'index' is {key[1]}, as in an earlier record of {task}")
        by_task[task][key] = record
        not_finite[task] += NOT_FINITE in row
    if run is None:
        raise UserError(f"{file}: no results")
    ordered = {task: tuple(records[key] for key in sorted(records)) for task, records in by_task.items()}
    return Results(
        file,
        run,
        {name: ordered[name] for name in _names() if name in ordered},
        ordered.get(STORIES, ()),
        ordered.get(LAST_WORD, ()),
        ordered.get(SAMPLES, ()),
        +not_finite,
    )


def _names() -> list[str]:
    return [task.name for task in TASKS]


def _take(row: Mapping[str, Any], name: str, kind: type | UnionType, place: str) -> Any:
    """A field of such a type; true and false are no numbers."""
    if name not in row:
        raise UserError(f"{place}: field {name!r} is missing")
    value = row[name]
    is_number = not isinstance(value, bool) or kind is bool or kind == bool | None
    if not isinstance(value, kind) or not is_number:
        raise UserError(f"{place}: field {name!r} is {value!r:.80}, not of type {getattr(kind, '__name__', kind)}")
    return value


def _run(row: Mapping[str, Any], place: str) -> dict[str, Any]:
    if row.get("record") != "run":
        raise UserError(f"{place}: not the head of a results file: its field 'record' is not 'run'")
    types: dict[str, type | UnionType] = {
        "model": str, "model_hash": str, "family": str, "tasks": dict, "settings": dict, "likelihood": dict | None,
        "seed": int,
    }  # fmt: skip
    for name, kind in types.items():
        _take(row, name, kind, place)
    for name, facts in row["tasks"].items():
        if name not in (*_names(), STORIES, LAST_WORD, SAMPLES):
            raise UserError(f"{place}: field 'tasks': unknown task {name!r}")
        if not isinstance(facts, dict):
            raise UserError(f"{place}: field 'tasks': {name} is {facts!r:.80}, not an object")
        _take(facts, "records", int, f"{place}, tasks, {name}")
    if row["likelihood"] is not None:
        _take(row["likelihood"], "estimator", str, f"{place}, likelihood")
    return dict(row)


def _texts(row: Mapping[str, Any], name: str, place: str) -> tuple[str, ...]:
    values: list[str] = _take(row, name, list, place)
    for value in values:
        if not isinstance(value, str):
            raise UserError(f"{place}: field {name!r} is {values!r:.80}, not a list of texts")
    return tuple(values)


def _answer(row: Mapping[str, Any], place: str) -> Answer:
    types: dict[str, type | UnionType] = {
        "id": str | int, "prompt": str, "generation": str, "choice": int | None, "gold": int | None, "correct": bool,
        "parsed": bool, "agrees": bool, "answer": str, "likelihood": dict | None,
    }  # fmt: skip
    values = {name: _take(row, name, kind, place) for name, kind in types.items()}
    if values["likelihood"] is not None:
        for name in ("correct_sum", "correct_per_byte"):
            _take(values["likelihood"], name, bool | None, f"{place}, likelihood")
    return Answer(**values | {"options": _texts(row, "options", place)})


def _story(row: Mapping[str, Any], place: str) -> Continuation:
    types: dict[str, type | UnionType] = {
        "prompt": str, "continuation": str, "reference": str, "legal": list, "order_legal": bool, "complete": bool,
        "conflicts": list, "consistent": bool, "log_probability": float | int | None, "sentences": list,
    }  # fmt: skip
    values = {name: _take(row, name, kind, place) for name, kind in types.items()}
    if not all(isinstance(verdict, bool) for verdict in values["legal"]):
        raise UserError(f"{place}: field 'legal' is {values['legal']!r:.80}, not a list of true and false")
    sentences = []
    for sentence in values["sentences"]:
        if not isinstance(sentence, dict):
            raise UserError(f"{place}: field 'sentences' holds {sentence!r:.80}, not an object")
        sentences.append(
            Sentence(*(_take(sentence, field.name, str, f"{place}, sentences") for field in fields(Sentence)))
        )
    values |= {"legal": tuple(values["legal"]), "conflicts": _texts(row, "conflicts", place)}
    return Continuation(**values | {"sentences": tuple(sentences)})


def _last_word(row: Mapping[str, Any], place: str) -> LastWord:
    types: dict[str, type | UnionType] = {
        "prompt": str, "answer": str, "probability": float | int, "continuation": str, "guess": str, "correct": bool,
    }  # fmt: skip
    return LastWord(**{name: _take(row, name, kind, place) for name, kind in types.items()})


def _sample(row: Mapping[str, Any], place: str) -> WrittenSample:
    judge = _take(row, "judge", dict | None, place)
    if judge is not None:
        _take(judge, "name", str, f"{place}, judge")
        for name in ("nats", "tokens", "bytes"):
            _take(judge, name, float | int, f"{place}, judge")
    return WrittenSample(
        _take(row, "temperature", float | int | None, place),
        _take(row, "text", str, place),
        _take(row, "num_tokens", int, place),
        judge,
    )


_READ = {"answer": _answer, "story": _story, "last_word": _last_word, "sample": _sample}
