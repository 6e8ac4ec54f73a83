"""Have a model answer benchmarks and continue stories, and judge what it writes.

Every record goes to results.jsonl: prompt, generation, verdict. What depends on the order of work is not in there:
the file is the same at any --batch-size, by any number of --processes, and after any interruption, from which the
same command goes on. Settings of generation are the model's own, but for 32 new tokens at temperature 0.

examples:
  opencola evaluate
  opencola evaluate --model runs/mine --data benchmarks/ --out runs/mine/evaluation
  opencola evaluate --model runs/mine --data benchmarks/ --tasks mmlu obqa --limit 100 --likelihood --processes 2
"""

import functools
import hashlib
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import torch

from opencola.checkpoints import hub, parts
from opencola.commands import terminal
from opencola.errors import UserError
from opencola.evaluation.benchmarks import answering
from opencola.evaluation.benchmarks import hub as hub_tasks
from opencola.evaluation.benchmarks.answering import Answers, Ask, ItemBatch, Job, to_records
from opencola.evaluation.benchmarks.results_writer import RESULTS, ResultsWriter
from opencola.evaluation.benchmarks.tasks import (
    DEMONSTRATIONS,
    TASKS,
    Question,
    Task,
    find_task,
    read_demonstrations,
    read_questions,
)
from opencola.evaluation.pool import spread
from opencola.evaluation.screen import progress_bar, put, table
from opencola.evaluation.statistics import tasks_average
from opencola.evaluation.writing import (
    HELD_OUT_SEED,
    PROMPT_SENTENCES,
    continue_stories,
    held_out,
    predict_last_words,
    token_budgets,
)
from opencola.kernels.choice import is_invariant
from opencola.layers.device import device
from opencola.models import build
from opencola.models.language_model import LanguageModel
from opencola.models.text_stream import whole_texts
from opencola.ranges import Count, check
from opencola.run import flags
from opencola.run.export import made_with
from opencola.storage import locked
from opencola.text.lines import append_objects, check_text, write_objects
from opencola.text.tokenizer import Tokenizer

BENCHMARKS = tuple(task.name for task in TASKS)
STORIES: dict[str, tuple[str, Ask]] = {
    "stories": ("story", continue_stories),
    "last_word": ("last_word", predict_last_words),
}
NUM_STORIES = 200
PROTOCOL = {"max_new_tokens": 32, "temperature": 0.0}
DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}
TIMING = "timing.jsonl"
HUB = Path("hub")

Settings = TypeVar("Settings")


@dataclass(frozen=True, kw_only=True)
class EvaluateFlags(flags.OutputFlags, terminal.ModelFlags, Generic[Settings]):
    """What to evaluate, on what, and how."""

    tasks: tuple[str, ...] = ()
    """Benchmarks (lambada, mmlu, obqa, hellaswag, race, siqa, squad, story_cloze) and tasks of the story world
    (stories, last_word), in the order of the results; without it all of them, without --data those of the story
    world."""
    data: Path | None = None
    """Folder of the benchmarks' records, NAME.jsonl for each; or `hub`: the Hugging Face datasets they come from."""
    story_cloze: Path | None = None
    """With --data hub: the .csv file of Story Cloze, which its authors give out on request."""
    demonstrations: Path = DEMONSTRATIONS
    """File of the demonstrations in the prompts; without it the project's own."""
    limit: Count | None = None
    """Largest number of records to take of each benchmark, and number of stories (200 without it); at least 1."""
    out: Path = Path("runs/evaluate")
    """Folder for results.jsonl; the results of the same run that are there already are not made again."""
    likelihood: bool = False
    """Score the options of multiple choice, too: which has the largest log-probability, and the largest per byte."""
    scoring: Settings
    """How options are scored: where that takes many draws, less exactly than `opencola score` does."""
    dtype: Literal["auto", "fp64", "fp32", "bf16"] = "auto"
    """Type to compute in. auto: fp32 on a CPU with kernels (`opencola kernels` says), where texts do not depend on what
    is computed together; elsewhere fp64, where they do not either, but for chance. With other types there, which are
    faster on GPUs, two tokens that are nearly as probable as each other may swap with another --batch-size."""
    batch_size: Count = 32
    """Number of prompts to answer at a time: speed and memory; no record depends on it."""
    processes: Count = 1
    """Number of processes among which the work is divided; at least 1."""
    allow_not_finite: bool = False
    """Go on where what the model writes or scores is not finite, which is an error without it: such records count as
    not right, say so in their field not_finite, and are counted at the end."""
    overwrite: bool = False
    """Start anew, whatever results are there; they stay until the new ones are whole. To go on after an interruption,
    leave it out."""

    def __post_init__(self) -> None:
        check(self)
        for name in self.chosen:
            if name not in (*BENCHMARKS, *STORIES):
                raise UserError(f"unknown task {name!r}: choose among {', '.join((*BENCHMARKS, *STORIES))}")
            if name in BENCHMARKS and self.data is None:
                raise UserError(f"{name} needs --data: the folder that holds {name}.jsonl")
        if len(set(self.chosen)) < len(self.chosen):
            raise UserError(f"--tasks {' '.join(self.chosen)}: each once is enough")

    @property
    def chosen(self) -> tuple[str, ...]:
        """The tasks to do."""
        return self.tasks or ((*BENCHMARKS, *STORIES) if self.data is not None else tuple(STORIES))


