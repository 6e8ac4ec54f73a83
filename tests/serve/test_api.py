"""The interface around an engine whose pieces the test hands out: shapes of answers, errors, keys, and who leaves."""

import contextlib
import gc
import json
import logging
import queue
import socket
import threading
import time
import weakref
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from serving import COLA, WAIT, Running, Scripted, Watched, running

from opencola.serve.requests import Limits, Piece, QueueFullError, Request, StoppingError, Stream, TooLargeError

CHAT = {"messages": [{"role": "user", "content": "Hello"}]}
PATHS = {"/v1/completions": {"prompt": "The fox"}, "/v1/chat/completions": CHAT}


@pytest.fixture(scope="module")
def shared() -> Iterator[Running]:
    with running(Scripted(Limits(max_waiting=6)), COLA, fingerprint="mark", max_body=100_000) as server:
        yield server


@pytest.fixture
def server(shared: Running) -> Running:
    shared.engine.refuse, shared.engine.taken = None, []
    return shared


class Lines(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: queue.Queue[str] = queue.Queue()

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.put(record.getMessage())


@pytest.fixture
def log(server: Running) -> Iterator["queue.Queue[str]"]:
    """The lines of the server's log, as they come."""
    logger, handler = logging.getLogger("opencola.serve"), Lines()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield handler.lines
    logger.removeHandler(handler)
    logger.setLevel(level)


def later(call: Any, *args: Any, **named: Any) -> "tuple[threading.Thread, list[Any]]":
    """A call in a thread, and the list that its answer will be in."""
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(call(*args, **named)), daemon=True)
    thread.start()
    return thread, found


@contextlib.contextmanager
def streamed(server: Running, path: str, body: Any, first: Piece, count: int = 1) -> Iterator[Any]:
    """A stream of texts, the first of which has its first piece; the answer and the texts."""

    def begin() -> list[Watched]:
        streams: list[Watched] = server.engine.next(count)
        streams[0].put(first)
        return streams

    thread, found = later(begin)
    with server.http.stream("POST", path, json=body | {"stream": True}) as response:
        thread.join(WAIT)
        yield response, found[0]


def write(stream: Watched, *texts: str, finished: Any = "eos", tokens: int = 2) -> None:
    for i, text in enumerate(texts):
        stream.put(Piece(text, [9] * tokens, finished if i == len(texts) - 1 else ""))


