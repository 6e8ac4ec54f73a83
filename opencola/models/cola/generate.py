"""Block-wise generation with caches and guidance (model.md §5)."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from opencola.flow.dit import BlockCausalDiT
from opencola.kernels.choice import invariant
from opencola.layers import randomness
from opencola.layers.cache import ROUND, whole_steps
from opencola.layers.few_rows import prepacked
from opencola.models.cola.caches import Caches, prefill
from opencola.models.cola.denoise import Block, Clock, denoise, looked
from opencola.models.cola.hold import hold
from opencola.models.cola.parts import ColaParts
from opencola.models.cola.prompts import Prompts, encode_prompts
from opencola.models.cola.release import ReleaseStop
from opencola.models.cola.release import noise as release_noise
from opencola.models.cola.sampling import ColaSampling
from opencola.models.cola.verify import Checked, check_verifiable
from opencola.models.finite import check_logits, check_states
from opencola.models.sampling import choose, penalise
from opencola.models.stopping import State, StopRule, Text, TokenBlock
from opencola.models.writing import Writing, begun, write
from opencola.vae.text_vae import TextVAE

Noise = Callable[[int, int], Tensor]
"""(id, block) -> (S, d): in place of the seeded noise."""


@invariant
def generate(
    model: ColaParts,
    prompts: Sequence[Sequence[int]],
    sampling: ColaSampling,
    *,
    eos_ids: Sequence[int] = (),
    pad_id: int = 0,
    ids: Sequence[int] | None = None,
    stop: StopRule = lambda sample, tokens: None,
    watch: bool = False,
    noise: Noise | None = None,
) -> Iterator[list[TokenBlock]]:
    """Yield the new tokens of every unfinished sample, block by block.

    prompts: token ids; eos_ids end a sample and are not given out; ids: the samples' ids, which decide their noise
    (their place in the batch when not given); stop(sample, new tokens) -> how many of these to keep, or None to go on;
    watch: have the blocks tell all states of the solver. Raises ValueError for prompts with ids beyond the vocabulary.
    """
    if texts := begun(prompts, sampling, eos_ids, ids, stop, watch):
        yield from write(begin(model, texts, pad_id, noise))


@torch.inference_mode()
def begin(model: ColaParts, texts: Sequence[Text], pad_id: int = 0, noise: Noise | None = None) -> Writing:
    """Texts to write, whose prompts are read; their settings differ in nothing but the fields that every family has.

    Arguments and errors as those of `generate`.
    """
    vae, sampling = model.vae, texts[0].sampling
    check_verifiable(model.dit, sampling)
    prompts = encode_prompts(vae, [text.prompt for text in texts], sampling, model.dit.config.grid, pad_id)
    clock = Clock(model.dit, sampling, prompts.latents)
    dit = prepacked(model.dit, "blocks", 2 * model.dit.config.block_size * len(texts))
    caches = prefill(vae, dit, prompts, texts, clock(0.0, 0))
    if sampling.verify != "off":
        return Checked.begun(vae, dit, clock, texts, caches)
    release = ReleaseStop(prompts, texts, dit.config.block_size * vae.config.patch_size) if sampling.release else None
    return ColaWriting(vae, dit, clock, texts, caches, prompts, release, noise)


@dataclass
class ColaWriting:
    """Texts that grow by a block at a time (`Writing`)."""

    vae: TextVAE
    dit: BlockCausalDiT
    clock: Clock
    texts: Sequence[Text]
    caches: Caches
    prompts: Prompts | None
    """Of texts that have no block yet."""
    release: ReleaseStop | None
    noise: Noise | None
    z: Tensor | None = None
    """(B, S, d): the last latents, which the DiT has yet to read."""

    @torch.inference_mode()
    def step(self) -> list[TokenBlock]:
        """As in the protocol."""
        size, texts, caches, prompts = self.dit.config.block_size, self.texts, self.caches, self.prompts
        if self.z is not None and not caches.whole:
            caches, _ = caches.commit(self.dit, self.z, size, self.clock(0.0, 0))
        block = first_block(prompts, size) if prompts is not None else no_rows(len(texts), size, self.clock.like)
        written = write_block(self.vae, self.dit, caches, block, texts, self.clock, self.noise)
        self.z, tokens, self.caches, states = written
        self.prompts = None
        new = tokens.tolist()
        if self.release is not None:
            return self.release.take(texts, new)
        rows = zip(texts, new, block.given, states, strict=True)
        return [text.take(row[given:], seen) for text, row, given, seen in rows]

    @torch.inference_mode()
    def select(self, rows: Sequence[int]) -> "ColaWriting":
        """As in the protocol."""
        place = torch.tensor(rows, dtype=torch.long, device=self.clock.like.device)
        texts, caches = [self.texts[row] for row in rows], self.caches.select(place)
        prompts = None if self.prompts is None else self.prompts.select(place)
        return replace(self, texts=texts, caches=caches, prompts=prompts, z=None if self.z is None else self.z[place])

    @torch.inference_mode()
    def join(self, other: "ColaWriting") -> "ColaWriting":
        """As in the protocol."""
        assert self.z is not None and other.z is not None
        texts, caches = [*self.texts, *other.texts], self.caches.join(other.caches)
        return replace(self, texts=texts, caches=caches, z=torch.cat((self.z, other.z)))


def cache_bytes(model: ColaParts, text: Text) -> int:
    """Bytes that a text's caches take, candidates and what reads tokens again included."""
    sampling, size, patch = text.sampling, model.dit.config.block_size, model.vae.config.patch_size
    caches = [model.dit.empty_cache(1, 1), *(model.vae.empty_cache(1, 1, part) for part in ("encoder", "decoder"))]
    rows = whole_steps((len(text.prompt) + sampling.max_new_tokens) // patch + 3 * size)
    return sum(cache.nbytes for cache in caches) // ROUND * rows * int(sampling.candidates)


def first_block(prompts: Prompts, size: int) -> Block:
    """The block with which texts begin, and those of its latents that their prompts fix."""
    offset = torch.arange(size, device=prompts.pinned.device)
    pinned = offset < prompts.pinned[:, None]
    place = (prompts.history[:, None] + offset).clamp(max=prompts.latents.shape[1] - 1)
    rows = torch.arange(len(place), device=place.device)[:, None]
    known = prompts.latents[rows, place] * pinned[..., None]
    return Block(pinned, known, True, [len(tokens) for tokens in prompts.known])


def no_rows(batch: int, size: int, like: Tensor) -> Block:
    """A block of which nothing is known."""
    pinned = torch.zeros(batch, size, dtype=torch.bool, device=like.device)
    return Block(pinned, like.new_zeros(batch, size, like.shape[-1]), given=[0] * batch)


def write_block(
    vae: TextVAE,
    dit: BlockCausalDiT,
    caches: Caches,
    block: Block,
    texts: Sequence[Text],
    clock: Clock,
    noise: Noise | None,
) -> tuple[Tensor, Tensor, Caches, list[list[State]]]:
    """Latents (B, S, d) and tokens (B, S * P) of the next block, caches with the decoder's side committed, and the
    states of every text that is watched."""
    sampling: ColaSampling = clock.sampling
    size, count, batch = dit.config.block_size, sampling.candidates, len(texts)
    if count > 1:
        rows = torch.arange(batch, device=block.known.device).repeat_interleave(count)
        caches, block = caches.select(rows), block.select(rows)
    copies = [(text, copy) for text in texts for copy in range(count)]
    ids = [text.id for text, _ in copies]
    where = f", block {texts[0].blocks + 1}"

    def generators(purpose: str, *step: int) -> list[torch.Generator]:
        keys = [(text.sampling.seed, purpose, text.id, text.blocks, copy, *step) for text, copy in copies]
        return [randomness.generator(*key) for key in keys]

    def draw(purpose: str, *step: int) -> Tensor:
        shape = size, dit.config.latent_dim
        return torch.stack([torch.randn(shape, generator=g) for g in generators(purpose, *step)]).to(block.known)

    if noise is not None:
        z = torch.stack([noise(text.id, text.blocks) for text, _ in copies]).to(block.known)
    elif sampling.release:
        z = release_noise(sampling.seed, ids, texts[0].blocks, (size, dit.config.latent_dim)).to(block.known)
    else:
        z = draw("noise")

    def decode(latents: Tensor) -> Tensor:
        return vae.decode(latents if sampling.release else vae.denormalise(latents), caches.decoder)

    path = list(denoise(dit, caches.dit, z, block, sampling, clock, draw, caches.last))
    z = path[-1][1]
    check_states([state for _, state in path], ids, where)
    states = looked(path, decode, [text.watched for text, _ in copies])
    logits = decode(z)
    check_logits(logits, ids, where)
    if not (sampling.release and block.first):
        seen = [text.new if sampling.release else text.tokens for text, _ in copies]
        logits = penalise(logits, seen, [text.sampling.repetition_penalty for text, _ in copies])
    settings = [text.sampling for text, _ in copies]
    # the release draws in the logits' type
    tokens = choose(logits, settings, generators("token"), wide=not sampling.release)
    good, forced = torch.ones(batch, count, dtype=torch.bool, device=z.device), [[0] * count for _ in texts]
    if texts[0].constraint is not None:

        def again(row: int, place: int, scores: Tensor) -> int:
            text, copy = copies[row]
            generator = randomness.generator(text.sampling.seed, "held", text.id, text.blocks, copy, place)
            return int(choose(scores[None, None], [text.sampling], [generator]))

        made = hold(vae, caches, block, z, logits, tokens, texts, again)
        z, tokens, good, forced = made.z, made.tokens, made.good, made.forced
    caches = replace(caches, decoder=caches.decoder.append(size))
    chosen = torch.zeros(batch, dtype=torch.long, device=z.device)
    if count > 1:
        if sampling.rank == "round_trip":
            assert caches.encoder is not None
            mean = vae.normalise(vae.encode(tokens, cache=caches.encoder).mean)
            merit = -(z - mean).square().sum((1, 2))
        else:
            merit, caches = log_probability(dit, caches, z, tokens, clock)
        chosen = merit.view(batch, count).masked_fill(~good, -torch.inf).argmax(-1)
        best = chosen + torch.arange(batch, device=z.device) * count
        z, tokens, caches = z[best], tokens[best], caches.select(best)
        states = [states[row] for row in best.tolist()]
    if caches.encoder is not None:
        if texts[0].constraint is not None:
            vae.encode(tokens, cache=caches.encoder)
        caches = replace(caches, encoder=caches.encoder.append(size))
    for text, counts, place in zip(texts, forced, chosen.tolist(), strict=True):
        text.forced += counts[place]
    return z, tokens, caches, states


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
