"""Figures as inline SVG: text in the page's own colour, so that they suit a light and a dark page alike."""

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from opencola.evaluation.latents.reconstruction import LatentMap

MetricsRecord = Mapping[str, Any]
"""A record of a run's metrics.jsonl."""

COLOURS = ("#2f7ed8", "#e8710a", "#16a05d", "#b052d1", "#d9415d", "#0e9aa7", "#a08214")
"""Readable on white and on black."""
INK = "#010203"  # stands for the page's colour of text while matplotlib draws
STYLE: Any = {  # matplotlib types the keys, one by one
    "svg.fonttype": "none",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.frameon": False,
    "legend.fontsize": 8,
}


def loss_curves(stages: Mapping[str, Sequence[MetricsRecord]]) -> str:
    """A panel per training stage: the terms of its loss over its steps, from the records of its metrics.jsonl.

    The axis is logarithmic, so terms that are ever zero or negative (an entropy can be) are left out.
    """
    with mpl.rc_context({**STYLE, "svg.hashsalt": "losses"}):
        figure = Figure(figsize=(9, 2.8), layout="constrained")
        panels = figure.subplots(1, max(1, len(stages)), squeeze=False)[0]
        for axes, (name, records) in zip(panels, stages.items(), strict=False):
            _losses(axes, name, records)
        return as_svg(figure, "Loss terms of every training stage over its steps")


def _losses(axes: Axes, name: str, records: Sequence[MetricsRecord]) -> None:
    terms = dict.fromkeys(key for record in records for key in record if key.startswith("loss/"))
    for term, colour in zip(terms, COLOURS, strict=False):
        points = [(record["step"], record[term]) for record in records if record.get(term) is not None]
        if points and all(value > 0 for _, value in points):
            label = term.removeprefix("loss/").replace("_", " ")
            axes.plot(*zip(*points, strict=True), color=colour, linewidth=1.4, label=label)
    axes.set_title(name)
    axes.set_xlabel("step")
    axes.grid(axis="y", linewidth=0.4, alpha=0.25, color=INK)
    if axes.lines:
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        narrow = high < 100 * low  # decades alone would leave a small range without a label
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if narrow else (1.0,)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
        axes.legend()


def latent_maps(maps: Sequence[LatentMap]) -> str:
    """A panel per map: its points, coloured by value, each value's name at the middle of its points, and a legend."""
    with mpl.rc_context({**STYLE, "svg.hashsalt": "latents"}):
        figure = Figure(figsize=(9, 4.6), layout="constrained")
        for axes, latent_map in zip(figure.subplots(1, max(1, len(maps)), squeeze=False)[0], maps, strict=False):
            _points(axes, latent_map)
        return as_svg(figure, "Latents of words on their principal plane, coloured by what the word is")


def _points(axes: Axes, latent_map: LatentMap) -> None:
    kinds = sorted(set(latent_map.values))
    values = np.array(latent_map.values)
    for number, kind in enumerate(kinds):
        points = latent_map.points[values == kind]
        colour = COLOURS[number % len(COLOURS)]
        marker = "os^D"[number // len(COLOURS) % 4]
        # paths, not a collection of markers: many points would make a large file
        axes.plot(*points.T, marker, color=colour, markersize=3.2, alpha=0.6, markeredgewidth=0, label=kind)
        x, y = np.median(points, axis=0)
        axes.annotate(kind, (x, y), (0, 4), textcoords="offset points", ha="center", fontsize=8, weight="bold")
    axes.set_title(f"{latent_map.variable} (the plane keeps {latent_map.explained:.0%} of the variance)")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_xlabel("first principal axis")
    axes.set_ylabel("second principal axis")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.06), ncols=5, handletextpad=0, markerscale=1.8)


def standalone(svg: str) -> str:
    """The text of a file for an `<svg>` element as below: black on white, whatever the page around it."""
    return svg.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" style="background: white" ', 1) + "\n"


def as_svg(figure: Figure, description: str) -> str:
    """The figure as an `<svg>` element that can stand in a page as often as it likes."""
    out = io.StringIO()
    # a date would make the same run give another file
    figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Format": None})
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg).replace("xlink:href", "href").replace(INK, "currentColor")
    # coordinates to a hundredth of a point; only inside tags, for between them are the numbers on the axes
    svg = re.sub(r"<[^>]*>", lambda tag: re.sub(r"(\d\.\d{2})\d+", r"\1", tag[0]), svg)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{description}" ', 1)
