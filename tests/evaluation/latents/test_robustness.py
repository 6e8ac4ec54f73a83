"""Noise on latents whose decoder is known: the nearest of some numbers."""

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from torch import Tensor

from opencola.evaluation.latents import measures
from opencola.evaluation.latents.figure import overview
from opencola.evaluation.latents.reconstruction import Documents, pack_documents
from opencola.evaluation.latents.robustness import AMOUNTS, VAE, Amount, Robustness, join, measure, most_frequent
from opencola.text.lines import read_objects, write_objects

VARIANCE = 1e-4
DOCUMENTS = pack_documents([[i % 4, (i * 7) % 4, 3] + [1, 2] * (i % 3) + [0] for i in range(60)], 2)


def encode(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """One latent for two tokens: the tokens themselves, ten times as large and moved."""
    mean = 10 * tokens.float().unflatten(1, (-1, 2)) + 7
    return mean, torch.full_like(mean, 100 * VARIANCE)


def decode(z: Tensor) -> Tensor:
    """The nearest whole number is the token."""
    return -100 * ((z - 7) / 10).flatten(1)[..., None].sub(torch.arange(4)).square()


def draw(shape: Sequence[int], purpose: str, ids: Tensor) -> Tensor:
    rows = [torch.Generator().manual_seed(1000 * len(purpose) + number) for number in ids.tolist()]
    return torch.stack([torch.randn(tuple(shape), generator=row) for row in rows])


NUMBERS = VAE(encode, decode, shift=7.0, scale=0.1)


def result(batch_size: int = 60, documents: Documents = DOCUMENTS) -> Robustness:
    return join([*measure(documents, NUMBERS, draw, batch_size=batch_size)])


def test_amounts() -> None:
    mean, z_0, noise = torch.randn(3, 2, 5, 4)
    assert torch.equal(Amount("path", 0.0).apply(mean, z_0, noise), z_0)
    assert torch.equal(Amount("path", 1.0).apply(mean, z_0, noise), noise)
    assert torch.allclose(Amount("path", 0.25).apply(mean, z_0, noise), 0.75 * z_0 + 0.25 * noise)
    rescaled = Amount("rescaled", 0.25).apply(mean, z_0, noise)
    assert torch.allclose(rescaled, Amount("path", 0.25).apply(mean, z_0, noise) / 0.75)
    assert torch.equal(Amount("mean", 2.0).apply(mean, z_0, noise), mean + 2 * noise)


def test_accuracy_follows_the_normal_law() -> None:
    found, total = result(), int(DOCUMENTS.scored.sum())
    assert int(found.tokens.sum()) == total
    assert found.right[Amount("path", 0.0)] == found.right[Amount("mean", 0.0)] == total
    for amount in AMOUNTS:
        if amount.kind == "path":
            continue
        deviation = amount.at if amount.kind == "mean" else amount.at / (1 - amount.at)
        deviation = math.hypot(deviation, VARIANCE**0.5 if amount.kind == "rescaled" else 0)
        # right when the noise stays within half a step; outwards of the first and last number it may be any
        inside = math.erf(0.5 / max(deviation, 1e-9) / math.sqrt(2))
        outer = ((DOCUMENTS.tokens == 0) | (DOCUMENTS.tokens == 3))[DOCUMENTS.scored].double().mean().item()
        expected = (1 - outer) * inside + outer * (0.5 + inside / 2)
        error = math.sqrt(expected * (1 - expected) / total)
        assert abs(found.right[amount] / total - expected) <= 4 * error, amount


def test_figures_do_not_depend_on_the_batch() -> None:
    whole, parts = result(), result(batch_size=7)
    assert whole.right == parts.right
    assert torch.allclose(whole.distortion, parts.distortion, rtol=1e-5)
    assert torch.equal(whole.posteriors.mean, parts.posteriors.mean)
    assert torch.equal(whole.posteriors.sequence, parts.posteriors.sequence)


def test_only_scored_latents_count() -> None:
    found = result()
    kept = DOCUMENTS.scored.unflatten(1, (-1, 2)).any(-1)
    assert not kept.all() and len(found.posteriors.mean) == kept.sum()
    assert torch.equal(found.posteriors.mean, encode(DOCUMENTS.tokens)[0][kept].double())
    assert torch.equal(found.posteriors.sequence.bincount(), kept.sum(1))
    counts = [int(((DOCUMENTS.tokens == token) & DOCUMENTS.scored).sum()) for token in range(4)]
    assert most_frequent(DOCUMENTS) == max(counts)


def test_entries_are_the_closed_forms() -> None:
    found = result()
    named = {(entry.name, entry.at): entry for entry in measures.entries(found, DOCUMENTS, NUMBERS, draw)}
    total = int(found.tokens.sum())
    tokens = encode(DOCUMENTS.tokens)[0][DOCUMENTS.scored.unflatten(1, (-1, 2)).any(-1)].double() / 10 - 0.7
    rates = 0.5 * (VARIANCE + tokens.square() - 1 - math.log(VARIANCE))
    rate, distortion = named["rate", None], named["distortion", None]
    assert rate.value == pytest.approx(float(rates.sum()) / total, rel=1e-5) and rate.count == total
    assert named["standard_normal_bound", None].value == pytest.approx(rate.value + distortion.value)
    assert named["channel_rate", 1].value == pytest.approx(float(rates[:, 1].mean()), rel=1e-5)
    assert named["channel_mean", 0].value == pytest.approx(float(tokens[:, 0].mean()), abs=1e-5)
    # pairs of numbers hardly overlap: their information is the entropy of the pairs, and the rest of the rate mismatch
    shares = torch.unique(tokens.round(), dim=0, return_counts=True)[1].double() / len(tokens)
    information = named["information", None]
    assert information.value == pytest.approx(float(-(shares * shares.log()).sum()), abs=1e-6)
    assert information.value + named["mismatch_estimate", None].value == pytest.approx(
        float(rates.sum(-1).mean()), rel=1e-4
    )
    assert named["mismatch_gaussian", None].value < named["mismatch_estimate", None].value
    assert named["active_channels", None].value == 2
    assert rate.low is not None and rate.high is not None and rate.low < rate.value < rate.high
    assert ("accuracy_rescaled", 1.0) not in named and named["accuracy_path", 1.0].value < 0.5


def test_one_sequence_has_no_intervals_of_means() -> None:
    one = Documents(DOCUMENTS.tokens[:1], DOCUMENTS.scored[:1])
    found = measures.entries(result(documents=one), one, NUMBERS, draw)
    assert next(entry for entry in found if entry.name == "rate").low is None


def test_file_and_drawing_agree_with_the_entries(tmp_path: Path) -> None:
    found = measures.entries(result(), DOCUMENTS, NUMBERS, draw)
    rows = [{**asdict(entry), "seed": 3, "model": "Zahlen-ä"} for entry in found]
    write_objects(tmp_path / "x.jsonl", rows)
    assert [row for _, row in read_objects(tmp_path / "x.jsonl")] == rows
    svg = overview(found)
    assert svg == overview(found) and svg.startswith("<svg ") and "nan" not in svg.lower().replace("nanos", "")
    for words in ("noise time t", "most frequent token", "rate of each channel", "spectrum"):
        assert words in svg
