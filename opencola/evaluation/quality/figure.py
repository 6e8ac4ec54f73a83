"""The drawing of `opencola quality`: perplexity under a judge against entropy, a line for each model."""

from collections.abc import Mapping, Sequence

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from opencola.evaluation.figures import COLOURS, INK, STYLE, as_svg
from opencola.evaluation.statistics import Entry

Frontier = Mapping[float | None, Sequence[Entry]]
"""A model's figures at each temperature, and those of held-out texts (None)."""
X, Y = "token_entropy", "judge_perplexity"


def frontier(models: Mapping[str, Frontier]) -> str:
    """A line through each model's temperatures, which stand beside its points, and stars for held-out texts.

    As an `<svg>` element. Where there are no tokens, or no judge, there is no point. Bars are 95 % intervals.
    """
    with mpl.rc_context({**STYLE, "svg.hashsalt": "quality"}):
        figure = Figure(figsize=(5.4, 3.8), layout="constrained")
        axes = figure.subplots()
        held_out = set()
        for number, (name, entries) in enumerate(models.items()):
            points = {t: point for t, own in entries.items() if (point := _point(own)) is not None}
            held_out |= {(x.value, y.value) for t, (x, y) in points.items() if t is None}
            line = sorted((t, point) for t, point in points.items() if t is not None)
            if line:
                xs, ys = ([point[side] for _, point in line] for side in (0, 1))
                axes.errorbar(
                    [x.value for x in xs], [y.value for y in ys], _bars(ys), _bars(xs), "o-",
                    color=COLOURS[number % len(COLOURS)], markersize=4, linewidth=1.4, elinewidth=0.8, label=name,
                )  # fmt: skip
            for t, (x, y) in line:
                axes.annotate(f"{t:g}", (x.value, y.value), (5, 4), textcoords="offset points", fontsize=8)
        for star in sorted(held_out):
            axes.plot(*star, "*", color=INK, markersize=10)
        if held_out:
            axes.plot([], [], "*", color=INK, markersize=10, label="held-out texts")
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 5.0, 7.0)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
        axes.set_title("perplexity and entropy by temperature")
        axes.set_xlabel("token entropy of a sample (nats)")
        axes.set_ylabel("perplexity under the judge")
        axes.grid(linewidth=0.4, alpha=0.25, color=INK)
        if axes.get_legend_handles_labels()[1]:
            axes.legend()
        return as_svg(figure, "Perplexity under the judge against token entropy, by temperature")


def _point(entries: Sequence[Entry]) -> tuple[Entry, Entry] | None:
    named = {entry.name: entry for entry in entries}
    return (named[X], named[Y]) if {X, Y} <= named.keys() else None


def _bars(entries: Sequence[Entry]) -> list[list[float]]:
    """Lengths of the error bars, below and above: nothing where there is no interval."""
    below = [0.0 if entry.low is None else entry.value - entry.low for entry in entries]
    above = [0.0 if entry.high is None else entry.high - entry.value for entry in entries]
    return [below, above]
