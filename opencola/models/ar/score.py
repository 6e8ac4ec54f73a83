"""Log-probabilities of texts under an AR model: exact."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from opencola.kernels.choice import invariant
from opencola.layers.cache import whole_steps
from opencola.models.ar.network import ARNetwork
from opencola.models.exact import exact_score, last
from opencola.models.inputs import checked_prompts, checked_texts
from opencola.models.language_model import Score
from opencola.ranges import Count, check


@dataclass(frozen=True)
class ARScoring:
    """How texts are scored: exactly."""

    rows: Count = 32
    """Number of texts to compute at a time: memory; no figure depends on it."""

    def __post_init__(self) -> None:
        check(self)

    @classmethod
    def quick(cls) -> "ARScoring":
        """The same: it is exact."""
        return cls()

    @property
    def texts_at_a_time(self) -> int:
        """How many to score together."""
        return self.rows


@invariant
@torch.no_grad()
def score(
    model: ARNetwork,
    prompts: Sequence[Sequence[int]],
    continuations: Sequence[Sequence[int]],
    settings: ARScoring,
    *,
    pad_id: int = 0,
    ids: Sequence[int] | None = None,
) -> Score:
    """log p(continuation | prompt) of token ids, with the end-of-text id where that is meant to be scored.

    Sums are in float64; nothing is drawn, so that ids change nothing, nor does pad_id, which is never seen. What
    comes out does not depend on what else is scored, but for rounding. Raises UserError for empty continuations
    and ids beyond the vocabulary.
    """
    texts = checked_texts(prompts, continuations, model.config.vocab_size)

    def features(places: list[int], width: int) -> Tensor:
        return features_of(model, [texts[place] for place in places], width)

    return exact_score(texts, continuations, features, model.project, settings.rows, "autoregressive")


def features_of(model: ARNetwork, texts: Sequence[Sequence[int]], width: int) -> Tensor:
    """What the tokens of texts are predicted from: (B, width, D)."""
    return model.features(model.padded([[model.config.bos_id, *text[:-1]] for text in texts], width, 0))


@invariant
@torch.no_grad()
def log_probabilities(model: ARNetwork, text: Sequence[int], count: int) -> Tensor:
    """log p (count, V), float64, of what may stand in the place of each of the last `count` tokens of a text."""
    (checked,) = checked_prompts([text], model.config.vocab_size)
    return last(features_of(model, [checked], whole_steps(len(text)))[0, : len(text)], count, model.project)
