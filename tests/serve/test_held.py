"""Requests that are held to a grammar: whole and valid texts, whoever else is there, and what was forced is counted."""

import asyncio
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jsonschema_rs
import pytest
from engines import TOKENIZER, engine_of, model_of, read, sampling_of, whole

from opencola.errors import UserError
from opencola.serve.grammar import Grammars
from opencola.serve.requests import Piece, Request

SCHEMAS: list[dict[str, Any]] = [
    {
        "type": "object",
        "properties": {"kind": {"enum": ["fox", "hen"]}, "count": {"type": "integer"}, "name": {"type": "string"}},
        "required": ["kind", "count", "name"],
        "additionalProperties": False,
    },
    {"type": "array", "items": {"type": ["string", "null", "boolean"]}, "minItems": 1},
    {"anyOf": [{"const": "nobody"}, {"type": "object", "required": ["to"], "properties": {"to": {"type": "integer"}}}]},
]
WAYS: dict[str, list[dict[str, Any]]] = {
    "ar": [{}],
    "cola": [{"steps": 2}, {"steps": 2, "candidates": 3}],
    "cola, checked": [
        {"steps": 2, "verify": "greedy"},
        {"steps": 2, "verify": "lossless"},
        {"steps": 2, "verify": "typical"},
        {"steps": 2, "candidates": 2, "rank": "trunk"},
    ],
}
GRAMMARS = Grammars(TOKENIZER)


def asked(family: str, fields: dict[str, Any], schema: dict[str, Any], seed: int) -> Request:
    grammar = GRAMMARS.compile("json_schema", json.dumps(schema))
    sampling = sampling_of(family, max_new_tokens=60 + seed, temperature=float(seed % 3) / 2, seed=seed, **fields)
    prompt = TOKENIZER.encode("the fox" * (seed % 4))
    return Request(prompt, sampling, (TOKENIZER.eos_id,), constraint=grammar.constraint((TOKENIZER.eos_id,)))


async def answers(model: Any, requests: Sequence[Request], **limits: int) -> list[list[Piece]]:
    with engine_of(model, max_waiting=len(requests), **limits) as engine:
        return await asyncio.gather(*map(read, engine.submit(*requests)))


def check_all(name: str, number: int) -> None:
    family, model = name.partition(",")[0], model_of(name)
    for fields in WAYS[name]:
        requests = [asked(family, fields, SCHEMAS[seed % len(SCHEMAS)], seed) for seed in range(number)]
        plain = replace(asked(family, fields, SCHEMAS[0], 1), constraint=None)
        together = asyncio.run(answers(model, [*requests, plain]))
        for place, (request, pieces) in enumerate(zip(requests, together, strict=False)):
            text, tokens, finished = whole(pieces)
            assert finished == "eos" and len(tokens) < request.sampling.max_new_tokens
            jsonschema_rs.validate(SCHEMAS[place % len(SCHEMAS)], json.loads(text))
            assert 0 < pieces[-1].forced <= len(tokens) + 1  # random weights know no JSON
        assert together[-1][-1].forced == 0
        alone = [asyncio.run(answers(model, [request]))[0] for request in requests[:2]]
        assert [whole(pieces) for pieces in alone] == [whole(pieces) for pieces in together[:2]]


@pytest.mark.parametrize("name", WAYS)
def test_every_text_is_valid(name: str) -> None:
    check_all(name, 3)


@pytest.mark.slow  # minutes
@pytest.mark.parametrize("name", WAYS)
def test_two_hundred_texts_of_each_schema_are_valid(name: str) -> None:
    check_all(name, 600)


def test_what_cannot_be_held_is_refused_beforehand() -> None:
    request = asked("ar", {}, SCHEMAS[0], 0)

    async def submit(name: str, request: Request) -> None:
        with engine_of(model_of(name)) as engine:
            engine.submit(request)

    for name in ("llada", "plaid"):
        with pytest.raises(UserError, match="cannot be held to a grammar: it does not write from left to right"):
            asyncio.run(submit(name, replace(request, sampling=sampling_of(name))))
    with pytest.raises(UserError, match="max_new_tokens 3 is too few: the shortest text"):
        asyncio.run(submit("ar", replace(request, sampling=sampling_of("ar", max_new_tokens=3))))
    with pytest.raises(UserError, match="leave out ignore_eos and compatibility"):
        asyncio.run(submit("ar", replace(request, sampling=sampling_of("ar", ignore_eos=True))))
    with pytest.raises(UserError, match="a Plaid cannot be held to a grammar"):
        from opencola.models.stopping import Text

        model_of("plaid").begin([Text([], sampling_of("plaid"), constraint=request.constraint)])
