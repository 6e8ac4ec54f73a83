"""The training loop: batch -> loss -> backward -> clip -> step. It knows `loss(batch)`, and no family."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch
from torch import Tensor, nn

from opencola.layers import randomness
from opencola.models.language_model import Loss, Trainable
from opencola.train import checkpoint
from opencola.train.checkpoint import Batches, TrainState
from opencola.train.optimizer import EMA, OptimizerConfig, build, learning_rate_factor, set_learning_rates
from opencola.train.tracker import Report


@dataclass(frozen=True)
class TrainConfig(OptimizerConfig):
    """How long to train, how to step, and what to keep."""

    steps: int = 1000
    """Optimizer steps of the run."""
    seconds: float | None = None
    """Wall-clock limit of the run; whichever comes first, this or `steps`, ends it and paces the schedule."""
    clip: float = 1.0
    """Largest norm of the gradient; longer ones are scaled down to it."""
    bf16: bool = False
    """Compute the loss under bfloat16 autocast; weights stay as they are."""
    compile: bool = False
    """Compile the loss with torch.compile."""
    log_every: int = 20
    """Steps between records in metrics.jsonl."""
    save_every: int = 500
    """Steps between checkpoints; there is always one at the end."""
    keep: int = 1
    """Checkpoints to keep."""
    replicate: int = 1
    """Copies of the sharded model, over which a batch is divided (mesh: replicate x shard)."""
    shard: int = 0
    """Processes over which each copy's parameters are sharded; 0: all that are left."""
    accumulate: int = 1
    """Passes per optimizer step; the batch is divided among them."""

    def __post_init__(self) -> None:
        for name in ("steps", "log_every", "save_every", "keep", "replicate", "accumulate"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, but is {getattr(self, name)}")
        if self.shard < 0:
            raise ValueError(f"shard must be at least 0, but is {self.shard}")


class Interrupted(KeyboardInterrupt):
    """Ctrl-C ended a run after a complete step; its checkpoint is written and the message says how to go on."""


def train(
    model: Trainable, corpus: Batches, config: TrainConfig, folder: Path, display: bool = True, resume: bool = False
) -> TrainState:
    """Train a model on the device it is on; returns the state after the last step, with the moving average if any.

    Writes `folder/metrics.jsonl` and `folder/checkpoints/`. With `resume` the run goes on from its last checkpoint
    (from the start where there is none) and, unless paced by `seconds`, ends exactly as if it had never stopped. Raises
    FileExistsError when the folder holds a run and `resume` is off, Interrupted after Ctrl-C, FloatingPointError when
    the loss is not finite.
    """
    assert isinstance(model, nn.Module)
    optimizers = build(model, model.learning_rate_ratios(), config)
    state = TrainState(model, optimizers, EMA(model, config.ema) if config.ema else None, corpus)
    if last := checkpoint.latest(folder / "checkpoints"):
        if not resume:
            raise FileExistsError(f"{folder} holds a run ({last.name}): resume it (--resume) or choose another folder")
        checkpoint.load(state, last)
    loss_of = model.loss
    if config.compile:
        randomness.leave_uncompiled()
        loss_of = torch.compile(loss_of)
    device = next(model.parameters()).device
    start = time.perf_counter() - state.seconds
    model.train()
    with postponed_interrupt() as interrupt, Report(folder, state, config.log_every, display) as report:
        while (progress := progress_of(state, config)) < 1:
            rates = set_learning_rates(optimizers, learning_rate_factor(config, state.step, progress))
            batch = next(corpus).to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=config.bf16):
                loss: Loss = loss_of(batch)
            loss.total.backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), config.clip)
            stop_unless_finite(loss, norm, state.step)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            if state.ema:
                state.ema.update(state.step)
            state.step += 1
            state.num_tokens += batch.tokens.numel()
            state.seconds = time.perf_counter() - start
            progress = progress_of(state, config)
            report.step(state, progress, loss, norm, rates)
            if state.step % config.save_every == 0 or progress >= 1 or interrupt.is_set():
                last = checkpoint.save(state, folder / "checkpoints", config.keep)
            if interrupt.is_set():
                raise Interrupted(f"stopped after step {state.step}, saved in {last}: go on with --resume")
    return state


def progress_of(state: TrainState, config: TrainConfig) -> float:
    """0 at the start of a run, 1 at its end."""
    in_time = state.seconds / config.seconds if config.seconds else 0.0
    return max(state.step / config.steps, in_time)


def stop_unless_finite(loss: Loss, norm: Tensor, step: int) -> None:
    """Raise FloatingPointError, naming the term, before a step that would spoil the weights."""
    if loss.total.isfinite() and norm.isfinite():
        return
    bad = [f"term {name} is {term.item()}" for name, term in loss.terms.items() if not term.isfinite()]
    what = ", ".join(bad) or f"total is {loss.total.item()}, gradient norm is {norm.item()}"
    raise FloatingPointError(f"the loss is not finite at step {step}: {what}; lower the learning rate and resume")


@contextmanager
def postponed_interrupt() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C sets, instead of interrupting; the second interrupts as usual."""
    asked = threading.Event()

    def ask(number: int, frame: FrameType | None) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    if threading.current_thread() is not threading.main_thread():  # where signals never arrive
        yield asked
        return
    before = signal.signal(signal.SIGINT, ask)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)
