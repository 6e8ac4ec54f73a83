"""A conversation model as a user meets it: the recipe sft on top of a run, `generate`, `chat`, and the mistakes."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from command_line import Main

from opencola.checkpoints import official
from opencola.checkpoints.settings import load_sampling
from opencola.commands import chat
from opencola.text.conversations import Message

SIZES = {
    "model.vae": {
        "width": 16,
        "ffn_dim": 32,
        "num_heads": 2,
        "latent_dim": 8,
        "encoder_layers": 1,
        "decoder_layers": 1,
    },
    "model.dit": {"latent_dim": 8, "width": 16, "num_layers": 1, "num_heads": 2, "head_dim": 8, "rope_dim": 4},
    "train": {"steps": 3},
    "data": {"length": 64},
    "sampling": {"steps": 2, "max_new_tokens": 6},
}
FLAGS = [f"--{group}.{name}={value}" for group, values in SIZES.items() for name, value in values.items()]


@pytest.fixture
def chats(place: Path) -> str:
    """A file with conversations, one of them too long."""
    rows = [
        {"messages": [{"role": "user", "content": f"Number {i}?"}, {"role": "assistant", "content": "A fox. " * i}]}
        for i in (1, 2, 40)
    ]
    (place / "chats.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return "chats.jsonl"


def sft(main: Main, *argv: str) -> tuple[int, str, str]:
    """`opencola train sft` on the tiny run."""
    return main("train", "sft", "--out", "chat", *FLAGS, *argv)


def test_train_generate_and_chat(main: Main, place: Path, chats: str, monkeypatch: pytest.MonkeyPatch) -> None:
    code, said, error = sft(
        main, "--init", "runs/tiny", "--data.source", chats, "--valid", chats, "--train.sample_every=3"
    )
    assert code == 0, error
    assert "cola: 1 of 3 documents are longer than data.length 64, and lose their ends" in said
    assert load_sampling("chat").chat
    samples = [json.loads(line) for line in (place / "chat" / "samples.jsonl").open()]
    asked = {sample["prompt"] for sample in samples if sample["kind"] == "continuation"}
    assert asked and asked <= {"Number 1?", "Number 2?", "Number 40?"}
    assert main("export", "--model", "chat", "--to", "given")[0] == 0
    answers = [main("generate", "--model", folder, "--prompt", "The fox")[1] for folder in ("chat", "given")]
    assert answers[0] == answers[1] and answers[0].startswith("The fox\n")

    seen: list[Any] = []
    generate_text = chat.generate_text

    def recorded(model: Any, tokenizer: Any, prompts: Any, *rest: Any) -> Any:
        seen.append(prompts)
        return generate_text(model, tokenizer, prompts, *rest)

    lines = ["The fox", "and then?", "/new", "The bear", "/help", "/set chat False", "The bear", "/new", "/quit"]
    typed = iter(lines)
    monkeypatch.setattr(chat, "generate_text", recorded)
    monkeypatch.setattr("builtins.input", lambda prompt: next(typed))
    code, said, error = main("chat", "--model", "chat")
    assert (code, error) == (0, "")
    (first,), (second,), (third,), (plain,) = seen
    assert first == [Message("user", "The fox")] and third == [Message("user", "The bear")] and plain == "The bear"
    assert [message.role for message in second] == ["user", "assistant", "user"]
    assert f"{second[1].content}\n" in said and second[2].content == "and then?"
    assert said.count("/new  ") == 2 and "no command /new" in said


def test_mistakes(main: Main, place: Path, chats: str) -> None:
    (place / "bad.jsonl").write_text('{"messages": [{"role": "user", "content": "Hi"}]}')
    start = ("--init", "runs/tiny")
    for argv, message in (
        (("--data.source", chats), "stage cola needs a trained Text VAE: set init"),
        ((*start, "--data.source", "bad.jsonl"), "bad.jsonl, line 1: the last message of field 'messages'"),
        ((*start, "--data.source", "words.txt"), "words.txt: conversations are in .jsonl and .parquet files"),
        ((*start, "--data.source", chats, "--data.packing", "aligned"), "packing aligned would cut conversations"),
    ):
        code, _, error = sft(main, *argv)
        assert code == 2 and re.fullmatch(rf"error: .*{re.escape(message)}.*\n", error), error
    code, _, error = main("train", "tiny.yaml", "--out", "base", "--tokenizer.special", "<|pad|>")
    assert code == 2 and "special tokens need different names" in error
    assert main("train", "tiny.yaml", "--out", "base", "--train.steps", "3", "--tokenizer.special")[0] == 0
    code, _, error = sft(main, "--init", "base", "--data.source", chats)
    assert code == 2 and re.match(r"error: .*conversations need a base model whose tokenizer was trained with", error)
    code, _, error = main("generate", "--model", "base", "--prompt", "a", "--chat")
    assert code == 2 and re.match(r"error: .*conversations need a base model", error)


def test_shards_with_the_marks(main: Main, place: Path) -> None:
    order = ("tokenize", "words.txt", "--to", "tokens", "--workers", "1")
    marks = ("--special", "<|im_start|>", "<|im_end|>")
    assert main(*order, *marks, "--vocab-size", "280")[0] == 0
    assert official.Tokenizer.load("tokens").special_id("<|im_end|>") == 3
    assert main(*order, *marks, "--vocab-size", "280")[0] == 0
    code, _, error = main(*order, "--special", "<|other|>", "--vocab-size", "280")
    assert code == 2 and "no special token '<|other|>'" in error
    code, _, error = main(*order, *marks, "--tokenizer", "tokens")
    assert code == 2 and "leave out --special" in error