def command(argv: Sequence[str]) -> None:
    """Run `opencola evaluate`."""
    folder = hub.locate(terminal.read_model(argv))
    family = parts.family_in(folder)
    scoring = build.scoring_class(family)
    target = EvaluateFlags[scoring]  # type: ignore[valid-type]
    about = {"prog": "opencola evaluate", "description": __doc__}
    options: EvaluateFlags[Any] = terminal.read_flags(target, argv, PROTOCOL, {"scoring": scoring.quick()}, **about)
    if options.dtype == "auto":
        options = replace(options, dtype="fp32" if is_invariant(device()) else "fp64")
    jobs, facts = make_jobs(options, Tokenizer.load(folder))
    header = {
        "record": "run",
        "model": hub.title(options.model),
        "model_hash": hub.hash_model(folder),
        "family": family,
        "tasks": facts,
        "settings": asdict(options.sampling),
        "likelihood": describe(options) if options.likelihood else None,
        "dtype": options.dtype,
        "seed": options.sampling.seed,
        "opencola": made_with(),
    }
    with locked(options.out):
        sizes = {job.name: len(job.prompts) for job in jobs.values()}
        results = ResultsWriter(options.out, header, sizes, options.overwrite)
        run(jobs, results, options)
    records = list(results.records())
    if options.json:
        append_objects(sys.stdout, answering.figures(records))
    else:
        show(records)
    options.say(f"All records are in {options.out / RESULTS}.")


def run(jobs: Mapping[str, Job], results: ResultsWriter, options: EvaluateFlags[Any]) -> None:
    """Make the records that are not there yet, with a bar, and then the file of results."""
    # samples that end together are asked alone
    size = 1 if options.sampling.ends_together else options.batch_size
    batches = [batch for job in jobs.values() for batch in answering.make_batches(job, size)]
    # one of which anything is missing is done as a whole: what is computed together stays the same
    left = [batch for batch in batches if any((batch.job, i) not in results.lines for i in batch.ids)]
    todo = sum(len(batch.ids) for batch in left)
    total, started = len(results.keys), time.time()
    try:
        with results.open() as draft, progress_bar() as progress:
            bar = progress.add_task("", total=total, completed=total - todo)
            for answers in spread(functools.partial(prepare, options), left, options.processes):
                results.append(draft, to_records(jobs[answers.batch.job], answers))
                progress.update(bar, advance=len(answers.texts), description=answers.batch.job)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"{len(results.lines)} of {total} records are kept in {options.out}") from None
    results.finish()
    if left:
        timing = {"seconds": time.time() - started, "records": todo, "batch_size": size, "processes": options.processes}
        write_objects(options.out / TIMING, [timing | {"threads": torch.get_num_threads()}], append=True)


