"""The experiment of two speeds: budgets are kept, layers counted, rows pooled; the whole of it runs, and goes on."""

from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_cola

from experiments import matched, two_speed
from experiments.matched import Options
from opencola.models.cola.sampling import ColaSampling
from opencola.text.lines import read_objects


def test_a_model_is_trained_as_told(tmp_path: Path) -> None:
    options, (_, fields, rates) = Options(tmp_path, "tiny", flops=3e9), two_speed.MODELS["two-speed-8"]
    tokenizer = matched.shared_tokenizer(options)
    stages = two_speed.derive("two-speed-8", options, tokenizer)
    (_, vae), (_, prior), (_, joint) = stages
    assert fields["dit"]["block_size"] == 8
    for part, values in fields.items():
        for field, value in values.items():
            assert getattr(getattr(prior.model, part), field) == getattr(getattr(joint.model, part), field) == value
    for field, value in rates.items():
        assert getattr(vae.train, field) == getattr(prior.train, field) == value
    assert joint.train.learning_rate < prior.train.learning_rate


@pytest.mark.parametrize(
    ("dit", "fields", "expected"),
    [
        ({"num_layers": 3}, {"steps": 5}, (3 + 5 * 3 + 2) / 4),
        ({"num_layers": 3, "trunk_layers": 2}, {"steps": 5}, (2 + 5 * 1 + 2) / 4),
        ({"num_layers": 3, "trunk_layers": 2}, {"steps": 5, "guidance": 3.0, "candidates": 2}, (2 + 5 * 1 + 2 + 2) / 4),
    ],
)
def test_passes_are_counted_as_the_formula_says(dit: dict[str, Any], fields: dict[str, Any], expected: float) -> None:
    """Whatever goes along in one pass counts once; candidates are encoded again by two layers."""
    model = tiny_cola(dit=dit)
    with two_speed.counted_layers() as calls:
        blocks = model.generate([[1, 2, 3, 4]], ColaSampling(**{"guidance": 1.0, "max_new_tokens": 12} | fields))
        next(blocks)
        before = calls[0]
        assert len(list(blocks)) == 2
    assert (calls[0] - before) / 8 == expected
    with two_speed.counted_layers() as again:
        pass
    list(model.generate([[1]], ColaSampling(steps=1, max_new_tokens=1)))
    assert again == [0]


def test_seeds_are_pooled() -> None:
    def row(seed: int, value: float, count: int) -> dict[str, Any]:
        share = {"value": value, "low": 0.0, "high": 1.0, "count": count}
        return {"model": "ar", "way": {"temperature": 0.0}, "seed": seed, "consistent_stories": share}

    rows = [row(66, 0.5, 100), row(67, 0.9, 300), row(66, 0.1, 10) | {"way": {}}]
    assert [len(group) for group in two_speed.by_way(rows)] == [2, 1]
    together = two_speed.pooled(rows[:2], "consistent_stories")
    assert together["value"] == 0.8 and together["count"] == 400 and 0.75 < together["low"] < 0.8


@pytest.mark.slow
def test_the_whole_experiment_runs_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(two_speed, "WAYS", {"ar": [{}], "two-speed": [{}, {"verify": "greedy", "steps": 1}]})
    argv = [
        "--size",
        "tiny",
        "--flops",
        "2e9",
        "--out",
        str(tmp_path),
        "--stories",
        "3",
        "--models",
        "ar",
        "two-speed-4",
    ]
    two_speed.main(argv)
    file = tmp_path / "66" / "two-speed-4" / "measures.jsonl"
    rows = [row for _, row in read_objects(file)]
    assert [row["way"] for row in rows] == [{}, {"verify": "greedy", "steps": 1}]
    assert rows[0]["serial_layers_per_token"] == (4 + 2 * 8 + 1) / 4 and rows[0]["bits_per_token"] > 1
    table = (tmp_path / "two-speed.md").read_text(encoding="utf-8")
    assert "| two-speed-4, verify greedy, steps 1 | 1 |" in table and (tmp_path / "two-speed.svg").is_file()
    before = file.read_bytes()
    two_speed.main(argv)
    assert file.read_bytes() == before
