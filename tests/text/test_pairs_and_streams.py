"""Prompts with what follows them, and texts as they come, under tokenizers of every kind in circulation."""

import json

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from opencola.text.tokenizer import END_OF_TEXT, Tokenizer

TEXTS = ["The fox ran to the hill. ", "the END of the story, said the cat.", "The hill is high: yes or no?\n"] * 20


def sentencepiece() -> Tokenizer:
    """As Llama's: a blank before the text, words that begin with ▁, bytes for what it does not know."""
    backend = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", END_OF_TEXT]
    backend.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=340, special_tokens=special, show_progress=False))
    parts = json.loads(backend.to_str())
    vocabulary = parts["model"]["vocab"]
    vocabulary |= {f"<0x{byte:02X}>": len(vocabulary) + byte for byte in range(256)}
    return Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(parts)))


def wordpiece() -> Tokenizer:
    """As BERT's: pieces inside a word begin with ##."""
    backend = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(cleanup=False)
    trainer = trainers.WordPieceTrainer(vocab_size=120, special_tokens=["[UNK]", "[SEP]"], show_progress=False)
    backend.train_from_iterator(TEXTS, trainer)
    return Tokenizer(backend)


def unigram() -> Tokenizer:
    """As T5's: the most probable pieces of the whole, words beginning with ▁."""
    backend = tokenizers.Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=60, special_tokens=["<unk>", "</s>"], unk_token="<unk>", show_progress=False
    )
    backend.train_from_iterator(TEXTS, trainer)
    return Tokenizer(backend)


KINDS = {"bytes": Tokenizer.train(TEXTS, 330), "▁": sentencepiece(), "##": wordpiece(), "unigram": unigram()}
PAIRS = [
    ("The fox", " ran to the hill."), ("the", " END"), ("The hill is high:", " yes"), ("The hill is high: ", "yes"),
    ("", "The fox"), ("The fox", ""), ("The fox ran. ", " The"), ("no?\n", "yes"),
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("prompt", "continuation"), PAIRS)
def test_a_pair_has_the_tokens_of_the_whole(kind: str, prompt: str, continuation: str) -> None:
    tokenizer = KINDS[kind]
    first, rest = tokenizer.encode_pair(prompt, continuation)
    assert first + rest == tokenizer.encode(prompt + continuation)
    # the prompt has all that it has by itself, but for a blank that the next token holds
    assert tokenizer.decode(first).rstrip() == tokenizer.decode(tokenizer.encode(prompt)).rstrip()


def test_a_word_after_a_prompt_is_the_word_in_the_text() -> None:
    """The blank and the word are a token in the text, and they are no other tokens behind the prompt."""
    tokenizer = KINDS["▁"]
    assert len(tokenizer.encode(" END")) > len(tokenizer.encode_pair("the", " END")[1])
    for kind in KINDS:
        assert KINDS[kind].encode_pair("the", " hill") == KINDS[kind].encode_pair("the ", "hill")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cut", range(1, 24))
def test_a_cut_anywhere_leaves_the_text(kind: str, cut: int) -> None:
    """Inside words, too: nothing is begun anew there that the text does not have."""
    tokenizer, text = KINDS[kind], "The fox ran to the hill."
    first, rest = tokenizer.encode_pair(text[:cut], text[cut:])
    assert rest and tokenizer.decode(first + rest) == tokenizer.decode(tokenizer.encode(text))


def test_a_byte_level_token_that_spans_the_cut_is_taken_apart() -> None:
    tokenizer = KINDS["bytes"]
    assert len(tokenizer.encode(" hill")) == 1
    assert tokenizer.encode_pair("The hi", "ll") == (tokenizer.encode("The hi"), tokenizer.encode("ll"))


BROKEN = st.lists(st.sampled_from(["<0xF0>", "<0x9F>", "<0x98>", "<0x80>", "▁the", "▁", "e", END_OF_TEXT, "<0x41>"]))


@given(BROKEN, st.integers(1, 3))
def test_pieces_of_single_bytes_join_to_the_text(names: list[str], size: int) -> None:
    tokenizer = KINDS["▁"]
    backend = tokenizer._backend
    ids = [backend.token_to_id(name) for name in names if backend.token_to_id(name) is not None]
    stream = tokenizer.stream()
    pieces = [stream.push(ids[i : i + size]) for i in range(0, len(ids), size)]
    assert "".join(pieces) + stream.close() == tokenizer.decode(ids)


def test_a_whole_emoji_before_a_cut_one() -> None:
    """The decoder makes one broken run of both: what was given out of it could not be taken back."""
    tokenizer = KINDS["▁"]
    smile = [tokenizer._backend.token_to_id(f"<0x{byte:02X}>") for byte in "😀".encode()]
    stream = tokenizer.stream()
    pieces = [stream.push(part) for part in (smile, smile[:2], tokenizer.encode("the"))]
    assert "".join(pieces) + stream.close() == tokenizer.decode([*smile, *smile[:2], *tokenizer.encode("the")])
    again = tokenizer.stream()
    assert [again.push(smile), again.push(tokenizer.encode("the"))] == ["", "😀 the"]
