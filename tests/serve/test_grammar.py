"""Texts held to JSON schemas, regular expressions and grammars: what may follow, by brute force; what is written."""

import itertools
import json
import random
import re
import sys
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import jsonschema_rs
import pytest
import tokenizers
import torch
from tokenizers import AddedToken, decoders, models

from opencola.errors import UserError
from opencola.models.constraint import best, check_room, held, kept, next_token
from opencola.serve.grammar import Grammars
from opencola.serve.matching import MAX_BYTES, Grammar, GrammarConstraint
from opencola.text.tokenizer import Tokenizer
from opencola.worlds import brackets

FLAT = {
    "type": "object",
    "properties": {"kind": {"enum": ["red", "green"]}, "count": {"type": "integer"}, "name": {"type": "string"}},
    "required": ["kind", "count", "name"],
    "additionalProperties": False,
}
NESTED = {"type": "array", "items": {"type": "array", "items": {"type": ["string", "null", "array"]}}, "minItems": 1}
EITHER = {
    "anyOf": [
        {
            "type": "object",
            "properties": {"to": {"const": "all"}, "list": {"type": "array", "items": {"type": "string"}}},
            "required": ["to", "list"],
        },
        {"type": "object", "properties": {"to": {"const": "one"}, "at": {"type": "integer"}}, "required": ["to", "at"]},
        {"const": "nobody"},
    ]
}


SCHEMAS = {"flat": FLAT, "nested": NESTED, "either": EITHER}


@cache
def tokenizer() -> Tokenizer:
    texts = [
        json.dumps({"kind": "red", "count": 17, "name": "Zoë, 你好 👩"}),
        "the nobody to all of one {[( )]} a list",
    ] * 9
    return Tokenizer.train(texts, 380, ["<|im_end|>"])


def tiny(names: str, *steps: decoders.Decoder) -> Tokenizer:
    """Of these tokens, and one that ends a text."""
    backend = tokenizers.Tokenizer(models.BPE({name: i for i, name in enumerate(["<eos>", *names.split()])}, []))
    backend.decoder = steps[0] if len(steps) == 1 else decoders.Sequence([*steps])
    backend.add_special_tokens([AddedToken("<eos>", special=True)])
    return Tokenizer(backend)


@cache
def grammars() -> Grammars:
    return Grammars(tokenizer())


def of_schema(schema: Any) -> Grammar:
    grammar = grammars().compile("json_schema", json.dumps(schema))
    assert grammar is not None
    return grammar


def constraint(grammar: Grammar, begun: str = "") -> GrammarConstraint:
    return grammar.constraint([tokenizer().eos_id], begun)


def drawn(generator: torch.Generator, row: torch.Tensor) -> int:
    return int(torch.multinomial(row.double().softmax(-1), 1, generator=generator))


def write(held_to: GrammarConstraint, room: int, seed: int, tokens: Tokenizer | None = None) -> list[int]:
    """A text token by token from random logits, whose last token is an end."""
    tokens = tokens or tokenizer()
    generator, written = torch.Generator().manual_seed(seed), list[int]()
    while not written or written[-1] != tokens.eos_id:
        row = 2 * torch.randn(tokens.vocab_size, generator=generator)
        written.append(next_token(held_to, written, row, room - len(written), partial(drawn, generator)))
    assert len(written) <= room
    return written


def write_blocks(held_to: GrammarConstraint, room: int, seed: int, candidates: int) -> tuple[list[int], int]:
    """A text block by block, each of several candidates of random tokens, and how many tokens were forced."""
    generator, written, forced = torch.Generator().manual_seed(seed), list[int](), 0
    end = tokenizer().eos_id
    while end not in written:
        logits = 2 * torch.randn(candidates, 8, tokenizer().vocab_size, generator=generator)
        drafts = [[drawn(generator, row) for row in rows] for rows in logits]
        left = room - len(written)
        chosen = best(held_to, written, drafts, left)[0]
        choose = lambda place, row: drawn(generator, row)  # noqa: E731
        block = held(held_to, written, logits[chosen], drafts[chosen], left, choose)
        assert block.forced == sum(a != b for a, b in zip(block.tokens, drafts[chosen], strict=True))
        assert block.forced == 0 or all(kept(held_to, written, draft, left) < 8 for draft in drafts)
        written += block.tokens
        forced += block.forced
    count = written.index(end) + 1
    assert count <= room
    return written[:count], forced


