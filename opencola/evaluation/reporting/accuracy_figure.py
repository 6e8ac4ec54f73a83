"""The drawing of `opencola report`: accuracies with their intervals, against chance."""

from collections.abc import Sequence

import matplotlib as mpl
from matplotlib.figure import Figure

from opencola.evaluation.benchmarks.tasks import TASKS
from opencola.evaluation.figures import COLOURS, INK, STYLE, as_svg
from opencola.evaluation.reporting.summary import Summary

SPREAD = 0.6
"""How much of a task's row its models fill."""


def accuracies(summaries: Sequence[Summary]) -> str:
    """A row for each task: every model's accuracy in percent with its 95 % interval, and chance; an `<svg>` element."""
    tasks = [task for task in TASKS if any(summary.find(task) for summary in summaries)]
    with mpl.rc_context({**STYLE, "svg.hashsalt": "accuracies"}):
        figure = Figure(figsize=(7.5, 1.2 + len(tasks) * (0.25 + 0.13 * len(summaries))), layout="constrained")
        axes = figure.subplots()
        for row, task in enumerate(tasks):
            chance = 100 * task.chance
            axes.plot([chance, chance], [row - 0.45, row + 0.45], ":", color=INK, linewidth=1, label="chance")
        for number, summary in enumerate(summaries):
            shares = [(row, part.scores.accuracy) for row, task in enumerate(tasks) if (part := summary.find(task))]
            if not shares:
                continue
            shift = SPREAD * ((number + 0.5) / len(summaries) - 0.5)
            values = [100 * share.value for _, share in shares]
            # rounding may leave the interval of 0 or 1 on the wrong side of it
            ends = [
                [100 * max(0.0, share.value - share.low) for _, share in shares],
                [100 * max(0.0, share.high - share.value) for _, share in shares],
            ]
            axes.errorbar(
                values, [row + shift for row, _ in shares], xerr=ends, fmt="osD^v"[number // len(COLOURS) % 5],
                color=COLOURS[number % len(COLOURS)], markersize=4, elinewidth=1.2, capsize=2,
                label=summary.name.replace("$", r"\$"),
            )  # fmt: skip
        axes.set_yticks(range(len(tasks)), [task.title for task in tasks])
        axes.set_ylim(max(1, len(tasks)) - 0.5, -0.5)
        axes.set_xlim(0, 100)
        axes.set_xlabel("accuracy (%), bars: 95 % intervals")
        axes.grid(axis="x", linewidth=0.4, alpha=0.25, color=INK)
        handles, labels = axes.get_legend_handles_labels()
        named = dict(zip(labels, handles, strict=True))  # chance once
        named = {label: named[label] for label in sorted(named, key=lambda label: label == "chance")}
        if named:
            figure.legend(named.values(), named.keys(), loc="outside upper left", ncols=2)
        return as_svg(figure, "Accuracy of each model on each task with its interval, against chance")
