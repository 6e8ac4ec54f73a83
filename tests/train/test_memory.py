"""Freed memory stays with the process, where glibc allocates."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import environment
from forked import done

CODE = """
import resource, torch
from opencola.train.memory import keep_freed
if {keep}: keep_freed()
def step():
    for size in (48_000_000, 40_000_000):
        torch.empty(size // 4).fill_(1.0)
for _ in range(25): step()  # addresses settle after some, up to eight seen
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5): step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def command(keep: bool) -> list[str]:
    return [sys.executable, "-c", CODE.format(keep=keep)]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another library than glibc allocates")
def test_pages_are_not_mapped_anew(tmp_path: Path) -> None:
    freed, kept = (int(done(command(keep), tmp_path).stdout) for keep in (False, True))
    assert freed > 1000 > kept
    # the user's word, which is heard when a process starts
    env = environment() | {"MALLOC_MMAP_THRESHOLD_": "1000000"}
    assert int(subprocess.run(command(True), env=env, capture_output=True, text=True, check=True).stdout) > 1000
