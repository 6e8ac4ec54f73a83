"""The loop learns, reports what it did, and stops when it should."""

import json
import math
import shutil
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from opencola.data.batch import Batch
from opencola.models.language_model import Loss, Sample
from opencola.train.checkpoint import TrainState, latest
from opencola.train.loop import TrainConfig
from opencola.train.sinks import Value
from opencola.train.tracker import RunLog

Run = Callable[..., TrainState]


class Nothing:
    """A corpus that is never asked."""

    def __next__(self) -> Batch:
        raise AssertionError

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class Notes:
    """A tracker that notes what it hears."""

    def __init__(self) -> None:
        self.heard: list[str] = []

    def scalars(self, step: int, record: Mapping[str, Value]) -> None:
        assert step == record["step"]
        self.heard.append("loss" if "loss" in record else "")

    def text(self, step: int, name: str, text: str) -> None:
        self.heard.append("text")

    def close(self) -> None:
        self.heard.append("close")


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_learns(run: Run, tmp_path: Path, optimizer: str) -> None:
    run(tmp_path, optimizer=optimizer, steps=150, save_every=1000, log_every=10, learning_rate=0.01)
    losses = [record["loss/ce"] for record in records(tmp_path)]
    assert losses[0] > 2.0 and losses[-1] < 1.0  # log 11 = 2.4 before, log 2 = 0.69 at best


def test_records(run: Run, tmp_path: Path) -> None:
    run(tmp_path, steps=12, log_every=5, schedule="constant", warmup=10, muon_learning_rate=0.03)
    first, second, last = records(tmp_path)
    assert [record["step"] for record in (first, second, last)] == [5, 10, 12]
    assert [record["tokens"] for record in (first, second, last)] == [240, 480, 576]
    assert first["bins"] == [2.0, 1.0, None] and last["bins"] == [10.5, 1.0, None]
    assert first["loss"] == pytest.approx(first["loss/ce"] + first["loss/penalty"])
    assert first["gradient_norm"] > 0 and second["seconds"] > first["seconds"]
    assert second["tokens_per_second"] == pytest.approx(240 / (second["seconds"] - first["seconds"]))
    assert first["learning_rate/muon"] == pytest.approx(0.015)
    assert first["learning_rate/adamw"] == pytest.approx(0.001)


def test_means_are_over_the_steps_since_the_last_record(run: Run, tmp_path: Path) -> None:
    run(tmp_path / "all", steps=6, log_every=1)
    run(tmp_path / "few", steps=6, log_every=3)
    losses = [record["loss"] for record in records(tmp_path / "all")]
    means = [record["loss"] for record in records(tmp_path / "few")]
    assert means == pytest.approx([sum(losses[:3]) / 3, sum(losses[3:]) / 3])


def test_other_processes_make_the_same_records_and_write_nothing(run: Run, tmp_path: Path) -> None:
    state = run(tmp_path, steps=4)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.jsonl")}
    lines = (tmp_path / "metrics.jsonl").read_text()
    (tmp_path / "metrics.jsonl").write_text(lines + '{"step": 5, "loss": 1}\n{"st')  # of an earlier session
    made, batch = [], Batch(torch.zeros(2, 24, dtype=torch.long), torch.arange(2), 0, 0)
    for main, folder in ((False, tmp_path), (True, shutil.copytree(tmp_path, tmp_path / "copy"))):
        told = Notes()
        state.step, state.num_tokens, state.seconds = 4, 192, 1.0
        with RunLog(folder, state, 2, [told], display=True, main=main) as report:
            assert report.records == [json.loads(line) for line in lines.splitlines()]
            for value in (1.0, 3.0):
                state.step, state.num_tokens, state.seconds = state.step + 1, state.num_tokens + 48, state.seconds + 0.5
                loss = Loss(torch.tensor(value), {"ce": torch.tensor(value)}, {})
                made.append(report.step(state, 0.5, loss, torch.tensor(2.0), {"adamw": 0.1}, batch))
            report.samples(6, [Sample("continuation", "a", "b", {})])
        assert told.heard == (["loss", "text", "close"] if main else [])
    assert made[0] is made[2] is None and made[1] == made[3] and made[1]["loss"] == 2.0
    assert (tmp_path / "metrics.jsonl").read_text() == lines + '{"step": 5, "loss": 1}\n{"st'
    assert set(tmp_path.glob("*.jsonl")) == {*before}
    assert (tmp_path / "copy" / "metrics.jsonl").read_text() == lines + json.dumps(made[1]) + "\n"
    assert json.loads((tmp_path / "copy" / "samples.jsonl").read_text())["text"] == "b"


def test_a_loss_that_is_not_finite_stops_the_run_before_the_step(run: Run, tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError, match="step 12: term penalty is inf"):
        run(tmp_path, broken_at=12, log_every=5)
    last = latest(tmp_path / "checkpoints")
    assert last and last.name == "step-000010"
    assert [record["step"] for record in records(tmp_path)] == [5, 10]
    assert run(tmp_path, resume=True).step == 20


