"""What clients are told beside texts: log-probabilities, states of blocks, and how many tokens were forced."""

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from serving import AR_SAMPLING, COLA, Running, ar, cola, running, tokenizer

from opencola.models.ar.score import ARScoring
from opencola.serve.engine import Engine

PROMPT = "The fox ran"


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    """Of an AR model."""
    tokens = tokenizer()
    with running(Engine(ar(tokens.vocab_size), tokens), AR_SAMPLING) as server:
        yield server


@pytest.fixture(scope="module")
def cola_server() -> Iterator[Running]:
    """Of a Cola DLM."""
    tokens = tokenizer()
    with running(Engine(cola(tokens.vocab_size), tokens), COLA) as server:
        yield server


def total(server: Running, prompt: str, text: str) -> float:
    """Log-probability of a text's tokens behind a prompt."""
    encode = server.engine.tokenizer.encode
    tokens = [*encode(prompt)], [*encode(text)]
    return float(server.engine.model.score([tokens[0]], [tokens[1]], ARScoring()).total)


def ask(server: Running, **fields: Any) -> Any:
    return server.client().completions.create(model="tiny", prompt=PROMPT, seed=3, **fields)


def test_logprobs_of_completions(server: Running) -> None:
    """Those of an echoed prompt are exact, and what is streamed is what comes whole."""
    whole = ask(server, max_tokens=6, logprobs=2, echo=True).choices[0]
    logprobs = whole.logprobs
    count = len(server.engine.tokenizer.encode(PROMPT))
    assert "".join(logprobs.tokens[:count]) == PROMPT and whole.text.startswith(PROMPT)
    assert sum(logprobs.token_logprobs[:count]) == pytest.approx(total(server, "", PROMPT), abs=1e-4)
    assert logprobs.text_offset[:2] == [0, len(logprobs.tokens[0])]
    assert all(len(top) <= 2 and max(top.values()) <= 0 for top in logprobs.top_logprobs)
    assert all(value <= max(top.values()) for value, top in zip(logprobs.token_logprobs, logprobs.top_logprobs))  # noqa: B905
    chunks = [chunk.choices[0] for chunk in ask(server, max_tokens=6, logprobs=2, echo=True, stream=True)]
    streamed = [value for choice in chunks if choice.logprobs for value in choice.logprobs.token_logprobs]
    assert streamed == logprobs.token_logprobs
    assert "".join(choice.text for choice in chunks) == whole.text
    plain = ask(server, max_tokens=6).choices[0]
    assert plain.logprobs is None and whole.text == PROMPT + plain.text


def test_logprobs_of_chats(server: Running) -> None:
    messages: Any = [{"role": "user", "content": "hello"}]
    create = server.client().chat.completions.create
    fields: dict[str, Any] = {"model": "tiny", "messages": messages, "max_tokens": 5, "seed": 1, "logprobs": True}
    (choice,) = create(**fields, top_logprobs=3).choices
    assert choice.logprobs is not None and choice.logprobs.content
    for entry in choice.logprobs.content:
        assert len(entry.top_logprobs) == 3 and entry.logprob <= entry.top_logprobs[0].logprob
        assert bytes(entry.bytes or []).decode() == entry.token
    chunks = [chunk.choices[0] for chunk in create(**fields, stream=True)]
    streamed = [entry.logprob for part in chunks if part.logprobs for entry in part.logprobs.content or []]
    assert streamed == [entry.logprob for entry in choice.logprobs.content]


def test_a_family_without_exact_ones_says_so(cola_server: Running) -> None:
    response = cola_server.post("/v1/completions", {"prompt": "a", "logprobs": 1})
    assert response.status_code == 400 and "log-probabilities of tokens" in response.json()["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_texts_are_held_to_what_is_asked(server: Running, cola_server: Running, stream: bool) -> None:
    schema = {
        "type": "object",
        "properties": {"n": {"type": "integer"}},
        "required": ["n"],
        "additionalProperties": False,
    }
    of_json = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    for each in (server, cola_server):
        for fields, pattern in (
            ({"response_format": of_json}, r"\s*\{\s*\"n\"\s*:\s*-?\d+\s*\}"),
            ({"regex": "(ab)+c"}, "(ab)+c"),
            ({"grammar": 'start: "x" /[0-9]{3}/'}, r"x\d{3}"),
        ):
            body = {"prompt": PROMPT, "max_tokens": 40, "n": 2, "seed": 5, "stream": stream} | fields
            if stream:
                body["stream_options"] = {"include_usage": True}
            response = each.post("/v1/completions", body)
            assert response.status_code == 200, response.text
            texts, reasons, usage = told(response.text if stream else response.json())
            assert all(re.fullmatch(pattern, text) for text in texts.values()), (texts, pattern)
            assert [*reasons] == ["stop", "stop"] and usage["forced_tokens"] > 0
    assert "forced_tokens" not in server.post("/v1/completions", {"prompt": "a"}).json()["usage"]


def told(answer: Any) -> tuple[dict[int, str], list[str], dict[str, Any]]:
    """Texts, why they ended, and what was used."""
    if isinstance(answer, dict):
        choices = answer["choices"]
        return {c["index"]: c["text"] for c in choices}, [c["finish_reason"] for c in choices], answer["usage"]
    chunks = [json.loads(line[6:]) for line in answer.split("\n\n") if line[6:] not in ("", "[DONE]")]
    texts: dict[int, str] = {}
    for choice in (choice for chunk in chunks for choice in chunk["choices"]):
        texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
    reasons = [c["finish_reason"] for chunk in chunks for c in chunk["choices"] if c["finish_reason"]]
    return texts, reasons, chunks[-1]["usage"]


def test_a_grammar_that_leaves_no_room_is_refused(server: Running) -> None:
    response = server.post("/v1/completions", {"prompt": "a", "regex": "abcdef", "max_tokens": 2})
    assert response.status_code == 400 and "too few" in response.json()["error"]["message"]


def test_a_watched_stream_tells_the_states_of_every_block(cola_server: Running) -> None:
    body = {"prompt": PROMPT, "stream": True, "seed": 2, "max_tokens": 9, "steps": 3}
    plain, watched = (cola_server.post("/v1/completions", body | {"watch": watch}).text for watch in (False, True))
    assert "states" not in plain
    chunks = [json.loads(line[6:]) for line in watched.split("\n\n") if line[6:] not in ("", "[DONE]")]
    seen = [chunk["choices"][0]["opencola"] for chunk in chunks if "opencola" in chunk["choices"][0]]
    assert [block["block"] for block in seen] == [*range(len(seen))] and len(seen) > 1
    for block in seen:
        assert [state["t"] for state in block["states"]] == [0.6667, 0.3333, 0.0]
        for state in block["states"]:
            assert len(state["tokens"]) == len(state["margins"]) == len(state["latents"]) == 4
    text = "".join(chunk["choices"][0]["text"] for chunk in chunks)
    assert text == "".join(json.loads(line[6:])["choices"][0]["text"] for line in plain.split("\n\n")[:-2])