def assert_valid(schema: Any, tokens: list[int]) -> None:
    text = tokenizer().decode(tokens)
    assert "\N{REPLACEMENT CHARACTER}" not in text
    assert jsonschema_rs.is_valid(schema, json.loads(text)), text


REGEXES = ["(ab)*c", "a?bc*|cab", "(a|bc)+é?", "[ab]{2,4}", "aé|aéé*b", "(ca)*(b|ca)"]


@cache
def brute_force(regex: str) -> tuple[set[bytes], set[bytes]]:
    """All texts of at most 9 characters that match, and their beginnings."""
    letters = sorted({*regex} & {*"abcé"})
    texts = ("".join(t) for length in range(10) for t in itertools.product(letters, repeat=length))
    whole = {text.encode() for text in texts if re.fullmatch(regex, text)}
    return whole, {text[:end] for text in whole for end in range(len(text) + 1)}


def random_texts(vocabulary: list[bytes], beginnings: set[bytes], seed: int) -> Iterator[list[int]]:
    """Token by token, at random among those with which a text goes on: none first, at most 5 bytes."""
    rng, seen = random.Random(seed), set[tuple[int, ...]]()
    for _ in range(40):
        tokens: list[int] = []
        while True:
            if tuple(tokens) not in seen:
                yield list(tokens)
            seen.add(tuple(tokens))
            text = b"".join(vocabulary[token] for token in tokens)
            after = [t for t, piece in enumerate(vocabulary) if piece and text + piece in beginnings]
            if not after or len(text) > 2:
                break
            tokens.append(rng.choice(after))


@pytest.mark.parametrize("regex", REGEXES)
def test_what_may_follow_is_what_brute_force_says(regex: str) -> None:
    tokens = tiny("a b c ab bc cab Ã © aÃ ©b", decoders.ByteLevel())  # é is the bytes Ã and ©
    held_to = Grammars(tokens).compile("regex", regex).constraint([0])
    whole, beginnings = brute_force(regex)
    seen = 0
    for text in random_texts(tokens.bytes, beginnings, 0):
        so_far = b"".join(tokens.bytes[token] for token in text)
        wanted = [so_far in whole, *(so_far + piece in beginnings for piece in tokens.bytes[1:])]
        assert held_to.allowed(text).tolist() == wanted
        for new in itertools.product(range(tokens.vocab_size), repeat=2):
            both = so_far + tokens.bytes[new[0]] + tokens.bytes[new[1]]
            goes_on = both in (beginnings if new[1] else whole) or new[0] == 0
            if len(both) < 8:
                assert held_to.accepted(text, new) == (2 if goes_on else 1) * wanted[new[0]]
        closing = held_to.closing(text)
        assert closing is not None and closing[-1] == 0
        assert so_far + b"".join(tokens.bytes[token] for token in closing) in whole
        behind = held_to.closing([*text, closing[0]])
        assert behind is not None and len(behind) <= len(closing) - 1
        seen += 1
    assert seen > 5


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_text_is_valid_and_fits(name: str) -> None:
    """Strings and arrays are unbounded, and what writes never closes them by itself: 100 % all the same."""
    check_all(name, 20)


@pytest.mark.slow  # 200 texts of a schema
@pytest.mark.parametrize("name", SCHEMAS)
def test_two_hundred_texts_are_valid_and_fit(name: str) -> None:
    check_all(name, 200)


def check_all(name: str, count: int) -> None:
    schema = SCHEMAS[name]
    held_to = constraint(of_schema(schema))
    shortest = len(held_to.closing([]) or [])
    texts = [write(held_to, shortest + seed % 20, seed) for seed in range(count)]
    for text in texts:
        assert_valid(schema, text)
    lengths = [*map(len, texts)]
    assert min(lengths) == shortest < shortest + 5 < max(lengths)
    check_room(held_to, shortest)
    with pytest.raises(UserError, match=f"{shortest - 1} is too few: .* takes {shortest}, with the token that ends it"):
        check_room(held_to, shortest - 1)


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_text_of_blocks_is_valid_and_what_was_forced_is_counted(name: str) -> None:
    for seed in range(6):
        held_to = constraint(of_schema(SCHEMAS[name]))
        text, forced = write_blocks(held_to, 40, seed, candidates=1 + seed % 3)
        assert_valid(SCHEMAS[name], text)
        assert 0 < forced <= len(text)


