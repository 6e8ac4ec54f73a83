"""Writing tokenised shards (`opencola.data.shards`): by several processes, and again from where it stopped.

Every file is written as a draft and renamed when it is whole, and a shard enters the manifest when both of its files
are there. What comes out depends on the order alone, not on the number of processes or on interruptions.
"""

import contextlib
import dataclasses
import errno
import hashlib
import itertools
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from opencola.data.encoding import Encoded, encode, encode_all
from opencola.data.shards import FORMAT, INDEX_TYPE, MANIFEST, Manifest, Shard, checksum, folder_of, load_tokenizer
from opencola.data.sources import one_pass
from opencola.errors import UserError
from opencola.ranges import Count, Many, Seed, check
from opencola.storage import locked, to_disk
from opencola.text.files import Blank, iter_documents
from opencola.text.lines import is_pipe, write_objects
from opencola.text.tokenizer import FILE_NAME, Tokenizer

TRAIN_DOCUMENTS = 10_000  # that a new tokenizer is trained on
PIPE = ".pipe.jsonl"


@dataclass(frozen=True)
class Order:
    """What to tokenise, and how to cut it into shards."""

    source: str
    """Where documents come from, written like data.source of a recipe; `-` is standard input."""
    tokenizer: Path | None = None
    """An existing tokenizer.json, or the folder that holds one."""
    vocab_size: Count | None = None
    """Train a new tokenizer of this size instead, on the first 10,000 documents."""
    special: tuple[str, ...] = ()
    """Further special tokens of a new tokenizer, such as the marks <|im_start|> and <|im_end|> of conversations."""
    text_field: str = "text"
    """Field (.jsonl, Hugging Face) or column (.parquet) that holds the text."""
    seed: Seed = 0
    """Seed of generated stories: another one gives other stories."""
    limit: Many | None = None
    """Number of documents to tokenise, the first ones; all when not given."""
    shard_tokens: Many = 100_000_000
    """Number of tokens after which a shard ends, with the document that reaches it."""

    def __post_init__(self) -> None:
        check(self)
        if (self.tokenizer is None) == (self.vocab_size is None):
            raise UserError("give either a tokenizer (--tokenizer PATH) or the size of a new one (--vocab-size N)")
        if self.special and self.vocab_size is None:
            raise UserError("an existing tokenizer has its special tokens: leave out --special, or train a new one")
        if self.source == "stories" and self.limit is None:
            raise UserError("stories never end: say how many (--limit N)")
        if folder_of(self.source) is not None:
            raise UserError(f"{self.source} is tokenised already")

    def texts(self, first: int = 0, blank: Blank | None = None) -> Iterator[str]:
        """The documents from number `first` on; blank: counts those of white space alone, which are none."""
        texts = one_pass(self.source, self.seed, self.text_field, first, blank)
        return itertools.islice(texts, None if self.limit is None else self.limit - first)


@dataclass(frozen=True)
class Progress:
    """What is in a folder of shards by now."""

    documents: int
    tokens: int
    shards: int
    """Shards that are whole; there may be documents and tokens of another one."""
    blank: int = 0
    """Documents of white space alone, which were passed over."""


def tokenise(order: Order, folder: Path, workers: int = 1) -> Iterator[Progress]:
    """Write shards into a folder, or what is missing and damaged of them; yields how far it is, as often as it knows.

    Raises UserError and FileNotFoundError, naming the place, for a source, tokenizer or folder that cannot be used,
    UserError where the folder holds the shards of another order, the source has changed, or another process writes
    there, and OSError, naming the file, for a full disk.
    """
    if workers < 1:
        raise UserError(f"workers must be at least 1, but is {workers}")
    with locked(folder), _readable(order, folder) as order:
        yield from _tokenise(order, folder, workers)


@contextlib.contextmanager
def _readable(order: Order, folder: Path) -> Iterator[Order]:
    """The order, whose documents can be read as often as needed: those of a pipe are kept in the folder meanwhile."""
    if not is_pipe(Path(order.source)):
        yield order
        return
    kept = folder / PIPE
    try:
        kept.unlink(missing_ok=True)
        yield _Piped(**{field.name: getattr(order, field.name) for field in dataclasses.fields(Order)}, kept=kept)
    finally:
        kept.unlink(missing_ok=True)


