"""The divergence curve against integrals in closed form and by quadrature, its features and clusters by brute force."""

import itertools
import math
import random
from collections import Counter

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.optimize import brentq

from opencola.evaluation.quality import mauve as module
from opencola.evaluation.quality.mauve import area, cluster, features, mauve
from opencola.worlds.stories import story


def stories(count: int, first: int = 0) -> list[str]:
    return [story(-1, first + i).text for i in range(count)]


def reversed_words(text: str) -> str:
    return " ".join(reversed(text.split()))


@pytest.mark.parametrize("scale", [1, 2, 5, 3.5])
def test_disjoint_histograms(scale: float) -> None:
    """There x^(1/c) + y^(1/c) = 1: a Beta integral."""
    exact = math.gamma(1 + scale) ** 2 / math.gamma(1 + 2 * scale)
    found = area(np.array([0.25, 0.75, 0, 0]), np.array([0, 0, 0.5, 0.5]), scale)
    assert found == pytest.approx(exact, rel=1e-4)
    assert scale != 5 or found == pytest.approx(1 / 252, rel=1e-4)


@pytest.mark.parametrize(("p", "q"), [(0.5, 0.2), (0.9, 0.1), (0.3, 0.0), (1.0, 0.6), (0.4, 0.39)])
def test_two_bins_by_quadrature(p: float, q: float) -> None:
    """Of y as a function of x, the mixture's first bin r solved for."""

    def divergence(one: float, r: float) -> float:
        return sum(a * math.log(a / b) for a, b in ((one, r), (1 - one, 1 - r)) if a > 0) if 0 < r < 1 else math.inf

    def side(one: float, r: float) -> float:
        return 1.0 if one == r else math.exp(-5 * divergence(one, r))

    def y(x: float) -> float:
        if x <= side(q, p):
            return 1.0
        return side(p, brentq(lambda r: side(q, r) - x, min(p, q), max(p, q), xtol=1e-14))

    exact = quad(y, 0, 1, points=[side(q, p)], limit=200)[0]
    first, second = np.array([p, 1 - p]), np.array([q, 1 - q])
    assert area(first, second) == pytest.approx(exact, abs=2e-6)
    assert area(second, first) == pytest.approx(exact, abs=2e-6)


def test_equal_sets_have_exactly_one() -> None:
    texts = stories(40)
    assert area(np.array([0.2, 0.8]), np.array([0.2, 0.8])) == 1
    assert mauve(texts, texts) == 1
    shuffled = texts[:]
    random.Random(0).shuffle(shuffled)
    assert mauve(texts, shuffled) == 1
    assert mauve(texts, texts * 2) == pytest.approx(1, abs=1e-12), "shares count, not numbers"


def test_repeated_texts_count_as_often_as_they_stand() -> None:
    one, other = stories(2)
    exact = area(np.array([0.75, 0.25]), np.array([0.5, 0.5]))
    assert mauve([one] * 30 + [other] * 10, [one] * 10 + [other] * 10) == pytest.approx(exact, abs=1e-12)
    assert exact < 0.99


def test_held_out_texts_are_close_and_others_far() -> None:
    first, second = stories(200), stories(200, 200)
    assert mauve(first, second) > 0.9
    assert mauve(first, [reversed_words(text) for text in second]) < 0.02
    assert mauve(first, second[:4] * 50) < 0.05, "few texts again and again"
    assert mauve(first, [text.split(". ")[0] + "." for text in second]) < 0.02, "first sentences alone"
    assert mauve(first, [""] * 200) < 0.02
    with pytest.raises(ValueError, match="a set of texts to compare is empty"):
        mauve(first, [])


def test_mixing_other_texts_in_lowers_it_step_by_step() -> None:
    first, second = stories(200), stories(200, 200)
    found = [mauve(first, [*second[n:], *map(reversed_words, second[:n])]) for n in range(0, 201, 40)]
    assert found == sorted(found, reverse=True)
    assert all(before - after > 0.005 for before, after in itertools.pairwise(found))


def test_no_order_counts() -> None:
    first, second = stories(60), [reversed_words(text) if i % 3 else text for i, text in enumerate(stories(60, 60))]
    found = mauve(first, second)
    assert 0.05 < found < 0.95
    assert mauve(second, first) == pytest.approx(found, abs=1e-12)
    assert mauve(first[::-1], second[::-1]) == found


def test_features_are_the_signed_sums_of_ngrams() -> None:
    """Each n-gram's own vector, from a text that has little else, explains every text."""
    text = "the cat, the câté, the"
    data = text.encode()
    counts = Counter(data[i : i + n] for n in module.NGRAMS for i in range(len(data) - n + 1))
    key = {gram: sum(byte << 8 * i for i, byte in enumerate(gram)) + (len(gram) << 56) for gram in counts}
    expected, top = np.zeros(module.DIMENSION), 2**64
    for gram, count in counts.items():
        mixed = (key[gram] ^ key[gram] >> 29) * 0x9E3779B97F4A7C15 % top
        mixed = (mixed ^ mixed >> 32) * 0x9E3779B97F4A7C15 % top
        expected[mixed * module.DIMENSION // top] += math.sqrt(count) * (1 if mixed >> 20 & 1 else -1)
    np.testing.assert_allclose(features(text), expected / np.linalg.norm(expected), atol=1e-12)
    assert not features("").any() and not features("ab").any()
    assert np.linalg.norm(features("abc")) == pytest.approx(1)


def test_hashing_keeps_what_texts_share() -> None:
    """The product of features is, but for collisions, that of the exact vectors of all n-grams."""

    def exact(text: str) -> dict[bytes, float]:
        data = text.encode()
        counts = Counter(data[i : i + n] for n in module.NGRAMS for i in range(len(data) - n + 1))
        return {gram: math.sqrt(count / counts.total()) for gram, count in counts.items()}

    texts = stories(20)
    error = []
    for one, other in itertools.pairwise(texts):
        first, second = exact(one), exact(other)
        product = sum(value * second.get(gram, 0) for gram, value in first.items())
        error.append(float(features(one) @ features(other)) - product)
    assert abs(np.mean(error)) < 0.04
    assert np.std(error) < 1.5 / math.sqrt(module.DIMENSION)


def test_clusters_are_those_of_lloyd() -> None:
    rng = np.random.default_rng(3)
    centres = np.array([[0.0, 0], [10, 0], [0, 10], [10, 10]])
    truth = rng.integers(4, size=100)
    points, weights = centres[truth] + rng.normal(size=(100, 2)), rng.integers(1, 5, size=100)
    found = cluster(points, weights, 4)
    assert len({*zip(truth.tolist(), found.tolist(), strict=True)}) == 4, "one cluster each"
    assert (cluster(points, weights, 4) == found).all()
    some = cluster(points, weights, 7)
    means = np.stack([np.average(points[some == k], axis=0, weights=weights[some == k]) for k in range(7)])
    assert (np.linalg.norm(points[:, None] - means, axis=-1).argmin(-1) == some).all(), "nearest to its own mean"
    assert len({*cluster(points[:3], weights[:3], 7).tolist()}) == 3, "no more clusters than points"


def test_clusters_start_far_from_each_other() -> None:
    """Three points alone, beside a crowd in which every start would lie that is drawn blindly."""
    crowd = np.random.default_rng(4).normal(size=(500, 2))
    found = cluster(np.concatenate((crowd, [[1e4, 0], [0, 1e4], [1e4, 1e4]])), np.ones(503, int), 4)
    assert len({*found.tolist()}) == len({*found[-3:].tolist()} | {found[0]}) == 4
