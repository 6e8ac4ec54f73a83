"""All statistics of evaluations: shares, means, differences, and how sure they are; shares are fractions of 1.

Intervals are of 95 %. Those of shares are Wilson's, which take cases for independent. Those of ratios of sums, such as
nats per token, come from the spread over sequences, texts or samples, which are independent where their tokens are not.
"""

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Protocol

import numpy as np
from torch import Tensor

Z = 1.959964
"""Standard errors on either side of a value in its 95 % interval."""


@dataclass(frozen=True)
class Share:
    """A share `value` of `count` cases, with its 95 % interval from `low` to `high`; fractions of 1."""

    value: float
    low: float
    high: float
    count: int


def wilson(hits: int, total: int, z: float = Z) -> tuple[float, float]:
    """Wilson's score interval for a share of `hits` in `total` cases (95 % by default); (0, 1) without cases."""
    if total == 0:
        return 0.0, 1.0
    share, square = hits / total, z * z / total
    centre = (share + square / 2) / (1 + square)
    radius = z / (1 + square) * math.sqrt(share * (1 - share) / total + square / (4 * total))
    return max(0.0, centre - radius), min(1.0, centre + radius)


def share(hits: int, total: int) -> Share:
    """The share of `hits` in `total` cases with its interval; 0 without cases."""
    return Share(hits / total if total else 0.0, *wilson(hits, total), total)


@dataclass(frozen=True)
class Entry:
    """A figure: its `name`, what it says, its unit ("" for pure numbers), and how many cases (`counted`) it is of.

    `low`, `high`: 95 % interval, where the figure has one. `at`: noise time or deviation, or number of the channel or
    axis.
    """

    name: str
    label: str
    unit: str
    value: float
    count: int
    counted: str
    low: float | None = None
    high: float | None = None
    at: float | None = None


def share_entry(name: str, label: str, of_all: Share, counted: str, at: float | None = None) -> Entry:
    """A share as a figure."""
    return Entry(name, label, "share", of_all.value, of_all.count, counted, of_all.low, of_all.high, at)


def mean_entry(name: str, label: str, unit: str, sums: Tensor, counts: Tensor, counted: str) -> Entry:
    """The ratio of sums as a figure, with its interval where there are two sequences or more (see `ratio`)."""
    value, error = ratio(sums, counts)
    low, high = (None, None) if error is None else (value - Z * error, value + Z * error)
    return Entry(name, label, unit, value, int(counts.sum()), counted, low, high)


def ratio(sums: Tensor, counts: Tensor) -> tuple[float, float | None]:
    """Sum / count over all sequences (B,) and its standard error, sequences being independent; None for only one."""
    value = float(sums.sum() / counts.sum())
    if len(sums) < 2:
        return value, None
    square = (sums - value * counts).square().sum() * len(sums) / (len(sums) - 1)
    return value, float(square.sqrt() / counts.sum())


def ratio_difference(
    first: tuple[np.ndarray, np.ndarray], second: tuple[np.ndarray, np.ndarray]
) -> tuple[float, float]:
    """The first's sum / count over the same texts (B,) less the second's, and its standard error.

    first, second: sums and counts of each text. The error is the delta method's, which keeps what both share in a text.
    """
    rates, deviations = [], []
    for sums, counts in (first, second):
        rate = sums.sum() / counts.sum()
        rates.append(rate)
        deviations.append((sums - rate * counts) / counts.sum())
    num_texts = len(first[0])
    square = np.square(deviations[0] - deviations[1]).sum() * num_texts / (num_texts - 1)
    return float(rates[0] - rates[1]), float(square) ** 0.5


def standard_error(values: Tensor) -> float:
    """Of the mean of independent values (B,), two or more."""
    return float(values.std() / len(values) ** 0.5)


def perplexity(nats: float) -> float:
    """exp of the mean -log p of a token, as far as a float goes."""
    return math.exp(min(nats, 700))


