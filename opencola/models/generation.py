"""Block-wise generation with caches and guidance (model.md §5)."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from opencola.flow.dit import BlockCausalDiT, Modulation
from opencola.flow.ode import evaluation_times, guide, repaint, solve, uniform_grid
from opencola.layers import randomness
from opencola.layers.cache import KVCache
from opencola.models.prompts import Prompts, encode_prompts
from opencola.models.sampling import Sampling, choose, penalise
from opencola.models.stopping import OwnStop, ReleaseStop, StopRule, TokenBlock
from opencola.vae.text_vae import TextVAE

if TYPE_CHECKING:
    from opencola.models.cola import Cola

Watch = Callable[[int, float, Tensor], None]


@dataclass(frozen=True)
class Caches:
    """What has been committed, for each of the three transformers (the encoder's only to compare candidates)."""

    dit: KVCache
    decoder: KVCache
    encoder: KVCache | None

    def select(self, rows: Tensor) -> "Caches":
        """The caches of the samples `rows`, copied."""
        encoder = None if self.encoder is None else self.encoder.select(rows)
        return Caches(self.dit.select(rows), self.decoder.select(rows), encoder)


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
        times = dict.fromkeys(evaluation_times(uniform_grid(sampling.steps), sampling.solver))
        self.places = {t: place for place, t in enumerate(times, start=1)}
        self.modulation = self.compute(list(times))

    def compute(self, times: list[float]) -> Modulation:
        """Modulations of time 0, which clean rows have, and then of these."""
        t = torch.tensor([0.0, *times], dtype=torch.float64)
        if self.sampling.bf16_times:
            t = (1000 * t).bfloat16().double() / 1000
        return self.dit.modulation(t.to(self.like))

    def __call__(self, t: float) -> tuple[Modulation, int]:
        """Modulations, among which a place holds those of time t."""
        return (self.modulation, self.places[t]) if t in self.places else (self.compute([t]), 1)


@torch.inference_mode()
def generate(
    model: "Cola",
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    eos_ids: Sequence[int] = (),
    pad_id: int = 0,
    ids: Sequence[int] | None = None,
    stop: StopRule = lambda sample, tokens: None,
    watch: Watch | None = None,
    noise: Callable[[int, int], Tensor] | None = None,
) -> Iterator[list[TokenBlock]]:
    """Yield the new tokens of every unfinished sample, block by block.

    prompts: token ids; eos_ids end a sample and are not given out; ids: the samples' ids, which decide their noise
    (their place in the batch when not given); stop(sample, new tokens) -> how many of these to keep, or None to go on;
    watch(block, time, tokens (B * candidates, S * P)): called with every solver state, decoded; noise(id, block) ->
    (S, d): in place of the seeded noise. Raises ValueError for prompts with ids beyond the vocabulary.
    """
    vae, dit = model.vae, model.dit
    release = sampling.compatibility == "release"
    patch, size = vae.config.patch_size, dit.config.block_size
    if not prompts:
        return
    encoded = encode_prompts(vae, prompts, sampling, size, pad_id)
    ids = list(range(len(prompts))) if ids is None else list(ids)
    caches = prefill(vae, dit, encoded, sampling)
    clock = Clock(dit, sampling, encoded.latents)
    policy: OwnStop | ReleaseStop = OwnStop(encoded, sampling, eos_ids, stop)
    if release:
        policy = ReleaseStop(encoded, sampling, eos_ids, size * patch)
    written: list[list[int]] = [[] for _ in prompts]  # all tokens of the generated blocks
    active = list(range(len(prompts)))
    for number in range(1 << 30):
        rows = torch.tensor(active, device=encoded.tokens.device)
        seen = [written[i] if release else list(prompts[i]) + written[i] for i in active]
        pinned, known = first_block(encoded, rows, size) if number == 0 else no_rows(len(active), size, encoded.latents)
        block = Block(number, [ids[i] for i in active], pinned, known, seen)
        z, tokens, caches = write_block(vae, dit, caches, block, sampling, clock, watch, noise)
        new = tokens.tolist()
        if number == 0 and not release:
            new = [encoded.known[i] + block[len(encoded.known[i]) :] for i, block in zip(active, new, strict=True)]
        for i, tokens_of_block in zip(active, new, strict=True):
            written[i] += tokens_of_block
        blocks = policy.cut(active, new, number)
        yield blocks
        still = [row for row, out in enumerate(blocks) if not out.finished]
        if not still:
            return
        if len(still) < len(active):
            keep = torch.tensor(still, device=rows.device)
            caches, z = caches.select(keep), z[keep]
            active = [active[row] for row in still]
        caches = replace(caches, dit=commit(dit, caches.dit, z, size))


def prefill(vae: TextVAE, dit: BlockCausalDiT, prompts: Prompts, sampling: Sampling) -> Caches:
    """Caches that hold the whole prompt blocks, with room for what will be written."""
    size, patch, batch = dit.config.block_size, vae.config.patch_size, len(prompts.latents)
    longest = int(prompts.history.max())
    room = longest + size * (2 + (sampling.max_new_tokens + size * patch - 1) // (size * patch))
    dit_cache, decoder = dit.empty_cache(batch, room), vae.empty_cache(batch, room, "decoder")
    encoder = vae.empty_cache(batch, room, "encoder") if sampling.candidates > 1 else None
    if longest:
        z = prompts.latents[:, :longest].contiguous()  # a slice takes other kernels than a single sample's does
        dit_cache = commit(dit, dit_cache, z, prompts.history)
        # the release decodes latents as the prior sees them (Q8)
        vae.decode(z if sampling.compatibility == "release" else vae.denormalise(z), decoder)
        decoder = decoder.append(prompts.history)
        if encoder is not None:
            vae.encode(prompts.tokens[:, : longest * patch], cache=encoder)
            encoder = encoder.append(prompts.history)
    return Caches(dit_cache, decoder, encoder)


def commit(dit: BlockCausalDiT, cache: KVCache, z: Tensor, counts: Tensor | int) -> KVCache:
    """The DiT's cache with the first `counts` clean latents of z (B, R, d), seen at t = 0, appended."""
    modulation = dit.modulation(z.new_zeros(1))
    index = torch.zeros(1, 1, dtype=torch.long, device=z.device)
    turn = dit.turns(cache.positions(z.shape[1]))
    dit(z, modulation, index, turn, cache.attend(z.shape[1], dit.config.block_size))
    return cache.append(counts)


def first_block(prompts: Prompts, rows: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Which latents of the first generated block the prompt fixes, and their values."""
    offset = torch.arange(size, device=rows.device)
    pinned = offset < prompts.pinned[rows, None]
    place = (prompts.history[rows, None] + offset).clamp(max=prompts.latents.shape[1] - 1)
    return pinned, prompts.latents[rows[:, None], place] * pinned[..., None]


def no_rows(batch: int, size: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Nothing pinned."""
    pinned = torch.zeros(batch, size, dtype=torch.bool, device=like.device)
    return pinned, like.new_zeros(batch, size, like.shape[-1])


def write_block(
    vae: TextVAE,
    dit: BlockCausalDiT,
    caches: Caches,
    block: Block,
    sampling: Sampling,
    clock: "Clock",
    watch: Watch | None,
    noise: Callable[[int, int], Tensor] | None,
) -> tuple[Tensor, Tensor, Caches]:
    """Latents (B, S, d) and tokens (B, S * P) of the next block, and caches with the decoder's side committed."""
    size, count, batch = dit.config.block_size, sampling.candidates, len(block.ids)
    release = sampling.compatibility == "release"
    if count > 1:
        rows = torch.arange(batch, device=block.known.device).repeat_interleave(count)
        caches = caches.select(rows)
        block = block.select(rows)
    copy = [row % count for row in range(len(block.ids))]
    keys = list(zip(block.ids, copy, strict=True))

    def draw(purpose: str, *step: int) -> Tensor:
        shape, seed = (size, dit.config.latent_dim), sampling.seed
        generators = [randomness.generator(seed, purpose, i, block.number, c, *step) for i, c in keys]
        return torch.stack([torch.randn(shape, generator=g) for g in generators]).to(block.known)

    if noise is not None:
        z = torch.stack([noise(i, block.number) for i in block.ids]).to(block.known)
    elif release:
        seeds = [sampling.seed + 1000 * i + 10_000_000 * block.number for i in block.ids]
        draws = [torch.randn(size, dit.config.latent_dim, generator=torch.Generator().manual_seed(s)) for s in seeds]
        z = torch.stack(draws).to(block.known)
    else:
        z = draw("noise")

    def decode(latents: Tensor) -> Tensor:
        return vae.decode(latents if release else vae.denormalise(latents), caches.decoder)

    for t, z in denoise(dit, caches.dit, z, block, sampling, clock, draw):  # noqa: B020 the last state is the block
        if watch is not None:
            watch(block.number, t, decode(z).argmax(-1))
    logits = decode(z)
    if not (release and block.number == 0):
        logits = penalise(logits, block.seen, sampling.repetition_penalty)
    generators = [randomness.generator(sampling.seed, "token", i, block.number, c) for i, c in keys]
    tokens = choose(logits, sampling, generators)
    caches = replace(caches, decoder=caches.decoder.append(size))
    if caches.encoder is not None:
        mean = vae.normalise(vae.encode(tokens, cache=caches.encoder).mean)
        error = (z - mean).square().sum((1, 2)).view(batch, count)
        best = error.argmin(-1) + torch.arange(batch, device=z.device) * count
        caches = replace(caches, encoder=caches.encoder.append(size)).select(best)
        z, tokens = z[best], tokens[best]
    return z, tokens, caches


def denoise(
    dit: BlockCausalDiT,
    cache: KVCache,
    z: Tensor,
    block: Block,
    sampling: Sampling,
    clock: "Clock",
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
    branches = 2 if guided else 1
    unguided = scale == 1 if guided and bool((scale == 1).any()) else None
    turn = dit.turns(cache.positions(size)).repeat(branches, 1, 1, 1)
    attend = cache.attend(size, size, alone=len(z) if guided else 0)
    # one element where all rows have the same time: its modulation is then broadcast, not gathered
    moving = (~pinned).long().repeat(branches, 1) if bool(pinned.any()) else torch.ones_like(pinned[:1, :1]).long()

    def velocity(state: Tensor, t: float) -> Tensor:
        modulation, place = clock(t)
        v = dit(state.repeat(branches, 1, 1), modulation, place * moving, turn, attend)
        if not guided:
            return v
        conditional, unconditional = v.chunk(2)
        v = guide(conditional, unconditional, scale)
        return v if unguided is None else torch.where(unguided, conditional, v)

    def project(state: Tensor, t: float) -> Tensor:
        return torch.where(pinned[..., None], block.known, state)

    grid = uniform_grid(sampling.steps)
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
