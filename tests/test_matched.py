"""Matched runs: budgets are kept, what differs is refused, and the whole experiment runs."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from experiments import likelihood_gap, matched
from experiments.matched_results import evaluations, extra, name_of, render
from opencola.models import build
from opencola.models.ar.model import AR
from opencola.models.ar.network import ARConfig
from opencola.models.ar.sampling import ARSampling
from opencola.text.tokenizer import Tokenizer

TINY = {"size": "tiny", "stories": 2, "scored": 2}


def families(out: Path, **budget: Any) -> tuple[dict[str, matched.Stages], Tokenizer]:
    options = matched.Options(out=out, **{**TINY, **budget})
    tokenizer = matched.shared_tokenizer(options)
    return {family: matched.derive(family, options, tokenizer) for family in matched.FAMILIES}, tokenizer


@pytest.fixture(scope="module")
def by_tokens(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, matched.Stages], Tokenizer]:
    """So many tokens for every family; left as they are by all tests."""
    return families(tmp_path_factory.mktemp("by_tokens"), tokens=64_000)


def test_budgets_by_operations_and_by_tokens(
    by_tokens: tuple[dict[str, matched.Stages], Tokenizer], tmp_path: Path
) -> None:
    found, tokenizer = families(tmp_path, flops=3e9)
    for family, stages in found.items():
        spent = sum(recipe.train.steps * matched.step_flops(name, recipe, tokenizer) for name, recipe in stages)
        assert spent == pytest.approx(3e9, rel=0.02), family
    assert set(matched.held_equal(found, tokenizer)["core parameters"]) == set(matched.FAMILIES)
    found, _ = by_tokens
    for family, stages in found.items():
        assert sum(recipe.train.steps * 64 for _, recipe in stages) == pytest.approx(64_000, rel=0.01), family
    found, _ = families(tmp_path, seconds=100)
    for family, stages in found.items():
        assert sum(recipe.train.seconds for _, recipe in stages) == pytest.approx(100), family


def test_the_million_is_matched_within_two_percent(tmp_path: Path) -> None:
    found, tokenizer = families(tmp_path, size="1m", tokens=1e6)
    cores = matched.held_equal(found, tokenizer)["core parameters"]
    assert max(cores.values()) / min(cores.values()) < 1.02
    with torch.device("meta"):
        model = build.build(build.sized(found["ar"][0][1].model, tokenizer))
    assert cores["ar"] == sum(p.numel() for name, p in model.named_parameters() if name.startswith("trunk."))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("data", "length"), 40, "data is .* for cola, but .* for llada"),
        (("data", "batch_size"), 4, "data is"),
        (("train", "weight_decay"), 0.1, "optimiser is"),
        (("seed",), 5, "first batches is"),
        (("model", "trunk", "ffn_dim"), 400, "llada has [0-9,]+ core parameters, but cola"),
    ],
)
def test_what_differs_is_refused(
    by_tokens: tuple[dict[str, matched.Stages], Tokenizer],
    tmp_path: Path,
    path: tuple[str, ...],
    value: Any,
    message: str,
) -> None:
    found, tokenizer = by_tokens
    out, file = found["llada"][0][1].out, tmp_path / "llada.yaml"
    plan = yaml.safe_load((out.parent / "recipes" / "llada.yaml").read_text())
    place = plan
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    matched.write(plan, file)
    with pytest.raises(ValueError, match=f"not comparable: {message}"):
        matched.held_equal(found | {"llada": matched.read(file)}, tokenizer)


def test_one_budget(tmp_path: Path) -> None:
    for budget in ({}, {"flops": 1.0, "tokens": 2.0}):
        with pytest.raises(ValueError, match="exactly one of --flops, --tokens and --seconds"):
            matched.Options(out=tmp_path, **budget)


def test_evaluations_are_counted() -> None:
    model = AR(ARConfig(vocab_size=20, trunk=replace(build.config_class("ar")().trunk, num_layers=2)))
    assert evaluations(model, [1, 2], ARSampling(max_new_tokens=5, ignore_eos=True)) == 6  # five tokens, and the prompt


def test_table() -> None:
    share = {"value": 0.5, "low": 0.25, "high": 0.75, "count": 4}
    row = {
        "family": "llada",
        "temperature": 1.0,
        "core": 1_234_000,
        "last_word_accuracy": share,
        "estimator": "bound, K",
    }
    lines = render([row, {"family": "world", "estimator": "", "bits_per_token": 0.2, "bits_error": 0.01}]).splitlines()
    assert lines[0] == "|  | LLaDA, drawn | the world |" and "| core, M | 1.23 |  |" in lines
    assert "| last word | 50.0 (25.0–75.0) |  |" in lines and "| bits a token |  | 0.200 ± 0.010 |" in lines
    assert name_of({"family": "cola", "temperature": 0.0}) == "Cola DLM" and extra({}) == {}


@pytest.mark.slow
def test_the_whole_experiment(tmp_path: Path) -> None:
    flags = ["--size", "tiny", "--tokens", "1500", "--stories", "3", "--scored", "2", "--out", str(tmp_path)]
    matched.main(flags)
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").open()]
    assert [name_of(row) for row in rows] == [
        *("Cola DLM", "AR, greedy", "AR, drawn", "LLaDA, greedy", "LLaDA, drawn", "Plaid", "the world")
    ]
    assert {row["kind"] for row in rows} == {"exact", "bound", "estimate"} or rows[0]["kind"] == "bound"
    assert all(row["peak_bytes"] > 1e8 and row["flops"] > 0 for row in rows[:-1])
    again = (tmp_path / "ar" / "metrics.jsonl").stat().st_mtime_ns
    matched.main(flags)  # nothing is done again but the speeds
    assert (tmp_path / "ar" / "metrics.jsonl").stat().st_mtime_ns == again
    same = [json.loads(line) for line in (tmp_path / "results.jsonl").open()]
    assert [row.get("legal_sentences") for row in same] == [row.get("legal_sentences") for row in rows]
    gap = tmp_path / "gap"
    options = ["--size", "tiny", "--flops", "1e8", "--stories", "2", "--samples", "4", "--logsnr", "2"]
    likelihood_gap.main([*options, "--ar", str(tmp_path / "ar"), "--out", str(gap)])
    world, ar, cola = (json.loads(line) for line in (gap / "gap.jsonl").open())
    assert cola["logsnr"] == pytest.approx(2, abs=0.01) and world["bits"] < ar["bits"]
    assert cola["iwae"]["1"]["bits"] == pytest.approx(sum(cola["parts"].values()))
    assert cola["iwae"]["4"]["bits"] <= cola["iwae"]["2"]["bits"] <= cola["iwae"]["1"]["bits"]
