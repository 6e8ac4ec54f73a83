"""A model that counts without end learns, from conversations, to answer and to stop: the recipe sft on a tiny world."""

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from opencola.checkpoints import official
from opencola.checkpoints.settings import load_sampling
from opencola.models import build
from opencola.models.text_stream import generate_text
from opencola.run import recipe as recipes
from opencola.run import run
from opencola.text.conversations import Message
from opencola.text.tokenizer import Tokenizer

WORDS = ["one", "two", "three", "four", "five", "six"]
BASE = """
out: base
seed: 3
data: {source: counting.txt, length: 64, batch_size: 8}
tokenizer: {vocab_size: 300, special: ["<|im_start|>", "<|im_end|>"]}
model:
  vae: {width: 64, ffn_dim: 128, num_heads: 4, encoder_layers: 0, decoder_layers: 1, latent_dim: 16}
  objective: {beta: 1.0e-4, lambda_mask: 0}
stages:
  vae:
    family: vae
    train: {steps: 200, learning_rate: 4.0e-3}
  prior:
    family: cola
    init: vae
    model:
      dit: {width: 64, num_layers: 3, num_heads: 4, head_dim: 16, rope_dim: 12, block_size: 1}
      prior: {strategy: fixed, lambda_ref: 0}
    train: {steps: 200, learning_rate: 4.0e-3, muon_learning_rate: 0.04, schedule: linear, ema: 0.98}
"""
SFT = """--init base --out chat --data.source chats.jsonl --data.length 96 --train.steps 500 --train.seconds None
--model.vae.width 64 --model.vae.ffn_dim 128 --model.vae.decoder_layers 1 --model.dit.width 64
--model.dit.num_layers 3 --model.dit.num_heads 4 --sampling.steps 8"""
BUDGET = 16


def question(number: int) -> str:
    return f"count to {WORDS[number - 1]}"


def answer(number: int) -> str:
    return " ".join(WORDS[:number])


def messages(numbers: Sequence[int]) -> list[Message]:
    """A conversation in which so many are counted, one after the other."""
    turns = ((Message("user", question(n)), Message("assistant", answer(n))) for n in numbers)
    return [message for turn in turns for message in turn]


def write_world(folder: Path) -> None:
    """counting.txt: counting on and on, whatever was asked; chats.jsonl: conversations of one or two turns."""
    draw = random.Random(0)
    texts = [
        f"{question(draw.randint(1, 6))}: " + " ".join(WORDS[i % 6] for i in range(draw.randint(200, 300)))
        for _ in range(100)
    ]
    (folder / "counting.txt").write_text("\f".join(texts))
    chats = [messages([draw.randint(1, 6) for _ in range(draw.randint(1, 2))]) for _ in range(500)]
    (folder / "chats.jsonl").write_text("".join(json.dumps({"messages": [*map(vars, chat)]}) + "\n" for chat in chats))


def stopped_and_right(folder: str, asked: Sequence[Sequence[int]]) -> tuple[int, int]:
    """Of answers to the last question of each conversation: how many stopped by themselves, and are as they should."""
    model, tokenizer = official.load(folder).eval(), Tokenizer.load(folder)
    sampling = replace(load_sampling("chat"), max_new_tokens=BUDGET)
    texts, ends = [""] * len(asked), [""] * len(asked)
    for pieces in generate_text(model, tokenizer, [messages(numbers)[:-1] for numbers in asked], sampling):
        for piece in pieces:
            texts[piece.sample] += piece.text
            ends[piece.sample] = piece.finished
    right = sum(text == answer(numbers[-1]) for text, numbers in zip(texts, asked, strict=True))
    return ends.count("eos"), right


@pytest.mark.slow  # 50 s
def test_a_model_learns_to_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_world(tmp_path)
    (tmp_path / "base.yaml").write_text(BASE)
    for recipe, flags in (("base.yaml", ""), ("sft", SFT)):
        run.run(recipes.read(recipe, flags.split(), build.config_class, build.sampling_class), "a test")
    first = [[number] for number in range(1, 7)] * 4
    second = [[number, then] for number in range(1, 7) for then in range(1, 7)]
    figures = {folder: [stopped_and_right(folder, asked) for asked in (first, second)] for folder in ("base", "chat")}
    for name, (before, after), asked in zip(
        ("first", "second"), zip(*figures.values(), strict=True), (first, second), strict=True
    ):
        print(f"{name} answers, {len(asked)}: (stopped, right) {before} before, {after} after")
        assert max(before) <= 0.25 * len(asked), "before: on and on, but for an end of text by chance"
        assert after[0] >= 0.95 * len(asked) and after[1] >= 0.8 * len(asked)
