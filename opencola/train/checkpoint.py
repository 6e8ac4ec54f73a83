"""Saving and resuming a run: all that decides its next step, in one folder per checkpoint.

`step-000100/` holds tensors as torch.distributed.checkpoint writes them, and `run.json` with the plain values. It is
written under another name and renamed when complete, so a folder of that name is always whole.
"""

import json
import re
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from opencola.text.corpus import Batch
from opencola.train.optimizer import EMA


class Batches(Protocol):
    """An endless corpus whose position can be saved (`opencola.text.corpus.Corpus`)."""

    def __next__(self) -> Batch:
        """The next batch."""

    def state_dict(self) -> dict[str, Any]:
        """The position, as JSON values."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a position."""


@dataclass
class TrainState:
    """A run between two steps."""

    model: nn.Module
    optimizers: list[torch.optim.Optimizer]
    ema: EMA | None
    corpus: Batches
    step: int = 0
    """Steps taken."""
    num_tokens: int = 0
    """Tokens seen."""
    seconds: float = 0.0
    """Time spent training, over all sessions of the run."""


def save(state: TrainState, folder: Path, keep: int) -> Path:
    """Write `folder/step-NNNNNN`, and delete all but the newest `keep` checkpoints; returns its path."""
    path = folder / f"step-{state.step:06d}"
    if not path.exists():
        unfinished = folder / f"unfinished-{path.name}"
        for left_over in folder.glob("unfinished-*"):
            shutil.rmtree(left_over)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.save(_tensors(state), checkpoint_id=unfinished, no_dist=True)
        run = {
            "step": state.step,
            "num_tokens": state.num_tokens,
            "seconds": state.seconds,
            "corpus": state.corpus.state_dict(),
        }
        (unfinished / "run.json").write_text(json.dumps(run, indent=2))
        unfinished.rename(path)
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return path


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in a folder (which need not exist), oldest first."""
    found = [path for path in folder.glob("step-*") if re.fullmatch(r"step-\d{6,}", path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint in a folder, or None."""
    return found[-1] if (found := checkpoints(folder)) else None


def load(state: TrainState, path: Path) -> None:
    """Put a checkpoint into `state`, whose optimizers keep their own learning rates, weight decay and the like.

    Raises ValueError, naming the folder, when the checkpoint is damaged or of a model with other parameters.
    """
    options = [[_options(group) for group in optimizer.param_groups] for optimizer in state.optimizers]
    tensors = _tensors(state)
    try:
        run = json.loads((path / "run.json").read_text())
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.load(tensors, checkpoint_id=path, no_dist=True)
        set_state_dict(
            state.model, state.optimizers, model_state_dict=tensors["model"], optim_state_dict=tensors["optimizers"]
        )
        state.step, state.num_tokens, state.seconds = run["step"], run["num_tokens"], run["seconds"]
        state.corpus.load_state_dict(run["corpus"])
    except (Exception, CheckpointException) as error:  # what DCP raises depends on the damage; not all are Exceptions
        cause = str(error).strip().splitlines()[-1]
        raise ValueError(f"{path} does not fit this recipe, or is damaged: {cause}") from error
    for optimizer, saved in zip(state.optimizers, options, strict=True):
        for group, values in zip(optimizer.param_groups, saved, strict=True):
            group.update(values)
    torch.set_rng_state(tensors["random"])


def _tensors(state: TrainState) -> dict[str, Any]:
    model, optimizers = get_state_dict(state.model, state.optimizers)
    ema = state.ema.average if state.ema else {}
    return {"model": model, "optimizers": optimizers, "ema": ema, "random": torch.get_rng_state()}


def _options(group: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name != "params"}
