"""What a server gives against what the model gives by itself: the same texts, in turns."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from opencola.models.language_model import LanguageModel
from opencola.models.sampling import Sampling
from opencola.models.text_stream import generate_text
from opencola.serve.load import Outcome
from opencola.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Batch:
    """What a model wrote by itself, side by side."""

    texts: list[str]
    tokens: int
    seconds: float
    first_block: float
    """Seconds to it."""


@dataclass(frozen=True)
class Generator:
    """A model without a server around it."""

    model: LanguageModel
    tokenizer: Tokenizer
    sampling: Sampling

    def write(self, prompts: Sequence[str]) -> Batch:
        """Continue prompts as one batch, each with the draws of a request of its own."""
        texts, tokens, first = [""] * len(prompts), 0, 0.0
        start = time.perf_counter()
        for pieces in generate_text(self.model, self.tokenizer, prompts, self.sampling, [0] * len(prompts)):
            first = first or time.perf_counter() - start
            for piece in pieces:
                texts[piece.sample] += piece.text
                tokens += len(piece.tokens)
        return Batch(texts, tokens, time.perf_counter() - start, first)


@dataclass
class Comparison:
    """Of rounds of as many texts as there are clients, and of texts that are alone: (server, model) of each."""

    rates: list[tuple[float, float]] = field(default_factory=list)
    """Tokens a second of each round."""
    alone: list[tuple[float, float]] = field(default_factory=list)
    """Seconds to the first block of each text."""
    texts: int = 0
    same: int = 0
    """Number of texts that are the same from both."""

    def add(self, outcomes: Sequence[Outcome], batch: Batch) -> None:
        """A round: outcomes in the order of its prompts, and what the model wrote."""
        start = min(outcome.start for outcome in outcomes)
        seconds = max(outcome.start + outcome.latency for outcome in outcomes) - start
        self.rates.append((sum(outcome.tokens for outcome in outcomes) / seconds, batch.tokens / batch.seconds))
        self._count(outcomes, batch)

    def add_alone(self, outcome: Outcome, batch: Batch) -> None:
        """A text that nobody else was written beside."""
        if outcome.first_block is not None:
            self.alone.append((outcome.first_block, batch.first_block))
        self._count([outcome], batch)

    def _count(self, outcomes: Sequence[Outcome], batch: Batch) -> None:
        self.texts += len(outcomes)
        self.same += sum(outcome.text == text for outcome, text in zip(outcomes, batch.texts, strict=True))

    def record(self) -> dict[str, Any]:
        """Throughput side by side, times to the first block alone, and the ratios, server over model: medians all."""
        return {
            "record": "against",
            "tokens_per_second": _sides(self.rates),
            "throughput_ratio": _ratio(self.rates),
            "first_block_alone": _sides(self.alone),
            "first_block_ratio": _ratio(self.alone),
            "rounds": len(self.rates),
            "texts": self.texts,
            "same_texts": self.same,
        }


def _sides(pairs: Sequence[tuple[float, float]]) -> dict[str, float]:
    sides = zip(("serve", "generate"), zip(*pairs, strict=True), strict=True) if pairs else ()
    return {side: statistics.median(values) for side, values in sides}


def _ratio(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Of what was measured right after each other, so that what else the machine does touches both."""
    ratios = [ours / theirs for ours, theirs in pairs if theirs]
    return statistics.median(ratios) if ratios else None
