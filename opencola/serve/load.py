"""A load on a server of OpenAI's protocol, and what each request was given, when."""

import asyncio
import json
import random
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from opencola.errors import UserError

try:
    import httpx
except ImportError:
    raise UserError("a server is asked by httpx: pip install 'opencola[serve]'") from None


COMPLETIONS = "/v1/completions"
LONGEST_WAIT = 5.0
"""Seconds that a refused client waits at most, whatever Retry-After says."""


@dataclass(frozen=True)
class Load:
    """What to ask a server for, and how fast."""

    prompts: Sequence[str]
    """Request i asks for prompt i, from the first again where there are fewer."""
    requests: int
    max_tokens: int
    seed: int
    """Of the texts of all requests, and of the times at which they begin."""
    concurrency: int = 16
    """Clients that wait for their answers before they ask again."""
    rate: float | None = None
    """Requests a second that begin whatever has become of others, in place of that."""

    def prompt(self, number: int) -> str:
        """Of a request."""
        return self.prompts[number % len(self.prompts)]


@dataclass
class Outcome:
    """What became of one request; times are seconds."""

    id: int
    start: float
    """Since the load began."""
    status: int = 0
    """Of HTTP; 0: no answer."""
    error: str = ""
    """What went wrong; nothing if the text came to its end."""
    first_block: float | None = None
    """From the request to the first piece of text."""
    between: list[float] = field(default_factory=list)
    """From each piece to the next."""
    latency: float = 0.0
    """From the request to the end of the answer."""
    prompt_tokens: int = 0
    tokens: int = 0
    text: str = ""
    finish_reason: str | None = None
    retry_after: float | None = None
    """What a refusal says."""


class Server:
    """A server as its clients see it."""

    def __init__(self, url: str, api_key: str = "", timeout: float = 600.0) -> None:
        """timeout: seconds for a request, and for each wait inside it."""
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self.url, self._timeout = url.rstrip("/").removesuffix("/v1"), timeout
        try:
            self._http = httpx.AsyncClient(
                base_url=self.url,
                headers=headers,
                timeout=timeout,
                limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
                trust_env=False,  # a proxy would be measured along
                verify=self.url.startswith("https:"),  # certificates take long to load
            )
        except httpx.InvalidURL as error:
            raise UserError(f"{url} is no URL: {error}") from None

    async def __aenter__(self) -> "Server":
        await self._http.__aenter__()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._http.aclose()

    async def model(self) -> str:
        """What requests call its model. Raises UserError where there is no such server."""
        try:
            answer = await self._http.get("/v1/models")
            answer.raise_for_status()
            return str(answer.json()["data"][0]["id"])
        except httpx.HTTPStatusError as error:
            raise UserError(f"{self.url} answers {_said(error.response)}") from None
        except httpx.HTTPError as error:
            raise UserError(f"there is no server at {self.url}: {_named(error)}") from None
        except (ValueError, LookupError, TypeError):
            raise UserError(f"{self.url} does not speak OpenAI's protocol: it names no model at /v1/models") from None

    async def drive(self, load: Load, model: str, done: Callable[[Outcome], None], first: int = 0) -> None:
        """Have all requests of a load made, and tell of each as it ends.

        first: number of the first request, whose prompt it decides.
        """
        begin = time.perf_counter()
        numbers = iter(range(first, first + load.requests))

        async def one(number: int) -> Outcome:
            outcome = Outcome(number, time.perf_counter() - begin)
            await self.ask(load, model, outcome)
            done(outcome)
            return outcome

        async def client() -> None:
            for number in numbers:
                outcome = await one(number)
                if outcome.retry_after is not None:
                    await asyncio.sleep(min(outcome.retry_after, LONGEST_WAIT))

        async with asyncio.TaskGroup() as group:
            if load.rate is None:
                for _ in range(min(load.concurrency, load.requests)):
                    group.create_task(client())
            else:
                draws, due = random.Random(load.seed), begin
                for number in numbers:
                    due += draws.expovariate(load.rate)
                    await asyncio.sleep(max(0.0, due - time.perf_counter()))
                    group.create_task(one(number))

    async def ask(self, load: Load, model: str, outcome: Outcome) -> None:
        """Make one request, and note what becomes of it."""
        body = {
            "model": model,
            "prompt": load.prompt(outcome.id),
            "max_tokens": load.max_tokens,
            "seed": load.seed,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        start = time.perf_counter()
        try:
            async with asyncio.timeout(self._timeout), self._http.stream("POST", COMPLETIONS, json=body) as answer:
                outcome.status = answer.status_code
                if answer.is_success:
                    await _read(answer, outcome, start)
                else:
                    await answer.aread()
                    outcome.error = _said(answer)
                    with suppress(KeyError, ValueError):
                        outcome.retry_after = max(0.0, float(answer.headers["Retry-After"]))
        except (httpx.HTTPError, TimeoutError, ValueError) as error:  # the last: what is no JSON
            outcome.error = _named(error)
        outcome.latency = time.perf_counter() - start


async def _read(answer: httpx.Response, outcome: Outcome, start: float) -> None:
    """A stream of events to its end."""
    last = start
    outcome.error = "the stream was cut off"
    async for line in answer.aiter_lines():
        data = line.removeprefix("data:").strip()
        if data == line or not data:
            continue
        if data == "[DONE]":
            outcome.error = ""
            return
        event = json.loads(data)
        if "error" in event:
            outcome.error = _message(event)
            return
        usage = event.get("usage") or {}
        outcome.tokens = usage.get("completion_tokens", outcome.tokens)
        outcome.prompt_tokens = usage.get("prompt_tokens", outcome.prompt_tokens)
        for choice in event.get("choices", ()):
            outcome.finish_reason = choice.get("finish_reason") or outcome.finish_reason
            if choice.get("text") or (outcome.first_block is None and outcome.finish_reason is None):
                now = time.perf_counter()
                if outcome.first_block is None:
                    outcome.first_block = now - start
                else:
                    outcome.between.append(now - last)
                last = now
                outcome.text += choice.get("text") or ""


def _said(answer: httpx.Response) -> str:
    """An answer that is an error, in a line."""
    try:
        message = _message(answer.json())
    except ValueError:
        message = answer.reason_phrase
    return f"{answer.status_code}: {message}"


def _message(body: object) -> str:
    """Of an error in OpenAI's shape, or whatever there is in its place."""
    match body:
        case {"error": {"message": str(message)}}:
            return message
    return json.dumps(body)


def _named(error: Exception) -> str:
    return ": ".join(filter(None, [type(error).__name__, str(error)]))
