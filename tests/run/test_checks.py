"""What does not divide is told in one line, with fields and values, before anything is done."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from opencola.commands import main
from opencola.data.corpus import CorpusConfig
from opencola.flow.dit import DiTConfig
from opencola.models.cola.parts import ColaConfig
from opencola.models.cola.sampling import ColaSampling
from opencola.models.cola.stage_one import StageOneConfig
from opencola.run.checks import check, num_shards
from opencola.run.recipe import Recipe, TokenizerConfig
from opencola.train.loop import TrainConfig
from opencola.vae.text_vae import TextVAEConfig

COLA = ColaConfig(vae=TextVAEConfig(patch_size=2), dit=DiTConfig(block_size=4))


def recipe(
    model: Any = COLA, data: dict[str, int] | None = None, vocab_size: int = 300, **train: int
) -> Recipe[Any, Any]:
    corpus = CorpusConfig(**{"length": 24, "batch_size": 12} | (data or {}))
    tokenizer = TokenizerConfig(vocab_size=vocab_size)
    config = TrainConfig(**train)
    return Recipe(
        family="cola",
        out=Path("out"),
        data=corpus,
        model=model,
        tokenizer=tokenizer,
        train=config,
        sampling=ColaSampling(),
    )


@pytest.mark.parametrize(
    ("recipe", "processes", "message"),
    [
        (
            recipe(data={"length": 20}),
            1,
            r"data.length 20 is not a multiple of model.vae.patch_size 2 x model.dit.block_size 4: set it to 16 or 24",
        ),
        (
            recipe(data={"length": 4}),
            1,
            r"data.length 4 is not a multiple of .*: set it to 8",
        ),
        (
            recipe(StageOneConfig(TextVAEConfig(patch_size=5))),
            1,
            r"data.length 24 is not a multiple of model.vae.patch_size 5: set it to 20 or 25",
        ),
        (
            recipe(accumulate=3),
            8,
            r"data.batch_size 12 is not a multiple of processes 8 x train.accumulate 3: set it to 24",
        ),
        (
            recipe(data={"batch_size": 18}, accumulate=8),
            1,
            r"data.batch_size 18 is not a multiple of processes 1 x train.accumulate 8: set it to 16 or 24",
        ),
        (
            recipe(replicate=2, shard=4),
            4,
            r"train.replicate 2 x train.shard 4 is not processes 4: set train.shard to 2, or to 0",
        ),
        (
            recipe(replicate=3),
            4,
            r"train.replicate 3 does not divide processes 4: set it to a divisor",
        ),
        (
            recipe(vocab_size=257),
            1,
            r"tokenizer.vocab_size 257 is too small for bytes and special tokens: set it to 258 or more",
        ),
    ],
)  # fmt: skip
def test_what_does_not_divide(recipe: Recipe[Any, Any], processes: int, message: str) -> None:
    with pytest.raises(ValueError, match=f"^stage prior: {message}") as caught:
        check("prior", recipe, processes)
    assert "\n" not in str(caught.value)


def test_what_divides() -> None:
    check("prior", recipe(), 1)
    check("prior", recipe(data={"batch_size": 24}, replicate=2, shard=2, accumulate=3), 4)
    check("prior", replace(recipe(vocab_size=3), init=Path("earlier")), 1)  # whose tokenizer is used
    check("prior", replace(recipe(), tokenizer=TokenizerConfig(Path("my.json"), vocab_size=3)), 1)
    check("vae", recipe(StageOneConfig(TextVAEConfig(patch_size=2)), data={"length": 22}), 3)  # knows no blocks


@pytest.mark.parametrize(("replicate", "shard", "shards"), [(1, 0, 8), (2, 0, 4), (2, 4, 4), (8, 1, 1)])
def test_processes_are_shared_out(replicate: int, shard: int, shards: int) -> None:
    assert num_shards("prior", recipe(replicate=replicate, shard=shard), 8) == shards


def test_training_asks_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The stage that does not divide is the second; not even the first is begun, and the text is not opened."""
    monkeypatch.chdir(tmp_path)
    flags = "--data.source nowhere.txt --out new"
    assert main.main(["train", "text", *flags.split(), "--data.length", "31", "--model.dit.block_size", "2"]) == 2
    assert "error: stage prior: data.length 31 is not a multiple of" in capsys.readouterr().err
    monkeypatch.setattr("opencola.train.distributed.num_processes", lambda: 3)
    assert main.main(["train", "text", *flags.split()]) == 2
    assert "error: stage vae: data.batch_size 8 is not a multiple of processes 3" in capsys.readouterr().err
    assert not [*tmp_path.iterdir()]
