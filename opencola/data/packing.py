"""Documents cut into sequences: one endless stream of them, that can go on at any token."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from opencola.data.sources import Document, Documents
from opencola.errors import UserError
from opencola.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Tokens:
    """A document's token ids and its position (see `opencola.data.sources`)."""

    epoch: int
    index: int
    ids: np.ndarray
    """(L,) of any integer type; of a text, the end-of-text id last."""
    scored: np.ndarray | None = None
    """(L,) bool: ids that count in the loss; all when None."""


class TokenSource(Protocol):
    """Documents as token ids; like `opencola.data.sources.Documents`."""

    num_documents: int | None

    def stream(self, epoch: int = 0, index: int = 0, part: int = 0, parts: int = 1) -> Iterator[Tokens]:
        """Endless documents of a part, from a position on."""


Encode = Callable[[Sequence[str]], Iterable[tuple[list[int], list[bool] | None]]]
"""Documents to token ids, and which of them count in the loss: all when None."""


def plain(tokenizer: Tokenizer) -> Encode:
    """Documents of text, each followed by the end-of-text token."""
    end = [tokenizer.eos_id]
    return lambda texts: ((ids + end, None) for ids in tokenizer.encode_batch(texts))


class Tokenised:
    """Documents, tokenised as they are read."""

    def __init__(self, documents: Documents, encode: Encode, read_ahead: int) -> None:
        """read_ahead: characters of a stream to tokenise at a time."""
        self.num_documents = documents.num_documents
        self._documents = documents
        self._encode = encode
        self._read_ahead = read_ahead

    def stream(self, epoch: int = 0, index: int = 0, part: int = 0, parts: int = 1) -> Iterator[Tokens]:
        """Endless documents of a part, from a position on."""
        read: list[Document] = []
        num_characters = 0
        for document in self._documents.stream(epoch, index, part, parts):
            read.append(document)
            num_characters += len(document.text)
            if num_characters < self._read_ahead:
                continue
            encoded = self._encode([document.text for document in read])
            for place, (ids, scored) in zip(read, encoded, strict=True):
                which = None if scored is None else np.array(scored)
                yield Tokens(place.epoch, place.index, np.array(ids, dtype=np.int64), which)
            read, num_characters = [], 0


Packing = Literal["contiguous", "aligned", "whole"]


class Packer:
    """Cuts one stream of documents into sequences."""

    def __init__(
        self, stream: Iterator[Tokens], packing: Packing, offset: int = 0, multiple: int = 1, pad_id: int = 0
    ) -> None:
        """packing: as in `CorpusConfig`; offset: tokens of the first document served already; multiple and pad_id:
        where whole documents may start, and what is put between and behind them.
        """
        self._stream = stream
        self._packing = packing
        self._offset = offset
        self._multiple = multiple
        self._pad_id = pad_id
        self._document: Tokens | None = None

    def position(self) -> dict[str, int]:
        """Where the next sequence begins: epoch and index of a document, and the offset in it.

        Raises UserError when the first document is shorter than the offset that was given.
        """
        document = self._current()
        if self._offset >= len(document.ids):
            raise UserError(f"document {document.index} of epoch {document.epoch} is shorter than it was")
        return {"epoch": document.epoch, "index": document.index, "offset": self._offset}

    def fill(self, tokens: np.ndarray, documents: np.ndarray, scored: np.ndarray) -> int:
        """Write the next sequence into `tokens` (L,), into `documents` (L,) the number of each token's document, and
        into `scored` (L,) whether it counts in the loss.

        Documents are numbered from 0 in each sequence; the end-of-text token and the padding behind a document belong
        to it. Padding does not count. Returns the number of documents that lost their ends: 0 or 1.
        """
        whole = self._packing == "whole"
        filled = number = 0
        while filled < len(tokens):
            document = self._current()
            if whole and 0 < filled > len(tokens) - len(document.ids):
                break
            piece = slice(self._offset, self._offset + len(tokens) - filled)
            end = filled + len(document.ids[piece])
            tokens[filled:end] = document.ids[piece]
            scored[filled:end] = True if document.scored is None else document.scored[piece]
            documents[filled:] = number
            self._offset += end - filled
            if self._offset == len(document.ids):
                self._next_document()
            filled, number = end, number + 1
            if whole:  # what follows is overwritten where there is room for another document
                tokens[filled:], scored[filled:] = self._pad_id, False
                filled += -filled % self._multiple
        cut = self._packing != "contiguous" and self._offset > 0
        if cut:
            self._next_document()
        return int(cut)

    def _current(self) -> Tokens:
        """The document that is being served."""
        if self._document is None:
            self._document = next(self._stream)
        return self._document

    def _next_document(self) -> None:
        self._document = None
        self._offset = 0
