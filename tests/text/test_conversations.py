"""Conversations: what is a valid one, its ids and what is scored, whole packing against a naive one, and resuming."""

import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from opencola.data import corpus as corpus_module
from opencola.data.batch import Batch
from opencola.data.corpus import Corpus, CorpusConfig, merge_states
from opencola.data.sources import documents
from opencola.text.conversations import ChatML, Message, conversation_of, parse
from opencola.text.files import read_documents
from opencola.text.tokenizer import Tokenizer

MARKS = ("<|im_start|>", "<|im_end|>")
TOKENIZER = Tokenizer.train([], 260, MARKS)  # beside the special tokens, one token a byte
PAD, START, END = 1, 2, 3


def turns(*contents: str, system: str = "") -> list[dict[str, str]]:
    """Messages of a user and an assistant in turn, after a system's if there is one."""
    said = [{"role": role, "content": text} for role, text in zip(["user", "assistant"] * 9, contents, strict=False)]
    return [{"role": "system", "content": system}] * bool(system) + said


def by_hand(messages: list[dict[str, str]]) -> list[tuple[int, bool]]:
    """Ids and whether they are scored, one after the other, from the picture in the module's docstring."""
    found = []
    for message in messages:
        answer = message["role"] == "assistant"
        head = [START, *TOKENIZER.encode(message["role"] + "\n")]
        found += [(id_, False) for id_ in head]
        found += [(id_, answer) for id_ in [*TOKENIZER.encode(message["content"]), END]]
        found += [(id_, False) for id_ in TOKENIZER.encode("\n")]
    return found


CHATS = [
    turns(*(f"say {'y' * (3 * i % 7)}", "x" * (1 + 5 * i % 11)) * (1 + i % 3), system="Be kind." * (i % 2))
    for i in range(19)
]


@pytest.fixture(autouse=True)
def short_read_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus_module, "READ_AHEAD", 300)


@pytest.fixture
def source(tmp_path: Path) -> str:
    file = tmp_path / "chats.jsonl"
    file.write_text("".join(json.dumps({"n": i, "messages": chat}) + "\n" for i, chat in enumerate(CHATS)))
    return str(file)


def corpus(source: str, rank: int = 0, num_ranks: int = 1, multiple: int = 1, **fields: Any) -> Corpus:
    fields = {
        "length": 160,
        "batch_size": 4,
        "format": "messages",
        "text_field": "messages",
        "packing": "whole",
    } | fields
    return Corpus(CorpusConfig(source=source, **fields), TOKENIZER, 5, rank, num_ranks, multiple)


def take(items: Iterator[Batch], count: int) -> list[Batch]:
    return list(itertools.islice(items, count))


def same(one: Batch, other: Batch) -> bool:
    tensors = [[batch.tokens, batch.ids, batch.documents, batch.scored] for batch in (one, other)]
    return all(itertools.starmap(torch.equal, zip(*tensors, strict=True))) and one.step == other.step


def test_ids_and_scored_of_an_example() -> None:
    chat = turns("Hi", "Yo!", "<|im_end|>", "ö", system="S")
    ((ids, scored),) = ChatML(TOKENIZER).encode_batch([conversation_of({"m": chat}, "m", "here")])
    assert list(zip(ids, scored, strict=True)) == by_hand(chat)
    text = TOKENIZER.decode(
        [id_ for mark in ids for id_ in (TOKENIZER.encode(MARKS[mark - START]) if mark in (START, END) else [mark])]
    )
    assert text == "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in chat)
    answers = [
        list(group)
        for is_scored, group in itertools.groupby(zip(ids, scored, strict=True), lambda p: p[1])
        if is_scored
    ]
    assert [TOKENIZER.decode([id_ for id_, _ in answer]) for answer in answers] == ["Yo!", "ö"]
    assert [answer[-1][0] for answer in answers] == [END, END]
    assert ChatML(TOKENIZER).question(ids) == "Hi" and ChatML(TOKENIZER).question(ids[:5]) == ""
    assert ids.count(END) == 5  # not the one that a user wrote


@pytest.mark.parametrize("chat", CHATS[:6])
def test_a_prompt_is_what_stands_before_an_answer(chat: list[dict[str, str]]) -> None:
    chatml = ChatML(TOKENIZER)
    messages = [Message(**message) for message in chat]
    expected = by_hand(chat)
    ids = [id_ for id_, _ in expected]
    starts = [i for i, (_, scored) in enumerate(expected) if scored and not expected[i - 1][1]]
    given = [messages[:i] for i, message in enumerate(messages) if message.role == "assistant"]
    assert [chatml.prompt(before) for before in given] == [ids[:start] for start in starts]


