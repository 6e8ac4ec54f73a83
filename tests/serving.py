"""Servers in this process: of tiny models, and of engines whose pieces the test itself hands out."""

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import openai
import torch
from tiny import randomise, tiny_cola, tiny_llada

from opencola.layers.llama import LlamaConfig
from opencola.models.ar.model import AR
from opencola.models.ar.network import ARConfig
from opencola.models.ar.sampling import ARSampling
from opencola.models.cola.sampling import ColaSampling
from opencola.models.llada.sampling import LLaDASampling
from opencola.models.plaid.model import Plaid
from opencola.models.plaid.network import PlaidConfig
from opencola.models.plaid.sampling import PlaidSampling
from opencola.models.sampling import Sampling
from opencola.serve.api import app
from opencola.serve.engine import Engine
from opencola.serve.requests import Limits, Request, StoppingError, Stream
from opencola.serve.server import Server, bound
from opencola.text.conversations import TURN_END, TURN_START
from opencola.text.tokenizer import Tokenizer

WAIT = 30.0
"""Seconds after which something that is to happen has not."""


def tokenizer(chat: bool = True) -> Tokenizer:
    """All bytes, a few merges, and maybe the marks of conversations."""
    texts = ["The fox ran to the hill. The bear sat there."] * 5
    return Tokenizer.train(texts, 280, [TURN_START, TURN_END] if chat else [])


def cola(vocab_size: int) -> Any:
    """A tiny Cola DLM in float32."""
    return tiny_cola(vae={"vocab_size": vocab_size}).float().eval()


def ar(vocab_size: int) -> Any:
    """A tiny AR model in float32."""
    trunk = LlamaConfig(width=16, num_layers=1, num_heads=2, ffn_dim=24)
    return randomise(AR(ARConfig(vocab_size=vocab_size, bos_id=0, trunk=trunk))).float().eval()


def others(vocab_size: int) -> dict[str, tuple[Any, Sampling]]:
    """Tiny models of the other families, each with settings."""
    trunk = LlamaConfig(width=16, num_layers=1, num_heads=2, ffn_dim=24)
    plaid = Plaid(PlaidConfig(vocab_size, 4, trunk, 0.5)).float().eval()
    return {
        "ar": (ar(vocab_size), AR_SAMPLING),
        "llada": (tiny_llada(vocab_size=vocab_size).float().eval(), LLaDASampling(steps=2, block_length=4)),
        "plaid": (plaid, PlaidSampling(steps=2)),
    }


COLA = ColaSampling(steps=2, max_new_tokens=10, temperature=1.0)
AR_SAMPLING = ARSampling(max_new_tokens=10, temperature=1.0)


class Scripted(Engine):
    """An engine that writes nothing: its texts are handed out by the test, by `put` of the streams in `taken`."""

    running = cache_bytes = 0

    def __init__(self, limits: Limits | None = None) -> None:
        self.tokenizer, self.limits = tokenizer(), limits or Limits()
        self.model = cola(self.tokenizer.vocab_size)
        self.waiting: Any = []
        self.refuse: Exception | None = None
        self.taken: list[Stream] = []
        self.arrived = threading.Semaphore(0)

    def submit(self, *requests: Request) -> list[Stream]:
        if self.refuse is not None:
            raise self.refuse
        streams = [Watched(request, asyncio.get_running_loop()) for request in requests]
        self.taken += streams
        for _ in streams:
            self.arrived.release()
        return list(streams)

    def close(self, timeout: float | None = None) -> None:
        self.refuse = StoppingError("the server is stopping")

    def next(self, count: int = 1) -> "list[Watched]":
        """The next texts that are asked for."""
        for _ in range(count):
            assert self.arrived.acquire(timeout=WAIT)
        return [stream for stream in self.taken[-count:] if isinstance(stream, Watched)]


@dataclass
class Watched(Stream):
    """A stream that tells when it is cancelled."""

    def __post_init__(self) -> None:
        self.dropped = threading.Event()

    def cancel(self) -> None:
        super().cancel()
        self.dropped.set()


@dataclass
class Running:
    """A server that runs."""

    url: str
    engine: Any
    server: Server
    http: httpx.Client

    def client(self, **options: Any) -> openai.OpenAI:
        """The official client."""
        given = {"api_key": "none", "max_retries": 0, "http_client": self.http} | options
        return openai.OpenAI(base_url=f"{self.url}/v1", **given)

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        """An answer to a body as it is."""
        content = {"content": body} if isinstance(body, bytes) else {"json": body}
        headers = {"Content-Type": "application/json"} | options.pop("headers", {})
        return self.http.post(path, headers=headers, **content, **options)

    def get(self, path: str, **options: Any) -> httpx.Response:
        """An answer."""
        return self.http.get(path, **options)


@contextlib.contextmanager
def running(engine: Engine, sampling: Sampling, name: str = "tiny", **options: Any) -> Iterator[Running]:
    """A server of an engine, at a free port, in a thread."""
    place = bound("127.0.0.1", 0)
    ready = threading.Event()

    class Here(Server):
        async def startup(self, sockets: Any = None) -> None:
            await super().startup(sockets)
            ready.set()

    server = Here(app(engine, name, sampling, **options), engine)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [place]}, daemon=True)
    thread.start()
    assert ready.wait(WAIT)
    url = f"http://127.0.0.1:{place.getsockname()[1]}"
    try:
        with httpx.Client(base_url=url, timeout=WAIT, verify=False) as http:  # certificates take long to load
            yield Running(url, engine, server, http)
    finally:
        server.should_exit = True
        thread.join(WAIT)
        assert not thread.is_alive()


def cola_engine(**limits: Any) -> Engine:
    """Of a tiny Cola DLM."""
    torch.manual_seed(0)
    own = tokenizer()
    return Engine(cola(own.vocab_size), own, Limits(**limits))
