"""Programs that take in a run's records (see `tracker`) beside its files: TensorBoard, Weights & Biases, by name."""

import importlib.util
import os
import secrets
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from opencola.errors import UserError
from opencola.storage import write_text

Name = Literal["tensorboard", "wandb"]
Value = float | list[Any] | None


class Tracker(Protocol):
    """What takes in a run's records and texts, in the order of their steps."""

    def scalars(self, step: int, record: Mapping[str, Value]) -> None:
        """Figures by name; a list is a vector's entries, and None stands for no value."""

    def text(self, step: int, name: str, text: str) -> None:
        """A text."""

    def close(self) -> None:
        """Nothing more will come."""


def check(names: Iterable[Name]) -> None:
    """Raise UserError, with what to install, where a tracker's package is missing."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UserError(
                f"train.trackers names {name}, whose package is not installed: pip install 'opencola[{name}]'"
            )


def open_trackers(names: Sequence[Name], folder: Path, step: int, settings: Mapping[str, Any]) -> list[Tracker]:
    """Trackers that write below `folder`, of a run that goes on after `step` and has these settings."""
    check(names)
    return [open_tracker(name, folder, step, settings) for name in names]


def open_tracker(name: Name, folder: Path, step: int, settings: Mapping[str, Any]) -> Tracker:
    """One of them."""
    match name:
        case "tensorboard":
            return TensorBoard(folder, step)
        case "wandb":
            return WeightsAndBiases(folder, step, settings)


class TensorBoard:
    """Event files in `folder`/tensorboard: numbers as scalars, vectors as histograms of their entries."""

    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # what an earlier session wrote of later steps is then no longer shown
        self._writer: Any = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else None)

    def scalars(self, step: int, record: Mapping[str, Value]) -> None:
        """As in the protocol."""
        for name, value in record.items():
            if isinstance(value, list):
                if entries := numbers(value):
                    self._writer.add_histogram(name, np.array(entries), step)
            elif value is not None and name != "step":
                self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def text(self, step: int, name: str, text: str) -> None:
        """As in the protocol."""
        self._writer.add_text(name, text, step)

    def close(self) -> None:
        """As in the protocol."""
        self._writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases in `folder`/wandb; the project is $WANDB_PROJECT, else `opencola`.

    When a run is resumed, so is that one (its id is kept in wandb/id); of the steps that are made again it keeps the
    first figures.
    """

    def __init__(self, folder: Path, step: int, settings: Mapping[str, Any]) -> None:
        import wandb

        id_file = folder / "wandb" / "id"
        if not (step and id_file.exists()):
            write_text(id_file, secrets.token_hex(8))
        self._wandb: Any = wandb
        self._run: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "opencola"),
            name=str(folder),
            dir=str(folder),
            id=id_file.read_text(),
            resume="allow",
            config=dict(settings),
        )

    def scalars(self, step: int, record: Mapping[str, Value]) -> None:
        """As in the protocol."""
        values: dict[str, Any] = {}
        for name, value in record.items():
            if isinstance(value, list):
                if entries := numbers(value):
                    values[name] = self._wandb.Histogram(entries)
            elif value is not None and name != "step":
                values[name] = value
        self._run.log(values, step=step)

    def text(self, step: int, name: str, text: str) -> None:
        """As in the protocol."""
        self._run.log({name: self._wandb.Table(columns=["step", "text"], data=[[step, text]])}, step=step)

    def close(self) -> None:
        """As in the protocol."""
        self._run.finish()


def numbers(values: Iterable[Any]) -> list[float]:
    """The numbers in nested lists."""
    flat: list[float] = []
    for value in values:
        flat += numbers(value) if isinstance(value, list) else [] if value is None else [value]
    return flat