def test_files_tables_and_datasets_give_the_same_conversations(source: str, tmp_path: Path) -> None:
    rows = [{"chat": chat} for chat in CHATS]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "chats.parquet")
    expected = [[Message(**message) for message in chat] for chat in CHATS]
    for path, field in ((source, "messages"), (tmp_path / "chats.parquet", "chat")):
        assert [parse(text) for text in read_documents(path, field, conversation_of)] == expected


def test_a_dataset_of_conversations(source: str) -> None:
    pytest.importorskip("datasets")
    found = documents(f"hf:{Path(source).parent}", 0, "messages", conversation_of).one_pass()
    assert [parse(text) for text in found] == [[Message(**message) for message in chat] for chat in CHATS]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("[1]", "expected an object, found list"),
        ('{"text": "a"}', "no field 'messages'; the fields are: text"),
        ('{"messages": "a"}', "field 'messages' must be a list of messages, but is str"),
        ('{"messages": []}', "field 'messages' must be a list of messages, but is empty"),
        ('{"messages": null}', "field 'messages' must be a list of messages, but is null"),
        ([1], "message 1 of field 'messages': expected an object with role and content, found int"),
        ([{"content": "a"}], "message 1 of field 'messages': role must be 'user' here, but is None"),
        (turns("a", "b")[1:], "message 1 of field 'messages': role must be 'user' here, but is 'assistant'"),
        (turns("a") * 2, "message 2 of field 'messages': role must be 'assistant' here, but is 'user'"),
        (turns("a", "b") + turns("a", system="s"), "message 3 .*: role must be 'user' here, but is 'system'"),
        (turns(system="s") * 2, "message 2 .*: role must be 'user' here, but is 'system'"),
        ([{"role": "user", "content": 3}], "message 1 .*: content must be a string, but is int"),
        ([{"role": "user"}], "message 1 .*: content must be a string, but is null"),
        (turns("a", " \n"), "message 2 .*: content is empty"),
        (turns("a", "\ud800"), "message 2 .*: content: not valid Unicode at character 0"),
        (turns("a", "b", "c"), "the last message of field 'messages' must be the assistant's"),
        (turns(system="s"), "the last message of field 'messages' must be the assistant's"),
    ],
)
def test_what_is_no_conversation(tmp_path: Path, row: Any, message: str) -> None:
    line = row if isinstance(row, str) else json.dumps({"messages": row})
    good = json.dumps({"messages": turns("a", "b")})
    (tmp_path / "chats.jsonl").write_text(f"{good}\n\n{line}\n")
    with pytest.raises(ValueError, match=rf"^{re.escape(str(tmp_path))}/chats.jsonl, line 3: {message}"):
        corpus(str(tmp_path))


