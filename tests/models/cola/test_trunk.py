"""A trunk that predicts: its loss, its exact probabilities, and texts that it checks, against brute force."""

from collections import Counter
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from scipy.stats import chi2
from tiny import VOCABULARY, one_block, tiny_batch, tiny_cola
from torch import Tensor

from opencola.layers import randomness
from opencola.models.cola.model import Cola
from opencola.models.cola.sampling import ColaSampling
from opencola.models.cola.score import Scoring
from opencola.models.cola.verify import accept
from opencola.models.sampling import penalise
from opencola.models.stopping import Text

TRUNK = Scoring(estimator="trunk")
PROMPTS = [[1, 2, 3, 4], [], [7, 1, 0, 4, 2, 2, 8]]


def predicting(vocab_size: int = VOCABULARY, block_size: int = 4, **prior: Any) -> Cola:
    """Three layers, two of them the trunk's."""
    dit = {"num_layers": 3, "trunk_layers": 2, "vocab_size": vocab_size, "block_size": block_size}
    return tiny_cola({"vocab_size": vocab_size}, dit, lambda_ar=0.7, strategy="fixed", lambda_ref=0.0, **prior)


@torch.no_grad()
def logits_of(model: Cola, text: list[int]) -> Tensor:
    """Of the token that follows a text (V,), from nothing."""
    head = model.dit.next_token
    assert head is not None
    if not text:
        return head(head.start)
    z = model.vae.normalise(model.vae.encode(torch.tensor([text])).mean)
    return head(model.dit.read_text(z))[0, -1]


def probabilities(model: Cola, text: list[int]) -> Tensor:
    """The same as probabilities."""
    return logits_of(model, text).softmax(-1)


def write(model: Cola, prompts: list[list[int]], **fields: Any) -> tuple[list[list[int]], int]:
    """New tokens of each prompt, and the number of cycles."""
    ids = fields.pop("ids", range(len(prompts)))
    texts: list[list[int]] = [[] for _ in prompts]
    cycles = 0
    for blocks in model.generate(prompts, ColaSampling(**{"steps": 1, "guidance": 1.0} | fields), ids=ids):
        cycles += 1
        for block in blocks:
            texts[block.sample] += block.tokens
    return texts, cycles


def test_the_loss_is_the_mean_cross_entropy_of_all_tokens_given_those_before() -> None:
    model, batch = predicting(), tiny_batch()
    losses, posterior = model.loss(batch), model._frozen_posterior(batch)[1]
    head = model.dit.next_token
    assert head is not None
    nats = []
    for row, tokens in enumerate(batch.tokens.tolist()):
        for place, token in enumerate(tokens):
            before = model.vae.normalise(posterior[row : row + 1, :place])
            features = model.dit.read_text(before) if place else torch.zeros(1, 0, model.dit.config.width).double()
            nats.append(-head.out(head.features(features))[0, -1].log_softmax(-1)[token])
    torch.testing.assert_close(losses.terms["next_token"], 0.7 * torch.stack(nats).mean(), rtol=1e-10, atol=0)


def test_the_loss_moves_the_trunk_and_not_the_latents() -> None:
    model, batch = predicting(), tiny_batch()
    z_0 = torch.randn(3, 12, 4).double().requires_grad_()
    loss, _ = model.next_token(model.dit.read_text(z_0[:, :-1]), batch)
    names = [name for name, _ in model.dit.named_parameters()]
    gradients = torch.autograd.grad(loss, [z_0, *model.dit.parameters()], allow_unused=True)
    moved = {name for name, gradient in zip(["z_0", *names], gradients, strict=True) if gradient is not None}
    assert {"next_token.start", "next_token.out.weight", "latent_in.weight", "blocks.1.mlp_out.weight"} <= moved
    assert not any(name.startswith(("z_0", "blocks.2", "velocity_out", "final")) for name in moved)


@pytest.mark.parametrize("prompt", [[], [2, 0]])
def test_the_probabilities_of_all_texts_of_a_length_add_up_to_one(prompt: list[int]) -> None:
    model = predicting(3)
    texts = [list(text) for text in product(range(3), repeat=4)]
    score = model.score([prompt] * len(texts), texts, TRUNK)
    assert score.kind == "exact" and score.estimator == "exact, of the trunk"
    assert score.total.exp().sum().item() == pytest.approx(1, abs=1e-12)
    one_by_one = [
        sum(float(probabilities(model, prompt + text[:place])[text[place]].log()) for place in range(4))
        for text in texts
    ]
    assert score.total.tolist() == pytest.approx(one_by_one, rel=1e-10)
    assert score.total.std() > 0.1


