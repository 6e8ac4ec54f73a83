"""`opencola quality` as a user meets it."""

import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
from command_line import Main
from tiny import randomise

from opencola.checkpoints import hub, llama
from opencola.evaluation.quality import judge as judges
from opencola.evaluation.quality.measures import by_temperature, entries, from_record
from opencola.evaluation.writing import held_out
from opencola.layers.llama import LlamaConfig
from opencola.models.ar.model import AR
from opencola.models.ar.network import ARConfig
from opencola.models.cola.sampling import ColaSampling
from opencola.models.text_stream import generate_text
from opencola.text.tokenizer import Tokenizer

QUICK = ("--model", "runs/tiny", "--num-samples", "5", "--max-new-tokens", "12", "--batch-size", "3")


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def judge(place: Path) -> judges.Judge:
    """A tiny AR model in the folder `judge`."""
    tokenizer = Tokenizer.load(place / "runs" / "tiny")
    sizes = LlamaConfig(width=16, num_layers=1, num_heads=2, ffn_dim=16)
    llama.save(randomise(AR(ARConfig(tokenizer.vocab_size, sizes, bos_id=tokenizer.eos_id))).float(), place / "judge")
    tokenizer.save(place / "judge")
    return judges.load("judge")


def test_samples_figures_and_drawing(main: Main, place: Path, judge: judges.Judge) -> None:
    flags = (*QUICK, "--reference", "words.txt", "--out", "o/q")
    code, said, error = main("quality", *flags, "--judge", "judge", "--temperatures", "0.9", "0.4")
    assert code == 0, error
    records = read(place / "o" / "q" / "samples.jsonl")
    samples = by_temperature(from_record(record, "samples") for record in records)
    assert [*samples] == [None, 0.4, 0.9] and all(len(some) == 5 for some in samples.values())
    model, tokenizer = hub.load(Path("runs/tiny"))
    for temperature in (0.4, 0.9):
        settings = ColaSampling(
            max_new_tokens=12, steps=4, guidance=2.0, temperature=temperature, stop=("zzz",)
        )  # the recipe's own, but for these
        for sample in samples[temperature]:
            pieces = [some[0] for some in generate_text(model, tokenizer, [""], settings, [sample.index])]
            assert sample.text == "".join(piece.text for piece in pieces)
            assert sample.ids == tuple(token for piece in pieces for token in piece.tokens)
    lines = (place / "words.txt").read_text().splitlines()
    for sample, line in zip(samples[None], lines[5:10], strict=True):
        assert sample.ids == tuple(tokenizer.encode(line)[:12]) and line.startswith(sample.text)
    for some in samples.values():
        for sample, verdict in zip(some, judge([""] * 5, [sample.text for sample in some]), strict=True):
            assert sample.judge is not None
            assert (sample.judge.name, sample.judge.tokens, sample.judge.bytes) == (
                "judge",
                verdict.tokens,
                verdict.bytes,
            )
            assert sample.judge.nats == pytest.approx(verdict.nats, abs=1e-4)
    wholes = [tokenizer.decode(tokenizer.encode(line)[:12]) for line in lines[:5]]
    figures = read(place / "o" / "q" / "quality.jsonl")
    for temperature, some in samples.items():
        mine = {row["name"]: row for row in figures if row["temperature"] == temperature}
        expected = entries(some, wholes)
        assert [*mine] == [entry.name for entry in expected]
        for entry in expected:
            row = mine[entry.name]
            assert (row["value"], row["low"], row["unit"]) == (entry.value, entry.low, entry.unit)
            assert (row["record"], row["task"], row["judge"]) == ("figure", "samples", "judge")
            assert row["settings"]["steps"] == 4
            if temperature == 0.4:
                assert f"{entry.value:.4g}" in said
    assert {"judge_perplexity", "mauve_ngram", "token_entropy"} <= {row["name"] for row in figures}
    assert "legal_sentences" not in {row["name"] for row in figures}
    assert ElementTree.parse(place / "o" / "q" / "quality.svg").getroot().tag.endswith("svg")

    code, _, _ = main("quality", *flags, "--temperatures", "0.9")
    assert code == 0 and not (place / "o" / "q" / "quality.svg").exists(), "no judge, no drawing"
    again = [record for record in read(place / "o" / "q" / "samples.jsonl") if record["temperature"] == 0.9]
    assert [record["ids"] for record in again] == [r["ids"] for r in records if r["temperature"] == 0.9]
    assert all(record["judge"] is None for record in again)


