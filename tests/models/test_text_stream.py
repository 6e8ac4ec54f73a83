"""Text as it is written: pieces join to the continuation, characters stay whole, stop strings are cut off."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import tokenizers
import torch
from hypothesis import given
from hypothesis import strategies as st

from opencola.flow.dit import DiTConfig
from opencola.models.cola.model import Cola
from opencola.models.cola.parts import ColaConfig
from opencola.models.cola.sampling import ColaSampling
from opencola.models.stopping import TokenBlock
from opencola.models.text_stream import Continuation, TextPiece, generate_text
from opencola.models.writing import begun
from opencola.text.conversations import ChatML, Message
from opencola.text.tokenizer import Tokenizer
from opencola.vae.text_vae import TextVAEConfig

BYTES = Tokenizer.train(["a"], 258)  # one token a byte
WORDS = Tokenizer.train(["the fox sat down. the fox ran off. she said stop it now."] * 9, 300)


class Scripted:
    """Writes given texts, byte tokens `size` at a time, under the real rules for stopping."""

    def __init__(self, tokens: list[list[int]], size: int) -> None:
        self.tokens, self.size = tokens, size
        self.vocab_size = 1000

    def generate(
        self, prompts: list[list[int]], sampling: ColaSampling, *, eos_ids: Sequence[int], stop: Any, **rest: Any
    ) -> Iterator[list[TokenBlock]]:
        active = begun(prompts, sampling, eos_ids, None, stop)
        for start in range(0, 10_000, self.size):
            blocks = [text.take(self.tokens[text.sample][start : start + self.size]) for text in active]
            yield blocks
            active = [text for text, block in zip(active, blocks, strict=True) if not block.finished]
            if not active:
                return


def write(texts: list[str], size: int = 4, prompt: str = "", **sampling: Any) -> list[list[TextPiece]]:
    """What the scripted model's pieces are, by sample."""
    tokens = [[*BYTES.encode(text), BYTES.eos_id, *[BYTES.encode("!")[0]] * size] for text in texts]
    settings = ColaSampling(**{"max_new_tokens": 1000} | sampling)
    steps = generate_text(Scripted(tokens, size), BYTES, [prompt] * len(texts), settings)  # type: ignore[arg-type]
    found: list[list[TextPiece]] = [[] for _ in texts]
    for pieces in steps:
        for piece in pieces:
            found[piece.sample].append(piece)
    return found


def text_of(pieces: list[TextPiece]) -> str:
    return "".join(piece.text for piece in pieces)


def tokens_of(pieces: list[TextPiece]) -> list[int]:
    return [token for piece in pieces for token in piece.tokens]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
def test_characters_come_whole(size: int) -> None:
    texts = ["Zoë ate 3 € of 🍪🍪 at the café.", "plain", "", "ends in ü", "a \ufffd stays"]
    for text, pieces in zip(texts, write(texts, size, prompt="Ünder \ufffd"), strict=True):
        assert text_of(pieces) == text
        assert tokens_of(pieces) == BYTES.encode(text)
        assert all("\ufffd" not in piece.text for piece in pieces) or "\ufffd" in text
        assert [piece.finished for piece in pieces] == [""] * (len(pieces) - 1) + ["eos"]


def test_pieces_come_as_soon_as_they_are_whole() -> None:
    pieces = write(["aé€bcdefg"], 2)[0]
    assert [piece.text for piece in pieces] == ["a", "é", "€", "bc", "de", "fg", ""]


