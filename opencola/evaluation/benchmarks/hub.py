"""The eight benchmarks from where they come from: datasets of the Hugging Face Hub, and Story Cloze's file.

A mapping takes a row of the dataset, as it is there, to the object that a line of the task's JSONL file holds, so that
both ways give the same prompts. Details that the public release's records settle are kept: SIQA's questions come
without their context, HellaSwag's contexts without their activity, RACE's question follows its article after a space,
and of SQuAD's answers the first counts. Ids are numbers of rows (LAMBADA's count from 1), or SQuAD's and Story Cloze's
own.
"""

import csv
import importlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opencola.errors import UserError
from opencola.evaluation.benchmarks.tasks import Question, Task, parse_question

Row = Mapping[str, Any]

STORY_CLOZE = "https://cs.rochester.edu/nlp/rocstories/"
CONVERTED = "refs/convert/parquet"
"""The Hub's own copy, as Parquet, of datasets that come as a script, which `datasets` no longer runs."""


@dataclass(frozen=True)
class Source:
    """Where a task's rows are."""

    dataset: str
    split: str
    config: str | None = None
    revision: str | None = None
    """None: the newest."""
    folder: str | None = None
    """In the dataset's repository; None: where its card says."""


SOURCES: Mapping[str, Source] = {
    "lambada": Source("EleutherAI/lambada_openai", "test", revision=CONVERTED, folder="default"),
    "mmlu": Source("cais/mmlu", "test", "all"),
    "obqa": Source("allenai/openbookqa", "test", "main"),
    "hellaswag": Source("Rowan/hellaswag", "validation"),
    "race": Source("ehovy/race", "test", "high"),
    "siqa": Source("allenai/social_i_qa", "validation", revision=CONVERTED, folder="default"),
    "squad": Source("rajpurkar/squad", "validation"),
}


def lambada(row: Row, number: int) -> dict[str, Any]:
    """`text`: the passage with its last word."""
    passage, word = row["text"].rsplit(maxsplit=1)
    return {"id": number + 1, "question": passage, "answer": word}


def mmlu(row: Row, number: int) -> dict[str, Any]:
    """`question`, `choices`, and `answer`, the right one's number."""
    return multiple_choice(number, row["question"], row["choices"], row["answer"])


def obqa(row: Row, number: int) -> dict[str, Any]:
    """`question_stem`, `choices` with their `text` and `label`, and `answerKey`, a label."""
    options = row["choices"]
    return multiple_choice(number, row["question_stem"], options["text"], options["label"].index(row["answerKey"]))


def hellaswag(row: Row, number: int) -> dict[str, Any]:
    """`ctx`, `endings`, and `label`, the right one's number as a text."""
    return multiple_choice(number, row["ctx"], row["endings"], int(row["label"]))


def race(row: Row, number: int) -> dict[str, Any]:
    """`article`, `question`, `options`, and `answer`, a letter."""
    question = f"{row['article'].strip()} {row['question'].strip()}"
    return multiple_choice(number, question, row["options"], "ABCD".index(row["answer"]))


def siqa(row: Row, number: int) -> dict[str, Any]:
    """`context` (left out), `question`, `answerA`, `answerB`, `answerC`, and `label`, counted from 1, as a text."""
    options = [row[f"answer{letter}"] for letter in "ABC"]
    return multiple_choice(number, row["question"], options, int(row["label"]) - 1)


def squad(row: Row, number: int) -> dict[str, Any]:
    """`id`, `context`, `question`, and `answers` with their `text`."""
    return {"answer": row["answers"]["text"][0], **{key: row[key] for key in ("id", "context", "question")}}


def story_cloze(row: Row, number: int) -> dict[str, Any]:
    """The columns of the task's own files: four sentences, two endings, and the right one's number, counted from 1."""
    story = " ".join(row[f"InputSentence{i}"] for i in (1, 2, 3, 4))
    endings = [row[f"RandomFifthSentenceQuiz{i}"] for i in (1, 2)]
    return {**multiple_choice(number, story, endings, int(row["AnswerRightEnding"]) - 1), "id": row["InputStoryid"]}


def multiple_choice(number: int, question: str, choices: Iterable[str], answer: int) -> dict[str, Any]:
    """A question with options, of which number `answer` is right. Raises IndexError where there is none."""
    options = list(choices)
    return {
        "id": number,
        "question": question,
        "choices": options,
        "answer": options[answer],
        "answer_index": answer,
    }


MAPPINGS: Mapping[str, Callable[[Row, int], dict[str, Any]]] = {
    mapping.__name__: mapping for mapping in (lambada, mmlu, obqa, hellaswag, race, siqa, squad, story_cloze)
}


def to_questions(task: Task, rows: Iterable[Row], place: str) -> Iterator[Question]:
    """A record of every row; `place` begins the messages.

    Raises UserError, naming place and number of the row (from 0), for one that does not have the dataset's columns, or
    makes no record.
    """
    for number, row in enumerate(rows):
        where = f"{place}, row {number}"
        try:
            made = MAPPINGS[task.name](row, number)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise UserError(f"{where}: not as {task.title}'s rows are ({reason})") from error
        yield parse_question(made, task, where)


def read_hub(task: Task, limit: int | None = None, story_cloze_file: Path | None = None) -> list[Question]:
    """A task's first `limit` records (all of them without it), streamed from the Hub.

    Story Cloze's come from the .csv file that its authors send. Raises UserError where the package `datasets` is
    missing, the dataset cannot be read, a row is not as it should be, or Story Cloze's file was not given, and
    FileNotFoundError where it is not there.
    """
    if limit is not None and limit < 1:
        raise UserError(f"the limit must be at least 1, but is {limit}")
    if task.name == "story_cloze":
        place, rows = str(story_cloze_file), read_story_cloze(story_cloze_file)
    else:
        source = SOURCES[task.name]
        place, rows = f"{source.dataset}, {source.split}", stream(task, source)
    records = list(to_questions(task, itertools.islice(rows, limit), place))
    if not records:
        raise UserError(f"{place}: no records")
    return records


def stream(task: Task, source: Source) -> Iterator[Row]:
    """The rows of a dataset. Raises UserError where they cannot be read."""
    try:
        datasets = importlib.import_module("datasets")
    except ModuleNotFoundError as error:
        raise UserError(f"{task.title} from the Hub needs the package datasets: pip install 'datasets'") from error
    try:
        yield from datasets.load_dataset(
            source.dataset,
            source.config,
            split=source.split,
            revision=source.revision,
            data_dir=source.folder,
            streaming=True,
        )
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"cannot read {source.dataset}: {reason}; without the Hub, give a folder with {task.name}.jsonl"
        ) from error


def read_story_cloze(file: Path | None) -> Iterator[Row]:
    """The rows of Story Cloze's validation or test file of 2016 or 2018; tests without answers cannot be graded."""
    if file is None:
        raise UserError(
            f"Story Cloze is not on the Hub: its authors give it out on request ({STORY_CLOZE}); then name its .csv "
            "file, or make story_cloze.jsonl of it, or leave the task out"
        )
    with file.open(encoding="utf-8-sig", newline="") as lines:
        try:
            yield from csv.DictReader(lines)
        except (UnicodeDecodeError, csv.Error) as error:
            raise UserError(f"{file}: not a CSV file in UTF-8: {error}") from error
