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

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from opencola.errors import UserError
from opencola.flow.dit import BlockCausalDiT
from opencola.layers import randomness
from opencola.models.cola.caches import Caches, read_latents
from opencola.models.cola.denoise import Block, Clock, denoise, looked
from opencola.models.cola.predict import predictor
from opencola.models.cola.sampling import ColaSampling
from opencola.models.constraint import Constraint, agreed
from opencola.models.constraint import next_token as first_held
from opencola.models.finite import check_logits, check_states
from opencola.models.sampling import penalise, probabilities
from opencola.models.stopping import State, Text, TokenBlock
from opencola.vae.text_vae import TextVAE


def check_verifiable(dit: BlockCausalDiT, sampling: ColaSampling) -> None:
    """Raise UserError where the prior lacks what the settings ask for."""
    if sampling.verify != "off":
        predictor(dit, f"verify {sampling.verify}")
    if sampling.rank == "trunk" and sampling.candidates > 1:
        predictor(dit, "rank trunk")
    if sampling.release and dit.config.trunk_layers:
        raise UserError(f"compatibility release: it has no trunk, but this prior has one of {dit.config.trunk_layers}")


@dataclass
class Checked:
    """Texts that grow by the tokens of a draft that the trunk keeps (`Writing`)."""

    vae: TextVAE
    dit: BlockCausalDiT
    clock: Clock
    texts: Sequence[Text]
    caches: Caches
    certain: Tensor
    """(B,): the tokens that come next."""

    @classmethod
    def begun(cls, vae: TextVAE, dit: BlockCausalDiT, clock: Clock, texts: Sequence[Text], caches: Caches) -> "Checked":
        """Texts of which nothing is written. caches: of the prompts."""
        logits = penalised(caches.next_token(dit)[:, None], [[] for _ in texts], texts)
        certain = [begin_with(row, text) for row, text in zip(logits[:, 0], texts, strict=True)]
        return cls(vae, dit, clock, texts, caches, torch.stack(certain))

    @torch.inference_mode()
    def step(self) -> list[TokenBlock]:
        """As in the protocol."""
        vae, dit, caches, texts = self.vae, self.dit, self.caches, self.texts
        head = predictor(dit, f"verify {self.clock.sampling.verify}")
        tokens, states = draft(vae, dit, caches, self.certain, texts, self.clock)
        z = vae.normalise(vae.encode(tokens, cache=caches.encoder).mean)
        read = read_latents(dit, caches.dit, z, self.clock(0.0, 0))
        logits = head(read)
        check_logits(logits, [text.id for text in texts], f", cycle {texts[0].blocks + 1}")
        kept, self.certain = accept(penalised(logits, tokens.tolist(), texts), tokens, texts)
        self.caches = caches.count(torch.tensor(kept, device=tokens.device), read)
        rows = zip(texts, tokens.tolist(), kept, states, strict=True)
        return [text.take(row[:count], seen) for text, row, count, seen in rows]

    @torch.inference_mode()
    def select(self, rows: Sequence[int]) -> "Checked":
        """As in the protocol."""
        place = torch.tensor(rows, dtype=torch.long, device=self.certain.device)
        texts, caches = [self.texts[row] for row in rows], self.caches.select(place)
        return replace(self, texts=texts, caches=caches, certain=self.certain[place])

    @torch.inference_mode()
    def join(self, other: "Checked") -> "Checked":
        """As in the protocol."""
        texts, caches = [*self.texts, *other.texts], self.caches.join(other.caches)
        return replace(self, texts=texts, caches=caches, certain=torch.cat((self.certain, other.certain)))


def draft(
    vae: TextVAE, dit: BlockCausalDiT, caches: Caches, certain: Tensor, texts: Sequence[Text], clock: Clock
) -> tuple[Tensor, list[list[State]]]:
    """Tokens (B, S) of a block that begins with the certain ones (B,): the denoiser's, read by the decoder; and the
    states of every text that is watched. The decoder's cache is read, not counted."""
    size, dim = dit.config.block_size, dit.config.latent_dim
    first = vae.normalise(vae.encode(certain[:, None], cache=caches.encoder).mean)
    pinned = (torch.arange(size, device=first.device) == 0).expand(len(first), size)
    known = torch.nn.functional.pad(first, (0, 0, 0, size - 1))
    if size == 1:  # the decoder, too, reads what is certain
        vae.features(vae.denormalise(first), caches.decoder)
        return certain[:, None], [[] for _ in texts]

    def draw(purpose: str, *step: int) -> Tensor:
        keys = [(text.sampling.seed, f"draft {purpose}", text.id, len(text.new), *step) for text in texts]
        generators = [randomness.generator(*key) for key in keys]
        return torch.stack([torch.randn((size, dim), generator=g) for g in generators]).to(first)

    def decode(latents: Tensor) -> Tensor:
        return vae.decode(vae.denormalise(latents), caches.decoder)

    block = Block(pinned, known)
    path = list(denoise(dit, caches.dit, draw("noise"), block, clock.sampling, clock, draw, caches.last))
    check_states([z for _, z in path], [text.id for text in texts])
    states = looked(path, decode, [text.watched for text in texts])
    tokens = decode(path[-1][1]).argmax(-1)
    return torch.cat((certain[:, None], tokens[:, 1:]), dim=1), states


