"""What the verdicts on a task's records say, and how sure that is; shares are fractions of 1."""

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Protocol

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


class Graded(Protocol):
    """What the figures need of a verdict, a new one or one read from a file (see `grading.Verdict`)."""

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


def score(verdicts: Sequence[Graded], chance: float) -> Scores:
    """The figures of a task's verdicts. Raises ValueError for a chance outside [0, 1)."""
    parsed = [verdict for verdict in verdicts if verdict.parsed]
    accuracy = share(sum(verdict.correct for verdict in verdicts), len(verdicts))
    value, low, high = (correct_for_chance(end, chance) for end in (accuracy.value, accuracy.low, accuracy.high))
    return Scores(
        accuracy,
        share(len(parsed), len(verdicts)),
        share(sum(verdict.agrees for verdict in parsed), len(parsed)),
        chance,
        Share(value, low, high, accuracy.count),
    )


def tasks_average(scores: Sequence[Scores]) -> float:
    """The plain mean of the tasks' accuracies, whatever their numbers of records. Raises ValueError without tasks."""
    if not scores:
        raise ValueError("there is no average of no tasks")
    return fmean(one.accuracy.value for one in scores)


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
