"""Tokenizer: lossless, special tokens only by id, foreign files, streaming."""

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors

from opencola.text.tokenizer import Tokenizer

TEXTS = [
    "the cat sat on the mat. ",
    "the dog sat on the log, said the cat. ",
    "naïve café, 你好 🙂👩‍👩‍👧, the end\n",
] * 20
TOKENIZER = Tokenizer.train(TEXTS, 400)

any_text = st.text(st.characters(exclude_categories=["Cs"]))
awkward_text = st.lists(
    st.sampled_from(
        ["<|endoftext|>", "<|pad|>", " ", "  ", "\r\n", "\0", "\ufeff", "\u2028", "e\u0301", "é", "👩‍👩‍👧", "the "]
    )
).map("".join)


def word_level(*special: str, names: list[str] | None = None) -> tokenizers.Tokenizer:
    """A foreign tokenizer that is not byte-level: whole words, one space between them when decoded."""
    backend = tokenizers.Tokenizer(models.WordLevel({w: i for i, w in enumerate(names or ["a", "bb", "é"])}, "a"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens([AddedToken(name, special=True) for name in special])
    return backend


@given(any_text | awkward_text)
def test_decode_undoes_encode(text: str) -> None:
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.decode(ids) == text
    assert TOKENIZER.num_bytes(ids) == len(text.encode())


@given(st.lists(any_text | awkward_text, max_size=5))
def test_encoding_a_batch_is_encoding_each_text(texts: list[str]) -> None:
    assert TOKENIZER.encode_batch(texts) == [TOKENIZER.encode(text) for text in texts]


def test_training_merges_what_is_frequent_and_repeats_exactly() -> None:
    assert TOKENIZER.vocab_size > 258
    assert len(TOKENIZER.encode(" the the")) == 2
    again = Tokenizer.train(iter(TEXTS), 400)
    assert [again.encode(text) for text in TEXTS] == [TOKENIZER.encode(text) for text in TEXTS]
    assert Tokenizer.train(TEXTS, 270).vocab_size == 270


def test_special_ids_come_first() -> None:
    assert (TOKENIZER.eos_id, TOKENIZER.pad_id) == (0, 1)
    assert TOKENIZER.special_id("<|pad|>") == 1


def test_vocabulary_smaller_than_the_bytes_is_refused() -> None:
    assert Tokenizer.train([], 258).vocab_size == 258
    with pytest.raises(ValueError, match=r"257 is too small: .* need 258"):
        Tokenizer.train(TEXTS, 257)


@pytest.mark.parametrize("where", ["folder", "sub/folder", "file.json"])
def test_saved_tokenizer_loads_as_the_same(tmp_path, where: str) -> None:
    file = TOKENIZER.save(tmp_path / where)
    assert file.is_file()
    text = "the café <|endoftext|> sat"
    for path in {file, tmp_path / where}:
        loaded = Tokenizer.load(path)
        assert loaded.encode(text) == TOKENIZER.encode(text)
        assert loaded.decode(loaded.encode(text)) == text
        assert (loaded.vocab_size, loaded.eos_id) == (TOKENIZER.vocab_size, TOKENIZER.eos_id)
    assert list(file.parent.iterdir()) == [file]


def test_failed_save_leaves_the_old_file(tmp_path, monkeypatch) -> None:
    file = TOKENIZER.save(tmp_path)
    before = file.read_bytes()
    other = Tokenizer.train(["zzz"], 300)

    def die(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("pathlib.Path.replace", die)
    with pytest.raises(OSError, match="disk full"):
        other.save(tmp_path)
    assert file.read_bytes() == before


@pytest.mark.parametrize("literal", ["<|endoftext|>", "<|pad|>"])
def test_a_special_token_spelled_out_in_a_text_is_only_text(tmp_path, literal: str) -> None:
    for tokenizer in (TOKENIZER, Tokenizer.load(TOKENIZER.save(tmp_path))):
        text = f"one {literal} two{literal}"
        ids = tokenizer.encode(text)
        assert not {tokenizer.eos_id, tokenizer.pad_id} & set(ids)
        assert not {tokenizer.eos_id, tokenizer.pad_id} & set(tokenizer.encode_batch([text])[0])
        assert tokenizer.decode(ids) == text


def test_special_tokens_leave_no_text() -> None:
    ids = [TOKENIZER.pad_id, *TOKENIZER.encode("the"), TOKENIZER.eos_id]
    assert TOKENIZER.decode(ids) == "the"
    assert TOKENIZER.num_bytes(ids) == 3


@given(any_text, st.data())
def test_bytes_add_up_over_any_cut(text: str, data: st.DataObject) -> None:
    ids = TOKENIZER.encode(text)
    cut = data.draw(st.integers(0, len(ids)))
    assert TOKENIZER.num_bytes(ids[:cut]) + TOKENIZER.num_bytes(ids[cut:]) == len(text.encode())


def test_foreign_file_is_used_as_text_to_ids_alone(tmp_path) -> None:
    """Truncation, padding and added beginnings in the file would change documents: they are switched off."""
    backend = word_level("<s>", "</s>", "<pad>")
    backend.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 3), ("</s>", 4)])
    backend.enable_truncation(4)
    backend.enable_padding(length=8)
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.encode("a bb é a bb é") == [0, 1, 2, 0, 1, 2]
    assert tokenizer.encode_batch(["a", "bb é bb"]) == [[0], [1, 2, 1]]
    assert (tokenizer.eos_id, tokenizer.pad_id, tokenizer.vocab_size) == (4, 5, 6)
    assert tokenizer.num_bytes([1, 2, 4]) == len("bb é".encode())


