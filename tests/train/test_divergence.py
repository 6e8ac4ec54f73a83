"""A loss that goes wrong stops the run, with the term that did it and a checkpoint from before; healthy ones go on."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from opencola.train.checkpoint import TrainState, checkpoints
from opencola.train.divergence import Divergence, set_aside

Run = Callable[..., TrainState]


def record(number: int, **terms: float) -> dict[str, Any]:
    """The record of step 10 * number, its loss the sum of the terms."""
    return {"step": 10 * number, "loss": sum(terms.values()), **{f"loss/{name}": v for name, v in terms.items()}}


def first_fault(losses: list[float], factor: float = 2.0) -> int | None:
    """The place in the list at which a watch reports a divergence."""
    watch = Divergence(factor)
    return next((n for n, loss in enumerate(losses) if watch.take(record(n, ce=loss))), None)


@pytest.mark.parametrize(
    ("losses", "place"),
    [
        ([7, 5, 3, 7, 7], 4),  # rises of 4, beyond 3 and beyond half of the gain
        ([7, 5, 3, 5.9, 5.9], None),  # 2.9 < 3
        ([9, 5, 1, 4.9, 4.9], None),  # 3.9 < half of 8
        ([9, 5, 1, 5.1, 5.1], 4),
        ([7, 3, 9, 3, 9, 3, 9], None),  # single bad records
        ([7, 3, 9, 9, 9], 3),
        ([7, 13.9, 13.9, 13], None),  # an early rise, before anything was gained
        ([7, 14.1, 14.1], 2),
        ([7, 0.01, 0.4, 0.4, 0.05], None),  # tiny, forty times the lowest
        ([0.02, 0.01, 0.1, 0.1], None),  # tiny from the start
        ([0.02, 0.01, 0.12, 0.12], 3),
        ([1, -2, -0.6, -0.6], None),  # negative: rise 1.4 < 1.5
        ([1, -2, 0.1, 0.1], 3),
        ([5, 1, 1e30, math.inf], 3),
    ],
)
def test_rule(losses: list[float], place: int | None) -> None:
    assert first_fault(losses) == place
    assert first_fault(losses, factor=0.0) is None


def test_a_healthy_noisy_loss_goes_on() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2000, generator=generator).tolist()
    assert first_fault([0.4 + 6.6 * math.exp(-n / 30) + 0.08 * e for n, e in enumerate(noise)]) is None


def test_the_fault_names_the_term_that_rose_most() -> None:
    watch = Divergence(2.0)
    for number, terms in enumerate([(3.0, 2.0, 0.1), (1.0, 1.0, 0.0), (1.5, 4.0, 0.3)]):
        assert watch.take(record(number, **dict(zip(("ce", "flow", "kl"), terms, strict=True)))) is None
    assert watch.suspected and watch.good_until == 10
    fault = watch.take(record(3, ce=2.0, flow=5.5, kl=0.1, new=1.0))
    assert fault == "the loss diverged: 8.6 at step 30, after 2 at step 10; term flow rose most, from 1 to 5.5"


def test_terms_that_come_and_go_are_no_divergence() -> None:
    """As in `interval`, where the VAE's terms are there for some steps and not for others."""
    watch, vae = Divergence(2.0), {"ce": 5.0, "entropy": -0.2}
    for number in range(0, 12, 2):
        assert watch.take(record(number, flow=3 - 0.1 * number)) is None
        assert watch.take(record(number + 1, flow=3 - 0.1 * number, **vae)) is None
        assert not watch.suspected
    watch.take(record(12, flow=9.0))
    fault = watch.take(record(13, flow=9.5, **vae))
    assert fault and fault.endswith("term flow rose most, from 2 to 9.5")


def test_checkpoints_that_no_good_record_follows_are_set_aside(tmp_path: Path) -> None:
    for step in (5, 10, 15, 20):
        (tmp_path / f"step-{step:06d}").mkdir()
    (tmp_path / "suspect-step-000020" / "old").mkdir(parents=True)
    assert set_aside(tmp_path, 5) == tmp_path / "step-000020"  # none is known to be good: nothing changes
    assert len(checkpoints(tmp_path)) == 4
    assert set_aside(tmp_path, 15) == tmp_path / "step-000010"
    assert [path.name for path in checkpoints(tmp_path)] == ["step-000005", "step-000010"]
    assert not (tmp_path / "suspect-step-000020" / "old").exists() and (tmp_path / "suspect-step-000015").is_dir()
    assert set_aside(tmp_path / "nowhere", 15) is None


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_that_diverges_stops_and_goes_on_from_before(run: Run, tmp_path: Path) -> None:
    options = {"steps": 60, "log_every": 2, "save_every": 5, "keep": 2}
    with pytest.raises(FloatingPointError) as stopped:
        run(tmp_path, worse_from=33, **options)
    message, folder = str(stopped.value), tmp_path / "checkpoints"
    # the steps from 33 on are bad, so are the records of 34 and 36; 35 is no time for a checkpoint, and 30 precedes 32
    assert "diverged" in message and "at step 36" in message and "term penalty rose most" in message
    assert message.endswith(f"go on with --resume from {folder / 'step-000030'}")
    assert "train.learning_rate" in message and "train.muon_learning_rate" in message
    assert [path.name for path in checkpoints(folder)] == ["step-000025", "step-000030"]
    state = run(tmp_path, resume=True, **options)
    assert state.step == 60 and len(records(tmp_path)) == 30
    whole = run(tmp_path / "whole", **options)
    assert all(torch.equal(a, b) for a, b in zip(state.model.parameters(), whole.model.parameters(), strict=True))


def test_a_checkpoint_from_the_onset_is_not_what_is_resumed(run: Run, tmp_path: Path) -> None:
    options = {"steps": 60, "log_every": 10, "save_every": 10, "keep": 2}
    with pytest.raises(FloatingPointError, match="at step 50.* from .*step-000020"):
        run(tmp_path, worse_from=29, worse_by=3.0, **options)  # one bad step of ten does not make a bad record
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "step-000020",
        "suspect-step-000030",
    ]


def test_what_was_before_counts_after_resuming(run: Run, tmp_path: Path) -> None:
    run(tmp_path, steps=20, log_every=2)
    with pytest.raises(FloatingPointError, match="diverged: .* at step 24, after"):
        run(tmp_path, steps=40, log_every=2, resume=True, worse_from=20)  # bad from the first record on


def test_switched_off(run: Run, tmp_path: Path) -> None:
    assert run(tmp_path, steps=60, log_every=2, worse_from=33, divergence=0.0).step == 60


def test_without_a_checkpoint_it_says_so(run: Run, tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError, match="step 3: term penalty is inf.* from the start, as there is no"):
        run(tmp_path, broken_at=3)


def test_records_in_which_nothing_counted_hide_no_divergence() -> None:
    watch = Divergence(2.0)
    assert watch.take({"step": 1, "loss": None, "loss/ce": None}) is None
    faults = [
        watch.take({"step": step, "loss": loss, "loss/ce": loss}) for step, loss in enumerate([1.0, 90, 95, 99], 2)
    ]
    assert any(fault and "the loss diverged" in fault for fault in faults)
