"""Work by several processes: the same results, their errors, and their ends."""

import functools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import environment

from opencola.evaluation.pool import spread

HERE = Path(__file__)


def prepare(what: str) -> Callable[[int], tuple[int, int]]:
    if what == "cannot":
        raise FileNotFoundError("no model there")

    def work(item: int) -> tuple[int, int]:
        if item == 3 and what == "value":
            raise ValueError(f"item {item} is wrong")
        if item == 3 and what == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "slow":
            time.sleep(0.2 if item else 60)
        return item * item, os.getpid()

    return work


@pytest.mark.parametrize(("processes", "items"), [(1, 6), (2, 6), (9, 3)])
def test_every_item_once(processes: int, items: int) -> None:
    found = list(spread(functools.partial(prepare, ""), range(items), processes))
    assert sorted(square for square, _ in found) == [0, 1, 4, 9, 16, 25][:items]
    used = {process for _, process in found}
    assert used == {os.getpid()} if processes == 1 else os.getpid() not in used
    assert list(spread(functools.partial(prepare, "cannot"), [], processes)) == []


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize(
    ("what", "kind", "message"), [("value", ValueError, "item 3 is wrong"), ("cannot", OSError, "no model there")]
)
def test_errors_are_passed_on(processes: int, what: str, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        list(spread(functools.partial(prepare, what), range(6), processes))


def test_a_process_that_dies_is_an_error() -> None:
    with pytest.raises(OSError, match="a process has died"):
        list(spread(functools.partial(prepare, "dies"), range(6), 2))


def test_leaving_early_ends_the_processes() -> None:
    started = time.monotonic()
    results = spread(functools.partial(prepare, "slow"), range(6), 2)
    square, process = next(results)
    assert square == 1
    results.close()
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)
    assert time.monotonic() - started < 30


@pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")
def test_processes_end_when_the_first_one_is_killed() -> None:
    code = f"""
import functools, sys
sys.path.insert(0, {str(HERE.parent)!r})
import test_pool
from opencola.evaluation.pool import spread
if __name__ == "__main__":
    for _, process in spread(functools.partial(test_pool.prepare, ""), range(10**6), 2):
        print(process, flush=True)
"""
    environ = environment() | {"PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), *sys.path])}
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environ) as process:
        assert process.stdout is not None
        workers = {int(process.stdout.readline()) for _ in range(2000)}
        process.kill()
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{worker}").exists() for worker in workers):
        assert time.monotonic() < deadline
        time.sleep(0.05)
