"""Conversations: rows of messages, checked, and written for a model as ChatML.

    <|im_start|>user
    How are you?<|im_end|>
    <|im_start|>assistant
    Fine.<|im_end|>

The two marks are special tokens, put there by their ids: what a message says is only ever text. An answer and the
<|im_end|> behind it are scored, for that is what a model is to write; all else is given to it.
"""

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from opencola.errors import UserError
from opencola.text.files import field_of
from opencola.text.lines import check_text, kind
from opencola.text.tokenizer import Tokenizer

TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"


@dataclass(frozen=True)
class Message:
    """What one side says."""

    role: str
    """`system`, `user` or `assistant`."""
    content: str


def conversation_of(row: Mapping[str, Any], field: str, place: str) -> str:
    """The conversation in a row's field, as JSON that `parse` reads.

    It is a list of objects {"role": ..., "content": ...}: maybe a system's message, then a user's and an assistant's in
    turn, an assistant's last. Raises UserError, naming place, message and field, for anything else.
    """
    value = field_of(row, field, place)
    if not isinstance(value, list) or not value:
        problem = "empty" if value == [] else kind(value)
        raise UserError(f"{place}: field {field!r} must be a list of messages, but is {problem}")
    pairs: list[tuple[str, str]] = []
    for number, message in enumerate(value, 1):
        where = f"{place}: message {number} of field {field!r}"
        if not isinstance(message, dict):
            raise UserError(f"{where}: expected an object with role and content, found {kind(message)}")
        role, content = message.get("role"), message.get("content")
        expected = "assistant" if pairs and pairs[-1][0] == "user" else "user"
        if role != expected and (pairs or role != "system"):
            raise UserError(f"{where}: role must be {expected!r} here, but is {role!r}")
        if not isinstance(content, str):
            raise UserError(f"{where}: content must be a string, but is {kind(content)}")
        if not content.strip():
            raise UserError(f"{where}: content is empty")
        check_text(content, f"{where}: content")
        pairs.append((role, content))
    if pairs[-1][0] != "assistant":
        raise UserError(f"{place}: the last message of field {field!r} must be the assistant's")
    return json.dumps(pairs, ensure_ascii=False)


def parse(conversation: str) -> list[Message]:
    """The messages of what `conversation_of` gives."""
    return [Message(role, content) for role, content in json.loads(conversation)]


class ChatML:
    """Conversations as the token ids of a tokenizer that has the two marks."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Raises UserError, with what to do, for a tokenizer without the marks."""
        self._tokenizer = tokenizer
        try:
            self._start_id, self.end_id = tokenizer.special_id(TURN_START), tokenizer.special_id(TURN_END)
        except ValueError as error:
            raise UserError(
                f"{error}: conversations need a base model whose tokenizer was trained with tokenizer.special "
                f"'{TURN_START}' '{TURN_END}', as by the recipe text"
            ) from None
        self._line_end = tokenizer.encode("\n")

    def encode_batch(self, conversations: Sequence[str]) -> Iterator[tuple[list[int], list[bool]]]:
        """Token ids of what `conversation_of` gives, and whether each is scored."""
        parsed = [parse(conversation) for conversation in conversations]
        contents = iter(self._tokenizer.encode_batch([m.content for messages in parsed for m in messages]))
        for messages in parsed:
            yield self._turns((message.role, next(contents)) for message in messages)

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of the messages so far and the beginning of the assistant's next."""
        ids, _ = self._turns((message.role, self._tokenizer.encode(message.content)) for message in messages)
        return ids + self._head("assistant")

    def question(self, ids: Sequence[int]) -> str:
        """What the first user says in the ids of conversations."""
        head, rest = self._head("user"), list(ids)
        start = next((i for i in range(len(rest)) if rest[i : i + len(head)] == head), len(rest)) + len(head)
        return self._tokenizer.decode(list(itertools.takewhile(lambda id_: id_ != self.end_id, rest[start:])))

    def _turns(self, messages: Iterable[tuple[str, list[int]]]) -> tuple[list[int], list[bool]]:
        ids: list[int] = []
        scored: list[bool] = []
        for role, content in messages:
            answer = role == "assistant"
            for part, counts in (
                (self._head(role), False),
                ([*content, self.end_id], answer),
                (self._line_end, False),
            ):
                ids += part
                scored += [counts] * len(part)
        return ids, scored

    def _head(self, role: str) -> list[int]:
        return [self._start_id, *self._tokenizer.encode(f"{role}\n")]
