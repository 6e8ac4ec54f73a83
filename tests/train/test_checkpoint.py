"""A run that stopped, whichever way, and was resumed ends where the uninterrupted one ends, bit for bit."""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from forked import Started
from torch import Tensor, nn

from opencola.train import checkpoint
from opencola.train.checkpoint import SUMS, Saver, TrainState, checkpoints, latest, load
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


class CrashError(Exception):
    pass


def crash_in(step: int) -> Callable[[int], None]:
    """What raises CrashError when that step is asked for its batch."""

    def crash(now: int) -> None:
        if now == step:
            raise CrashError

    return crash


@pytest.fixture(scope="module")
def trained(run: Run, everything: Everything, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Tensor]]:
    """A folder with an uninterrupted run, `whole`, and one that broke off in step 12; all tensors of the first."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.raises(CrashError):
        run(folder / "broken", hook=crash_in(12))
    return folder, everything(run(folder / "whole"))


@pytest.fixture
def whole(trained: tuple[Path, list[Tensor]], tmp_path: Path) -> list[Tensor]:
    """All tensors at the end of the uninterrupted run, of which tmp_path/whole is a copy."""
    shutil.copytree(trained[0] / "whole", tmp_path / "whole")
    return trained[1]


@pytest.mark.parametrize("stop", [5, 10])  # before and after the frozen part begins to learn
def test_resuming_equals_not_stopping(
    run: Run, everything: Everything, whole: list[Tensor], tmp_path: Path, stop: int
) -> None:
    with pytest.raises(CrashError):
        run(tmp_path / "broken", hook=crash_in(stop + 2))
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
    assert Started([sys.executable, str(TOY), str(folder), "killed-in-save"]).wait() == -signal.SIGKILL
    assert (folder / "checkpoints" / "unfinished-step-000010").is_dir()
    assert [path.name for path in checkpoints(folder / "checkpoints")] == ["step-000005"]
    assert_same(everything(run(folder, resume=True)), whole)
    assert records(folder) == records(tmp_path / "whole")
    assert not list((folder / "checkpoints").glob("unfinished-*"))


def test_ctrl_c_finishes_the_step_saves_and_says_how_to_go_on(
    run: Run, everything: Everything, whole: list[Tensor], tmp_path: Path
) -> None:
    folder = tmp_path / "interrupted"
    with pytest.raises(KeyboardInterrupt, match=rf"step 8.*{folder}.*--resume"):
        run(folder, hook=lambda step: signal.raise_signal(signal.SIGINT) if step == 7 else None)
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


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", "run.json", SUMS])
@pytest.mark.parametrize("harm", ["lost", "cut", "flipped"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_serves(
    run: Run, everything: Everything, trained: tuple[Path, list[Tensor]], tmp_path: Path, name: str, harm: str
) -> None:
    shutil.copytree(trained[0] / "broken", tmp_path / "run")
    bad = latest(tmp_path / "run" / "checkpoints")
    assert bad
    content = (bad / name).read_bytes()
    middle = len(content) // 2
    flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    {
        "lost": (bad / name).unlink,
        "cut": lambda: (bad / name).write_bytes(content[:middle]),
        "flipped": lambda: (bad / name).write_bytes(flipped),
    }[harm]()
    with pytest.raises(ValueError, match=f"delete .*{bad.name} to go on from the checkpoint before it") as said:
        run(tmp_path / "run", resume=True)
    assert str(bad) in str(said.value) and "\n" not in str(said.value)
    shutil.rmtree(bad)
    assert_same(everything(run(tmp_path / "run", resume=True)), trained[1])


def test_what_is_saved_is_the_state_at_that_moment(run: Run, tmp_path: Path) -> None:
    state = run(tmp_path, steps=5)
    with Saver(tmp_path / "other", keep=1) as saver:
        saver.save(state)
        for parameter in state.model.parameters():  # at once, while it is being written
            parameter.data.fill_(7.0)
    fresh = run(tmp_path / "fresh", steps=1)
    load(fresh, saver.path(5))
    load(state, tmp_path / "checkpoints" / "step-000005")
    for one, other in zip(fresh.model.parameters(), state.model.parameters(), strict=True):
        assert torch.equal(one, other) and not (one == 7).any()


def test_saving_twice_at_one_step_keeps_the_first(run: Run, tmp_path: Path) -> None:
    state = run(tmp_path, steps=5)
    marker = tmp_path / "checkpoints" / "step-000005" / "marker"
    marker.touch()
    with Saver(tmp_path / "checkpoints", keep=1) as saver:
        saver.save(state)
    assert marker.exists()


@pytest.mark.parametrize("full_at", ["tensors", "sums"])
def test_a_full_disk_ends_the_run_and_leaves_the_last_checkpoint(
    run: Run, everything: Everything, whole: list[Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full_at: str
) -> None:
    def full(path: Path) -> str:
        if "step-000010" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return sha256(path)

    sha256 = checkpoint.checksum
    message = {"sums": "No space left on device", "tensors": "MB are free, and it takes"}
    if full_at == "sums":
        monkeypatch.setattr(checkpoint, "checksum", full)
    else:
        if os.geteuid() != 0 or shutil.which("mount") is None:
            pytest.fail("this test mounts a small file system, and needs root")
        small = tmp_path / "run" / "checkpoints"
        small.mkdir(parents=True)
        size = sum(file.stat().st_size for file in (tmp_path / "whole" / "checkpoints" / "step-000005").iterdir())
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={3 * size // 2}", "tmpfs", str(small)], check=True)
    try:
        with pytest.raises(OSError, match=message[full_at] + r".*; go on from .*step-000005 \(--resume\)"):
            run(tmp_path / "run")
        monkeypatch.undo()
        kept = latest(tmp_path / "run" / "checkpoints")
        assert kept is not None and kept.name == "step-000005"
        shutil.copytree(tmp_path / "run", tmp_path / "moved")
    finally:
        if full_at == "tensors":
            subprocess.run(["umount", str(small)], check=True)
    assert_same(everything(run(tmp_path / "moved", resume=True)), whole)


def test_without_room_for_a_checkpoint_a_run_does_not_begin(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(OSError, match=r"no room for a checkpoint in .*: 0.0 MB are free, and it takes 0.0 MB"):
        run(tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.jsonl").read_text()


@pytest.mark.slow
def test_killed_at_any_moment_it_goes_on_to_the_same_end(run: Run, everything: Everything, tmp_path: Path) -> None:
    chance, folder, kills, in_save = random.Random(1), tmp_path / "killed", 0, 0
    for kills in range(200):
        with start(folder, "slowly") as process:
            assert process.stdout
            first = process.stdout.readline()
            if kills % 2:  # while a checkpoint is being written
                while process.poll() is None and not list((folder / "checkpoints").glob("unfinished-*")):
                    time.sleep(0.0005)
                time.sleep(chance.uniform(0, 0.02))
            else:
                time.sleep(chance.uniform(0, 0.5))
            process.send_signal(signal.SIGKILL)
            rest = process.stdout.read()
        in_save += bool(list((folder / "checkpoints").glob("unfinished-*")))
        if "done" in first + rest:
            break
    assert kills >= 20 and in_save >= 5
    state = run(folder, resume=True, steps=200, save_every=2, keep=2)
    assert_same(everything(state), everything(run(tmp_path / "whole", steps=200, save_every=200)))
    assert records(folder) == records(tmp_path / "whole")
