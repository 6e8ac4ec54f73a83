"""What every test gets: one thread, known seeds, and the golden fixtures of the official implementation."""

import os
import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from needed import lacking

from opencola.kernels import library

ROOT = Path(__file__).resolve().parent.parent

torch.set_num_threads(1)
# A shell's background jobs ignore Ctrl-C, and so would the processes that tests start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--device cuda`: tests that take the fixture `device` run there; the others stay on the CPU."""
    parser.addoption("--device", default="cpu", help="device of the tests that can run on any (default: cpu)")


@pytest.fixture(scope="session")
def device(pytestconfig: pytest.Config) -> torch.device:
    """Where models and tensors are to be put by tests that can run on any device."""
    return torch.device(pytestconfig.getoption("device"))


@pytest.fixture(autouse=True)
def known_seeds() -> None:
    """Start each test from the same global random state, so that no test depends on which ones ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def generator() -> Callable[[int], torch.Generator]:
    """Make CPU generators: ``torch.randn(3, generator=generator(7))`` gives the same numbers in every run."""
    return lambda seed: torch.Generator().manual_seed(seed)


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of golden fixtures, with ``configA`` and ``configB`` inside.

    ``$OPENCOLA_SHARED/golden`` if that variable is set (an error if it is not there), else ``shared/golden`` beside the
    repository, else the repository's own small copies in ``tests/golden``.
    """
    if shared := os.environ.get("OPENCOLA_SHARED"):
        folder = Path(shared) / "golden"
        if not folder.is_dir():
            pytest.fail(f"OPENCOLA_SHARED={shared} has no folder 'golden'; correct or unset the variable")
        return folder
    shared_with_us = ROOT.parent / "shared" / "golden"
    return shared_with_us if shared_with_us.is_dir() else ROOT / "tests" / "golden"


@pytest.fixture
def need_kernels() -> None:
    """Skip where no C compiler has made the kernels; `python -m opencola.kernels` says why."""
    if library.library() is None:
        lacking("no kernels: python -m opencola.kernels says why")


@pytest.fixture(params=[True, False], ids=["kernels", "torch"])
def with_kernels(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Run a test with the kernels and without them; whether it is with them."""
    if request.param:
        request.getfixturevalue("need_kernels")
        yield True
    else:
        with library.switched_off():
            yield False
