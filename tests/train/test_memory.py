"""Freed memory stays with the process, where glibc allocates."""

import platform
import subprocess
import sys

import pytest

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


def faults(keep: bool, **environment: str) -> int:
    command = [sys.executable, "-c", CODE.format(keep=keep)]
    return int(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another library than glibc allocates")
def test_pages_are_not_mapped_anew() -> None:
    assert faults(keep=False) > 1000 > faults(keep=True)
    assert faults(keep=True, MALLOC_MMAP_THRESHOLD_="1000000") > 1000  # the user's word