@pytest.mark.parametrize("name", SCHEMAS)
def test_blocks_of_which_nothing_is_right_are_what_is_written_token_by_token(name: str) -> None:
    held_to, room = constraint(of_schema(SCHEMAS[name])), 40
    logits = torch.randn(room, tokenizer().vocab_size, generator=torch.Generator().manual_seed(0))
    one: list[int] = []
    while tokenizer().eos_id not in one:
        one.append(next_token(held_to, one, logits[len(one)], room - len(one), lambda row: int(row.argmax())))
    assert_valid(SCHEMAS[name], one)
    written, wrong = list[int](), [tokenizer().pad_id] * 8
    forced = 0
    while tokenizer().eos_id not in written:
        at = len(written)
        block = held(held_to, written, logits[at : at + 8], wrong, room - at, lambda place, row: int(row.argmax()))
        written += block.tokens
        forced += block.forced
    assert (written[: len(one)], forced) == (one, len(one))


def test_a_text_that_can_only_end_ends_at_once() -> None:
    end, other = tokenizer().eos_id, tokenizer().special_id("<|im_end|>")
    text = tokenizer().encode('{"kind": "red", "count": 3, "name": "é"}')
    held_to = of_schema(FLAT).constraint([end, other])
    assert held_to.allowed(text).nonzero().flatten().tolist() == sorted((end, other))
    assert held_to.allowed([*text, other]).nonzero().flatten().tolist() == sorted((end, other))
    assert held_to.accepted(text, [other, 5, 6]) == 3 and held_to.accepted(text, [5, end]) == 0
    assert not held_to.allowed(text[:-1])[[end, other]].any()
    assert held_to.closing([*text, other]) == []
    with pytest.raises(ValueError, match="token 1 of the text is not of its grammar"):
        held_to.allowed([text[0], tokenizer().pad_id])


def test_no_answer_depends_on_what_was_asked_before() -> None:
    rng = random.Random(1)
    grammar = of_schema(EITHER)
    texts = [write(constraint(grammar), 30, seed) for seed in range(6)]
    beginnings = [text[: rng.randrange(len(text))] for text in texts for _ in range(4)]

    def answers(held_to: GrammarConstraint, tokens: list[int], ask: list[int]) -> list[Any]:
        asked: list[Callable[[], Any]] = [
            lambda: held_to.allowed(tokens).tolist(),
            lambda: held_to.accepted(tokens, [*texts[0], 7]),
            lambda: held_to.closing(tokens),
            lambda: held_to.closing([*tokens, 7]),
        ]
        found = {which: asked[which]() for which in ask}
        return [found[which] for which in range(4)]

    one, other = constraint(grammar), constraint(grammar)  # two rows of a batch, turn by turn
    for tokens in rng.sample(beginnings * 2, 2 * len(beginnings)):
        fresh = answers(constraint(grammar), tokens, [0, 1, 2, 3])
        assert answers(one, tokens, rng.sample(range(4), 4)) == fresh
        assert answers(other, rng.choice(beginnings), rng.sample(range(4), 4))
        assert answers(one, tokens, [3, 2, 1, 0]) == fresh


def nests() -> str:
    """The grammar of `brackets.nest`."""
    rules = ["start: " + " | ".join(f"n{depth}" for depth in range(brackets.MIN_DEPTH, brackets.MAX_DEPTH + 1))]
    for depth in range(1, brackets.MAX_DEPTH + 1):
        inner = f' n{depth - 1} " "' if depth > 1 else ""
        rules.append(f"n{depth}: " + " | ".join(f'"{a} "{inner} "{b}"' for a, b in brackets.PAIRS.items()))
    return "\n".join(rules)


def test_every_beginning_of_a_nest_is_completed() -> None:
    grammar = grammars().compile("grammar", nests())
    rng = random.Random(0)
    for index in range(25):
        nest = brackets.nest(0, index)
        begun = nest[: rng.randrange(len(nest) + 1)]
        whole = begun + tokenizer().decode(write(constraint(grammar, begun), 20, index))
        assert brackets.is_nest(whole), whole
        determined = brackets.prompt(nest)
        assert determined + tokenizer().decode(write(constraint(grammar, determined), 20, index)) == nest


def test_nests_without_bound_are_closed_in_the_room_there_is() -> None:
    grammar = grammars().compile("grammar", 'start: ("(" start ")")*')
    for seed in range(5):
        text = tokenizer().decode(write(constraint(grammar), 30, seed))
        depth = list(itertools.accumulate(1 if bracket == "(" else -1 for bracket in text))
        assert min(depth, default=0) >= 0 and [0, *depth][-1] == 0


