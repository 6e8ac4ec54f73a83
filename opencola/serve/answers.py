"""Answers in OpenAI's shapes, whole and in chunks, of completions and of chats; `seed` is ours."""

import time
import uuid
from collections import Counter
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any, Protocol

from opencola.models.stopping import Finished, State
from opencola.serve.logprobs import Decode, of_chat, of_completion
from opencola.serve.requests import Piece, Scored
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

    def logprobs(self, scores: Sequence[Scored], decode: Decode, start: int) -> dict[str, Any]:
        """How probable tokens are, whose texts begin at a place of the whole text."""
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

    def logprobs(self, scores: Sequence[Scored], decode: Decode, start: int) -> dict[str, Any]:
        """Of its tokens."""
        return of_completion(scores, decode, start)


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

    def logprobs(self, scores: Sequence[Scored], decode: Decode, start: int) -> dict[str, Any]:
        """Of its tokens."""
        return of_chat(scores, decode)


class Answer:
    """The answer to one request."""

    def __init__(self, service: Service, texts: Texts, shape: Shape) -> None:
        self.texts, self._shape, self._decode = texts, shape, service.engine.tokenizer.decode
        self._head = {"id": f"{shape.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": service.name}
        self._foot = {"system_fingerprint": service.fingerprint, "seed": texts.work.seed}

    async def whole(self) -> dict[str, Any]:
        """The answer when all texts are written."""
        written = [[head] for head in self.texts.work.heads]
        scores: list[list[Scored]] = [[] for _ in written]
        reasons = [""] * len(written)
        async with aclosing(self.texts.pieces()) as pieces:
            async for i, piece in pieces:
                written[i].append(piece.text)
                scores[i] += self._scores(piece)
                reasons[i] = REASONS.get(piece.finished, "")
        rows = enumerate(zip(written, scores, reasons, strict=True))
        choices = [
            self._choice(i, self._shape.choice("".join(parts)), reason, self._logprobs(of, 0))
            for i, (parts, of, reason) in rows
        ]
        return self._body(self._shape.whole, choices) | {"usage": self.texts.usage}

    async def chunks(self, counted: bool) -> AsyncGenerator[dict[str, Any], None]:
        """The answer piece by piece; counted: the last says what was used."""
        told, length = Counter[int](), Counter[int]()
        usage: dict[str, Any] = {"usage": None} if counted else {}
        async with aclosing(self.texts.pieces()) as pieces:
            async for i, piece in pieces:
                first = not told[i]
                text = self.texts.work.heads[i] + piece.text if first else piece.text
                scores = self._scores(piece)
                if text or first or self.texts.work.watch or scores:
                    seen = {"opencola": self._seen(told[i], piece)} if self.texts.work.watch else {}
                    logprobs = self._logprobs(scores, length[i])
                    yield self._chunk(i, self._shape.delta(text, first), None, logprobs, seen) | usage
                told[i] += 1
                length[i] += len(text)
                if piece.finished:
                    yield self._chunk(i, self._shape.delta("", False), REASONS[piece.finished], None, {}) | usage
        if counted:
            yield self._body(self._shape.part, []) | {"usage": self.texts.usage}

    def _scores(self, piece: Piece) -> list[Scored]:
        return [*(piece.prompt_scores if self.texts.work.echo else ()), *piece.scores]

    def _logprobs(self, scores: Sequence[Scored], start: int) -> dict[str, Any] | None:
        return self._shape.logprobs(scores, self._decode, start) if self.texts.work.scored else None

    def _seen(self, block: int, piece: Piece) -> dict[str, Any]:
        """What a page shows of a block beside its text."""
        tokens = [[token, self._decode([token])] for token in piece.tokens]
        seen = {"block": block, "tokens": tokens}
        return seen | ({"states": [self._state(state) for state in piece.states]} if piece.states else {})

    def _state(self, state: State) -> dict[str, Any]:
        return {
            "t": round(state.time, 4),
            "tokens": [self._decode([token]) for token in state.tokens],
            "margins": [round(margin, 3) for margin in state.margins],
            "latents": [[round(value, 3) for value in row] for row in state.latents.tolist()],
        }

    def _chunk(
        self, i: int, delta: dict[str, Any], reason: str | None, logprobs: dict[str, Any] | None, seen: dict[str, Any]
    ) -> dict[str, Any]:
        return self._body(self._shape.part, [self._choice(i, delta, reason, logprobs) | seen])

    def _choice(
        self, i: int, content: dict[str, Any], reason: str | None, logprobs: dict[str, Any] | None
    ) -> dict[str, Any]:
        return {"index": i, **content, "logprobs": logprobs, "finish_reason": reason}

    def _body(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._head, "object": kind, "choices": choices, **self._foot}
