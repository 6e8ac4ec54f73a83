"""The choice of tokens against straightforward loops."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from opencola.errors import UserError
from opencola.models.ar.sampling import ARSampling
from opencola.models.cola.sampling import ColaSampling
from opencola.models.llada.sampling import LLaDASampling
from opencola.models.plaid.sampling import PlaidSampling
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
    torch.testing.assert_close(penalise(LOGITS, seen, [penalty] * len(seen)), penalised(LOGITS, seen, penalty))
    assert torch.equal(LOGITS, before)


def test_what_a_block_costs() -> None:
    assert ARSampling().work == 1
    assert ColaSampling(steps=3, candidates=5, repaint_repeats=7).work == 15
    assert ColaSampling(steps=3, candidates=5, repaint_repeats=7, first_block="partial").work == 105
    assert LLaDASampling(steps=9, block_length=4).work == 4 and PlaidSampling(steps=9).work == 9


@pytest.mark.parametrize("penalty", [1e-40, 1e-300, 3e38])
@pytest.mark.parametrize("temperature", [1e-5, 1.0, 3e38])
def test_no_penalty_is_too_large_for_a_choice(penalty: float, temperature: float) -> None:
    sampling = Sampling(temperature=temperature, repetition_penalty=penalty)
    for dtype in (torch.float32, torch.float64):
        logits = penalise(LOGITS.to(dtype), [[0, 1, 2], [*range(12)]], [penalty] * 2)
        assert probabilities(logits, sampling).isfinite().all()
    generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
    assert choose(logits, [sampling] * 2, generators).shape == (2, 3)


@pytest.mark.parametrize("penalty", [1.0, 1.2])
def test_broken_logits_become_finite(penalty: float) -> None:
    logits = torch.tensor([[[math.nan, math.inf, -math.inf, 1.0]]])
    assert penalise(logits, [[]], [penalty]).tolist() == [[[0.0, 1e4, -1e4, 1.0]]]


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
    tokens = choose(LOGITS, [Sampling(temperature=0.0, top_p=0.5)] * 2, generators(0, 1))
    assert tokens.tolist() == [[row.index(max(row)) for row in rows] for rows in LOGITS.tolist()]


def test_tokens_are_drawn_with_their_probabilities() -> None:
    sampling, count = Sampling(temperature=1.3, top_p=0.9), 20_000
    logits = LOGITS[:1, :1].expand(1, count, -1)
    share = torch.bincount(choose(logits, [sampling] * 1, generators(0))[0], minlength=12) / count
    expected = probabilities(LOGITS[0, 0], sampling)
    assert ((share - expected).abs() <= 5 * (expected * (1 - expected) / count).sqrt()).all()


def test_every_sample_has_its_own_generator() -> None:
    sampling, logits = Sampling(temperature=1.0), LOGITS[:1].expand(3, -1, -1).repeat(1, 20, 1)
    a, b, c = choose(logits, [sampling] * 3, generators(1, 2, 1))
    assert torch.equal(a, c) and not torch.equal(a, b)
    assert torch.equal(choose(logits[:1], [sampling] * 1, generators(2))[0], b)


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


@pytest.mark.parametrize(
    ("settings", "fields"),
    [
        (LLaDASampling, {"steps": 0}),
        (LLaDASampling, {"block_length": 0}),
        (LLaDASampling, {"top_p": 0.0}),
        (PlaidSampling, {"steps": 0}),
        (PlaidSampling, {"shift": 0.0}),
        (ColaSampling, {"shift": 0.0}),
        (ColaSampling, {"guidance_every": 0}),
        (ARSampling, {"max_new_tokens": 0}),
    ],
)
def test_impossible_settings_of_a_family(settings: type[Sampling], fields: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(fields))):
        settings(**fields)


def test_the_release_knows_no_stop_strings() -> None:
    with pytest.raises(UserError, match="the public release knows no stop strings"):
        ColaSampling(compatibility="release", stop=("a",))


@pytest.mark.parametrize(
    ("sampling", "shows", "together"),
    [
        (ColaSampling(), False, False),
        (ColaSampling(first_block="left_pad"), True, False),
        (ColaSampling(first_block="right_pad"), True, False),
        (ColaSampling(first_block="partial"), False, False),
        (ColaSampling(compatibility="release"), True, True),
        *((settings(), False, False) for settings in (ARSampling, LLaDASampling, PlaidSampling)),
    ],
)
def test_padding_and_common_ends(sampling: Sampling, shows: bool, together: bool) -> None:
    assert (sampling.shows_padding, sampling.ends_together) == (shows, together)


def test_a_setting_that_is_not_there_is_told_with_those_that_are() -> None:
    told = "an AR model has no steps; its settings are max_new_tokens, temperature, top_k, top_p, repetition_penalty, "
    assert str(ARSampling.lacks("steps")) == f"{told}stop, ignore_eos, chat, seed"


def test_draws_in_the_logits_own_type() -> None:
    logits = LOGITS.float()
    narrow = choose(logits, [Sampling(temperature=1.0)] * 2, generators(0, 1), wide=False)
    weights = [probabilities(row, Sampling(temperature=1.0)) for row in logits]
    expected = [torch.multinomial(w, 1, generator=g)[:, 0] for w, g in zip(weights, generators(0, 1), strict=True)]
    assert torch.equal(narrow, torch.stack(expected))


@pytest.mark.parametrize("temperature", [-0.1, float("nan"), float("inf")])
def test_impossible_temperatures(temperature: float) -> None:
    with pytest.raises(ValueError, match=f"temperature must be at least 0, but is {temperature}"):
        Sampling(temperature=temperature)