@dataclass(frozen=True)
class _Piped(Order):
    """An order of documents out of a pipe, which are kept in a file from when they are first asked for."""

    kept: Path = Path(PIPE)
    blank: Blank = dataclasses.field(default_factory=Blank)

    def texts(self, first: int = 0, blank: Blank | None = None) -> Iterator[str]:
        if not self.kept.exists():
            with _naming(self.kept):
                write_objects(self.kept, ({"text": text} for text in super().texts(blank=self.blank)))
        if blank is not None:
            blank.count = self.blank.count
        return itertools.islice(iter_documents(self.kept), first, None)


def _tokenise(order: Order, folder: Path, workers: int) -> Iterator[Progress]:
    manifest = _begin(order, folder)
    done = _progress(manifest)
    yield done
    for number, shard in enumerate(manifest.shards):
        if damage := shard.damage(folder, whole=True):
            first = sum(before.documents for before in manifest.shards[:number])
            written = None
            for part in _write(order, manifest, folder, number, first, workers, Blank()):
                yield done
                if isinstance(part, Shard):
                    written = part
                    break
            if written != shard:
                raise UserError(f"{damage}, and {order.source} has changed since: choose another folder")
    if manifest.finished:
        return
    _check_last(order, manifest, folder)
    blank = Blank()
    for part in _write(order, manifest, folder, len(manifest.shards), manifest.num_documents, workers, blank):
        documents, tokens = (0, 0) if isinstance(part, Shard) else part
        if isinstance(part, Shard):
            manifest = dataclasses.replace(manifest, shards=(*manifest.shards, part))
            _save(manifest, folder)
        before = _progress(manifest)
        yield Progress(before.documents + documents, before.tokens + tokens, before.shards, blank.count)
    if not manifest.shards:
        raise UserError(f"no documents in {order.source}")
    _save(dataclasses.replace(manifest, finished=True), folder)


def _progress(manifest: Manifest) -> Progress:
    return Progress(manifest.num_documents, manifest.num_tokens, len(manifest.shards))


def _save(manifest: Manifest, folder: Path) -> None:
    with _naming(folder / MANIFEST):
        manifest.write(folder)


