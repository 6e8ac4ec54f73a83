"""Freed memory stays with the process, where glibc allocates."""

import platform
import subprocess
import sys

import pytest

CODE = """
import resource, statistics, torch
from opencola.train.memory import keep_freed
if {keep}: keep_freed()
def step():
    for size in (48_000_000, 40_000_000):
        torch.empty(size // 4).fill_(1.0)
counts = []
for _ in range(9):  # by chance of addresses the heap may still grow in one of them
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    step()
    counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(int(statistics.median(counts)))
"""


def faults(keep: bool, **environment: str) -> int:
    command = [sys.executable, "-c", CODE.format(keep=keep)]
    return int(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another library than glibc allocates")
def test_pages_are_not_mapped_anew() -> None:
    assert faults(keep=False) > 1000 > faults(keep=True)
    assert faults(keep=True, MALLOC_MMAP_THRESHOLD_="1000000") > 1000  # the user's word
