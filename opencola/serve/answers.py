"""Answers in OpenAI's shapes, whole and in chunks, of completions and of chats; `seed` is ours."""

import time
import uuid
from collections import Counter
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, Protocol

from opencola.models.stopping import Finished
from opencola.serve.engine import Piece
from opencola.serve.service import Service
from opencola.serve.texts import Texts

REASONS: dict[Finished, str] = {"eos": "stop", "stop": "stop", "length": "length"}


class Shape(Protocol):
    """How one of the two kinds of answers looks."""

    prefix: str
    whole: str
    part: str

    def choice(self, text: str) -> dict[str, Any]:
        """A whole text."""
        ...

    def delta(self, text: str, first: bool) -> dict[str, Any]:
        """What is new of a text; first: the text begins."""
        ...


class Completion:
    """Of /v1/completions."""

    prefix, whole, part = "cmpl", "text_completion", "text_completion"

    def choice(self, text: str) -> dict[str, Any]:
        """A whole text."""
        return {"text": text}

    def delta(self, text: str, first: bool) -> dict[str, Any]:
        """What is new of it."""
        return {"text": text}


class Chat:
    """Of /v1/chat/completions."""

    prefix, whole, part = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def choice(self, text: str) -> dict[str, Any]:
        """A whole message."""
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def delta(self, text: str, first: bool) -> dict[str, Any]:
        """What is new of it."""
        role = {"role": "assistant"} if first else {}
        return {"delta": {**role, **({"content": text} if text or first else {})}}


class Answer:
    """The answer to one request."""

    def __init__(self, service: Service, texts: Texts, shape: Shape) -> None:
        self.texts, self._shape, self._decode = texts, shape, service.engine.tokenizer.decode
        self._head = {"id": f"{shape.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": service.name}
        self._foot = {"system_fingerprint": service.fingerprint, "seed": texts.work.seed}

    async def whole(self) -> dict[str, Any]:
        """The answer when all texts are written."""
        written = [[head] for head in self.texts.work.heads]
        reasons = [""] * len(written)
        async with aclosing(self.texts.pieces()) as pieces:
            async for i, piece in pieces:
                written[i].append(piece.text)
                reasons[i] = REASONS.get(piece.finished, "")
        choices = [
            self._choice(i, self._shape.choice("".join(parts)), reason)
            for i, (parts, reason) in enumerate(zip(written, reasons, strict=True))
        ]
        return self._body(self._shape.whole, choices) | {"usage": self.texts.usage}

    async def chunks(self, counted: bool) -> AsyncGenerator[dict[str, Any], None]:
        """The answer piece by piece; counted: the last says what was used."""
        told = Counter[int]()
        usage: dict[str, Any] = {"usage": None} if counted else {}
        async with aclosing(self.texts.pieces()) as pieces:
            async for i, piece in pieces:
                first = not told[i]
                text = self.texts.work.heads[i] + piece.text if first else piece.text
                if text or first or self.texts.work.watch:
                    seen = {"opencola": self._seen(told[i], piece)} if self.texts.work.watch else {}
                    yield self._chunk(i, text, None, first, seen) | usage
                told[i] += 1
                if piece.finished:
                    yield self._chunk(i, "", REASONS[piece.finished], False, {}) | usage
        if counted:
            yield self._body(self._shape.part, []) | {"usage": self.texts.usage}

    def _seen(self, block: int, piece: Piece) -> dict[str, Any]:
        """What a page shows of a block beside its text."""
        return {"block": block, "tokens": [[token, self._decode([token])] for token in piece.tokens]}

    def _chunk(self, i: int, text: str, reason: str | None, first: bool, seen: dict[str, Any]) -> dict[str, Any]:
        return self._body(self._shape.part, [self._choice(i, self._shape.delta(text, first), reason) | seen])

    def _choice(self, i: int, content: dict[str, Any], reason: str | None) -> dict[str, Any]:
        return {"index": i, **content, "logprobs": None, "finish_reason": reason}

    def _body(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._head, "object": kind, "choices": choices, **self._foot}
