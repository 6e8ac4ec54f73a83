"""The bodies of requests: what is taken, and what is said of everything else."""

import dataclasses
import json
from typing import Any

import pytest
from pydantic import ValidationError

from opencola.models.build import FAMILIES, sampling_class
from opencola.models.cola.sampling import ColaSampling
from opencola.ranges import LARGEST, ranged
from opencola.serve.about import about
from opencola.serve.errors import invalid
from opencola.serve.protocol import ChatBody, CompletionBody, with_settings

COMPLETION = with_settings(CompletionBody, ColaSampling)
CHAT = with_settings(ChatBody, ColaSampling)
SAID = {"role": "user", "content": "Hello"}


def error_of(body: Any, kind: Any = COMPLETION) -> dict[str, Any]:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    with pytest.raises(ValidationError) as caught:
        kind.model_validate_json(raw)
    return dict(invalid(caught.value, [*kind.model_fields]).body["error"])


def completion(**fields: Any) -> Any:
    return COMPLETION.model_validate_json(json.dumps({"prompt": "a"} | fields))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_setting_of_a_family_is_a_field(family: str) -> None:
    settings: Any = sampling_class(family)
    kind = with_settings(CompletionBody, settings)
    names = {field.name for field in dataclasses.fields(settings)} - {"max_new_tokens", "chat"}
    assert names <= {*kind.model_fields}
    defaults = {name: getattr(settings(), name) for name in names - {"stop"}}
    body = kind.model_validate_json(json.dumps({"prompt": "a", "max_tokens": 3, "stop": ["."], **defaults}))
    assert settings(**body.given()) == settings(max_new_tokens=3, stop=(".",))
    assert kind.model_validate_json('{"prompt": "a"}').given() == {}


@pytest.mark.parametrize("family", FAMILIES)
def test_settings_have_their_own_ranges(family: str) -> None:
    settings: Any = sampling_class(family)
    kind = with_settings(CompletionBody, settings)
    tried = 0
    for name, _, allowed, _ in ranged(settings):
        if name == "max_new_tokens":
            continue
        for end, step in ((allowed.low, -1), (allowed.high, 1)):
            if abs(end) < LARGEST:  # others are no ends that anybody meets
                tried += 1
                assert error_of({"prompt": "a", name: end + step}, kind)["param"] == name
                excluded = allowed.above if step < 0 else allowed.below
                if excluded:
                    assert error_of({"prompt": "a", name: end}, kind)["param"] == name
                else:
                    kind.model_validate_json(json.dumps({"prompt": "a", name: end}))
    assert tried >= 6


@pytest.mark.parametrize("field", ["foo", "Steps", "max_new_tokens", "chat", "model_config", "block_length"])
def test_an_unknown_field_is_named(field: str) -> None:
    error = error_of({"prompt": "a", field: None})
    assert error["param"] == field and error["code"] == "unknown_parameter"
    assert repr(field) in error["message"] and "guidance" in error["message"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"frequency_penalty": False}, "frequency_penalty"),
        ({"logit_bias": {"1": 3}}, "logit_bias"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation"),
        ({"messages": [SAID | {"name": "Ann"}]}, "messages[0].name"),
        ({"messages": [SAID, {"role": "assistant", "content": "a", "tool_calls": [{}]}]}, "messages[1].tool_calls"),
    ],
)
def test_what_cannot_be_honoured_is_named(fields: dict[str, Any], param: str) -> None:
    error = error_of({"messages": [SAID]} | fields, CHAT)
    assert error["param"] == param and "leave it out" in error["message"]


