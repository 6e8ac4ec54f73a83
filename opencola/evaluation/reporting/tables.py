"""Tables of evaluations, as Markdown and as HTML. Shares stand in percent, with their 95 % interval behind them."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from opencola.evaluation.benchmarks.tasks import TASKS
from opencola.evaluation.reporting.page import scroll
from opencola.evaluation.reporting.summary import OPTIONS, Summary, TaskSummary, pairs
from opencola.evaluation.statistics import Share

WAYS = {"by_sum": "likeliest by log p", "by_byte": "likeliest by log p a byte"}


@dataclass(frozen=True)
class Table:
    """Rows of texts under columns; the columns behind the first `len(columns) - sum of the groups' sizes` are in
    groups, one for each model. `note`: what a reader must know to read it."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    groups: Sequence[tuple[str, int]] = ()
    note: str = ""


def tables(summaries: Sequence[Summary]) -> list[Table]:
    """All tables that the results have something for."""
    made = (accuracies, likelihoods, comparisons, story_shares, samples)
    return [table for make in made if (table := make(summaries)).rows]


def accuracies(summaries: Sequence[Summary]) -> Table:
    """The protocol's figures: answers that were generated."""
    columns = ("accuracy", "parsed", "accuracy if parsed", "above chance", "records")

    def cells(part: TaskSummary) -> list[str]:
        scores = part.scores
        shares = (scores.accuracy, scores.parse_rate, scores.accuracy_given_parse, scores.chance_corrected)
        return [*map(percent, shares), f"{scores.accuracy.count:,}"]

    table = _by_task("Accuracy", summaries, columns, cells)
    if not table.rows:
        return table
    average = ["average of tasks", ""]
    for summary in summaries:
        value = "" if summary.average is None else f"{100 * summary.average:.2f}"
        average += [value, "", "", "", f"{len(summary.tasks)} of {len(TASKS)} tasks"]
    note = (
        "All in percent, with Wilson's 95 % interval. Accuracy: generated answers that match, of all records. Parsed: "
        "answers that name an option (without options: that hold a word). Accuracy if parsed: of these, the ones that "
        "name the right option. Above chance: (accuracy - chance) / (1 - chance). The average is the plain mean of the "
        "tasks' accuracies; compare averages of the same tasks only."
    )
    return Table(table.title, table.columns, [*table.rows, average], table.groups, note)


def likelihoods(summaries: Sequence[Summary]) -> Table:
    """Accuracy of the likeliest option; not what the protocol asks for."""
    scored = [summary for summary in summaries if any(part.likelihood for part in summary.tasks)]

    def cells(part: TaskSummary) -> list[str]:
        shares = [part.likelihood.get(way) for way in OPTIONS]
        counts = [f"{value.count:,}" for value in shares if value is not None]
        return [*("" if value is None else percent(value) for value in shares), *(counts[:1] or [""])]

    columns = (*WAYS.values(), "records")
    table = _by_task("Choice by likelihood", scored, columns, cells)
    groups = [(f"{summary.name}: {summary.estimator}", len(columns)) for summary in scored]
    note = (
        "Not the protocol's figure, which counts generated answers: percent of records whose right option has the "
        "highest log-probability, whole or divided by its bytes. Behind each model's name: how that was computed. "
        "Bounds and estimates of different models are not comparable like exact values."
    )
    rows = [row for row in table.rows if any(row[2:])]
    return Table(table.title, table.columns, rows, groups, note)


def comparisons(summaries: Sequence[Summary]) -> Table:
    """Every two models on the same records."""
    rows = []
    for pair in pairs(summaries):
        tested = pair.paired
        counts = (tested.both, tested.only_first, tested.only_second, tested.neither, pair.count)
        change = f"{100 * tested.difference:+.2f}"
        models = [pair.task.title, pair.first, pair.second]
        rows.append([*models, *(f"{count:,}" for count in counts), change, f"{tested.p_value:.2g}"])
    note = (
        "McNemar's exact test on the records that both have answered: how many both got right, only one of them, and "
        "neither. Difference: the first model's accuracy less the second's, in percentage points. p: two-sided, of "
        "each test by itself; among many tests some are small by chance."
    )
    heads = ("task", "first", "second", "both", "only first", "only second", "neither", "records", "difference", "p")
    return Table("The same records, two models", heads, rows, note=note)


