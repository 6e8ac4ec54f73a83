"""A run that stopped, whichever way, and was resumed ends where the uninterrupted one ends, bit for bit."""

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from opencola.train.checkpoint import TrainState, checkpoints, latest, load, save
from opencola.train.optimizer import OptimizerConfig, build

Run = Callable[..., TrainState]
Everything = Callable[[TrainState], list[Tensor]]
TOY = Path(__file__).parent / "conftest.py"
ROOT = TOY.parent.parent.parent


def start(folder: Path, mode: str) -> subprocess.Popen[str]:
    """Train the toy in another process."""
    command = [sys.executable, str(TOY), str(folder), mode]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={"PYTHONPATH": str(ROOT)})


def records(folder: Path) -> list[dict[str, object]]:
    """The metrics without what the clock decides."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    timed = ("seconds", "tokens_per_second")
    return [{name: value for name, value in json.loads(line).items() if name not in timed} for line in lines]


def assert_same(a: list[Tensor], b: list[Tensor]) -> None:
    assert len(a) == len(b) > 30
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.fixture
def whole(run: Run, everything: Everything, tmp_path: Path) -> list[Tensor]:
    """All tensors at the end of the uninterrupted run in tmp_path/whole."""
    return everything(run(tmp_path / "whole"))


@pytest.mark.parametrize("stop", [5, 10])  # before and after the frozen part begins to learn
def test_resuming_equals_not_stopping(
    run: Run, everything: Everything, whole: list[Tensor], tmp_path: Path, stop: int
) -> None:
    class CrashError(Exception):
        pass

    def crash(step: int) -> None:
        if step == stop + 2:
            raise CrashError

    with pytest.raises(CrashError):
        run(tmp_path / "broken", hook=crash)
    assert latest(tmp_path / "broken" / "checkpoints") == tmp_path / "broken" / "checkpoints" / f"step-{stop:06d}"
    torch.manual_seed(123)
    state = run(tmp_path / "broken", resume=True)
    assert_same(everything(state), whole)
    assert (state.step, state.num_tokens) == (20, 20 * 4 * 12)
    assert records(tmp_path / "broken") == records(tmp_path / "whole")


def test_killed_while_saving_the_previous_checkpoint_remains(
    run: Run, everything: Everything, whole: list[Tensor], tmp_path: Path
) -> None:
    folder = tmp_path / "killed"
    with start(folder, "killed-in-save") as process:
        assert process.wait(60) == -signal.SIGKILL
    assert (folder / "checkpoints" / "unfinished-step-000010").is_dir()
    assert [path.name for path in checkpoints(folder / "checkpoints")] == ["step-000005"]
    assert_same(everything(run(folder, resume=True)), whole)
    assert records(folder) == records(tmp_path / "whole")
    assert not list((folder / "checkpoints").glob("unfinished-*"))


def test_ctrl_c_finishes_the_step_saves_and_says_how_to_go_on(
    run: Run, everything: Everything, whole: list[Tensor], tmp_path: Path
) -> None:
    folder = tmp_path / "interrupted"
    with start(folder, "interrupted") as process:
        assert process.stdout
        assert process.stdout.readline() == "in step 7\n"
        process.send_signal(signal.SIGINT)
        said = process.stdout.read()
        assert process.wait(60) == 130
    assert "step 8" in said and "--resume" in said and str(folder) in said
    assert [path.name for path in checkpoints(folder / "checkpoints")] == ["step-000005", "step-000008"]
    assert_same(everything(run(folder, resume=True)), whole)


def test_resuming_a_finished_run_changes_nothing(
    run: Run, everything: Everything, whole: list[Tensor], tmp_path: Path
) -> None:
    before = (tmp_path / "whole" / "metrics.jsonl").read_text()
    assert_same(everything(run(tmp_path / "whole", resume=True)), whole)
    assert (tmp_path / "whole" / "metrics.jsonl").read_text() == before


def test_the_recipe_not_the_checkpoint_sets_the_options(run: Run, tmp_path: Path) -> None:
    run(tmp_path, steps=5)
    state = run(tmp_path, steps=6, resume=True, learning_rate=0.125, weight_decay=0.25, final=1.0)
    group = max(state.optimizers[1].param_groups, key=lambda group: group["weight_decay"])
    assert (group["lr"], group["weight_decay"]) == (0.125, 0.25)


def test_old_checkpoints_are_deleted(run: Run, tmp_path: Path) -> None:
    run(tmp_path, keep=2)
    assert [path.name for path in checkpoints(tmp_path / "checkpoints")] == ["step-000015", "step-000020"]
    assert latest(tmp_path / "nowhere") is None


def test_order_is_by_number(tmp_path: Path) -> None:
    for name in ("step-1000000", "step-999999", "step-000005", "unfinished-step-2000000", "step-x"):
        (tmp_path / name).mkdir()
    assert [path.name for path in checkpoints(tmp_path)] == ["step-000005", "step-999999", "step-1000000"]


def test_errors_name_the_folder(run: Run, tmp_path: Path) -> None:
    state = run(tmp_path, steps=5)
    path = latest(tmp_path / "checkpoints")
    assert path
    with pytest.raises(FileExistsError, match="--resume"):
        run(tmp_path)
    with pytest.raises(ValueError, match=r"step-000005 .*Missing key.* optimizers.*blocks"):
        run(tmp_path, resume=True, optimizer="adamw")
    larger = nn.ModuleDict({"embedding": nn.Embedding(12, 8)})
    with pytest.raises(ValueError, match=r"step-000005 .*Size mismatch.* model\.embedding\.weight"):
        load(TrainState(larger, build(larger, {}, OptimizerConfig()), None, state.corpus), path)
    (path / ".metadata").unlink()
    with pytest.raises(ValueError, match="step-000005 .*metadata"):
        run(tmp_path, resume=True)


def test_saving_twice_at_one_step_keeps_the_first(run: Run, tmp_path: Path) -> None:
    state = run(tmp_path, steps=5)
    marker = save(state, tmp_path / "checkpoints", keep=1) / "marker"
    marker.touch()
    assert save(state, tmp_path / "checkpoints", keep=1) == marker.parent
    assert marker.exists()
