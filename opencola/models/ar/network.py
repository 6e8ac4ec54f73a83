"""The network of the autoregressive baseline: embedding, LLaMA, head."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from opencola.errors import UserError
from opencola.layers.cache import KVCache
from opencola.layers.llama import Llama, LlamaConfig
from opencola.layers.operations import Linear, linear
from opencola.layers.packed import block_causal
from opencola.ranges import Count, Size, check


@dataclass(frozen=True)
class ARConfig:
    """An autoregressive language model."""

    vocab_size: Count = 1024
    """Number of tokens in the vocabulary; set from the tokenizer when training."""
    trunk: LlamaConfig = field(default_factory=LlamaConfig)
    """Sizes of the transformer."""
    tied: bool = False
    """Use the embedding as the output matrix, too."""
    bos_id: Size = 0
    """Token that the first token of a text is predicted from, such as the end-of-text token of the text before."""

    def __post_init__(self) -> None:
        check(self)
        if self.bos_id >= self.vocab_size:
            raise UserError(f"bos_id {self.bos_id} is outside 0..{self.vocab_size - 1}, the vocabulary")


class ARNetwork(nn.Module):
    """p(x) = prod_i p(x_i | bos, x_1 .. x_(i-1)). Shapes: tokens (B, L), logits (B, L, V)."""

    def __init__(self, config: ARConfig) -> None:
        super().__init__()
        self.config = config
        width = config.trunk.width
        self.embedding = nn.Embedding(config.vocab_size, width)
        self.trunk = Llama(config.trunk)
        self.head = None if config.tied else Linear(width, config.vocab_size, bias=False)
        # as the output matrix, an embedding of unit size would start training with logits of size sqrt(width)
        nn.init.normal_(self.embedding.weight, std=0.02 if config.tied else 1.0)
        if self.head is not None:
            nn.init.normal_(self.head.weight, std=0.02)

    @property
    def vocab_size(self) -> int:
        """Tokens."""
        return self.config.vocab_size

    def features(self, inputs: Tensor, documents: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """Normalised features (B, R, D) of inputs (B, R) int64, each seeing itself and those before it.

        documents (B, R) int64: each input's, beyond which it sees nothing; cache: holds what stands before the inputs.
        """
        rows = inputs.shape[1]
        h = self.embedding(inputs)
        if cache is not None:
            return self.trunk(h, cache.positions(rows), cache.attend(rows, 1))
        return self.trunk(h, torch.arange(rows, device=inputs.device), block_causal(rows, 1, documents))

    def project(self, h: Tensor) -> Tensor:
        """Logits (..., V) of features h (..., D)."""
        weight = self.output
        return linear(h.to(weight.dtype), weight)

    @property
    def output(self) -> Tensor:
        """The matrix (V, D) that makes logits of features."""
        return self.embedding.weight if self.head is None else self.head.weight

    def logits(self, inputs: Tensor, documents: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """Logits (B, R, V) of the token that follows each of inputs (B, R); the rest as in `features`."""
        return self.project(self.features(inputs, documents, cache))

    def padded(self, inputs: Sequence[list[int]], width: int, pad_id: int) -> Tensor:
        """Inputs of different lengths as rows (B, width), filled up behind."""
        rows = [row + [pad_id] * (width - len(row)) for row in inputs]
        return torch.tensor(rows, device=self.embedding.weight.device)
