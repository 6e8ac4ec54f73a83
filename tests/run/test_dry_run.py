"""The dry run's figures are those of models that are really built, and it writes nothing."""

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from command_line import ROOT, TINY, environment

from benchmarks import scale
from opencola.commands import main
from opencola.models import build
from opencola.run import dry_run, recipe
from opencola.run.cost import PassCost
from opencola.run.dry_run import GPU, USABLE, estimated, short, vocabulary
from opencola.run.recipe import Recipe
from opencola.text.tokenizer import Tokenizer


@pytest.fixture(autouse=True)
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with a tiny recipe in it, and no text."""
    (tmp_path / "tiny.yaml").write_text(TINY)
    monkeypatch.chdir(tmp_path)


def stages(*argv: str) -> dict[str, Recipe[Any, Any]]:
    return dict(recipe.read("tiny.yaml", argv, build.config_class, build.sampling_class))


def files(folder: Path) -> Sequence[Path]:
    return sorted(folder.rglob("*"))


def test_it_prints_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = files(tmp_path)
    assert main.main(["train", "tiny.yaml", "--dry-run", "--devices", "2", "--gpu", "h100"]) == 0
    printed = capsys.readouterr().out
    assert files(tmp_path) == before
    first, second = printed.split("prior: the plan")
    model = build.build(stages()["prior"].model)  # its vocabulary is another one
    blocks = sum(p.numel() for n, p in model.dit.blocks.named_parameters() if "modulation" not in n)
    assert f"dit.blocks {blocks:,}" in " ".join(second.split())
    assert "dit.blocks" not in first and "reference.encoder" in second and "frozen" in second
    assert "starts from runs/tiny/vae" in " ".join(second.split())
    for part in ("6 N", "counted", "core, N", "optimizer", "gathered", "activations", "H100", "tokens / day"):
        assert part in first and part in second
    assert "A100" not in printed


def test_parameters_are_those_of_the_model_that_is_trained() -> None:
    prior = stages()["prior"]
    estimate = estimated("prior", prior, 1, vocab_size=300)
    model = build.build(replace(prior.model, vae=replace(prior.model.vae, vocab_size=300)))
    build.start(model)
    assert sum(count for count, _ in estimate.parts.values()) == sum(p.numel() for p in model.parameters())
    for trained in (False, True):
        counted = sum(count for count, is_trained in estimate.parts.values() if is_trained == trained)
        assert counted == sum(p.numel() for p in model.parameters() if p.requires_grad == trained) > 0
    assert estimate.core == sum(p.numel() for p in model.dit.parameters()) == build.num_core(model)
    vae = estimated("vae", stages()["vae"], 1, vocab_size=300)
    assert vae.core == sum(count for part, (count, _) in vae.parts.items() if part not in ("vae.embedding", "vae.head"))


def test_devices_share_parameters_and_batch() -> None:
    prior = stages("--data.batch_size", "16", "--train.accumulate", "2")["prior"]
    one, four = (estimated("prior", prior, devices, 300) for devices in (1, 4))
    copies = estimated("prior", replace(prior, train=replace(prior.train, replicate=2)), 4, 300)
    assert (one.micro_batch, four.micro_batch, copies.micro_batch) == (8, 2, 2)
    assert (one.shards, four.shards, copies.shards) == (1, 4, 2)
    for part in ("trained weights", "frozen weights", "gradients", "optimizer", "moving average"):
        assert [one.memory[part] // 4, one.memory[part] // 2] == [four.memory[part], copies.memory[part]]
    assert "gathered" not in one.memory and four.memory["gathered"] == copies.memory["gathered"] > 0
    assert four.memory["activations"] < one.memory["activations"]
    assert one.tokens_per_step == four.tokens_per_step == 16 * 16
    assert one.flops_per_token == pytest.approx(four.flops_per_token, rel=0.02)  # the times' modulations aside
    assert set(one.activations) == {False, True} and one.activations[False] == one.memory["activations"]


def test_time_is_that_of_what_takes_longest() -> None:
    gpu = GPU(gigabytes=1, bandwidth=100, bf16=2, float32=1)
    prior = stages("--train.accumulate", "2")["prior"]
    estimate = replace(estimated("prior", prior, 1, 300), memory={"a": int(USABLE * 1e9)})
    products = replace(estimate, cost=PassCost(flops=10**12, moved_bytes=10**9, kernels=1, peak_bytes=0))
    assert products.seconds_per_step(gpu, 0.25) == pytest.approx(2 * 4)
    moving = replace(estimate, cost=PassCost(flops=10**12, moved_bytes=10**12, kernels=1, peak_bytes=0))
    assert moving.seconds_per_step(gpu, 0.25) == pytest.approx(2 * 11)
    launches = replace(estimate, cost=PassCost(flops=1, moved_bytes=1, kernels=10**6, peak_bytes=0))
    assert launches.seconds_per_step(gpu, 0.25) == pytest.approx(2 * 5)
    half = replace(products, recipe=replace(prior, train=replace(prior.train, bf16=True)))
    assert half.seconds_per_step(gpu, 0.25) == pytest.approx(4)
    assert estimate.fits(gpu) and not replace(estimate, memory={"a": int(1e9)}).fits(gpu)


def test_the_vocabulary_is_that_of_the_tokenizer_to_be_used(tmp_path: Path) -> None:
    Tokenizer.train(["some words to learn from"], 270).save(tmp_path / "own.json")
    Tokenizer.train(["some words to learn from"], 265).save(tmp_path / "shards")
    given = stages()
    assert [vocabulary(given[name], given) for name in ("vae", "prior")] == [300, 300]
    given = stages("--tokenizer.path", "own.json")
    assert [vocabulary(given[name], given) for name in ("vae", "prior")] == [270, 270]
    given = stages("--tokenizer.path", "later.json", "--model.vae.vocab_size", "280")
    assert [vocabulary(given[name], given) for name in ("vae", "prior")] == [280, 280]
    given = stages("--data.source", "shards:shards")
    assert [vocabulary(given[name], given) for name in ("vae", "prior")] == [265, 265]
    given = stages("--data.source", "shards:later", "--model.vae.vocab_size", "280")
    assert [vocabulary(given[name], given) for name in ("vae", "prior")] == [280, 280]
    given = stages("--init", "shards")
    assert [vocabulary(given[name], given) for name in ("vae", "prior")] == [265, 265]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--gpu abacus", "there is no GPU 'abacus' in the table; it has: A100, H100"),
        ("--utilisation 0", "--utilisation must be above 0 and at most 1, but is 0.0"),
        ("--utilisation 40", "--utilisation must be above 0 and at most 1, but is 40.0"),
        ("--devices 0", "--devices must be at least 1, but is 0"),
        ("--devices 3", "stage vae: data.batch_size 4 is not a multiple of processes 3 x train.accumulate 1"),
        ("--devices 3 --stage prior", "stage prior: data.batch_size 4 is not a multiple of processes 3"),
        ("--data.length 14", "stage prior: data.length 14 is not a multiple of model.vae.patch_size 1 x"),
        ("--stage joint", "there is no stage 'joint'; the stages are: vae, prior"),
        ("--model.dit.latent_dim 4", "latent_dim"),
    ],
)
def test_mistakes(flags: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = files(tmp_path)
    assert main.main(["train", "tiny.yaml", "--dry-run", *flags.split()]) == 2
    assert message in capsys.readouterr().err
    assert files(tmp_path) == before


def test_a_stage_alone_that_lacks_its_start(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(TINY.replace("    init: vae\n", ""))
    assert main.main(["train", "tiny.yaml", "--dry-run"]) == 2
    assert "stage prior needs a trained Text VAE: set init" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0 "), (999, "999 "), (1000, "1 k"), (1829875728, "1.83 G"), (7.2e23, "720 Z")]
)
def test_units(value: float, text: str) -> None:
    assert short(value) == text


@pytest.mark.slow
def test_the_papers_size_takes_little_memory(tmp_path: Path) -> None:
    script = """