@pytest.mark.parametrize("block_size", [1, 2, 4, 7])
@pytest.mark.parametrize("fields", [{"repetition_penalty": 1.7}, {"steps": 3, "guidance": 2.0, "solver": "stochastic"}])
def test_greedy_verification_gives_the_trunks_greedy_text(block_size: int, fields: dict[str, Any]) -> None:
    model = predicting(block_size=block_size)
    expected = []
    for prompt in PROMPTS:
        text = list(prompt)
        for _ in range(15):
            penalty = fields.get("repetition_penalty", 1.0)
            text.append(int(penalise(logits_of(model, text)[None, None], [text], [penalty]).argmax()))
        expected.append(text[len(prompt) :])
    together, cycles = write(model, PROMPTS, verify="greedy", max_new_tokens=15, **fields)
    assert together == expected
    assert cycles == 15 if block_size == 1 else cycles <= 15
    alone = [write(model, [prompt], verify="greedy", max_new_tokens=15, **fields)[0][0] for prompt in PROMPTS]
    assert alone == expected


@pytest.mark.parametrize("fields", [{}, {"temperature": 0.6}, {"temperature": 1.5, "top_k": 2}], ids=str)
def test_lossless_verification_has_the_trunks_distribution(fields: dict[str, Any]) -> None:
    """All texts of three tokens out of three, by Pearson's statistic; a text's chance to fail is 1e-4."""
    model, number = predicting(3, block_size=3), 3000
    fields = {"temperature": 1.0} | fields
    found, _ = write(model, [[1]] * number, ids=range(number), verify="lossless", max_new_tokens=3, steps=1, **fields)
    counts = Counter(tuple(text) for text in found)
    statistic, cells = 0.0, 0
    for text in product(range(3), repeat=3):
        p = 1.0
        for place in range(3):
            q = probabilities(model, [1, *text[:place]]).log() / fields["temperature"]
            if "top_k" in fields:
                q = q.masked_fill(q < q.topk(fields["top_k"]).values[-1], -torch.inf)
            p *= float(q.softmax(-1)[text[place]])
        if p == 0:
            assert counts[text] == 0
            continue
        statistic += (counts[text] - number * p) ** 2 / (number * p)
        cells += 1
    assert statistic < chi2.ppf(1 - 1e-4, cells - 1)


@pytest.mark.parametrize("drafted", range(4))
def test_what_follows_a_draft_is_distributed_as_if_there_were_none(drafted: int) -> None:
    """One place, whose draft is certain: kept or replaced, by many samples' draws."""
    number = 4000
    p = torch.tensor([0.05, 0.2, 0.35, 0.4]).double()
    logits = p.log().expand(number, 2, 4).clone()
    tokens = torch.tensor([[0, drafted]]).expand(number, 2)
    sampling = ColaSampling(verify="lossless", temperature=1.0)
    kept, following = accept(logits, tokens, [Text([], sampling, id=i) for i in range(number)])
    chosen = torch.tensor([drafted if count == 2 else int(token) for count, token in zip(kept, following, strict=True)])
    share = (torch.tensor(kept) == 2).double().mean().item()
    assert share == pytest.approx(float(p[drafted]), abs=4 * float((p[drafted] * (1 - p[drafted]) / number).sqrt()))
    counts = torch.bincount(chosen, minlength=4).double()
    assert ((counts - number * p).square() / (number * p)).sum() < chi2.ppf(1 - 1e-4, 3)
    alone = accept(logits[5:6], tokens[5:6], [Text([], sampling, id=5)])
    assert alone[0][0] == kept[5] and alone[1][0] == following[5]


def test_typical_verification_keeps_what_does_not_surprise() -> None:
    logits = torch.tensor([0.6, 0.3, 0.06, 0.04]).double().log().expand(4, 2, 4)
    tokens = torch.tensor([[0, drafted] for drafted in range(4)])
    # exp(-entropy) is 0.394, and 0.6 of it less than 0.3
    for fields, expected in (
        ({}, [2, 2, 1, 1]),
        ({"typical_epsilon": 0.05}, [2, 2, 2, 1]),
        ({"typical_delta": 0.1}, [2, 2, 2, 2]),
        ({"typical_epsilon": 0.5, "typical_delta": 9.0}, [2, 1, 1, 1]),
    ):
        sampling = ColaSampling(verify="typical", **fields)
        kept, following = accept(logits, tokens, [Text([], sampling, id=i) for i in range(4)])
        assert kept == expected and (following == 0).all()


