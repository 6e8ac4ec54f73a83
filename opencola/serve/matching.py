"""What tokens a text of a grammar may go on with, by llguidance."""

import json
import re
from collections.abc import Sequence
from functools import lru_cache
from itertools import takewhile
from typing import Literal

import llguidance
import numpy as np
import torch
from torch import Tensor

from opencola.errors import UserError
from opencola.serve.closing import FIRST_NODES, Ways, byte_tokenizer, search
from opencola.text.tokenizer import UNFINISHED, Tokenizer, num_shared

Kind = Literal["json_schema", "regex", "grammar"]

MAX_BYTES = 1 << 15
"""Largest size of a grammar: the worst of it takes seconds to compile."""

# Any token whose bytes may follow is allowed, not only the one that the tokenizer would have cut.
_BYTEWISE = '\n%llguidance {"no_forcing": true}\n'
# What Lark's grammars may say of tokens: how many, and which by their ids or names.
_OF_TOKENS = re.compile(r"\bmax_tokens\s*=|<\[[\d^*,\s-]+\]>|<\|\w+\|>")
# Room for indentation, but not for white space without end.
_JSON = {"whitespace_pattern": r"[ \t]{0,2}|\n[ \t]{0,32}"}


class Vocabulary:
    """The tokens of a tokenizer, as texts of a grammar are made of them.

    Raises UserError where what they stand for depends on those around them.
    """

    eos_token_id: int
    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokens = tokenizer.bytes
        self.alphabet = bytes(piece[0] for piece in self.tokens if len(piece) == 1)
        self._ids = {piece: id_ for id_, piece in reversed([*enumerate(self.tokens)]) if piece}
        self._lengths = sorted({len(piece) for piece in self._ids}, reverse=True)
        # Some decoders drop a space with which a text begins: such tokens cannot come first.
        self.first = torch.tensor([bool(p) and self._whole(tokenizer, i, p) for i, p in enumerate(self.tokens)])
        self.eos_token_id = tokenizer.eos_id
        self.special_token_ids = [self.eos_token_id]
        self.llguidance = llguidance.LLTokenizer(llguidance.TokenizerWrapper(self))
        self.shortest = lru_cache(4096)(self._shortest)

    def __call__(self, text: bytes | str) -> list[int]:
        """As llguidance wants it."""
        return self.shortest(text.encode() if isinstance(text, str) else text) or []

    @staticmethod
    def _whole(tokenizer: Tokenizer, id_: int, piece: bytes) -> bool:
        text = tokenizer.decode([id_])
        return text.encode() == piece or UNFINISHED in text

    def _shortest(self, text: bytes) -> list[int] | None:
        """The fewest tokens that spell a text; None where none do."""
        counts: list[float] = [0.0]  # of the last parts of the text, the shortest first
        first: list[bytes] = [b""]
        for start in reversed(range(len(text))):
            pieces = [text[start : start + length] for length in self._lengths if start + length <= len(text)]
            best = min(
                (piece for piece in pieces if piece in self._ids),
                key=lambda piece: counts[-len(piece)],
                default=b"",
            )
            counts.append(1 + counts[-len(best)] if best else float("inf"))
            first.append(best)
        if counts[-1] == float("inf"):
            return None
        tokens, place = [], 0
        while place < len(text):
            piece = first[len(text) - place]
            tokens.append(self._ids[piece])
            place += len(piece)
        return tokens


class Grammar:
    """A compiled grammar."""

    def __init__(self, kind: Kind, text: str, vocabulary: Vocabulary) -> None:
        """Raises UserError for what is no grammar, or none that can be held to."""
        size = len(text.encode(errors="replace"))
        if size > MAX_BYTES:
            raise UserError(f"a {_called(kind)} may have {MAX_BYTES} bytes, but this one has {size}")
        if text != text.encode(errors="replace").decode():
            raise UserError(f"a {_called(kind)} must be Unicode, but this one has half of a surrogate pair")
        self.vocabulary = vocabulary
        lark = _lark(kind, text) + _BYTEWISE
        limits = llguidance.LLParserLimits(verbose_errors=False)
        grammar = llguidance.LLMatcher.grammar_from_lark(lark)
        self._tokens = llguidance.LLMatcher(vocabulary.llguidance, grammar, log_level=0, limits=limits)
        self._bytes = llguidance.LLMatcher(byte_tokenizer(), grammar, log_level=0, limits=limits)
        for matcher in (self._tokens, self._bytes):
            if matcher.is_error():
                raise UserError(f"not a {_called(kind)} that texts can be held to: {reason(matcher)}")
        way = search(self._bytes.deep_copy(), b"", vocabulary.alphabet, FIRST_NODES)
        if way is None:
            raise UserError(f"no text was found that this {_called(kind)} allows")
        self._way = way

    def constraint(self, end_ids: Sequence[int], begun: str = "") -> "GrammarConstraint":
        """What one text may be. end_ids: tokens that end it; begun: what stands before it, and counts as its beginning.

        Raises UserError where no text of the grammar begins like that.
        """
        if not end_ids:
            raise UserError("a text that is held to a grammar needs a token that ends it")
        before = self.vocabulary.shortest(begun.encode())
        constraint = GrammarConstraint(self, end_ids, before or [])
        if before is None or constraint.closing([]) is None:
            raise UserError(f"no text of the grammar was found that begins with {begun!r}")
        return constraint

    def matchers(self) -> tuple[llguidance.LLMatcher, Ways]:
        """Of a text of its own."""
        ways = Ways(self._bytes.deep_copy(), self._way, self.vocabulary.alphabet, self.vocabulary.tokens)
        return self._tokens.deep_copy(), ways


