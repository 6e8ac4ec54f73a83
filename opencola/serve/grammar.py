"""Grammars that requests ask for: JSON, a JSON schema, a regular expression, a grammar as Lark writes it."""

import json
from collections.abc import Mapping
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

from opencola.errors import UserError
from opencola.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from opencola.serve.matching import Grammar, Kind, Vocabulary

CACHED = 64
"""Number of grammars that are kept compiled."""


class Grammars:
    """The grammars of requests to a model: each is compiled once, and the latest are kept."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.compile = lru_cache(CACHED)(self._compile)

    @cached_property
    def _vocabulary(self) -> "Vocabulary":
        from opencola.serve.matching import Vocabulary

        return Vocabulary(self._tokenizer)

    def _compile(self, kind: "Kind", text: str) -> "Grammar":
        """Raises UserError for what is no grammar, none that can be held to, or where llguidance is not installed."""
        try:
            from opencola.serve.matching import Grammar
        except ImportError:
            raise UserError("texts are held to a grammar by llguidance: pip install 'opencola[serve]'") from None
        return Grammar(kind, text, self._vocabulary)

    def of_format(self, response_format: Any) -> "Grammar | None":
        """What OpenAI's field `response_format` asks for; None for plain text.

        Beside its types text, json_object and json_schema there are {"type": "regex", "regex": ...} and {"type":
        "grammar", "grammar": ...}. Raises UserError that says what is wrong.
        """
        if response_format is None:
            return None
        if not isinstance(response_format, Mapping):
            raise UserError("response_format must be an object with a type")
        match response_format:
            case {"type": "text"}:
                return None
            case {"type": "json_object"}:
                return self.compile("json_schema", '{"type": "object"}')
            case {"type": "json_schema", "json_schema": {"schema": dict() as schema}}:
                return self.compile("json_schema", _dumped(schema))
            case {"type": "json_schema"}:
                raise UserError("response_format: json_schema must hold a schema, which is an object")
            case {"type": "regex", "regex": str() as text}:
                return self.compile("regex", text)
            case {"type": "grammar", "grammar": str() as text}:
                return self.compile("grammar", text)
            case {"type": "regex" | "grammar" as kind}:
                raise UserError(f"response_format: {kind} must hold a text")
        raise UserError(
            "response_format: its type must be text, json_object, json_schema, regex or grammar, "
            f"but is {response_format.get('type')!r}"
        )


def _dumped(schema: dict[str, Any]) -> str:
    try:
        return json.dumps(schema)
    except RecursionError:
        raise UserError("response_format: the schema is nested too deeply") from None