def test_vocab_size_covers_the_largest_id() -> None:
    backend = tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 9}, "a"))
    assert Tokenizer(backend).vocab_size == 10
    backend.add_special_tokens(["<eos>", "<extra>"])
    largest = max(backend.token_to_id(name) for name in ("b", "<eos>", "<extra>"))
    assert Tokenizer(backend).vocab_size == largest + 1


def test_bytes_of_added_tokens_in_a_byte_level_file() -> None:
    backend = tokenizers.Tokenizer.from_str(TOKENIZER._backend.to_str())
    backend.add_tokens(["<code é>"])
    tokenizer = Tokenizer(backend)
    ids = tokenizer.encode("the <code é> cat")
    assert backend.token_to_id("<code é>") in ids
    assert tokenizer.num_bytes(ids) == len("the <code é> cat".encode())


@pytest.mark.parametrize(
    ("special", "eos", "pad"),
    [
        (["<|endoftext|>", "<|pad|>"], "<|endoftext|>", "<|pad|>"),
        (["<pad>", "<s>", "</s>", "<unk>"], "</s>", "<pad>"),
        (
            ["<|eot_id|>", "<|end_of_text|>", "<|finetune_right_pad_id|>"],
            "<|end_of_text|>",
            "<|finetune_right_pad_id|>",
        ),
        (["<pad>", "<eos>", "<bos>"], "<eos>", "<pad>"),
        (["[PAD]", "[EOS]"], "[EOS]", "[PAD]"),
    ],
)
def test_end_and_padding_are_found_by_their_usual_names(special: list[str], eos: str, pad: str) -> None:
    tokenizer = Tokenizer(word_level(*special))
    assert tokenizer.eos_id == 3 + special.index(eos)
    assert tokenizer.pad_id == 3 + special.index(pad)


def test_unusual_names_can_be_given() -> None:
    backend = word_level("<stop>", "<fill>")
    tokenizer = Tokenizer(backend)
    with pytest.raises(
        ValueError,
        match=r"no usual eos token, nor does tokenizer_config.json .*: write \{\"eos_token\": NAME\}.*: <stop>, <fill>",
    ):
        _ = tokenizer.eos_id
    with pytest.raises(ValueError, match="no usual pad token, nor does tokenizer_config.json beside it"):
        _ = tokenizer.pad_id
    named = Tokenizer(backend, eos="<stop>", pad="<fill>")
    assert (named.eos_id, named.pad_id) == (3, 4)
    with pytest.raises(ValueError, match="no special token '<halt>'; it has: <stop>, <fill>"):
        Tokenizer(backend, eos="<halt>")
    with pytest.raises(ValueError, match="it has: none"):
        Tokenizer(word_level()).special_id("<eos>")


def test_names_given_on_loading(tmp_path) -> None:
    word_level("<stop>", "<fill>").save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path, eos="<stop>", pad="<fill>")
    assert (tokenizer.eos_id, tokenizer.pad_id) == (3, 4)