def events(text: str) -> list[Any]:
    """The data of a stream."""
    lines = [line for line in text.split("\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    said = [line.removeprefix("data: ") for line in lines]
    return [each if each == "[DONE]" else json.loads(each) for each in said]


def error(response: httpx.Response) -> dict[str, Any]:
    assert {*response.json()} == {"error"} and response.headers["content-type"] == "application/json"
    found: dict[str, Any] = response.json()["error"]
    assert {*found} == {"message", "type", "param", "code"} and found["message"]
    return found


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


def test_who_leaves_is_logged_and_counted(server: Running, log: "queue.Queue[str]") -> None:
    with streamed(server, "/v1/completions", {"prompt": "a"}, Piece("b", [9, 9], "")) as (response, _):
        assert next(response.iter_lines())
    line = json.loads(log.get(timeout=WAIT))
    assert line["path"] == "/v1/completions" and line["status"] == 499 and line["completion_tokens"] == 2
    assert 'opencola_requests_total{path="/v1/completions",status="499"}' in server.get("/metrics").text


def test_who_does_not_read_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("opencola.serve.api.GRACE", 0.0)
    body = b'{"prompt": "a", "stream": true}'
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    with running(Scripted(), COLA, timeout=1.0) as server:
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


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("raised", "status", "code"),
    [
        (QueueFullError("6 texts wait"), 429, "rate_limit_exceeded"),
        (StoppingError("the server is stopping"), 503, "stopping"),
        (TooLargeError("too large"), 400, "too_large"),
    ],
)
def test_what_is_not_taken_on(server: Running, raised: Exception, status: int, code: str, stream: bool) -> None:
    server.engine.refuse = raised
    response = server.post("/v1/completions", {"prompt": "a", "stream": stream})
    assert response.status_code == status and error(response)["code"] == code
    assert ("retry-after" in response.headers) == (status != 400)


@pytest.mark.parametrize("stream", [False, True])
def test_waiting_requests_are_refused_when_the_server_stops(server: Running, stream: bool) -> None:
    thread, found = later(server.post, "/v1/completions", {"prompt": "a", "n": 2, "stream": stream})
    first, second = server.engine.next(2)
    first.put(StoppingError("the server is stopping"))
    thread.join(WAIT)
    assert found[0].status_code == 503 and error(found[0])["code"] == "stopping"
    assert second.dropped.wait(WAIT)


def test_what_goes_wrong_in_a_text(server: Running, caplog: pytest.LogCaptureFixture) -> None:
    for stream in (False, True):
        thread, found = later(server.post, "/v1/completions", {"prompt": "secret", "n": 2, "stream": stream})
        first, second = server.engine.next(2)
        first.put(Piece("b", [9], ""))
        second.put(RuntimeError("bug 17"))
        thread.join(WAIT)
        assert first.dropped.wait(WAIT)
        said = events(found[0].text)[-1]["error"] if stream else error(found[0])
        assert found[0].status_code == (200 if stream else 500)
        assert said["type"] == "server_error" and "17" not in said["message"]
    assert caplog.text.count("bug 17") >= 2 and "secret" not in caplog.text


def test_a_stream_that_breaks_is_an_error_for_the_client(server: Running) -> None:
    thread, found = later(server.client().completions.create, model="tiny", prompt="a", stream=True)
    (text,) = server.engine.next()
    text.put(Piece("b", [9], ""))
    thread.join(WAIT)
    (stream,) = found
    assert next(stream).choices[0].text == "b"
    text.put(StoppingError("the server is stopping"))
    with pytest.raises(openai.APIError, match="stopping"):
        next(stream)


class Begun(Scripted):
    """Writes the first piece of every text, and no more."""

    def submit(self, *requests: Request) -> list[Stream]:
        streams = super().submit(*requests)
        for stream in streams:
            stream.put(Piece("b", [9], ""))
        return streams


def test_a_request_has_its_time() -> None:
    with running(Scripted(), COLA, timeout=0.2) as server:
        response = server.post("/v1/completions", {"prompt": "a"})
        assert response.status_code == 504 and error(response)["code"] == "timeout"
        response = server.post("/v1/completions", {"prompt": "a", "stream": True})
        assert response.status_code == 504
        assert all(stream.cancelled for stream in server.engine.taken)
    with running(Begun(), COLA, timeout=1.0) as server:
        *_, last = events(server.post("/v1/completions", {"prompt": "a", "stream": True}).text)
        assert last["error"]["code"] == "timeout" and server.engine.taken[0].cancelled


BAD_SCHEMA = {"name": "x", "schema": {"type": 3}}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"model": "gpt-4"}, "model"),
        ({"max_tokens": 3, "max_completion_tokens": 3}, "max_tokens"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"watch": True}, "watch"),
        ({"best_of": 2}, "best_of"),
        ({"regex": "("}, "regex"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": 3}}}},
            "response_format",
        ),
        ({"regex": "a", "grammar": "b"}, "grammar"),
        ({"prompt": [0, 10**6]}, "prompt"),
        ({"n": 7}, "n"),
        ({"prompt": ["a"] * 4, "n": 2}, "prompt"),
        ({"steps": 100, "candidates": 50}, None),
        ({"verify": "greedy", "candidates": 2}, None),
    ],
)
def test_fields_that_ask_for_what_cannot_be(server: Running, fields: dict[str, Any], param: str | None) -> None:
    response = server.post("/v1/completions", {"prompt": "a"} | fields)
    assert response.status_code == (404 if param == "model" else 400)
    assert error(response)["param"] == param and not server.engine.taken


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nothing", 404),
        ("GET", "/v1/completions", 405),
        ("POST", "/health", 405),
        ("PUT", "/v1/models", 405),
        ("GET", "/v1/models/other", 404),
        ("GET", "/docs", 404),
        ("GET", "/%ff%00", 404),
    ],
)
def test_paths_and_methods_that_there_are_not(server: Running, method: str, path: str, status: int) -> None:
    response = server.http.request(method, path)
    assert response.status_code == status and error(response)["type"] == "invalid_request_error"


@pytest.mark.parametrize("kind", ["text/plain", "", "application/x-www-form-urlencoded", "multipart/form-data"])
def test_a_body_is_json_by_its_type(server: Running, kind: str) -> None:
    response = server.post("/v1/completions", b'{"prompt": "a"}', headers={"Content-Type": kind})
    assert response.status_code == 415 and error(response)


def test_bodies_that_are_none(server: Running) -> None:
    for body in (b"", b"{", b"\xff\xfe", b"[" * 50_000, b'{"prompt": "\\udc00"}', b'{"prompt": "a", "top_p": NaN}'):
        response = server.post("/v1/completions", body)
        assert response.status_code == 400 and error(response), body


