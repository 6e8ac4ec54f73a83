"""What each token stands for: the bytes join to what the tokenizer itself decodes."""

import random

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from opencola.errors import UserError
from opencola.text.tokenizer import Tokenizer

TEXTS = ["the cat sat, é and 你好 👩‍👩‍👧", "{'a': [1, 2.5e3]}\n\tthe end  ", "Ünïcödé ﬁ \x00\x7f"]


def sentencepiece() -> Tokenizer:
    """Words that begin with ▁, single bytes as <0x..>: as in LLaMA's files."""
    names = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        "t",
        "h",
        "e",
        "▁t",
        "▁th",
        "▁the",
    ]
    merges = [("▁", "t"), ("▁t", "h"), ("▁th", "e")]
    backend = tokenizers.Tokenizer(
        models.BPE({name: i for i, name in enumerate(names)}, merges, unk_token="<unk>", byte_fallback=True)
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.add_special_tokens([AddedToken(name, special=True) for name in ("<s>", "</s>")])
    return Tokenizer(backend)


def byte_level() -> Tokenizer:
    trained = Tokenizer.train(TEXTS, 300)._backend
    trained.add_tokens(["<code é>", AddedToken("<|im_end|>", special=True)])
    return Tokenizer(trained)


@pytest.mark.parametrize("tokenizer", [byte_level(), sentencepiece()], ids=["byte level", "sentencepiece"])
def test_bytes_join_to_what_is_decoded(tokenizer: Tokenizer) -> None:
    rng = random.Random(0)
    first = tokenizer.encode("the")
    begun = b"".join(tokenizer.bytes[id_] for id_ in first).strip()
    texts = [tokenizer.encode(text) for text in TEXTS]
    for ids in [*texts, *(rng.choices(range(tokenizer.vocab_size), k=9) for _ in range(300))]:
        whole = begun + b"".join(tokenizer.bytes[id_] for id_ in ids)
        decoded = tokenizer.decode(first + ids)
        if "\N{REPLACEMENT CHARACTER}" not in decoded:
            assert decoded == whole.decode()
        else:  # broken runs are U+FFFD each in its own way
            with pytest.raises(UnicodeDecodeError):
                whole.decode()
    for text in TEXTS:
        assert b"".join(tokenizer.bytes[id_] for id_ in tokenizer.encode(text)).decode().strip() == text.strip()


def test_special_tokens_and_gaps_are_no_bytes() -> None:
    tokenizer = byte_level()
    assert tokenizer.bytes[tokenizer.eos_id] == tokenizer.bytes[tokenizer.special_id("<|im_end|>")] == b""
    assert tokenizer.bytes[tokenizer.special_id("<code é>")] == "<code é>".encode()
    assert len({*tokenizer.bytes}) == tokenizer.vocab_size - 2  # the three special ones alone are alike


@pytest.mark.parametrize("decoder", [decoders.BPEDecoder(), decoders.WordPiece(), None])
def test_a_decoder_that_looks_around_is_refused(decoder: decoders.Decoder | None) -> None:
    backend = tokenizers.Tokenizer(models.WordLevel({"a": 0, "b</w>": 1}, "a"))
    if decoder is not None:
        backend.decoder = decoder
    with pytest.raises(UserError, match=r"depends on those around it \(decoder: (BPEDecoder|WordPiece|none)\)"):
        _ = Tokenizer(backend).bytes


def test_a_vocabulary_without_letters_is_refused() -> None:
    backend = tokenizers.Tokenizer(models.WordLevel({"+": 0}, "+"))
    backend.decoder = decoders.Fuse()
    with pytest.raises(UserError, match="no token of the tokenizer is a letter or a digit"):
        _ = Tokenizer(backend).bytes
