"""What results files say: the protocol's figures for each model, and pairs of models on the same records."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from opencola.evaluation.benchmarks.answering import NOT_FINITE
from opencola.evaluation.benchmarks.tasks import TASKS, Task, find_task
from opencola.evaluation.reporting.results import LAST_WORD, SAMPLES, STORIES, Answer, Results, WrittenSample
from opencola.evaluation.statistics import Paired, Scores, Share, compare, perplexity, score, share, tasks_average
from opencola.evaluation.writing import continuation_shares, last_word_scores

OPTIONS = ("by_sum", "by_byte")
"""How the likeliest option is found: by log-probability, or by log-probability a byte."""
_FIELDS = {"by_sum": "correct_sum", "by_byte": "correct_per_byte"}


@dataclass(frozen=True)
class TaskSummary:
    """A task's figures for one model, shares as fractions of 1. `likelihood`: accuracy of the likeliest option, in the
    ways of `OPTIONS`, on the records whose right option is known; empty where none was scored."""

    task: Task
    scores: Scores
    likelihood: Mapping[str, Share]


@dataclass(frozen=True)
class SampleSummary:
    """The samples of one temperature (None: held-out texts). `perplexity`: exp of the mean -log p of the `judge`'s
    tokens, None where it has judged none or not all of them."""

    temperature: float | None
    count: int
    mean_tokens: float
    judge: str
    perplexity: float | None


@dataclass(frozen=True)
class Summary:
    """What one results file says. `name`: of the model, unlike that of any other file in the report."""

    name: str
    results: Results
    tasks: Sequence[TaskSummary]
    """In the protocol's order; without those that have no records yet."""

    @property
    def average(self) -> float | None:
        """The plain mean of the tasks' accuracies; None without tasks."""
        return tasks_average([part.scores.accuracy for part in self.tasks]) if self.tasks else None

    @property
    def estimator(self) -> str:
        """How likelihoods were computed; "" where they were not."""
        likelihood = self.results.run["likelihood"]
        return "" if likelihood is None else str(likelihood["estimator"])

    def find(self, task: Task) -> TaskSummary | None:
        """A task's figures, where there are any."""
        return next((part for part in self.tasks if part.task == task), None)

    @property
    def stories(self) -> Mapping[str, Share]:
        """Shares of the story tasks (see `stories.continuation_shares`); empty where these were not done."""
        shares = continuation_shares(self.results.stories) if self.results.stories else {}
        if self.results.last_words:
            shares["last_words"] = last_word_scores(self.results.last_words)[0]
        return shares

    @property
    def last_word_ceiling(self) -> float | None:
        """The best accuracy that anyone can expect on last words; None where these were not asked."""
        return last_word_scores(self.results.last_words)[1] if self.results.last_words else None

    @property
    def samples(self) -> list[SampleSummary]:
        """Of every temperature."""
        groups: dict[float | None, list[WrittenSample]] = {}
        for sample in self.results.samples:
            groups.setdefault(sample.temperature, []).append(sample)
        return [_samples(temperature, samples) for temperature, samples in groups.items()]


@dataclass(frozen=True)
class Comparison:
    """Two models on the records of a task that both have answered."""

    first: str
    second: str
    task: Task
    paired: Paired
    count: int


def summarise(results: Sequence[Results]) -> list[Summary]:
    """A summary of every file. Models of one name are told apart by their files."""
    return [
        Summary(name, source, [_task(find_task(task), answers) for task, answers in source.answers.items() if answers])
        for name, source in zip(names(results), results, strict=True)
    ]


def names(results: Sequence[Results]) -> list[str]:
    """A name for every file, each different as long as the files are."""
    models = [str(source.run["model"]) for source in results]
    return [
        f"{model} ({source.file})" if models.count(model) > 1 else model
        for model, source in zip(models, results, strict=True)
    ]


def _task(task: Task, answers: Sequence[Answer]) -> TaskSummary:
    likelihood = {}
    for way in OPTIONS:
        known = [
            right for answer in answers if answer.likelihood and (right := answer.likelihood[_FIELDS[way]]) is not None
        ]
        if known:
            likelihood[way] = share(sum(known), len(known))
    return TaskSummary(task, score(answers, task.chance), likelihood)


def _samples(temperature: float | None, samples: Sequence[WrittenSample]) -> SampleSummary:
    judged = [sample.judge for sample in samples if sample.judge is not None]
    nats, tokens = (sum(judgement[name] for judgement in judged) for name in ("nats", "tokens"))
    judges = {judgement["name"] for judgement in judged}
    whole = len(judged) == len(samples) and len(judges) == 1 and tokens > 0
    return SampleSummary(
        temperature,
        len(samples),
        fmean(sample.num_tokens for sample in samples),
        ", ".join(sorted(judges)),
        perplexity(nats / tokens) if whole else None,
    )


