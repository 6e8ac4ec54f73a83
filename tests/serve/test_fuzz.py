"""Whatever is sent, the answer is what was asked for or a clear error: never status 500, never silence."""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal, get_args, get_origin

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis.generation import GenerationMode
from serving import COLA, Running, cola_engine, others, running, tokenizer

from opencola.models.cola.sampling import ColaSampling
from opencola.ranges import ranged
from opencola.serve.engine import Engine

PATHS = ("/v1/completions", "/v1/chat/completions")


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(cola_engine(), replace(COLA, max_new_tokens=4), max_work=8, timeout=20) as server:
        yield server
        server.engine.close()


def bodies(server: Running, path: str) -> Any:
    """Requests by the server's own description of itself, and such as break it."""
    schema = schemathesis.openapi.from_dict(server.get("/openapi.json").json())
    operation = schema[path]["post"]
    cases = st.one_of(operation.as_strategy(generation_mode=mode) for mode in GenerationMode)
    return cases.map(lambda case: case.body)


def answered(server: Running, path: str, body: Any) -> int:
    """The status of an answer, which is checked."""
    if isinstance(body, dict):  # however much is asked for, a test has its time
        over = [name for name in ("max_tokens", "max_completion_tokens") if type(body.get(name)) is int]
        body = body | {name: min(4, body[name]) for name in over}
    content = json.dumps(body).encode() if isinstance(body, str | int | float | list | dict | None) else b""
    response = server.post(path, content)
    assert response.status_code in (200, 400, 404), (body, response.text)
    if response.status_code != 200:
        assert {*response.json()} == {"error"} and response.json()["error"]["message"]
    elif response.headers["content-type"] == "application/json":
        assert response.json()["choices"] and response.json()["usage"]
    else:
        *_, last, end = response.text.removesuffix("\n\n").split("\n\n")
        assert end == "data: [DONE]" or "invalid_request_error" in end, (body, last, end)
    return response.status_code


def fuzz(server: Running, path: str, bodies: Any, count: int) -> None:
    statuses: Counter[int] = Counter()

    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=[*HealthCheck],
    )
    @given(body=bodies)
    def each(body: Any) -> None:
        statuses[answered(server, path, body)] += 1

    each()
    assert server.get("/health").status_code == 200
    assert statuses[200] and statuses[400] > count / 10, statuses


def extremes(sampling: Any = ColaSampling) -> Any:
    """Right bodies but for settings at the ends of their ranges, whose numbers a model may not stand."""
    values: dict[str, Any] = {}
    for name, kind, allowed, _ in ranged(sampling):
        ends = [max(allowed.low, -3e38), min(allowed.high, 3e38), 1, 2, 8]
        ends += [allowed.low + 1e-30, 1e-300, 1e30] if get_args(kind)[0] is float else []
        values[name] = st.sampled_from([get_args(kind)[0](end) for end in ends])
    for name, kind in sampling.hints().items():
        if get_origin(kind) is Literal:
            values[name] = st.sampled_from(get_args(kind))
    del values["max_new_tokens"]
    some = st.sets(st.sampled_from(sorted(values)), max_size=3).flatmap(
        lambda names: st.fixed_dictionaries({name: values[name] for name in sorted(names)})
    )
    prompt, streamed = st.sampled_from(["The fox sat", [0, 3, 7], ""]), st.booleans()
    return st.builds(lambda prompt, stream, given: {"prompt": prompt, "stream": stream} | given, prompt, streamed, some)


def test_what_a_schema_generates(server: Running) -> None:
    for path in PATHS:
        fuzz(server, path, bodies(server, path), 40)


def test_settings_at_their_ends(server: Running) -> None:
    fuzz(server, PATHS[0], extremes(), 100)


@pytest.mark.slow  # ten thousand requests
@pytest.mark.parametrize("path", PATHS)
def test_much_of_what_a_schema_generates(server: Running, path: str) -> None:
    fuzz(server, path, bodies(server, path), 4000)


@pytest.mark.slow  # five hundred of a family
@pytest.mark.parametrize("family", ["ar", "llada", "plaid"])
def test_settings_of_other_families_at_their_ends(family: str) -> None:
    own = tokenizer()
    model, sampling = others(own.vocab_size)[family]
    engine = Engine(model, own)
    with running(engine, replace(sampling, max_new_tokens=4), max_work=8, timeout=20) as server:
        fuzz(server, PATHS[0], extremes(type(sampling)), 500)
    engine.close()


@pytest.mark.slow  # two thousand of these
def test_many_settings_at_their_ends(server: Running) -> None:
    fuzz(server, PATHS[0], extremes(), 2000)
