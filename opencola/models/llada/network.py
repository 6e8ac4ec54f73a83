"""The network of LLaDA: a bidirectional transformer that predicts masked tokens (arXiv 2502.09992)."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from opencola.layers.llama import Llama, LlamaConfig
from opencola.layers.operations import Linear
from opencola.layers.packed import block_causal
from opencola.layers.transformer import initialise
from opencola.ranges import Count, check


@dataclass(frozen=True)
class LLaDAConfig:
    """A LLaDA."""

    vocab_size: Count = 1024
    """Number of tokens in the vocabulary; set from the tokenizer when training. The embedding has one row more,
    [MASK]."""
    trunk: LlamaConfig = field(default_factory=LlamaConfig)

    def __post_init__(self) -> None:
        check(self)


class LLaDANetwork(nn.Module):
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

    @property
    def vocab_size(self) -> int:
        """Tokens."""
        return self.config.vocab_size

    @property
    def mask_id(self) -> int:
        """Input id of [MASK], the embedding's extra row."""
        return self.config.vocab_size

    def forward(self, tokens: Tensor, documents: Tensor | None = None) -> Tensor:
        """Logits (B, R, V) of the token at every place of tokens (B, R), some of them [MASK].

        documents (B, R) int64: each token's, beyond which it sees nothing; all see all when not given.
        """
        logits: Tensor = self.head(self.features(tokens, documents))
        return logits

    def features(self, tokens: Tensor, documents: Tensor | None = None) -> Tensor:
        """What the head makes logits of: (B, R, D); arguments as of a call."""
        rows = tokens.shape[1]
        positions = torch.arange(rows, device=tokens.device)
        return self.trunk(self.embedding(tokens), positions, block_causal(rows, rows, documents))

    def within(self, lengths: Tensor) -> Callable[[Tensor], Tensor]:
        """The predictor of texts padded at their ends: of each only the first lengths (B,) are seen.

        It takes tokens (B, R), or several such batches one after another, and gives logits (B, R, V).
        """

        shortest = int(lengths.min())

        def predict(tokens: Tensor) -> Tensor:
            if shortest == tokens.shape[1]:
                return self(tokens)
            places = torch.arange(tokens.shape[1], device=tokens.device)
            behind = places >= lengths.repeat(len(tokens) // len(lengths))[:, None]
            return self(tokens, behind.long())

        return predict