def test_what_is_no_tokenizer_is_refused_in_one_line(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no tokenizer at .*tokenizer\.json"):
        Tokenizer.load(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no tokenizer at .*other\.json"):
        Tokenizer.load(tmp_path / "other.json")
    file = tmp_path / "tokenizer.json"
    for content in (b"", b"{", json.dumps({"model": 3}).encode(), b"\xff\xfe\x00"):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"tokenizer\.json is not a Hugging Face tokenizer file") as caught:
            Tokenizer.load(tmp_path)
        assert "\n" not in str(caught.value)


@given(any_text, st.integers(1, 7))
def test_stream_joins_to_the_text_and_never_shows_half_a_character(text: str, size: int) -> None:
    ids = TOKENIZER.encode(text)
    stream = TOKENIZER.stream()
    pieces = [stream.push(ids[i : i + size]) for i in range(0, len(ids), size)]
    for end in range(len(pieces) + 1):
        assert text.startswith("".join(pieces[:end]))
    assert "".join(pieces) + stream.close() == text
    assert stream.close() == ""


def test_stream_holds_back_only_the_unfinished_character() -> None:
    tokenizer = Tokenizer.train([], 258)  # one token a byte
    stream = tokenizer.stream()
    assert [stream.push([id_]) for id_ in tokenizer.encode("a🙂b")] == ["a", "", "", "", "🙂", "b"]
    assert stream.push([]) == ""


@given(st.lists(st.integers(0, TOKENIZER.vocab_size - 1)), st.integers(1, 5))
def test_stream_of_any_ids_joins_to_their_decoding(ids: list[int], size: int) -> None:
    """A model may write broken UTF-8: what stays broken becomes U+FFFD, as when decoding all at once."""
    stream = TOKENIZER.stream()
    pieces = [stream.push(ids[i : i + size]) for i in range(0, len(ids), size)]
    assert "".join(pieces) + stream.close() == TOKENIZER.decode(ids)


def test_stream_of_a_foreign_decoder_that_treats_the_first_token_differently() -> None:
    backend = tokenizers.Tokenizer(models.WordLevel({"▁a": 0, "▁bb": 1}, "▁a"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    tokenizer = Tokenizer(backend)
    stream = tokenizer.stream()
    assert [stream.push([id_]) for id_ in tokenizer.encode("a bb a")] == ["a", " bb", " a"]


def test_save_into_an_existing_folder_named_like_a_file(tmp_path) -> None:
    folder = tmp_path / "x.json"
    folder.mkdir()
    assert TOKENIZER.save(folder) == folder / "tokenizer.json"


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer_config.json", {"eos_token": "<stop>", "pad_token": {"content": "<fill>", "special": True}}),
        ("config.json", {"eos_token_id": [3, 0], "pad_token_id": 4}),
    ],
)
def test_files_beside_a_tokenizer_name_its_tokens(file: str, content: dict[str, Any], tmp_path: Path) -> None:
    backend = word_level()
    backend.add_special_tokens(["<stop>", "<fill>"])
    Tokenizer(backend).save(tmp_path / "theirs")
    (tmp_path / "theirs" / file).write_text(json.dumps(content))
    read = Tokenizer.load(tmp_path / "theirs")
    assert (read.eos_id, read.pad_id) == (backend.token_to_id("<stop>"), backend.token_to_id("<fill>")) == (3, 4)
    read.save(tmp_path / "ours")  # a run's folder has the names, too
    again = Tokenizer.load(tmp_path / "ours")
    assert (again.eos_id, again.pad_id, again.fingerprint) == (3, 4, read.fingerprint)
    for useless in ("{", "[]", '{"eos_token": "<halt>"}', '{"eos_token": ["<stop>", []]}', '{"eos_token": 3.5}'):
        (tmp_path / "theirs" / "config.json").unlink(missing_ok=True)
        (tmp_path / "theirs" / "tokenizer_config.json").write_text(useless)
        assert Tokenizer.load(tmp_path / "theirs").vocab_size == 5
    usual = word_level()
    usual.add_special_tokens(["<stop>", "<fill>", "</s>"])
    Tokenizer(usual).save(tmp_path / "theirs")
    (tmp_path / "theirs" / "tokenizer_config.json").write_text('{"eos_token": "<stop>"}')
    assert Tokenizer.load(tmp_path / "theirs").eos_id == usual.token_to_id("</s>")  # a usual name goes first