def test_gradients_that_are_not_finite_name_their_parameter(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from opencola.train import loop

    backward = loop.backward

    def spoilt(model: Any, batch: Batch, config: TrainConfig) -> Loss:
        loss = backward(model, batch, config)
        if batch.step == 3:
            model.blocks[1].weight.grad[0, 0] = math.nan
        return loss

    monkeypatch.setattr(loop, "backward", spoilt)
    with pytest.raises(
        FloatingPointError, match=r"gradients are not finite at step 3: that of blocks\.1\.weight is not"
    ):
        run(tmp_path)


def test_means_weigh_what_counts_and_the_rest_is_told(tmp_path: Path) -> None:
    state = TrainState(torch.nn.Linear(1, 1), [], None, Nothing())
    batch = Batch(torch.zeros(2, 8, dtype=torch.long), torch.arange(2), 0, 0)
    with RunLog(tmp_path, state, 3, display=False) as report:
        for counted, value in ((16, 1.0), (0, 0.0), (4, 6.0)):
            state.step, state.seconds = state.step + 1, state.seconds + 1
            scored = (torch.arange(16) < counted).view(2, 8)
            counts = dict.fromkeys(("ce", "accuracy"), torch.tensor(counted))
            loss = Loss(torch.tensor(value), {"ce": torch.tensor(value)}, {"accuracy": torch.tensor(value)}, counts)
            shown = replace(batch, scored=scored, cut=2)
            record = report.step(state, 0.5, loss, torch.tensor(value), {}, shown)
    assert record is not None
    assert record["loss"] == record["loss/ce"] == record["accuracy"] == 2.0  # (16 x 1 + 4 x 6) / 20
    assert record["documents_cut"] == 6 and record["scored"] == pytest.approx(20 / 48)
    assert record["gradient_norm"] == pytest.approx(7 / 3)


@pytest.mark.parametrize(("steps", "progress"), [(100, 0.5), (3, 1.0)])
def test_a_run_in_which_nothing_counts_stops(tmp_path: Path, steps: int, progress: float) -> None:
    state = TrainState(torch.nn.Linear(1, 1), [], None, Nothing())
    nothing = Batch(torch.zeros(2, 8, dtype=torch.long), torch.arange(2), 0, 0, scored=torch.zeros(2, 8).bool())
    loss = Loss(torch.zeros(()), {"ce": torch.zeros(())}, {}, {"ce": torch.tensor(0)})
    with RunLog(tmp_path, state, 1, display=False) as report:
        for step in range(1, steps):  # it may be that only most of the data does not
            state.step, state.seconds = step, float(step)
            record = report.step(state, 0.5, loss, torch.zeros(()), {}, nothing)
            assert record is not None and record["loss"] is None
        state.step, state.seconds = steps, float(steps)
        with pytest.raises(ValueError, match=f"no token of the first {steps} steps counts in the loss"):
            report.step(state, progress, loss, torch.zeros(()), {}, nothing)


def test_a_time_limit_ends_the_run_and_paces_the_schedule(run: Run, tmp_path: Path) -> None:
    state = run(tmp_path, steps=10**9, seconds=0.5, log_every=1, save_every=10**9, warmup=1, schedule="linear", final=0)
    assert 0.5 <= state.seconds < 2.0 and state.step > 3
    *_, before, last = records(tmp_path)
    left = 1 - before["seconds"] / 0.5
    assert last["learning_rate/muon"] == pytest.approx(0.02 * left)
    assert latest(tmp_path / "checkpoints")
    assert run(tmp_path, steps=10**9, seconds=0.5, resume=True).step == state.step


def test_clipping_bounds_the_step(run: Run, tmp_path: Path) -> None:
    still = run(tmp_path / "a", steps=1, clip=1e-30, weight_decay=0.0).model.state_dict()
    moved = run(tmp_path / "b", steps=1, weight_decay=0.0).model.state_dict()
    before = run(tmp_path / "c", steps=1, learning_rate=1e-30, muon_learning_rate=1e-30).model.state_dict()
    assert all(torch.allclose(still[name], before[name], rtol=0, atol=1e-9) for name in before)
    assert not any(
        torch.allclose(moved[name], before[name], rtol=0, atol=1e-9) for name in before if not name.startswith("late")
    )


def test_bf16_changes_the_computation_but_not_the_weights_type(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("opencola.kernels.matmul.LEAST", 0)
    plain, rounded = run(tmp_path / "a", steps=3), run(tmp_path / "b", steps=3, bf16=True)
    assert all(p.dtype == torch.float32 for p in rounded.model.parameters())
    a, b = (torch.cat([p.flatten() for p in state.model.parameters()]) for state in (plain, rounded))
    assert 0 < (a - b).abs().max() < 0.05


def test_runs_outside_the_main_thread(run: Run, tmp_path: Path) -> None:
    thread = threading.Thread(target=run, args=(tmp_path,), kwargs={"steps": 2})
    thread.start()
    thread.join(30)
    assert latest(tmp_path / "checkpoints")


@pytest.mark.parametrize("field", ["steps", "log_every", "save_every", "keep"])
def test_impossible_counts_are_refused(field: str) -> None:
    with pytest.raises(ValueError, match=f"{field} must be at least 1, but is 0"):
        TrainConfig(**{field: 0})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sample_every": -1}, "sample_every must be at least 0, but is -1"),
        ({"divergence": 1.0}, "divergence must be above 1, or 0, but is 1.0"),
        ({"divergence": -2.0}, "divergence must be at least 0, but is -2.0"),
        ({"clip": 0.0}, "clip must be above 0, but is 0.0"),
        ({"clip": -1.0}, "clip must be above 0, but is -1.0"),
        ({"learning_rate": -1.0}, "learning_rate must be at least 0, but is -1.0"),
        ({"ema": 1.0}, "ema must be at least 0 and below 1, but is 1.0"),
    ],
)
def test_impossible_settings_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        TrainConfig(**fields)


def test_defaults_decay_to_the_final_fraction(run: Run, tmp_path: Path) -> None:
    run(tmp_path, steps=100, log_every=1, save_every=100)
    rate = records(tmp_path)[-1]["learning_rate/adamw"]
    expected = 0.05 + 0.95 * (1 + math.cos(math.pi * 0.99)) / 2
    assert rate == pytest.approx(2e-3 * expected)
