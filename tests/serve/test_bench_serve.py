"""`opencola bench-serve`: what it asks a server for, what it notes, and what it makes of that."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving import COLA, cola_engine, running
from stub_server import Stub, serving
from tiny import tiny_cola

from opencola.commands import main as cli
from opencola.models.cola.sampling import ColaSampling
from opencola.models.text_stream import generate_text
from opencola.serve.against import Batch, Comparison, Generator
from opencola.serve.load import Load, Outcome, Server
from opencola.serve.load_figures import figures
from opencola.text.tokenizer import Tokenizer

LOAD = Load(["The fox", "The bear", "The owl"], requests=12, max_tokens=7, seed=3, concurrency=4)


@pytest.fixture
def stub() -> Iterator[Stub]:
    with serving() as server:
        server.blocks = [{"text": text} for text in (" ran", " to", " the hill.")]
        yield server


def driven(load: Load, url: str, **options: Any) -> list[Outcome]:
    """What became of all requests."""
    outcomes: list[Outcome] = []

    async def drive() -> None:
        async with Server(url, **options) as server:
            await server.drive(load, "tiny", outcomes.append)

    asyncio.run(asyncio.wait_for(drive(), 60))
    return outcomes


def test_all_is_asked_for_and_noted(stub: Stub) -> None:
    outcomes = driven(LOAD, stub.url)
    assert sorted(outcome.id for outcome in outcomes) == [*range(12)]
    for outcome in outcomes:
        assert (outcome.status, outcome.error, outcome.text) == (200, "", " ran to the hill.")
        assert outcome.tokens == 3 and outcome.finish_reason == "length" and len(outcome.between) == 2
        assert outcome.first_block is not None
        assert 0 < outcome.first_block < outcome.first_block + sum(outcome.between) <= outcome.latency
    assert sorted(body["prompt"] for _, body in stub.asked) == sorted(LOAD.prompts * 4)
    for path, body in stub.asked:
        assert path == "/v1/completions" and body["stream"] and body["model"] == "tiny"
        assert (body["max_tokens"], body["seed"]) == (7, 3)


def test_clients_wait_for_their_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many requests are under way as there are clients, and no more."""
    under_way, seen = set(), []

    async def ask(self: Server, load: Load, model: str, outcome: Outcome) -> None:
        under_way.add(outcome.id)
        for _ in range(3):
            await asyncio.sleep(0)
        seen.append(len(under_way))
        under_way.remove(outcome.id)

    monkeypatch.setattr(Server, "ask", ask)
    driven(LOAD, "http://nowhere")
    assert len(seen) == 12 and max(seen) == 4


def test_at_a_rate_nobody_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """All requests begin though none of them ends."""
    begun: list[int] = []
    all_begun = asyncio.Event()

    async def ask(self: Server, load: Load, model: str, outcome: Outcome) -> None:
        begun.append(outcome.id)
        if len(begun) == 12:
            all_begun.set()
        await all_begun.wait()

    monkeypatch.setattr(Server, "ask", ask)
    load = Load(["x"], requests=12, max_tokens=1, seed=3, rate=1e4)
    starts = [outcome.start for outcome in sorted(driven(load, "http://nowhere"), key=lambda outcome: outcome.id)]
    assert begun == [*range(12)] and starts == sorted(starts)


def test_what_goes_wrong_is_told(stub: Stub) -> None:
    one = Load(["x"], requests=1, max_tokens=1, seed=0)
    stub.refusal = 429, {"message": "8 texts wait already"}, {"Retry_After": "0"}
    refused = driven(one, stub.url)
    stub.refusal = 500, {"message": "a fault"}, {}
    failed = driven(one, stub.url)
    stub.refusal, stub.broken = None, {"message": "not finite"}
    broken = driven(one, stub.url)
    stub.broken, stub.ends = None, False
    cut_off = driven(one, stub.url)
    gone = driven(one, "http://127.0.0.1:9")
    found = figures([*refused, *failed, *broken, *cut_off, *gone], 1.0)
    assert refused[0].retry_after == 0 and refused[0].error == "429: 8 texts wait already"
    assert failed[0].retry_after is None
    assert (found.requests, found.whole, found.refused) == (5, 0, 1)
    assert {key.partition(":")[0]: count for key, count in found.errors.items()} == {
        "500": 1,
        "not finite": 1,
        "the stream was cut off": 1,
        "ConnectError": 1,
    }
    assert found.first_block == found.latency == {} and found.requests_per_second == 0


