"""The parts of the check, each in a process of its own, and the rows that each measures one after another."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import device as gpu

ROOT = Path(__file__).resolve().parent.parent.parent
TESTS = (
    "tests/checkpoints/test_parity_vae.py",
    "tests/checkpoints/test_parity_dit.py",
    "tests/checkpoints/test_parity_training.py",
    "tests/checkpoints/test_parity_generation.py",
    "tests/layers/test_packed.py::test_on_any_device",
    "tests/models/test_devices.py",
)

Row = tuple[str, Callable[[], dict[str, Any]]]


@dataclass(frozen=True)
class Where:
    """On what the parts run, and how large."""

    device: torch.device
    tiny: bool
    """Sizes at which a CPU needs seconds: to test this check itself."""


def device(where: Where) -> Iterator[Row]:
    """What the device is, and the rates that the other parts are held to."""
    yield "about", functools.partial(gpu.about, where.device)
    yield "rates", functools.partial(gpu.rates, where.device, 128 if where.tiny else 8192)


def parity(where: Where) -> Iterator[Row]:
    """The tests that compare with reference tensors, dense masks and the CPU."""
    for file in TESTS[:1] if where.tiny else TESTS:
        yield file, functools.partial(run_tests, file, where.device)


def run_tests(file: str, device: torch.device) -> dict[str, Any]:
    """Numbers of tests by outcome, and what the failures say."""
    import pytest

    found: dict[str, Any] = {"passed": 0, "failed": 0, "skipped": 0, "failures": {}}

    class Recorder:
        def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
            if report.when == "call" or not report.passed:
                found[report.outcome] += 1
            if report.failed:
                found["failures"][report.nodeid] = report.longreprtext[-2000:]

        def pytest_collectreport(self, report: pytest.CollectReport) -> None:
            if report.failed:
                found["failed"] += 1
                found["failures"][report.nodeid] = report.longreprtext[-2000:]

    options = ["-q", "-p", "no:cacheprovider", f"--rootdir={ROOT}", f"--device={device}"]
    found["exit_code"] = int(pytest.main([f"{ROOT}/{file}", *options], [Recorder()]))
    return found


def train(where: Where, size: str) -> Iterator[Row]:
    """Speed, memory and use of the device, by every way of computing a step."""
    from benchmarks.gpu.training import WAYS, measure

    shape = (2, 32) if where.tiny else {"S": (64, 1024), "M": (32, 1024)}[size]
    backend = "eager" if where.tiny else "inductor"
    for name, way in WAYS.items():
        looked_into = name == "packed, compiled" and not where.tiny
        yield name, functools.partial(measure, config(size, where), way, *shape, where.device, looked_into, backend)


def generate(where: Where) -> Iterator[Row]:
    """Seconds of 64 new tokens after a prompt of 64: 16 Euler steps, guidance 7, weights in bfloat16."""
    from benchmarks.gpu.writing import model, write

    for size in ("S", "M"):
        for batch in (1, 2) if where.tiny else (1, 64):
            work = functools.partial(write, batch=batch, device=where.device, new=16 if where.tiny else 64)
            yield f"{size}, batch {batch}", lambda size=size, work=work: work(model(config(size, where), where.device))


def release(where: Where) -> Iterator[Row]:
    """The public size of 2.3 B parameters: drawn on the device, writing a block, and training."""
    from benchmarks.gpu.training import Way, measure
    from benchmarks.gpu.writing import model, size_of, write

    large = config("2B", where)
    built = functools.cache(lambda: model(large, where.device))
    yield "weights", functools.partial(size_of, built, where.device)
    for batch in (1, 2) if where.tiny else (1, 64):
        yield f"a block, batch {batch}", lambda batch=batch: write(built(), batch, where.device, new=16)
    yield "let go", lambda: built.cache_clear() or {}
    shape = (2, 32) if where.tiny else (8, 1024)
    yield "train", lambda: measure(large, Way(recompute=True), *shape, where.device)


PARTS: dict[str, tuple[float, Callable[[Where], Iterator[Row]]]] = {
    "device": (40, device),
    "parity": (110, parity),
    "train M": (90, functools.partial(train, size="M")),
    "generate": (50, generate),
    "train S": (80, functools.partial(train, size="S")),
    "release": (90, release),
}
"""Seconds that each may take, and its rows; in this order, until the time is over."""


def config(size: str, where: Where) -> Any:
    """Of a size of the benchmarks or of the public one; in a tiny run of the same shape, but small."""
    from benchmarks.common import PRIOR, SIZES
    from benchmarks.release_size import DIT, VAE
    from opencola.models.cola.parts import ColaConfig

    whole = ColaConfig(vae=VAE, dit=DIT, prior=PRIOR) if size == "2B" else SIZES[size]
    if not where.tiny:
        return whole
    vae = replace(whole.vae, vocab_size=64, width=32, ffn_dim=64, num_heads=2, encoder_layers=1, decoder_layers=1)
    return replace(
        whole, vae=vae, dit=replace(whole.dit, width=32, num_layers=2, num_heads=2, head_dim=16, rope_dim=12)
    )
