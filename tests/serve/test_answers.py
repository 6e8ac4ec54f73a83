"""The interface around an engine whose pieces the test hands out: shapes of answers, streams, and who leaves."""

import gc
import json
import socket
import time
import weakref
from typing import Any

import pytest
from serving import CHAT, COLA, PATHS, WAIT, Running, Scripted, events, later, running, streamed, write

from opencola.serve.admission import Admission
from opencola.serve.requests import Piece


def test_a_completion(server: Running) -> None:
    thread, found = later(server.post, "/v1/completions", {"prompt": ["a", "bc"], "n": 2, "echo": True, "seed": 5})
    streams = server.engine.next(4)
    assert [stream.request.sample for stream in streams] == [0, 1, 2, 3]
    for i, stream in enumerate(reversed(streams)):
        write(stream, f" {i}", ".", finished=("eos", "stop", "length", "eos")[i], tokens=i)
    thread.join(WAIT)
    answer = found[0].json()
    assert answer.pop("id").startswith("cmpl-") and abs(answer.pop("created") - time.time()) < 600
    assert answer == {
        "object": "text_completion",
        "model": "tiny",
        "system_fingerprint": "mark",
        "seed": 5,
        "choices": [
            {"index": 0, "text": "a 3.", "logprobs": None, "finish_reason": "stop"},
            {"index": 1, "text": "a 2.", "logprobs": None, "finish_reason": "length"},
            {"index": 2, "text": "bc 1.", "logprobs": None, "finish_reason": "stop"},
            {"index": 3, "text": "bc 0.", "logprobs": None, "finish_reason": "stop"},
        ],
        "usage": {"prompt_tokens": 3, "completion_tokens": 12, "total_tokens": 15},
    }


