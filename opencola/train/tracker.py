"""Making a run's records: means over steps, on file (`metrics.jsonl`, `samples.jsonl`), on screen, and to the sinks."""

import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from torch import Tensor

from opencola.data.batch import Batch
from opencola.errors import UserError
from opencola.models.language_model import Loss, Sample
from opencola.text.lines import append_objects, read_objects, write_objects
from opencola.train.checkpoint import TrainState
from opencola.train.distributed import mean, num_processes
from opencola.train.means import Means
from opencola.train.sinks import Tracker, Value

Record = dict[str, Value]
PATIENCE = 100
"""Number of steps without a token that counts before training stops: where most documents are too long, the first that
counts may come late."""


class RunLog:
    """Records of a run, every `log_every` steps, on file, to trackers and on the screen; a context manager.

    A record holds step, tokens (seen so far), seconds, tokens_per_second, learning_rate/<optimizer>, and, averaged over
    the steps since the last record, loss, loss/<term>, the loss's metrics by name, and gradient_norm. A step's terms
    and metrics weigh what it has of that which they are means over (see `means`). Where documents can lose their ends,
    documents_cut is the number of those that did since the last record, and scored the share of tokens that count.
    """

    def __init__(
        self,
        folder: Path,
        state: TrainState,
        log_every: int,
        trackers: Sequence[Tracker] = (),
        display: bool = True,
        main: bool = True,
    ) -> None:
        """Append to the files in `folder`, of which only what was written up to the state's step is kept.

        display: show a progress bar on standard error, if that is a terminal; main: off in all processes but one, which
        then make the same records (`step` gives them out) but write and show nothing. The kept ones are in `records`.
        """
        kept = {name: kept_records(folder / name, state.step) for name in ("metrics.jsonl", "samples.jsonl")}
        self.records: list[dict[str, Any]] = kept["metrics.jsonl"]
        if main:
            folder.mkdir(parents=True, exist_ok=True)
            for name, records in kept.items():
                if (folder / name).exists():  # at once: other processes may be reading it
                    write_objects(folder / name, records)
        self._file = (folder / "metrics.jsonl" if main else Path(os.devnull)).open("a", encoding="utf-8")
        self._samples = folder / "samples.jsonl" if main else Path(os.devnull)
        self._trackers = trackers if main else ()
        self._log_every = log_every
        self._means = Means()
        self._cut: int | None = None
        self._has_counted = any(record.get("loss") is not None for record in self.records)
        self._last = (state.num_tokens, state.seconds)
        console = Console(stderr=True)
        # where nothing can be taken back, a bar would stand in front of the error that ends it
        display = display and main and console.is_interactive
        self._bar = Progress(
            TextColumn("step {task.fields[step]}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not display,
        )
        self._task = self._bar.add_task("train", total=1.0, step=state.step, figures="")

    def __enter__(self) -> "RunLog":
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()
        self._file.close()
        for tracker in self._trackers:
            tracker.close()

    def step(
        self, state: TrainState, progress: float, loss: Loss, norm: Tensor, rates: dict[str, float], batch: Batch
    ) -> Record | None:
        """Take in a step that has just been made, and write a record if one is due (always at the run's end).

        Returns the record, or None. Raises UserError where none of the tokens of the first `PATIENCE` steps counts, or of
        a shorter run.
        """
        self._means.add_loss(loss)
        self._means.add({"gradient_norm": norm})
        if batch.scored is not None:
            self._means.add({"scored": batch.scored_share()})
        if batch.cut is not None:
            self._cut = (self._cut or 0) + batch.cut
        self._bar.update(self._task, completed=min(1.0, progress), step=state.step)
        if state.step % self._log_every and progress < 1:
            return None
        num_tokens, seconds = state.num_tokens - self._last[0], state.seconds - self._last[1]
        self._last = (state.num_tokens, state.seconds)
        record: Record = {
            "step": state.step,
            "tokens": state.num_tokens,
            "seconds": state.seconds,
            "tokens_per_second": num_tokens / seconds,
            **{f"learning_rate/{name}": rate for name, rate in rates.items()},
            **self._means.take(),
        }
        if self._cut is not None:
            cut = mean({"cut": torch.tensor(float(self._cut))})["cut"] * num_processes()
            record["documents_cut"], self._cut = round(cut.item()), 0
        self._has_counted |= record["loss"] is not None
        if not self._has_counted and (state.step >= PATIENCE or progress >= 1):
            raise UserError(
                f"no token of the first {state.step} steps counts in the loss: documents are longer than data.length, "
                "and what would count is behind it"
            )
        append_objects(self._file, [record], finite=True)
        for tracker in self._trackers:
            tracker.scalars(state.step, record)
        loss_now = "none" if record["loss"] is None else f"{record['loss']:.4g}"
        self._bar.update(self._task, figures=f"loss {loss_now}, {num_tokens / seconds:,.0f} tokens/s")
        return record

    def samples(self, step: int, samples: Sequence[Sample]) -> None:
        """Write what the model shows of itself after a step."""
        write_objects(self._samples, ({"step": step, **asdict(sample)} for sample in samples), append=True)
        for number, sample in enumerate(samples):
            for tracker in self._trackers:
                tracker.text(step, f"{sample.kind}/{number}", f"{sample.prompt} ▸ {sample.text}")


def kept_records(file: Path, step: int) -> list[dict[str, Any]]:
    """The records of a file, if there is one, of steps up to this one; a line without its end is none."""
    records = read_objects(file, ended=True) if file.exists() else ()
    return [record for _, record in records if record["step"] <= step]
