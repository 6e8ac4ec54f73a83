"""One block: noise transported to latents by the guided velocity (model.md §5)."""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from opencola.flow.dit import BlockCausalDiT, Modulation
from opencola.flow.ode import Velocity, evaluation_times, guide, repaint, solve, time_grid
from opencola.layers.attention import Attend
from opencola.layers.cache import KVCache
from opencola.models.cola.sampling import ColaSampling
from opencola.models.stopping import State


@dataclass(frozen=True)
class Block:
    """The block that every text writes next."""

    pinned: Tensor  # (B, S) bool: rows whose latents are known
    known: Tensor  # (B, S, d) their values, 0 elsewhere
    first: bool = False  # of all texts
    given: Sequence[int] = ()  # number of tokens with which each text's begins, as its prompt ends with them

    def select(self, rows: Tensor) -> "Block":
        """The block of the samples `rows`."""
        return Block(self.pinned[rows], self.known[rows], self.first, [self.given[row] for row in rows.tolist()])


def looked(
    path: Sequence[tuple[float, Tensor]], decode: Callable[[Tensor], Tensor], watched: Sequence[bool]
) -> list[list[State]]:
    """Of every text the states of a path from noise to latents (B, S, d), as they decode to logits (B, S * P, V); none
    of those that are not watched."""
    states: list[list[State]] = [[] for _ in watched]
    for t, z in path if any(watched) else ():
        best = decode(z).float().softmax(-1).topk(2, dim=-1)
        margins = best.values[..., 0] - best.values[..., 1]
        for row in (row for row, wanted in enumerate(watched) if wanted):
            tokens: list[int] = best.indices[row, :, 0].tolist()
            states[row].append(State(t, tokens, margins[row].tolist(), z[row]))
    return states


def seen_times(times: Sequence[float], sampling: ColaSampling) -> Tensor:
    """Times (T,), float64, as the DiT is given them: with `bf16_times` rounded as the release does (official-format
    §8)."""
    t = torch.tensor(times, dtype=torch.float64)
    return (1000 * t).bfloat16().double() / 1000 if sampling.bf16_times else t


class Clock:
    """The DiT's modulations at all times that a solver will ask for, computed once for all blocks."""

    def __init__(self, dit: BlockCausalDiT, sampling: ColaSampling, like: Tensor) -> None:
        self.dit, self.sampling, self.like = dit, sampling, like
        times = dict.fromkeys([0.0, *evaluation_times(time_grid(sampling.steps, sampling.shift), sampling.solver)])
        self.modulations = dict(zip(times, self.compute(list(times)), strict=True))

    def compute(self, times: list[float]) -> list[Modulation]:
        """For each time the modulations of time 0, which clean rows have, and of that time: two rows."""
        t = seen_times([0.0, *times], self.sampling)
        layers = self.dit.modulation(t.to(self.like))
        return [[torch.stack((rows[0], rows[place])) for rows in layers] for place in range(1, len(t))]

    def __call__(self, t: float, moving: int | None = None) -> Modulation:
        """Modulations of time 0 and of time t, or only those of one of them."""
        both = self.modulations[t] if t in self.modulations else self.compute([t])[0]
        return both if moving is None else [rows[moving : moving + 1] for rows in both]


def guided(
    conditional: Velocity,
    both: Callable[[Tensor, float], tuple[Tensor, Tensor]],
    sampling: ColaSampling,
    history: Tensor,
) -> Velocity:
    """The velocity of one solve, by the rule of classifier-free guidance (model.md §5, item 3).

    conditional(z, t): the velocity given the history; both(z, t): that and the unconditional one; history: bool that
    broadcasts to z, whether a row has any. It counts evaluations for `guidance_every`: every solve needs its own.
    """
    # without a history both velocities coincide, and guidance would only multiply rounding
    scale = torch.where(history, sampling.guidance, 1.0)
    alone = scale == 1
    if bool(alone.all()):
        return conditional
    mixed = bool(alone.any())
    evaluations, difference = 0, torch.zeros(())

    def velocity(z: Tensor, t: float) -> Tensor:
        nonlocal evaluations, difference
        if not sampling.guidance_until <= t <= sampling.guidance_from:
            return conditional(z, t)
        if evaluations % sampling.guidance_every:
            v = conditional(z, t)
            free = v - difference
        else:
            v, free = both(z, t)
            difference = v - free
        evaluations += 1
        moved = guide(v, free, scale.to(z))
        return torch.where(alone, v, moved) if mixed else moved

    return velocity


def denoise(
    dit: BlockCausalDiT,
    cache: KVCache,
    z: Tensor,
    block: Block,
    sampling: ColaSampling,
    clock: Clock,
    draw: Callable[..., Tensor],
    context: Tensor | None = None,
) -> Iterator[tuple[float, Tensor]]:
    """Transport noise z (B, S, d) to latents with the guided velocity; yields every state with its time.

    context (B, D): with a trunk, its features of the last latents in the cache, 0 where there are none.
    """
    if sampling.solver == "adaptive" and len(z) > 1:  # every sample takes its own steps
        samples = torch.arange(len(z), device=z.device).split(1)
        singles = [
            denoise(
                dit,
                cache.select(i),
                z[i],
                block.select(i),
                sampling,
                clock,
                lambda *step, i=i: draw(*step)[i],
                None if context is None else context[i],
            )
            for i in samples
        ]
        for step in zip(*singles, strict=True):
            yield step[0][0], torch.cat([state for _, state in step])
        return
    size = dit.config.block_size
    partial = sampling.first_block == "partial" and block.first
    pinned = torch.zeros_like(block.pinned) if partial else block.pinned
    alike = not bool(pinned.any())  # all rows have the same time: its modulation is then broadcast, not gathered
    moving = (~pinned).long()
    turn = dit.turns(cache.positions(size))
    contexts: tuple[Tensor, ...] = ()
    if context is not None:
        told = dit.context(context[:, None].expand(-1, size, -1))  # as many rows as the block: a sum's order is theirs
        contexts = told, torch.zeros_like(told)

    @functools.cache
    def pattern(number: int) -> tuple[Tensor, Tensor, Attend]:
        alone = len(z) if number == 2 else 0
        return moving.repeat(number, 1), turn.repeat(number, 1, 1, 1), cache.attend(size, None, alone=alone)

    def branches(state: Tensor, t: float, number: int) -> Tensor:
        told = torch.cat(contexts[:number]) if contexts else None
        return dit(state.repeat(number, 1, 1), clock(t, 1 if alike else None), *pattern(number), context=told)

    def both(state: Tensor, t: float) -> tuple[Tensor, Tensor]:
        conditional, unconditional = branches(state, t, 2).chunk(2)
        return conditional, unconditional

    history = (cache.lengths > 0)[:, None, None]
    velocity = guided(lambda state, t: branches(state, t, 1), both, sampling, history)

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
