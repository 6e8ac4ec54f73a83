"""Log-probabilities of texts under a Plaid: its variational bound with K draws of time and noise."""

from collections.abc import Sequence

import torch
from torch import Tensor

from opencola.kernels.choice import invariant
from opencola.layers import randomness
from opencola.models.bounds import BoundScoring
from opencola.models.inputs import checked_texts, sample_ids
from opencola.models.language_model import Score
from opencola.models.plaid.network import PlaidNetwork


@invariant
@torch.no_grad()
def score(
    model: PlaidNetwork,
    prompts: Sequence[Sequence[int]],
    continuations: Sequence[Sequence[int]],
    settings: BoundScoring,
    *,
    pad_id: int = 0,
    ids: Sequence[int] | None = None,
) -> Score:
    """Bound on the log-probability of every continuation (token ids) given its prompt (maybe none), in nats.

    ids decide the draws (places in the list when not given); pad_id changes nothing: no text is filled up. The standard
    error takes the draws as independent, which is too much where the times are spread evenly. parts: reconstruction,
    prior, diffusion, which add up to the total. Raises ValueError for empty continuations and for ids beyond the
    vocabulary.
    """
    ids = sample_ids(prompts, ids)
    texts = checked_texts(prompts, continuations, model.config.vocab_size)
    drawn = [_draws(model, text, len(prompt), i, settings) for text, prompt, i in zip(texts, prompts, ids, strict=True)]
    parts = {name: torch.stack([terms[name].mean() for terms in drawn]) for name in drawn[0]}
    totals = [torch.stack(list(terms.values())).sum(0) for terms in drawn]
    count = settings.samples
    return Score(
        torch.stack([total.mean() for total in totals]),
        torch.stack([total.std() / count**0.5 if count > 1 else total[0] * torch.nan for total in totals]),
        torch.tensor([len(continuation) for continuation in continuations]),
        "bound",
        f"variational bound, K = {count}",
        parts,
    )


def _draws(model: PlaidNetwork, tokens: list[int], known: int, id_: int, settings: BoundScoring) -> dict[str, Tensor]:
    """The terms, negated, of every draw: (K,) float64 each, on the CPU."""
    like = model.embeddings()
    count, shape = settings.samples, (2, len(tokens), model.config.embedding_dim)
    offset = torch.rand((), generator=randomness.generator(settings.seed, "time", id_), dtype=torch.float64)
    times = (offset + torch.arange(count)) / count
    scored = torch.arange(len(tokens), device=like.device) >= known
    batches: list[dict[str, Tensor]] = []
    for batch in torch.arange(count).split(settings.rows):
        generators = [randomness.generator(settings.seed, "diffusion", id_, draw) for draw in batch.tolist()]
        noise = torch.stack([torch.randn(shape, generator=g) for g in generators], dim=1).to(like)
        terms = model.terms(
            torch.tensor([tokens] * len(batch), device=like.device),
            scored.expand(len(batch), -1),
            times[batch].to(like),
            noise,
            range(len(batch)),
        )
        batches.append({name: -value.double().sum(1).cpu() for name, value in terms.items()})
    return {name: torch.cat([terms_of_batch[name] for terms_of_batch in batches]) for name in batches[0]}