def test_who_does_not_answer_is_left(stub: Stub) -> None:
    stub.hold_after = 1
    (outcome,) = driven(Load(["x"], requests=1, max_tokens=1, seed=0), stub.url, timeout=0.5)
    assert outcome.error and outcome.text == " ran" and outcome.tokens == 0
    stub.go.set()


def test_figures() -> None:
    """Of latencies 0 to 100 seconds, whose percentiles are plain; one refused and one broken are not among them."""
    outcomes = [
        Outcome(i, 0.0, 200, first_block=i / 10, between=[i / 100, i / 100], latency=float(i), tokens=2)
        for i in range(101)
    ]
    outcomes += [Outcome(101, 0.0, 429, "429: full"), Outcome(102, 0.0, 200, "cut off", 99.0, tokens=3)]
    found = figures(outcomes, 50.0)
    assert found.latency == pytest.approx({"p50": 50, "p90": 90, "p99": 99})
    assert found.first_block == pytest.approx({"p50": 5, "p90": 9, "p99": 9.9})
    assert found.between_blocks == pytest.approx({"p50": 0.5, "p90": 0.9, "p99": 0.99}, abs=0.01)
    assert (found.whole, found.refused, found.errors) == (101, 1, {"cut off": 1})
    assert found.tokens_per_second == pytest.approx(205 / 50) and found.requests_per_second == pytest.approx(101 / 50)


def test_a_comparison() -> None:
    """By hand: rounds of 6 tokens in 2 seconds against 1.5, once in 40 against 3; alone twice the seconds."""
    compared = Comparison()
    for start, seconds, batch_seconds in ((0.0, 2.0, 1.5), (5.0, 40.0, 3.0), (50.0, 2.0, 1.5)):
        outcomes = [
            Outcome(0, start, 200, text="a", tokens=2, latency=seconds),
            Outcome(1, start + 1, 200, text="b", tokens=4, latency=1.0),
        ]
        compared.add(outcomes, Batch(["a", "c"], 6, batch_seconds, 0.1))
    for seconds in (1.0, 2.0, 30.0):
        compared.add_alone(Outcome(0, 0.0, 200, text="a", first_block=seconds), Batch(["a"], 1, 1.0, seconds / 2))
    record = compared.record()
    assert record["tokens_per_second"] == {"serve": 3, "generate": 4} and record["throughput_ratio"] == 0.75
    assert record["first_block_alone"] == {"serve": 2, "generate": 1} and record["first_block_ratio"] == 2
    assert (record["rounds"], record["texts"], record["same_texts"]) == (3, 9, 6)
    assert Comparison().record()["throughput_ratio"] is None


def test_a_model_writes_as_for_requests_of_their_own() -> None:
    """Each text has the draws of sample 0, as the only one of its request."""
    tokenizer = Tokenizer.train(["The fox ran."] * 3, 260)
    model = tiny_cola(vae={"vocab_size": tokenizer.vocab_size}).float().requires_grad_(False)
    sampling = ColaSampling(steps=2, max_new_tokens=6, temperature=1.0, seed=4, ignore_eos=True)
    batch = Generator(model, tokenizer, sampling).write(["The fox", "a", "a"])
    alone = [
        "".join(piece.text for (piece,) in generate_text(model, tokenizer, [prompt], sampling))
        for prompt in ("The fox", "a")
    ]
    assert batch.texts == [*alone, alone[1]] and batch.tokens == 18
    assert 0 < batch.first_block < batch.seconds


def records_of(lines: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in lines.splitlines()]


