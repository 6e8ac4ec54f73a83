"""The engine: what a request is given does not depend on who else is there, and nothing is left behind."""

import asyncio
import contextlib
import random
import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from engines import MODELS, TOKENIZER, engine_of, model_of, read, requests_for, sampling_of, texts_of, whole

from opencola.errors import NotFiniteError, UserError
from opencola.models import build
from opencola.models.cola import generate
from opencola.models.stopping import Text
from opencola.models.text_stream import Continuation
from opencola.serve.engine import Engine
from opencola.serve.requests import Limits, Piece, QueueFullError, Request, StoppingError, TooLargeError


async def alone_and_together(model: Any, requests: Sequence[Request], seed: int) -> None:
    """One at a time, then all at once in random order, at different times, some of which go away: the same texts."""
    rng = random.Random(seed)
    with engine_of(model, max_batch=1, max_waiting=len(requests)) as engine:
        alone = [(await texts_of(engine, [request]))[0] for request in requests]
    leaving = set(rng.sample(range(len(requests)), len(requests) // 5))
    found: dict[int, Any] = {}

    async def visit(place: int) -> None:
        await asyncio.sleep(rng.random() / 5)
        (stream,) = engine.submit(requests[place])
        pieces = []
        async for piece in stream:
            pieces.append(piece)
            if place in leaving:
                stream.cancel()
                return
        found[place] = whole(pieces)

    with engine_of(model, max_batch=7, max_waiting=len(requests)) as engine:
        order = rng.sample(range(len(requests)), len(requests))
        await asyncio.gather(*map(visit, order))
        assert engine.close(60) and engine.running == 0 and not engine.waiting
    assert found.keys() == set(range(len(requests))) - leaving
    for place, text in found.items():
        assert text == alone[place], requests[place]


@pytest.mark.usefixtures("need_kernels")
@pytest.mark.parametrize("name", MODELS)
def test_texts_are_the_same_alone_and_together(name: str) -> None:
    asyncio.run(alone_and_together(model_of(name), requests_for(name, 15), 0))


@pytest.mark.slow
@pytest.mark.usefixtures("need_kernels")
@pytest.mark.parametrize("name", MODELS)
def test_many_texts_are_the_same_alone_and_together(name: str) -> None:
    """Minutes, in all."""
    asyncio.run(alone_and_together(model_of(name), requests_for(name, 200, 1), 1))


@pytest.mark.parametrize("name", MODELS)
def test_texts_are_what_generate_writes(name: str) -> None:
    model, requests = model_of(name), requests_for(name, 6, 2)

    async def ask() -> list[tuple[str, list[int], str]]:
        with engine_of(model) as engine:
            return await texts_of(engine, requests)

    for request, (_, tokens, finished) in zip(requests, asyncio.run(ask()), strict=True):
        if request.sampling.stop:
            continue  # text_stream cuts those
        blocks = model.generate([request.prompt], request.sampling, eos_ids=request.end_ids, ids=[request.sample])
        expected = [block for (block,) in blocks]
        assert tokens == [token for block in expected for token in block.tokens]
        assert finished == expected[-1].finished


def test_they_are_written_side_by_side_and_leave() -> None:
    """As many rows in a call as there are texts, though settings of the choice of tokens differ."""
    model, rows = model_of("ar"), []
    model.trunk.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    requests = [
        Request([5, 6], sampling_of("ar", max_new_tokens=count, temperature=count / 9, seed=count))
        for count in (2, 5, 9)
    ]

    async def ask() -> None:
        with engine_of(model) as engine:
            await texts_of(engine, requests)

    asyncio.run(ask())
    assert rows == [3] + [3] * 2 + [2] * 3 + [1] * 4


def test_the_first_block_does_not_wait_for_others() -> None:
    """Who comes while others are being written is given a block at their next border."""
    model = model_of("cola")

    async def ask() -> None:
        with engine_of(model) as engine:
            (long,) = engine.submit(Request([1, 2], sampling_of("cola", max_new_tokens=400, steps=2)))
            await anext(aiter(long))
            (short,) = engine.submit(Request([3], sampling_of("cola", max_new_tokens=4, steps=2)))
            found = await read(short)
            assert found[-1].finished == "length" and engine.running == 1
            assert not any(piece.finished for piece in list(long.pieces._queue))  # type: ignore[attr-defined]

    asyncio.run(ask())


@pytest.mark.parametrize("name", ["cola", "cola, checked"])
def test_one_bad_text_does_not_spoil_the_others(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers of its own that are not finite, or a fault of ours while it is read: it is told, they go on."""
    model = model_of(name)
    requests = requests_for(name, 6, 3)
    requests[3] = replace(requests[3], prompt=[9, 8, 7])  # ends inside a block
    requests[4] = replace(requests[3], prompt=[9, 9, 9, 9, 9])

    async def ask(spoil: bool) -> list[Any]:
        with engine_of(model) as engine:
            streams = engine.submit(*requests)
            if spoil:
                return await asyncio.gather(*map(read, streams), return_exceptions=True)
            return await asyncio.gather(*map(read, streams))

    before = asyncio.run(ask(False))
    encode = generate.encode_prompts

    def encode_all_but_one(vae: Any, prompts: Any, *rest: Any) -> Any:
        found = encode(vae, prompts, *rest)
        for row, prompt in enumerate(prompts):
            if list(prompt) == [9, 9, 9, 9, 9]:
                found.latents[row] = torch.nan
        return found

    monkeypatch.setattr(generate, "encode_prompts", encode_all_but_one)
    after = asyncio.run(ask(True))
    for place, (one, other) in enumerate(zip(before, after, strict=True)):
        if place == 4:
            assert isinstance(other, NotFiniteError)
        else:
            assert whole(one) == whole(other)


def test_limits() -> None:
    model = model_of("ar")
    one = Request([1] * 10, sampling_of("ar", max_new_tokens=38))
    needed = model.cache_bytes(Text([1] * 10, one.sampling))

    async def ask() -> None:
        with engine_of(model, cache_mib=1, max_waiting=3) as engine:
            with pytest.raises(TooLargeError, match=r"prompt \(10 tokens\) and max_tokens \(90000\) need"):
                engine.submit(replace(one, sampling=replace(one.sampling, max_new_tokens=90000)))
            with pytest.raises(QueueFullError, match="of at most 3"):
                engine.submit(*[one] * 4)
            assert not engine.waiting
            streams = engine.submit(*[one] * 3)
            most = 0
            for stream in streams:
                async for _ in stream:
                    most = max(most, engine.cache_bytes)
            assert 0 < most <= 1 << 20 and most % needed == 0
            assert engine.cache_bytes == 0

    asyncio.run(ask())


def test_as_many_as_have_room_are_written_at_a_time() -> None:
    model, rows = model_of("ar"), []
    model.trunk.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    many = [Request([1, 2], sampling_of("ar", max_new_tokens=700))] * 5

    async def ask() -> None:
        with engine_of(model, cache_mib=2) as engine:
            per_text = model.cache_bytes(Text([1, 2], many[0].sampling))
            assert 2 * per_text <= 2 << 20 < 3 * per_text
            streams = engine.submit(*many)
            await anext(aiter(streams[0]))
            assert engine.running == 2 and len(engine.waiting) == 3
            for stream in streams[:2]:
                stream.cancel()
            await anext(aiter(streams[3]))
            assert engine.running <= 2

    asyncio.run(ask())
    assert max(rows) == 2


def test_who_waits_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt is read once, when there is room for its text, and not at every block of others."""
    model, begun = model_of("ar"), []

    class Counted(Continuation):
        def __init__(self, *given: Any) -> None:
            begun.append(given)
            super().__init__(*given)

    monkeypatch.setattr("opencola.serve.engine.Continuation", Counted)
    many = [Request([1, 2], sampling_of("ar", max_new_tokens=9))] * 4

    async def ask() -> None:
        with engine_of(model, max_batch=1) as engine:
            await texts_of(engine, many)

    asyncio.run(ask())
    assert len(begun) == 4


def test_closing_writes_what_is_begun_and_refuses_what_waits() -> None:
    model = model_of("cola")
    slow = Request([1, 2], sampling_of("cola", max_new_tokens=60, steps=2))

    async def ask() -> None:
        engine = Engine(model, TOKENIZER, Limits(max_batch=1))
        first, second = engine.submit(slow, slow)
        begun = aiter(first)
        pieces = [await anext(begun)]
        closing = threading.Thread(target=engine.close)
        closing.start()
        pieces += [piece async for piece in begun]
        assert len(whole(pieces)[1]) == 60
        with pytest.raises(StoppingError):
            await read(second)
        closing.join()
        with pytest.raises(StoppingError):
            engine.submit(slow)

    asyncio.run(ask())


def test_aborting_does_not_wait() -> None:
    model = model_of("cola")

    async def ask() -> None:
        engine = Engine(model, TOKENIZER)
        (stream,) = engine.submit(Request([1], sampling_of("cola", max_new_tokens=100_000)))
        pieces = aiter(stream)
        await anext(pieces)
        engine.abort()
        with pytest.raises(StoppingError):
            async for _ in pieces:
                pass

    asyncio.run(ask())


def test_who_comes_and_vanishes_leaves_nothing() -> None:
    model = model_of("cola")
    request = Request([1, 2, 3], sampling_of("cola", max_new_tokens=50, steps=2))

    async def ask() -> None:
        with engine_of(model, max_batch=2, max_waiting=10) as engine:
            refused = 0
            for place in range(500):
                with contextlib.suppress(QueueFullError):
                    (stream,) = engine.submit(request)
                    if place % 3 == 0:
                        await asyncio.sleep(0)
                    stream.cancel()
                    continue
                refused += 1
            assert refused == 0  # those that have gone wait for nothing
            found = await texts_of(engine, [request])
            assert len(found[0][1]) == 50
            assert engine.running == 0 and not engine.waiting and not engine._lanes

    asyncio.run(ask())


@pytest.mark.parametrize("name", ["ar", "cola, checked"])
def test_log_probabilities_of_tokens_add_up_to_the_score(name: str) -> None:
    family, model = name.partition(",")[0], model_of(name)
    prompt = TOKENIZER.encode("the fox sat")
    fields = {"temperature": 1.0, "max_new_tokens": 12, "ignore_eos": True}
    request = Request(prompt, sampling_of(family, **fields), logprobs=3, prompt_logprobs=True)

    async def ask() -> list[Piece]:
        with engine_of(model) as engine:
            return await read(engine.submit(request)[0])

    pieces = asyncio.run(ask())
    tokens = [token for piece in pieces for token in piece.tokens]
    scores = [score for piece in pieces for score in piece.scores]
    assert [score.token for score in scores] == tokens
    scoring = build.scoring_class(family).quick()
    if family == "cola":
        scoring = replace(scoring, estimator="trunk")
    expected = model.score([prompt, []], [tokens, prompt], scoring).total
    assert sum(score.logprob for score in scores) == pytest.approx(float(expected[0]), abs=1e-4)
    assert sum(score.logprob for score in pieces[0].prompt_scores) == pytest.approx(float(expected[1]), abs=1e-4)
    for score in scores:
        assert len(score.best) == 3 and score.best == sorted(score.best, key=lambda pair: -pair[1])
        assert score.logprob <= score.best[0][1]


@pytest.mark.parametrize("name", ["cola", "llada", "plaid"])
def test_where_there_are_none_they_are_refused_beforehand(name: str) -> None:
    model = model_of(name)
    request = Request([1], sampling_of(name, max_new_tokens=2), logprobs=0)

    async def ask() -> None:
        with engine_of(model) as engine, pytest.raises(UserError, match="log-probabilities of tokens"):
            engine.submit(request)

    asyncio.run(ask())


@pytest.mark.parametrize("name", ["cola", "cola, checked"])
def test_a_watched_text_tells_its_states_and_is_the_same(name: str) -> None:
    model = model_of(name)
    request = Request([1, 2], sampling_of("cola", max_new_tokens=9, steps=4, **MODELS[name][1][0]))

    async def ask() -> list[list[Piece]]:
        with engine_of(model) as engine:
            return await asyncio.gather(*map(read, engine.submit(request, replace(request, watch=True))))

    plain, watched = asyncio.run(ask())
    assert whole(plain) == whole(watched)
    assert not any(piece.states for piece in plain)
    assert all(len(piece.states) == 4 for piece in watched)


def test_nobody_waits_for_an_engine_that_broke(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("ar")
    request = Request([1], sampling_of("ar", max_new_tokens=9))

    async def ask() -> None:
        with engine_of(model, max_batch=1) as engine:
            monkeypatch.setattr(engine, "_round", None)
            for stream in engine.submit(request, request):
                with pytest.raises(StoppingError):
                    await read(stream)
            assert not engine.alive
            with pytest.raises(StoppingError):
                engine.submit(request)

    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    asyncio.run(ask())
