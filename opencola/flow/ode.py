"""Solvers and guidance: pure functions of a velocity(z, t), from noise at t = 1 to data at t = 0 (model.md §5)."""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor

from opencola.errors import NotFiniteError

Velocity = Callable[[Tensor, float], Tensor]
Solver = Literal["euler", "heun", "midpoint", "adaptive", "stochastic"]


def time_grid(num_steps: int, shift: float = 1.0) -> list[float]:
    """num_steps + 1 times from 1 down to 0: uniform ones t, moved to shift t / (1 + (shift - 1) t)."""
    uniform = (1 - step / num_steps for step in range(num_steps + 1))
    return [shift * t / (1 + (shift - 1) * t or shift) for t in uniform]  # at t = 1 a tiny shift is rounded away


def evaluation_times(grid: Sequence[float], solver: Solver) -> list[float]:
    """The times at which `solve` will ask for the velocity; none for `adaptive`, which finds its own."""
    if solver == "adaptive":
        return []
    steps = itertools.pairwise(grid)
    return [t + 0.5 * (t_next - t) for t, t_next in steps] + list(grid) if solver == "midpoint" else list(grid[:-1])


def guide(conditional: Tensor, unconditional: Tensor, scale: float | Tensor) -> Tensor:
    """Classifier-free guidance: v_uncond + scale (v_cond - v_uncond)."""
    return unconditional + scale * (conditional - unconditional)


def solve(
    velocity: Velocity,
    z: Tensor,
    grid: Sequence[float],
    solver: Solver = "euler",
    *,
    project: Callable[[Tensor, float], Tensor] = lambda z, t: z,
    noise: Callable[[int], Tensor] | None = None,
    eta: float = 1.0,
    tolerance: float = 1e-4,
) -> Iterator[Tensor]:
    """Yield z at every later time of the grid; the last one is the sample.

    z: state at grid[0], any shape with the batch first; project: applied after every step to (z, time), to pin known
    rows; noise: step -> fresh standard normal like z and eta in [0, 1] its share, for `stochastic` (eta 0 is Euler);
    tolerance: relative and absolute, for `adaptive` (dopri5, with common steps for all samples).
    """
    for step, (t, t_next) in enumerate(itertools.pairwise(grid)):
        dt = t_next - t
        if solver == "adaptive":
            z = _adaptive(lambda z, t: velocity(project(z, t), t), z, t, t_next, tolerance)
        elif solver == "midpoint":
            middle = project(z + 0.5 * dt * velocity(z, t), t + 0.5 * dt)
            z = z + dt * velocity(middle, t + 0.5 * dt)
        else:
            v = velocity(z, t)
            if solver == "heun" and t_next > 0:
                v = 0.5 * (v + velocity(project(z + dt * v, t_next), t_next))
            if solver == "stochastic" and noise is not None:
                z_0, z_1 = z - t * v, z + (1 - t) * v
                z_1 = (1 - eta**2) ** 0.5 * z_1 + eta * noise(step)
                z = (1 - t_next) * z_0 + t_next * z_1
            else:
                z = z + dt * v
        z = project(z, t_next)
        yield z


def repaint(
    velocity: Velocity,
    z: Tensor,
    grid: Sequence[float],
    solver: Solver,
    *,
    known: Tensor,
    mask: Tensor,
    repeats: int,
    fraction: float,
    noise: Callable[..., Tensor],
    eta: float,
    tolerance: float,
) -> Iterator[Tensor]:
    """Like `solve`, with the rows of `mask` re-noised to the current time instead of pinned (model.md §5, item 4).

    During the first `fraction` of the steps the known rows are put at (1 - t) known + t noise, and each step is done
    `repeats` times, going back from t' to t by fresh noise in between. noise(step, repeat, use, ...): standard normal.
    """
    num_known = round(fraction * (len(grid) - 1))
    for step, (t, t_next) in enumerate(itertools.pairwise(grid)):
        for repeat in range(repeats if step < num_known else 1):
            if repeat:
                shrink = (1 - t) / (1 - t_next)
                z = shrink * z + max(0.0, t**2 - (shrink * t_next) ** 2) ** 0.5 * noise(step, repeat, 1)
            if step < num_known:
                z = torch.where(mask, (1 - t) * known + t * noise(step, repeat, 0), z)
            fresh = functools.partial(noise, step, repeat, 2)  # the solver adds its own step, 0, to the key
            states = solve(velocity, z, (t, t_next), solver, noise=fresh, eta=eta, tolerance=tolerance)
            z = next(states)
        yield z


@contextmanager
def finding_steps(tolerance: float) -> Iterator[None]:
    """Raise NotFiniteError where dopri5, inside, finds no step: torchdiffeq only asserts that there is one."""
    try:
        yield
    except AssertionError as error:
        if "underflow in dt" not in str(error):
            raise
        raise NotFiniteError(
            f"dopri5 finds no step: the velocity is not finite, or the tolerance {tolerance:g} is too small"
        ) from error


def _adaptive(velocity: Velocity, z: Tensor, t: float, t_next: float, tolerance: float) -> Tensor:
    import torchdiffeq  # brings scipy, a second of start-up that the other solvers need not pay

    times = torch.tensor([t, t_next], dtype=z.dtype, device=z.device)
    with finding_steps(tolerance):
        solved = torchdiffeq.odeint(
            lambda time, state: velocity(state, float(time)),
            z,
            times,
            method="dopri5",
            rtol=tolerance,
            atol=tolerance,
            options={"step_t": times[1:]},  # end there: a longer step would ask for times below 0
        )
    return solved[-1]
