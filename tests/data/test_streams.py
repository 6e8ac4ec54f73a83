"""A corpus read by several ranks, from several streams: against a naive reading, and across stops."""

import itertools
import json
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from opencola.data import corpus as corpus_module
from opencola.data import sources
from opencola.data.batch import Batch
from opencola.data.corpus import Corpus, CorpusConfig, merge_states
from opencola.data.packing import Tokens
from opencola.data.shard_writer import Order, tokenise
from opencola.data.sources import documents, one_pass
from opencola.text.tokenizer import Tokenizer

TOKENIZER = Tokenizer.train([], 258)
TEXTS = [f"document {i} " + "x" * (7 * i % 23) for i in range(23)]
LENGTH, SEED = 16, 5
Make = Callable[..., Corpus]


@pytest.fixture(params=["list", "stories", "shards", "hub", "hub of few files"])
def make(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Corpora of every kind of source, with windows and texts so small that all boundaries are met."""
    monkeypatch.setattr(corpus_module, "READ_AHEAD", 300)
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    source = str(file)
    match request.param:
        case "stories":
            source = "stories"
        case "shards":
            source = str(tmp_path / "shards")
            TOKENIZER.save(tmp_path / "tokenizer.json")
            order = Order(str(file), tokenizer=tmp_path / "tokenizer.json", shard_tokens=150)
            assert [*tokenise(order, Path(source))][-1].shards > 2
        case "hub" | "hub of few files":
            source = "hf:x"
            install_hub(monkeypatch, Rows(TEXTS, 4 if request.param == "hub" else 1))

    def corpus(rank: int = 0, num_ranks: int = 1, **fields: Any) -> Corpus:
        fields = {"length": LENGTH, "batch_size": 12} | fields
        return Corpus(CorpusConfig(source=source, **fields), TOKENIZER, SEED, rank, num_ranks)

    return corpus


class Rows:
    """What `datasets.load_dataset(..., streaming=True)` gives, as far as we use it."""

    def __init__(self, texts: list[str], num_shards: int) -> None:
        self.texts = texts
        self.num_shards = num_shards

    def __iter__(self) -> Iterator[dict[str, str]]:
        return ({"text": text} for text in self.texts)

    def skip(self, count: int) -> "Rows":
        return Rows(self.texts[count:], self.num_shards)

    def shard(self, num_shards: int, index: int) -> "Rows":
        assert num_shards <= self.num_shards
        first, end = (len(self.texts) * i // num_shards for i in (index, index + 1))
        return Rows(self.texts[first:end], 1)


def install_hub(monkeypatch: pytest.MonkeyPatch, rows: Rows) -> None:
    module = types.ModuleType("datasets")
    module.load_dataset = lambda *_, **__: rows  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    monkeypatch.setattr(sources, "HUB_WINDOW", 5)


def interleaved(ranks: list[Corpus], steps: int) -> list[Batch]:
    """What several ranks serve, as one process would: row j from rank j % len(ranks)."""
    batches = []
    for parts in itertools.islice(zip(*ranks, strict=True), steps):
        stacked = [torch.stack([getattr(p, name) for p in parts], 1).flatten(0, 1) for name in ("tokens", "ids")]
        assert len({(part.seed, part.step) for part in parts}) == 1
        batches.append(Batch(*stacked, parts[0].seed, parts[0].step))
    return batches


def equal(left: list[Batch], right: list[Batch]) -> bool:
    def values(batches: list[Batch]) -> list[Any]:
        return [(b.tokens.tolist(), b.ids.tolist(), b.seed, b.step) for b in batches]

    return values(left) == values(right)


@pytest.mark.parametrize("packing", ["contiguous", "aligned"])
@pytest.mark.parametrize("streams", [1, 3, 4])
def test_sequences_come_from_the_streams_in_turn(tmp_path: Path, streams: int, packing: str) -> None:
    """Naively: each epoch's order is dealt like cards, and each hand, joined over the epochs, is cut on its own."""
    (tmp_path / "a.txt").write_text("\f".join(TEXTS))
    config = CorpusConfig(source=str(tmp_path), length=LENGTH, batch_size=5, streams=streams, packing=packing)  # type: ignore[arg-type]
    served = torch.cat([b.tokens for b in itertools.islice(Corpus(config, TOKENIZER, SEED), 24)]).tolist()
    hands: list[list[list[int]]] = [[] for _ in range(streams)]
    for epoch in range(9):
        order = np.random.default_rng([SEED, epoch]).permutation(len(TEXTS))
        for place, number in enumerate(order):
            hands[place % streams].append([*TOKENIZER.encode(TEXTS[number]), TOKENIZER.eos_id])
    cut = [naive_cut(hand, packing) for hand in hands]
    assert served == [cut[n % streams][n // streams] for n in range(120)]


def naive_cut(hand: list[list[int]], packing: str) -> list[list[int]]:
    if packing == "contiguous":
        tokens = [*itertools.chain.from_iterable(hand)]
        return [tokens[start : start + LENGTH] for start in range(0, len(tokens), LENGTH)]
    rows: list[list[int]] = [[]]
    for document in hand:
        if len(rows[-1]) >= LENGTH:
            rows.append([])
        rows[-1] += document
    return [row[:LENGTH] for row in rows]


@pytest.mark.parametrize("streams", [1, 2, 4])
def test_every_document_is_seen_once_an_epoch(make: Make, streams: int) -> None:
    """By all streams together; the story world's only epoch never ends."""
    opened = make()._documents
    hands = [[*itertools.islice(opened.stream(0, 0, part, streams), 60)] for part in range(streams)]
    for hand in hands:
        assert [d.index for d in hand if d.epoch == 0] == [*range(sum(d.epoch == 0 for d in hand))]
        assert [d.epoch for d in hand] == sorted(d.epoch for d in hand)
    if hands[0][-1].epoch == 0:
        texts = [text_of(hands[n % streams][n // streams]) for n in range(60)]
        assert texts == [*itertools.islice(one_pass("stories", SEED), 60)]
        return
    for epoch in (0, 1):
        assert sorted(text_of(d) for hand in hands for d in hand if d.epoch == epoch) == sorted(TEXTS)


def text_of(document: Tokens) -> str:
    assert document.ids[-1] == TOKENIZER.eos_id
    return TOKENIZER.decode(document.ids.tolist())


@pytest.mark.parametrize("packing", ["contiguous", "aligned"])
@pytest.mark.parametrize(("num_ranks", "streams"), [(2, 1), (3, 1), (2, 2), (2, 4), (4, 2), (3, 2), (3, 4), (4, 6)])
def test_ranks_serve_the_rows_of_one_process(make: Make, num_ranks: int, streams: int, packing: str) -> None:
    fields = {"streams": streams, "packing": packing}
    whole = [*itertools.islice(make(**fields), 10)]
    ranks = [make(rank, num_ranks, **fields) for rank in range(num_ranks)]
    assert equal(interleaved(ranks, 10), whole)
    for rank, part in enumerate(next(ranks[rank]) for rank in range(num_ranks)):
        assert part.ids.tolist() == [*range(120 + rank, 132, num_ranks)]
    masked = next(make(1, num_ranks, mask_documents=True, **fields)).documents
    expected = next(make(mask_documents=True, **fields)).shard(1, num_ranks).documents
    assert masked is not None and expected is not None and torch.equal(masked, expected)


@pytest.mark.parametrize("streams", [1, 4])
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
def test_a_run_goes_on_with_any_number_of_ranks(make: Make, streams: int, num_ranks: int) -> None:
    running = make(streams=streams)
    batches = [next(running) for _ in range(9)]
    for stop in (0, 1, 4, 6):
        ranks = [make(rank, num_ranks, streams=streams) for rank in range(num_ranks)]
        for rank in ranks:
            list(itertools.islice(rank, stop))
        state = json.loads(json.dumps(merge_states([rank.state_dict() for rank in ranks])))
        alone = make(streams=streams)
        list(itertools.islice(alone, stop))
        assert list(state["streams"]) == [str(stream) for stream in range(streams)]
        assert json.dumps(state) == json.dumps(json.loads(json.dumps(merge_states([alone.state_dict()]))))
        for others in (1, 2, 3, 4):
            resumed = [make(rank, others, streams=streams) for rank in range(others)]
            for corpus in resumed:
                next(corpus)  # where it stood before must not matter
                corpus.load_state_dict(state)
            assert merge_states([corpus.state_dict() for corpus in resumed]) == state
            assert equal(interleaved(resumed, 3), batches[stop : stop + 3])


def test_resuming_with_another_batch_size_shifts_which_streams_a_rank_reads(make: Make) -> None:
    running = make(streams=4, batch_size=1)
    rows = torch.cat([next(running).tokens for _ in range(29)])
    for stop in (1, 2, 5):
        start = make(streams=4, batch_size=stop)
        next(start)
        resumed = [make(rank, 2, streams=4, batch_size=8) for rank in range(2)]
        for corpus in resumed:
            corpus.load_state_dict(start.state_dict())
        (first, second, third) = interleaved(resumed, 3)
        assert torch.equal(torch.cat([first.tokens, second.tokens, third.tokens]), rows[stop : stop + 24])
        assert first.ids.tolist() == [*range(stop, stop + 8)]


def test_a_rank_tokenises_only_the_documents_of_its_streams(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("\f".join(TEXTS))
    monkeypatch.setattr(corpus_module, "READ_AHEAD", 1)
    seen: list[str] = []
    encode = Tokenizer.encode_batch
    monkeypatch.setattr(Tokenizer, "encode_batch", lambda self, texts: seen.extend(texts) or encode(self, texts))
    read = []
    for rank in range(4):
        seen.clear()
        config = CorpusConfig(source=str(tmp_path), length=LENGTH, batch_size=4, streams=8)
        for batch in Corpus(config, TOKENIZER, SEED, rank, 4):
            if batch.step == 4:  # well within the first epoch
                break
        read.append({*seen})
    assert all(read) and not any(a & b for a, b in itertools.combinations(read, 2))


def test_what_does_not_divide_is_refused(make: Make) -> None:
    with pytest.raises(ValueError, match="data.batch_size 12 cannot be divided among 5 processes"):
        make(0, 5)


def test_more_streams_than_documents_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus_module, "READ_AHEAD", 300)
    (tmp_path / "a.txt").write_text("a\fb")
    with pytest.raises(ValueError, match="data.streams is 3, but there are 2 documents"):
        Corpus(CorpusConfig(source=str(tmp_path), length=4, batch_size=1, streams=3), TOKENIZER, 0)
    with pytest.raises(ValueError, match="2 documents are too few for 3 streams"):
        next(documents(str(tmp_path), 0).stream(0, 0, 2, 3))
    install_hub(monkeypatch, Rows(["a", "b"], 1))
    with pytest.raises(ValueError, match="no documents in hf:x for stream 2 of 3: lower data.streams"):
        list(itertools.islice(Corpus(CorpusConfig(source="hf:x", length=4, batch_size=1, streams=3), TOKENIZER, 0), 3))


def test_states_that_do_not_belong_together_are_refused(make: Make) -> None:
    two = [make(rank, 2, streams=2) for rank in range(2)]
    alone = two[0].state_dict()
    with pytest.raises(ValueError, match="the state has no stream 1; merge the ranks' states"):
        make(streams=2).load_state_dict(alone)
    next(two[0])
    with pytest.raises(ValueError, match="the corpus of rank 1 does not stand where that of rank 0 does"):
        merge_states([corpus.state_dict() for corpus in two])


def test_a_part_of_a_dataset_reads_its_own_files(monkeypatch: pytest.MonkeyPatch) -> None:
    install_hub(monkeypatch, Rows(TEXTS, 4))
    for part in range(2):
        own = [d.text for d in itertools.islice(documents("hf:x", 1).stream(0, 0, part, 2), 11)]
        assert {*own} <= {*(TEXTS[:11], TEXTS[11:])[part]}


@pytest.mark.parametrize("streams", [1, 2, 4, 8])
def test_a_real_dataset_of_four_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streams: int) -> None:
    pytest.importorskip("datasets")
    monkeypatch.setattr(sources, "HUB_WINDOW", 20)
    monkeypatch.setattr(corpus_module, "READ_AHEAD", 300)
    for number in range(4):
        lines = [json.dumps({"text": f"file {number} row {row}"}) for row in range(50)]
        (tmp_path / f"{number}.jsonl").write_text("\n".join(lines))
    config = CorpusConfig(source=f"hf:{tmp_path}", length=LENGTH, batch_size=4, streams=streams)
    whole, two = Corpus(config, TOKENIZER, 0), [Corpus(config, TOKENIZER, 0, rank, 2) for rank in range(2)]
    assert equal(interleaved(two, 12), [*itertools.islice(whole, 12)])
    assert merge_states([corpus.state_dict() for corpus in two]) == whole.state_dict()
    opened = documents(config.source, 0)
    epochs = [opened.stream(0, 0, part, streams) for part in range(streams)]
    hands = [[d.text for d in itertools.takewhile(lambda d: d.epoch == 0, epoch)] for epoch in epochs]
    assert sorted(itertools.chain.from_iterable(hands)) == sorted(opened.one_pass())
    if streams in (2, 4):  # a part has files of its own
        assert [len({text[:6] for text in hand}) for hand in hands] == [4 // streams] * streams
