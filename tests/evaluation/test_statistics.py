import math
import random

import numpy as np
import pytest
import torch
from scipy import stats

from opencola.evaluation.benchmarks.grading import grade
from opencola.evaluation.statistics import (
    Z,
    bits_per_token,
    compare,
    correct_for_chance,
    mean_entry,
    perplexity,
    ratio,
    ratio_difference,
    score,
    share,
    share_entry,
    standard_error,
    tasks_average,
)

CHOICES = ("is awake.", "is asleep.")


def test_scores_of_known_verdicts() -> None:
    """60 right, 20 wrong, 15 named the right one by letter only, 5 said nothing."""
    said = ["is asleep."] * 60 + ["is awake."] * 20 + ["B"] * 15 + [""] * 5
    scores = score([grade("exact", text, "is asleep.", CHOICES) for text in said], chance=0.5)
    assert (scores.accuracy.value, scores.accuracy.count) == (0.6, 100)
    assert (scores.parse_rate.value, scores.parse_rate.count) == (0.95, 100)
    assert (scores.accuracy_given_parse.value, scores.accuracy_given_parse.count) == (75 / 95, 95)
    assert scores.chance == 0.5
    for found, hits, count in (
        (scores.accuracy, 60, 100),
        (scores.parse_rate, 95, 100),
        (scores.accuracy_given_parse, 75, 95),
    ):
        interval = stats.binomtest(hits, count).proportion_ci(0.95, method="wilson")
        assert (found.low, found.high) == pytest.approx((interval.low, interval.high), abs=1e-7)
    corrected, accuracy = scores.chance_corrected, scores.accuracy
    assert corrected.value == pytest.approx(0.2) and corrected.count == 100
    assert (corrected.low, corrected.high) == pytest.approx((2 * accuracy.low - 1, 2 * accuracy.high - 1))


def test_an_unmapped_but_equal_answer_is_no_parse() -> None:
    said = [("Madrid", "madrid"), ("Oslo", "Rome")]
    scores = score([grade("option", text, answer, ["Oslo", "Rome"]) for text, answer in said], chance=0.5)
    assert scores.accuracy.value == scores.parse_rate.value == 0.5
    assert (scores.accuracy_given_parse.value, scores.accuracy_given_parse.count) == (0, 1)


def test_scores_of_nothing() -> None:
    scores = score([], chance=0.25)
    assert scores.accuracy.count == 0 and (scores.accuracy.low, scores.accuracy.high) == (0, 1)


@pytest.mark.parametrize(
    ("accuracy", "chance", "corrected"),
    [(0.25, 0.25, 0), (1, 0.25, 1), (0.625, 0.25, 0.5), (0, 0.5, -1), (0.3, 0, 0.3)],
)
def test_chance_correction(accuracy: float, chance: float, corrected: float) -> None:
    assert correct_for_chance(accuracy, chance) == pytest.approx(corrected)


@pytest.mark.parametrize("chance", [1.0, -0.1])
def test_a_chance_that_is_none_is_refused(chance: float) -> None:
    with pytest.raises(ValueError, match="it must be at least 0 and less than 1"):
        correct_for_chance(0.5, chance)
    with pytest.raises(ValueError, match="it must be at least 0 and less than 1"):
        score([], chance)


def test_the_average_counts_tasks_not_records() -> None:
    one = score([grade("exact", "a", "a")], 0.0)
    many = score([grade("exact", "a", "b")] * 9, 0.0)
    assert tasks_average([one.accuracy, many.accuracy]) == 0.5
    with pytest.raises(ValueError, match="no tasks"):
        tasks_average([])


@pytest.mark.parametrize(("first", "second"), [(0, 0), (0, 1), (1, 0), (5, 5), (2, 9), (9, 2), (30, 12), (700, 801)])
def test_mcnemar_is_scipys_sign_test(first: int, second: int) -> None:
    pairs = [(True, False)] * first + [(False, True)] * second + [(True, True)] * 3 + [(False, False)] * 4
    random.Random(first).shuffle(pairs)
    names = [f"record {i}" for i in range(len(pairs))]
    one = {name: pair[0] for name, pair in zip(names, pairs, strict=True)}
    other = {name: pair[1] for name, pair in reversed(list(zip(names, pairs, strict=True)))}
    found = compare(one, other)
    assert (found.both, found.only_first, found.only_second, found.neither) == (3, first, second, 4)
    expected = stats.binomtest(first, first + second).pvalue if first + second else 1.0
    assert found.p_value == pytest.approx(expected, rel=1e-9)
    assert found.difference == pytest.approx((sum(one.values()) - sum(other.values())) / len(pairs))


