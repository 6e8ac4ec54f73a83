"""What every model family offers: a loss to train on and, for whole models, generation and scores."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from opencola.data.batch import Batch
from opencola.errors import NotFiniteError
from opencola.models.stopping import StopRule, Text, TokenBlock
from opencola.models.writing import Writing


@dataclass(frozen=True)
class Loss:
    """A training loss: `total` is the sum of the weighted `terms`; `metrics` are detached figures to report.

    counts: what terms and metrics are means over, by their names; those of all batches of a size that are left out are
    over equally many things. Of a term it is what the loss was divided by, of a metric what this very part has.
    """

    total: Tensor
    terms: dict[str, Tensor]
    metrics: dict[str, Tensor]
    counts: dict[str, Tensor] = field(default_factory=dict)

    def detach(self) -> "Loss":
        """The same figures, free of the graph that they came from."""
        terms, metrics = ({name: value.detach() for name, value in d.items()} for d in (self.terms, self.metrics))
        return Loss(self.total.detach(), terms, metrics, self.counts)

    @classmethod
    def mean(cls, losses: Sequence["Loss"]) -> "Loss":
        """Of the parts of a batch, whose terms are divided by common counts already; metrics weigh their own."""

        def of(values: Iterable[Tensor]) -> Tensor:
            return torch.stack(list(values)).mean(0)

        def weighted(name: str) -> Tensor:
            values = torch.stack([loss.metrics[name] for loss in losses])
            shares = torch.stack([loss.counts.get(name, torch.ones(())) for loss in losses]).to(values)
            return torch.tensordot(shares, values, 1) / shares.sum().clamp(min=1)

        terms = {name: of(loss.terms[name] for loss in losses) for name in losses[0].terms}
        metrics = {name: weighted(name) for name in losses[0].metrics}
        counts = {name: of(loss.counts[name].double() for loss in losses) for name in losses[0].counts}
        return cls(of(loss.total for loss in losses), terms, metrics, counts)


@dataclass(frozen=True)
class Sample:
    """What a model in training shows of itself."""

    kind: str
    """`continuation` or `reconstruction`."""
    prompt: str
    """The text that it was given."""
    text: str
    """What it made of that."""
    figures: dict[str, float]
    """How good that is, by name."""


class Trainable(Protocol):
    """What the training loop needs of a model beside being a module."""

    def loss(self, batch: Batch) -> Loss:
        """Loss of a batch; draws depend on (batch.seed, purpose, batch.ids) alone."""
        ...

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """What the loss's means are over, where that is not the same for all batches of a size: scalars, by name.

        Known without the network; `loss` divides by `batch.counts` if given, so that parts of a batch, on several
        processes or one after another, have the gradient of the whole.
        """
        ...

    def learning_rate_ratios(self) -> dict[str, float]:
        """Factors on the learning rate by parameter-name prefix; others have 1."""
        ...


@dataclass(frozen=True)
class Score:
    """Log-probabilities of B continuations, in nats."""

    total: Tensor
    """(B,) float64."""
    standard_error: Tensor
    """(B,) of the total, from what was drawn; nan where there is one sample, 0 where nothing is drawn."""
    num_tokens: Tensor
    """(B,) int64: tokens scored."""
    kind: Literal["exact", "bound", "estimate"]
    """`bound`: on average at most the truth, as far as the solver is exact. `estimate`: neither."""
    estimator: str
    """Which estimator, samples, solver and so on: what the figures must be labelled with."""
    parts: dict[str, Tensor]
    """(B,) each: terms, by name."""
    others: dict[str, Tensor] = field(default_factory=dict)
    """(B,) each: further figures of the same draws, by name, such as another estimate and its standard error."""
    blocks: Sequence[dict[str, Tensor]] = ()
    """Of every text (or none, where there are no blocks): the parts (G,) by block, by name."""

    def perplexity(self) -> Tensor:
        """exp(-total / tokens), of every text: (B,)."""
        return torch.exp(-self.total / self.num_tokens)

    def check_finite(self, names: Sequence[str]) -> None:
        """Raise NotFiniteError for the first total that is not finite, with the text's name and its first bad part."""
        for place, (name, total) in enumerate(zip(names, self.total.tolist(), strict=True)):
            if not math.isfinite(total):
                parts = {part: values[place].item() for part, values in self.parts.items()}
                bad = next((f", as {part} is {value}" for part, value in parts.items() if not math.isfinite(value)), "")
                raise NotFiniteError(
                    f"{name}: its log-probability is {total}{bad}: the weights are damaged or diverged, or a setting "
                    "is far beyond what they were made for"
                )


class LanguageModel(Trainable, Protocol):
    """A whole model: it is trained, writes, and scores. Token ids in and out; a tokenizer is the caller's."""

    @property
    def vocab_size(self) -> int:
        """Tokens that it knows."""
        ...

    def begin(self, texts: Sequence[Text], pad_id: int = 0) -> Writing:
        """Texts whose prompts are read, to be written side by side; arguments and errors as in `generate`.

        Their settings may differ in the fields that every family has (`Sampling`).
        """
        ...

    def cache_bytes(self, text: Text) -> int:
        """Bytes of memory that a text's caches take while it is written."""
        ...

    def log_probabilities(self, text: Sequence[int], count: int) -> Tensor:
        """log p (count, V), float64, of what may stand in the place of each of the last `count` tokens of a text.

        Raises UserError where the family has no exact ones, and for ids beyond the vocabulary.
        """
        ...

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Any,
        *,
        eos_ids: Sequence[int] = (),
        pad_id: int = 0,
        ids: Sequence[int] | None = None,
        stop: StopRule = ...,
    ) -> Iterator[list[TokenBlock]]:
        """Continue prompts, maybe empty ones, and yield new tokens of unfinished samples as they are ready.

        sampling: of the family's own class (`build.sampling_class`); eos_ids end a sample and are not given out;
        pad_id: what prompts are filled up with, where a family does that; ids: the samples' ids, which with
        the seed decide their draws (their places in the list when not given);
        stop(sample, new tokens) -> how many of these to keep, or None to go on. What a sample becomes does not depend
        on the others. Raises ValueError for prompts with ids beyond the vocabulary.
        """
        ...

    def score(
        self,
        prompts: Sequence[Sequence[int]],
        continuations: Sequence[Sequence[int]],
        settings: Any,
        *,
        pad_id: int = 0,
        ids: Sequence[int] | None = None,
    ) -> Score:
        """Log-probability of every continuation given its prompt, with the end-of-text id where that is to count.

        settings: of the family's own class (`build.scoring_class`); ids: decide the draws, as in `generate`. What comes
        out does not depend on what else is scored, but for rounding. Raises ValueError for empty continuations and ids
        beyond the vocabulary.
        """
        ...
