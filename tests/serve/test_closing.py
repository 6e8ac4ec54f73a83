"""Ways to a text's end: that they lead there, that the search finds them, and that they only get shorter on the way."""

import json
from typing import Any

import llguidance
import pytest

from opencola.serve.closing import FIRST_NODES, Ways, byte_tokenizer, search

BYTES = bytes(range(256))
KINDS = ["string", "integer", "number", "boolean", "array", "object", "null"]
LARGE = {
    "type": "object",
    "properties": {f"key {i}": {"type": KINDS[i % len(KINDS)]} for i in range(28)},
    "required": [f"key {i}" for i in range(28)],
}
LIST = {
    "$ref": "#/$defs/list",
    "$defs": {
        "list": {
            "type": "object",
            "properties": {
                "head": {"type": "integer"},
                "tail": {"anyOf": [{"$ref": "#/$defs/list"}, {"type": "null"}]},
            },
            "required": ["head", "tail"],
            "additionalProperties": False,
        }
    },
}


def matcher(lark: str) -> llguidance.LLMatcher:
    grammar = llguidance.LLMatcher.grammar_from_lark(lark + '\n%llguidance {"no_forcing": true}\n')
    made = llguidance.LLMatcher(byte_tokenizer(), grammar, log_level=0)
    assert not made.is_error(), made.get_error()
    return made


def way(lark: str, before: bytes = b"", alphabet: bytes = BYTES) -> bytes | None:
    at = matcher(lark)
    found = search(at, before, alphabet, FIRST_NODES)
    if found is not None:
        assert at.consume_tokens(list(found)) and at.is_accepting()  # from where it was before
    return found


def schema(schema: Any) -> str:
    return f"start: %json {json.dumps(schema)}"


@pytest.mark.parametrize(
    ("lark", "shortest"),
    [
        ("start: /(ab)*c/", b"c"),
        ("start: /a*/", b""),
        ("start: /[a-z]{5,100}x+/", b"aaaaax"),  # twenty-six letters of one kind, five times
        ("start: /(]a)*b/", b"b"),  # what closes goes round in a loop
        ("start: /([a-z]{3}|[a-z]b)+-[0-9]{3}c/", b"ab-000c"),
        ("start: /[a-z]{300}/", b"a" * 300),
        ("start: /a{5000}/", b"a" * 5000),
        ('start: "begin " start " end" | "begin end"', b"begin end"),
        (schema({"type": "object"}), b"{}"),
        (schema({"enum": ["yellow", "red", 1234567]}), b"1234567"),
        (schema({"type": "array", "minItems": 50, "items": {"type": "string"}}), b'["",' + 48 * b'"",' + b'""]'),
        (schema({"type": "string", "minLength": 20, "pattern": "^[a-c]+z$"}), b'"' + b"a" * 19 + b'z"'),
        (schema(LIST), b'{"head":0,"tail":null}'),
    ],
)
def test_the_way_from_the_beginning(lark: str, shortest: bytes) -> None:
    assert way(lark) == shortest


def test_a_large_object_is_filled_with_what_is_short() -> None:
    found = way(schema(LARGE))
    assert found is not None
    short: list[Any] = ["", 0, 0, False, [], {}, None]
    assert json.loads(found) == {f"key {i}": short[i % len(short)] for i in range(28)}


def test_a_part_of_the_way_before_is_gone_on_with() -> None:
    lark = schema({"type": "array", "items": {"type": "string"}})
    at = matcher(lark)
    at.consume_tokens(list(b'["a", "b\\'))
    assert search(at, b'xyz"]', BYTES, FIRST_NODES) == b'""]'  # the first quote belongs to the backslash


def test_only_bytes_of_the_alphabet_are_gone_through() -> None:
    assert way("start: /a|b|cd/", alphabet=b"bcd") == b"b"
    assert way("start: /ax|b|cd/", alphabet=b"acd") == b"cd"  # x is forced, and is not there
    assert way("start: /a|b/", alphabet=b"c") is None


@pytest.mark.parametrize("lark", ['start: "a" start', "start: /a+(b+a+)*c{9}[^a]/ start"])
def test_where_there_is_no_end_none_is_found(lark: str) -> None:
    assert way(lark) is None


def test_ways_get_shorter_as_they_are_gone_and_are_those_of_their_tokens_alone() -> None:
    lark = schema(
        {"type": "array", "items": {"anyOf": [LIST["$defs"]["list"], {"type": "string"}]}} | {"$defs": LIST["$defs"]}
    )  # type: ignore[index]
    tokens = [bytes([byte]) for byte in range(256)]
    text = list(b'[ "say \\"hi\\" {", {"head": -12, "tail" : {"head":0,"tail": null}}, "" ]')
    made = Ways(matcher(lark), b"[]", BYTES, tokens)
    found = []
    for end in range(len(text) + 1):
        rest = made.after(text[:end])
        assert rest is not None
        whole = matcher(lark)
        assert whole.consume_tokens(text[:end] + list(rest)) and whole.is_accepting()
        assert len(rest) <= 24
        found.append(rest)
    assert [len(made.after([*text[:end], rest[0]]) or b"") for end, rest in enumerate(found) if rest] == [
        len(rest) - 1 for rest in found if rest
    ]
    for end in (40, 3, 40, 60, 0, len(text)):
        assert made.after(text[:end]) == found[end] == Ways(matcher(lark), b"[]", BYTES, tokens).after(text[:end])
        assert made.after([*text[:end], 7]) is None and made.after([*text[:end], 256]) is None


def test_what_went_wrong_once_is_forgotten() -> None:
    made = Ways(matcher('start: "b" | "a" start'), b"b", BYTES, [bytes([byte]) for byte in range(256)])
    assert made.after(list(b"aaa")) == b"b"
    made._matcher.consume_token(0)  # breaks it for good
    assert made.after(list(b"aaaa")) == b"b"
