"""Small results files, as `opencola evaluate` writes them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from opencola.evaluation.benchmarks.tasks import Question, find_task
from opencola.evaluation.writing import continue_stories, held_out, predict_last_words

OPTIONS = ("in the sea", "on a hill", "in a house", "by a lake")


def head(tasks: Mapping[str, int], **changes: Any) -> dict[str, Any]:
    """The first line."""
    return {
        "record": "run", "model": "mine", "model_hash": "ab12", "family": "cola",
        "tasks": {name: {"records": count} for name, count in tasks.items()},
        "settings": {"steps": 16}, "likelihood": None, "seed": 0, **changes,
    }  # fmt: skip


def answer(task: str, index: int, said: str, likelihood: Any = None, right: str = "on a hill") -> dict[str, Any]:
    """A record with a verdict of the task's own."""
    options = OPTIONS[: find_task(task).options]
    record = Question(f"{task}-{index}", "Where was it?", right, options)
    verdict = find_task(task).grade(record, said)
    return {
        "record": "answer", "task": task, "index": index, "id": record.id, "prompt": f"Where was {index}?\nAnswer:",
        "generation": said, "truncated": verdict.text, "choice": verdict.choice, "gold": verdict.gold,
        "correct": verdict.correct, "parsed": verdict.parsed, "agrees": verdict.agrees, "answer": right,
        "options": [*options], "likelihood": likelihood,
    }  # fmt: skip


def answers(task: str, said: Sequence[str]) -> list[dict[str, Any]]:
    """Records of a task."""
    return [answer(task, index, text) for index, text in enumerate(said)]


def scored(by_sum: bool | None, by_byte: bool | None) -> dict[str, Any]:
    """What likelihoods say."""
    return {
        "sum": [-3.0, -2.0], "bytes": [4, 2], "choice_sum": 1, "choice_per_byte": 0,
        "correct_sum": by_sum, "correct_per_byte": by_byte,
    }  # fmt: skip


def stories(count: int) -> list[dict[str, Any]]:
    """Of every two stories the first is told as it was; the last words are all `hill`."""
    tales = held_out(count)

    def tell(prompts: Sequence[str], max_new_tokens: int) -> list[str]:
        return [tale.text[len(prompts[i]) :] if i % 2 == 0 else "" for i, tale in enumerate(tales)]

    told = continue_stories(tales, tell, 80)
    last = predict_last_words(tales, lambda prompts, max_new_tokens: [" hill."] * count, 5)
    return [
        *({"record": "story", "task": "stories", "index": i, **asdict(one)} for i, one in enumerate(told)),
        *({"record": "last_word", "task": "last_word", "index": i, **asdict(one)} for i, one in enumerate(last)),
    ]


def sample(temperature: float | None, index: int, judge: Any = None) -> dict[str, Any]:
    """A text of 4 + index tokens."""
    return {
        "record": "sample", "task": "samples", "temperature": temperature, "index": index, "text": "A fox.",
        "num_tokens": 4 + index, "judge": judge,
    }  # fmt: skip


def write(file: Path, *rows: Mapping[str, Any]) -> Path:
    """One object a line."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file
