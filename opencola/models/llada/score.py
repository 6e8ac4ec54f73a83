"""Log-probabilities of texts under a LLaDA: a bound by random masking (arXiv 2502.09992, equation 6, algorithm 3)."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from opencola.kernels.choice import invariant
from opencola.layers import randomness
from opencola.models.bounds import BoundScoring
from opencola.models.inputs import checked_texts, sample_ids
from opencola.models.language_model import Score
from opencola.models.llada.network import LLaDANetwork


def masked_bound(
    predict: Callable[[Tensor], Tensor], texts: Tensor, hidden: Tensor, scored: Tensor, mask_id: int
) -> Tensor:
    """L / l times the log-probability of l masked tokens, in nats, float64: (B,).

    texts (B, R), of which hidden (B, R) bool, l of the scored (B,) = L tokens, are masked. On average over l, uniform
    in 1..L, and over which l they are, this is at most log p(L tokens | the rest), and equal for the exact
    conditionals. The loss has the same expectation, but varies with the number of masked tokens, too.
    """
    logits = predict(texts.masked_fill(hidden, mask_id))[hidden].double()
    log_p = torch.zeros_like(texts, dtype=torch.float64)
    log_p[hidden] = -F.cross_entropy(logits, texts[hidden], reduction="none")
    return log_p.sum(-1) * scored / hidden.sum(-1)


def draw_hidden(length: int, seed: int, *keys: int) -> Tensor:
    """Which of L tokens are masked: (L,) bool, exactly l of them, l uniform in 1..L; depends on (seed, keys) alone."""
    generator = randomness.generator(seed, "score mask", *keys)
    count = int(torch.randint(1, length + 1, (), generator=generator))
    hidden = torch.zeros(length, dtype=torch.bool)
    hidden[torch.randperm(length, generator=generator)[:count]] = True
    return hidden


@invariant
@torch.no_grad()
def score(
    model: LLaDANetwork,
    prompts: Sequence[Sequence[int]],
    continuations: Sequence[Sequence[int]],
    settings: BoundScoring,
    *,
    pad_id: int = 0,
    ids: Sequence[int] | None = None,
) -> Score:
    """Bound on the log-probability of every continuation (token ids) given its prompt, mean of the draws.

    ids decide the draws (places in the list when not given). Raises ValueError for empty continuations and ids beyond
    the vocabulary.
    """
    samples, rows = settings.samples, settings.rows
    ids = sample_ids(prompts, ids)
    texts = checked_texts(prompts, continuations, model.mask_id)
    device = model.head.weight.device
    bounds = torch.empty(len(texts), samples, dtype=torch.float64)
    jobs = [(place, sample) for place in range(len(texts)) for sample in range(samples)]
    jobs.sort(key=lambda job: len(texts[job[0]]))  # texts of like length are filled up little
    for first in range(0, len(jobs), rows):
        batch = jobs[first : first + rows]
        lengths = torch.tensor([len(texts[place]) for place, _ in batch], device=device)
        longest = int(lengths.max())
        tokens = torch.full((len(batch), longest), pad_id)
        hidden = torch.zeros(len(batch), longest, dtype=torch.bool)
        for row, (place, sample) in enumerate(batch):
            text, begin = texts[place], len(prompts[place])
            tokens[row, : len(text)] = torch.tensor(text)
            hidden[row, begin : len(text)] = draw_hidden(len(text) - begin, settings.seed, ids[place], sample)
        scored = torch.tensor([len(continuations[place]) for place, _ in batch], device=device)
        predict = model.within(lengths)
        bound = masked_bound(predict, tokens.to(device), hidden.to(device), scored, model.mask_id)
        bounds[[place for place, _ in batch], [sample for _, sample in batch]] = bound.cpu()
    return Score(
        torch.stack([draws.mean() for draws in bounds]),  # of each alone: of all, its sum would depend on how many
        torch.stack([draws.std() / samples**0.5 for draws in bounds]) if samples > 1 else bounds[:, 0] * torch.nan,
        torch.tensor([len(continuation) for continuation in continuations]),
        "bound",
        f"random masking, K = {samples}",
        {},
    )