def make_jobs(options: EvaluateFlags[Any], tokenizer: Tokenizer) -> tuple[dict[str, Job], dict[str, dict[str, Any]]]:
    """What the model is asked, by task, and what is to be told of it.

    Raises FileNotFoundError and UserError for records and demonstrations that are not there, or not as they must be.
    """
    jobs: dict[str, Job] = {}
    facts: dict[str, dict[str, Any]] = {}
    stories = held_out(options.limit or NUM_STORIES)
    budgets = dict(zip(STORIES, token_budgets(stories, lambda text: len(tokenizer.encode(text))), strict=True))
    demonstrations = read_demonstrations(options.demonstrations)
    for name in options.chosen:
        if name in STORIES:
            kind, ask = STORIES[name]
            jobs[name] = answering.about_stories(name, kind, stories, ask, budgets[name])
            facts[name] = {
                "records": len(stories),
                "held_out_seed": HELD_OUT_SEED,
                "prompt_sentences": PROMPT_SENTENCES,
                "max_new_tokens": budgets[name],
            }
            continue
        task, shots = find_task(name), demonstrations.get(name, ())
        records, source, content = find_records(options, task)
        for record in (*shots, *records):
            check_text(json.dumps(asdict(record), ensure_ascii=False), f"{source}, record {record.id!r}")
        jobs[name] = answering.benchmark(task, records, shots)
        facts[name] = {
            "file": Path(source).name,
            "sha256": hashlib.sha256(content).hexdigest(),
            "records": len(records),
            "demonstrations_sha256": digest(json.dumps([asdict(shot) for shot in shots])),
        }
    return jobs, facts


def find_records(options: EvaluateFlags[Any], task: Task) -> tuple[list[Question], str, bytes]:
    """A task's records, where they are from, and what tells them from others. Errors as `make_jobs`."""
    assert options.data is not None
    if options.data == HUB:
        records = hub_tasks.read_hub(task, options.limit, options.story_cloze)
        return records, str(HUB), json.dumps([asdict(record) for record in records]).encode()
    file = options.data / f"{task.name}.jsonl"
    if not file.is_file():
        raise FileNotFoundError(f"no such file: {file}; put the records of {task.title} there, or choose --tasks")
    return read_questions(options.data, task)[: options.limit], str(file), file.read_bytes()


def digest(text: str) -> str:
    """SHA-256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()


def prepare(options: EvaluateFlags[Any]) -> Callable[[ItemBatch], Answers]:
    """What a process does with a batch, its model loaded."""
    if options.processes > 1:
        torch.set_num_threads(max(1, torch.get_num_threads() // options.processes))
    model, tokenizer = hub.load(options.model)
    model.to(DTYPES[options.dtype]).requires_grad_(False)
    score = functools.partial(score_options, model, tokenizer, options.scoring) if options.likelihood else None

    def work(batch: ItemBatch) -> Answers:
        budget = batch.max_new_tokens or options.sampling.max_new_tokens
        settings = replace(options.sampling, max_new_tokens=budget)

        def write(prompts: Sequence[str], ids: Sequence[int]) -> list[str]:
            return whole_texts(model, tokenizer, prompts, settings, ids)

        return answering.answer(batch, write, score, options.allow_not_finite)

    return work


def describe(options: EvaluateFlags[Any]) -> dict[str, Any]:
    """What is to be told of how options are scored: what a score says of itself."""
    model, tokenizer = hub.load(options.model)
    score = model.score([[tokenizer.eos_id]], [[tokenizer.eos_id]], options.scoring, pad_id=tokenizer.eos_id)
    return {"estimator": score.estimator, "kind": score.kind, "settings": asdict(options.scoring)}


def score_options(
    model: LanguageModel,
    tokenizer: Tokenizer,
    settings: Any,
    pairs: Sequence[tuple[str, str]],
    ids: Sequence[int],
) -> list[float]:
    """Log-probability of each continuation after its prompt, in nats; no end of text is scored behind it."""
    prompts, continuations = zip(*(tokenizer.encode_pair(*pair) for pair in pairs), strict=True)
    # as in `opencola score`: only ends of text fill up a block as if nothing followed
    score = model.score(prompts, continuations, settings, pad_id=tokenizer.eos_id, ids=ids)
    score.check_finite([f"record {i}, option {option!r}" for i, (_, option) in zip(ids, pairs, strict=True)])
    return [nats.item() for nats in score.total]


def show(records: Sequence[dict[str, Any]]) -> None:
    """The share of right records of each task as a table, and the benchmarks' average."""
    grid = table("task", "", "%", "95 % interval", "records", words=(0, 1))
    shares = answering.summary(records)
    for (task, title), share in shares.items():
        interval = f"{100 * share.low:.2f} to {100 * share.high:.2f}"
        grid.add_row(task, title, f"{100 * share.value:.2f}", interval, str(share.count))
    put(grid)
    if right := answering.of_benchmarks(shares):
        average = 100 * tasks_average([*right.values()])
        print(f"tasks average: {average:.2f} ({len(right)} of the {len(BENCHMARKS)} benchmarks)")
    if bad := sum(answering.count_not_finite(records).values()):
        print(f"{bad} of {len(records)} records are not finite, and count as not right")
