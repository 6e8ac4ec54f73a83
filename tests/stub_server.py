"""A server that speaks the page's protocol and answers from a script, for tests of the page."""

import json
import random
import re
import select
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

PAGE = Path(__file__).resolve().parent.parent / "opencola" / "serve" / "page.html"
NOISE = ["of", " th", "ing", " Ana", "é", " red", ".\n", " box", "??", " were", " un", "l", " sees", "—", " and"]


def block(number: int, tokens: Sequence[str], *, known: Sequence[str] = (), states: int = 9, width: int = 16) -> dict:
    """What is sent of a block: tokens that come out of noise, behind those that the prompt fixes; two a latent."""
    rng = random.Random(number)
    all_tokens = [*known, *tokens]
    order = [rng.uniform(0.15, 0.9) for _ in all_tokens]  # when each is settled
    rows = -(-len(all_tokens) // 2)
    ends = [[[rng.gauss(0, 1) for _ in range(width)] for _ in range(rows)] for _ in range(2)]
    sent = []
    for step in range(states):
        t = 1 - step / (states - 1)
        shown = [token if t <= when else rng.choice(NOISE) for token, when in zip(all_tokens, order, strict=True)]
        margins = [min(1.0, max(0.02, 0.55 + (when - t) + rng.uniform(-0.15, 0.15))) for when in order]
        latents = [
            [(1 - t) * a + t * b for a, b in zip(clean, noise, strict=True)] for clean, noise in zip(*ends, strict=True)
        ]
        sent.append({"t": t, "tokens": shown, "margins": margins, "latents": latents})
    out = [[7 + place, token] for place, token in enumerate(tokens)]
    return {"text": "".join(tokens), "opencola": {"block": number, "tokens": out, "states": sent}}


SAID = " found the old red box under the stairs, and in it lay a key that no door knew. She kept it for good: one day"
TOKENS = re.findall(r" \w+|\W", SAID)
STORY = [block(0, TOKENS[:14], known=["One", " day"]), block(1, TOKENS[14:])]
SETTINGS = {
    "max_new_tokens": {"default": 32, "kind": "int", "min": 1, "max": 512, "help": "Largest number of tokens."},
    "temperature": {"default": 0.0, "kind": "float", "min": 0, "help": "Of the choice of tokens."},
    "steps": {"default": 16, "kind": "int", "min": 1, "help": "Number of solver steps for a block."},
    "guidance": {"default": 7.0, "kind": "float", "help": "Scale of guidance; 1: none."},
    "solver": {"default": "euler", "kind": "choice", "choices": ["euler", "heun"], "help": "Solver of the flow."},
    "ignore_eos": {"default": False, "kind": "bool", "help": "Go on after the end of text."},
    "stop": {"default": [], "kind": "list", "help": "Strings that end the text."},
    "seed": {"default": 0, "kind": "int"},
}


class Stub:
    """What the server is to say, and what it was asked."""

    def __init__(self) -> None:
        self.models: list[dict] = [{"id": "tiny", "object": "model"}]
        self.blocks: list[dict] = []
        self.refusal: tuple[int, dict, dict[str, str]] | None = None  # status, error, headers
        self.sees = True  # has states to show
        self.key = ""  # asked for, if any
        self.ends = True  # with usage and [DONE]
        self.broken: dict | None = None  # an error in the stream, behind the blocks
        self.hold_after = 1 << 30  # blocks, behind which the stream waits for `go`
        self.go, self.gone = threading.Event(), threading.Event()
        self.asked: list[tuple[str, dict[str, Any]]] = []  # path, body
        self.url = ""

    def events(self, path: str) -> Iterator[dict | str]:
        """The stream's data."""
        for place, each in enumerate(self.blocks):
            choice = {"index": 0, "finish_reason": None, **each}
            if place == len(self.blocks) - 1:
                choice["finish_reason"] = "length"
            if "chat" in path:
                choice["delta"] = {"content": choice.pop("text")}
            yield {"id": "x", "model": "tiny", "choices": [choice], "usage": None}
        if self.broken is not None:
            yield {"error": self.broken}
        elif self.ends:
            count = sum(len(each.get("opencola", {}).get("tokens", "?")) for each in self.blocks)
            yield {"id": "x", "model": "tiny", "choices": [], "usage": {"completion_tokens": count}}
            yield "[DONE]"


@contextmanager
def serving() -> Iterator[Stub]:
    """A stub, at `url` while the context lasts."""
    stub = Stub()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def say(self, status: int, kind: str, body: bytes, **headers: str) -> None:
            self.send_response(status)
            for name, value in {"Content-Type": kind, **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            self.wfile.write(body)

        def refused(self, watch: bool = False) -> bool:
            """Whether the request was answered by an error."""
            refusal = stub.refusal
            if stub.key and self.headers["Authorization"] != f"Bearer {stub.key}":
                refusal = 401, {"message": "no such key", "type": "authentication_error", "code": "invalid_api_key"}, {}
            if watch and not stub.sees:
                refusal = 400, {"message": "watch: this server shows no states", "param": "watch"}, {}
            if refusal is None:
                return False
            status, error, headers = refusal
            self.say(status, "application/json", json.dumps({"error": error}).encode(), **headers)
            return True

        def do_GET(self) -> None:
            if self.path == "/":
                self.say(200, "text/html; charset=utf-8", PAGE.read_bytes())
            elif self.path == "/v1/models" and not self.refused():
                body = {"object": "list", "data": stub.models}
                self.say(200, "application/json", json.dumps(body).encode())
            elif self.path != "/v1/models":
                self.say(404, "text/plain", b"")

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            stub.asked.append((self.path, body))
            if self.refused(watch="watch" in body):
                return
            self.say(200, "text/event-stream", b": a comment\r\n\r\n")
            for place, event in enumerate(stub.events(self.path)):
                if place >= stub.hold_after and not self.released():
                    return
                data = event if isinstance(event, str) else json.dumps(event, ensure_ascii=False)
                line = f"data: {data}\r\n\r\n".encode()
                for start in range(0, len(line), 997):  # also in the middle of characters
                    self.wfile.write(line[start : start + 997])

        def released(self) -> bool:
            """Wait for `go`, or until the client is gone."""
            while not stub.go.wait(0.02):
                if select.select([self.connection], [], [], 0)[0] and not self.connection.recv(1, socket.MSG_PEEK):
                    stub.gone.set()
                    return False
            return True

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    stub.url = f"http://127.0.0.1:{server.server_port}/"
    try:
        yield stub
    finally:
        stub.go.set()
        server.shutdown()
        thread.join()
        server.server_close()
