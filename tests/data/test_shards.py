"""Tokenised shards: the same batches as from the text, and one clear line for everything that is damaged."""

import itertools
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch

from opencola.data.corpus import Corpus, CorpusConfig
from opencola.data.shard_writer import Order, tokenise
from opencola.data.shards import Manifest, ShardDocuments, folder_of
from opencola.text.tokenizer import Tokenizer

TEXTS = [f"document {i} " + "x" * (7 * i % 23) for i in range(50)]
TOKENIZER = Tokenizer.train(TEXTS, 300)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Several shards of a .jsonl file beside them."""
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    order = Order(str(tmp_path / "texts.jsonl"), tokenizer=TOKENIZER.save(tmp_path), shard_tokens=60)
    assert [*tokenise(order, tmp_path / "shards")][-1].shards > 3
    return tmp_path / "shards"


def corpus(source: str | Path, tokenizer: Tokenizer = TOKENIZER, **fields: Any) -> Corpus:
    return Corpus(CorpusConfig(source=str(source), **({"length": 16, "batch_size": 3} | fields)), tokenizer, 5)


@pytest.mark.parametrize("packing", ["contiguous", "aligned"])
@pytest.mark.parametrize("prefix", ["", "shards:"])
def test_shards_give_the_batches_of_their_text(folder: Path, packing: str, prefix: str) -> None:
    fields = {"packing": packing, "streams": 2, "mask_documents": True}
    text, shards = corpus(folder.parent / "texts.jsonl", **fields), corpus(f"{prefix}{folder}", **fields)
    for ours, theirs in itertools.islice(zip(shards, text, strict=True), 60):
        assert torch.equal(ours.tokens, theirs.tokens) and torch.equal(ours.ids, theirs.ids)
        assert ours.documents is not None and theirs.documents is not None
        assert torch.equal(ours.documents, theirs.documents)
    ours, theirs = shards.state_dict(), text.state_dict()
    assert ours["streams"] == theirs["streams"] and ours["num_sequences"] == theirs["num_sequences"]


def test_the_files_are_what_their_description_says(folder: Path) -> None:
    """Read back with nothing but numpy and json."""
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["dtype"] == "uint16" and manifest["eos_id"] == TOKENIZER.eos_id and manifest["finished"]
    assert (manifest["vocab_size"], manifest["text_field"], manifest["limit"]) == (TOKENIZER.vocab_size, "text", None)
    texts, totals = [], 0
    for shard in manifest["shards"]:
        ids = np.fromfile(folder / f"{shard['name']}.bin", "<u2")
        starts = np.fromfile(folder / f"{shard['name']}.idx", "<u8").tolist()
        assert (len(ids), len(starts) - 1, ids.nbytes) == (shard["tokens"], shard["documents"], shard["bytes"])
        documents = [ids[a:b].tolist() for a, b in itertools.pairwise(starts)]
        assert all(document[-1] == TOKENIZER.eos_id for document in documents)
        assert len(ids) >= 60 > len(ids) - len(documents[-1]) or shard is manifest["shards"][-1]
        texts += [TOKENIZER.decode(document) for document in documents]
        totals += len(ids)
    assert texts == TEXTS and totals == Manifest.read(folder).num_tokens


def test_tokens_stay_in_the_file(folder: Path) -> None:
    documents = ShardDocuments(folder, 0, TOKENIZER)
    document = documents.document(30)
    assert document.dtype == np.uint16 and not document.flags.owndata and not document.flags.writeable
    assert [TOKENIZER.decode(documents.document(n)[:-1].tolist()) for n in range(50)] == TEXTS


def rewrite(file: Path, change: Callable[[bytearray], Any]) -> None:
    data = bytearray(file.read_bytes())
    change(data)
    file.write_bytes(data)


def flip(place: int) -> Callable[[bytearray], Any]:
    def change(data: bytearray) -> None:
        data[place] ^= 0x10

    return change


def cut(data: bytearray) -> None:
    del data[-2:]


AGAIN = r": run `opencola tokenize` again"
ALTERED = r"is not what was written \(its checksum differs\)" + AGAIN
DAMAGE: list[tuple[str, Callable[[Path], Any], str]] = [
    ("shard-00001.bin", lambda file: rewrite(file, cut), r"has \d+ bytes, but its manifest says \d+" + AGAIN),
    ("shard-00001.idx", lambda file: rewrite(file, cut), r"has \d+ bytes, but its manifest says \d+" + AGAIN),
    ("shard-00002.bin", Path.unlink, r"is missing" + AGAIN),
    ("shard-00000.idx", Path.unlink, r"is missing" + AGAIN),
    ("shard-00002.bin", lambda file: rewrite(file, flip(7)), ALTERED),
    ("shard-00003.idx", lambda file: rewrite(file, flip(8)), ALTERED),
    ("tokenizer.json", Tokenizer.train([], 258).save, r"is not the tokenizer that wrote the shards .*: put"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "harm", "message"), DAMAGE)
def test_damage_is_named_before_anything_is_read(
    folder: Path, name: str, harm: Callable[[Path], Any], message: str
) -> None:
    harm(folder / name)
    tokenizer = Tokenizer.load(folder)
    with pytest.raises(ValueError, match=rf"^{re.escape(str(folder / name))} {message}") as caught:
        corpus(folder, tokenizer)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["shard-00001.bin", "shard-00001.idx"])
def test_sizes_are_compared_even_without_checksums(folder: Path, name: str) -> None:
    rewrite(folder / name, cut)
    with pytest.raises(ValueError, match=f"{name} has .* bytes"):
        corpus(folder, verify=False)


def test_without_checksums_an_altered_shard_shows_where_it_cannot_be(folder: Path) -> None:
    rewrite(folder / "shard-00001.bin", lambda data: data.__setitem__(slice(0, 40), b"\xff" * 40))
    altered = corpus(folder, verify=False)
    with pytest.raises(ValueError, match=r"shards holds token 65535, but the tokenizer has 300: .* data.verify"):
        list(itertools.islice(altered, 100))
    rewrite(folder / "shard-00001.idx", flip(-8))
    with pytest.raises(ValueError, match=r"shard-00001.idx does not fit its shard" + AGAIN):
        corpus(folder, verify=False)


def test_ranks_share_the_checking(folder: Path) -> None:
    rewrite(folder / "shard-00001.bin", flip(3))
    config = CorpusConfig(source=str(folder), length=16, batch_size=4)
    Corpus(config, TOKENIZER, 0, 0, 2)
    with pytest.raises(ValueError, match="shard-00001.bin is not what was written"):
        Corpus(config, TOKENIZER, 0, 1, 2)


@pytest.mark.parametrize("key", ["format", "dtype", "shards", "finished", "tokenizer_sha256"])
def test_a_manifest_without_a_key(folder: Path, key: str) -> None:
    values = json.loads((folder / "manifest.json").read_text())
    del values[key]
    (folder / "manifest.json").write_text(json.dumps(values))
    with pytest.raises(
        ValueError, match=rf"manifest.json: not a manifest of tokenised shards: the key '{key}' is missing"
    ):
        corpus(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda values: values["shards"][1].pop("sha256"), "the key 'sha256' is missing"),
        (lambda values: values.update(format=2), "format 2, but this version of opencola reads format 1"),
        (lambda values: values.update(dtype="int8"), "dtype must be uint16 or uint32, but is 'int8'"),
        (lambda values: values.update(shards={}), "'shards' must be a list"),
        (lambda values: values.update(shards=[3]), "expected an object, found 3"),
        (lambda values: values.update(finished=False), r"is not finished \(\d+ tokens so far\)" + AGAIN),
    ],
)
def test_a_manifest_of_another_kind(folder: Path, change: Callable[[Any], Any], message: str) -> None:
    values = json.loads((folder / "manifest.json").read_text())
    change(values)
    (folder / "manifest.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=message):
        corpus(folder)


def test_a_manifest_that_is_cut_off_or_not_there(folder: Path) -> None:
    rewrite(folder / "manifest.json", cut)
    with pytest.raises(ValueError, match="manifest.json: not JSON"):
        corpus(folder)
    (folder / "manifest.json").unlink()
    with pytest.raises(FileNotFoundError, match="no manifest.json in .*shards: write one with `opencola tokenize"):
        corpus(f"shards:{folder}")
    assert folder_of(str(folder)) is None


def test_another_tokenizer_of_the_same_size_is_refused(folder: Path, tmp_path: Path) -> None:
    other = Tokenizer.train(["quite other words, of which merges are learnt: yonder zebras quiz"] * 3, 300)
    assert other.vocab_size == TOKENIZER.vocab_size
    with pytest.raises(ValueError, match=rf"{folder} were written with {folder}/tokenizer.json .* another one"):
        corpus(folder, other)
    # the same tokenizer in a file of another layout is the same
    (tmp_path / "compact.json").write_text(json.dumps(json.loads((folder / "tokenizer.json").read_text())))
    next(corpus(folder, Tokenizer.load(tmp_path / "compact.json")))


def test_large_vocabularies_take_four_bytes(tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"one": 3, "far": 70_000, "?": 1}, unk_token="?"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.add_special_tokens(["</s>"])
    tokenizer = Tokenizer(backend)
    tokenizer.save(tmp_path)
    (tmp_path / "a.txt").write_text("one far one\fone")
    list(tokenise(Order(str(tmp_path / "a.txt"), tokenizer=tmp_path), tmp_path / "shards"))
    manifest = Manifest.read(tmp_path / "shards")
    assert (manifest.dtype, manifest.shards[0].bytes) == ("uint32", 4 * manifest.num_tokens)
    document = ShardDocuments(tmp_path / "shards", 0, tokenizer).document(0)
    assert document.tolist() == [3, 70_000, 3, tokenizer.eos_id]


def test_a_moved_folder_reads_the_same(folder: Path) -> None:
    first = next(corpus(folder)).tokens
    shutil.move(folder, folder.parent / "elsewhere")
    assert torch.equal(next(corpus(folder.parent / "elsewhere")).tokens, first)
