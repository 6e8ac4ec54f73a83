"""Tiny models behind a server, asked by the official client and by the guide's own examples."""

import asyncio
import re
import shlex
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import httpx
import openai
import pytest
from command_line import ROOT
from needed import need
from serving import AR_SAMPLING, COLA, WAIT, Running, ar, cola_engine, running, tokenizer

from opencola.models.text_stream import generate_text, whole_texts
from opencola.serve.engine import Engine
from opencola.serve.requests import Limits
from opencola.text.conversations import Message


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(cola_engine(), COLA) as server:
        yield server
        server.engine.close()


@pytest.fixture(scope="module")
def client(server: Running) -> openai.OpenAI:
    return server.client()


def test_a_seed_gives_the_texts_of_generate(server: Running, client: openai.OpenAI) -> None:
    model, own = server.engine.model, server.engine.tokenizer
    prompts = ["The fox", "", "The bear sat"]
    answer = client.completions.create(model="tiny", prompt=prompts, seed=11)
    assert [choice.text for choice in answer.choices] == whole_texts(model, own, prompts, replace(COLA, seed=11))
    assert answer.seed == 11  # type: ignore[attr-defined]
    assert answer.system_fingerprint.startswith("opencola-")  # type: ignore[union-attr]
    twice = client.completions.create(model="tiny", prompt=prompts[:2], n=2, seed=11)
    texts = whole_texts(model, own, ["The fox", "The fox", "", ""], replace(COLA, seed=11))
    assert [choice.text for choice in twice.choices] == texts
    ids = [own.encode(prompt) for prompt in prompts]
    assert client.completions.create(model="tiny", prompt=ids, seed=11).choices == answer.choices


def test_settings_are_the_models_own_unless_given(server: Running, client: openai.OpenAI) -> None:
    model, own = server.engine.model, server.engine.tokenizer
    given = {"steps": 3, "guidance": 2.0, "solver": "heun", "top_k": 5, "first_block": "partial"}
    answer = client.completions.create(
        model="tiny", prompt="The fox", seed=3, max_tokens=7, temperature=0.5, top_p=0.9, extra_body=given
    )
    sampling = replace(COLA, seed=3, max_new_tokens=7, temperature=0.5, top_p=0.9, **given)  # type: ignore[arg-type]
    assert [answer.choices[0].text] == whole_texts(model, own, ["The fox"], sampling)
    plain = client.completions.create(model="tiny", prompt="The fox", seed=3)
    assert plain.choices[0].text != answer.choices[0].text and plain.usage.completion_tokens == 10  # type: ignore


@pytest.mark.parametrize("stream", [False, True])
def test_tokens_are_counted_that_are_given_out(server: Running, client: openai.OpenAI, stream: bool) -> None:
    model, own = server.engine.model, server.engine.tokenizer
    ends = set()
    for seed in range(8):
        sampling = replace(COLA, seed=seed, max_new_tokens=30, stop=("a", "o"))
        pieces = [piece for (piece,) in generate_text(model, own, ["The fox"], sampling)]
        asked: dict[str, Any] = {"prompt": "The fox", "seed": seed, "max_tokens": 30, "stop": ["a", "o"]}
        if stream:
            chunks = [
                *client.completions.create(model="tiny", stream=True, stream_options={"include_usage": True}, **asked)
            ]
            usage, reason = chunks[-1].usage, chunks[-2].choices[0].finish_reason
            text = "".join(chunk.choices[0].text for chunk in chunks[:-1])
        else:
            answer = client.completions.create(model="tiny", **asked)
            usage, reason, text = answer.usage, answer.choices[0].finish_reason, answer.choices[0].text
        assert text == "".join(piece.text for piece in pieces)
        assert usage.completion_tokens == sum(len(piece.tokens) for piece in pieces) <= 30  # type: ignore[union-attr]
        assert usage.prompt_tokens == len(own.encode("The fox"))  # type: ignore[union-attr]
        ends.add(pieces[-1].finished)
        assert reason == ("length" if pieces[-1].finished == "length" else "stop")
        assert not any(mark in text for mark in ("a", "o"))
    assert ends >= {"stop", "length"}


def test_no_part_of_a_stop_string_is_told(client: openai.OpenAI) -> None:
    lengths = []
    for seed in range(8):
        asked: dict[str, Any] = {"prompt": "The fox", "seed": seed, "max_tokens": 30, "stream": True}
        text = "".join(chunk.choices[0].text for chunk in client.completions.create(model="tiny", **asked))
        stop = max(re.findall(r"[^\ufffd]+", text), key=len)  # halves of characters are whole with what follows
        chunks = client.completions.create(model="tiny", **asked, stop=["never", stop])
        assert "".join(chunk.choices[0].text for chunk in chunks) == text[: text.find(stop)]
        lengths.append(len(stop))
    assert sum(length > 2 for length in lengths) > 4


@pytest.mark.parametrize("stream", [False, True])
def test_who_leaves_holds_up_nobody(server: Running, stream: bool) -> None:
    body = {"prompt": "The fox", "stream": stream, "max_tokens": 10**6, "ignore_eos": True}
    if stream:
        with server.http.stream("POST", "/v1/completions", json=body) as response:
            assert next(response.iter_lines())
    else:
        with pytest.raises(httpx.ReadTimeout):
            server.post("/v1/completions", body, timeout=0.3)
    (text,) = whole_texts(*server_parts(server), ["The bear"], replace(COLA, seed=3))
    answer = server.post("/v1/completions", {"prompt": "The bear", "seed": 3})
    assert answer.json()["choices"][0]["text"] == text


