"""LLaDA, the baseline that writes by unmasking: a bidirectional transformer that predicts masked tokens.

arXiv 2502.09992 (LLaDA), sections 2.1-2.4. L tokens a sequence; each is masked with probability t, and the loss on the
masked ones, weighted by 1 / t, bounds -log p(x) from above. Its maths are functions of a predictor or of its logits, so
that they can be tested with a predictor that is known to be exact.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opencola.layers import randomness
from opencola.layers.attention import masked
from opencola.layers.llama import Llama, LlamaConfig
from opencola.layers.masks import same_document
from opencola.layers.transformer import Linear, initialise
from opencola.models import llada_generation, llada_scoring
from opencola.models.language_model import Loss
from opencola.text.corpus import Batch


@dataclass(frozen=True)
class LLaDAConfig:
    """A LLaDA."""

    vocab_size: int = 1024
    """Tokens; set from the tokenizer when training. The embedding has one row more, the [MASK] input."""
    trunk: LlamaConfig = field(default_factory=LlamaConfig)


class LLaDA(nn.Module):
    """The mask predictor p(x_i | x_t), from an embedding, a transformer without a causal mask, and a head."""

    def __init__(self, config: LLaDAConfig) -> None:
        super().__init__()
        self.config = config
        width = config.trunk.width
        self.embedding = nn.Embedding(config.vocab_size + 1, width)
        self.trunk = Llama(config.trunk)
        self.head = Linear(width, config.vocab_size, bias=False)  # [MASK] is never predicted
        nn.init.normal_(self.embedding.weight)
        initialise(self, lambda linear: linear.in_features**-0.5)

    generate = llada_generation.generate
    score = llada_scoring.score

    @property
    def vocab_size(self) -> int:
        """Tokens."""
        return self.config.vocab_size

    @property
    def mask_id(self) -> int:
        """Input id of [MASK], the embedding's extra row."""
        return self.config.vocab_size

    def forward(self, tokens: Tensor, seen: Tensor | None = None) -> Tensor:
        """Logits (B, R, V) of the token at every place of tokens (B, R), some of them [MASK].

        seen: bool, broadcastable to (B, 1, R, R), true where a row sees another; all see all when not given.
        """
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        logits: Tensor = self.head(self.trunk(self.embedding(tokens), positions, masked(seen)))
        return logits

    def within(self, lengths: Tensor) -> Callable[[Tensor], Tensor]:
        """The predictor of texts padded at their ends: of each only the first lengths (B,) are seen.

        It takes tokens (B, R), or several such batches one after another, and gives logits (B, R, V).
        """

        def predict(tokens: Tensor) -> Tensor:
            places = torch.arange(tokens.shape[1], device=tokens.device)
            seen = places < lengths.repeat(len(tokens) // len(lengths))[:, None]
            return self(tokens, seen[:, None, None, :])

        return predict

    def loss(self, batch: Batch) -> Loss:
        """Mean over the scored tokens of the weighted cross-entropy: a bound on -log p, in nats per token.

        Tokens that are not scored are never masked, as prompts in section 2.3. metrics: the predictor's accuracy.
        """
        tokens, seen = batch.tokens, None
        t, hidden = draw_mask(batch)
        if batch.documents is not None:
            seen = same_document(batch.documents)
        logits = self(tokens.masked_fill(hidden, self.mask_id), seen)
        losses = weighted_losses(logits, tokens, hidden, t)
        counts = batch.counts or self.counts(batch)
        total = losses.sum() / counts["tokens"].clamp(min=1)
        right = (logits.argmax(-1) == tokens) & hidden
        accuracy = right.sum() / hidden.sum().clamp(min=1)
        return Loss(total, {"cross_entropy": total}, {"masked_accuracy": accuracy.to(total.dtype)})

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


def weighted_losses(logits: Tensor, tokens: Tensor, hidden: Tensor, t: Tensor) -> Tensor:
    """Cross-entropy / t of the masked tokens, 0 of the others: (B, L), in nats (equation 3, without its 1 / L).

    logits (B, L, V) given the masked text, tokens (B, L) true, hidden (B, L) bool, t (B, 1) the masking probability.
    The expectation of the sum over L, over t and masks, is at least -log p(tokens) (equation 4); no less for the exact
    conditionals, where it is equal.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    losses = F.cross_entropy(wide.flatten(0, 1), tokens.flatten(), reduction="none").view(tokens.shape)
    return torch.where(hidden, losses, 0) / t
