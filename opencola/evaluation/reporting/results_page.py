"""The pages of `opencola report`, on evaluations (the demo's page is in `demo_page`)."""

from collections.abc import Sequence
from html import escape

from opencola.evaluation.benchmarks.grading import truncate
from opencola.evaluation.benchmarks.tasks import TASKS, Task
from opencola.evaluation.reporting.accuracy_figure import accuracies
from opencola.evaluation.reporting.page import details, page
from opencola.evaluation.reporting.results import Answer
from opencola.evaluation.reporting.summary import Summary, warnings
from opencola.evaluation.reporting.tables import escape_markdown, html, markdown, tables

TITLE = "Evaluation"
PROMPT_END = 700
"""Characters of an example's prompt that are shown: few-shot prompts are long, and their ends ask the question."""


def render_markdown(summaries: Sequence[Summary], drawing: str) -> str:
    """All tables, and the file name of the drawing."""
    parts = [f"# {TITLE}\n", "".join(f"- {escape_markdown(_head(summary))}\n" for summary in summaries)]
    parts += [f"**{escape_markdown(warning)}**\n" for warning in warnings(summaries)]
    parts += [markdown(table) for table in tables(summaries)]
    if any(summary.tasks for summary in summaries):
        parts.append(f"![Accuracies with intervals, against chance]({drawing})\n")
    return "\n".join(parts)


def render_html(summaries: Sequence[Summary]) -> str:
    """One page: what is not finished, tables, drawing, settings, example records."""
    said = "".join(f'<p class="warning"><b>{escape(warning)}</b></p>' for warning in warnings(summaries))
    sections = [("models", "Models", said + _models(summaries))]
    if any(summary.tasks for summary in summaries):
        sections.append(("accuracies", "Accuracies", f"<figure>{accuracies(summaries)}</figure>"))
    sections += [
        (f"table-{number}", escape(table.title), html(table)) for number, table in enumerate(tables(summaries), 1)
    ]
    sections.append(("examples", "Examples", _examples(summaries)))
    return page(TITLE, ", ".join(summary.name for summary in summaries), sections)


def _head(summary: Summary) -> str:
    run, file = summary.results.run, summary.results.file
    return f"{summary.name}: family {run['family']}, weights {run['model_hash']}, seed {run['seed']}, {file}"


def _models(summaries: Sequence[Summary]) -> str:
    return "".join(
        f"<p>{escape(_head(summary))}</p>{details('settings', summary.results.run)}" for summary in summaries
    )


def _examples(summaries: Sequence[Summary]) -> str:
    """Of each task the first record that the first model which has it got right, and the first that it got wrong."""
    parts = []
    for task in TASKS:
        having = [summary for summary in summaries if summary.find(task)]
        if not having:
            continue
        answers = having[0].results.answers[task.name]
        for correct in (True, False):
            chosen = next((answer for answer in answers if answer.correct is correct), None)
            if chosen is not None:
                parts.append(_example(task, chosen, having))
    note = "<p>Of each task the first record that the first model got right, and the first that it got wrong.</p>"
    return note + "".join(parts) if parts else "<p>There are no answers.</p>"


def _example(task: Task, chosen: Answer, having: Sequence[Summary]) -> str:
    start = "… " * (len(chosen.prompt) > PROMPT_END)
    items = ""
    for summary in having:
        for answer in summary.results.answers[task.name]:
            if (answer.id, answer.options) == (chosen.id, chosen.options):
                items += f"<li>{escape(summary.name)}: “{escape(truncate(answer.generation))}” {_mark(answer)}</li>"
    return (
        f"<h3>{escape(task.title)}, record {escape(str(chosen.id))}</h3>"
        f'<pre class="text">{start}{escape(chosen.prompt[-PROMPT_END:])}</pre>'
        f"<p>Right answer: {escape(chosen.answer)}</p><ul>{items}</ul>"
    )


def _mark(answer: Answer) -> str:
    if answer.correct:
        return '<em class="good">✓ right</em>'
    return f'<em class="bad">✗ {"right option, other form" if answer.agrees else "wrong"}</em>'
