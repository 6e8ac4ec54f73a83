"""Writing token by token, with a cache."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from opencola.kernels.choice import invariant
from opencola.layers import randomness
from opencola.layers.cache import ROUND, KVCache, whole_steps
from opencola.models.ar.network import ARNetwork
from opencola.models.ar.sampling import ARSampling
from opencola.models.constraint import next_token
from opencola.models.finite import check_logits
from opencola.models.inputs import checked_prompts
from opencola.models.sampling import choose, penalise
from opencola.models.stopping import StopRule, Text, TokenBlock
from opencola.models.writing import begun, write


@invariant
def generate(
    model: ARNetwork,
    prompts: Sequence[Sequence[int]],
    sampling: ARSampling,
    *,
    eos_ids: Sequence[int] = (),
    pad_id: int = 0,
    ids: Sequence[int] | None = None,
    stop: StopRule = lambda sample, tokens: None,
) -> Iterator[list[TokenBlock]]:
    """Yield the next token of every unfinished sample.

    prompts: token ids, maybe none; eos_ids end a sample and are not given out; pad_id: fills short prompts up, and
    is never seen; ids: the samples' ids (their place in the batch when not given); stop(sample, new tokens) -> how
    many of these to keep, or None to go on. A token's draw depends on the seed, the sample's id and the token's
    place in the text alone: going on from a text that was written gives what would have followed it. Raises ValueError
    for ids beyond the vocabulary.
    """
    if texts := begun(prompts, sampling, eos_ids, ids, stop):
        yield from write(begin(model, texts, pad_id))


def begin(model: ARNetwork, texts: Sequence[Text], pad_id: int = 0) -> "ARWriting":
    """Texts to write, whose prompts are read. Arguments and errors as those of `generate`."""
    checked_prompts([text.prompt for text in texts], model.config.vocab_size)
    return ARWriting(model, texts, prefill(model, texts, pad_id))


class ARWriting:
    """Texts that grow by a token at a time (`Writing`)."""

    def __init__(self, model: ARNetwork, texts: Sequence[Text], cache: KVCache) -> None:
        self.model, self.texts, self.cache = model, texts, cache

    @torch.inference_mode()
    def step(self) -> list[TokenBlock]:
        """As in the protocol."""
        model, texts = self.model, [text.tokens for text in self.texts]
        last = torch.tensor([[tokens[-1] if tokens else model.config.bos_id] for tokens in texts])
        logits = model.logits(last.to(model.embedding.weight.device), cache=self.cache)
        check_logits(logits, [text.id for text in self.texts])
        samplings = [text.sampling for text in self.texts]
        logits = penalise(logits, texts, [sampling.repetition_penalty for sampling in samplings])
        new = choose(logits, samplings, [_generator(text) for text in self.texts]).tolist()
        forced = [_hold(text, row, tokens) for text, row, tokens in zip(self.texts, logits, new, strict=True)]
        self.cache = self.cache.append(1)
        for text, count in zip(self.texts, forced, strict=True):
            text.forced += count
        return [text.take(tokens) for text, tokens in zip(self.texts, new, strict=True)]

    @torch.inference_mode()
    def select(self, rows: Sequence[int]) -> "ARWriting":
        """As in the protocol."""
        place = torch.tensor(rows, dtype=torch.long, device=self.cache.lengths.device)
        return ARWriting(self.model, [self.texts[row] for row in rows], self.cache.select(place))

    @torch.inference_mode()
    def join(self, other: "ARWriting") -> "ARWriting":
        """As in the protocol."""
        return ARWriting(self.model, [*self.texts, *other.texts], self.cache.join(other.cache))


def _generator(text: Text) -> torch.Generator:
    """For the draw of its next token."""
    return randomness.generator(text.sampling.seed, "token", text.id, len(text.tokens))


def _hold(text: Text, logits: Tensor, tokens: list[int]) -> int:
    """Have the next token, the only one of the list, follow the text's constraint; whether it is another one then."""
    if text.constraint is None:
        return 0

    def draw(scores: Tensor) -> int:
        return int(choose(scores[None, None], [text.sampling], [_generator(text)]))

    free, tokens[0] = tokens[0], next_token(text.constraint, text.new, logits[0], text.room, draw)
    return int(tokens[0] != free)


def cache_bytes(model: ARNetwork, text: Text) -> int:
    """Bytes that a text's cache takes."""
    return model.trunk.empty_cache(1, 1).nbytes // ROUND * whole_steps(len(text.prompt) + text.sampling.max_new_tokens)


@torch.inference_mode()
def prefill(model: ARNetwork, texts: Sequence[Text], pad_id: int) -> KVCache:
    """A cache with all inputs but the last of every text, and room for the rest."""
    counts = [len(text.prompt) for text in texts]
    room = max(count + text.sampling.max_new_tokens for count, text in zip(counts, texts, strict=True))
    longest = whole_steps(max(counts))
    cache = model.trunk.empty_cache(len(texts), max(room, longest))
    if longest:
        inputs = [[model.config.bos_id, *text.prompt[:-1]] if text.prompt else [] for text in texts]
        model.features(model.padded(inputs, longest, pad_id), cache=cache)
    return cache.append(torch.tensor(counts, device=cache.lengths.device))
