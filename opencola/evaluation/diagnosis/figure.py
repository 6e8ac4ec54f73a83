"""The drawing of `opencola diagnose`: what every link costs."""

from collections.abc import Mapping, Sequence

import matplotlib as mpl
from matplotlib.figure import Figure

from opencola.evaluation.diagnosis.verdicts import ALLOWED, LINKS, Loss
from opencola.evaluation.figures import COLOURS, INK, STYLE, as_svg


def draw(panels: Mapping[str, Sequence[Loss]]) -> str:
    """A panel for each task, by name: the links' losses with their intervals, those at fault in another colour."""
    with mpl.rc_context({**STYLE, "svg.hashsalt": "diagnose"}):
        figure = Figure(figsize=(9, 2.8), layout="constrained")
        rows = {link.name: -number for number, link in enumerate(LINKS)}
        all_axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axes, (name, losses) in zip(all_axes, panels.items(), strict=True):
            for loss in losses:
                row, colour = rows[loss.link.name], COLOURS[1] if loss.at_fault else COLOURS[0]
                axes.barh(row, loss.value, color=colour, height=0.6)
                axes.plot([loss.low, loss.high], [row, row], color=INK, linewidth=1)
            axes.axvline(0, color=INK, linewidth=0.6)
            axes.axvline(ALLOWED, color=INK, linewidth=0.6, linestyle=":")
            axes.set_title(name)
            axes.set_xlabel("failures per token that the link adds")
            axes.set_yticks([*rows.values()], [link.label for link in LINKS])
        return as_svg(figure, "What every link of the model costs, in failures per token, by task")
