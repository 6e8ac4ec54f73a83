"""A stage starts from weights of its own family, or says which two do not go together, before anything is done."""

from pathlib import Path

import pytest
import torch
from command_line import TINY

from opencola.checkpoints.parts import PARTS
from opencola.commands.main import main
from opencola.layers.llama import LlamaConfig
from opencola.models import build
from opencola.models.cola.parts import ColaConfig
from opencola.models.cola.stage_one import StageOneConfig
from opencola.models.llada.network import LLaDAConfig
from opencola.models.plaid.network import PlaidConfig
from opencola.run import recipe as recipes
from opencola.run.stage import load_parts, origin
from opencola.text.tokenizer import Tokenizer

TRUNK = LlamaConfig(width=8, num_layers=1, num_heads=2, ffn_dim=8)
LLADA, PLAID = LLaDAConfig(260, TRUNK), PlaidConfig(260, 4, TRUNK)


@pytest.fixture
def llada(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of a LLaDA and its tokenizer, beside a recipe."""
    monkeypatch.chdir(tmp_path)
    Tokenizer.train([], 260).save(tmp_path / "llada")
    PARTS["llada"].save(build.build(LLADA), tmp_path / "llada" / PARTS["llada"].folder)
    (tmp_path / "words.txt").write_text("The fox sat.\n" * 30)
    (tmp_path / "tiny.yaml").write_text(TINY)
    return Path("llada")


@pytest.mark.parametrize("config", [PLAID, StageOneConfig(), ColaConfig()], ids=build.family)
def test_parts_of_another_family(llada: Path, config: build.ModelConfig) -> None:
    with (
        torch.device("meta"),
        pytest.raises(ValueError, match=rf"llada holds LLaDA, but the family '{build.family(config)}' "),
    ):
        load_parts(build.build(config), llada, "")


@pytest.mark.parametrize("flags", [[], ["--dry-run"]], ids=["train", "dry run"])
def test_another_family_is_refused_before_anything_is_done(
    llada: Path, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("tiny.yaml").write_text(TINY.replace("{family: vae}", "{family: vae, init: ./llada}"))
    assert main(["train", "tiny.yaml", *flags]) == 2
    error = capsys.readouterr().err
    assert "init llada holds LLaDA, but the family 'vae' starts from Text VAE: name a folder with that" in error
    assert not Path("runs").exists()


def test_an_earlier_stage_of_another_family(llada: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stages = "stages:\n  vae: {family: vae}\n  masked: {family: llada, init: vae}\n"
    Path("tiny.yaml").write_text(TINY[: TINY.index("model:")] + stages)
    assert main(["train", "tiny.yaml", "--dry-run"]) == 2
    assert "stage masked: init runs/tiny/vae holds Text VAE, but the family 'llada'" in capsys.readouterr().err


def test_the_dry_run_says_what_is_taken(llada: Path) -> None:
    vae = build.build(StageOneConfig())
    PARTS["vae"].save(PARTS["vae"].module(vae), Path("base") / PARTS["vae"].folder)
    Path("tiny.yaml").write_text(TINY.replace("init: vae", "init: ./base"))
    stages = dict(recipes.read("tiny.yaml", [], build.config_class, build.sampling_class))
    assert origin(stages["prior"]) == "base; prior: random weights"
    assert origin(stages["vae"]) == "random weights"
