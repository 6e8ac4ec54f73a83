"""Generation that checks itself: the denoiser drafts a block, and the trunk keeps what it would have written, too.

A cycle begins with one token that is certain, as the trunk has chosen it. The denoiser drafts the latents behind it,
the decoder reads them, and one pass of the trunk over the block's tokens, which generation needs anyhow, tells the
probability of each. Kept are those before the first that is refused, in whose place the trunk chooses one: the next
cycle's first. The trunk reads posterior means of tokens, never drafted latents, so that what it writes is a function of
the tokens before.

A draft is one certain text, drawn independently of what decides on it. A token of it with probability p under the trunk
is kept with probability p, and else one of the others is drawn in proportion to their own. So a token x comes out with
probability Pr(draft = x) p(x) + sum over y != x of Pr(draft = y) (1 - p(y)) p(x) / (1 - p(y)) = p(x), whatever drafts.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from opencola.errors import UserError
from opencola.flow.dit import BlockCausalDiT
from opencola.layers import randomness
from opencola.models.cola.caches import Caches, read_latents
from opencola.models.cola.denoise import Block, Clock, denoise
from opencola.models.cola.predict import predictor
from opencola.models.cola.release import ReleaseStop
from opencola.models.cola.sampling import ColaSampling
from opencola.models.finite import check_logits, check_states
from opencola.models.sampling import probabilities
from opencola.models.stopping import OwnStop, TokenBlock, unfinished
from opencola.vae.text_vae import TextVAE


def check_verifiable(dit: BlockCausalDiT, sampling: ColaSampling) -> None:
    """Raise UserError where the prior lacks what the settings ask for."""
    if sampling.verify != "off":
        predictor(dit, f"verify {sampling.verify}")
    if sampling.rank == "trunk" and sampling.candidates > 1:
        predictor(dit, "rank trunk")
    if sampling.release and dit.config.trunk_layers:
        raise UserError(f"compatibility release: it has no trunk, but this prior has one of {dit.config.trunk_layers}")


def verified(
    vae: TextVAE,
    dit: BlockCausalDiT,
    caches: Caches,
    ids: Sequence[int],
    sampling: ColaSampling,
    clock: Clock,
    policy: OwnStop | ReleaseStop,
) -> Iterator[list[TokenBlock]]:
    """Yield the new tokens of every unfinished sample, cycle by cycle. caches: of the prompts."""
    head, active = predictor(dit, f"verify {sampling.verify}"), list(range(len(ids)))
    written = [0] * len(ids)
    certain = choose(list(caches.next_token(dit)), [(ids[i], 0) for i in active], sampling)
    for number in range(1 << 30):
        keys = [(ids[i], written[i]) for i in active]
        tokens = draft(vae, dit, caches, certain, keys, sampling, clock)
        z = vae.normalise(vae.encode(tokens, cache=caches.encoder).mean)
        read = read_latents(dit, caches.dit, z, clock(0.0, 0))
        logits = head(read)
        check_logits(logits, [i for i, _ in keys], f", cycle {number + 1}")
        kept, certain = accept(logits, tokens, keys, sampling)
        caches = caches.count(torch.tensor(kept, device=tokens.device), read)
        new = [row[:count] for row, count in zip(tokens.tolist(), kept, strict=True)]
        for i, count in zip(active, kept, strict=True):
            written[i] += count
        blocks = policy.cut(active, new, number)
        yield blocks
        still = unfinished(blocks)
        if not still:
            return
        if len(still) < len(active):
            keep = torch.tensor(still, device=tokens.device)
            caches, certain = caches.select(keep), certain[keep]
            active = [active[row] for row in still]


def draft(
    vae: TextVAE,
    dit: BlockCausalDiT,
    caches: Caches,
    certain: Tensor,
    keys: Sequence[tuple[int, int]],
    sampling: ColaSampling,
    clock: Clock,
) -> Tensor:
    """Tokens (B, S) of a block that begins with the certain ones (B,): the denoiser's, read by the decoder.

    keys: every sample's id and how many tokens it has written. The decoder's cache is read, not counted.
    """
    size, dim = dit.config.block_size, dit.config.latent_dim
    first = vae.normalise(vae.encode(certain[:, None], cache=caches.encoder).mean)
    pinned = (torch.arange(size, device=first.device) == 0).expand(len(first), size)
    known = torch.nn.functional.pad(first, (0, 0, 0, size - 1))
    if size == 1:  # the decoder, too, reads what is certain
        vae.features(vae.denormalise(first), caches.decoder)
        return certain[:, None]

    def draw(purpose: str, *step: int) -> Tensor:
        generators = [randomness.generator(sampling.seed, f"draft {purpose}", *key, *step) for key in keys]
        return torch.stack([torch.randn((size, dim), generator=g) for g in generators]).to(first)

    block = Block(1, [i for i, _ in keys], pinned, known, [])
    states = [z for _, z in denoise(dit, caches.dit, draw("noise"), block, sampling, clock, draw, caches.last)]
    check_states(states, block.ids, "")
    tokens = vae.decode(vae.denormalise(states[-1]), caches.decoder).argmax(-1)
    return torch.cat((certain[:, None], tokens[:, 1:]), dim=1)


def accept(
    logits: Tensor, tokens: Tensor, keys: Sequence[tuple[int, int]], sampling: ColaSampling
) -> tuple[list[int], Tensor]:
    """How many of each sample's tokens (B, S) are kept, the certain first one among them, and the next one (B,).

    logits (B, S, V): the trunk's, of the token after each.
    """
    kept, following = [], []
    for row, drafted, (i, place) in zip(logits, tokens.tolist(), keys, strict=True):
        count = 1
        while count < len(drafted) and accepts(row[count - 1], drafted[count], (i, place + count), sampling):
            count += 1
        refused = drafted[count] if count < len(drafted) and sampling.verify == "lossless" else None
        kept.append(count)
        following.append(choose([row[count - 1]], [(i, place + count)], sampling, refused))
    return kept, torch.cat(following).to(tokens.device)


def accepts(logits: Tensor, token: int, key: tuple[int, int], sampling: ColaSampling) -> bool:
    """Whether a drafted token is kept, given the trunk's logits (V,) at its place; key: sample's id and place."""
    if sampling.verify == "typical":
        p = logits.double().softmax(-1)
        entropy = torch.special.entr(p).sum()
        least = torch.minimum(p.new_tensor(sampling.typical_epsilon), sampling.typical_delta * torch.exp(-entropy))
        return bool(p[token] >= least)
    if sampling.greedy:
        return int(logits.argmax()) == token
    p = probabilities(logits.double(), sampling)
    drawn = torch.rand((), generator=randomness.generator(sampling.seed, "verify", *key), dtype=torch.float64)
    return bool(drawn < p[token])


def choose(
    logits: Sequence[Tensor], keys: Sequence[tuple[int, int]], sampling: ColaSampling, refused: int | None = None
) -> Tensor:
    """The trunk's own choices (B,) by its logits, (V,) each, but for a token that was refused there."""
    if sampling.greedy:
        return torch.stack([row.argmax() for row in logits])
    chosen = []
    for row, key in zip(logits, keys, strict=True):
        p = probabilities(row.double(), sampling).cpu()
        if refused is not None:
            p[refused] = 0
        generator = randomness.generator(sampling.seed, "token", *key)
        chosen.append(torch.multinomial(p, 1, generator=generator)[0].to(row.device))
    return torch.stack(chosen)
