"""Block-wise generation with caches and guidance (model.md §5)."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from opencola.flow.dit import BlockCausalDiT
from opencola.kernels.choice import invariant
from opencola.layers import randomness
from opencola.layers.few_rows import prepacked
from opencola.models.cola.caches import Caches, prefill
from opencola.models.cola.denoise import Block, Clock, denoise
from opencola.models.cola.parts import ColaParts
from opencola.models.cola.prompts import Prompts, encode_prompts
from opencola.models.cola.release import ReleaseStop
from opencola.models.cola.release import noise as release_noise
from opencola.models.cola.sampling import ColaSampling
from opencola.models.cola.verify import check_verifiable, verified
from opencola.models.finite import check_logits, check_states
from opencola.models.inputs import sample_ids
from opencola.models.sampling import choose, penalise
from opencola.models.stopping import OwnStop, StopRule, TokenBlock, unfinished
from opencola.vae.text_vae import TextVAE

Watch = Callable[[int, float, Tensor], None]


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
    check_verifiable(dit, sampling)
    encoded = encode_prompts(vae, prompts, sampling, dit.config.grid, pad_id)
    ids = sample_ids(prompts, ids)
    clock = Clock(dit, sampling, encoded.latents)
    policy: OwnStop | ReleaseStop = OwnStop(encoded.known, sampling, eos_ids, stop)
    if sampling.release:
        policy = ReleaseStop(encoded, sampling, eos_ids, size * patch)
    written: list[list[int]] = [[] for _ in prompts]  # all tokens of the generated blocks
    active = list(range(len(prompts)))
    dit = prepacked(dit, "blocks", 2 * size * len(prompts))
    caches = prefill(vae, dit, encoded, sampling, clock(0.0, 0))
    if sampling.verify != "off":
        yield from verified(vae, dit, caches, ids, sampling, clock, policy)
        return
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
        still = unfinished(blocks)
        if not still:
            return
        if len(still) < len(active):
            keep = torch.tensor(still, device=rows.device)
            caches, z = caches.select(keep), z[keep]
            active = [active[row] for row in still]
        if not caches.whole:
            caches, _ = caches.commit(dit, z, size, clock(0.0, 0))


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
    for t, z in denoise(dit, caches.dit, z, block, sampling, clock, draw, caches.last):  # noqa: B020 the last state is the block
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
    if count > 1:
        if caches.encoder is not None:
            mean = vae.normalise(vae.encode(tokens, cache=caches.encoder).mean)
            merit = -(z - mean).square().sum((1, 2))
            caches = replace(caches, encoder=caches.encoder.append(size))
        else:
            merit, caches = log_probability(dit, caches, z, tokens, clock)
        best = merit.view(batch, count).argmax(-1) + torch.arange(batch, device=z.device) * count
        z, tokens, caches = z[best], tokens[best], caches.select(best)
    return z, tokens, caches


def log_probability(
    dit: BlockCausalDiT, caches: Caches, z: Tensor, tokens: Tensor, clock: Clock
) -> tuple[Tensor, Caches]:
    """Of a block's tokens (B, S) under the trunk: (B,). And caches with the block's latents z (B, S, d), which it
    reads, committed; a block of one is not read."""
    rows = [caches.next_token(dit)[:, None]]
    if tokens.shape[1] > 1:
        caches, read = caches.commit(dit, z, tokens.shape[1], clock(0.0, 0))
        assert dit.next_token is not None and read is not None
        rows.append(dit.next_token(read[:, :-1]))
    return torch.cat(rows, 1).double().log_softmax(-1).gather(-1, tokens[..., None]).sum((1, 2)), caches
