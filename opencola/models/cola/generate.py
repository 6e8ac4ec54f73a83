"""Block-wise generation with caches and guidance (model.md §5)."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from opencola.flow.dit import BlockCausalDiT, Modulation
from opencola.kernels.choice import invariant
from opencola.layers import randomness
from opencola.layers.cache import FEW, KVCache
from opencola.layers.few_rows import prepacked
from opencola.models.cola.denoise import Block, Clock, denoise
from opencola.models.cola.parts import ColaParts
from opencola.models.cola.prompts import Prompts, encode_prompts
from opencola.models.cola.release import ReleaseStop
from opencola.models.cola.release import noise as release_noise
from opencola.models.cola.sampling import ColaSampling
from opencola.models.finite import check_logits, check_states
from opencola.models.inputs import sample_ids
from opencola.models.sampling import choose, penalise
from opencola.models.stopping import OwnStop, StopRule, TokenBlock
from opencola.vae.text_vae import TextVAE

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


@invariant
@torch.inference_mode()
def generate(
    model: ColaParts,
    prompts: Sequence[Sequence[int]],
    sampling: ColaSampling,
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
    patch, size = vae.config.patch_size, dit.config.block_size
    if not prompts:
        return
    encoded = encode_prompts(vae, prompts, sampling, size, pad_id)
    ids = sample_ids(prompts, ids)
    clock = Clock(dit, sampling, encoded.latents)
    policy: OwnStop | ReleaseStop = OwnStop(encoded.known, sampling, eos_ids, stop)
    if sampling.release:
        policy = ReleaseStop(encoded, sampling, eos_ids, size * patch)
    written: list[list[int]] = [[] for _ in prompts]  # all tokens of the generated blocks
    active = list(range(len(prompts)))
    dit = prepacked(dit, "blocks", 2 * size * len(prompts))
    caches = prefill(vae, dit, encoded, sampling, clock)
    for number in range(1 << 30):
        rows = torch.tensor(active, device=encoded.tokens.device)
        seen = [written[i] if sampling.release else list(prompts[i]) + written[i] for i in active]
        first = number == 0
        fixed = first_block(encoded, rows, size) if first else no_rows(len(active), size, encoded.latents)
        block = Block(number, [ids[i] for i in active], *fixed, seen)
        z, tokens, caches = write_block(vae, dit, caches, block, sampling, clock, watch, noise)
        new = tokens.tolist()
        if first and not sampling.release:
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
        caches = replace(caches, dit=commit(dit, caches.dit, z, size, clock(0.0, 0)))


def prefill(vae: TextVAE, dit: BlockCausalDiT, prompts: Prompts, sampling: ColaSampling, clock: Clock) -> Caches:
    """Caches that hold the whole prompt blocks, with room for what will be written."""
    size, patch, batch = dit.config.block_size, vae.config.patch_size, len(prompts.latents)
    longest = int(prompts.history.max())
    room = longest + size * (2 + (sampling.max_new_tokens + size * patch - 1) // (size * patch))
    dit_cache, decoder = dit.empty_cache(batch, room), vae.empty_cache(batch, room, "decoder")
    encoder = vae.empty_cache(batch, room, "encoder") if sampling.candidates > 1 else None
    if longest:
        longest = max(longest, FEW)
        z = prompts.latents[:, :longest].contiguous()  # a slice takes other kernels than a single sample's does
        dit_cache = commit(dit, dit_cache, z, prompts.history, clock(0.0, 0))
        # the release decodes latents as the prior sees them (Q8)
        vae.decode(z if sampling.release else vae.denormalise(z), decoder)
        decoder = decoder.append(prompts.history)
        if encoder is not None:
            vae.encode(prompts.tokens[:, : longest * patch], cache=encoder)
            encoder = encoder.append(prompts.history)
    return Caches(dit_cache, decoder, encoder)


def commit(dit: BlockCausalDiT, cache: KVCache, z: Tensor, counts: Tensor | int, modulation: Modulation) -> KVCache:
    """The DiT's cache with the first `counts` clean latents of z (B, R, d) appended; modulation: time 0's."""
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
    sampling: ColaSampling,
    clock: Clock,
    watch: Watch | None,
    noise: Callable[[int, int], Tensor] | None,
) -> tuple[Tensor, Tensor, Caches]:
    """Latents (B, S, d) and tokens (B, S * P) of the next block, and caches with the decoder's side committed."""
    size, count, batch = dit.config.block_size, sampling.candidates, len(block.ids)
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
    elif sampling.release:
        shape = (size, dit.config.latent_dim)
        z = release_noise(sampling.seed, block.ids, block.number, shape).to(block.known)
    else:
        z = draw("noise")

    def decode(latents: Tensor) -> Tensor:
        return vae.decode(latents if sampling.release else vae.denormalise(latents), caches.decoder)

    states: list[Tensor] = []
    for t, z in denoise(dit, caches.dit, z, block, sampling, clock, draw):  # noqa: B020 the last state is the block
        states.append(z)
        if watch is not None:
            watch(block.number, t, decode(z).argmax(-1))
    check_states(states, block.ids, f", block {block.number + 1}")
    logits = decode(z)
    check_logits(logits, block.ids, f", block {block.number + 1}")
    if not (sampling.release and block.number == 0):
        logits = penalise(logits, block.seen, sampling.repetition_penalty)
    generators = [randomness.generator(sampling.seed, "token", i, block.number, c) for i, c in keys]
    tokens = choose(logits, sampling, generators, wide=not sampling.release)  # the release draws in the logits' type
    caches = replace(caches, decoder=caches.decoder.append(size))
    if caches.encoder is not None:
        mean = vae.normalise(vae.encode(tokens, cache=caches.encoder).mean)
        error = (z - mean).square().sum((1, 2)).view(batch, count)
        best = error.argmin(-1) + torch.arange(batch, device=z.device) * count
        caches = replace(caches, encoder=caches.encoder.append(size)).select(best)
        z, tokens = z[best], tokens[best]
    return z, tokens, caches
