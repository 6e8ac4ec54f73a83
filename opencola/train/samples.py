"""Letting a model show itself in the middle of its training, without disturbing it."""

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch

from opencola.models.language_model import Sample
from opencola.train.checkpoint import TrainState

Show = Callable[[], Sequence[Sample]]


@contextlib.contextmanager
def undisturbed(state: TrainState) -> Iterator[None]:
    """While it lasts, the model is the one that would be exported: averaged, in evaluation mode.

    Afterwards it trains on as if nothing had happened, whatever has been drawn from torch's generators.
    """
    device = next(state.model.parameters()).device
    average = state.ema.averaged() if state.ema else contextlib.nullcontext()
    with torch.random.fork_rng([device] if device.type == "cuda" else []), average:
        state.model.eval()
        try:
            yield
        finally:
            state.model.train()
