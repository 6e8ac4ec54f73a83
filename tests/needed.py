"""Tools that tests need and a developer's machine may lack: a test is skipped, and in CI it fails."""

import os
import shutil

import pytest


def lacking(what: str) -> None:
    """Skip the test or, with OPENCOLA_NO_SKIPS=1 in the environment, fail."""
    (pytest.fail if os.environ.get("OPENCOLA_NO_SKIPS") == "1" else pytest.skip)(what)


def need(program: str, packages: str) -> str:
    """The program, if it is there."""
    if shutil.which(program) is None:
        lacking(f"no {program}; on Debian: apt install {packages}")
    return program
