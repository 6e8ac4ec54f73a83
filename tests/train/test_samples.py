"""Samples are written beside the metrics, and training takes no notice of them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from opencola.models.language_model import Sample
from opencola.train.checkpoint import TrainState
from opencola.train.samples import undisturbed

Run = Callable[..., TrainState]
Everything = Callable[[TrainState], list[Tensor]]


def show() -> list[Sample]:
    """Two samples, whose texts depend on the global generator."""
    return [Sample("continuation", "a", f"{torch.rand(3).tolist()}", {"x": 0.5}), Sample("other", "ö", "b", {})]


def samples(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text(encoding="utf-8").splitlines()]


def test_training_is_the_same_with_samples(run: Run, everything: Everything, tmp_path: Path) -> None:
    plain, shown = run(tmp_path / "plain", sample_every=0), run(tmp_path / "shown", sample_every=3, show=show)
    assert all(torch.equal(a, b) for a, b in zip(everything(plain), everything(shown), strict=True))
    assert not (tmp_path / "plain" / "samples.jsonl").exists()
    found = samples(tmp_path / "shown")
    assert [sample["step"] for sample in found] == [s for s in (3, 6, 9, 12, 15, 18, 20) for _ in range(2)]
    assert found[1] == {"step": 3, "kind": "other", "prompt": "ö", "text": "b", "figures": {}}


def test_resuming_drops_later_samples(run: Run, tmp_path: Path) -> None:
    class CrashError(Exception):
        pass

    def crash(step: int) -> None:
        if step == 14:
            raise CrashError

    run(tmp_path / "whole", sample_every=4, show=show)
    with pytest.raises(CrashError):
        run(tmp_path / "broken", sample_every=4, show=show, hook=crash, save_every=10)
    assert [sample["step"] for sample in samples(tmp_path / "broken")][::2] == [4, 8, 12]
    with (tmp_path / "broken" / "samples.jsonl").open("a") as file:
        file.write('{"step": 3, "cut')
    run(tmp_path / "broken", sample_every=4, show=show, resume=True)
    assert samples(tmp_path / "broken") == samples(tmp_path / "whole")


def test_the_model_that_is_shown_is_the_average_in_evaluation_mode(run: Run, tmp_path: Path) -> None:
    state = run(tmp_path, steps=5)
    assert state.ema
    own = [p.clone() for p in state.model.parameters()]
    average = [p.clone() for p in state.ema.average.values()]
    assert not all(torch.equal(a, b) for a, b in zip(own, average, strict=True))
    with pytest.raises(ZeroDivisionError), undisturbed(state):
        assert not state.model.training
        assert all(torch.equal(a, b) for a, b in zip(state.model.parameters(), average, strict=True))
        1 / 0  # noqa: B018
    assert state.model.training
    assert all(torch.equal(a, b) for a, b in zip(state.model.parameters(), own, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(state.ema.average.values(), average, strict=True))