def story_shares(summaries: Sequence[Summary]) -> Table:
    """The story world's verdicts."""
    told = [summary for summary in summaries if summary.stories]
    labels = dict.fromkeys(name for summary in told for name in summary.stories)
    rows = []
    for name in labels:
        row = [name.replace("_", " ")]
        for summary in told:
            value = summary.stories.get(name)
            row += ["", ""] if value is None else [percent(value), f"{value.count:,}"]
        rows.append(row)
    if any(summary.last_word_ceiling is not None for summary in told):
        row = ["last words, at best"]
        for summary in told:
            row += ["" if summary.last_word_ceiling is None else f"{100 * summary.last_word_ceiling:.2f}", ""]
        rows.append(row)
    note = (
        "Held-out stories continued after their first sentences, and their last words, in percent, with Wilson's 95 % "
        "interval. Sentences of one story are not independent: the interval of legal sentences is somewhat too narrow. "
        "At best: the expected accuracy of always choosing the most probable last word."
    )
    columns = ("", *["share", "cases"] * len(told))
    return Table("Stories", columns, rows, [(summary.name, 2) for summary in told], note)


def samples(summaries: Sequence[Summary]) -> Table:
    """Texts written unprompted."""
    rows = [
        [
            summary.name,
            "held-out texts" if group.temperature is None else f"{group.temperature:g}",
            f"{group.count:,}",
            f"{group.mean_tokens:.1f}",
            "" if group.perplexity is None else f"{group.perplexity:.2f}",
            group.judge,
        ]
        for summary in summaries
        for group in summary.samples
    ]
    note = "Perplexity of the judge's own tokens. It alone says little, for repeating likely words lowers it."
    return Table("Samples", ("model", "temperature", "samples", "mean tokens", "perplexity", "judge"), rows, note=note)


def _by_task(
    title: str, summaries: Sequence[Summary], columns: Sequence[str], cells: Callable[[TaskSummary], list[str]]
) -> Table:
    """A row for each task that any model has answered: its name, chance, and `columns` for each model."""
    rows = []
    for task in TASKS:
        parts = [summary.find(task) for summary in summaries]
        if any(parts):
            row = [task.title, f"{100 * task.chance:.1f}"]
            for part in parts:
                row += [""] * len(columns) if part is None else cells(part)
            rows.append(row)
    groups = [(summary.name, len(columns)) for summary in summaries]
    return Table(title, ("task", "chance", *[*columns] * len(summaries)), rows, groups)


def percent(of_all: Share) -> str:
    """A share in percent, its interval behind it."""
    return f"{100 * of_all.value:.2f} ({100 * of_all.low:.1f} to {100 * of_all.high:.1f})"


def markdown(table: Table) -> str:
    """The table under a heading, its note below; a column in a group has the group's name in front of its own."""
    alone = len(table.columns) - sum(size for _, size in table.groups)
    groups = [""] * alone + [name for name, size in table.groups for _ in range(size)]
    heads = [f"{group}: {column}" if group else column for group, column in zip(groups, table.columns, strict=True)]
    sides = ["---" if i == 0 else "---:" for i in range(len(heads))]
    lines = [[escape_markdown(cell) for cell in row] for row in (heads, *table.rows)]
    body = "\n".join(f"| {' | '.join(line)} |" for line in (lines[0], sides, *lines[1:]))
    return f"## {escape_markdown(table.title)}\n\n{body}\n\n{table.note}\n"


def escape_markdown(text: str) -> str:
    """A text that stays what it is in a cell of a Markdown table, on one line."""
    return re.sub(r"([\\`*_~\[\]|#])", r"\\\1", escape(" ".join(text.split()), quote=False))


def html(table: Table) -> str:
    """The table as an element, its note below."""
    heads = "".join(f"<th>{escape(column)}</th>" for column in table.columns)
    above = ""
    if table.groups:
        alone = len(table.columns) - sum(size for _, size in table.groups)
        spans = "".join(f'<th colspan="{size}">{escape(name)}</th>' for name, size in table.groups)
        above = f'<tr class="groups"><th colspan="{alone}"></th>{spans}</tr>'
    rows = "".join(
        f"<tr><th>{escape(row[0])}</th>{''.join(f'<td>{escape(cell)}</td>' for cell in row[1:])}</tr>"
        for row in table.rows
    )
    body = f"<table><thead>{above}<tr>{heads}</tr></thead><tbody>{rows}</tbody></table>"
    return f"{scroll(body)}<p>{escape(table.note)}</p>"
