"""What a load says of a server: times, throughput, and what went wrong."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from opencola.serve.load import Outcome

PERCENTILES = (50, 90, 99)
REFUSED = 429


@dataclass(frozen=True)
class Figures:
    """Of all requests of a load that have ended."""

    requests: int
    """Number of these."""
    whole: int
    """Number of those whose text came to its end."""
    refused: int
    """Number of those that the server was too full for (429)."""
    errors: dict[str, int]
    """Number of those that failed otherwise, by what went wrong."""
    seconds: float
    requests_per_second: float
    """Of those that are whole."""
    tokens: int
    """Written ones."""
    tokens_per_second: float
    first_block: dict[str, float]
    """Seconds to it; percentiles, as all of these: {"p50": ...}. Of requests that are whole, as all of these."""
    between_blocks: dict[str, float]
    latency: dict[str, float]


def figures(outcomes: Sequence[Outcome], seconds: float) -> Figures:
    """Of outcomes, and the time that they took in all."""
    whole = [outcome for outcome in outcomes if not outcome.error]
    failed = [outcome for outcome in outcomes if outcome.error and outcome.status != REFUSED]
    tokens = sum(outcome.tokens for outcome in outcomes)
    return Figures(
        len(outcomes),
        len(whole),
        len(outcomes) - len(whole) - len(failed),
        dict(Counter(kind(outcome) for outcome in failed)),
        seconds,
        len(whole) / seconds,
        tokens,
        tokens / seconds,
        percentiles([outcome.first_block for outcome in whole if outcome.first_block is not None]),
        percentiles([gap for outcome in whole for gap in outcome.between]),
        percentiles([outcome.latency for outcome in whole]),
    )


def kind(outcome: Outcome) -> str:
    """What went wrong: the status of an answer that is an error, else in words."""
    return outcome.error if outcome.status in (0, 200) else str(outcome.status)


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """Of seconds, if there are any."""
    if not values:
        return {}
    return {f"p{percent}": float(np.percentile(values, percent)) for percent in PERCENTILES}


def to_record(outcome: Outcome) -> dict[str, Any]:
    """An outcome for a file."""
    return {"record": "request", **asdict(outcome)}