def test_the_command(stub: Stub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts, out = tmp_path / "prompts.txt", tmp_path / "load.jsonl"
    prompts.write_text("The fox\nThe bear\n")
    argv = [stub.url, "--requests", "5", "--prompts-file", str(prompts), "--jsonl", str(out)]
    assert cli.main(["bench-serve", *argv, "--json"]) == 0
    said = capsys.readouterr().out
    assert said == out.read_text()
    *requests, summary = records_of(said)
    assert [record["record"] for record in requests] == ["request"] * 5
    assert summary["record"] == "summary" and summary["model"] == "tiny" and summary["whole"] == 5
    assert summary["tokens"] == 15 and summary["tokens_per_second"] == pytest.approx(15 / summary["seconds"])
    assert len(stub.asked) == 6  # one does not count
    assert cli.main(["bench-serve", stub.url, "--requests", "2", "--rate", "50"]) == 0
    said = capsys.readouterr().out
    assert "2 of 2 requests, 50 a second" in said and "first block" in said and "2 whole, 0 refused" in said


def test_against_generate(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A real server and the model in it: the texts are the same, and both are measured."""
    engine = cola_engine()
    monkeypatch.setattr(
        "opencola.commands.bench_serve.from_pretrained", lambda model: (engine.model, engine.tokenizer, COLA)
    )
    argv = ["--requests", "5", "--concurrency", "2", "--max-tokens", "9", "--seed", "3", "--against", "generate"]
    with running(engine, COLA) as server:
        assert cli.main(["bench-serve", server.url, *argv, "--json"]) == 0
        *requests, summary, against = records_of(capsys.readouterr().out)
        assert cli.main(["bench-serve", server.url, *argv]) == 0
    assert [record["id"] for record in requests] == [*range(5)] and summary["whole"] == 5
    assert all(record["status"] == 200 and 0 < record["tokens"] <= 9 for record in requests)
    assert len({record["text"] for record in requests}) > 1
    assert against["record"] == "against" and against["rounds"] == 3
    assert against["texts"] == against["same_texts"] == 10
    assert against["throughput_ratio"] > 0 and against["first_block_ratio"] > 0
    assert "10 of 10 texts are the same" in capsys.readouterr().out


def test_ctrl_c_keeps_what_is_done(
    stub: Stub, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = Server.ask

    async def ask_some(self: Server, load: Load, model: str, outcome: Outcome) -> None:
        if outcome.id == 3:
            raise KeyboardInterrupt
        await ask(self, load, model, outcome)

    monkeypatch.setattr(Server, "ask", ask_some)
    argv = ["--requests", "9", "--concurrency", "1", "--jsonl", str(tmp_path / "load.jsonl")]
    assert cli.main(["bench-serve", stub.url, *argv]) == 130
    *requests, summary = records_of((tmp_path / "load.draft.jsonl").read_text())
    assert [record["id"] for record in requests] == [0, 1, 2]
    assert (summary["requests"], summary["asked"]) == (3, 9)
    assert "3 of 9 requests" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["http://127.0.0.1:9"], "there is no server at http://127.0.0.1:9: ConnectError"),
        (["STUB"], "answers 401: no such key"),
        (["STUB", "--rate", "1", "--against", "generate"], "leave out --rate"),
        (["STUB", "--requests", "0"], "--requests must be at least 1"),
        (["not a url"], "there is no server at not a url"),
    ],
)
def test_mistakes(argv: list[str], said: str, stub: Stub, capsys: pytest.CaptureFixture[str]) -> None:
    stub.key = "secret"
    assert cli.main(["bench-serve", *(stub.url if word == "STUB" else word for word in argv)]) == 2
    assert said in capsys.readouterr().err


def test_a_key(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    stub.key = "secret"
    assert cli.main(["bench-serve", stub.url, "--requests", "1", "--api-key", "secret"]) == 0
    monkeypatch.setenv("OPENCOLA_API_KEY", "secret")
    assert cli.main(["bench-serve", stub.url, "--requests", "1"]) == 0


@pytest.mark.slow
def test_a_server_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    """It is started, measured and stopped; slow, as two processes import torch."""
    assert cli.main(["bench-serve", "--requests", "2", "--max-tokens", "4", "--json"]) == 0
    *requests, summary = records_of(capsys.readouterr().out)
    assert summary["whole"] == len(requests) == 2 and summary["model"] == "shipped" and summary["tokens"] == 8
    with pytest.raises(httpx.ConnectError):
        httpx.get(summary["url"], trust_env=False)
    assert cli.main(["bench-serve", "--model", "nowhere"]) == 2
    error = capsys.readouterr().err
    assert "the server did not start: error: " in error and "nowhere" in error
