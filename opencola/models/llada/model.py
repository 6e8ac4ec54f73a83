"""LLaDA, the baseline that writes by unmasking: a bidirectional transformer that predicts masked tokens.

arXiv 2502.09992 (LLaDA), sections 2.1-2.4. L tokens a sequence; each is masked with probability t, and the loss on the
masked ones, weighted by 1 / t, bounds -log p(x) from above. Its maths are functions of a predictor or of its logits, so
that they can be tested with a predictor that is known to be exact.
"""

import torch
from torch import Tensor

from opencola.data.batch import Batch, divisor
from opencola.layers import randomness
from opencola.models.bounds import no_log_probabilities
from opencola.models.language_model import Loss
from opencola.models.llada import generate as generation
from opencola.models.llada import score as scoring
from opencola.models.llada.network import LLaDANetwork


class LLaDA(LLaDANetwork):
    """The mask predictor, trained, writing and scoring."""

    begin = generation.begin
    cache_bytes = generation.cache_bytes
    log_probabilities = no_log_probabilities
    generate = generation.generate
    score = scoring.score

    def loss(self, batch: Batch) -> Loss:
        """Mean over the scored tokens of the weighted cross-entropy: a bound on -log p, in nats per token.

        Tokens that are not scored are never masked, as prompts in section 2.3. metrics: the predictor's accuracy.
        """
        tokens = batch.tokens
        t, hidden = draw_mask(batch)
        h = self.features(tokens.masked_fill(hidden, self.mask_id), batch.documents)
        cross_entropy, best = self.head.cross_entropy(h, tokens)
        losses = weighted_losses(cross_entropy, hidden, t)
        counts = batch.counts or self.counts(batch)
        total = losses.sum() / divisor(counts["tokens"])
        accuracy = ((best == tokens) & hidden).sum() / hidden.sum().clamp(min=1)
        own = {"cross_entropy": counts["tokens"], "masked_accuracy": hidden.sum()}
        return Loss(total, {"cross_entropy": total}, {"masked_accuracy": accuracy.to(total.dtype)}, own)

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Scored tokens, masked or not: the weights make up for those that are not."""
        return {"tokens": batch.is_scored().sum()}

    def learning_rate_ratios(self) -> dict[str, float]:
        """All parameters learn at the same rate."""
        return {}


def draw_mask(batch: Batch) -> tuple[Tensor, Tensor]:
    """Times t (B, 1), uniform in (0, 1], and which tokens (B, L) are masked: every scored one with probability t."""
    shape = batch.tokens.shape[1:]
    t = 1 - randomness.uniform((1,), batch.seed, "mask time", batch.ids)
    hidden = (randomness.uniform(shape, batch.seed, "mask", batch.ids) < t).to(batch.tokens.device)
    return t.to(batch.tokens.device), hidden if batch.scored is None else hidden & batch.scored


def weighted_losses(cross_entropy: Tensor, hidden: Tensor, t: Tensor) -> Tensor:
    """Cross-entropy / t of the masked tokens, 0 of the others: (B, L), in nats (equation 3, without its 1 / L).

    cross_entropy (B, L) given the masked text, hidden (B, L) bool, t (B, 1) the masking probability.
    The expectation of the sum over L, over t and masks, is at least -log p(tokens) (equation 4); no less for the exact
    conditionals, where it is equal.
    """
    return torch.where(hidden, cross_entropy, 0) / t
