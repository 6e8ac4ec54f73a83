"""Tokenised documents on disk, read through a memory map: what `opencola tokenize` writes.

manifest.json      what the shards were made of and hold, with their sizes and checksums
tokenizer.json     the tokenizer that wrote them
shard-00000.bin    token ids (little-endian uint16, or uint32 for large vocabularies), each document followed by
                   the end-of-text id
shard-00000.idx    where each document begins, counted in tokens, and where the last one ends (uint64)
"""

import bisect
import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from opencola.data.packing import Tokens
from opencola.data.sources import Shuffled, check_seed
from opencola.errors import UserError
from opencola.paths import home
from opencola.storage import write_text
from opencola.text.tokenizer import FILE_NAME, Tokenizer

MANIFEST = "manifest.json"
FORMAT = 1
PREFIX = "shards:"
INDEX_TYPE = np.dtype("<u8")
AGAIN = "run `opencola tokenize` again with the same flags, which writes what is missing or damaged"


@dataclass(frozen=True)
class Shard:
    """One shard's entry in the manifest."""

    name: str
    """File name without its suffix."""
    documents: int
    tokens: int
    bytes: int
    """Size of the .bin file."""
    sha256: str
    """Of the .bin file."""
    index_sha256: str
    """Of the .idx file."""

    def damage(self, folder: Path, whole: bool) -> str:
        """What is wrong with the files, in words that follow a file's name; empty where nothing is.

        whole: read them and compare the checksums, too.
        """
        sizes = {".bin": self.bytes, ".idx": (self.documents + 1) * INDEX_TYPE.itemsize}
        for suffix, size in sizes.items():
            file = folder / f"{self.name}{suffix}"
            if not file.is_file():
                return f"{file} is missing"
            if file.stat().st_size != size:
                return f"{file} has {file.stat().st_size} bytes, but its manifest says {size}"
            if whole and checksum(file) != (self.sha256 if suffix == ".bin" else self.index_sha256):
                return f"{file} is not what was written (its checksum differs)"
        return ""


