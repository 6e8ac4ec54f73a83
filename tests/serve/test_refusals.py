"""What is refused, how it is said, and what goes wrong in the middle of a text."""

import socket
from typing import Any

import openai
import pytest
from serving import COLA, WAIT, Running, Scripted, error, events, later, running

from opencola.serve.admission import Admission
from opencola.serve.requests import Piece, QueueFullError, Request, StoppingError, Stream, TooLargeError


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
    with running(Scripted(), COLA, admission=Admission(timeout=0.2)) as server:
        response = server.post("/v1/completions", {"prompt": "a"})
        assert response.status_code == 504 and error(response)["code"] == "timeout"
        response = server.post("/v1/completions", {"prompt": "a", "stream": True})
        assert response.status_code == 504
        assert all(stream.cancelled for stream in server.engine.taken)
    with running(Begun(), COLA, admission=Admission(timeout=1.0)) as server:
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
        ({"response_format": {"type": "json_schema", "json_schema": BAD_SCHEMA}}, "response_format"),
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


def test_bodies_that_do_not_come(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n"
    address = server.url.removeprefix("http://").split(":")
    with socket.create_connection(address, timeout=WAIT) as connection:
        connection.sendall(head + b"{")  # and leaves
    monkeypatch.setattr("opencola.serve.body.SECONDS", 0.1)
    with socket.create_connection(address, timeout=WAIT) as connection:
        connection.sendall(head + b"{")
        assert connection.recv(100).startswith(b"HTTP/1.1 408")
    assert server.get("/health").status_code == 200 and not server.engine.taken
