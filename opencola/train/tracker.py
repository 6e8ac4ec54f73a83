"""What a run reports: one JSON object per line of `metrics.jsonl`, and a progress bar."""

import json
import math
import os
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from torch import Tensor

from opencola.models.language_model import Loss
from opencola.train.checkpoint import TrainState
from opencola.train.distributed import is_main, mean

Value = float | list[Any] | None


class Report:
    """Records of a run, every `log_every` steps, on file and on the screen; a context manager.

    A record holds step, tokens (seen so far), seconds, tokens_per_second, learning_rate/<optimizer>, and, averaged over
    the steps since the last record, loss, loss/<term>, the loss's metrics by name, and gradient_norm.
    """

    def __init__(self, folder: Path, state: TrainState, log_every: int, display: bool) -> None:
        """Append to `folder/metrics.jsonl`, of which only the records up to the state's step are kept.

        On several processes only the main one writes; all of them take part in the means.
        """
        path = folder / "metrics.jsonl"
        if is_main():
            folder.mkdir(parents=True, exist_ok=True)
            old = path.read_text().splitlines(keepends=True) if path.exists() else []
            kept = (line for line in old if line.endswith("\n") and json.loads(line)["step"] <= state.step)
            path.write_text("".join(kept))
        self._file = (path if is_main() else Path(os.devnull)).open("a")
        self._log_every = log_every
        self._means = Means()
        self._last = (state.num_tokens, state.seconds)
        self._bar = Progress(
            TextColumn("step {task.fields[step]}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            disable=not display,
        )
        self._task = self._bar.add_task("train", total=1.0, step=state.step, figures="")

    def __enter__(self) -> "Report":
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()
        self._file.close()

    def step(self, state: TrainState, progress: float, loss: Loss, norm: Tensor, rates: dict[str, float]) -> None:
        """Take in a step that has just been made, and write a record if one is due (always at the run's end)."""
        terms = {f"loss/{name}": term for name, term in loss.terms.items()}
        self._means.add({"loss": loss.total, **terms, **loss.metrics, "gradient_norm": norm})
        self._bar.update(self._task, completed=min(1.0, progress), step=state.step)
        if state.step % self._log_every and progress < 1:
            return
        num_tokens, seconds = state.num_tokens - self._last[0], state.seconds - self._last[1]
        self._last = (state.num_tokens, state.seconds)
        record: dict[str, Value] = {
            "step": state.step,
            "tokens": state.num_tokens,
            "seconds": state.seconds,
            "tokens_per_second": num_tokens / seconds,
            **{f"learning_rate/{name}": rate for name, rate in rates.items()},
            **self._means.take(),
        }
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        self._file.flush()
        self._bar.update(self._task, figures=f"loss {record['loss']:.4g}, {num_tokens / seconds:,.0f} tokens/s")


class Means:
    """Means of named tensors over the steps that had them; entries that are not a number are left out."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, Tensor] = {}

    def add(self, values: dict[str, Tensor]) -> None:
        """Take in a step's values: scalars or vectors, on any device (nothing is copied to the host here)."""
        for name, value in values.items():
            value = value.detach().float()
            self._sums[name] = self._sums.get(name, torch.zeros_like(value)) + value.nan_to_num()
            self._counts[name] = self._counts.get(name, torch.zeros_like(value)) + ~value.isnan()

    def take(self) -> dict[str, Value]:
        """The means over all processes, as plain numbers and lists, and start anew.

        None stands for no value, as JSON has no NaN.
        """
        sums, counts = mean(self._sums), mean(self._counts)
        means = {name: plain((sums[name] / counts[name]).tolist()) for name in sums}
        self._sums, self._counts = {}, {}
        return means


def plain(value: Any) -> Value:
    """Numbers, or nested lists of them, with None for those that are not finite."""
    if isinstance(value, list):
        return [plain(entry) for entry in value]
    return value if math.isfinite(value) else None
