"""What is around the answers: keys, ids and the log, metrics, the page, the list of models."""

import logging
import queue
from collections.abc import Iterator

import openai
import pytest
from serving import COLA, WAIT, Running, Scripted, error, later, line_of, running, streamed, write

from opencola.serve.requests import Piece, QueueFullError


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


def test_who_leaves_is_logged_and_counted(server: Running, log: "queue.Queue[str]") -> None:
    with streamed(server, "/v1/completions", {"prompt": "a"}, Piece("b", [9, 9], "")) as (response, _):
        assert next(response.iter_lines())
    line = line_of(log, response.headers["x-request-id"])
    assert line["path"] == "/v1/completions" and line["status"] == 499 and line["completion_tokens"] == 2
    assert 'opencola_requests_total{path="/v1/completions",status="499"}' in server.get("/metrics").text


def test_ids_and_the_log(server: Running, log: "queue.Queue[str]") -> None:
    thread, found = later(server.post, "/v1/completions", {"prompt": "secret"}, headers={"X-Request-Id": "mine-1"})
    write(*server.engine.next(), "answer")
    thread.join(WAIT)
    others = [
        server.get("/nothing", headers={"X-Request-Id": "a b\x7f"}).headers["x-request-id"],
        server.get("/health").headers["x-request-id"],
    ]
    assert found[0].headers["x-request-id"] == "mine-1" and len({*others}) == 2
    lines = {name: line_of(log, name) for name in ("mine-1", *others)}
    assert lines["mine-1"].keys() >= {"time", "client", "method", "path", "seconds"}
    assert lines["mine-1"]["status"] == 200 and lines["mine-1"]["completion_tokens"] == 2
    assert lines[others[0]]["status"] == 404
    assert not any(word in str(line) for word in ("secret", "answer") for line in lines.values())


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


def test_the_page_and_the_models(server: Running) -> None:
    assert server.get("/").headers["content-type"].startswith("text/html") and "<html" in server.get("/").text
    models = server.get("/v1/models").json()
    assert models["object"] == "list" and [model["id"] for model in models["data"]] == ["tiny"]
    assert models["data"][0] == server.get("/v1/models/tiny").json()
    assert models["data"][0]["opencola"]["sampling"]["steps"]["default"] == COLA.steps
    with running(Scripted(), COLA, name="me/tiny") as other:
        assert other.client().models.retrieve("me/tiny").id == "me/tiny"


def test_other_origins_get_no_leave(server: Running) -> None:
    asked = {"Origin": "http://elsewhere", "Access-Control-Request-Method": "POST"}
    for response in (
        server.http.options("/v1/completions", headers=asked),
        server.get("/v1/models", headers=asked),
    ):
        assert not [name for name in response.headers if name.startswith("access-control")]


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
