"""LLaDA's loss against sums over all masks of a small language, and the model around it."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from any_order import LENGTH, MASK, MASKS, TEXTS, Arbitrary, Exact, by_order, language
from tiny import VOCABULARY, tiny_batch, tiny_llada
from torch import Tensor

from opencola.models.bounds import BoundScoring
from opencola.models.llada.model import draw_mask, weighted_losses
from opencola.models.llada.score import draw_hidden, masked_bound


def losses_of(logits: Tensor, tokens: Tensor, hidden: Tensor, t: Tensor) -> Tensor:
    return weighted_losses(F.cross_entropy(logits.mT, tokens, reduction="none"), hidden, t)


def expected_loss(predict: Exact | Arbitrary) -> Tensor:
    """The weighted loss of every text in nats (27,): over all masks, and over t by Gauss's rule, exact to degree 7."""
    nodes, weights = np.polynomial.legendre.leggauss(4)
    total = torch.zeros(len(TEXTS)).double()
    for t, weight in zip((nodes + 1) / 2, weights / 2, strict=True):
        for mask in MASKS:
            hidden = mask.expand_as(TEXTS)
            chance = math.prod(t if m else 1 - t for m in mask.tolist())
            logits = predict(TEXTS.masked_fill(hidden, MASK))
            losses = losses_of(logits, TEXTS, hidden, torch.full((len(TEXTS), 1), t))
            total += weight * chance * losses.sum(-1)
    return total


def expected_bound(predict: Exact | Arbitrary) -> Tensor:
    """The fixed-count estimate of every text (27,): over all counts, alike probable, and all masks of a count."""
    total = torch.zeros(len(TEXTS)).double()
    for mask in MASKS:
        count = int(mask.sum())
        scored = torch.full((len(TEXTS),), LENGTH)
        bound = masked_bound(predict, TEXTS, mask.expand_as(TEXTS), scored, MASK)
        total += bound / LENGTH / math.comb(LENGTH, count)
    return total


def test_the_exact_predictor_has_the_entropy_as_its_loss() -> None:
    joint = language(0)
    loss = expected_loss(Exact(joint))
    torch.testing.assert_close(loss, -joint.log())
    torch.testing.assert_close((joint * loss).sum(), -(joint * joint.log()).sum())


def test_another_languages_predictor_has_the_cross_entropy() -> None:
    joint, other = language(0), language(1)
    loss = (joint * expected_loss(Exact(other))).sum()
    torch.testing.assert_close(loss, -(joint * other.log()).sum())
    assert loss > -(joint * joint.log()).sum() + 0.1


@pytest.mark.parametrize("seed", range(3))
def test_any_predictor_is_bounded(seed: int) -> None:
    """The loss is the mean over orders; the texts that random orders write have at least its likelihood."""
    joint, predict = language(0), Arbitrary(seed)
    orders = torch.stack(list(by_order(predict)))
    loss = expected_loss(predict)
    torch.testing.assert_close(loss, -orders.mean(0))
    written = orders.logsumexp(0) - math.log(len(orders))
    torch.testing.assert_close(written.exp().sum(), torch.tensor(1.0).double())
    assert (loss > -written).all()
    assert (joint * loss).sum() > -(joint * joint.log()).sum()


@pytest.mark.parametrize("predict", [Exact(language(0)), Exact(language(1)), Arbitrary(0)])
def test_a_fixed_number_of_masks_has_the_same_expectation(predict: Exact | Arbitrary) -> None:
    torch.testing.assert_close(expected_bound(predict), -expected_loss(predict))


def test_a_fixed_number_of_masks_varies_less() -> None:
    """Both on the same text, of a language whose tokens are independent and alike."""
    uniform = torch.zeros(LENGTH).double()[None, :, None].expand(1, LENGTH, 3)
    batch = replace(tiny_batch(), tokens=TEXTS[:1].expand(2000, -1), ids=torch.arange(2000))
    t, hidden = draw_mask(batch)
    losses = losses_of(uniform.expand(2000, -1, -1), batch.tokens, hidden, t.double()).sum(-1)
    drawn = torch.stack([draw_hidden(LENGTH, 0, i) for i in range(2000)])
    scored = torch.full((2000,), LENGTH)
    bounds = masked_bound(lambda tokens: uniform.expand(len(tokens), -1, -1), batch.tokens, drawn, scored, MASK)
    torch.testing.assert_close(bounds, torch.full_like(bounds, -LENGTH * math.log(3)))  # here it does not vary at all
    assert abs(losses.mean() - LENGTH * math.log(3)) < 4 * losses.std() / 2000**0.5
    assert losses.std() > 1


def test_masks_are_drawn_as_said() -> None:
    """t uniform; given t, each token masked with probability t; the same for a sequence in any batch."""
    ids = torch.arange(4000)
    batch = replace(tiny_batch(), tokens=torch.zeros(4000, 20, dtype=torch.long), ids=ids)
    t, hidden = draw_mask(batch)
    assert (t > 0).all() and (t <= 1).all()
    ordered = t[:, 0].sort().values
    assert (ordered - (ids + 0.5) / 4000).abs().max() < 1.63 / 4000**0.5  # Kolmogorov's 1 % point
    excess = (hidden.float() - t) / (t * (1 - t)).sqrt().clamp(min=1e-3)
    for part in (t < 0.25, (t >= 0.25) & (t < 0.75), t >= 0.75):
        some = excess[part[:, 0]]
        assert abs(some.sum()) < 4 * some.numel() ** 0.5
    some = replace(batch, tokens=batch.tokens[5:9], ids=ids[5:9])
    for whole, part in zip((t, hidden), draw_mask(some), strict=True):
        assert torch.equal(whole[5:9], part)
    assert not torch.equal(draw_mask(replace(batch, seed=6))[1], hidden)


