"""What trackers are told: TensorBoard's files are read back, Weights & Biases is a stand-in that takes notes."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from opencola.models.language_model import Sample
from opencola.train import sinks
from opencola.train.checkpoint import TrainState

Run = Callable[..., TrainState]


def show() -> list[Sample]:
    return [Sample("continuation", "a", "b", {}), Sample("reconstruction", "c", "d", {})]


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def events(folder: Path) -> EventAccumulator:
    """All that TensorBoard can show of a run."""
    everything = {"scalars": 0, "histograms": 0, "tensors": 0}
    return EventAccumulator(str(folder / "tensorboard"), size_guidance=everything).Reload()


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Every scalar that TensorBoard shows of a run."""
    found = events(folder)
    return {tag: [(event.step, event.value) for event in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def test_tensorboard_holds_what_the_file_holds(run: Run, tmp_path: Path) -> None:
    run(tmp_path, trackers=("tensorboard",), log_every=3, sample_every=8, show=show)
    written, shown = records(tmp_path), scalars(tmp_path)
    names = {name for record in written for name, value in record.items() if isinstance(value, float | int)} - {"step"}
    assert shown.keys() == names and {"loss/ce", "gradient_norm", "learning_rate/muon", "tokens"} <= names
    for name in names:
        assert [step for step, _ in shown[name]] == [record["step"] for record in written]
        assert [value for _, value in shown[name]] == pytest.approx([record[name] for record in written], rel=1e-6)
    found = events(tmp_path)
    for event, record in zip(found.Histograms("bins"), written, strict=True):
        entries = [value for value in record["bins"] if value is not None]
        histogram = event.histogram_value
        assert (event.step, histogram.num) == (record["step"], len(entries))
        assert (histogram.min, histogram.max, histogram.sum) == (min(entries), max(entries), sum(entries))
    texts = [(event.step, event.tensor_proto.string_val[0].decode()) for event in
             found.Tensors("continuation/0/text_summary")]  # fmt: skip
    assert texts == [(8, "a ▸ b"), (16, "a ▸ b"), (20, "a ▸ b")]


def test_tensorboard_after_resuming_shows_no_step_twice(run: Run, tmp_path: Path) -> None:
    class CrashError(Exception):
        pass

    def crash(step: int) -> None:
        if step == 14:
            raise CrashError

    with pytest.raises(CrashError):
        run(tmp_path, trackers=("tensorboard",), save_every=10, hook=crash)
    assert [step for step, _ in scalars(tmp_path)["loss"]] == list(range(1, 15))
    run(tmp_path, trackers=("tensorboard",), save_every=10, resume=True)
    shown = scalars(tmp_path)["loss"]
    assert [step for step, _ in shown] == list(range(1, 21))
    assert [value for _, value in shown] == pytest.approx([record["loss"] for record in records(tmp_path)], rel=1e-6)


class Wandb(ModuleType):
    """A stand-in for the package: notes what it is asked."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.runs: list[dict[str, Any]] = []
        self.logged: list[tuple[int, dict[str, Any]]] = []
        self.finished = 0

    def init(self, **options: Any) -> "Wandb":
        self.runs.append(options)
        self.logged.clear()
        return self

    def log(self, values: dict[str, Any], step: int) -> None:
        assert not self.logged or self.logged[-1][0] <= step, "steps must not fall"
        self.logged.append((step, values))

    def finish(self) -> None:
        self.finished += 1

    @staticmethod
    def Histogram(entries: list[float]) -> tuple[str, list[float]]:
        return "histogram", entries

    @staticmethod
    def Table(columns: list[str], data: list[Any]) -> tuple[str, list[str], list[Any]]:
        return "table", columns, data


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Wandb:
    module = Wandb()
    module.__spec__ = sinks.importlib.util.spec_from_loader("wandb", None)
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_weights_and_biases(run: Run, tmp_path: Path, wandb: Wandb, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    run(tmp_path, trackers=("wandb",), log_every=5, steps=10, sample_every=5, show=show, settings={"seed": 3})
    (first,) = wandb.runs
    assert (first["dir"], first["project"], first["config"]) == (str(tmp_path), "opencola", {"seed": 3})
    assert wandb.finished == 1
    logged = [values for step, values in wandb.logged if "loss" in values]
    assert [step for step, values in wandb.logged if "loss" in values] == [5, 10]
    for values, record in zip(logged, records(tmp_path), strict=True):
        assert values.pop("bins") == ("histogram", [value for value in record.pop("bins") if value is not None])
        assert values == {name: value for name, value in record.items() if name != "step"}
    assert (5, {"continuation/0": ("table", ["step", "text"], [[5, "a ▸ b"]])}) in wandb.logged
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    run(tmp_path, trackers=("wandb",), log_every=5, steps=12, resume=True)
    assert wandb.runs[1]["id"] == first["id"] and wandb.runs[1]["project"] == "mine"
    assert wandb.runs[1]["config"]["steps"] == 12  # without settings: those of training
    run(tmp_path / "other", trackers=("wandb",), steps=2)
    assert wandb.runs[2]["id"] != first["id"]


def test_a_crash_closes_trackers(run: Run, tmp_path: Path, wandb: Wandb) -> None:
    with pytest.raises(FloatingPointError):
        run(tmp_path, trackers=("wandb",), broken_at=3)
    assert wandb.finished == 1


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"names wandb, .* not installed: pip install 'opencola\[wandb\]'"):
        sinks.check(["wandb"])
    sinks.check([])