@dataclass(frozen=True)
class Manifest:
    """What a folder of shards was made of, and what it holds."""

    format: int
    source: str
    text_field: str
    seed: int
    limit: int | None
    """Documents asked for; None: all of them."""
    shard_tokens: int
    """A shard ends with the document that brings it to so many tokens."""
    tokenizer_sha256: str
    """Of tokenizer.json."""
    trained_vocab_size: int | None
    """The size that was asked for, where the tokenizer was trained on the documents."""
    vocab_size: int
    eos_id: int
    dtype: str
    finished: bool
    """Whether all documents are there."""
    shards: tuple[Shard, ...]

    @property
    def num_documents(self) -> int:
        """Documents of all shards."""
        return sum(shard.documents for shard in self.shards)

    @property
    def num_tokens(self) -> int:
        """Tokens of all shards, end-of-text tokens included."""
        return sum(shard.tokens for shard in self.shards)

    def write(self, folder: Path) -> None:
        """Write `folder/manifest.json`; a reader (or a crash) never sees half of it."""
        write_text(folder / MANIFEST, json.dumps(dataclasses.asdict(self), indent=2) + "\n")

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Read `folder/manifest.json`.

        Raises FileNotFoundError where there is none, and UserError, naming file and key, for one of another kind.
        """
        file = folder / MANIFEST
        if not file.is_file():
            raise FileNotFoundError(
                f"no {MANIFEST} in {folder}: write one with `opencola tokenize SOURCE --to {folder}`"
            )
        try:
            values = json.loads(file.read_text(encoding="utf-8-sig"))
        except ValueError as error:
            raise UserError(f"{file}: not JSON: {error}") from error
        manifest = _filled(cls, values, file)
        if not isinstance(manifest.shards, list):
            raise UserError(f"{file}: 'shards' must be a list")
        manifest = dataclasses.replace(manifest, shards=tuple(_filled(Shard, shard, file) for shard in manifest.shards))
        if manifest.format != FORMAT:
            raise UserError(f"{file}: format {manifest.format}, but this version of opencola reads format {FORMAT}")
        if manifest.dtype not in ("uint16", "uint32"):
            raise UserError(f"{file}: dtype must be uint16 or uint32, but is {manifest.dtype!r}")
        return manifest

    @property
    def token_type(self) -> np.dtype[Any]:
        """The type of the ids in the .bin files."""
        return np.dtype(self.dtype).newbyteorder("<")


class ShardDocuments:
    """The documents of a folder of shards; an epoch is a permutation of all of them."""

    def __init__(self, folder: Path, seed: int, tokenizer: Tokenizer, verify: slice = slice(None)) -> None:
        """Map the shards. verify: which of them to read whole and compare with their checksums.

        Raises FileNotFoundError without a manifest; UserError, naming the file, for one that cannot be read, for
        shards that are unfinished, missing, of another size or (of those to verify) altered, and for a tokenizer other
        than theirs.
        """
        check_seed(seed)
        manifest = Manifest.read(folder)
        own = load_tokenizer(folder, manifest)
        if tokenizer.fingerprint != own.fingerprint:
            raise UserError(
                f"the shards in {folder} were written with {folder / FILE_NAME} ({own.vocab_size} ids), but the run's "
                f"tokenizer is another one ({tokenizer.vocab_size} ids, from tokenizer.path, init or training): set "
                f"tokenizer.path to {folder}, or tokenise the text anew with the run's tokenizer"
            )
        if not manifest.finished:
            raise UserError(f"{folder} is not finished ({manifest.num_tokens} tokens so far): {AGAIN}")
        checked = {shard.name for shard in manifest.shards[verify]}
        for shard in manifest.shards:
            if damage := shard.damage(folder, whole=shard.name in checked):
                raise UserError(f"{damage}: {AGAIN}")
        # np.memmap's own slicing is slow; as a plain array it stays mapped.
        self._tokens = [
            np.asarray(np.memmap(folder / f"{shard.name}.bin", manifest.token_type, "r")) for shard in manifest.shards
        ]
        self._starts = [
            np.asarray(np.memmap(folder / f"{shard.name}.idx", INDEX_TYPE, "r")) for shard in manifest.shards
        ]
        for shard, starts in zip(manifest.shards, self._starts, strict=True):
            if (starts[0], starts[-1]) != (0, shard.tokens):
                raise UserError(f"{folder / shard.name}.idx does not fit its shard: {AGAIN}")
        self._first = [0, *itertools.accumulate(shard.documents for shard in manifest.shards)]
        self.num_documents: int | None = manifest.num_documents
        self._order = Shuffled(manifest.num_documents, seed)

    def stream(self, epoch: int = 0, index: int = 0, part: int = 0, parts: int = 1) -> Iterator[Tokens]:
        """Endless documents of a part, from a position on (see `opencola.data.sources`)."""
        for at, place, number in self._order.stream(epoch, index, part, parts):
            yield Tokens(at, place, self.document(number))

    def document(self, number: int) -> np.ndarray:
        """Token ids of a document, the end-of-text id last: a view of the file."""
        shard = bisect.bisect_right(self._first, number) - 1
        starts, within = self._starts[shard], number - self._first[shard]
        return self._tokens[shard][int(starts[within]) : int(starts[within + 1])]


def folder_of(source: str) -> Path | None:
    """The folder of shards that a source names (`shards:FOLDER`, or a folder with a manifest), or None."""
    if source.startswith(PREFIX):
        return home(source.removeprefix(PREFIX))
    if source.startswith("hf:"):
        return None
    return folder if ((folder := home(source)) / MANIFEST).is_file() else None


def load_tokenizer(folder: Path, manifest: Manifest) -> Tokenizer:
    """The tokenizer that wrote a folder's shards. Raises FileNotFoundError, and UserError where it was altered."""
    tokenizer = Tokenizer.load(folder)
    if checksum(folder / FILE_NAME) != manifest.tokenizer_sha256:
        raise UserError(
            f"{folder / FILE_NAME} is not the tokenizer that wrote the shards (its checksum differs): put the right "
            "one back, or tokenise into another folder"
        )
    return tokenizer


def checksum(file: Path) -> str:
    """SHA-256 of a file."""
    with file.open("rb") as data:
        return hashlib.file_digest(data, "sha256").hexdigest()


def _filled(target: Any, values: Any, file: Path) -> Any:
    """A dataclass from JSON values, whose keys must be there; others are passed over."""
    if not isinstance(values, dict):
        raise UserError(f"{file}: not a manifest of tokenised shards: expected an object, found {values!r:.40}")
    names = [field.name for field in dataclasses.fields(target)]
    for name in names:
        if name not in values:
            raise UserError(f"{file}: not a manifest of tokenised shards: the key {name!r} is missing")
    return target(**{name: values[name] for name in names})