def test_what_nothing_refuses_is_the_draft() -> None:
    """Cycles of S tokens, the first of each the trunk's choice."""
    model = predicting(block_size=4)
    texts, cycles = write(model, PROMPTS, verify="typical", typical_epsilon=0.0, max_new_tokens=12)
    assert cycles == 3
    for prompt, text in zip(PROMPTS, texts, strict=True):
        for first in range(0, 12, 4):
            assert text[first] == int(probabilities(model, prompt + text[:first]).argmax())
    greedy, _ = write(model, PROMPTS, verify="greedy", max_new_tokens=12)
    assert greedy != texts


@pytest.mark.parametrize("verify", ["lossless", "typical"])
def test_checked_texts_are_the_same_alone_and_in_any_batch(verify: Any) -> None:
    model, ids = predicting(), [40, 3, 8]
    fields: dict[str, Any] = {"verify": verify, "temperature": 1.0, "max_new_tokens": 11, "guidance": 2.0}
    together, _ = write(model, PROMPTS, ids=ids, **fields)
    for place, number in enumerate(ids):
        assert write(model, [PROMPTS[place]], ids=[number], **fields)[0] == [together[place]]
    swapped, _ = write(model, PROMPTS[::-1], ids=ids[::-1], **fields)
    assert swapped == together[::-1]
    assert write(model, PROMPTS, ids=ids, seed=1, **fields)[0] != together


@pytest.mark.parametrize("block_size", [1, 3])
def test_the_candidate_that_the_trunk_finds_most_probable_is_kept(block_size: int) -> None:
    """Each block against its candidates, found by drawing with as many of them, the trunk reading their latents."""
    model, prompt = predicting(block_size=block_size, history_dropout=0.0), [3, 1, 4, 1, 5]
    vae, dit, size = model.vae, model.dit, block_size
    head = dit.next_token
    assert head is not None
    sampling = ColaSampling(steps=2, guidance=1.0, candidates=5, rank="trunk", max_new_tokens=3 * size)
    found, first = (
        [token for blocks in model.generate([prompt], s, ids=[9]) for token in blocks[0].tokens]
        for s in (sampling, replace(sampling, candidates=1))
    )
    z = vae.normalise(vae.encode(torch.tensor([prompt])).mean)
    expected: list[int] = []
    for number in range(3):
        best = None
        for candidate in range(5):
            x = torch.randn(size, 4, generator=randomness.generator(0, "noise", 9, number, candidate)).double()
            for step in range(2):
                x = x - one_block(dit, z[0], x, torch.full((size,), 1 - step / 2).double()) / 2
            whole = torch.cat((z, x[None]), 1)
            tokens = vae.decode(vae.denormalise(whole))[0, -size:].argmax(-1)
            logits = head(dit.read_text(whole[:, :-1]))[0, -size:]
            merit = logits.detach().log_softmax(-1).gather(-1, tokens[:, None]).sum().item()
            if best is None or merit > best[0]:
                best = merit, whole, tokens.tolist()
        assert best is not None
        z, expected = best[1], expected + best[2]
    assert found == expected != first


def test_what_cannot_be_checked_is_refused() -> None:
    plain = tiny_cola(dit={"trunk_layers": 1})
    with pytest.raises(ValueError, match="verify greedy: this prior has no trunk that predicts"):
        next(plain.generate([[1]], ColaSampling(verify="greedy")))
    with pytest.raises(ValueError, match="rank trunk: this prior has no trunk that predicts"):
        next(plain.generate([[1]], ColaSampling(rank="trunk", candidates=2)))
    with pytest.raises(ValueError, match="compatibility release: it has no trunk, but this prior has one of 1"):
        next(plain.generate([[1]], ColaSampling(compatibility="release")))
    with pytest.raises(ValueError, match="estimator trunk: this prior has no trunk that predicts"):
        plain.score([[]], [[1]], TRUNK)
    for fields in ({"candidates": 2}, {"compatibility": "release"}):
        with pytest.raises(ValueError, match=f"verify greedy excludes {next(iter(fields))} "):
            ColaSampling(verify="greedy", **fields)
    for parts, message in (
        (({}, {"trunk_layers": 0}, {}, {"lambda_ar": 1.0}), "lambda_ar 1.0 is for a trunk"),
        (({"patch_size": 2}, {"trunk_layers": 1}, {}, {"lambda_ar": 1.0}), "predicts single tokens"),
        (({}, {"trunk_layers": 1, "vocab_size": 7}, {}, {}), "dit.vocab_size 7 differs from vae.vocab_size 30"),
        (({"attention": "block_causal"}, {"trunk_layers": 1}, {}, {}), "reads latents one by one"),
    ):
        vae, dit, objective, prior = parts
        with pytest.raises(ValueError, match=message):
            tiny_cola(vae, dit, objective, **prior)