def test_a_tokenizer_that_drops_the_first_space_is_held_as_well() -> None:
    byte_names = " ".join(f"<0x{byte:02X}>" for byte in range(256))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokens = tiny(f"a ▁a ▁ ▁▁ {byte_names}", *steps)
    held_to = Grammars(tokens).compile("regex", "( ?a){3}é").constraint([tokens.eos_id])
    texts = {tokens.decode(write(held_to, 12, seed, tokens)) for seed in range(40)}
    assert texts == {"aaaé", "a aaé", "aa aé", "a a aé"}  # " aaaé" would be read as "aaaé"
    with pytest.raises(UserError, match="no text of the grammar was found that begins with ''"):
        Grammars(tokens).compile("regex", " a").constraint([tokens.eos_id])


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        ("json_schema", "{", "a JSON schema must be JSON: Expecting"),
        ("json_schema", "[1]", "a JSON schema must be an object"),
        ("json_schema", '{"type": "strin"}', "not a JSON schema that texts can be held to: .*Invalid type: strin"),
        ("json_schema", '{"type": "array", "uniqueItems": true}', "held to: .*Unimplemented keys: ..uniqueItems"),
        ("json_schema", '{"not": {}, "x-guidance": {"lenient": true}}', "held to: .*Unimplemented keys: ..not"),
        ("json_schema", '{"$ref": "http://localhost/x"}', "held to: .*Resource 'http://localhost/x'"),
        ("json_schema", '{"enum": []}', "held to: .*Unsatisfiable schema"),
        ("regex", "(", "not a regular expression that texts can be held to: unclosed group"),
        ("regex", "(?=a)b", "held to: look-around, including look-ahead and look-behind, is not supported"),
        ("grammar", "start: x", 'not a grammar that texts can be held to: .*unknown name: "x"'),
        ("grammar", "begin: /a/", "held to: no start rule found"),
        ("grammar", 'start: a "b"\na[max_tokens=3]: /.*/', "may not speak of tokens: max_tokens="),
        ("grammar", 'start: <[^5]> "a"', "may not speak of tokens: <.\\^5.>"),
        ("grammar", 'start: <|im_end|> "a"', "may not speak of tokens: <.im_end.>"),
        ("grammar", "start: " + "(" * 9000 + '"a"' + ")" * 9000, "lark grammar too deeply nested"),
        ("regex", "(" * 9000 + "a" + ")" * 9000, "exceed the maximum number of nested parentheses/brackets"),
        ("json_schema", '{"items":' * 3000 + "{}" + "}" * 3000, "nested too deeply|recursion limit exceeded"),
        ("json_schema", '{"items":' * 600 + "{}" + "}" * 600, "recursion limit exceeded"),
        ("regex", "\ud800", "a regular expression must be Unicode, but this one has half of a surrogate pair"),
        ("grammar", 'start: "a" start', "no text was found that this grammar allows"),
        ("regex", "a" * (MAX_BYTES + 1), f"a regular expression may have {MAX_BYTES} bytes, but this one has"),
    ],
)
def test_what_is_no_grammar_is_refused_with_the_reason(kind: Any, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        grammars().compile(kind, text)
    assert "\n" not in str(error.value)


def test_grammars_are_compiled_once() -> None:
    json_object = grammars().compile("json_schema", '{"type": "object"}')
    assert json_object is grammars().compile("json_schema", '{"type": "object"}')
    for seed in range(5):
        assert isinstance(json.loads(tokenizer().decode(write(constraint(json_object), 20, seed))), dict)


def test_a_text_needs_an_end_and_a_beginning_that_fits() -> None:
    grammar = grammars().compile("regex", "abc")
    with pytest.raises(UserError, match="needs a token that ends it"):
        grammar.constraint([])
    with pytest.raises(UserError, match="no text of the grammar was found that begins with 'x'"):
        constraint(grammar, "x")


def test_a_grammar_that_cannot_be_followed_further_is_a_users_error() -> None:
    held_to = constraint(grammars().compile("regex", "a+"))
    assert held_to._matcher.consume_token(tokenizer().pad_id) is False  # breaks it, as its limits do
    with pytest.raises(UserError, match="the grammar is too involved to be followed further: "):
        held_to.allowed([])
    assert held_to.allowed([])[tokenizer().encode("a")]


def test_without_the_library_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opencola.serve.matching", None)
    with pytest.raises(UserError, match=r"by llguidance: pip install 'opencola\[serve\]'"):
        Grammars(tokenizer()).compile("regex", "a")
