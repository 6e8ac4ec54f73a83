"""The surroundings of a latent on a plane: where samples of posterior and prior lie, what the decoder reads where."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from opencola.evaluation.figures import COLOURS, INK, STYLE, as_svg
from opencola.evaluation.latents.reconstruction import principal_axes

RESOLUTION = 40
COARSE = 3  # the density, which costs most, is known at every third place
NAMED = 6
"""Regions that get a colour and a name: the largest, and the token's own."""


@dataclass(frozen=True)
class Slice:
    """Through a latent at (0, 0): `x`, `y` (R) the places of a grid; `regions` (R, R), rows along y, what the decoder
    says there; `truth`: the token itself; `posterior`, `prior` (K, 2): samples, projected onto the plane; `density`
    (R / 3, R / 3): log-density of the prior in nats at every third place, where it is known."""

    title: str
    x: np.ndarray
    y: np.ndarray
    regions: np.ndarray
    truth: str
    posterior: np.ndarray
    prior: np.ndarray
    density: np.ndarray | None = None


def cut(
    title: str,
    truth: str,
    centre: np.ndarray,
    posterior: np.ndarray,
    prior: np.ndarray,
    decode: Callable[[np.ndarray], Sequence[str]],
    density: Callable[[np.ndarray], np.ndarray] | None = None,
) -> Slice:
    """The plane through `centre` (d) along which the prior's samples (K, d) spread most.

    decode: points (M, d) -> what each is read as; density: points -> log-densities (M,) of the prior.
    """
    axes, _ = principal_axes(prior - centre)
    if len(axes) < 2:
        raise ValueError("a slice needs at least 2 samples, and latents of at least 2 channels")
    near, far = (posterior - centre) @ axes.T, (prior - centre) @ axes.T
    both = np.concatenate((near, far, np.zeros((1, 2))))
    low, high = both.min(0), both.max(0)
    margin = 0.15 * (high - low).max() + 1e-6
    x, y = (np.linspace(low[i] - margin, high[i] + margin, RESOLUTION) for i in (0, 1))

    def over(function: Callable[[np.ndarray], Any], every: int) -> np.ndarray:
        grid = np.stack(np.meshgrid(x[::every], y[::every]), -1)
        values = function(centre + grid.reshape(-1, 2) @ axes)
        return np.array(values).reshape(grid.shape[:2])

    known = None if density is None else over(density, COARSE)
    return Slice(title, x, y, over(decode, 1), truth, near, far, known)


def slices(planes: Sequence[Slice]) -> str:
    """A panel for each slice, as an `<svg>` element."""
    with mpl.rc_context({**STYLE, "svg.hashsalt": "slices"}):
        figure = Figure(figsize=(1 + 3.6 * len(planes), 4.4), layout="constrained")
        for axes, plane in zip(figure.subplots(1, len(planes), squeeze=False)[0], planes, strict=True):
            _draw(axes, plane)
        return as_svg(figure, "Latents around tokens: samples of posterior and prior, and regions of the decoder")


def _draw(axes: Axes, plane: Slice) -> None:
    names, sizes = np.unique(plane.regions, return_counts=True)
    largest = [str(name) for name in names[np.argsort(-sizes, kind="stable")]]
    shown = [plane.truth, *(name for name in largest if name != plane.truth)][:NAMED]
    number = {name: place for place, name in enumerate(shown)}
    index = np.vectorize(lambda name: number.get(name, NAMED), otypes=[int])(plane.regions)
    colours = ListedColormap([*COLOURS[:NAMED], "#888888"])
    axes.pcolormesh(
        plane.x, plane.y, index, cmap=colours, vmin=0, vmax=NAMED, alpha=0.35, rasterized=True, shading="nearest"
    )
    if plane.density is not None:
        x, y = plane.x[::COARSE], plane.y[::COARSE]
        axes.contour(x, y, plane.density, levels=10, colors=INK, linewidths=0.6, linestyles="solid")
    axes.plot(*plane.posterior.T, ".", color=INK, markersize=3, alpha=0.6, label="posterior samples")
    axes.plot(*plane.prior.T, "x", color=INK, markersize=3.5, label="prior samples")
    for name in shown:
        if name in largest:
            label = f"{name!r}{' (the token)' if name == plane.truth else ''}".replace("$", r"\$")  # no formula
            axes.plot([], [], "s", color=COLOURS[number[name]], alpha=0.6, label=label)
    if len(largest) > len(shown):
        axes.plot([], [], "s", color="#888888", alpha=0.6, label="other tokens")
    axes.set_title(plane.title)
    axes.set_xlabel("first axis of the prior's samples")
    axes.set_ylabel("second axis")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2, handletextpad=0.2)
