"""What a server counts, as Prometheus reads it; every server has a registry of its own."""

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from opencola.serve.engine import Engine

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """Counts and times of one server."""

    def __init__(self, engine: Engine) -> None:
        self._registry = CollectorRegistry()
        about: dict[str, Any] = {"namespace": "opencola", "registry": self._registry}
        self.requests = Counter("requests", "Answers to requests.", ["path", "status"], **about)
        self.tokens = Counter("tokens", "Tokens of prompts, and written ones.", ["kind"], **about)
        self.rejected = Counter("rejected", "Requests that were not taken on.", ["reason"], **about)
        self.first_block = Histogram(
            "first_block_seconds", "From a request to a text's first block.", buckets=SECONDS, **about
        )
        self.block = Histogram("block_seconds", "From a block of a text to its next.", buckets=SECONDS, **about)
        Gauge("waiting", "Texts that wait.", **about).set_function(lambda: len(engine.waiting))
        Gauge("running", "Texts that are being written.", **about).set_function(lambda: engine.running)
        Gauge("cache_bytes", "Bytes of the caches of the texts that are being written.", **about).set_function(
            lambda: engine.cache_bytes
        )

    def text(self) -> bytes:
        """All of them, in Prometheus's format."""
        return generate_latest(self._registry)
