"""The check for the day on which a GPU is at hand, at small sizes on a CPU: whatever fails, the rest is reported."""

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import parts, training
from benchmarks.gpu.report import report
from benchmarks.gpu.writing import model

CPU, META = torch.device("cpu"), torch.device("meta")
TINY = parts.Where(CPU, tiny=True)


def rows_of(part: str, names: list[str]) -> list[dict[str, Any]]:
    """Figures of some rows of a part."""
    return [measure() for name, measure in parts.PARTS[part][1](TINY) if name in names]


def options(out: Path, **fields: Any) -> argparse.Namespace:
    values = {"out": out, "seconds": 60.0, "device": "cpu", "part": None, "tiny": True, "rows": out / "gpu.jsonl"}
    return argparse.Namespace(**values | fields)


def test_every_row_of_writing_and_of_the_public_size() -> None:
    for part in ("device", "generate", "release"):
        for name, measure in parts.PARTS[part][1](TINY):
            found = measure()
            json.dumps(found)
            if "tokens_per_second" in found:
                assert found["seconds"] > 0 and found["flops"] > 0, name
            if "new" in found:
                assert found["written"] == found["batch"] * found["new"], name


def test_all_ways_of_training_compute_the_same_loss() -> None:
    config = parts.config("S", TINY)
    ways = {name: replace(way, compile=False) for name, way in training.WAYS.items()}
    assert {way.attention for way in ways.values()} == {"own", "dense"}
    losses = {name: training.measure(config, way, 2, 32, CPU)["loss"] for name, way in ways.items()}
    plain = losses["dense mask"]
    assert losses["packed"] == pytest.approx(plain, rel=2e-3)
    documents = training.measure(config, training.Way(documents=True, recompute=True), 2, 32, CPU)["loss"]
    dense = training.measure(config, training.Way(attention="dense", documents=True), 2, 32, CPU)["loss"]
    assert documents == pytest.approx(dense, rel=2e-3) and documents != plain
    assert losses["packed, compiled, whole step"] > 2 * plain  # the prior's loss and that of the VAE


def test_the_public_size_has_its_shapes_on_a_device_without_memory() -> None:
    cola = model(parts.config("2B", parts.Where(META, tiny=False)), META)
    assert sum(p.numel() for p in cola.parameters()) == pytest.approx(2.33e9, rel=1e-3)
    assert all(p.is_meta and p.dtype == torch.bfloat16 for p in cola.parameters())
    z_t = torch.randn(2, 1, 1024, 16, device=META, dtype=torch.bfloat16)
    velocity = cola.dit.packed(z_t[:, 0], z_t, torch.rand(2, 1, 64, device=META, dtype=torch.bfloat16))
    assert velocity.shape == z_t.shape and velocity.dtype == torch.bfloat16


def test_tests_are_run_and_their_failures_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pyproject.toml").write_text("")
    (tmp_path / "conftest.py").write_text("def pytest_addoption(parser): parser.addoption('--device')\n")
    (tmp_path / "test_it.py").write_text("def test_good(): pass\ndef test_bad(): assert 1 == 2, 'no parity'\n")
    (tmp_path / "test_broken.py").write_text("import nothing_of_this_name\n")
    monkeypatch.setattr(parts, "ROOT", tmp_path)
    found = parts.run_tests("test_it.py", CPU)
    assert (found["passed"], found["failed"], found["skipped"], found["exit_code"]) == (1, 1, 0, 1)
    ((name, text),) = found["failures"].items()
    assert name == "test_it.py::test_bad" and "no parity" in text
    assert parts.run_tests("test_broken.py", CPU)["failed"] == 1


def test_the_tests_that_it_runs_are_there() -> None:
    for name in parts.TESTS:
        file, _, function = name.partition("::")
        assert f"def {function}(" in (parts.ROOT / file).read_text() if function else (parts.ROOT / file).is_file()


def test_a_row_that_fails_loses_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def rows(where: parts.Where) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
        yield "good", lambda: {"seconds": 2.0, "flops": 10}
        yield "bad", lambda: {"seconds": 1 / 0}
        yield "after", lambda: {"seconds": 4.0, "flops": 10}

    monkeypatch.setattr(parts, "PARTS", {"part": (1.0, rows)})
    given = options(tmp_path)
    command.run_rows("part", given)
    command.add(given.rows, "device", "rates", {"name": "NVIDIA H200", "bf16_flops": 50})
    with given.rows.open("a") as file:
        file.write('{"part": "part", "row": "cut o')
    report(tmp_path, took=12.3)
    found = json.loads((tmp_path / "gpu.json").read_text())
    good, bad, after, _ = found["rows"]
    assert found["seconds"] == 12.3
    assert (good["mfu_measured"], after["mfu_measured"]) == (0.1, 0.05) and good["mfu_stated"] < 1e-9
    assert "ZeroDivisionError" in bad["error"] and "mfu_measured" not in bad
    page = (tmp_path / "gpu.md").read_text()
    assert "| good | 2 |" in page and "## Failed: part, bad" in page and "1 / 0" in page


def test_a_part_without_time_left_is_told_row_by_row(tmp_path: Path) -> None:
    command.run_rows("generate", options(tmp_path, seconds=-1.0))
    lines = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    assert [line["row"] for line in lines] == ["S, batch 1", "S, batch 2", "M, batch 1", "M, batch 2"]
    assert all(line["error"] == "the time of this part was over" for line in lines)


def test_processes_that_hang_or_die_leave_a_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "GRACE", 0.0)
    lines = tmp_path / "gpu.jsonl"
    assert "stopped after" in str(command.child("device", 0.1, lines, options(tmp_path)))
    monkeypatch.setattr(command, "child", lambda name, *rest: "it died" if name == "parity" else None)
    command.run_parts(options(tmp_path, part=["parity", "device"]))
    rows = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    assert [(row["part"], row["error"]) for row in rows] == [("parity", "it died")]
    assert "it died" in (tmp_path / "gpu.md").read_text()
    with pytest.raises(SystemExit, match="there is no part 'other'"):
        command.run_parts(options(tmp_path, part=["other"]))


@pytest.mark.slow
def test_the_whole_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(parts.ROOT)
    monkeypatch.setattr("sys.argv", ["gpu", "--device", "cpu", "--tiny", "--seconds", "900", "--out", str(tmp_path)])
    command.main()
    rows = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    assert {row["part"] for row in rows} == {*parts.PARTS}
    assert not [row for row in rows if row.get("error") or row.get("failed")]
