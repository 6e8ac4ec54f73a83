"""The choice of tokens against straightforward loops."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from opencola.models.cola.sampling import ColaSampling
from opencola.models.sampling import Sampling, choose, penalise, probabilities

LOGITS = 2 * torch.randn(2, 3, 12, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


def penalised(logits: Tensor, seen: list[list[int]], penalty: float) -> Tensor:
    out = logits.clone()
    for b, tokens in enumerate(seen):
        for row in range(logits.shape[1]):
            for token in set(tokens):
                value = logits[b, row, token]
                out[b, row, token] = value * penalty if value < 0 else value / penalty
    return out


def distribution(row: list[float], sampling: Sampling) -> list[float]:
    row = [value / sampling.temperature for value in row]
    kept = set(range(len(row)))
    if sampling.top_k:
        least = sorted(row, reverse=True)[: sampling.top_k][-1]
        kept = {token for token in kept if row[token] >= least}
    if sampling.top_p < 1:
        total = sum(math.exp(row[token]) for token in kept)
        mass, nucleus = 0.0, set()
        for token in sorted(kept, key=lambda token: -row[token]):
            if mass > sampling.top_p:
                break
            nucleus.add(token)
            mass += math.exp(row[token]) / total
        kept = nucleus
    total = sum(math.exp(row[token]) for token in kept)
    return [math.exp(value) / total if token in kept else 0.0 for token, value in enumerate(row)]


@pytest.mark.parametrize("penalty", [1.0, 1.3, 0.5])
@pytest.mark.parametrize("seen", [[[], []], [[3, 3, 5], [0]], [list(range(12)), [11]]])
def test_penalty_counts_every_seen_token_once(seen: list[list[int]], penalty: float) -> None:
    before = LOGITS.clone()
    torch.testing.assert_close(penalise(LOGITS, seen, penalty), penalised(LOGITS, seen, penalty))
    assert torch.equal(LOGITS, before)


@pytest.mark.parametrize("penalty", [1.0, 1.2])
def test_broken_logits_become_finite(penalty: float) -> None:
    logits = torch.tensor([[[math.nan, math.inf, -math.inf, 1.0]]])
    assert penalise(logits, [[]], penalty).tolist() == [[[0.0, 1e4, -1e4, 1.0]]]


SETTINGS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.5},
    {"top_k": 4},
    {"top_k": 1},
    {"top_k": 50},
    {"top_p": 0.8},
    {"top_p": 1e-9},
    {"temperature": 1.7, "top_k": 6, "top_p": 0.7},
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_temperature_then_top_k_then_top_p(settings: dict[str, Any]) -> None:
    sampling = Sampling(**{"temperature": 1.0} | settings)
    expected = [[distribution(row, sampling) for row in rows] for rows in LOGITS.tolist()]
    torch.testing.assert_close(probabilities(LOGITS, sampling), torch.tensor(expected, dtype=torch.float64))


def test_tied_tokens_all_stay_under_top_k() -> None:
    row = torch.tensor([1.0, 3.0, 1.0, 0.0])
    assert (probabilities(row, Sampling(temperature=1.0, top_k=2)) > 0).tolist() == [True, True, True, False]


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def test_no_temperature_takes_the_most_probable_token() -> None:
    tokens = choose(LOGITS, Sampling(temperature=0.0, top_p=0.5), generators(0, 1))
    assert tokens.tolist() == [[row.index(max(row)) for row in rows] for rows in LOGITS.tolist()]


def test_tokens_are_drawn_with_their_probabilities() -> None:
    sampling, count = Sampling(temperature=1.3, top_p=0.9), 20_000
    logits = LOGITS[:1, :1].expand(1, count, -1)
    share = torch.bincount(choose(logits, sampling, generators(0))[0], minlength=12) / count
    expected = probabilities(LOGITS[0, 0], sampling)
    assert ((share - expected).abs() <= 5 * (expected * (1 - expected) / count).sqrt()).all()


def test_every_sample_has_its_own_generator() -> None:
    sampling, logits = Sampling(temperature=1.0), LOGITS[:1].expand(3, -1, -1).repeat(1, 20, 1)
    a, b, c = choose(logits, sampling, generators(1, 2, 1))
    assert torch.equal(a, c) and not torch.equal(a, b)
    assert torch.equal(choose(logits[:1], sampling, generators(2))[0], b)


@pytest.mark.parametrize(
    "fields",
    [
        *({name: 0} for name in ("max_new_tokens", "steps", "candidates", "repaint_repeats")),
        {"temperature": -0.1},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"repetition_penalty": 0.0},
        {"eta": 1.1},
        {"eta": -0.1},
        {"repaint_fraction": 1.5},
    ],
)
def test_impossible_settings_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(fields))):
        replace(ColaSampling(), **fields)


@pytest.mark.parametrize("temperature", [-0.1, float("nan"), float("inf")])
def test_impossible_temperatures(temperature: float) -> None:
    with pytest.raises(ValueError, match=f"temperature must be a number of at least 0, not {temperature}"):
        Sampling(temperature=temperature)