def test_loss_of_a_model_by_hand() -> None:
    model, batch = tiny_llada(), tiny_batch()
    t, hidden = draw_mask(batch)
    assert 0 < hidden.sum() < hidden.numel()
    total = 0.0
    for row, tokens in enumerate(batch.tokens):
        logits = model(tokens.masked_fill(hidden[row], VOCABULARY)[None])[0].log_softmax(-1)
        assert logits.shape == (12, VOCABULARY)
        for place in hidden[row].nonzero()[:, 0].tolist():
            total -= logits[place, tokens[place]].item() / t[row].item()
    loss = model.loss(batch)
    assert loss.total.item() == pytest.approx(total / batch.tokens.numel(), rel=1e-6)
    loss.total.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())
    assert model.embedding.weight.grad is not None and model.embedding.weight.grad[VOCABULARY].abs().max() > 0


def test_parts_of_a_batch_have_the_loss_of_the_whole() -> None:
    model, batch = tiny_llada(), tiny_batch()
    batch = replace(batch, scored=torch.rand(batch.tokens.shape) < 0.6)
    assert batch.scored is not None
    counts = model.counts(batch)
    assert counts["tokens"] == batch.scored.sum()
    parts = [
        replace(batch, tokens=batch.tokens[i], ids=batch.ids[i], scored=batch.scored[i], counts=counts)
        for i in (slice(0, 1), slice(1, 3))
    ]
    torch.testing.assert_close(sum(model.loss(part).total for part in parts), model.loss(batch).total)


def test_unscored_tokens_are_never_masked() -> None:
    batch = replace(tiny_batch(), scored=torch.arange(12).expand(3, -1) >= 5)
    _, hidden = draw_mask(batch)
    assert not hidden[:, :5].any() and hidden.any()


def test_documents_do_not_see_each_other() -> None:
    model, batch = tiny_llada(), replace(tiny_batch(), documents=(torch.arange(12) >= 7).long().expand(3, -1))
    first = replace(batch, scored=torch.arange(12).expand(3, -1) < 7)
    changed = replace(first, tokens=torch.where(torch.arange(12) < 7, batch.tokens, (batch.tokens + 1) % VOCABULARY))
    torch.testing.assert_close(model.loss(first).total, model.loss(changed).total)
    alone = [replace(batch, documents=None, scored=x.scored, tokens=x.tokens) for x in (first, changed)]
    assert abs(model.loss(alone[0]).total - model.loss(alone[1]).total) > 1e-4


def test_all_places_see_each_other_and_padding_is_not_seen() -> None:
    model = tiny_llada()
    tokens = torch.tensor([[3, 1, 4, 1, 5, 0, 0]])
    for place in range(5):
        other = tokens.clone()
        other[0, place] = 9
        assert ((model(tokens) - model(other)).abs().amax(-1) > 1e-6).all()
    padded = model.within(torch.tensor([5]))(tokens)[:, :5]
    torch.testing.assert_close(padded, model(tokens[:, :5]))


def test_score_and_its_error() -> None:
    """Two disjoint sets of draws agree within their errors, which shrink with the root of their number."""
    model, prompts, texts = tiny_llada(), [[3, 4], []], [[5, 6, 7, 8], [9, 2]]
    one, two = (model.score(prompts, texts, BoundScoring(400, seed=seed)) for seed in (0, 1))
    error = (one.standard_error**2 + two.standard_error**2).sqrt()
    assert ((one.total - two.total).abs() < 4 * error).all() and (one.total != two.total).all()
    ratio = model.score(prompts, texts, BoundScoring(25)).standard_error / one.standard_error
    assert (ratio > 4 / 1.6).all() and (ratio < 4 * 1.6).all()
    assert one.kind == "bound" and one.num_tokens.tolist() == [4, 2]


def test_score_is_the_mean_over_all_masks() -> None:
    """Of two tokens, after a prompt that is never masked, by enumeration."""
    model, text = tiny_llada(), torch.tensor([[3, 4, 9, 2]])
    exact = 0.0
    for mask in ([True, False], [False, True], [True, True]):
        hidden = torch.tensor([[False, False, *mask]])
        logits = model(text.masked_fill(hidden, VOCABULARY)).log_softmax(-1)
        found = sum(logits[0, 2 + i, text[0, 2 + i]].item() for i in range(2) if mask[i])
        exact += found * 2 / sum(mask) / 2 / (1 if all(mask) else 2)
    score = model.score([[3, 4]], [[9, 2]], BoundScoring(600))
    assert abs(score.total.item() - exact) < 4 * score.standard_error.item()


def test_scores_do_not_depend_on_the_batch() -> None:
    model = tiny_llada()
    prompts, texts, ids = [[3, 4], [], [1, 2, 3, 4, 5]], [[5, 6, 7], [9, 2], [8]], [4, 7, 2]
    whole = model.score(prompts, texts, BoundScoring(6, rows=5), ids=ids)
    for i in range(3):
        alone = model.score(prompts[i : i + 1], texts[i : i + 1], BoundScoring(6), ids=ids[i : i + 1])
        torch.testing.assert_close(alone.total[0], whole.total[i])
        torch.testing.assert_close(alone.standard_error[0], whole.standard_error[i])
    assert model.score([[]], [[1, 2]], BoundScoring(1)).standard_error.isnan().all()


@pytest.mark.parametrize(
    ("prompt", "text", "samples", "message"),
    [([], [], 1, "empty"), ([VOCABULARY], [1], 1, "outside"), ([1], [-1], 1, "outside"), ([1], [1], 0, "at least 1")],
)
def test_what_cannot_be_scored(prompt: list[int], text: list[int], samples: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_llada().score([prompt], [text], BoundScoring(samples))
