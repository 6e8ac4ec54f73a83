"""More load than there is room for: nobody is lost, who has no room is told so, and nothing is left behind."""

import asyncio
import contextlib
import os
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
import torch
from tiny import tiny_cola

from opencola.checkpoints.hub import SHIPPED
from opencola.models.cola.sampling import ColaSampling
from opencola.serve.engine import Engine
from opencola.serve.load import Load, Outcome, Server
from opencola.serve.load_figures import figures
from opencola.serve.process import Started, started
from opencola.serve.requests import Limits, QueueFullError, Request
from opencola.text.tokenizer import Tokenizer

LIMITS = Limits(max_batch=4, max_waiting=8)
CLIENTS = 2 * (LIMITS.max_batch + LIMITS.max_waiting)
REQUESTS = 400
SECONDS = float(os.environ.get("OPENCOLA_LOAD_SECONDS", 60))
VANISHING = 2000
LOAD = Load(["One day, a fox", "There was a bear", "Mia had a red ball.", "The owl"], 1, max_tokens=16, seed=5)


def test_an_engine_at_twice_its_capacity() -> None:
    torch.manual_seed(0)
    tokenizer = Tokenizer.train(["The fox ran."] * 3, 260)
    model = tiny_cola(vae={"vocab_size": tokenizer.vocab_size}).float().requires_grad_(False)
    requests = [
        Request(tokenizer.encode("The fox"[:count]), ColaSampling(steps=2, max_new_tokens=2 * count, seed=count))
        for count in range(1, 6)
    ]

    async def ask() -> None:
        engine = Engine(model, tokenizer, LIMITS)
        expected = [await text(engine, request) for request in requests]
        numbers, outcomes, most = iter(range(REQUESTS)), list[str](), 0

        async def client() -> None:
            nonlocal most
            for number in numbers:
                which = number % len(requests)
                try:
                    found = await text(engine, requests[which])
                except QueueFullError as error:
                    assert f"of at most {LIMITS.max_waiting}" in str(error)
                    outcomes.append("refused")
                    await asyncio.sleep(0.01)
                    continue
                finally:
                    most = max(most, len(engine.waiting))
                assert found == expected[which]
                outcomes.append("written")

        with engine._changed:  # none is admitted until all have asked once
            clients = [asyncio.create_task(client()) for _ in range(CLIENTS)]
            await asyncio.sleep(0)
            assert len(engine.waiting) == LIMITS.max_waiting
            assert outcomes == ["refused"] * (CLIENTS - LIMITS.max_waiting)
        await asyncio.wait_for(asyncio.gather(*clients), 120)
        assert len(outcomes) == REQUESTS and outcomes.count("written") >= LIMITS.max_waiting
        assert most == LIMITS.max_waiting
        assert engine.close(60) and engine.running == engine.cache_bytes == 0 and not engine.waiting

    asyncio.run(ask())


async def text(engine: Engine, request: Request) -> tuple[str, str]:
    """A text when it is done, and why it ended."""
    (stream,) = engine.submit(request)
    pieces = [piece async for piece in stream]
    return "".join(piece.text for piece in pieces), pieces[-1].finished


@pytest.fixture(scope="module")
def server() -> Iterator[Started]:
    """With the model that comes with the package."""
    with started(SHIPPED, f"--max-batch={LIMITS.max_batch}", f"--max-waiting={LIMITS.max_waiting}") as running:
        yield running


async def asked(server: Server, number: int) -> Outcome:
    """What becomes of a request."""
    outcome = Outcome(number, time.monotonic())
    await server.ask(LOAD, "shipped", outcome)
    return outcome


async def alone(server: Server) -> list[str]:
    """The text of each prompt, one after the other."""
    outcomes = [await asked(server, number) for number in range(len(LOAD.prompts))]
    assert [outcome.error for outcome in outcomes] == [""] * len(outcomes)
    return [outcome.text for outcome in outcomes]


def gauges(url: str) -> dict[str, float]:
    """How many texts wait, and how many are being written."""
    lines = httpx.get(f"{url}/metrics", timeout=60, trust_env=False).text.splitlines()
    found = dict(line.split(" ") for line in lines if line.startswith(("opencola_waiting ", "opencola_running ")))
    assert len(found) == 2
    return {name.removeprefix("opencola_"): float(value) for name, value in found.items()}


