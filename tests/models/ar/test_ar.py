"""The autoregressive baseline: its likelihood by hand, its cache against full passes, its draws against the softmax."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny import randomise, tiny_batch
from torch import Tensor

from opencola.data.batch import Batch
from opencola.layers.llama import LlamaConfig
from opencola.models.ar.model import AR
from opencola.models.ar.network import ARConfig
from opencola.models.ar.sampling import ARSampling
from opencola.models.ar.score import ARScoring

VOCABULARY, BOS = 30, 3
PROMPTS = [[5, 9, 2, 2, 7], [], [11], [4] * 50, [8, 1, 20]]


def tiny_ar(vocab_size: int = VOCABULARY, tied: bool = False, **trunk: Any) -> AR:
    sizes = {"width": 16, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "ffn_dim": 24}
    return randomise(AR(ARConfig(vocab_size, LlamaConfig(**sizes | trunk), tied, BOS % vocab_size)))


def log_probs(model: AR, text: list[int]) -> Tensor:
    """log p of every token of one text, by a pass for each prefix, alone."""
    found = []
    for place, token in enumerate(text):
        logits = model.logits(torch.tensor([[model.config.bos_id, *text[:place]]]))[0, -1]
        found.append(logits[token] - logits.exp().sum().log())
    return torch.stack(found).detach()


def write(model: AR, prompts: list[list[int]], ids: list[int] | None = None, **fields: Any) -> list[list[int]]:
    rest = {name: fields.pop(name) for name in ("eos_ids", "stop", "pad_id") if name in fields}
    texts: list[list[int]] = [[] for _ in prompts]
    for blocks in model.generate(prompts, ARSampling(**{"max_new_tokens": 12} | fields), ids=ids, **rest):
        for block in blocks:
            texts[block.sample] += block.tokens
    return texts


@pytest.mark.parametrize("tied", [False, True])
def test_loss_is_the_mean_of_the_chain_rule_in_nats(tied: bool) -> None:
    model, batch = tiny_ar(tied=tied), tiny_batch()
    expected = -torch.cat([log_probs(model, row) for row in batch.tokens.tolist()])
    loss = model.loss(batch)
    torch.testing.assert_close(loss.total.detach(), expected.mean(), rtol=0, atol=1e-12)
    assert list(loss.terms) == ["cross_entropy"]
    scored = torch.rand(batch.tokens.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    part = model.loss(replace(batch, scored=scored)).total.detach()
    torch.testing.assert_close(part, expected[scored.flatten()].mean(), rtol=0, atol=1e-12)
    assert model.counts(replace(batch, scored=scored))["tokens"] == scored.sum()
    score = model.score([[]] * 3, batch.tokens.tolist(), ARScoring())
    torch.testing.assert_close(loss.total.detach(), -score.total.sum() / score.num_tokens.sum(), rtol=0, atol=1e-12)


def test_parts_of_a_batch_have_the_gradient_of_the_whole() -> None:
    model, batch = tiny_ar(), tiny_batch(4)
    batch = replace(batch, scored=torch.arange(48).view(4, 12) % 7 < torch.arange(4)[:, None] + 1)
    model.loss(batch).total.backward()
    whole = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    counts = {name: count / 2 for name, count in model.counts(batch).items()}
    for part in range(2):
        (model.loss(replace(batch.shard(part, 2), counts=counts)).total / 2).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, whole[name], rtol=0, atol=1e-12)


def test_documents_are_scored_as_if_alone() -> None:
    model, batch = tiny_ar(), tiny_batch(2)
    documents = torch.tensor([[0] * 5 + [1] * 7, [4] + [2] * 3 + [9] * 8])
    loss = model.loss(replace(batch, documents=documents)).total.detach()
    pieces = [
        row[mine] for row, d in zip(batch.tokens, documents, strict=True) for mine in (d == k for k in d.unique())
    ]
    expected = -torch.cat([log_probs(model, piece.tolist()) for piece in pieces])
    assert len(pieces) == 5
    torch.testing.assert_close(loss, expected.mean(), rtol=0, atol=1e-12)
    assert abs(loss - model.loss(batch).total) > 1e-3


def test_accuracy_counts_scored_tokens() -> None:
    model, batch = tiny_ar(), tiny_batch()
    inputs = torch.cat((torch.full((3, 1), BOS), batch.tokens[:, :-1]), dim=1)
    best = model.logits(inputs).argmax(-1)
    scored = torch.ones_like(best, dtype=torch.bool)
    scored[:, 3:6] = False
    right = Batch(batch.tokens, batch.ids, 0, 0, scored=scored & (best == batch.tokens))
    assert model.loss(right).metrics["token_accuracy"] == 1
    share = (best == batch.tokens)[scored].double().mean()
    torch.testing.assert_close(model.loss(replace(right, scored=scored)).metrics["token_accuracy"], share)


@pytest.mark.parametrize("tied", [False, True])
def test_the_first_loss_of_a_new_model_is_that_of_no_knowledge(tied: bool) -> None:
    torch.manual_seed(0)
    model = AR(ARConfig(500, LlamaConfig(width=64, num_layers=2, ffn_dim=96), tied))
    batch = Batch(torch.randint(500, (8, 32)), torch.arange(8), 0, 0)
    assert abs(model.loss(batch).total.item() - torch.tensor(500.0).log().item()) < 0.1


@pytest.mark.parametrize("tied", [False, True])
def test_generation_with_the_cache_is_the_argmax_of_full_passes(tied: bool) -> None:
    model = tiny_ar(tied=tied)
    for prompt, new in zip(PROMPTS, write(model, PROMPTS, max_new_tokens=20, pad_id=6), strict=True):
        text = [BOS, *prompt]
        for token in new:
            assert token == model.logits(torch.tensor([text]))[0, -1].argmax()
            text.append(token)
        assert len(new) == 20


@pytest.mark.parametrize("fields", [{"temperature": 1.0}, {"temperature": 0.8, "top_k": 9, "repetition_penalty": 1.3}])
def test_a_text_is_the_same_in_any_batch_and_when_it_goes_on(fields: dict[str, Any]) -> None:
    model = tiny_ar()
    ids = [4, 0, 9, 2, 17]
    together = write(model, PROMPTS, ids, eos_ids=[7, 8, 9, 10], **fields)
    lengths = {len(text) for text in together}
    assert len(lengths) > 1  # some end, and leave the batch, before others
    for number, text in zip(ids, together, strict=True):
        prompt = PROMPTS[ids.index(number)]
        assert write(model, [prompt], [number], eos_ids=[7, 8, 9, 10], **fields) == [text]
        start = len(text) // 2
        rest = write(
            model, [prompt + text[:start]], [number], eos_ids=[7, 8, 9, 10], **fields | {"max_new_tokens": 12 - start}
        )
        assert rest == [text[start:]]
    assert write(model, PROMPTS[::-1], ids[::-1], eos_ids=[7, 8, 9, 10], **fields) == together[::-1]
    assert write(model, PROMPTS, ids, seed=1, eos_ids=[7, 8, 9, 10], **fields) != together


def test_ends_and_penalties() -> None:
    model = tiny_ar()
    plain = write(model, [[5, 9]], max_new_tokens=20)[0]
    end = plain[4]
    assert write(model, [[5, 9]], eos_ids=[end]) == [plain[: plain.index(end)]]
    assert write(model, [[5, 9]], eos_ids=[end], ignore_eos=True) == [plain[:12]]
    assert write(model, [[5, 9]], stop=lambda sample, tokens: 2 if len(tokens) == 5 else None) == [plain[:4]]
    new = write(model, [[5, 9]], repetition_penalty=1e9)[0]
    assert len({5, 9, *new}) == 14  # no token comes twice, nor one of the prompt's
    assert list(model.generate([], ARSampling())) == []


def test_draws_have_the_softmax_as_their_distribution() -> None:
    model, count = tiny_ar(vocab_size=5), 3000
    temperature = 1.5
    new = torch.tensor(write(model, [[2, 4]] * count, max_new_tokens=2, temperature=temperature))
    first = (model.logits(torch.tensor([[BOS, 2, 4]]))[0, -1] / temperature).softmax(-1)
    nexts = [(model.logits(torch.tensor([[BOS, 2, 4, k]]))[0, -1] / temperature).softmax(-1) for k in range(5)]
    expected = (first[:, None] * torch.stack(nexts)).flatten().detach() * count
    found = torch.bincount(new[:, 0] * 5 + new[:, 1], minlength=25)
    assert expected.min() > 2
    assert ((found - expected) ** 2 / expected).sum() < 51.2  # chi-squared with 24 degrees of freedom: p = 0.001


def test_score_is_the_sum_by_hand_and_obeys_the_chain_rule() -> None:
    model = tiny_ar()
    continuations = [[1, 2], [9], [7, 7, 7], [0, 5, 29], [4]]
    score = model.score(PROMPTS, continuations, ARScoring(rows=2))
    for place, (prompt, continuation) in enumerate(zip(PROMPTS, continuations, strict=True)):
        expected = log_probs(model, prompt + continuation)[len(prompt) :].sum()
        torch.testing.assert_close(score.total[place], expected, rtol=0, atol=1e-11)
        alone = model.score([prompt], [continuation], ARScoring())
        torch.testing.assert_close(score.total[place : place + 1], alone.total, rtol=0, atol=1e-12)
        if prompt:
            both = model.score([[]], [prompt + continuation], ARScoring()).total
            both = both - model.score([[]], [prompt], ARScoring()).total
            torch.testing.assert_close(alone.total, both, rtol=0, atol=1e-11)
    assert score.kind == "exact"
    assert score.total.dtype == torch.float64
    assert score.standard_error.tolist() == [0] * 5
    assert score.num_tokens.tolist() == [2, 1, 3, 3, 1]


def test_the_probabilities_of_all_texts_of_a_length_sum_to_one() -> None:
    model = tiny_ar(vocab_size=4)
    texts = torch.cartesian_prod(*[torch.arange(4)] * 3).tolist()
    score = model.score([[]] * 64, texts, ARScoring())
    torch.testing.assert_close(score.total.exp().sum(), torch.tensor(1.0).double(), rtol=0, atol=1e-12)


def test_mistakes_are_named() -> None:
    model = tiny_ar()
    with pytest.raises(ValueError, match="prompt 1 has a token id outside 0..29"):
        next(model.generate([[1], [30]], ARSampling()))
    with pytest.raises(ValueError, match="text 0 has a token id outside 0..29"):
        model.score([[1]], [[-1]], ARScoring())
    with pytest.raises(ValueError, match="continuation 1 is empty"):
        model.score([[1], [1]], [[1], []], ARScoring())
    with pytest.raises(ValueError, match="bos_id 9 is outside 0..8, the vocabulary"):
        ARConfig(9, bos_id=9)
