"""The training loop: batch -> loss -> backward -> clip -> step. It knows `loss(batch)`, and no family."""

import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any, cast

from torch import Tensor, nn

from opencola.data.batch import Batch
from opencola.errors import UserError
from opencola.layers.compiling import compile_blocks
from opencola.layers.device import bfloat16
from opencola.layers.finite import is_finite
from opencola.models.language_model import Loss, Trainable
from opencola.ranges import Count, NotNegative, Positive, Size
from opencola.train import checkpoint, distributed
from opencola.train.checkpoint import CHECKPOINTS, Batches, Saver, TrainState
from opencola.train.divergence import Divergence
from opencola.train.memory import keep_freed
from opencola.train.optimizer import EMA, OptimizerConfig, build, learning_rate_factor, set_learning_rates
from opencola.train.samples import Show, undisturbed
from opencola.train.sinks import Name, open_trackers
from opencola.train.tracker import RunLog


@dataclass(frozen=True)
class TrainConfig(OptimizerConfig):
    """How long to train, how to step, and what to keep."""

    steps: Count = 1000
    """Number of optimizer steps of the run."""
    seconds: Positive | None = None
    """Time limit of the run in seconds; whichever comes first, this or `steps`, ends it and paces the schedule."""
    replicate: Count = 1
    """Number of copies of the sharded model, over which a batch is divided (mesh: replicate x shard)."""
    shard: Size = 0
    """Number of processes over which each copy's parameters are sharded; 0: all that are left."""
    accumulate: Count = 1
    """Number of passes for an optimizer step; the batch is divided among them."""
    clip: Positive = 1.0
    """Largest norm of the gradient; longer ones are scaled down to it."""
    bf16: bool = False
    """Compute the loss in bfloat16 over float32 weights: on a GPU by autocast, on a CPU in products alone."""
    compile: bool = False
    """Compile the model's blocks with torch.compile."""
    log_every: Count = 20
    """Number of steps between records in metrics.jsonl."""
    trackers: tuple[Name, ...] = ()
    """Where records and samples go beside the files: `tensorboard`, `wandb`."""
    sample_every: Size = 0
    """Number of steps between samples and reconstructions in samples.jsonl; 0: none."""
    divergence: NotNegative = 2.0
    """Stop when the loss of two records in a row is above this times the lowest so far (in full:
    opencola/train/divergence.py); 0: never."""
    save_every: Count = 500
    """Number of steps between checkpoints; there is always one at the end."""
    keep: Count = 2
    """Number of checkpoints to keep; with 1, a divergence that begins right before a checkpoint leaves no earlier
    one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if 0 < self.divergence <= 1:
            raise UserError(f"divergence must be above 1, or 0, but is {self.divergence}")


class Interrupted(KeyboardInterrupt):
    """Ctrl-C ended a run after a complete step; its checkpoint is written and the message says how to go on."""


def train(
    model: Trainable,
    corpus: Batches,
    config: TrainConfig,
    folder: Path,
    display: bool = True,
    resume: bool = False,
    show: Show | None = None,
    settings: Mapping[str, Any] | None = None,
) -> TrainState:
    """Train a model on the device it is on; returns the state after the last step, with the moving average if any.

    `start` and then `proceed`. Raises FileExistsError when the folder holds a run and `resume` is off, and errors as
    these two.
    """
    last = checkpoint.latest(folder / CHECKPOINTS)
    if last and not resume:
        raise FileExistsError(f"{folder} holds a run ({last.name}): resume it (--resume) or choose another folder")
    state = start(model, corpus, config, last)
    proceed(state, config, folder, display, show, settings)
    return state


def start(model: Trainable, corpus: Batches, config: TrainConfig, last: Path | None) -> TrainState:
    """The state that training begins with: of a model as it is, or of the checkpoint `last`; writes nothing.

    On several processes (`distributed.connected`) the model becomes sharded and `corpus` gives each its own rows.
    Raises UserError, naming it, for a checkpoint that is damaged, or does not fit model, corpus and settings.
    """
    assert isinstance(model, nn.Module)
    device = next(model.parameters()).device
    if config.compile:
        compile_blocks(distributed.repeated_blocks(model))
    distributed.shard(model, distributed.mesh(config.replicate, config.shard, device))
    optimizers = build(model, model.learning_rate_ratios(), config)
    state = TrainState(model, optimizers, EMA(model, config.ema) if config.ema else None, corpus)
    if last:
        checkpoint.load(state, last)
    return state


def proceed(
    state: TrainState,
    config: TrainConfig,
    folder: Path,
    display: bool = True,
    show: Show | None = None,
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Train from a state on to the end.

    Writes `folder/metrics.jsonl`, `folder/checkpoints/` and, every `sample_every` steps, what `show()` gives into
    `folder/samples.jsonl`; `settings` is what trackers are told of the run (the config if None). From a checkpoint the
    run, unless paced by `seconds`, ends exactly as if it had never stopped. Raises Interrupted after Ctrl-C,
    NotFiniteError when the loss is not finite or diverges, OSError when the disk has no room for a checkpoint.
    """
    module, corpus, optimizers = state.model, state.corpus, state.optimizers
    model = cast(Trainable, module)
    device = next(module.parameters()).device
    if device.type == "cpu":
        keep_freed()
    begin = time.perf_counter() - state.seconds
    module.train()
    main = distributed.is_main()
    trackers = open_trackers(config.trackers, folder, state.step, settings or asdict(config)) if main else []
    watch = Divergence(config.divergence)
    with (
        postponed_interrupt() as interrupt,
        Saver(folder / CHECKPOINTS, config.keep) as saver,
        RunLog(folder, state, config.log_every, trackers, display, main) as report,
    ):
        saver.check_space(state)
        for record in report.records:
            watch.take(record)
        while (progress := progress_of(state, config)) < 1:
            rates = set_learning_rates(optimizers, learning_rate_factor(config, state.step, progress))
            batch = next(corpus).to(device)
            loss = backward(model, batch, config)
            norm = clip(module, config.clip)
            if fault := not_finite(loss, norm, state.step, module):
                saver.wait()
                watch.stop(fault, saver.folder)
            with bfloat16(device, config.bf16):
                for optimizer in optimizers:
                    optimizer.step()
                    optimizer.zero_grad()
            if state.ema:
                state.ema.update(state.step)
            state.step += 1
            state.num_tokens += batch.tokens.numel() * distributed.num_processes()
            # the processes must agree on when to stop
            state.seconds, asked = distributed.largest(time.perf_counter() - begin, interrupt.is_set())
            progress = progress_of(state, config)
            if (made := report.step(state, progress, loss, norm, rates, batch)) and (fault := watch.take(made)):
                saver.wait()
                watch.stop(fault, saver.folder)
            if show and config.sample_every and (state.step % config.sample_every == 0 or progress >= 1):
                with undisturbed(state):
                    report.samples(state.step, show())
            is_due = state.step % config.save_every == 0 and not watch.suspected
            if is_due or progress >= 1 or asked:
                saver.save(state)
            if asked:
                saver.wait()
                where = saver.path(state.step)
                raise Interrupted(f"stopped after step {state.step}, saved in {where}: go on with --resume")


