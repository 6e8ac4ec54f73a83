"""Plaid: diffusion on learned embeddings of tokens, trained on its variational bound (Gulrajani & Hashimoto 2023)."""

import math

import torch
from torch import Tensor

from opencola.data.batch import Batch, divisor
from opencola.layers import randomness
from opencola.models.bounds import no_log_probabilities
from opencola.models.language_model import Loss
from opencola.models.plaid import generate as generation
from opencola.models.plaid import score as scoring
from opencola.models.plaid.network import PlaidNetwork

# Multiples of either, without their whole parts, are spread evenly over [0, 1), and pairs of both over the square.
GOLDEN, SILVER = (math.sqrt(5) - 1) / 2, math.sqrt(2) - 1


class Plaid(PlaidNetwork):
    """Embeddings, noise schedule and trunk, trained, writing and scoring."""

    begin = generation.begin
    cache_bytes = generation.cache_bytes
    log_probabilities = no_log_probabilities
    generate = generation.generate
    score = scoring.score

    def loss(self, batch: Batch) -> Loss:
        """The variational bound, reconstruction + prior KL + diffusion, in nats per scored token (§2)."""
        scored = batch.is_scored()
        like = self.embeddings()
        # times of consecutive ids are spread evenly: a sequence's is its own, whatever it is batched with
        offset = torch.rand((), generator=randomness.generator(batch.seed, "time"), dtype=torch.float64)
        t = ((offset + batch.ids.cpu().double() * GOLDEN) % 1).to(like)
        row = batch.tokens.shape[1], self.config.embedding_dim
        noise = randomness.normal((2, *row), batch.seed, "diffusion", batch.ids).transpose(0, 1).to(like)
        values = self.terms(batch.tokens, scored, t, noise, self.conditioned(batch.ids), batch.documents)
        tokens = (batch.counts or self.counts(batch))["tokens"]
        terms = {name: value.sum() / divisor(tokens) for name, value in values.items()}
        ends = {f"gamma_{end}": self.schedule.gamma(like.new_tensor(float(end))).detach() for end in (0, 1)}
        return Loss(sum(terms.values(), start=like.new_zeros(())), terms, ends, dict.fromkeys(terms, tokens))

    def conditioned(self, ids: Tensor) -> list[int]:
        """Places of the sequences whose estimate sees a first one.

        Of every sequence it is known without a draw, so that the number of operations does not depend on one.
        """
        return [place for place, i in enumerate(ids.tolist()) if i * SILVER % 1 < self.config.self_conditioning]

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Scored tokens."""
        return {"tokens": batch.is_scored().sum()}

    def learning_rate_ratios(self) -> dict[str, float]:
        """The schedule learns slowly: at the full rate Adam drives gamma(1) far beyond where the bound gains."""
        shape = ("log_line", "log_weight", "log_steepness", "centre")
        return {f"schedule.{name}": 0.1 for name in ("start", *shape)} | {"schedule.log_span": 0.01}
