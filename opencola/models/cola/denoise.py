"""One block: noise transported to latents by the guided velocity (model.md §5)."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from opencola.flow.dit import BlockCausalDiT, Modulation
from opencola.flow.ode import evaluation_times, guide, repaint, solve, time_grid
from opencola.layers.attention import Attend
from opencola.layers.cache import KVCache
from opencola.models.sampling import Sampling


@dataclass(frozen=True)
class Block:
    """The block that every active sample writes next."""

    number: int  # blocks written before
    ids: list[int]
    pinned: Tensor  # (B, S) bool: rows whose latents are known
    known: Tensor  # (B, S, d) their values, 0 elsewhere
    seen: list[list[int]]  # tokens that the repetition penalty counts

    def select(self, rows: Tensor) -> "Block":
        """The block of the samples `rows`."""
        order = rows.tolist()
        ids, seen = [self.ids[r] for r in order], [self.seen[r] for r in order]
        return Block(self.number, ids, self.pinned[rows], self.known[rows], seen)


class Clock:
    """The DiT's modulations at all times that a solver will ask for, computed once for all blocks."""

    def __init__(self, dit: BlockCausalDiT, sampling: Sampling, like: Tensor) -> None:
        self.dit, self.sampling, self.like = dit, sampling, like
        times = dict.fromkeys([0.0, *evaluation_times(time_grid(sampling.steps, sampling.shift), sampling.solver)])
        self.modulations = dict(zip(times, self.compute(list(times)), strict=True))

    def compute(self, times: list[float]) -> list[Modulation]:
        """For each time the modulations of time 0, which clean rows have, and of that time: two rows."""
        t = torch.tensor([0.0, *times], dtype=torch.float64)
        if self.sampling.bf16_times:
            t = (1000 * t).bfloat16().double() / 1000
        layers = self.dit.modulation(t.to(self.like))
        return [[torch.stack((rows[0], rows[place])) for rows in layers] for place in range(1, len(t))]

    def __call__(self, t: float, moving: int | None = None) -> Modulation:
        """Modulations of time 0 and of time t, or only those of one of them."""
        both = self.modulations[t] if t in self.modulations else self.compute([t])[0]
        return both if moving is None else [rows[moving : moving + 1] for rows in both]


def denoise(
    dit: BlockCausalDiT,
    cache: KVCache,
    z: Tensor,
    block: Block,
    sampling: Sampling,
    clock: Clock,
    draw: Callable[..., Tensor],
) -> Iterator[tuple[float, Tensor]]:
    """Transport noise z (B, S, d) to latents with the guided velocity; yields every state with its time."""
    if sampling.solver == "adaptive" and len(z) > 1:  # every sample takes its own steps
        samples = torch.arange(len(z), device=z.device).split(1)
        singles = [
            denoise(dit, cache.select(i), z[i], block.select(i), sampling, clock, lambda *step, i=i: draw(*step)[i])
            for i in samples
        ]
        for step in zip(*singles, strict=True):
            yield step[0][0], torch.cat([state for _, state in step])
        return
    size = dit.config.block_size
    partial = sampling.first_block == "partial" and block.number == 0
    pinned = torch.zeros_like(block.pinned) if partial else block.pinned
    # without a history both branches coincide, and guidance would only multiply rounding
    scale = torch.where(cache.lengths > 0, sampling.guidance, 1.0).to(z)[:, None, None]
    guided = bool((scale != 1).any())
    unguided = scale == 1 if guided and bool((scale == 1).any()) else None
    alike = not bool(pinned.any())  # all rows have the same time: its modulation is then broadcast, not gathered
    moving = (~pinned).long()
    turn = dit.turns(cache.positions(size))
    evaluations, difference = 0, torch.zeros_like(z)

    @functools.cache
    def pattern(number: int) -> tuple[Tensor, Tensor, Attend]:
        alone = len(z) if number == 2 else 0
        return moving.repeat(number, 1), turn.repeat(number, 1, 1, 1), cache.attend(size, size, alone=alone)

    def branches(state: Tensor, t: float, number: int) -> Tensor:
        return dit(state.repeat(number, 1, 1), clock(t, 1 if alike else None), *pattern(number))

    def velocity(state: Tensor, t: float) -> Tensor:
        nonlocal evaluations, difference
        if not guided or not sampling.guidance_until <= t <= sampling.guidance_from:
            return branches(state, t, 1)
        if evaluations % sampling.guidance_every:
            conditional = branches(state, t, 1)
            unconditional = conditional - difference
        else:
            conditional, unconditional = branches(state, t, 2).chunk(2)
            difference = conditional - unconditional
        evaluations += 1
        v = guide(conditional, unconditional, scale)
        return v if unguided is None else torch.where(unguided, conditional, v)

    def project(state: Tensor, t: float) -> Tensor:
        return torch.where(pinned[..., None], block.known, state)

    grid = time_grid(sampling.steps, sampling.shift)
    z = project(z, 1.0)
    if partial:
        states = repaint(
            velocity,
            z,
            grid,
            sampling.solver,
            known=block.known,
            mask=block.pinned[..., None],
            repeats=sampling.repaint_repeats,
            fraction=sampling.repaint_fraction,
            noise=lambda *step: draw("repaint", *step),
            eta=sampling.eta,
            tolerance=sampling.tolerance,
        )
    else:
        states = solve(
            velocity,
            z,
            grid,
            sampling.solver,
            project=project,
            noise=lambda step: draw("step", step),
            eta=sampling.eta,
            tolerance=sampling.tolerance,
        )
    yield from zip(grid[1:], states, strict=True)