def test_chunks_are_blocks(server: Running, client: openai.OpenAI) -> None:
    chunks = [*client.completions.create(model="tiny", prompt="The fox", seed=2, stream=True)]
    pieces = [piece for (piece,) in generate_text(*server_parts(server), ["The fox"], replace(COLA, seed=2))]
    assert len(pieces) > 2
    assert [c.choices[0].text for c in chunks if c.choices[0].finish_reason is None] == [
        piece.text for i, piece in enumerate(pieces) if piece.text or not i
    ]


def server_parts(server: Running) -> tuple[Any, Any]:
    return server.engine.model, server.engine.tokenizer


def test_chats(server: Running, client: openai.OpenAI) -> None:
    said: Any = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi"},
        {"role": "user", "content": [{"type": "text", "text": "Who are "}, {"type": "text", "text": "you?"}]},
    ]
    messages = [Message(*pair) for pair in [("system", "Be short."), ("user", "Hello"), ("assistant", "Hi")]]
    messages.append(Message("user", "Who are you?"))
    (text,) = whole_texts(*server_parts(server), [messages], replace(COLA, seed=4, chat=True))
    answer = client.chat.completions.create(model="tiny", messages=said, seed=4)
    assert answer.choices[0].message.content == text and answer.choices[0].message.role == "assistant"
    stream = client.chat.completions.create(model="tiny", messages=said, seed=4, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == text
    said += [answer.choices[0].message.model_dump(), {"role": "user", "content": "Why?"}]  # as clients send it back
    again = client.chat.completions.create(model="tiny", messages=said, seed=5)
    with client.chat.completions.stream(model="tiny", messages=said, seed=5) as events:
        deltas = [event.delta for event in events if event.type == "content.delta"]
    assert "".join(deltas) == again.choices[0].message.content


def test_asynchronous_clients(server: Running) -> None:
    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(
            base_url=f"{server.url}/v1", api_key="none", http_client=httpx.AsyncClient(verify=False, timeout=WAIT)
        ) as client:
            assert (await client.models.list()).data[0].id == "tiny"

            async def streamed(seed: int) -> str:
                stream = await client.completions.create(model="tiny", prompt="The fox", seed=seed, stream=True)
                return "".join([chunk.choices[0].text async for chunk in stream])

            async def whole(seed: int) -> str:
                answer = await client.completions.create(model="tiny", prompt="The fox", seed=seed)
                return answer.choices[0].text

            # a request without a seed among them changes nothing
            unseeded = client.completions.create(model="tiny", prompt="The fox", n=2)
            *texts, _ = await asyncio.gather(*(call(seed) for seed in range(3) for call in (streamed, whole)), unseeded)
            return texts

    texts = asyncio.run(ask())
    alone = [whole_texts(*server_parts(server), ["The fox"], replace(COLA, seed=seed))[0] for seed in range(3)]
    assert texts == [text for text in alone for _ in range(2)] and len({*alone}) == 3


def test_without_a_seed_texts_differ(client: openai.OpenAI) -> None:
    answers = [client.completions.create(model="tiny", prompt="The fox", max_tokens=30) for _ in range(2)]
    assert answers[0].choices[0].text != answers[1].choices[0].text
    again = client.completions.create(model="tiny", prompt="The fox", max_tokens=30, seed=answers[0].seed)  # type: ignore
    assert again.choices[0].text == answers[0].choices[0].text


def test_prompts_that_are_unusual(client: openai.OpenAI, server: Running) -> None:
    tokens = server.engine.tokenizer
    for prompt in ("", "<|im_end|>", "<|endoftext|>" * 3, "\0", "\U0010ffff", "\n" * 50, "ﷺ" * 20):
        answer = client.completions.create(model="tiny", prompt=prompt, echo=True, max_tokens=1, seed=0)
        assert answer.choices[0].text.startswith(prompt)
        assert answer.usage.prompt_tokens == len(tokens.encode(prompt))  # type: ignore[union-attr]
    ids = [tokens.eos_id, tokens.special_id("<|im_end|>"), tokens.pad_id]
    assert client.completions.create(model="tiny", prompt=ids, max_tokens=1).usage.prompt_tokens == 3  # type: ignore


def test_settings_beyond_a_models_numbers_are_an_error(server: Running) -> None:
    for stream in (False, True):
        response = server.post("/v1/completions", {"prompt": "a b c", "guidance": 3e38, "stream": stream})
        assert response.status_code == 400 and "finite" in response.json()["error"]["message"]


def test_a_model_without_marks_answers_nobody() -> None:
    own = tokenizer(chat=False)
    engine = Engine(ar(own.vocab_size), own, Limits())
    with running(engine, AR_SAMPLING) as server:
        client = server.client()
        with pytest.raises(openai.BadRequestError, match="conversations need a base model"):
            client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "a"}])
        with pytest.raises(openai.BadRequestError, match="no field 'steps'"):
            client.completions.create(model="tiny", prompt="a", extra_body={"steps": 3})
        answer = client.completions.create(model="tiny", prompt="The fox", seed=1)
        expected = whole_texts(engine.model, own, ["The fox"], replace(AR_SAMPLING, seed=1))
        assert [answer.choices[0].text] == expected
    engine.close()


def test_the_guides_examples(server: Running) -> None:
    curl = need("curl", "curl")
    page = (
        (ROOT / "docs" / "guide" / "serving.md")
        .read_text(encoding="utf-8")
        .replace("http://127.0.0.1:8000", server.url)
    )
    (shell,) = re.findall(r"^```sh\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    lines = shell.replace("\\\n", " ").strip().split("\n")
    assert len(lines) == 5
    for line in lines:
        command, *words = shlex.split(line)
        assert command == curl
        done = subprocess.run([curl, "-sS", "--fail-with-body", *words], capture_output=True, text=True, timeout=WAIT)
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout
    (python,) = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    exec(python.replace('"mine"', '"tiny"'), {})