def test_mcnemar_in_closed_form() -> None:
    """Six records, all to the first model: 2 / 2^6."""
    assert compare(dict.fromkeys(range(6), True), dict.fromkeys(range(6), False)).p_value == 1 / 32
    assert compare({}, {}).p_value == 1 and compare({}, {}).difference == 0


def test_other_records_cannot_be_compared() -> None:
    with pytest.raises(ValueError, match="only one of the models has records b, c$"):
        compare({"a": True, "b": True}, {"a": True, "c": False})
    with pytest.raises(ValueError, match="records 0, 1, 2, 3, 4 ...$"):
        compare(dict.fromkeys(range(9), True), {})


def test_a_ratio_and_its_error_are_the_means_of_equal_counts() -> None:
    sums, counts = torch.tensor([2.0, 4.0, 9.0]).double(), torch.ones(3).double()
    value, error = ratio(sums, counts)
    assert value == 5 and error == pytest.approx(float(sums.std() / math.sqrt(3)))
    assert ratio(sums[:1], counts[:1]) == (2, None)
    entry = mean_entry("nats", "said", "nats per token", sums, 2 * counts, "tokens")
    assert (entry.value, entry.count) == (2.5, 6)
    assert (entry.low, entry.high) == pytest.approx((2.5 - Z * error / 2, 2.5 + Z * error / 2))
    assert standard_error(sums) == pytest.approx(error)
    alone = mean_entry("nats", "said", "nats per token", sums[:1], counts[:1], "tokens")
    assert alone.low is alone.high is None


def test_the_error_of_a_ratio_is_the_spread_of_resampled_sequences() -> None:
    rng = np.random.default_rng(0)
    counts = rng.integers(5, 30, 400)
    sums = rng.binomial(counts, rng.beta(2, 5, 400))  # tokens of a sequence fail together
    picked = rng.integers(0, 400, (2000, 400))
    resampled = (sums[picked].sum(-1) / counts[picked].sum(-1)).std()
    error = ratio(torch.tensor(sums).double(), torch.tensor(counts).double())[1]
    assert error == pytest.approx(resampled, rel=0.06)
    assert error > 1.5 * (share(int(sums.sum()), int(counts.sum())).high - sums.sum() / counts.sum()) / Z


def test_a_difference_of_ratios_keeps_what_texts_share() -> None:
    rng = np.random.default_rng(1)
    tokens, common = rng.integers(5, 30, 300), rng.integers(0, 4, 300)
    first, second = (common + rng.integers(0, 2, 300), tokens), (common, tokens + 1)
    value, error = ratio_difference(first, second)
    assert value == pytest.approx(first[0].sum() / tokens.sum() - common.sum() / (tokens + 1).sum())
    picked = rng.integers(0, 300, (2000, 300))
    rates = [sums[picked].sum(-1) / counts[picked].sum(-1) for sums, counts in (first, second)]
    assert error == pytest.approx((rates[0] - rates[1]).std(), rel=0.06)
    nothing = (np.zeros(300, dtype=int), tokens)
    alone = ratio(torch.tensor(first[0]).double(), torch.tensor(tokens).double())
    assert ratio_difference(first, nothing) == pytest.approx(alone)
    assert ratio_difference(first, first) == (0, 0)


def test_bits_per_token_and_perplexity() -> None:
    log_p = -math.log(2) * torch.tensor([3.0, 5.0, 10.0], dtype=torch.float64)
    bits, error = bits_per_token(log_p, 6)
    assert bits == pytest.approx(3) and error == pytest.approx(np.std([3, 5, 10], ddof=1) / math.sqrt(3) / 2)
    assert perplexity(math.log(8)) == pytest.approx(8) and math.isfinite(perplexity(1e9))


def test_a_share_as_a_figure() -> None:
    entry, of_all = share_entry("hits", "said", share(3, 4), "tokens", at=0.5), share(3, 4)
    assert (entry.value, entry.low, entry.high, entry.count) == (0.75, of_all.low, of_all.high, 4)
    assert (entry.unit, entry.counted, entry.at) == ("share", "tokens", 0.5)