def _begin(order: Order, folder: Path) -> Manifest:
    """The manifest that is there, which must be of this order, or a new one without shards."""
    if (folder / MANIFEST).is_file():
        manifest = Manifest.read(folder)
        tokenizer = load_tokenizer(folder, manifest)
        asked = {"source": order.source, "text_field": order.text_field, "seed": order.seed, "limit": order.limit}
        asked |= {"shard_tokens": order.shard_tokens, "trained_vocab_size": order.vocab_size}
        for name, value in asked.items():
            if (there := getattr(manifest, name)) != value:
                raise UserError(f"{folder} holds shards of {name} {there}, not {value}: choose another folder")
        for name in order.special:
            tokenizer.special_id(name)
        if order.tokenizer is not None and Tokenizer.load(order.tokenizer).fingerprint != tokenizer.fingerprint:
            raise UserError(f"{folder} holds shards of another tokenizer than {order.tokenizer}: choose another folder")
        return manifest
    if folder.exists() and any(file.name != FILE_NAME and file.name[0] != "." for file in folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty: choose another folder")
    if order.tokenizer is not None:
        tokenizer = Tokenizer.load(order.tokenizer)
        next(order.texts(), None)  # raises where there is nothing to read, before anything is written
    else:
        assert order.vocab_size is not None
        tokenizer = Tokenizer.train(itertools.islice(order.texts(), TRAIN_DOCUMENTS), order.vocab_size, order.special)
    eos_id, vocab_size = tokenizer.eos_id, tokenizer.vocab_size
    with _naming(folder / FILE_NAME):
        file = tokenizer.save(folder / FILE_NAME)
        manifest = Manifest(
            format=FORMAT,
            source=order.source,
            text_field=order.text_field,
            seed=order.seed,
            limit=order.limit,
            shard_tokens=order.shard_tokens,
            tokenizer_sha256=checksum(file),
            trained_vocab_size=order.vocab_size,
            vocab_size=vocab_size,
            eos_id=eos_id,
            dtype="uint16" if vocab_size <= 1 << 16 else "uint32",
            finished=False,
            shards=(),
        )
        manifest.write(folder)
    return manifest


def _check_last(order: Order, manifest: Manifest, folder: Path) -> None:
    """Raise UserError where the source no longer holds the last document that was written."""
    if not manifest.shards:
        return
    last = manifest.shards[-1]
    starts = np.memmap(folder / f"{last.name}.idx", INDEX_TYPE, "r")
    written = np.memmap(folder / f"{last.name}.bin", manifest.token_type, "r")[int(starts[-2]) :]
    texts = list(itertools.islice(order.texts(manifest.num_documents - 1), 1))
    ids, _ = encode(texts, Tokenizer.load(folder), manifest.dtype)
    if not np.array_equal(ids, written):
        raise UserError(f"{order.source} is not what it was when {folder} was begun: choose another folder")


def _write(
    order: Order, manifest: Manifest, folder: Path, number: int, first: int, workers: int, blank: Blank
) -> Iterator[tuple[int, int] | Shard]:
    """Write the shards from `number` on, the first of which begins with document `first`.

    Yields each shard when it is whole, and before that, every now and then, its documents and tokens so far.
    """
    texts = order.texts(first, blank)
    with contextlib.closing(encode_all(texts, folder / FILE_NAME, manifest.dtype, workers)) as chunks:
        rest = next(chunks, None)
        while rest is not None:
            name = f"shard-{number:05d}"
            drafts = {suffix: folder / f".{name}{suffix}.draft" for suffix in (".bin", ".idx")}
            try:
                with _naming(folder / f"{name}.bin"):
                    shard, rest = yield from _write_shard(name, drafts, rest, chunks, order.shard_tokens)
                    for suffix, draft in drafts.items():
                        draft.replace(folder / f"{name}{suffix}")
            finally:
                for draft in drafts.values():
                    draft.unlink(missing_ok=True)
            yield shard
            number += 1


def _write_shard(
    name: str, drafts: dict[str, Path], rest: Encoded | None, chunks: Iterator[Encoded], enough: int
) -> Generator[tuple[int, int], None, tuple[Shard, Encoded | None]]:
    """Write documents, beginning with `rest`, until there are `enough` tokens; returns also the last chunk's rest."""
    digest, num_documents, num_tokens, lengths = hashlib.sha256(), 0, 0, [np.zeros(1, INDEX_TYPE)]
    with drafts[".bin"].open("wb") as file:
        while rest is not None and num_tokens < enough:
            ids, counts = rest
            ends = counts.cumsum()
            taken = min(int(np.searchsorted(ends, enough - num_tokens)) + 1, len(counts))
            end = int(ends[taken - 1])
            file.write(ids[:end].data)
            digest.update(ids[:end].data)
            lengths.append(counts[:taken])
            num_documents, num_tokens = num_documents + taken, num_tokens + end
            yield num_documents, num_tokens
            rest = (ids[end:], counts[taken:]) if taken < len(counts) else next(chunks, None)
        to_disk(file)
        size = file.tell()
    starts = np.concatenate(lengths).cumsum(dtype=INDEX_TYPE)
    with drafts[".idx"].open("wb") as file:
        file.write(starts.data)
        to_disk(file)
    index_digest = hashlib.sha256(starts.data).hexdigest()
    return Shard(name, num_documents, num_tokens, size, digest.hexdigest(), index_digest), rest


@contextlib.contextmanager
def _naming(file: Path) -> Iterator[None]:
    """A full disk as an error that names the file and says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise OSError(
            f"{file}: {error.strerror}; the shards before it are kept: make room, and run the same command again"
        ) from error
