"""Grammars that requests ask for: JSON, a JSON schema, a regular expression, a grammar as Lark writes it."""

from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

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
