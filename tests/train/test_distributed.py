"""Several processes (gloo, torchrun) train as one: the same losses, checkpoints that move between numbers of them."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from command_line import environment

from opencola.checkpoints import official

RECIPE = """
out: runs/x
data: {source: stories, length: 48, batch_size: 8, mask_documents: true, streams: 4}
valid: stories
tokenizer: {vocab_size: 300, train_documents: 50}
model:
  vae: {width: 32, ffn_dim: 64, num_heads: 2, latent_dim: 8, encoder_layers: 1, decoder_layers: 1}
train: {steps: 50, warmup: 2, log_every: 1, ema: 0.9, save_every: 25, keep: 2}
stages:
  vae: {family: vae, train: {steps: 10}}
  prior:
    family: cola
    init: vae
    model:
      dit: {latent_dim: 8, width: 32, num_layers: 2, num_heads: 2, head_dim: 16, rope_dim: 8}
      prior: {strategy: joint, joint_steps: 10, frozen_steps: 5}
"""
STRATEGIES = {
    "joint": (),
    "fixed": ("--model.prior.strategy", "fixed"),
    "scratch": (
        "--model.prior.strategy",
        "scratch",
        "--model.prior.lambda_ref",
        "0",
        "--train.muon_learning_rate",
        "0.002",
    ),
    "interval": ("--model.prior.strategy", "interval"),
    "recompute": ("--model.prior.recompute", "True", "--train.accumulate", "2"),
    "two speeds": ("--model.dit.num_layers", "3", "--model.dit.trunk_layers", "2", "--model.prior.lambda_ar", "1"),
    "adamw": ("--train.optimizer", "adamw", "--model.prior.vae_learning_rate_ratio", "0.1"),
}


def command(processes: int, *flags: str) -> list[str]:
    run = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes > 1 else []
    return [sys.executable, *run, "-m", "opencola", "train", "recipe.yaml", *flags]


def train(processes: int, folder: Path, out: str, *flags: str) -> subprocess.CompletedProcess[str]:
    (folder / "recipe.yaml").write_text(RECIPE)
    whole = command(processes, "--out", out, *flags)
    return subprocess.run(whole, cwd=folder, env=environment(), capture_output=True, text=True, timeout=300)


def losses(folder: Path, stage: str = "prior") -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / stage / "metrics.jsonl").read_text().splitlines()]


def assert_same_run(one: Path, other: Path, steps: int) -> None:
    """To 6 digits: losses, validation, what is exported."""
    assert len(losses(one)) == steps
    for stage in ("vae", "prior"):
        assert losses(other, stage) == pytest.approx(losses(one, stage), rel=2e-6)
        valid = [json.loads((run / stage / "valid.json").read_text()) for run in (one, other)]
        assert valid[1]["loss"] == pytest.approx(valid[0]["loss"], rel=2e-6)
        # 50 batches, of which none has as many masked tokens as another
        names = [name for name in valid[0] if name.startswith("loss/") or name == "reconstruction_accuracy"]
        assert {"loss/cross_entropy", "loss/mask", "reconstruction_accuracy"} <= {*names}
        for name in names:
            few_tokens = 2e-4 if name.endswith("accuracy") else 0  # may tip where two are nearly as likely
            assert valid[1][name] == pytest.approx(valid[0][name], rel=2e-5, abs=max(1e-6, few_tokens)), name
    models = [official.load(run).state_dict() for run in (one, other)]
    for name, weight in models[0].items():
        torch.testing.assert_close(models[1][name], weight, rtol=1e-3, atol=2e-4)


def test_two_processes_with_two_passes_each_train_as_one(tmp_path: Path) -> None:
    short = ("--train.steps", "8", "--train.sample_every", "4", "--train.save_every", "4")
    for processes, out, *more in ((1, "one"), (2, "two", "--train.accumulate", "2")):
        done = train(processes, tmp_path, out, *short, *more)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("[2/2] prior: 8 steps,") == 1  # one of them speaks
        assert done.stdout.count("The model is in") == 1
    assert_same_run(tmp_path / "one", tmp_path / "two", 8)
    samples = [(tmp_path / out / "prior" / "samples.jsonl").read_text() for out in ("one", "two")]
    assert samples[0].count("\n") > 4 and samples[0] == samples[1]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_has_the_losses_of_one_process(tmp_path: Path, strategy: str) -> None:
    for processes, out in ((1, "one"), (2, "two")):
        done = train(processes, tmp_path, out, *STRATEGIES[strategy])
        assert done.returncode == 0, done.stderr
    assert_same_run(tmp_path / "one", tmp_path / "two", 50)


@pytest.mark.slow
def test_every_mesh_has_the_losses_of_one_process(tmp_path: Path) -> None:
    assert train(1, tmp_path, "one").returncode == 0
    for replicate, shard in ((2, 1), (1, 2), (2, 2)):
        out = f"{replicate}x{shard}"
        done = train(replicate * shard, tmp_path, out, "--train.replicate", str(replicate), "--train.shard", str(shard))
        assert done.returncode == 0, done.stderr
        assert_same_run(tmp_path / "one", tmp_path / out, 50)


@pytest.mark.slow
def test_a_checkpoint_goes_on_with_another_number_of_processes(tmp_path: Path) -> None:
    for processes in (1, 2):
        assert train(processes, tmp_path, f"by {processes}").returncode == 0
    for before, after in itertools.permutations((1, 2, 4), 2):
        if before == 4:
            continue
        out = tmp_path / f"from {before} to {after}"
        shutil.copytree(tmp_path / f"by {before}", out)
        shutil.rmtree(out / "prior" / "checkpoints" / "step-000050")
        shutil.rmtree(out / "prior" / "cola_dlm")
        (out / "prior" / "opencola.json").unlink()
        done = train(after, tmp_path, out.name, "--resume")
        assert done.returncode == 0 and "vae: finished before" in done.stdout, done.stderr
        assert_same_run(tmp_path / "by 1", out, 50)


@pytest.mark.slow
def test_ctrl_c_stops_all_processes_at_the_same_step(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    flags = ("--train.steps", "400", "--train.save_every", "1000", "--out", "stopped")
    process = subprocess.Popen(
        command(2, *flags), cwd=tmp_path, env=environment(), stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    metrics = tmp_path / "stopped" / "prior" / "metrics.jsonl"
    deadline = time.time() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") > 5) and time.time() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: torchrun and both processes get it
    _, error = process.communicate(timeout=100)
    assert process.returncode != 0 and "stopped after step" in error, error
    (saved,) = (tmp_path / "stopped" / "prior" / "checkpoints").iterdir()
    assert saved.name == f"step-{len(losses(tmp_path / 'stopped')):06d}"
    steps = str(len(losses(tmp_path / "stopped")) + 3)
    done = train(1, tmp_path, "stopped", "--resume", "--stage", "prior", "--train.steps", steps)
    assert done.returncode == 0, done.stderr


def test_a_mesh_of_another_size_is_refused(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    done = train(1, tmp_path, "x", "--train.replicate", "2")
    assert done.returncode == 2 and "train.replicate 2 does not divide processes 1" in done.stderr
    assert not (tmp_path / "x").exists()