def test_an_unfinished_character_at_the_budget() -> None:
    pieces = write(["ab€"], 2, max_new_tokens=4)[0]
    assert text_of(pieces) == "ab\ufffd"
    assert pieces[-1].finished == "length"


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16])
@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("one.\n\ntwo.\n\nthree", ("\n\n",), "one."),
        ("aaab and aab", ("aab",), "a"),  # what is held back may turn out to be text
        ("she said END and", ("said", "END"), "she "),
        ("she said END and", ("END", "she said E"), ""),  # the one that begins first counts
        ("on €5 and €7 €", ("€7",), "on €5 and "),
        ("ends in a stop's beginning EN", ("END",), "ends in a stop's beginning EN"),
        ("nothing to stop", ("END",), "nothing to stop"),
        ("stop", ("stop",), ""),
    ],
)
def test_stop_strings(size: int, text: str, stops: tuple[str, ...], expected: str) -> None:
    first, second = write([text, "some other text"], size, stop=stops)
    assert text_of(first) == expected
    assert first[-1].finished == ("eos" if expected == text else "stop")
    assert BYTES.decode(tokens_of(first)).startswith(expected)
    shown = ""
    for piece in first:
        shown += piece.text
        assert expected.startswith(shown)  # nothing is taken back
    if expected != text:  # computing stops with the block that completes the string, and gives no tokens behind it
        needed = min(text.index(stop) + len(stop) for stop in stops if stop in text)
        assert len(first) == -(-len(text[:needed].encode()) // size)
        assert len(tokens_of(first)) <= len(text[:needed].encode())
    assert text_of(second) == "some other text"


ANY_BYTES = st.lists(st.sampled_from([*BYTES.encode("abé🙂\ufffd"), BYTES.eos_id]), max_size=12)


@given(ANY_BYTES, ANY_BYTES, st.integers(1, 5), st.lists(st.sampled_from(["a", "b", "ab", "é", "🙂", "\ufffd"])))
def test_stop_strings_in_any_bytes(prompt: list[int], tokens: list[int], size: int, stops: list[str]) -> None:
    """As if all were decoded anew with each block, broken characters and special tokens included."""
    text = Continuation(BYTES, prompt, stops)
    start = len(BYTES.decode(prompt))
    for end in range(size, len(tokens) + size, size):
        whole = BYTES.decode(prompt + tokens[:end])[start:]
        places = [whole.find(stop) for stop in stops if stop in whole]
        kept = text.stop(tokens[:end])
        assert kept == text.stop(tokens[:end])  # a block that failed elsewhere is asked for again
        if places:
            lengths = [len(BYTES.decode(prompt + tokens[:n])[start:].rstrip("\ufffd")) for n in range(end + 1)]
            assert kept == next(n for n, length in enumerate(lengths) if length >= min(places))
            return
        assert kept is None


def test_a_long_text_is_decoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is decoded grows with the text, and not with its square."""
    decode, decoded = Tokenizer.decode, []
    monkeypatch.setattr(Tokenizer, "decode", lambda self, ids: decoded.append(len(ids)) or decode(self, ids))
    pieces = write(["a fox é " * 300], size=2, stop=("stop",), max_new_tokens=5000)[0]
    assert text_of(pieces) == "a fox é " * 300
    assert sum(decoded) < 3 * len(tokens_of(pieces))


def test_a_stop_string_in_the_prompt_does_not_count() -> None:
    assert text_of(write(["ND and more"], prompt="the END E", stop=("END",))[0]) == "ND and more"


def test_the_end_of_text_token_can_be_ignored() -> None:
    pieces = write(["ab"], 2, ignore_eos=True, max_new_tokens=4)[0]
    assert text_of(pieces) == "ab!"  # the special token is not text
    assert pieces[-1].finished == "length"


def test_the_space_that_a_decoder_drops_at_the_beginning() -> None:
    """A sentencepiece-like decoder, for which the continuation's first token would lose its space."""
    names = ["<eos>", "▁the", "▁fox", "▁ran"]
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({name: i for i, name in enumerate(names)}, "<eos>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    backend.decoder = tokenizers.decoders.Metaspace()
    backend.add_special_tokens(["<eos>"])
    model = Scripted([[2, 3, 0]], 1)
    steps = generate_text(model, Tokenizer(backend), ["the"], ColaSampling(stop=("ran",)))  # type: ignore[arg-type]
    assert [pieces[0].text for pieces in steps] == [" fox", " "]


@pytest.fixture(scope="module")
def cola() -> Cola:
    """A tiny model with random weights, all of them in use."""
    torch.manual_seed(0)
    vae = TextVAEConfig(
        vocab_size=WORDS.vocab_size, width=16, ffn_dim=32, num_heads=2, encoder_layers=1, decoder_layers=1
    )
    model = Cola(ColaConfig(vae, DiTConfig(width=16, num_heads=2, head_dim=8, rope_dim=4, num_layers=1)))
    with torch.no_grad():
        for parameter in model.dit.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def run(cola: Cola, prompts: list[str], sampling: ColaSampling, ids: list[int] | None = None) -> list[list[TextPiece]]:
    found: list[list[TextPiece]] = [[] for _ in prompts]
    for pieces in generate_text(cola, WORDS, prompts, sampling, ids):
        for piece in pieces:
            found[piece.sample].append(piece)
    return found


@pytest.fixture
def free() -> ColaSampling:
    """Settings under which the tiny model writes 30 tokens."""
    return ColaSampling(max_new_tokens=30, steps=2, guidance=1.0, temperature=1.0, ignore_eos=True)


def test_a_real_model(cola: Cola, free: ColaSampling) -> None:
    prompts = ["the fox", "", "she said"]
    together = run(cola, prompts, free)
    for i, (prompt, pieces) in enumerate(zip(prompts, together, strict=True)):
        assert len(tokens_of(pieces)) == 30
        assert text_of(pieces) == WORDS.decode(tokens_of(pieces))
        alone = run(cola, [prompt], free, [i])[0]
        assert tokens_of(alone) == tokens_of(pieces)
    assert text_of(run(cola, ["the fox"], free, [1])[0]) != text_of(together[0])


def test_a_real_model_stops(cola: Cola, free: ColaSampling) -> None:
    text = text_of(run(cola, ["the fox"], free)[0])
    stop = text[len(text) // 2 :][:2]
    pieces = run(cola, ["the fox"], replace(free, stop=(stop,)))[0]
    assert text_of(pieces) == text[: text.index(stop)]
    assert pieces[-1].finished == "stop"
    assert len(tokens_of(pieces)) < 30


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: replace(s, stop=("a", "")), "empty stop string"),
        (lambda s: replace(s, stop=("a",), compatibility="release"), "no stop strings"),
    ],
)
def test_settings_that_cannot_be(
    cola: Cola, free: ColaSampling, change: Callable[[ColaSampling], ColaSampling], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        run(cola, ["the fox"], change(free))


def test_a_tokenizer_of_another_model(cola: Cola, free: ColaSampling) -> None:
    other = Tokenizer.train(["many other words, and still more of them, go in here"] * 9, WORDS.vocab_size + 5)
    with pytest.raises(ValueError, match="tokens, but the model knows only"):
        next(generate_text(cola, other, ["the"], free))


def test_chat_answers_up_to_the_end_of_the_turn() -> None:
    tokenizer = Tokenizer.train(["a"], 260, ["<|im_start|>", "<|im_end|>"])
    chatml = ChatML(tokenizer)
    said = [Message("user", "a"), Message("assistant", "b"), Message("user", "c")]
    asked: list[list[int]] = []
    script = [[*tokenizer.encode(text), end, *tokenizer.encode("!!!!")] for text, end in
              (("one", chatml.end_id), ("zwölf", chatml.end_id), ("three", tokenizer.eos_id))]  # fmt: skip
    model: Any = Scripted(script, 4)
    generate = model.generate
    model.generate = lambda prompts, *rest, **options: asked.extend(prompts) or generate(prompts, *rest, **options)
    found = ["", "", ""]
    for pieces in generate_text(model, tokenizer, ["Hi", said, [*said]], ColaSampling(max_new_tokens=99, chat=True)):
        for piece in pieces:
            found[piece.sample] += piece.text + f"[{piece.finished}]" * bool(piece.finished)
    assert found == ["one[eos]", "zwölf[eos]", "three[eos]"]
    assert asked == [chatml.prompt([Message("user", "Hi")]), chatml.prompt(said), chatml.prompt(said)]
    plain = [pieces[0] for pieces in generate_text(model, tokenizer, ["Hi"], ColaSampling(max_new_tokens=6))]
    assert asked[3] == tokenizer.encode("Hi") and plain[-1].finished == "length"  # the mark is not its end
    with pytest.raises(ValueError, match="messages are answered with chat only"):
        next(generate_text(model, tokenizer, [said], ColaSampling()))
    with pytest.raises(ValueError, match="conversations need a base model whose tokenizer was trained with"):
        next(generate_text(model, BYTES, ["Hi"], ColaSampling(chat=True)))