class GrammarConstraint:
    """A `Constraint` by a grammar. What it is asked goes to matchers that follow along, back and forth."""

    def __init__(self, grammar: Grammar, end_ids: Sequence[int], begun: Sequence[int] = ()) -> None:
        self._grammar, self._ends, self._begun = grammar, list(end_ids), list(begun)
        self._matcher, self._ways = grammar.matchers()
        self._at: list[int] = []

    def allowed(self, tokens: Sequence[int]) -> Tensor:
        """As in `Constraint`. Raises ValueError for tokens that may not be."""
        vocabulary = self._grammar.vocabulary
        following = torch.zeros(max(len(vocabulary.tokens), *(end + 1 for end in self._ends)), dtype=torch.bool)
        ended = self._ended(tokens)
        if not ended:
            self._go(tokens)
            bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
            self._check()
            count = len(vocabulary.tokens)
            following[:count] = torch.from_numpy(np.unpackbits(bits, count=count, bitorder="little"))
            if not self._at:
                following[:count] &= vocabulary.first
            following[vocabulary.eos_token_id] = False
        following[self._ends] = ended or self._matcher.is_accepting()
        return following

    def accepted(self, tokens: Sequence[int], new: Sequence[int]) -> int:
        """As in `Constraint`. Raises ValueError for tokens that may not be."""
        if self._ended(tokens):
            return len(new)
        self._go(tokens)
        texts = self._grammar.vocabulary.tokens
        body = list(takewhile(lambda token: token < len(texts) and texts[token], new))
        if not self._may_begin(tokens, body):
            return 0
        count = self._matcher.validate_tokens(body)
        self._check()
        if count == len(body) < len(new) and new[count] in self._ends:
            self._go([*tokens, *body])
            return len(new) if self._matcher.is_accepting() else count
        return count

    def closing(self, tokens: Sequence[int]) -> list[int] | None:
        """As in `Constraint`: what takes the fewest tokens of the way that is known."""
        if self._ended(tokens):
            return []
        way = self._ways.after([*self._begun, *tokens])
        shortest = None if way is None else self._grammar.vocabulary.shortest(way)
        if shortest is None or not self._may_begin(tokens, shortest):
            return None
        return [*shortest, self._ends[0]]

    def _may_begin(self, tokens: Sequence[int], new: Sequence[int]) -> bool:
        """Whether the new ones may come first, if these are none."""
        return not new or bool(tokens or self._begun or self._grammar.vocabulary.first[new[0]])

    def _ended(self, tokens: Sequence[int]) -> bool:
        return not {*self._ends}.isdisjoint(tokens)

    def _go(self, tokens: Sequence[int]) -> None:
        whole = [*self._begun, *tokens]
        shared = num_shared(whole, self._at)
        self._matcher.rollback(len(self._at) - shared)
        del self._at[shared:]
        count = self._matcher.try_consume_tokens(whole[shared:])
        self._at += whole[shared : shared + count]
        self._check()
        if len(self._at) < len(whole):
            raise ValueError(f"token {len(self._at) - len(self._begun)} of the text is not of its grammar")

    def _check(self) -> None:
        if self._matcher.is_error():
            error = reason(self._matcher)
            self._matcher, self._at = self._grammar.matchers()[0], []
            raise UserError(f"the grammar is too involved to be followed further: {error}")


def reason(matcher: llguidance.LLMatcher) -> str:
    """What went wrong, in a line."""
    lines = matcher.get_error().splitlines() or ["unknown"]
    return next((line.removeprefix("error: ") for line in lines if line.startswith("error: ")), lines[0])


def _lark(kind: Kind, text: str) -> str:
    if kind == "json_schema":
        try:
            schema = json.loads(text)
        except RecursionError:
            raise UserError("the JSON schema is nested too deeply") from None
        except ValueError as error:
            raise UserError(f"a JSON schema must be JSON: {error}") from error
        if not isinstance(schema, dict):
            raise UserError("a JSON schema must be an object")
        return f"start: %json {json.dumps(schema | {'x-guidance': _JSON})}"
    if kind == "regex":
        return json.loads(llguidance.LLMatcher.grammar_from_regex(text))["grammars"][0]["lark_grammar"]
    if found := _OF_TOKENS.search(text):
        raise UserError(f"a grammar is one of characters, so that it may not speak of tokens: {found[0]}")
    return text


def _called(kind: Kind) -> str:
    return {"json_schema": "JSON schema", "regex": "regular expression", "grammar": "grammar"}[kind]
