"""log p(z_0) under a flow: the instantaneous change of variables (model.md §6).

d[z, l]/dt = [v, div v] from data (t = 0, l = 0) to noise (t = 1); log p(z_0) = log N(z_1; 0, I) + l(1). B samples;
G groups of numbers that move together (blocks). The velocity of a group does not depend on others: the Jacobian is
block diagonal, so that one vector-Jacobian product serves all groups at once.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from opencola.flow.ode import finding_steps, time_grid
from opencola.layers import randomness
from opencola.ranges import Count, Positive, Seed, check

Velocity = Callable[[Tensor, float], Tensor]
"""z (B, G, ...), t -> dz/dt, like z; differentiable in z."""

METHODS = {"euler": "euler", "midpoint": "midpoint", "heun": "heun2", "rk4": "rk4", "dopri5": "dopri5"}


@dataclass(frozen=True)
class Likelihood:
    """How log-densities of the flow are computed."""

    solver: Literal["euler", "midpoint", "heun", "rk4", "dopri5"] = "rk4"
    """Solver from data to noise: with a fixed number of steps (rk4 is the 3/8 rule), or adaptive (dopri5)."""
    steps: Count = 16
    """Number of steps of solvers with a fixed number; dopri5 has no use for it."""
    shift: Positive = 0.2
    """Time grid: t becomes shift t / (1 + (shift - 1) t), so that below 1 more steps are near the data, where a sharp
    density needs them."""
    tolerance: Positive = 1e-4
    """Relative and absolute tolerance of dopri5, in every block of every sample; its steps are common to all."""
    divergence: Literal["exact", "hutchinson"] = "hutchinson"
    """Exact: a backward pass for each number of a block. Hutchinson: one for each probe, unbiased for log p:
    the ELBO stays a bound on average, the IWAE does not."""
    probes: Count = 1
    """Number of probes of Hutchinson's estimator, fixed during a solve; more make log p less noisy."""
    probe_law: Literal["rademacher", "gaussian"] = "rademacher"
    """Law of the probes; Rademacher's has the smaller variance."""
    seed: Seed = 0
    """Seed of all draws, which depend on it, the text's id, the sample and the block alone."""

    def __post_init__(self) -> None:
        check(self)

    def label(self) -> str:
        """All that the figures depend on, in words."""
        exactness = f"{self.steps} steps" + (f" (shift {self.shift:g})" if self.shift != 1 else "")
        if self.solver == "dopri5":
            exactness = f"tolerance {self.tolerance:g}"
        probes = f"{self.probes} {self.probe_law} probe" + "s" * (self.probes > 1)
        return f"{self.solver}, {exactness}, {'exact divergence' if self.divergence == 'exact' else probes}"


@dataclass(frozen=True)
class Density:
    """Log-densities in nats."""

    log_prob: Tensor  # (B, G)
    by_probe: Tensor  # (M, B, G): what each probe alone gives; one row where the divergence is exact
    z_1: Tensor  # like z_0
    evaluations: int  # of the velocity


def log_density(
    velocity: Velocity, z_0: Tensor, settings: Likelihood, probes: Tensor | None = None, free: Tensor | None = None
) -> Density:
    """Log-density of every group of z_0 (B, G, ...), in its dtype.

    probes (M, B, G, ...): for Hutchinson's estimator; free (B, G, ...) bool, all when not given: the numbers that have
    a density; others stay where they are, and are conditions. Raises UserError for probes that the settings do not
    need, and where needed ones are missing.
    """
    import torchdiffeq  # brings scipy, a second of start-up

    exact = settings.divergence == "exact"
    if (probes is None) != exact:
        raise ValueError("Hutchinson's estimator needs probes" if probes is None else "probes with exact divergence")
    moves = torch.ones_like(z_0) if free is None else free.to(z_0)
    directions: Sequence[Tensor] = list(_unit_directions(z_0) if probes is None else probes)
    evaluations = 0

    def derivative(t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        nonlocal evaluations
        evaluations += 1
        with torch.enable_grad():
            z = state[0].detach().requires_grad_()
            v = velocity(z, float(t)) * moves
        rates = [_curvature(v, z, direction * moves, i + 1 < len(directions)) for i, direction in enumerate(directions)]
        divergences = torch.stack(rates)
        return v.detach(), divergences.sum(0, keepdim=True) if exact else divergences

    start = (z_0, z_0.new_zeros(1 if exact else len(directions), *z_0.shape[:2]))
    times = torch.tensor([0.0, 1.0], dtype=z_0.dtype, device=z_0.device)
    if settings.solver == "dopri5":
        options = {"norm": _largest, "step_t": times[1:]}  # end there: a longer step would ask for times above 1
    else:
        grid = torch.tensor(time_grid(settings.steps, settings.shift)[::-1], dtype=z_0.dtype, device=z_0.device)
        times, options = grid[[0, -1]], {"grid_constructor": lambda f, state, t: grid}
    with torch.no_grad(), finding_steps(settings.tolerance):
        tolerance, method = settings.tolerance, METHODS[settings.solver]
        z, change = torchdiffeq.odeint(
            derivative, start, times, rtol=tolerance, atol=tolerance, method=method, options=options
        )
    z_1, change = z[-1], change[-1]
    base = (-0.5 * (z_1.square() + math.log(2 * math.pi)) * moves).flatten(2).sum(-1)
    return Density(base + change.mean(0), base + change, z_1, evaluations)


def draw_probes(like: Tensor, keys: Sequence[tuple[int, ...]], settings: Likelihood) -> Tensor | None:
    """Probes (M, B, G, ...) for z_0; none for exact divergence. keys: of every sample; a group adds its number."""
    if settings.divergence == "exact":
        return None
    shape = (settings.probes, *like.shape[2:])
    drawn = draw_groups(shape, like.shape[1], settings.seed, "probe", keys).movedim(2, 0).to(like)
    return drawn if settings.probe_law == "gaussian" else torch.where(drawn < 0, -1.0, 1.0).to(like)


def draw_groups(shape: Sequence[int], groups: int, seed: int, purpose: str, keys: Sequence[tuple[int, ...]]) -> Tensor:
    """Standard normal (B, G, *shape) on the CPU, each group from (seed, purpose, key of the sample, group): the same
    whatever else there is, and however many groups follow."""
    generators = [[randomness.generator(seed, purpose, *key, group) for group in range(groups)] for key in keys]
    return torch.stack([torch.stack([torch.randn(tuple(shape), generator=g) for g in row]) for row in generators])


def _curvature(v: Tensor, z: Tensor, direction: Tensor, keep: bool) -> Tensor:
    """direction · (dv/dz) direction of every group: (B, G)."""
    (product,) = torch.autograd.grad(v, z, direction, retain_graph=keep)
    return (product * direction).flatten(2).sum(-1)


def _unit_directions(z: Tensor) -> Tensor:
    """(E, B, G, ...): for each of a group's E numbers, the direction in which it alone grows, in all groups at once."""
    shape = z.shape[2:]
    unit = torch.eye(shape.numel(), dtype=z.dtype, device=z.device)
    return unit.view(-1, 1, 1, *shape).expand(-1, *z.shape)


def _largest(state: tuple[Tensor, Tensor]) -> Tensor:
    """Size of an error: the largest of any sample's group, so that none hides in an average."""
    z, change = state
    return torch.maximum(z.flatten(2).square().mean(-1).sqrt().amax(), change.abs().amax())