def resident(pid: int) -> int:
    """Bytes of a process's memory."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
def test_a_server_at_twice_its_capacity(server: Started) -> None:
    """For OPENCOLA_LOAD_SECONDS (60): every request ends well or is refused; few wait, and memory stays flat."""
    outcomes: list[Outcome] = []
    seen: list[dict[str, float]] = []
    memory: list[int] = []

    async def drive() -> None:
        end = time.monotonic() + SECONDS
        async with Server(server.url) as http:
            expected = await alone(http)

            async def client(number: int) -> None:
                while time.monotonic() < end:
                    outcome = await asked(http, number)
                    outcomes.append(outcome)
                    if outcome.status == 429:
                        assert outcome.retry_after is not None and outcome.retry_after > 0
                        await asyncio.sleep(outcome.retry_after)
                    else:
                        assert outcome.error == "" and outcome.text == expected[number % len(expected)]

            async def watch() -> None:
                while time.monotonic() < end:
                    await asyncio.sleep(1)
                    seen.append(await asyncio.to_thread(gauges, server.url))
                    memory.append(resident(server.process.pid))

            async with asyncio.TaskGroup() as group:
                group.create_task(watch())
                for number in range(CLIENTS):
                    group.create_task(client(number))

    asyncio.run(drive())
    found = figures(outcomes, SECONDS)
    print(found)  # -rP shows it
    assert found.whole + found.refused == len(outcomes) and found.whole >= CLIENTS and found.refused > 0
    assert max(each["waiting"] for each in seen) <= LIMITS.max_waiting
    assert max(each["running"] for each in seen) == LIMITS.max_batch
    warm = memory[len(memory) // 3 :]
    print("MiB of memory:", [size >> 20 for size in warm])
    assert max(abs(size / statistics.median(warm) - 1) for size in warm) < 0.05
    assert gauges(server.url) == {"waiting": 0, "running": 0}


@pytest.mark.slow
def test_clients_that_vanish_leave_nothing(server: Started) -> None:
    """Before they have sent anything, in the middle of it, behind it, and in the middle of an answer."""
    where = urlsplit(server.url)
    body = b'{"prompt": "The fox", "max_tokens": 64, "stream": true}'
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {where.netloc}\r\nContent-Type: application/json\r\n"
    whole = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
    answered = 0

    async def vanish(number: int) -> None:
        nonlocal answered
        reader, writer = await asyncio.open_connection(where.hostname, where.port)
        writer.write((b"", whole[: len(whole) // 2], whole, whole)[number % 4])
        with contextlib.suppress(ConnectionError):
            await writer.drain()
            if number % 4 == 3:
                answered += (await reader.read(100)).startswith(b"HTTP/1.1 200")
        writer.transport.abort() if number % 3 else writer.close()

    async def drive() -> None:
        async with Server(server.url) as http:
            expected = await alone(http)
            for first in range(0, VANISHING, 50):
                await asyncio.gather(*map(vanish, range(first, first + 50)))
            end = time.monotonic() + 60
            while any(gauges(server.url).values()):
                assert time.monotonic() < end, gauges(server.url)
                await asyncio.sleep(0.2)
            assert await alone(http) == expected

    asyncio.run(drive())
    assert answered > 0


@pytest.mark.slow
def test_a_server_that_is_killed_comes_up_again() -> None:
    """At the same port, with the same texts; who was being answered is told by the end of the stream."""

    async def texts(url: str) -> list[str]:
        async with Server(url) as http:
            return await alone(http)

    async def killed(running: Started) -> list[Outcome]:
        async with Server(running.url) as http:

            async def client(number: int) -> Outcome:
                while not (outcome := await asked(http, number)).error:
                    pass
                return outcome

            asking = [asyncio.create_task(client(number)) for number in range(LIMITS.max_batch)]
            while (await asyncio.to_thread(gauges, running.url))["running"] == 0:
                pass
            running.process.kill()
            return await asyncio.gather(*asking)

    with started(SHIPPED) as running:
        before, port = asyncio.run(texts(running.url)), urlsplit(running.url).port
        outcomes = asyncio.run(killed(running))
        assert all(outcome.error for outcome in outcomes)
    assert port is not None
    with started(SHIPPED, port=port) as running:
        assert asyncio.run(texts(running.url)) == before
