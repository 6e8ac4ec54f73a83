"""How far two sets of texts are from each other: area under a divergence curve (MAUVE, arXiv 2102.01454, section 2).

There, texts are quantised by k-means on the features of a large language model. Here features are hashed counts of byte
n-grams: they need no download and no tokenizer, so that models with different ones compare, but they see spelling,
words and phrases only, not sense. So the numbers compare with each other alone, never with published MAUVE scores.
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

SCALE = 5.0
"""The paper's c."""
NGRAMS = (3, 4, 5)
"""Bytes of an n-gram; at most 7, of which each fills a part of a 64-bit key."""
DIMENSION = 256
"""Buckets that n-grams are hashed into, a power of two."""
TEXTS_PER_CLUSTER = 10
"""The paper's: a tenth of the number of texts of a set."""
ITERATIONS = 50
_KEYS, _BUCKETS = np.uint64(0x9E3779B97F4A7C15), np.uint64(64 - DIMENSION.bit_length() + 1)


def mauve(first: Sequence[str], second: Sequence[str], scale: float = SCALE) -> float:
    """Area under the divergence curve of two sets of texts, between 0 and 1, the value of equal sets.

    Depends neither on the order of texts nor on that of the sets. Finite sets of one source score below 1: compare with
    the score of two sets of held-out texts of the same sizes. Raises ValueError for an empty set.
    """
    if not first or not second:
        raise ValueError("a set of texts to compare is empty")
    counts = (Counter(first), Counter(second))
    texts = sorted(counts[0] | counts[1])
    p, q = (np.array([count[text] for text in texts]) for count in counts)
    number = max(2, min(len(first), len(second)) // TEXTS_PER_CLUSTER)
    clusters = cluster(np.stack([features(text) for text in texts]), p + q, number)
    return area(np.bincount(clusters, p) / len(first), np.bincount(clusters, q) / len(second), scale)


def area(p: np.ndarray, q: np.ndarray, scale: float = SCALE, points: int = 2001) -> float:
    """Area under the points (exp(-c KL(q|r)), exp(-c KL(p|r))), r = λ p + (1 - λ) q, 0 <= λ <= 1, of histograms (K,).

    The curve goes on from its two ends to the axes, straight on, so that equal histograms have 1. Disjoint ones have
    Γ(1 + c)² / Γ(1 + 2c): 1/252 for c = 5.
    """
    weights = np.linspace(0, 1, points)[:, None]
    mixture = weights * p + (1 - weights) * q
    x, y = (np.exp(-scale * _divergence(histogram, mixture)) for histogram in (q, p))
    # x falls and y rises with λ; left of the last x the curve is at its height
    return float(np.sum((x[:-1] - x[1:]) * (y[:-1] + y[1:])) / 2 + x[-1] * y[-1])


def _divergence(p: np.ndarray, mixtures: np.ndarray) -> np.ndarray:
    """KL(p|r) in nats of each row r of mixtures (N, K); infinite where r lacks what p has."""
    filled = p > 0
    with np.errstate(divide="ignore"):
        return np.sum(p[filled] * (np.log(p[filled]) - np.log(mixtures[:, filled])), -1)


def features(text: str) -> np.ndarray:
    """Square roots of the counts of a text's byte n-grams, hashed with signs (arXiv 0902.2206), of unit length.

    Float64 (DIMENSION,); zeros where the text is too short for an n-gram.
    """
    data = np.frombuffer(text.encode(), np.uint8).astype(np.uint64)
    keys = [np.zeros(0, np.uint64)]
    for n in NGRAMS:
        if len(data) >= n:
            places = np.array([1 << 8 * place for place in range(n)], np.uint64)
            keys.append((sliding_window_view(data, n) * places).sum(-1, dtype=np.uint64) + np.uint64(n << 56))
    ngrams, counts = np.unique(np.concatenate(keys), return_counts=True)
    mixed = (ngrams ^ (ngrams >> np.uint64(29))) * _KEYS  # modulo 2^64; its upper bits depend on all of the key
    mixed = (mixed ^ (mixed >> np.uint64(32))) * _KEYS
    signs = np.where(mixed >> np.uint64(20) & np.uint64(1), 1.0, -1.0)
    values = np.bincount((mixed >> _BUCKETS).astype(np.int64), signs * np.sqrt(counts), DIMENSION)
    length = np.linalg.norm(values)
    return values / length if length else values


def cluster(points: np.ndarray, weights: np.ndarray, number: int) -> np.ndarray:
    """The cluster (N,) of each of N different points (N, D), counted so often: k-means from k-means++ with fixed seed.

    There are at most `number` clusters, which stay as they are after ITERATIONS.
    """
    rng = np.random.default_rng(0)
    centres = points[[int(np.argmax(weights))]]
    while len(centres) < min(number, len(points)):
        chances = weights * _distances(points, centres).min(-1)
        if not chances.any():
            break
        centres = np.concatenate((centres, points[[rng.choice(len(points), p=chances / chances.sum())]]))
    nearest = np.full(len(points), -1)
    for _ in range(ITERATIONS):
        before, nearest = nearest, _distances(points, centres).argmin(-1)
        if np.array_equal(before, nearest):
            break
        for k in np.unique(nearest):  # an empty one stays where it was
            mine = nearest == k
            centres[k] = np.average(points[mine], axis=0, weights=weights[mine])
    return nearest


def _distances(points: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """Squared distances (N, K), never negative."""
    squares = (points**2).sum(-1)[:, None] - 2 * points @ centres.T + (centres**2).sum(-1)
    return np.maximum(squares, 0)
