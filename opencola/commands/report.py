"""Make tables and drawings of evaluations, from their results files alone.

RESULTS are files that `opencola evaluate` wrote. Two or more models are set side by side, and compared in pairs on
the records that both have answered. Prints the tables, and writes them as a page with some records, as Markdown,
and all figures as JSON lines.

examples:
  opencola report runs/mine/results.jsonl
  opencola report cola.jsonl ar.jsonl llada.jsonl --out runs/comparison
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.markup import escape
from rich.table import Table as Grid

from opencola.errors import UserError
from opencola.evaluation import screen
from opencola.evaluation.figures import standalone
from opencola.evaluation.reporting.accuracy_figure import accuracies
from opencola.evaluation.reporting.results import read_results
from opencola.evaluation.reporting.results_page import render_html, render_markdown
from opencola.evaluation.reporting.summary import Summary, rows, summarise, warnings
from opencola.evaluation.reporting.tables import Table, tables
from opencola.run import flags
from opencola.storage import locked, replacing
from opencola.text.lines import append_objects, write_objects

PAGE, TEXT, DRAWING, FIGURES = "results.html", "results.md", "accuracies.svg", "summary.jsonl"


@dataclass(frozen=True, kw_only=True)
class ReportFlags(flags.OutputFlags):
    """Which results, and where to."""

    results: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="RESULTS")]
    """Results files of `opencola evaluate`; models on the same records are compared in pairs, in this order."""
    out: Path = Path("runs/report")
    """Folder for results.html, results.md, accuracies.svg and summary.jsonl; older ones there are replaced."""


def command(argv: Sequence[str]) -> None:
    """Run `opencola report`."""
    options: ReportFlags = flags.parse(ReportFlags, argv, prog="opencola report", description=__doc__)
    if not options.results:
        raise UserError("nothing to report: name results files, as in opencola report runs/mine/results.jsonl")
    check_files(options)
    summaries = summarise([read_results(file) for file in options.results])
    drawing = accuracies(summaries)
    texts = {
        PAGE: render_html(summaries),
        TEXT: render_markdown(summaries, DRAWING),
        DRAWING: standalone(drawing),
    }
    records = list(rows(summaries))
    with locked(options.out), replacing(options.out) as draft:
        for name, text in texts.items():
            (draft / name).write_text(text, encoding="utf-8")
        write_objects(draft / FIGURES, records)
    if options.json:
        append_objects(sys.stdout, records)
    else:
        show(summaries)
    options.say(f"The page is {options.out / PAGE}; beside it: {TEXT}, {DRAWING}, {FIGURES}.")


def check_files(options: ReportFlags) -> None:
    """Raise UserError for a file that is named twice, or that the report would replace."""
    seen: set[Path] = set()
    for file in options.results:
        real = file.resolve()
        if real in seen:
            raise UserError(f"{file} is named twice")
        seen.add(real)
        if real in {(options.out / name).resolve() for name in (PAGE, TEXT, DRAWING, FIGURES)}:
            raise UserError(f"{file} holds results, but the report would replace it: choose another folder for --out")


def show(summaries: Sequence[Summary]) -> None:
    """Print what is not finished, and the tables."""
    console = screen.console()
    for warning in warnings(summaries):
        console.print(f"[bold red]{escape(warning)}[/]")
    for table in tables(summaries):
        console.print(f"\n[bold]{escape(table.title)}[/]")
        screen.put(grid(table))
    console.print()


def grid(table: Table) -> Grid:
    """A table for the terminal; groups stand above the first of their columns."""
    alone = len(table.columns) - sum(size for _, size in table.groups)
    above = [""] * alone + [name if i == 0 else "" for name, size in table.groups for i in range(size)]
    heads = [
        escape(f"{group}\n{column}" if table.groups else column)
        for group, column in zip(above, table.columns, strict=True)
    ]
    made = screen.table(*heads)
    for row in table.rows:
        made.add_row(*map(escape, row))
    return made
