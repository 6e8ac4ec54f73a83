"""What a model in training shows: continuations of the texts' own beginnings, and its reconstructions."""

import pytest
import torch

from opencola.flow.dit import DiTConfig
from opencola.models import build
from opencola.models.cola.model import Cola
from opencola.models.cola.parts import ColaConfig, PriorObjective
from opencola.models.cola.sampling import ColaSampling
from opencola.models.cola.stage_one import StageOne, StageOneConfig
from opencola.models.samples import first_words, longest_document
from opencola.models.text_stream import generate_text
from opencola.text.tokenizer import Tokenizer
from opencola.vae.text_vae import TextVAEConfig

TEXTS = [f"The fox number {i} ran to the hill and sat there with a friend." for i in range(60)]
VAE = {"latent_dim": 4, "width": 16, "ffn_dim": 24, "num_heads": 2, "encoder_layers": 1, "decoder_layers": 1}
DIT = DiTConfig(latent_dim=4, width=16, num_layers=1, num_heads=1, head_dim=16, rope_dim=8, block_size=2)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(TEXTS, 300)


def rows(tokenizer: Tokenizer) -> torch.Tensor:
    """Six sequences of 40 tokens out of the texts, as `contiguous` packs them."""
    stream = [token for text in TEXTS for token in [*tokenizer.encode(text), tokenizer.eos_id]]
    return torch.tensor(stream[: 6 * 40]).view(6, 40)


def test_a_whole_model_continues_and_reconstructs(tokenizer: Tokenizer) -> None:
    torch.manual_seed(0)
    config = ColaConfig(TextVAEConfig(tokenizer.vocab_size, **VAE), DIT, prior=PriorObjective(lambda_ref=0))
    model, tokens = Cola(config).eval(), rows(tokenizer)
    sampling = ColaSampling(steps=2, max_new_tokens=500, ignore_eos=True, seed=3)
    state = torch.get_rng_state()
    samples = build.samples(model, tokenizer, tokens, sampling)
    assert torch.equal(state, torch.get_rng_state())
    assert samples == build.samples(model, tokenizer, tokens, sampling)
    assert [sample.kind for sample in samples] == ["continuation"] * 4 + ["reconstruction"] * 4
    for number, sample in enumerate(samples[:4]):
        text = tokenizer.decode(tokens[number].tolist())
        assert sample.prompt in text and len(sample.prompt.split()) == 8
        written = [*generate_text(model, tokenizer, [sample.prompt], ColaSampling(
            steps=2, max_new_tokens=64, ignore_eos=True, seed=3), [number])]  # fmt: skip
        assert sample.text == "".join(piece.text for pieces in written for piece in pieces)
    found = model.vae.decode(model.vae.encode(tokens).mean).argmax(-1)
    for row, back, sample in zip(tokens, found, samples[4:], strict=False):
        assert (sample.prompt, sample.text) == (tokenizer.decode(row.tolist()), tokenizer.decode(back.tolist()))
        assert sample.figures == {"token_accuracy": pytest.approx(sum(a == b for a, b in zip(row, back)) / 40)}  # noqa: B905


def test_a_vae_reconstructs_only(tokenizer: Tokenizer) -> None:
    torch.manual_seed(0)
    model = StageOne(StageOneConfig(TextVAEConfig(tokenizer.vocab_size, **VAE)))
    samples = build.samples(model, tokenizer, rows(tokenizer)[:2], ColaSampling())
    assert [sample.kind for sample in samples] == ["reconstruction"] * 2


def test_the_longest_document_of_a_sequence(tokenizer: Tokenizer) -> None:
    short, long, end = tokenizer.encode("a fox"), tokenizer.encode("there sat a friend"), [tokenizer.eos_id]
    for tokens in (short + end + long, long + end + short, end + long, long + end, short + end + long + end + short):
        assert longest_document(tokenizer, tokens) == "there sat a friend"
    assert longest_document(tokenizer, end) == longest_document(tokenizer, []) == ""


def test_first_words() -> None:
    assert first_words(" a  b\nc d e f g hh i j") == " a  b\nc d e f g hh"
    assert first_words("one, two. ") == "one, two."
    assert first_words("") == first_words(" \n") == ""
