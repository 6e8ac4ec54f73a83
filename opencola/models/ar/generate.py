"""Writing token by token, with a cache."""

from collections.abc import Iterator, Sequence

import torch

from opencola.kernels.choice import invariant
from opencola.layers import randomness
from opencola.layers.cache import KVCache, whole_steps
from opencola.models.ar.network import ARNetwork
from opencola.models.ar.sampling import ARSampling
from opencola.models.finite import check_logits
from opencola.models.inputs import checked_prompts, sample_ids
from opencola.models.sampling import choose, penalise
from opencola.models.stopping import OwnStop, StopRule, TokenBlock, unfinished


@invariant
@torch.inference_mode()
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
    if not prompts:
        return
    texts = checked_prompts(prompts, model.config.vocab_size)
    ids = sample_ids(texts, ids)
    policy = OwnStop([[] for _ in texts], sampling, eos_ids, stop)
    cache = prefill(model, texts, sampling.max_new_tokens, pad_id)
    active = list(range(len(texts)))
    while active:
        last = [[texts[i][-1] if texts[i] else model.config.bos_id] for i in active]
        logits = model.logits(torch.tensor(last, device=model.embedding.weight.device), cache=cache)
        check_logits(logits, [ids[i] for i in active])
        logits = penalise(logits, [texts[i] for i in active], sampling.repetition_penalty)
        generators = [randomness.generator(sampling.seed, "token", ids[i], len(texts[i])) for i in active]
        new = choose(logits, sampling, generators).tolist()
        for i, token in zip(active, new, strict=True):
            texts[i] += token
        blocks = policy.cut(active, new, 0)
        yield blocks
        cache = cache.append(1)
        still = unfinished(blocks)
        if still and len(still) < len(active):
            cache = cache.select(torch.tensor(still, device=cache.lengths.device))
        active = [active[row] for row in still]


def prefill(model: ARNetwork, texts: Sequence[list[int]], room: int, pad_id: int) -> KVCache:
    """A cache with all inputs but the last of every text, and room for so many more."""
    counts = [len(text) for text in texts]
    cache = model.trunk.empty_cache(len(texts), max(counts) + room)
    if max(counts):
        inputs = [[model.config.bos_id, *text[:-1]] if text else [] for text in texts]
        rows = model.padded(inputs, whole_steps(max(counts)), pad_id)
        model.features(rows, cache=cache)
    return cache.append(torch.tensor(counts, device=cache.lengths.device))