def test_what_asks_for_nothing_is_taken() -> None:
    asked = {"presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}, "n": 1, "best_of": 1, "suffix": ""}
    body = completion(**asked, stop=None, seed=None, max_tokens=None, temperature=None, user="me", stream=False)
    assert body.given() == {}
    messages = [SAID, {"role": "assistant", "content": "", "refusal": None, "tool_calls": None, "annotations": []}]
    asked = {"tools": [], "tool_choice": "auto", "parallel_tool_calls": True, "store": False, "modalities": ["text"]}
    body = CHAT.model_validate_json(json.dumps({"messages": messages, "service_tier": "auto"} | asked))
    assert body.given() == {}


@pytest.mark.parametrize("prompt", ["", "a", [1, 2], ["a", ""], [[1], [2, 3]], [[]]])
def test_prompts(prompt: Any) -> None:
    alone = isinstance(prompt, str) or isinstance(prompt[0], int)
    assert completion(prompt=prompt).prompts == ([prompt] if alone else prompt)


@pytest.mark.parametrize("prompt", [None, 1, [], [1, "a"], [-1], [1.5], [True], ["a", [1]], ["a"] * 2049, {"a": 1}])
def test_what_is_no_prompt(prompt: Any) -> None:
    error = error_of({"prompt": prompt})
    assert error["param"] == "prompt" and "a text, token ids, or a list" in error["message"]


@pytest.mark.parametrize("stop", ["", [""], ["a"] * 5, 1, [1], {}])
def test_what_stops_nothing(stop: Any) -> None:
    assert error_of({"prompt": "a", "stop": stop})["param"] == "stop"


def test_what_stops() -> None:
    assert completion(stop="a").given() == {"stop": ("a",)}
    assert completion(stop=["a", "b", "c", "d"]).given() == {"stop": ("a", "b", "c", "d")}
    assert completion(stop=[]).given() == {"stop": ()}


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"", "not JSON"),
        (b"[]", "must be a JSON object"),
        (b"null", "must be a JSON object"),
        (b"{", "not JSON"),
        (b'{"prompt": "\xff"}', "not JSON"),
        (b"\xff\xfe{\x00}\x00", "not JSON"),
        (b'{"prompt": "\\ud800"}', "not JSON"),
        (b'{"prompt": ' + b"[" * 100_000, "not JSON"),
        (b'{"a":' * 100_000, "not JSON"),
        (b"{}", "prompt is missing"),
        (b'{"prompt": "a", "temperature": NaN}', "temperature: input should be a finite number"),
        (b'{"prompt": "a", "temperature": -Infinity}', "temperature: input should be a finite number"),
        (b'{"prompt": "a", "temperature": 1e999}', "temperature: input should be a finite number"),
        (b'{"prompt": "a", "guidance": 1e300}', "guidance: input should be less than or equal to 34028"),
        (b'{"prompt": "a", "guidance": 1' + b"0" * 400 + b"}", "guidance"),
        (
            b'{"prompt": "a", "seed": 9223372036854775808}',
            "seed: input should be less than or equal to 9223372036854775807",
        ),
        (b'{"prompt": "a", "max_tokens": 1' + b"0" * 400 + b"}", "max_tokens"),
        (b'{"prompt": "a", "steps": "16"}', "steps: input should be a valid integer"),
        (b'{"prompt": "a", "steps": 1.5}', "steps: input should be a valid integer"),
        (b'{"prompt": "a", "steps": true}', "steps: input should be a valid integer"),
        (b'{"prompt": "a", "n": 129}', "n: input should be less than or equal to 128"),
        (b'{"prompt": "a", "solver": "best"}', "solver: input should be 'euler'"),
    ],
)
def test_what_is_no_body(raw: bytes, said: str) -> None:
    error = error_of(raw)
    assert said in error["message"] and len(error["message"]) < 1000
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        ({}, "messages"),
        (["a"], "messages[0]"),
        ([{"role": "user"}], "messages[0].content"),
        ([{"content": "a"}], "messages[0].role"),
        ([SAID, {"role": "tool", "content": "a"}], "messages[1].role"),
        ([{"role": "user", "content": None}], "messages[0].content"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}], "messages[0].content"),
        ([SAID | {"mood": 1}], "messages[0].mood"),
    ],
)
def test_what_are_no_messages(messages: Any, param: str) -> None:
    assert error_of({"messages": messages}, CHAT)["param"] == param


def test_messages_in_parts() -> None:
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    body = CHAT.model_validate_json(json.dumps({"messages": [{"role": "developer", "content": parts}]}))
    assert body.messages[0].text == "Hello"


def test_grammars() -> None:
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "null"}, "strict": True}}
    assert completion(response_format=form).rules() == [("response_format", "json_schema", '{"type": "null"}')]
    assert completion(response_format={"type": "text"}).rules() == []
    assert completion(response_format={"type": "json_object"}, regex="a+", grammar="start: A").rules() == [
        ("response_format", "json_schema", '{"type": "object"}'),
        ("regex", "regex", "a+"),
        ("grammar", "grammar", "start: A"),
    ]
    for wrong in ({"type": "json_schema"}, {"type": "text", "json_schema": form["json_schema"]}, {"type": "xml"}, {}):
        assert error_of({"prompt": "a", "response_format": wrong})["param"].startswith("response_format")


def test_a_model_tells_of_its_settings() -> None:
    told = about(ColaSampling(steps=3, stop=("a",)))
    assert told["family"] == "Cola DLM" and told["chat"] is False
    settings = told["sampling"]
    assert {*settings} == {*ColaSampling.hints()} - {"max_new_tokens", "chat", "seed"} | {"max_tokens"}
    assert settings["steps"].pop("help") == "Number of solver steps for a block."
    assert settings["steps"] == {"default": 3, "kind": "int", "min": 1, "max": LARGEST}
    assert settings["solver"]["choices"][0] == "euler" and settings["ignore_eos"]["kind"] == "bool"
    assert settings["guidance"]["kind"] == "float" and "min" not in settings["guidance"]
    assert settings["stop"]["kind"] == "tuple" and settings["top_p"]["help"]
    json.dumps(told, allow_nan=False)
