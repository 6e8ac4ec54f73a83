"""Corpus: exact packing, the same sequences whatever the batch size, and resuming that equals not stopping."""

import itertools
import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from opencola.data import corpus as corpus_module
from opencola.data.batch import Batch
from opencola.data.corpus import Corpus, CorpusConfig
from opencola.data.sources import documents
from opencola.text.tokenizer import Tokenizer

TOKENIZER = Tokenizer.train([], 258)  # one token a byte, so that lengths can be read off the text
TEXTS = [f"document {i} " + "x" * (7 * i % 23) for i in range(23)]


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture(autouse=True)
def short_read_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus_module, "READ_AHEAD", 300)


@pytest.fixture
def source(tmp_path: Path) -> str:
    return str(write_jsonl(tmp_path / "texts.jsonl", TEXTS))


def corpus(source: str, seed: int = 0, **fields: Any) -> Corpus:
    return Corpus(CorpusConfig(source=source, **({"length": 16, "batch_size": 3} | fields)), TOKENIZER, seed)


def take(items: Iterable[Any], count: int) -> list[Any]:
    return list(itertools.islice(items, count))


def same(left: Batch, right: Batch) -> bool:
    tensors = torch.equal(left.tokens, right.tokens) and torch.equal(left.ids, right.ids)
    return tensors and (left.seed, left.step) == (right.seed, right.step)


def test_contiguous_is_the_naive_concatenation_cut_at_length(source: str) -> None:
    batches = take(corpus(source, seed=5), 40)
    stream: list[int] = []
    for document in take(documents(source, 5).stream(), 200):
        stream += [*TOKENIZER.encode(document.text), TOKENIZER.eos_id]
    served = torch.cat([batch.tokens for batch in batches])
    assert served.shape == (120, 16) and served.dtype == torch.int64
    assert served.flatten().tolist() == stream[: 120 * 16]


@pytest.mark.parametrize("length", [1, 5, 24, 100])
def test_aligned_starts_every_sequence_with_a_document(source: str, length: int) -> None:
    """Naively: take documents until the sequence is full, drop what is left of the last, start the next with a new one.

    The lengths lie below, among and above those of the documents.
    """
    batches = take(corpus(source, seed=5, packing="aligned", length=length), 20)
    stream = documents(source, 5).stream()
    for row in torch.cat([batch.tokens for batch in batches]).tolist():
        expected: list[int] = []
        while len(expected) < length:
            expected += [*TOKENIZER.encode(next(stream).text), TOKENIZER.eos_id]
        assert row == expected[:length]


@pytest.mark.parametrize("packing", ["contiguous", "aligned"])
def test_documents_of_a_row_are_numbered_by_the_ends_in_it(source: str, packing: str) -> None:
    plain, masked = (corpus(source, packing=packing, length=40, mask_documents=mask) for mask in (False, True))
    numbers = set()
    for batch, with_documents in zip(take(plain, 20), take(masked, 20), strict=True):
        assert same(batch, with_documents) and batch.documents is None
        assert with_documents.documents is not None and with_documents.documents.dtype == torch.int64
        for row, found in zip(batch.tokens.tolist(), with_documents.documents.tolist(), strict=True):
            assert found == [row[:place].count(TOKENIZER.eos_id) for place in range(40)]
            numbers |= {*found}
    assert numbers >= {0, 1, 2}


def test_batches_count_steps_and_sequences(source: str) -> None:
    for step, batch in enumerate(take(corpus(source, seed=7), 5)):
        assert (batch.seed, batch.step) == (7, step)
        assert batch.ids.tolist() == [3 * step, 3 * step + 1, 3 * step + 2] and batch.ids.dtype == torch.int64


