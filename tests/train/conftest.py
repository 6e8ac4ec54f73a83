"""A toy model and corpus for the training loop; run as a script, it trains them in a process that tests may kill."""

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from opencola.data.batch import Batch
from opencola.models.language_model import Loss
from opencola.train import checkpoint
from opencola.train.checkpoint import TrainState
from opencola.train.loop import TrainConfig, train
from opencola.train.samples import Show


class Toy(nn.Module):
    """Predicts the next token; draws from the global generator, and has a part that is frozen for seven steps."""

    def __init__(self, broken_at: int | None = None, worse_from: int | None = None, worse_by: float = 100.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(11, 8)
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.late = nn.Linear(8, 8)
        self.head = nn.Linear(8, 11)
        self.broken_at, self.worse_from, self.worse_by = broken_at, worse_from, worse_by

    def loss(self, batch: Batch) -> Loss:
        """Cross-entropy and a penalty."""
        x = self.embedding(batch.tokens)
        x = x + 0.1 * torch.randn(x.shape)
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        if batch.step >= 7:
            x = x + self.late(x)
        logits = self.head(x[:, :-1])
        ce = nn.functional.cross_entropy(logits.flatten(0, 1), batch.tokens[:, 1:].flatten())
        penalty = 1e-3 * logits.square().mean()
        if batch.step == self.broken_at:
            penalty = penalty * float("inf")
        if self.worse_from is not None and batch.step >= self.worse_from:
            penalty = penalty + self.worse_by
        bins = torch.tensor([float(batch.step), float("nan") if batch.step % 2 else 1.0, float("nan")])
        return Loss(ce + penalty, {"ce": ce, "penalty": penalty}, {"bins": bins})

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """None that differ."""
        return {}

    def learning_rate_ratios(self) -> dict[str, float]:
        """All alike."""
        return {}


class Counts:
    """An endless corpus of sums of random steps, modulo 11."""

    def __init__(self, hook: Callable[[int], None]) -> None:
        self.num_batches = 0
        self.hook = hook

    def __next__(self) -> Batch:
        step, self.num_batches = self.num_batches, self.num_batches + 1
        self.hook(step)
        steps = torch.randint(1, 3, (4, 12), generator=torch.Generator().manual_seed(step))
        return Batch(steps.cumsum(1) % 11, torch.arange(4 * step, 4 * step + 4), seed=0, step=step)

    def state_dict(self) -> dict[str, Any]:
        """Where it stands."""
        return {"num_batches": self.num_batches}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Stand there."""
        self.num_batches = state["num_batches"]


def run(
    folder: Path,
    resume: bool = False,
    hook: Callable[[int], None] = lambda step: None,
    show: Show | None = None,
    settings: dict[str, Any] | None = None,
    broken_at: int | None = None,
    worse_from: int | None = None,
    worse_by: float = 100.0,
    **fields: Any,
) -> TrainState:
    """Train the toy, whose penalty is spoilt at or from a step, with these fields of TrainConfig."""
    fields = {"steps": 20, "warmup": 3, "log_every": 1, "save_every": 5, "keep": 9, "ema": 0.9} | fields
    model = Toy(broken_at, worse_from, worse_by)
    return train(model, Counts(hook), TrainConfig(**fields), folder, False, resume, show, settings)


def everything(state: TrainState) -> list[Tensor]:
    """All tensors of a run's state, in a fixed order."""
    optimizers = [t for o in state.optimizers for s in o.state.values() for t in s.values()]
    average = list(state.ema.average.values()) if state.ema else []
    return [*state.model.state_dict().values(), *optimizers, *average, torch.get_rng_state()]


@pytest.fixture(name="run", scope="session")
def run_fixture() -> Callable[..., TrainState]:
    """Train the toy."""
    return run


@pytest.fixture(name="everything", scope="session")
def everything_fixture() -> Callable[[TrainState], list[Tensor]]:
    """All tensors of a state."""
    return everything


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, mode = Path(sys.argv[1]), sys.argv[2]
    if mode == "killed-in-save":
        sha256 = checkpoint.checksum

        def die(file: Path) -> str:
            if "step-000010" in str(file):
                os.kill(os.getpid(), signal.SIGKILL)
            return sha256(file)

        checkpoint.checksum = die
        run(folder)
    else:  # saving all the time, to be killed from outside

        def wait(step: int) -> None:
            print(step, flush=True)
            time.sleep(0.03)

        run(folder, resume=True, hook=wait, steps=200, save_every=2, keep=2)
        print("done", flush=True)
