"""A language of 3 tokens and texts of 3, small enough to enumerate, and predictors of its masked tokens."""

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

SIZE, LENGTH, MASK = 3, 3, 3  # tokens of the vocabulary and of a text; the mask's id
TEXTS = torch.tensor(list(itertools.product(range(SIZE), repeat=LENGTH)))
MASKS = torch.tensor(list(itertools.product([False, True], repeat=LENGTH)))[1:]
ORDERS = list(itertools.permutations(range(LENGTH)))


def language(seed: int) -> Tensor:
    """A random joint distribution (27,) of TEXTS."""
    return (1.5 * torch.randn(len(TEXTS), generator=torch.Generator().manual_seed(seed)).double()).softmax(0)


class Exact:
    """The conditionals of a joint distribution, by summing over all texts that agree with what is not masked."""

    def __init__(self, joint: Tensor) -> None:
        self.joint = joint

    def __call__(self, tokens: Tensor) -> Tensor:
        """Log-probabilities (B, L, V) of the tokens at every place of tokens (B, L)."""
        agrees = ((tokens[:, None] == TEXTS) | (tokens[:, None] == MASK)).all(-1)
        weights = self.joint * agrees
        here = (TEXTS[:, :, None] == torch.arange(SIZE)).double()
        found = torch.einsum("bt,tlv->blv", weights, here)
        return (found / found.sum(-1, keepdim=True)).log()


class Arbitrary:
    """Random log-probabilities for every masked text: conditionals of no joint distribution."""

    def __init__(self, seed: int) -> None:
        shape = (*[SIZE + 1] * LENGTH, LENGTH, SIZE)
        logits = 1.5 * torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double()
        self.table = logits.log_softmax(-1)

    def __call__(self, tokens: Tensor) -> Tensor:
        """As `Exact`."""
        return self.table[tuple(tokens.T)]


def by_order(predict: "Exact | Arbitrary") -> Iterator[Tensor]:
    """Log-probabilities (27,) of TEXTS, written in each order of the places, a token a step."""
    for order in ORDERS:
        tokens, total = torch.full_like(TEXTS, MASK), torch.zeros(len(TEXTS)).double()
        for place in order:
            total = total + predict(tokens)[:, place].gather(-1, TEXTS[:, place, None])[:, 0]
            tokens[:, place] = TEXTS[:, place]
        yield total