def bits_per_token(log_p: Tensor, num_tokens: int) -> tuple[float, float]:
    """-log2 p of a token, of texts of log-probabilities (B,) in nats and so many tokens together, and its standard
    error over texts of like length."""
    count = num_tokens * math.log(2)
    return -log_p.sum().item() / count, (log_p.std() * len(log_p) ** 0.5 / count).item()


class Graded(Protocol):
    """What the figures need of a grade, a new one or one read from a file (see `grading.Grade`)."""

    @property
    def correct(self) -> bool:
        """By the task's rule."""

    @property
    def parsed(self) -> bool:
        """Maps to an option; without options: holds a word."""

    @property
    def agrees(self) -> bool:
        """Right once formatting is forgiven."""


@dataclass(frozen=True)
class Scores:
    """A task's figures, with Wilson's 95 % intervals."""

    accuracy: Share
    """Of all records: the protocol's figure."""
    parse_rate: Share
    """Answers that map to an option (without options: that hold a word), of all records."""
    accuracy_given_parse: Share
    """Of the parsed answers, those that are correct or map to the right option: what is known once formatting is
    forgiven."""
    chance: float
    """Accuracy of picking an option blindly."""
    chance_corrected: Share
    """(accuracy - chance) / (1 - chance), its interval likewise: 0 at chance, 1 at best, negative below chance."""


@dataclass(frozen=True)
class Paired:
    """Two models on the same records: McNemar's exact test."""

    both: int
    only_first: int
    only_second: int
    neither: int
    p_value: float
    """Two-sided: how probable a split of the records that one model alone got right, as uneven as this one or more, is
    if each model is as likely to be that one."""

    @property
    def difference(self) -> float:
        """Accuracy of the first model less that of the second; 0 without records."""
        count = self.both + self.only_first + self.only_second + self.neither
        return (self.only_first - self.only_second) / count if count else 0.0


def correct_for_chance(accuracy: float, chance: float) -> float:
    """(accuracy - chance) / (1 - chance). Raises ValueError for a chance outside [0, 1)."""
    if not 0 <= chance < 1:
        raise ValueError(f"chance is {chance}; it must be at least 0 and less than 1")
    return (accuracy - chance) / (1 - chance)


def score(grades: Sequence[Graded], chance: float) -> Scores:
    """The figures of a task's grades. Raises ValueError for a chance outside [0, 1)."""
    parsed = [grade for grade in grades if grade.parsed]
    accuracy = share(sum(grade.correct for grade in grades), len(grades))
    value, low, high = (correct_for_chance(end, chance) for end in (accuracy.value, accuracy.low, accuracy.high))
    return Scores(
        accuracy,
        share(len(parsed), len(grades)),
        share(sum(grade.agrees for grade in parsed), len(parsed)),
        chance,
        Share(value, low, high, accuracy.count),
    )


def tasks_average(accuracies: Sequence[Share]) -> float:
    """The plain mean of the tasks' accuracies, whatever their numbers of records. Raises ValueError without tasks."""
    if not accuracies:
        raise ValueError("there is no average of no tasks")
    return fmean(accuracy.value for accuracy in accuracies)


def compare(first: Mapping[Hashable, bool], second: Mapping[Hashable, bool]) -> Paired:
    """Compare two models by what each got right, by record id.

    The p-value is that of McNemar's exact test (a two-sided sign test on the records that the models differ on),
    computed in whole numbers; 1 where they differ on none. Raises ValueError unless both have the same records.
    """
    if first.keys() != second.keys():
        odd = sorted(map(str, first.keys() ^ second.keys()))
        raise ValueError(f"only one of the models has records {', '.join(odd[:5])}{' ...' * (len(odd) > 5)}")
    only_first = sum(right and not second[name] for name, right in first.items())
    only_second = sum(right and not first[name] for name, right in second.items())
    both = sum(right and second[name] for name, right in first.items())
    differing = only_first + only_second
    tail = sum(math.comb(differing, k) for k in range(min(only_first, only_second) + 1))
    p_value = min(1.0, 2 * tail / 2**differing)
    return Paired(both, only_first, only_second, len(first) - both - differing, p_value)
