import html as entities
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from results_files import answer, answers, head, sample, scored, stories, write

from opencola.evaluation.reporting.results import read_results
from opencola.evaluation.reporting.summary import Summary, summarise
from opencola.evaluation.reporting.tables import Table, escape_markdown, html, markdown, percent, tables
from opencola.evaluation.statistics import Share

RIGHT, WRONG = "on a hill", "in the sea"
ODD = "a|b \\| <script>alert('x')</script> *&amp;* `c` [d](e) \n# f_g~h"


def cells(line: str) -> list[str]:
    """The cells of a line of a Markdown table: split at bars without a backslash, and unescaped."""
    parts = re.findall(r"((?:\\.|[^|\\])*)\|", line.strip().removeprefix("|"))
    return [entities.unescape(re.sub(r"\\(.)", r"\1", part.strip())) for part in parts]


def parsed(text: str) -> tuple[list[str], list[list[str]]]:
    """The head and the rows of a Markdown table."""
    lines = [line for line in text.split("\n") if line.startswith("|")]
    assert re.fullmatch(r"\|( -+:? \|)+", lines[1])
    assert lines[1].count("|") - 1 == len(cells(lines[0]))
    return cells(lines[0]), [cells(line) for line in lines[2:]]


class Cells(HTMLParser):
    """The texts of a table's cells by row, and how many columns each row spans; elements must be closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.rows: list[list[str]] = []
        self.spans: list[int] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in ("div", "table", "thead", "tbody", "tr", "th", "td", "p"), tag
        self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
            self.spans.append(0)
        if tag in ("th", "td"):
            self.rows[-1].append("")
            self.spans[-1] += int(dict(attrs).get("colspan") or 1)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1] in ("th", "td"):
            self.rows[-1][-1] += data


TABLE = Table(
    "Odd <title>",
    ("task", "one", "two", "one", "two"),
    [["x", "1", "2", "3", "4"], [ODD, ODD, "", "", ""]],
    [(ODD, 2), ("other", 2)],
    "A note.",
)


def test_markdown_parses_back() -> None:
    columns, rows = parsed(markdown(TABLE))
    flat = " ".join(ODD.split())
    assert columns == ["task", f"{flat}: one", f"{flat}: two", "other: one", "other: two"]
    assert rows == [["x", "1", "2", "3", "4"], [flat, flat, "", "", ""]]
    assert "<script>" not in markdown(TABLE) and "## Odd &lt;title&gt;" in markdown(TABLE)
    assert markdown(TABLE).endswith("\n\nA note.\n")


@pytest.mark.parametrize("sign", "\\`*_~[]|#")
def test_every_sign_of_markdown_is_escaped(sign: str) -> None:
    assert escape_markdown(f"a{sign}b") == f"a\\{sign}b"


def test_html_parses_back() -> None:
    found = Cells(html(TABLE))
    assert found.rows[0] == ["", ODD, "other"] and found.spans == [5, 5, 5, 5]
    assert found.rows[1] == [*TABLE.columns]
    assert found.rows[2:] == TABLE.rows


@pytest.fixture
def summaries(tmp_path: Path) -> list[Summary]:
    """`mine` has all; `<other>` MMLU only, with likelihoods."""
    judge = {"name": "<judge>", "nats": 2.0, "tokens": 1, "bytes": 1}
    mine = [
        head({"mmlu": 3, "lambada": 2, "stories": 2, "last_word": 2, "samples": 1}),
        *answers("mmlu", [RIGHT, RIGHT, WRONG]),
        *answers("lambada", ["on it", ""]),
        *stories(2),
        sample(0.7, 0, judge),
    ]
    other = [
        head({"mmlu": 3}, model="<other>", likelihood={"estimator": "IWAE | K = 4"}),
        *(answer("mmlu", i, WRONG, scored(i == 0, None)) for i in range(3)),
    ]
    files = [write(tmp_path / "a.jsonl", *mine), write(tmp_path / "b.jsonl", *other)]
    return summarise([read_results(file) for file in files])


def test_the_tables_of_two_models(summaries: list[Summary]) -> None:
    made = {table.title: table for table in tables(summaries)}
    assert [*made] == [
        "Accuracy", "Choice by likelihood", "The same records, two models", "Stories", "Samples",
    ]  # fmt: skip
    shares = ("accuracy", "parsed", "accuracy if parsed", "above chance", "records")
    columns, rows = parsed(markdown(made["Accuracy"]))
    assert columns == [
        "task",
        "chance",
        *(f"mine: {name}" for name in shares),
        *(f"<other>: {name}" for name in shares),
    ]
    assert rows == [
        ["LAMBADA", "0.0", "50.00 (9.5 to 90.5)", "50.00 (9.5 to 90.5)", "100.00 (20.7 to 100.0)",
         "50.00 (9.5 to 90.5)", "2", "", "", "", "", ""],
        ["MMLU", "25.0", "66.67 (20.8 to 93.9)", "100.00 (43.9 to 100.0)", "66.67 (20.8 to 93.9)",
         "55.56 (-5.6 to 91.8)", "3", "0.00 (0.0 to 56.1)", "100.00 (43.9 to 100.0)", "0.00 (0.0 to 56.1)",
         "-33.33 (-33.3 to 41.5)", "3"],
        ["average of tasks", "", "58.33", "", "", "", "2 of 8 tasks", "0.00", "", "", "", "1 of 8 tasks"],
    ]  # fmt: skip
    columns, rows = parsed(markdown(made["Choice by likelihood"]))
    assert columns[2:] == [
        f"<other>: IWAE | K = 4: {name}" for name in ("likeliest by log p", "likeliest by log p a byte", "records")
    ]
    assert rows == [["MMLU", "25.0", "33.33 (6.1 to 79.2)", "", "3"]]
    _, rows = parsed(markdown(made["The same records, two models"]))
    assert rows == [["MMLU", "mine", "<other>", "0", "2", "0", "1", "3", "+66.67", "0.5"]]
    _, rows = parsed(markdown(made["Stories"]))
    assert ["consistent stories", "50.00 (9.5 to 90.5)", "2"] in rows and rows[-1][0] == "last words, at best"
    _, rows = parsed(markdown(made["Samples"]))
    assert rows == [["mine", "0.7", "1", "4.0", "7.39", "<judge>"]]
    for table in made.values():
        found = Cells(html(table))
        assert found.rows[-len(table.rows) :] == [[*row] for row in table.rows] and len({*found.spans}) == 1


def test_tasks_without_options_have_no_row_of_likelihoods(tmp_path: Path) -> None:
    run = head({"mmlu": 1, "lambada": 1}, likelihood={"estimator": "exact"})
    file = write(tmp_path / "a.jsonl", run, answer("mmlu", 0, RIGHT, scored(True, True)), answer("lambada", 0, RIGHT))
    made = {table.title: table.rows for table in tables(summarise([read_results(file)]))}
    assert [row[0] for row in made["Choice by likelihood"]] == ["MMLU"]
    assert [row[0] for row in made["Accuracy"]] == ["LAMBADA", "MMLU", "average of tasks"]


def test_units_are_stated(summaries: list[Summary]) -> None:
    accuracy, *rest = tables(summaries)
    assert "in percent, with Wilson's 95 % interval" in accuracy.note
    assert "percent of records" in rest[0].note and "percentage points" in rest[1].note and "in percent" in rest[2].note


def test_one_model_has_nothing_to_be_compared_with(summaries: list[Summary]) -> None:
    assert [table.title for table in tables(summaries[1:])] == ["Accuracy", "Choice by likelihood"]
    assert [table.title for table in tables(summaries[:1])] == ["Accuracy", "Stories", "Samples"]


def test_percent() -> None:
    assert percent(Share(0.508, 0.47701, 0.53888, 1000)) == "50.80 (47.7 to 53.9)"
