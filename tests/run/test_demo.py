import json
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock, Timeout
from torch import Tensor

from opencola.checkpoints import official
from opencola.checkpoints.settings import save_sampling
from opencola.errors import UserError
from opencola.evaluation.latents import traces
from opencola.evaluation.latents.traces import map_variables, reconstruct_stories, trace_blocks
from opencola.evaluation.reporting.demo_page import read_stages
from opencola.evaluation.writing import held_out
from opencola.flow.dit import DiTConfig
from opencola.models.cola.model import Cola
from opencola.models.cola.parts import ColaConfig
from opencola.models.cola.sampling import ColaSampling
from opencola.run import demo
from opencola.run.demo import finish
from opencola.text.tokenizer import Tokenizer
from opencola.vae.gaussian import DiagonalGaussian
from opencola.vae.text_vae import TextVAEConfig
from opencola.worlds.stories import story

SAMPLING = ColaSampling(steps=2, guidance=2.0, solver="stochastic", seed=5)
REQUIRED = {
    "seconds",
    "reconstruction_accuracy",
    "vae_logsnr",
    "last_word_accuracy",
    "legal_sentences",
    "consistent_stories",
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train((story(0, i).text for i in range(300)), 700)


def tiny(tokenizer: Tokenizer, patch_size: int = 1) -> Cola:
    torch.manual_seed(0)
    vae = TextVAEConfig(
        vocab_size=tokenizer.vocab_size,
        latent_dim=4,
        patch_size=patch_size,
        width=16,
        ffn_dim=32,
        num_heads=2,
        encoder_layers=1,
        decoder_layers=1,
    )
    dit = DiTConfig(latent_dim=4, width=16, num_layers=1, num_heads=1, head_dim=16, rope_dim=8, block_size=4)
    return Cola(ColaConfig(vae, dit)).eval()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    out = tmp_path_factory.mktemp("run")
    official.save(tiny(tokenizer), out, tokenizer)
    save_sampling(SAMPLING, out)
    for age, (name, seconds) in enumerate([("prior", 50.0), ("vae", 20.0), ("empty", 0.0)]):
        (out / name).mkdir()
        records = [{"step": s, "tokens": 8 * s, "seconds": s * seconds / 2, "loss/kl": 1.0 / s} for s in (1, 2)]
        path = out / name / "metrics.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records if seconds))
        os.utime(path, (1000 - age, 1000 - age))
    return out


def test_finish_measures_writes_and_shows(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = finish(run, num_stories=9)
    assert json.loads(json.dumps(metrics)) == json.loads((run / "metrics.json").read_text())
    assert metrics.keys() >= REQUIRED
    assert metrics["training_seconds"] == 70
    assert metrics["seconds"] == pytest.approx(70 + metrics["evaluation_seconds"])
    assert metrics["consistent_stories"] == 0 and metrics["last_word_ceiling"] == 1
    assert metrics["counts"]["consistent_stories"] == metrics["counts"]["last_word_accuracy"] == 9
    tokens = metrics["counts"]["reconstruction_accuracy"]
    assert tokens == sum(len(Tokenizer.load(run).encode(tale.text)) + 1 for tale in held_out(9))
    low, high = metrics["intervals"]["last_word_accuracy"]
    assert low == 0 and 0.2 < high < 0.5
    assert metrics["settings"]["sampling"]["steps"] == 2 and metrics["settings"]["evaluation"]["num_stories"] == 9
    records = [json.loads(line) for line in (run / "evaluation.jsonl").read_text().splitlines()]
    assert [record["measure"] for record in records] == ["continuation"] * 9 + ["last_word"] * 9
    page = (run / "report.html").read_text()
    assert page.index("vae") < page.index("prior") and "http" not in page and len(page) < 1_500_000
    said = capsys.readouterr()
    shown = " ".join(said.out.split())
    for record in records[:8]:
        assert record["prompt"] in shown
    assert records[8]["prompt"] not in shown
    assert "legal sentences" in shown and shown.count("✗") == 8 and "continuing stories" in said.err


def test_finish_is_quiet_repeats_itself_and_counts_from_a_start(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = shutil.copytree(run, tmp_path / "alone", ignore=shutil.ignore_patterns("metrics.jsonl"))
    first = finish(alone, num_stories=2, display=False)
    records = (alone / "evaluation.jsonl").read_text()
    again = finish(alone, num_stories=2, display=False, started=time.time() - 100)
    assert capsys.readouterr().out == ""
    assert (alone / "evaluation.jsonl").read_text() == records
    assert 100 <= again["seconds"] < 160 and first["seconds"] == first["evaluation_seconds"] < 60
    varying = {"seconds", "evaluation_seconds"}
    assert {k: v for k, v in first.items() if k not in varying} == {k: v for k, v in again.items() if k not in varying}


def test_a_folder_is_the_demos_alone_from_before_it_measures(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = shutil.copytree(run, tmp_path / "alone")
    measure, held = demo.write_stories, []

    def measured(*arguments: Any) -> Any:
        try:
            FileLock(alone / ".lock").acquire(timeout=0)
        except Timeout:
            held.append(True)
        return measure(*arguments)

    monkeypatch.setattr(demo, "write_stories", measured)
    finish(alone, num_stories=1, display=False)
    assert held == [True] and (alone / "report.html").exists()
    with FileLock(alone / ".lock"), pytest.raises(UserError, match="alone is in use by another process"):
        finish(alone, num_stories=1, display=False)


def test_finish_without_a_model_or_stories(tmp_path: Path, run: Path) -> None:
    with pytest.raises(FileNotFoundError, match=str(tmp_path)):
        finish(tmp_path, display=False)
    with pytest.raises(ValueError, match="num_stories must be at least 1"):
        finish(run, num_stories=0)


def test_stages_in_the_order_in_which_they_ended(run: Path) -> None:
    assert [*read_stages(run)] == ["vae", "prior"]
    assert [*read_stages(run / "vae")] == ["vae"]


@pytest.mark.parametrize("patch_size", [1, 2])
def test_trace_shows_the_blocks_that_are_generated(tokenizer: Tokenizer, patch_size: int) -> None:
    model = tiny(tokenizer, patch_size)
    prompt = "One sunny day, Tom went to the park."
    ids = tokenizer.encode(prompt)
    trace = trace_blocks(model, tokenizer, SAMPLING, prompt, 7)
    assert trace.times == [0.5, 0.0] and len(trace.blocks) == traces.BLOCKS_SHOWN
    assert all(len(block) == 2 and len(state) == 4 * patch_size for block in trace.blocks for state in block)
    assert trace.given == len(ids) % (4 * patch_size)
    written: list[int] = []
    for blocks in model.generate([ids], SAMPLING, eos_ids=[tokenizer.eos_id], ids=[7]):
        written += blocks[0].tokens
    shown = [token for block in trace.blocks for token in block[-1]][trace.given :]
    assert shown == [tokenizer.decode([token]) for token in written[: len(shown)]]


def test_reconstruction_scores_the_stories_own_tokens(tokenizer: Tokenizer) -> None:
    class Perfect:
        """A VAE with the token's number as its latent, and no notion of the number 0 (end of text)."""

        config = SimpleNamespace(patch_size=1, visible_block=4)

        def encode(self, tokens: Tensor) -> DiagonalGaussian:
            mean = tokens[..., None].float()
            return DiagonalGaussian(mean, torch.full_like(mean, -12.0))

        def decode(self, z: Tensor) -> Tensor:
            near = -(z - torch.arange(tokenizer.vocab_size)).abs()
            near[..., tokenizer.eos_id] = -torch.inf
            return near

    model: Any = SimpleNamespace(vae=Perfect())
    result = reconstruct_stories(model, tokenizer, held_out(6), 0)
    assert result.count - result.from_mean == 6, "one end-of-text token a story is scored, and wrong"
    assert result.from_sample == result.from_mean


@pytest.mark.parametrize("patch_size", [1, 2])
def test_maps_take_the_latents_of_the_words(
    tokenizer: Tokenizer, patch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Numbers:
        """A VAE with a patch's token numbers as its latent."""

        config = SimpleNamespace(patch_size=patch_size, visible_block=1)

        def encode(self, tokens: Tensor) -> DiagonalGaussian:
            mean = tokens.float().unflatten(1, (-1, patch_size))
            return DiagonalGaussian(mean, mean)

    taken: dict[str, tuple[np.ndarray, Sequence[str]]] = {}
    monkeypatch.setattr(
        traces, "principal_plane", lambda name, latents, values: taken.setdefault(name, (latents, values))
    )
    monkeypatch.setattr(traces, "MAP_STORIES", 40)
    model: Any = SimpleNamespace(vae=Numbers())
    map_variables(model, tokenizer)
    assert [*taken] == ["animal", "place"]
    for latents, values in taken.values():
        assert len(latents) == len(values) > 30
        for latent, value in zip(latents, values, strict=True):
            last = tokenizer.encode(f"the {value}")[-1]
            assert last in latent.astype(int), "the patch holds the word's last token"
