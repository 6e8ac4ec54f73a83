"""`opencola score` as a user meets it."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from command_line import Main

from opencola.checkpoints import hub, official
from opencola.models.cola.model import Cola
from opencola.models.cola.score import Scoring

QUICK = ("--model", "runs/tiny", "--solver", "euler", "--steps", "2", "--samples", "3", "--rows", "6")


def records(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_figures_are_those_of_the_model(main: Main, place: Path) -> None:
    (place / "t.jsonl").write_text(
        '{"text": "The fox ran."}\n\n{"prompt": "The fox", "continuation": " sat ö"}\n{"text": "A"}\n', encoding="utf-8"
    )
    code, said, error = main("score", "t.jsonl", *QUICK, "--jsonl", "o/x.jsonl", "--seed", "4")
    assert code == 0, error
    found = records(place / "o" / "x.jsonl")
    assert [record["id"] for record in found] == [0, 1, 2]
    assert found[1]["prompt"] == "The fox" and found[0]["text"] == "The fox ran."
    model, tokenizer = hub.load(Path("runs/tiny"))
    settings = Scoring(solver="euler", steps=2, samples=3, seed=4)
    continuation = [*tokenizer.encode(" sat ö"), tokenizer.eos_id]
    expected = model.score([tokenizer.encode("The fox")], [continuation], settings, pad_id=tokenizer.eos_id, ids=[1])
    second = found[1]
    assert second["log_probability"] == pytest.approx(expected.total.item(), rel=1e-4)
    assert (second["kind"], second["estimator"]) == ("estimate", expected.estimator)
    assert second["num_bytes"] == len(" sat ö".encode()) and second["num_tokens"] == len(continuation)
    nats = -second["log_probability"]
    assert second["perplexity"] == pytest.approx(math.exp(nats / len(continuation)))
    assert second["bits_per_byte"] == pytest.approx(nats / math.log(2) / 7)
    for record in found:
        assert record["iwae"] == record["log_probability"] >= record["elbo"]
        assert sum(record["parts"].values()) == pytest.approx(record["elbo"])
        for name, value in record["parts"].items():
            assert sum(record["parts_per_block"][name]) == pytest.approx(value, abs=1e-9)
        assert f"{record['log_probability']:,.2f}" in said
    assert "IWAE, K = 3, euler, 2 steps (shift 0.2), 1 rademacher probe" in said and re.search(
        r"^all ", said.strip(), re.MULTILINE
    )


def test_one_sample_without_end_of_text(main: Main, place: Path) -> None:
    (place / "t.txt").write_bytes("\ufeffThe fox \r\n\r\nö".encode())
    flags = (*QUICK[:-3], "1", "--estimator", "elbo", "--no-end-of-text", "--jsonl", "x.jsonl")
    assert main("score", "t.txt", *flags)[0] == 0
    first, second = records(place / "x.jsonl")
    assert first["text"] == "The fox " and second["num_bytes"] == 2
    assert first["kind"] == "bound" and first["standard_error"] is None
    assert first["num_tokens"] == len(official.Tokenizer.load("runs/tiny").encode("The fox "))


def test_ctrl_c_keeps_what_is_done(main: Main, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (place / "t.txt").write_text("a\nb\nc\nd\ne\n")
    (place / "x.jsonl").write_text("before")
    whole = Cola.score

    def interrupted(*args: Any, **fields: Any) -> Any:
        if fields["ids"] == [2, 3]:
            raise KeyboardInterrupt
        return whole(*args, **fields)

    monkeypatch.setattr(Cola, "score", interrupted)
    code, said, error = main("score", "t.txt", *QUICK, "--jsonl", "x.jsonl")
    assert code == 130 and "2 of 5 texts" in said
    assert error.splitlines()[-1] == "what is done is in x.draft.jsonl"
    assert [record["text"] for record in records(place / "x.draft.jsonl")] == ["a", "b"]
    assert (place / "x.jsonl").read_text() == "before"
    monkeypatch.setattr(Cola, "score", whole)
    (place / "x.draft.jsonl").replace(place / "t.jsonl")
    assert main("score", "t.jsonl", *QUICK, "--jsonl", "x.jsonl")[0] == 0
    assert len(records(place / "x.jsonl")) == 2 and not (place / "x.draft.jsonl").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("", "missing: FILE"),
        ("nowhere.txt", "no such file: nowhere.txt"),
        ("tiny.yaml", "tiny.yaml: texts are in"),
        ("empty.txt", "empty.txt holds no texts"),
        ("latin.txt", "latin.txt, line 3: not UTF-8 at byte 1"),
        ("broken.jsonl", "broken.jsonl, line 2: not JSON"),
        ("other.jsonl", "other.jsonl, line 2: expected strings in a field 'text', or in 'prompt' and 'continuation'"),
        ("half.jsonl", "half.jsonl, line 1: not valid Unicode"),
        ("good.jsonl --jsonl ./good.jsonl", "good.jsonl holds the texts"),
        ("x.draft.jsonl --jsonl x.jsonl", "x.draft.jsonl holds the texts"),
        ("good.jsonl --samples 0", "samples must be at least 1, but is 0"),
        ("good.jsonl --solver best", "best"),
        ("good.jsonl --model nowhere", "no such folder: nowhere"),
    ],
)
def test_mistakes(main: Main, place: Path, argv: str, message: str) -> None:
    (place / "empty.txt").write_text("\n \n")
    (place / "latin.txt").write_bytes(b"a\n\nb\xff\n")
    (place / "broken.jsonl").write_text('{"text": "a"}\n{"text": "a"\n')
    (place / "other.jsonl").write_text('{"text": "a"}\n{"prompt": "a"}\n')
    (place / "half.jsonl").write_text('{"text": "\\ud800"}\n')
    (place / "good.jsonl").write_text('{"text": "a"}\n')
    (place / "x.draft.jsonl").write_text('{"text": "a"}\n')
    code, _, error = main("score", *argv.split())
    assert code == 2
    assert re.fullmatch(rf"error: .*{message}.*\n", error), error
