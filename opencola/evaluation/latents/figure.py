"""The drawing of `opencola latents`: accuracy against noise time, rate of each channel, spectrum."""

from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from opencola.evaluation.figures import COLOURS, INK, STYLE, as_svg
from opencola.evaluation.statistics import Entry

CURVES = {"accuracy_path": "$z_t$", "accuracy_rescaled": "$z_t$ / (1 - t)"}


def overview(entries: Sequence[Entry]) -> str:
    """Three panels, as an `<svg>` element."""
    with mpl.rc_context({**STYLE, "svg.hashsalt": "latents"}):
        figure = Figure(figsize=(9, 2.8), layout="constrained")
        noise, rates, spectrum = figure.subplots(1, 3, width_ratios=(1.4, 1, 1))
        _accuracies(noise, entries)
        _bars(rates, entries, "channel_rate", "rate of each channel", "channel", "nats per latent")
        _bars(spectrum, entries, "eigenvalue", "spectrum of the means", "axis", "variance")
        return as_svg(figure, "Accuracy of decoded tokens against noise time; rate of each latent channel; spectrum")


def _accuracies(axes: Axes, entries: Sequence[Entry]) -> None:
    for (name, label), colour in zip(CURVES.items(), COLOURS, strict=False):
        times, values, low, high = _columns(entries, name)
        axes.plot(times, values, "o-", color=colour, markersize=3, linewidth=1.4, label=label)
        axes.fill_between(times, low, high, color=colour, alpha=0.2, linewidth=0)
    floor = _columns(entries, "most_frequent_token")[1].item()
    axes.axhline(floor, color=INK, linewidth=0.8, linestyle=":", label="most frequent token")
    axes.set_title("tokens right after noise")
    axes.set_xlabel("noise time t")
    axes.set_ylim(0, 1.02)
    axes.grid(axis="y", linewidth=0.4, alpha=0.25, color=INK)
    axes.legend()


def _bars(axes: Axes, entries: Sequence[Entry], name: str, title: str, x: str, y: str) -> None:
    places, values, _, _ = _columns(entries, name)
    axes.bar(places, values, color=COLOURS[0])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title(title)
    axes.set_xlabel(x)
    axes.set_ylabel(y)


def _columns(entries: Sequence[Entry], name: str) -> np.ndarray:
    """Places, values, lower and upper ends of the figures of a name: (4, their number); NaN where there is none."""
    rows = [(entry.at, entry.value, entry.low, entry.high) for entry in entries if entry.name == name]
    return np.array(rows, dtype=float).T
