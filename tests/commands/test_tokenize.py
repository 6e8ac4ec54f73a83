"""`opencola tokenize` as a user meets it: writing, stopping, going on, training on what it wrote, and its mistakes."""

import json
import os
import re
import shlex
import signal
import sys
import time
from pathlib import Path

import pytest
from command_line import WEIGHTS, Main, command
from forked import Started

from opencola.data.corpus import Corpus, CorpusConfig
from opencola.text.tokenizer import Tokenizer


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.usefixtures("workers_start_at_once")
def test_ctrl_c_and_going_on_equal_not_stopping(main: Main, place: Path) -> None:
    flags = ["tokenize", "stories", "--limit", "8000", "--vocab-size", "300", "--shard-tokens", "20000"]
    process = Started(command(*flags, "--to", "a b", "--workers", "2"), alone=True)
    manifest = place / "a b" / "manifest.json"
    for _ in range(12000):
        if (manifest.exists() and "shard-00001" in manifest.read_text()) or process.poll() is not None:
            break
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: every process gets it
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert "Traceback" not in error and not list((place / "a b").glob(".*"))
    assert not json.loads(manifest.read_text())["finished"]
    code, _, refused = main("train", "tiny.yaml", "--data.source", "a b", "--out", "x")
    assert code == 2 and re.search(r"^error: a b is not finished .*: run `opencola tokenize` again", refused)
    again = shlex.split(error.splitlines()[-1].removeprefix("go on: "))
    assert again[0] == "opencola"
    code, said, _ = main(*again[1:])
    assert code == 0 and re.search(r"tokens of 8,000 documents, in \d+ shards, are in a b", said)
    assert main(*flags, "--to", "whole", "--workers", "1")[0] == 0
    assert contents(place / "a b") == contents(place / "whole")


@pytest.mark.skipif(sys.platform != "linux", reason="finds its processes in /proc")
def test_ctrl_c_while_the_workers_start_says_no_more_than_that_it_is_interrupted(place: Path) -> None:
    flags = ["tokenize", "stories", "--limit", "8000", "--vocab-size", "300", "--to", "new", "--workers", "2"]
    process = Started(command(*flags), alone=True)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    workers: list[bytes] = []
    while not workers and process.poll() is None:
        commands = [Path(f"/proc/{child}/cmdline").read_bytes() for child in children.read_text().split()]
        workers = [line for line in commands if b"spawn_main" in line]
    assert workers
    time.sleep(0.1)  # in the middle of their imports
    os.killpg(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in error, error


def test_training_takes_the_tokenizer_of_the_shards(main: Main, place: Path) -> None:
    assert main("tokenize", "words.txt", "--to", "tokens", "--vocab-size", "280", "--workers", "1")[0] == 0
    code, _, error = main("train", "tiny.yaml", "--data.source", "tokens", "--valid", "shards:tokens", "--out", "new")
    assert code == 0, error
    found = Tokenizer.load("new")
    assert found.fingerprint == Tokenizer.load("tokens").fingerprint and found.vocab_size <= 280
    assert (place / "new" / WEIGHTS).exists()
    code, _, error = main("train", "tiny.yaml", "--init", "runs/tiny", "--data.source", "tokens", "--out", "other")
    assert code == 2 and re.fullmatch(
        r"error: the shards in tokens were written with tokens/tokenizer.json .*\n", error
    )


def test_shards_of_a_models_tokenizer_train_like_their_text(main: Main, place: Path) -> None:
    assert main("tokenize", "words.txt", "--to", "tokens", "--tokenizer", "runs/tiny", "--workers", "1")[0] == 0
    tokenizer = Tokenizer.load("runs/tiny")
    batches = [
        next(Corpus(CorpusConfig(source=source, length=16, batch_size=4), tokenizer, 0))
        for source in ("tokens", "words.txt")
    ]
    assert batches[0].tokens.tolist() == batches[1].tokens.tolist()
    with (place / "tokens" / "shard-00000.bin").open("r+b") as file:
        file.truncate(50)
    code, _, error = main(
        "train", "tiny.yaml", "--data.source", "tokens", "--tokenizer.path", "runs/tiny", "--out", "x"
    )
    assert code == 2 and "error: tokens/shard-00000.bin has 50 bytes, but its manifest says" in error
    assert not (place / "x").exists()
    assert main("tokenize", "words.txt", "--to", "tokens", "--tokenizer", "runs/tiny")[0] == 0
    assert (place / "tokens" / "shard-00000.bin").stat().st_size > 50


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("", "missing: SOURCE"),
        ("words.txt", "missing: --to"),
        ("words.txt --to x", "give either a tokenizer .--tokenizer PATH. or the size of a new one .--vocab-size N."),
        ("words.txt --to x --vocab-size 3", "vocab_size 3 is too small"),
        ("nowhere.txt --to x --vocab-size 300", "no such file or folder: nowhere.txt"),
        ("stories --to x --vocab-size 300", "stories never end: say how many .--limit N."),
        ("words.txt --to x --tokenizer nowhere", "no tokenizer at nowhere"),
        ("words.txt --to runs --vocab-size 300", "runs is not empty: choose another folder"),
        ("words.txt --to words.txt --vocab-size 300", "words.txt"),
        ("words.txt --to x --vocab-size 300 --workers 0", "workers must be at least 1, but is 0"),
        ("words.txt --to x --vocab-size 300 --shards 3", "--shards"),
    ],
)
def test_mistakes(main: Main, argv: str, message: str) -> None:
    code, _, error = main("tokenize", *argv.split())
    assert code == 2
    assert re.fullmatch(rf"error: .*{message}.*\n", error), error