def test_a_chat(server: Running) -> None:
    thread, found = later(server.post, "/v1/chat/completions", CHAT | {"stop": "x"})
    (stream,) = server.engine.next()
    tokenizer, asked = server.engine.tokenizer, stream.request
    start, end = (tokenizer.special_id(f"<|im_{name}|>") for name in ("start", "end"))
    assert asked.prompt[0] == start and asked.prompt.count(end) == 1 and asked.prompt.count(start) == 2
    assert asked.end_ids == (tokenizer.eos_id, end)
    assert asked.sampling.chat and asked.sampling.stop == ("x",) and asked.sampling.steps == COLA.steps
    write(stream, "Fi", "ne")
    thread.join(WAIT)
    answer = found[0].json()
    assert answer["object"] == "chat.completion" and answer["id"].startswith("chatcmpl-")
    message = {"role": "assistant", "content": "Fine", "refusal": None}
    assert answer["choices"] == [{"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}]
    assert answer["usage"]["prompt_tokens"] == len(asked.prompt)


def test_a_streamed_completion(server: Running) -> None:
    body = {"prompt": "a", "n": 2, "stream": True, "echo": True, "stream_options": {"include_usage": True}}
    with streamed(server, "/v1/completions", body, Piece("", [9, 9], ""), 2) as (response, (first, second)):
        write(first, " b", "", finished="length")
        lines, seen = response.iter_lines(), ""
        while '"length"' not in seen:
            seen += f"{next(lines)}\n"
        write(second, " c", "d")
        seen += "\n".join(lines)
    *chunks, last, done = events(seen)
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8" and done == "[DONE]"
    assert len({(c["id"], c["created"], c["object"], c["model"], c["seed"]) for c in [*chunks, last]}) == 1
    assert [c["choices"][0] for c in chunks] == [
        {"index": i, "text": text, "logprobs": None, "finish_reason": reason}
        for i, text, reason in [
            (0, "a", None),
            (0, " b", None),
            (0, "", "length"),
            (1, "a c", None),
            (1, "d", None),
            (1, "", "stop"),
        ]
    ]
    assert all(c["usage"] is None for c in chunks) and last["choices"] == []
    assert last["usage"] == {"prompt_tokens": 1, "completion_tokens": 10, "total_tokens": 11}


def test_a_streamed_chat(server: Running) -> None:
    thread, found = later(server.post, "/v1/chat/completions", CHAT | {"stream": True})
    write(*server.engine.next(), "", "Fi", "ne")
    thread.join(WAIT)
    *chunks, done = events(found[0].text)
    assert done == "[DONE]" and all(c["object"] == "chat.completion.chunk" and "usage" not in c for c in chunks)
    assert [(c["choices"][0]["delta"], c["choices"][0]["finish_reason"]) for c in chunks] == [
        ({"role": "assistant", "content": ""}, None),
        ({"content": "Fi"}, None),
        ({"content": "ne"}, None),
        ({}, "stop"),
    ]


def test_blocks_are_told_of_to_those_who_watch(server: Running) -> None:
    thread, found = later(server.post, "/v1/completions", {"prompt": "a", "stream": True, "watch": True})
    write(*server.engine.next(), "", "b", tokens=1)
    thread.join(WAIT)
    *chunks, _ = events(found[0].text)
    told = [9, server.engine.tokenizer.decode([9])]
    assert [c["choices"][0].get("opencola") for c in chunks] == [
        {"block": 0, "tokens": [told]},
        {"block": 1, "tokens": [told]},
        None,
    ]


@pytest.mark.parametrize("path", PATHS)
def test_chunks_come_as_soon_as_they_are_there(server: Running, path: str) -> None:
    with streamed(server, path, PATHS[path], Piece("one", [9], "")) as (response, (stream,)):
        lines = response.iter_lines()
        assert "one" in next(lines) and next(lines) == ""
        for text in ("two", "three"):
            stream.put(Piece(text, [9], ""))  # the next is not there yet
            assert text in next(lines) and next(lines) == ""


def test_two_requests_without_a_seed_differ(server: Running) -> None:
    seeds = []
    for _ in range(2):
        thread, found = later(server.post, "/v1/completions", {"prompt": "a", "n": 2})
        first, second = server.engine.next(2)
        assert first.request.sampling.seed == second.request.sampling.seed
        write(first, "b"), write(second, "b")
        thread.join(WAIT)
        assert found[0].json()["seed"] == first.request.sampling.seed < 2**53
        seeds.append(first.request.sampling.seed)
    assert seeds[0] != seeds[1]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", PATHS)
def test_who_leaves_is_noticed(server: Running, path: str, stream: bool) -> None:
    for begun in (False, True):
        body = json.dumps(PATHS[path] | {"stream": stream, "n": 3}).encode()
        head = (
            f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        with socket.create_connection(server.url.removeprefix("http://").split(":"), timeout=WAIT) as connection:
            connection.sendall(head.encode() + body)
            streams = server.engine.next(3)
            if begun:
                streams[1].put(Piece("one", [9], ""))
                if stream:
                    assert connection.recv(10)
            assert not any(each.cancelled for each in streams)
        assert all(each.dropped.wait(WAIT) for each in streams)
    thread, found = later(server.post, path, PATHS[path])
    write(*server.engine.next(), "b")
    thread.join(WAIT)
    assert found[0].status_code == 200


def test_who_does_not_read_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("opencola.serve.api.GRACE", 0.0)
    body = b'{"prompt": "a", "stream": true}'
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    with running(Scripted(), COLA, admission=Admission(timeout=1.0)) as server:
        with socket.create_connection(server.url.removeprefix("http://").split(":"), timeout=WAIT) as connection:
            connection.sendall(head % len(body) + body)
            (stream,) = server.engine.next()
            for _ in range(20):  # more than fits between the two
                stream.put(Piece("a" * 2**20, [9], ""))
            assert stream.dropped.wait(WAIT)
        text = server.get("/metrics").text
    assert 'status="500"' not in text


def test_what_is_done_leaves_nothing_behind(server: Running) -> None:
    def streams() -> list[Any]:
        for body in ({"prompt": "a"}, {"prompt": "a", "stream": True}):
            thread, _ = later(server.post, "/v1/completions", body)
            write(*server.engine.next(), "b")
            thread.join(WAIT)
        kept = [weakref.ref(stream) for stream in server.engine.taken]
        server.engine.taken = []
        return kept

    kept = streams()
    end = time.monotonic() + WAIT
    while any(ref() for ref in kept) and time.monotonic() < end:
        server.get("/health")
        gc.collect()
    assert len(kept) == 2 and not any(ref() for ref in kept)
