"""Python in a process of its own that starts at once: forked from one that has imported everything before.

It has its own number, streams, working directory and environment, and may be stopped and killed as any other. What
depends on how Python itself starts, imports or closes its streams wants `subprocess`.
"""

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from command_line import environment

from opencola.evaluation import pool

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["pytest", "opencola.commands.evaluate", "opencola.commands.tokenize", "opencola.run.run"])


class Started:
    """A command line `[sys.executable, ...]` that runs, as `subprocess.Popen` has them.

    alone: in a session of its own. quick: workers of its own start as soon, but as no children of it.
    """

    def __init__(self, argv: Sequence[str], cwd: Path | None = None, alone: bool = False, quick: bool = False) -> None:
        self._said = tempfile.TemporaryDirectory()
        arguments = (argv[1:], cwd or Path.cwd(), environment(), Path(self._said.name), alone, quick)
        self._process = FORKS.Process(target=_run, args=arguments)
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    def __enter__(self) -> "Started":
        return self

    def __exit__(self, *_: object) -> None:
        self.wait()

    @property
    def returncode(self) -> int | None:
        """None as long as it runs; minus a signal's number if that has ended it."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """Whether it has ended, and how."""
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        """Send it a signal."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """End it."""
        self.send_signal(signal.SIGKILL)

    def wait(self, timeout: float | None = None) -> int:
        """Its exit code, when it has ended."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0)
        return self._process.exitcode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Its output and errors, when it has ended."""
        self.wait(timeout)
        out, error = ((Path(self._said.name) / name).read_text(encoding="utf-8") for name in ("out", "error"))
        return out, error


def done(argv: Sequence[str], cwd: Path) -> "subprocess.CompletedProcess[str]":
    """A command line `[sys.executable, ...]` that has run."""
    process = Started(argv, cwd)
    out, error = process.communicate(300)
    return subprocess.CompletedProcess(argv, process.wait(), out, error)


def _run(argv: list[str], cwd: Path, env: dict[str, str], said: Path, alone: bool, quick: bool) -> None:
    if alone:
        os.setsid()
    for number, name in ((1, "out"), (2, "error")):
        os.dup2(os.open(said / name, os.O_WRONLY | os.O_CREAT), number)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if quick:
        pool.multiprocessing.get_context = lambda way: FORKS  # type: ignore[assignment]
    match argv:
        case ["-c", code, *rest]:
            sys.argv = ["-c", *rest]
            exec(code, {"__name__": "__main__"})
        case ["-m", module, *rest]:
            sys.argv = [module, *rest]
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        case [file, *rest]:
            sys.argv = [file, *rest]
            sys.path.insert(0, str(Path(file).resolve().parent))
            runpy.run_path(file, run_name="__main__")