def test_stories_with_prompts(main: Main, place: Path) -> None:
    code, _, error = main(
        "quality", "--num-samples", "6", "--temperatures", "0", "--prompted", "--steps", "4", "--out", "q"
    )
    assert code == 0, error
    samples = by_temperature(from_record(record, "samples") for record in read(place / "q" / "samples.jsonl"))
    stories = held_out(12)
    for first, some in ((0, samples[0.0]), (6, samples[None])):
        for sample, tale in zip(some, stories[first : first + 6], strict=True):
            assert sample.prompt == " ".join(tale.sentences[:2])
    figures = {(row["name"], row["temperature"]): row["value"] for row in read(place / "q" / "quality.jsonl")}
    assert figures["legal_sentences", None] == figures["consistent_stories", None] == 1
    assert 0 < figures["legal_sentences", 0.0] <= 1


def test_prompts_are_the_first_words_of_other_texts(main: Main, place: Path) -> None:
    code, _, error = main(
        "quality", *QUICK, "--temperatures", "1", "--prompted", "--reference", "words.txt", "--out", "q"
    )
    assert code == 0, error
    samples = by_temperature(from_record(record, "samples") for record in read(place / "q" / "samples.jsonl"))
    assert [sample.prompt for sample in samples[1.0]] == [f"The fox number {i} ran to the hill" for i in range(5)]
    assert samples[None][0].text.startswith(" and sat")


def test_what_is_done_is_kept(main: Main, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (place / "q").mkdir()
    (place / "q" / "quality.jsonl").write_text("of other samples\n")

    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("opencola.commands.quality.write_texts", interrupted)
    code, _, error = main("quality", *QUICK, "--reference", "words.txt", "--out", "q")
    assert code == 130 and error.splitlines()[-1] == "what is done is in q/samples.draft.jsonl"
    assert [record["temperature"] for record in read(place / "q" / "samples.draft.jsonl")] == [None] * 5
    assert sorted(file.name for file in (place / "q").iterdir()) == ["quality.jsonl", "samples.draft.jsonl"]
    assert (place / "q" / "quality.jsonl").read_text() == "of other samples\n"
    monkeypatch.undo()
    monkeypatch.chdir(place)
    assert main("quality", *QUICK, "--reference", "words.txt", "--out", "q")[0] == 0
    assert sorted(file.name for file in (place / "q").iterdir()) == ["quality.jsonl", "samples.jsonl"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--model nowhere", "no such folder: nowhere"),
        ("--judge nowhere", "no such folder: nowhere"),
        ("--judge runs", "runs/config.json is missing"),
        ("--reference nowhere.txt", "no such file: nowhere.txt"),
        (
            "--reference words.txt --num-samples 31",
            "words.txt holds 60 texts, but two for each",
        ),
        ("--num-samples 0", "--num-samples must be at least 1, but is 0"),
        ("--batch-size 0", "--batch-size must be at least 1, but is 0"),
        ("--temperatures", "--temperatures"),
        ("--temperatures 1 1", "--temperatures must be different numbers"),
        ("--temperatures -1", "--temperatures"),
        ("--temperatures nan", "--temperatures must be at least 0, but is nan"),
        ("--chat", "not of answers: give --no-chat"),
    ],
)
def test_mistakes(main: Main, argv: str, message: str) -> None:
    code, _, error = main("quality", "--model", "runs/tiny", *argv.split())
    assert code == 2
    assert re.fullmatch(rf"error: .*{re.escape(message)}.*\n", error), error
