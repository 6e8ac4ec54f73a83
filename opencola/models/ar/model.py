"""The autoregressive baseline: a LLaMA that predicts each token from those before it."""

import torch.nn.functional as F
from torch import Tensor

from opencola.data.batch import Batch, divisor
from opencola.layers.operations import linear_cross_entropy
from opencola.models.ar import generate as generation
from opencola.models.ar import score as scoring
from opencola.models.ar.network import ARNetwork
from opencola.models.language_model import Loss


class AR(ARNetwork):
    """p(x) = prod_i p(x_i | bos, x_1 .. x_(i-1)), trained, writing and scoring."""

    begin = generation.begin
    cache_bytes = generation.cache_bytes
    log_probabilities = scoring.log_probabilities
    generate = generation.generate
    score = scoring.score

    def loss(self, batch: Batch) -> Loss:
        """Mean cross-entropy of the scored tokens in nats, the first of a text (or document) included."""
        tokens, documents = batch.tokens, batch.documents
        counts = batch.counts or self.counts(batch)
        inputs = F.pad(tokens[:, :-1], (1, 0), value=self.config.bos_id)
        if documents is not None:
            starts = F.pad(documents[:, 1:] != documents[:, :-1], (1, 0))
            inputs = inputs.masked_fill(starts, self.config.bos_id)
        # a row predicts a token of its own document, so it is numbered as that token
        h = self.features(inputs, documents)
        losses, best = linear_cross_entropy(h, self.output, None, tokens)
        right = (best == tokens).to(losses.dtype)
        accuracy = right.mean()
        if batch.scored is not None:
            losses = losses * batch.scored
            accuracy = (right * batch.scored).sum() / batch.scored.sum().clamp(min=1)
        total = losses.sum() / divisor(counts["tokens"])
        own = {"cross_entropy": counts["tokens"], "token_accuracy": batch.is_scored().sum()}
        return Loss(total, {"cross_entropy": total}, {"token_accuracy": accuracy}, own)

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Scored tokens."""
        return {"tokens": batch.is_scored().sum()}

    def learning_rate_ratios(self) -> dict[str, float]:
        """All parameters learn at the same rate."""
        return {}
