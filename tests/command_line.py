"""A tiny recipe, and the command `opencola` in a process of its own."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TINY = """
out: runs/tiny
data: {source: words.txt, length: 16, batch_size: 4}
valid: words.txt
tokenizer: {vocab_size: 300, special: ["<|im_start|>", "<|im_end|>"]}
model:
  vae: {width: 16, ffn_dim: 32, num_heads: 2, latent_dim: 8, encoder_layers: 1, decoder_layers: 1}
train: {steps: 8, warmup: 2, log_every: 2, sample_every: 4, ema: 0.9}
sampling: {steps: 4, max_new_tokens: 12, guidance: 2.0, temperature: 1.0, stop: ["zzz"]}
stages:
  vae: {family: vae}
  prior:
    family: cola
    init: vae
    model:
      dit: {latent_dim: 8, width: 16, num_layers: 1, num_heads: 2, head_dim: 8, rope_dim: 4}
      prior: {strategy: joint}
"""
WEIGHTS = Path("cola_dlm", "cola_dit", "model.safetensors")
Main = Callable[..., tuple[int, str, str]]


def command(*argv: str) -> list[str]:
    """How to start the command."""
    return [sys.executable, "-m", "opencola", *argv]


def environment() -> dict[str, str]:
    """Where the command finds this checkout, installed or not, and one core."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "120"}


def opencola(*argv: str, cwd: Path) -> "subprocess.CompletedProcess[str]":
    """The command in a process of its own."""
    return subprocess.run(command(*argv), cwd=cwd, env=environment(), capture_output=True, text=True, timeout=300)