def backward(model: Trainable, batch: Batch, config: TrainConfig) -> Loss:
    """Add up the gradients of a batch, in `accumulate` passes; returns their mean loss, detached."""
    parts = [batch.shard(number, config.accumulate) for number in range(config.accumulate)]
    counts = None  # a batch that is whole has its own
    if config.accumulate * distributed.num_processes() > 1:
        counts = distributed.counts_of_step([model.counts(part) for part in parts])
    losses = []
    for part in parts:
        with bfloat16(batch.tokens.device, config.bf16, config.compile):
            loss = model.loss(replace(part, counts=counts))
        (loss.total / len(parts)).backward()
        losses.append(loss.detach())
    return losses[0] if len(losses) == 1 else Loss.mean(losses)


def progress_of(state: TrainState, config: TrainConfig) -> float:
    """0 at the start of a run, 1 at its end."""
    in_time = state.seconds / config.seconds if config.seconds else 0.0
    return max(state.step / config.steps, in_time)


def clip(model: nn.Module, most: float) -> Tensor:
    """Scale a model's gradients down to a norm of `most`; returns the norm that they had.

    Where that is not finite they stay as they are, so that it can be told which of them are not.
    """
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    norm = nn.utils.get_total_norm(gradients)
    if distributed.full(norm).isfinite():
        nn.utils.clip_grads_with_norm_(model.parameters(), most, norm)
    return distributed.full(norm)


def not_finite(loss: Loss, norm: Tensor, step: int, model: nn.Module) -> str | None:
    """What is not finite, by term of the loss, else by parameter: to be asked before a step, which would spoil the
    weights. None if all is well."""
    if loss.total.isfinite() and norm.isfinite():
        return None
    bad = [f"term {name} is {term.item()}" for name, term in loss.terms.items() if not term.isfinite()]
    if bad or not loss.total.isfinite():
        what = ", ".join(bad) or f"total is {loss.total.item()}"
        return f"the loss is not finite at step {step}: {what}"
    named = ((name, parameter.grad) for name, parameter in model.named_parameters() if parameter.grad is not None)
    own = next((name for name, gradient in named if not is_finite(distributed.local(gradient))), None)
    first = next((name for name in distributed.gather(own) if name is not None), None)
    what = f"that of {first} is not" if first else f"their norm is {norm.item()}, though each is"
    return f"the gradients are not finite at step {step}: {what}"


@contextmanager
def postponed_interrupt() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C, or SIGTERM as schedulers send it, sets, instead of interrupting.

    A second Ctrl-C interrupts as usual, but not within two seconds: torchrun passes on the one that all have got.
    """
    asked = threading.Event()
    since = float("inf")

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal since
        if number == signal.SIGINT and time.perf_counter() > since + 2:
            raise KeyboardInterrupt
        since = min(since, time.perf_counter())
        asked.set()

    if threading.current_thread() is not threading.main_thread():  # where signals never arrive
        yield asked
        return
    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
