"""A server in a process of its own, for as long as it is needed."""

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from opencola.errors import UserError

READY = re.compile(r"serving .* at (http://\S+)\n")
STOPPING = 60.0
"""Seconds in which a server must have ended what is begun; then it is killed."""


@dataclass(frozen=True)
class Started:
    """A server that answers."""

    url: str
    process: "subprocess.Popen[str]"


@contextmanager
def started(model: Path, *flags: str, port: int = 0) -> Iterator[Started]:
    """Run `opencola serve` with these flags, at any port that is free for 0, and stop it in the end.

    Raises UserError, with its last words, where it does not come up.
    """
    argv = [sys.executable, "-m", "opencola", "serve", "--model", str(model), f"--port={port}", *flags]
    with tempfile.TemporaryFile("w+", encoding="utf-8") as log:
        # a session of its own: Ctrl-C is for the client, which stops the server then
        process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True)
        assert process.stdout is not None
        try:
            ready = next((found for line in process.stdout if (found := READY.fullmatch(line))), None)
            if ready is None:
                log.seek(0)
                said = log.read().split("\n")
                raise UserError(f"the server did not start: {next(filter(None, reversed(said)), 'it says nothing')}")
            yield Started(ready[1], process)
        finally:
            process.terminate()
            try:
                process.wait(STOPPING)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            process.stdout.close()