def test_long_bodies(server: Running) -> None:
    response = server.post("/v1/completions", b'{"prompt": "' + b"a" * 10_000_000 + b'"}')
    assert response.status_code == 413 and "100000 bytes" in error(response)["message"]
    pieces = (b"a" * 10_000 for _ in range(50))  # of no length that is told beforehand
    response = server.http.post("/v1/completions", content=pieces, headers={"Content-Type": "application/json"})
    assert response.status_code == 413 and error(response)["code"] == "body_too_long"
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    with socket.create_connection(server.url.removeprefix("http://").split(":"), timeout=WAIT) as connection:
        connection.sendall(head + b"Expect: 100-continue\r\nContent-Length: 1000000\r\n\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 413")


def test_the_key() -> None:
    with running(Scripted(), COLA, api_key="schlüssel") as server:
        for given in ("", "schlüssel", "Bearer", "Bearer schlüsse", "Basic schlüssel", "Bearer schlüssel2"):
            for path in ("/v1/models", "/metrics", "/nothing"):
                response = server.get(path, headers={"Authorization": given.encode()} if given else {})
                assert response.status_code == 401 and error(response)["code"] == "invalid_api_key"
        assert server.post("/v1/completions", b"{").status_code == 401
        assert server.get("/").status_code == server.get("/health").status_code == 200
        assert server.get("/v1/models", headers={"Authorization": "Bearer schlüssel".encode()}).status_code == 200
    with running(Scripted(), COLA, api_key="right") as server:
        assert server.client(api_key="right").models.list().data[0].id == "tiny"
        with pytest.raises(openai.AuthenticationError):
            server.client(api_key="wrong").models.list()


def test_ids_and_the_log(server: Running, log: "queue.Queue[str]") -> None:
    thread, found = later(server.post, "/v1/completions", {"prompt": "secret"}, headers={"X-Request-Id": "mine-1"})
    write(*server.engine.next(), "answer")
    thread.join(WAIT)
    others = [
        server.get("/nothing", headers={"X-Request-Id": "a b\x7f"}).headers["x-request-id"],
        server.get("/health").headers["x-request-id"],
    ]
    assert found[0].headers["x-request-id"] == "mine-1" and len({*others}) == 2
    said = [log.get(timeout=WAIT) for _ in range(3)]
    lines = {line["id"]: line for line in map(json.loads, said)}
    assert {*lines} == {"mine-1", *others}
    assert lines["mine-1"].keys() >= {"time", "client", "method", "path", "seconds"}
    assert lines["mine-1"]["status"] == 200 and lines["mine-1"]["completion_tokens"] == 2
    assert lines[others[0]]["status"] == 404
    assert not any(word in line for word in ("secret", "answer") for line in said)


def test_other_origins_get_no_leave(server: Running) -> None:
    asked = {"Origin": "http://elsewhere", "Access-Control-Request-Method": "POST"}
    for response in (
        server.http.options("/v1/completions", headers=asked),
        server.get("/v1/models", headers=asked),
    ):
        assert not [name for name in response.headers if name.startswith("access-control")]


def test_the_page_and_the_models(server: Running) -> None:
    assert server.get("/").headers["content-type"].startswith("text/html") and "<html" in server.get("/").text
    models = server.get("/v1/models").json()
    assert models["object"] == "list" and [model["id"] for model in models["data"]] == ["tiny"]
    assert models["data"][0] == server.get("/v1/models/tiny").json()
    assert models["data"][0]["opencola"]["sampling"]["steps"]["default"] == COLA.steps
    with running(Scripted(), COLA, name="me/tiny") as other:
        assert other.client().models.retrieve("me/tiny").id == "me/tiny"


def test_metrics() -> None:
    engine = Scripted()
    with running(engine, COLA) as server:
        thread, _ = later(server.post, "/v1/completions", {"prompt": "ab"})
        write(*engine.next(), "a", "b", "c")
        thread.join(WAIT)
        server.get("/a"), server.get("/b")
        engine.refuse = QueueFullError("full")
        server.post("/v1/completions", {"prompt": "a"})
        engine.waiting, engine.running = [1, 2, 3], 2
        told = server.get("/metrics")
    assert told.headers["content-type"].startswith("text/plain")
    assert (
        dict(line.rsplit(" ", 1) for line in told.text.split("\n") if line and line[0] != "#").items()
        >= {
            'opencola_requests_total{path="/v1/completions",status="200"}': "1.0",
            'opencola_requests_total{path="/v1/completions",status="429"}': "1.0",
            'opencola_requests_total{path="other",status="404"}': "2.0",
            'opencola_tokens_total{kind="prompt"}': "2.0",
            'opencola_tokens_total{kind="written"}': "6.0",
            'opencola_rejected_total{reason="full"}': "1.0",
            "opencola_first_block_seconds_count": "1.0",
            "opencola_block_seconds_count": "2.0",
            "opencola_waiting": "3.0",
            "opencola_running": "2.0",
        }.items()
    )
