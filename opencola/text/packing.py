"""Documents cut into sequences: one endless stream of them, that can go on at any token."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from opencola.text.sources import Document, Documents
from opencola.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Tokens:
    """A document's token ids and its position (see `opencola.text.sources`)."""

    epoch: int
    index: int
    ids: np.ndarray
    """(L,) of any integer type, the end-of-text id last."""


class TokenSource(Protocol):
    """Documents as token ids; like `opencola.text.sources.Documents`."""

    num_documents: int | None

    def stream(self, epoch: int = 0, index: int = 0, part: int = 0, parts: int = 1) -> Iterator[Tokens]:
        """Endless documents of a part, from a position on."""


class Tokenised:
    """Documents of text, tokenised as they are read."""

    def __init__(self, documents: Documents, tokenizer: Tokenizer, read_ahead: int) -> None:
        """read_ahead: characters of a stream to tokenise at a time."""
        self.num_documents = documents.num_documents
        self._documents = documents
        self._tokenizer = tokenizer
        self._eos_id = tokenizer.eos_id
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
            encoded = self._tokenizer.encode_batch([document.text for document in read])
            for place, ids in zip(read, encoded, strict=True):
                yield Tokens(place.epoch, place.index, np.array([*ids, self._eos_id], dtype=np.int64))
            read, num_characters = [], 0


class Packer:
    """Cuts one stream of documents into sequences."""

    def __init__(self, stream: Iterator[Tokens], aligned: bool, offset: int = 0) -> None:
        """aligned: start every sequence with a document; offset: tokens of the first document served already."""
        self._stream = stream
        self._aligned = aligned
        self._offset = offset
        self._document: Tokens | None = None

    def position(self) -> dict[str, int]:
        """Where the next sequence begins: epoch and index of a document, and the offset in it.

        Raises ValueError when the first document is shorter than the offset that was given.
        """
        document = self._current()
        if self._offset >= len(document.ids):
            raise ValueError(f"document {document.index} of epoch {document.epoch} is shorter than it was")
        return {"epoch": document.epoch, "index": document.index, "offset": self._offset}

    def fill(self, tokens: np.ndarray, documents: np.ndarray | None = None) -> None:
        """Write the next sequence into `tokens` (L,), and into `documents` (L,) the number of each token's document.

        Documents are numbered from 0 in each sequence; the end-of-text token belongs to the document that it ends.
        """
        filled = number = 0
        while filled < len(tokens):
            ids = self._current().ids
            piece = ids[self._offset : self._offset + len(tokens) - filled]
            end = filled + len(piece)
            tokens[filled:end] = piece
            if documents is not None:
                documents[filled:end] = number
            filled, number = end, number + 1
            self._offset += len(piece)
            if self._offset == len(ids):
                self._next_document()
        if self._aligned and self._offset > 0:
            self._next_document()

    def _current(self) -> Tokens:
        """The document that is being served."""
        if self._document is None:
            self._document = next(self._stream)
        return self._document

    def _next_document(self) -> None:
        self._document = None
        self._offset = 0