def test_sources_and_settings_that_do_not_fit(source: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(ValueError, match="a.txt: conversations are in .jsonl and .parquet files"):
        corpus(str(tmp_path))
    with pytest.raises(ValueError, match="stories are no conversations: name a .jsonl"):
        corpus("stories")
    with pytest.raises(ValueError, match="shards:x holds tokenised text"):
        corpus("shards:x")
    for packing in ("contiguous", "aligned"):
        with pytest.raises(ValueError, match=f"packing {packing} would cut conversations: set packing to whole"):
            corpus(source, packing=packing)
    with pytest.raises(ValueError, match="format must be one of text, messages, but is 'chat'"):
        corpus(source, format="chat")
    config = CorpusConfig(
        source=source, length=64, batch_size=1, format="messages", text_field="messages", packing="whole"
    )
    with pytest.raises(ValueError, match=r"no special token '<\|im_start\|>'; .* trained with tokenizer.special"):
        Corpus(config, Tokenizer.train([], 258), 0)
    with pytest.raises(ValueError, match="conversations need the tokenizer of a trained model: set init"):
        config.texts(0)


@pytest.mark.parametrize("multiple", [1, 4, 32])
@pytest.mark.parametrize("length", [32, 96, 160, 320])
def test_whole_packing_is_the_naive_one(source: str, length: int, multiple: int) -> None:
    """Naively: put documents behind each other at multiples, as long as they fit, and padding everywhere else.

    The lengths lie below, among and above those of the documents.
    """
    rows = take(corpus(source, length=length, multiple=multiple), 12)
    stream = documents(source, 5, "messages", conversation_of).stream()
    waiting = [by_hand([vars(message) for message in parse(next(stream).text)]) for _ in range(300)]
    for tokens, owners, scored in itertools.chain.from_iterable(
        zip(batch.tokens.tolist(), batch.documents.tolist(), batch.scored.tolist(), strict=True)  # type: ignore[union-attr]
        for batch in rows
    ):
        expected: list[tuple[int, bool, int]] = []
        number = 0
        while not expected or len(expected) + len(waiting[0]) <= length:
            expected += [(*pair, number) for pair in waiting.pop(0)]
            expected += [(PAD, False, number)] * (-len(expected) % multiple)
            number += 1
        expected = (expected + [(PAD, False, number - 1)] * length)[:length]
        assert list(zip(tokens, scored, owners, strict=True)) == expected


def test_whole_packing_of_text_scores_all_but_the_padding(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\f".join("ab" * n for n in range(1, 9)))
    batch = next(corpus(str(tmp_path), format="text", length=24, batch_size=8))
    assert batch.scored is not None and torch.equal(batch.scored, batch.tokens != PAD) and not batch.scored.all()
    for row, owners in zip(batch.tokens.tolist(), batch.documents.tolist(), strict=True):  # type: ignore[union-attr]
        ends = [place for place, id_ in enumerate(row) if id_ == TOKENIZER.eos_id]
        assert len(ends) == owners[-1] + 1 and [owners[place] for place in ends] == [*range(len(ends))]


@pytest.mark.parametrize(("streams", "ranks"), [(1, 2), (2, 2), (3, 4), (4, 2)])
def test_the_rows_do_not_depend_on_batches_ranks_or_stops(source: str, streams: int, ranks: int) -> None:
    fields = {"streams": streams, "multiple": 4}
    whole = take(corpus(source, **fields), 24)
    for size in (1, 2, 8):
        rows = take(corpus(source, **fields, batch_size=size), 96 // size)
        for name in ("tokens", "documents", "scored"):
            assert torch.equal(*(torch.cat([getattr(b, name) for b in batches]) for batches in (whole, rows)))
    parts = [corpus(source, rank, ranks, **fields) for rank in range(ranks)]
    for step, batch in enumerate(whole):
        assert all(same(next(part), batch.shard(rank, ranks)) for rank, part in enumerate(parts))
        if step % 5 == 0:
            state = json.loads(json.dumps(merge_states([part.state_dict() for part in parts])))
            resumed = corpus(source, **fields)
            resumed.load_state_dict(state)
            assert same(next(resumed), whole[step + 1])
    with pytest.raises(ValueError, match="multiple was 4 when it was saved, but is 1"):
        corpus(source, streams=streams).load_state_dict(state)


def test_conversations_that_are_too_long_are_told(source: str) -> None:
    lengths = sorted(len(by_hand(chat)) for chat in CHATS)
    texts = [conversation_of({"messages": chat}, "messages", "here") for chat in CHATS]
    encoded = list(ChatML(TOKENIZER).encode_batch(texts))
    for length in (lengths[0], lengths[7], lengths[-1]):
        count = sum(one > length for one in lengths)
        said = f"{count} of 19 documents are longer than data.length {length}, and lose their ends" if count else ""
        if idle := sum(not any(scored[:length]) for _, scored in encoded):
            said += f"; in {idle} of them nothing is left that counts"
        running = corpus(source, length=length)
        assert running.warning() == said
        assert same(next(running), next(corpus(source, length=length)))  # counting takes nothing away
    assert corpus("stories", format="text").warning() == ""


def test_conversations_of_which_nothing_counts(source: str) -> None:
    with pytest.raises(ValueError, match=r"chats.jsonl: in none of its 19 documents anything counts.*: raise data"):
        corpus(source, length=4).warning()


def test_documents_that_are_cut_are_counted(source: str) -> None:
    shortest = min(len(by_hand(chat)) for chat in CHATS)
    running = corpus(source, length=shortest)  # one document a row, of which those as short as this lose nothing
    short = sum(len(by_hand(chat)) == shortest for chat in CHATS)
    epochs = list(itertools.islice(running, 19))  # of 19 rows each, however many are in a batch
    rows = sum(len(batch.tokens) for batch in epochs)
    assert sum(batch.cut for batch in epochs) == rows - short * rows // 19
    assert next(corpus("stories", format="text", packing="contiguous")).cut is None


def test_special_tokens_of_a_new_tokenizer() -> None:
    assert [TOKENIZER.special_id(name) for name in MARKS] == [START, END] and TOKENIZER.pad_id == PAD
    assert START not in TOKENIZER.encode("<|im_start|>") and TOKENIZER.decode([START, END]) == ""
    assert TOKENIZER.vocab_size == 260
    with pytest.raises(ValueError, match="259 is too small: 256 bytes and 4 special tokens need 260"):
        Tokenizer.train([], 259, MARKS)
    for names in (("<|pad|>",), ("a", "a"), ("",)):
        with pytest.raises(ValueError, match="special tokens need different names"):
            Tokenizer.train([], 300, names)
