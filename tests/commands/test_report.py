"""`opencola report` on small results files."""

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from command_line import Main, opencola
from results_files import answers, head, write

from opencola.commands import main

RIGHT, WRONG = "on a hill", "in the sea"


@pytest.fixture
def report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Main:
    """The command in a folder with two models' results."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "250")
    write(Path("a.jsonl"), head({"mmlu": 8}), *answers("mmlu", [RIGHT] * 7 + [WRONG]))
    write(Path("b.jsonl"), head({"mmlu": 8}, model="[b]other"), *answers("mmlu", [RIGHT] + [WRONG] * 6))

    def run(*argv: str) -> tuple[int, str, str]:
        code = main.main(("report", *argv))
        return code, *capsys.readouterr()

    return run


def test_two_models(report: Main) -> None:
    code, said, error = report("a.jsonl", "b.jsonl", "--out", "new/out")
    assert (code, error) == (0, "")
    assert "[b]other is not finished; records: MMLU 7 of 8." in said
    assert said.count("[b]other") == 3, "as it is, in all tables, too"
    assert "87.50 (52.9 to 97.8)" in said and "14.29 (2.6 to 51.3)" in said
    out = Path("new/out")
    assert sorted(file.name for file in out.iterdir()) == [
        "accuracies.svg", "results.html", "results.md", "summary.jsonl",
    ]  # fmt: skip
    rows = [json.loads(line) for line in (out / "summary.jsonl").read_text().splitlines()]
    found = {(row["model"], row["figure"]): row["value"] for row in rows if "model" in row}
    assert found["mine", "accuracy"] == 87.5 and found["mine", "tasks_average"] == 87.5
    assert found["[b]other", "accuracy"] == pytest.approx(100 / 7)
    assert rows[-1]["models"] == ["mine", "[b]other"] and rows[-1]["only_first"] == 6 and rows[-1]["p_value"] == 1 / 32
    assert ElementTree.parse(out / "accuracies.svg").getroot().tag.endswith("svg")
    assert "87.50 (52.9 to 97.8)" in (out / "results.html").read_text()
    assert "| MMLU | 25.0 | 87.50 (52.9 to 97.8) |" in (out / "results.md").read_text()
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    assert report("a.jsonl", "b.jsonl", "--out", "new/out")[0] == 0
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before, "files alone decide"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ((), "nothing to report: name results files"),
        (("a.jsonl", "none.jsonl"), "none.jsonl"),
        (("a.jsonl", "./a.jsonl"), "a.jsonl is named twice"),
        (("summary.jsonl", "--out", "."), "summary.jsonl holds results, but the report would replace it"),
        (("cut.jsonl",), "cut.jsonl, line 9: not JSON"),
        (("a.jsonl", "--out", "a.jsonl"), "a.jsonl"),
    ],
)
def test_mistakes_are_one_line(argv: tuple[str, ...], message: str, report: Main) -> None:
    text = Path("a.jsonl").read_text()
    Path("summary.jsonl").write_text(text)
    Path("cut.jsonl").write_text(text[:-20] + "\n")
    code, _, error = report(*argv)
    assert code == 2 and error.startswith("error: ") and error.count("\n") == 1 and message in error, error
    assert Path("a.jsonl").read_text() == Path("summary.jsonl").read_text() == text
    assert not Path("runs").exists(), "nothing is written"


def test_in_a_process_of_its_own(report: Main, tmp_path: Path) -> None:
    done = opencola("report", "a.jsonl", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs" / "report" / "results.html").exists()