def pairs(summaries: Sequence[Summary]) -> list[Comparison]:
    """McNemar's test of every two models on every task, on records of the same id, options and right answer that both
    have answered; tasks without such records are left out."""
    compared = []
    for first, second in itertools.combinations(summaries, 2):
        for task in TASKS:
            first_right, second_right = (
                _right(summary.results.answers.get(task.name, ())) for summary in (first, second)
            )
            both = first_right.keys() & second_right.keys()
            if both:
                tested = compare({key: first_right[key] for key in both}, {key: second_right[key] for key in both})
                compared.append(Comparison(first.name, second.name, task, tested, len(both)))
    return compared


def _right(answers: Sequence[Answer]) -> dict[tuple[str | int, str, tuple[str, ...]], bool]:
    return {(answer.id, answer.answer, answer.options): answer.correct for answer in answers}


def rows(summaries: Sequence[Summary]) -> Iterator[dict[str, Any]]:
    """Every figure as an object for JSON: shares in percent with their 95 % interval and number of records."""
    for summary in summaries:
        head = {"model": summary.name, "file": str(summary.results.file)}
        for task, (there, asked) in summary.results.counts.items():
            bad = {NOT_FINITE: summary.results.not_finite[task]} if task in summary.results.not_finite else {}
            yield {**head, "task": task, "figure": "records", "unit": "", "value": there, "asked": asked, **bad}
        for part in summary.tasks:
            scores = part.scores
            shares = {
                "accuracy": scores.accuracy,
                "parse_rate": scores.parse_rate,
                "accuracy_given_parse": scores.accuracy_given_parse,
                "chance_corrected_accuracy": scores.chance_corrected,
                **{f"likelihood_accuracy_{way}": value for way, value in part.likelihood.items()},
            }
            for name, value in shares.items():
                label = {"estimator": summary.estimator} if name.startswith("likelihood") else {}
                yield {**head, "task": part.task.name, "figure": name, **_percent(value), **label}
            yield {**head, "task": part.task.name, "figure": "chance", "unit": "%", "value": 100 * scores.chance}
        if summary.average is not None:
            average = {"figure": "tasks_average", "unit": "%", "value": 100 * summary.average}
            yield {**head, "task": None, **average, "tasks": [part.task.name for part in summary.tasks]}
        for name, value in summary.stories.items():
            task = LAST_WORD if name == "last_words" else STORIES
            yield {**head, "task": task, "figure": name, **_percent(value)}
        if summary.last_word_ceiling is not None:
            ceiling = {"figure": "last_words_ceiling", "unit": "%", "value": 100 * summary.last_word_ceiling}
            yield {**head, "task": LAST_WORD, **ceiling}
        for samples in summary.samples:
            yield {**head, "task": SAMPLES, "figure": "samples", "unit": "", **asdict(samples)}
    for pair in pairs(summaries):
        tested = pair.paired
        yield {
            "models": [pair.first, pair.second],
            "task": pair.task.name,
            "figure": "difference",
            "unit": "percentage points",
            "value": 100 * tested.difference,
            "p_value": tested.p_value,
            "both": tested.both,
            "only_first": tested.only_first,
            "only_second": tested.only_second,
            "neither": tested.neither,
            "count": pair.count,
        }


def _percent(of_all: Share) -> dict[str, Any]:
    ends = {"value": of_all.value, "low": of_all.low, "high": of_all.high}
    return {"unit": "%", **{name: 100 * value for name, value in ends.items()}, "count": of_all.count}


def warnings(summaries: Sequence[Summary]) -> list[str]:
    """What a reader must know first, in plain words: which runs are not finished or not finite."""
    texts = []
    for summary in summaries:
        lacking = [f"{title(task)} {n:,} of {asked:,}" for task, (n, asked) in summary.results.unfinished.items()]
        if lacking:
            texts.append(f"{summary.name} is not finished; records: {', '.join(lacking)}.")
        if bad := [f"{title(task)} {count:,}" for task, count in summary.results.not_finite.items()]:
            texts.append(f"Records of {summary.name} are not finite, and count as not right: {', '.join(bad)}.")
    return texts


def title(task: str) -> str:
    """A task's name for people."""
    return {STORIES: "stories", LAST_WORD: "last words", SAMPLES: "samples"}.get(task) or find_task(task).title