@pytest.mark.parametrize("packing", ["contiguous", "aligned"])
def test_sequences_do_not_depend_on_the_batch_size(source: str, packing: str) -> None:
    served = {
        size: torch.cat([b.tokens for b in take(corpus(source, batch_size=size, packing=packing), 60 // size)])
        for size in (1, 4, 15)
    }
    assert torch.equal(served[1], served[4]) and torch.equal(served[1], served[15])


@pytest.mark.parametrize("ahead", [1, 5000])
def test_sequences_do_not_depend_on_how_far_the_tokenizer_reads_ahead(source: str, monkeypatch, ahead: int) -> None:
    batches = take(corpus(source), 30)
    monkeypatch.setattr(corpus_module, "READ_AHEAD", ahead)
    assert all(itertools.starmap(same, zip(batches, take(corpus(source), 30), strict=True)))


def test_stories_are_served_in_the_order_of_their_numbers() -> None:
    from opencola.worlds.stories import story

    (batch,) = take(corpus("stories", seed=3, length=600, batch_size=1), 1)
    text = "<|endoftext|>".join(story(3, index).text for index in range(20))
    pieces = "".join(TOKENIZER.decode([id_]) or "<|endoftext|>" for id_ in batch.tokens[0].tolist())
    assert pieces == text[: len(pieces)] and len(pieces) > 600


def test_shards_of_a_batch_are_its_rows_each_once(source: str) -> None:
    batch = replace(next(corpus(source, batch_size=6)), scored=torch.rand(6, 16) > 0.5)
    shards = [batch.shard(rank, 3) for rank in range(3)]
    assert [shard.ids.tolist() for shard in shards] == [batch.ids[[r, r + 3]].tolist() for r in range(3)]
    for rank, shard in enumerate(shards):
        rows = [rank, rank + 3]
        assert torch.equal(shard.tokens, batch.tokens[rows]) and shard.documents is None
        assert shard.scored is not None and torch.equal(shard.scored, batch.scored[rows])
        assert (shard.seed, shard.step) == (batch.seed, batch.step)
    with pytest.raises(ValueError, match="6 sequences cannot be divided among 4 processes"):
        batch.shard(0, 4)


def test_batch_moves_between_devices(source: str) -> None:
    batch = next(corpus(source))
    moved = batch.to("meta")
    assert (moved.tokens.device.type, moved.ids.device.type, moved.step) == ("meta", "meta", batch.step)
    assert batch.tokens.device.type == "cpu"


@pytest.mark.parametrize(
    "fields", [{"length": 0}, {"batch_size": 0}, {"length": -4}, {"packing": "loose"}, {"streams": 0}]
)
def test_impossible_configs_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"(length|batch_size|streams) must be at least 1, but is|packing must be"):
        CorpusConfig(**({"length": 8, "batch_size": 2} | fields))


def test_negative_seed_is_refused(source: str) -> None:
    with pytest.raises(ValueError, match="seed must not be negative, but is -1"):
        corpus(source, seed=-1)


@pytest.mark.parametrize("packing", ["contiguous", "aligned"])
def test_resuming_equals_not_stopping(source: str, packing: str) -> None:
    """At every step of several epochs: an epoch has some 550 tokens, a batch 48."""
    running = corpus(source, packing=packing)
    saved, batches = [], []
    for _ in range(50):
        saved.append(json.loads(json.dumps(running.state_dict())))
        batches.append(next(running))
    assert saved[-1]["streams"]["0"]["epoch"] >= 3
    assert {state["streams"]["0"]["offset"] for state in saved} - {0} or packing == "aligned"
    for step, state in enumerate(saved[:-3]):
        resumed = corpus(source, packing=packing)
        take(resumed, step % 4)  # where it stood before must not matter
        resumed.load_state_dict(state)
        assert resumed.state_dict() == state
        assert all(itertools.starmap(same, zip(take(resumed, 3), batches[step : step + 3], strict=True)))


def test_resuming_the_stories() -> None:
    running = corpus("stories", length=100)
    take(running, 4)
    state = running.state_dict()
    resumed = corpus("stories", length=100)
    resumed.load_state_dict(state)
    assert same(next(resumed), next(running))


def test_asking_for_the_state_changes_nothing(source: str) -> None:
    asked, quiet = corpus(source), corpus(source)
    for _ in range(20):
        asked.state_dict()
        assert same(next(asked), next(quiet))


def test_resuming_with_another_batch_size_goes_on_in_the_same_sequences(source: str) -> None:
    running = corpus(source, batch_size=4)
    take(running, 5)
    resumed = corpus(source, batch_size=2)
    resumed.load_state_dict(running.state_dict())
    first, second = take(resumed, 2)
    batch = next(running)
    assert torch.equal(torch.cat([first.tokens, second.tokens]), batch.tokens)
    assert torch.equal(torch.cat([first.ids, second.ids]), batch.ids)
    assert (first.step, second.step) == (5, 6)


@pytest.mark.parametrize("changed", ["seed", "length", "packing", "streams", "source", "num_documents", "vocab_size"])
def test_the_state_of_another_corpus_is_refused(tmp_path: Path, source: str, changed: str) -> None:
    state = corpus(source).state_dict()
    other = str(write_jsonl(tmp_path / "other.jsonl", TEXTS))
    if changed == "num_documents":
        write_jsonl(Path(source), [*TEXTS, "one more"])
    tokenizer = Tokenizer.train(["abab"] * 9, 259) if changed == "vocab_size" else TOKENIZER
    fields: dict[str, Any] = {"length": {"length": 8}, "packing": {"packing": "aligned"}, "source": {"source": other}}
    fields |= {"streams": {"streams": 2}}
    config = replace(CorpusConfig(source=source, length=16, batch_size=3), **fields.get(changed, {}))
    with pytest.raises(ValueError, match=f"cannot resume the corpus: {changed} was .*, but is"):
        Corpus(config, tokenizer, seed=int(changed == "seed")).load_state_dict(state)


def test_a_position_inside_a_document_that_has_become_shorter_is_refused(source: str) -> None:
    running = corpus(source)
    while (state := running.state_dict())["streams"]["0"]["offset"] < 5:
        next(running)
    write_jsonl(Path(source), ["abc"] * len(TEXTS))
    with pytest.raises(ValueError, match="is not what it was when it was saved"):
        corpus(source).load_state_dict(state)
