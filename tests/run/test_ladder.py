"""The recipes of real scale have the sizes that their names and their headers say."""

from typing import Any

import pytest
import torch

from opencola.models import build
from opencola.run import checks, recipe
from opencola.run.recipe import Recipe

LADDER = {"1m": 1e6, "5m": 5e6, "20m": 20e6, "100m": 100e6, "500m": 500e6, "1800m": 1.83e9}
PAPER = {"vae": 501_871_574, "dit": 1_829_875_728}  # spec/official-format.md


def stages(name: str) -> dict[str, Recipe[Any, Any]]:
    return dict(recipe.read(name, [], build.config_class, build.sampling_class))


@pytest.mark.parametrize("name", LADDER)
def test_a_rung(name: str) -> None:
    rung, paper = stages(f"ladder/{name}"), stages("paper")
    first, second = rung["stage1"], rung["stage2"]
    with torch.device("meta"):
        model = build.build(second.model)
    assert build.num_core(model) == pytest.approx(LADDER[name], rel=0.15)
    assert first.model.vae == second.model.vae
    assert second.model.dit.rope_dim == 3 / 4 * second.model.dit.head_dim  # the release's share
    assert second.model.vae.width == pytest.approx(3 / 4 * second.model.dit.width)
    assert second.model.vae.ffn_dim == 4 * second.model.vae.width
    for stage, of_paper in ((first, paper["stage1"]), (second, paper["stage2"])):
        for devices in (1, 8):
            checks.check(name, stage, devices)
        assert stage.data.length == 512 and stage.data.source == of_paper.data.source
        assert stage.tokenizer == of_paper.tokenizer and stage.seed == of_paper.seed
        rate = of_paper.train.learning_rate * paper["stage2"].model.dit.width / second.model.dit.width
        assert stage.train.learning_rate == pytest.approx(rate, rel=0.02)
        tokens = stage.train.steps * stage.data.batch_size * stage.data.length
        per_parameter = {"stage1": 40, "stage2": 400}["stage1" if stage is first else "stage2"]
        assert tokens / LADDER[name] == pytest.approx(per_parameter, rel=0.05)
    assert second.init == first.out


def test_the_paper() -> None:
    first, second = stages("paper").values()
    with torch.device("meta"):
        model: Any = build.build(second.model)
    assert {name: sum(p.numel() for p in getattr(model, name).parameters()) for name in PAPER} == PAPER
    for stage in (first, second):
        train = stage.train
        assert stage.data.batch_size * stage.data.length == 720_896
        assert (train.optimizer, train.betas, train.weight_decay, train.clip) == ("adamw", (0.9, 0.95), 0.01, 1.0)
        assert (train.learning_rate, train.warmup, train.schedule, train.decay) == (1.5e-4, 5000, "cosine", 1.0)
        assert train.learning_rate * train.final == pytest.approx(1e-5, rel=1e-3)
        assert (train.bf16, train.ema, stage.seed) == (True, 0.0, 66)
    assert second.train.steps == 1_000_000


@pytest.mark.parametrize("devices", [16, 64, 128])
def test_the_paper_on_more_devices(devices: int) -> None:
    argv = ["--train.accumulate", str(128 // devices), "--train.replicate", str(devices // 8)]
    for name, stage in recipe.read("paper", argv, build.config_class, build.sampling_class):
        checks.check(name, stage, devices)
        assert checks.num_shards(name, stage, devices) == 8