import resource, sys
from opencola import cli
code = main.main(["train", "paper", "--dry-run", "--devices", "8"])
print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
sys.exit(code)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    *printed, peak = done.stdout.splitlines()
    assert int(peak.split()[1]) < 1.5e6
    words = " ".join(" ".join(printed).split())
    for figure in ("all 501,871,574", "core, N 1,829,875,728", "6 N 11 GFLOP"):
        assert figure in words
    assert ROOT.name and files(tmp_path) == [tmp_path / "tiny.yaml"]
    assert dry_run.GPUS.keys() <= {*words.split()}


def test_the_tables_of_the_ladder(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    text = TINY.replace("batch_size: 4", "batch_size: 16")
    Path("tiny.yaml").write_text(text)
    monkeypatch.setattr("sys.argv", ["scale", "tiny.yaml"])
    scale.main()
    sizes, costs = (table.splitlines() for table in capsys.readouterr().out.strip().split("\n\n"))
    for rows, columns in ((sizes, scale.SIZES), (costs, scale.COSTS)):
        cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
        assert cells[0] == [*columns] and [row[:2] for row in cells[2:]] == [
            ["tiny.yaml", "vae"],
            ["tiny.yaml", "prior"],
        ]
        assert {len(row) for row in cells} == {len(columns)}
    core = estimated("prior", stages()["prior"], 1, 300).core
    assert short(core) in sizes[-1] and f"{short(6.0 * core)}FLOP" in sizes[-1]
