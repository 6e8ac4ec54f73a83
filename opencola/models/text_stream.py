"""From blocks of tokens to text as it is written: whole characters, stop strings, the end-of-text token."""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from opencola.errors import UserError
from opencola.models.language_model import LanguageModel
from opencola.models.sampling import Sampling
from opencola.models.stopping import Finished, TokenBlock
from opencola.text.conversations import ChatML, Message
from opencola.text.tokenizer import UNFINISHED, Tokenizer


@dataclass(frozen=True)
class TextPiece:
    """What a block adds to one sample."""

    sample: int
    """The prompt's place in the list."""
    text: str
    """New text, possibly none: characters that are cut, and text that may become a stop string, wait for the next."""
    tokens: list[int]
    """New token ids; where a stop string ends the text, none that lie wholly behind the text's end."""
    finished: Finished
    """Why the sample ended, when this is its last piece."""


def generate_text(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompts: Sequence[str | Sequence[Message]],
    sampling: Sampling,
    ids: Sequence[int] | None = None,
) -> Iterator[list[TextPiece]]:
    """Continue prompts (any text, also ""), and yield a piece for every unfinished sample, block by block.

    With sampling.chat a prompt is what a user says, or all messages of a conversation so far, and the text is the
    assistant's answer. A sample's pieces join to its exact continuation. ids: the samples' ids, which with the seed
    decide their noise (their places in the list when not given). Raises UserError for a model and a tokenizer that do
    not belong together, an empty stop string, messages without chat, or a token that the sampling needs and the
    tokenizer lacks.
    """
    if tokenizer.vocab_size > model.vocab_size:
        raise UserError(f"the tokenizer has {tokenizer.vocab_size} tokens, but the model knows only {model.vocab_size}")
    if "" in sampling.stop:
        raise UserError("an empty stop string would end every text at once: leave it out")
    encoded, end_ids = encode(tokenizer, prompts, sampling.chat)
    texts = [Continuation(tokenizer, prompt, sampling.stop) for prompt in encoded]
    blocks = model.generate(
        encoded,
        sampling,
        eos_ids=() if sampling.ignore_eos else end_ids,
        # elsewhere padding is never seen, so that a tokenizer without such a token will do
        pad_id=tokenizer.pad_id if sampling.shows_padding else 0,
        ids=ids,
        stop=lambda sample, tokens: texts[sample].stop(tokens),
    )
    for pieces in blocks:
        yield [texts[block.sample].take(block) for block in pieces]


def whole_texts(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompts: Sequence[str | Sequence[Message]],
    sampling: Sampling,
    ids: Sequence[int] | None = None,
) -> list[str]:
    """The texts of `generate_text` when they are done, one for each prompt. Arguments and errors as there."""
    texts = [""] * len(prompts)
    for pieces in generate_text(model, tokenizer, prompts, sampling, ids):
        for piece in pieces:
            texts[piece.sample] += piece.text
    return texts


def encode(
    tokenizer: Tokenizer, prompts: Sequence[str | Sequence[Message]], chat: bool
) -> tuple[list[list[int]], tuple[int, ...]]:
    """Token ids of prompts, as `generate_text` takes them, and of the tokens that end a text."""
    if not chat:
        texts = [prompt for prompt in prompts if isinstance(prompt, str)]
        if len(texts) < len(prompts):
            raise UserError("messages are answered with chat only: set it, or give texts")
        return [tokenizer.encode(text) for text in texts], (tokenizer.eos_id,)
    chatml = ChatML(tokenizer)
    turns = [[Message("user", prompt)] if isinstance(prompt, str) else prompt for prompt in prompts]
    return [chatml.prompt(messages) for messages in turns], (tokenizer.eos_id, chatml.end_id)


class Continuation:
    """The text of one sample as it grows."""

    def __init__(self, tokenizer: Tokenizer, prompt: list[int], stops: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._prompt = prompt
        self._stops = stops
        self._stream = tokenizer.stream()
        self._text = ""
        self._given = 0  # characters
        self._end: int | None = None  # where a stop string begins
        # A decoder may treat the beginning of a text differently, so the prompt is decoded along and cut off.
        self._stream.push(prompt)
        self._stream.close()  # a prompt is whole, even one that ends in U+FFFD
        # Beside it the same of all tokens, those that are not given out, too, with the prompt's text.
        self._ahead = tokenizer.stream()
        self._written = self._ahead.push(prompt)
        self._start = len(self._written + self._ahead.rest())
        self._pushed = 0  # new tokens

    def stop(self, tokens: list[int]) -> int | None:
        """How many of all new tokens to keep if the text that they give holds a stop string, else None."""
        if not self._stops:
            return None
        self._written += self._ahead.push(tokens[self._pushed :])
        self._pushed = len(tokens)
        text = (self._written + self._ahead.rest())[self._start :]
        starts = [place for string in self._stops if (place := text.find(string)) >= 0]
        if not starts:
            return None
        end = self._end = min(starts)
        return bisect_left(
            range(len(tokens)), end, key=lambda count: len(self._decode(tokens[:count]).rstrip(UNFINISHED))
        )

    def take(self, block: TokenBlock) -> TextPiece:
        """The text that a block completes."""
        self._text += self._stream.push(block.tokens)
        if block.finished:
            self._text += self._stream.close()
            end = len(self._text) if self._end is None else self._end
        else:
            end = len(self._text) - _possible_stop(self._text, self._stops)
        text = self._text[self._given : end]
        self._given = end
        return TextPiece(block.sample, text, block.tokens, block.finished)

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(self._prompt + tokens)[self._start :]


def _possible_stop(text: str, stops: Sequence[str]) -> int:
    """Length of the longest end of the text that a stop string begins with."""
    lengths = (length for string in stops for length in range(len(string)) if text.endswith(string[:length]))
    return max(lengths, default=0)