def penalised(logits: Tensor, drafted: Sequence[Sequence[int]], texts: Sequence[Text]) -> Tensor:
    """Logits (B, S, V) of what follows each of the tokens drafted, those of a text and its draft up to there made less
    likely; with none drafted (B, 1, V) of what follows the texts."""
    penalties = [text.sampling.repetition_penalty for text in texts]
    if all(penalty == 1 for penalty in penalties):
        return logits
    places = []
    for place in range(logits.shape[1]):
        seen = [[*text.tokens, *tokens[: place + 1]] for text, tokens in zip(texts, drafted, strict=True)]
        places.append(penalise(logits[:, place : place + 1], seen, penalties))
    return torch.cat(places, 1)


def accept(logits: Tensor, tokens: Tensor, texts: Sequence[Text]) -> tuple[list[int], Tensor]:
    """How many of each text's tokens (B, S) are kept, the certain first one among them, and the next one (B,).

    logits (B, S, V): the trunk's, of the token after each.
    """
    kept, following = [], []
    for row, drafted, text in zip(logits, tokens.tolist(), texts, strict=True):
        if text.constraint is not None:
            count, token = accept_held(text.constraint, row, drafted, text)
            kept.append(count)
            following.append(tokens.new_tensor(token))
            continue
        count = 1
        while count < len(drafted) and accepts(row[count - 1], drafted[count], text, count):
            count += 1
        refused = drafted[count] if count < len(drafted) and text.sampling.verify == "lossless" else None
        kept.append(count)
        following.append(next_token(row[count - 1], text, count, refused))
    return kept, torch.stack(following)


def accept_held(constraint: Constraint, logits: Tensor, drafted: list[int], text: Text) -> tuple[int, int]:
    """The same for a text that is held to a constraint: logits (S, V) of the tokens drafted."""

    def takes(place: int, scores: Tensor, token: int) -> bool:
        return accepts(scores, token, text, place)

    def own(place: int, scores: Tensor) -> int:
        return int(next_token(scores, text, place))

    typical = takes if text.sampling.verify == "typical" else None
    count, token = agreed(constraint, text.new, logits, drafted, text.room, own, typical)
    if constraint.closing([*text.new, *drafted[:count]]) != []:  # behind the end nothing is chosen
        text.forced += own(count, logits[count - 1]) != token
    return count, token


def begin_with(logits: Tensor, text: Text) -> Tensor:
    """The first token () that the trunk writes, by its logits (V,)."""
    free = next_token(logits, text, 0)
    if text.constraint is None:
        return free
    held = first_held(text.constraint, text.new, logits, text.room, lambda scores: int(next_token(scores, text, 0)))
    text.forced += held != int(free)
    return torch.full_like(free, held)


def accepts(logits: Tensor, token: int, text: Text, place: int) -> bool:
    """Whether a drafted token is kept, `place` tokens behind the text, given the trunk's logits (V,) there."""
    sampling: ColaSampling = text.sampling
    if sampling.verify == "typical":
        p = logits.double().softmax(-1)
        entropy = torch.special.entr(p).sum()
        least = torch.minimum(p.new_tensor(sampling.typical_epsilon), sampling.typical_delta * torch.exp(-entropy))
        return bool(p[token] >= least)
    if sampling.greedy:
        return int(logits.argmax()) == token
    p = probabilities(logits.double(), sampling)
    generator = randomness.generator(sampling.seed, "verify", text.id, len(text.new) + place)
    return bool(torch.rand((), generator=generator, dtype=torch.float64) < p[token])


def next_token(logits: Tensor, text: Text, place: int, refused: int | None = None) -> Tensor:
    """The trunk's own choice () `place` tokens behind the text, by its logits (V,), but for a token refused there."""
    sampling: ColaSampling = text.sampling
    if sampling.greedy:
        return logits.argmax()
    p = probabilities(logits.double(), sampling).cpu()
    if refused is not None:
        p[refused] = 0
    generator = randomness.generator(sampling.seed, "token", text.id, len(text.new) + place)
    return torch.multinomial(p, 1, generator=generator)[0].to(logits.device)
