"""Scores against closed forms, brute force, enumeration, and themselves alone."""

import math
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from tiny import one_block, tiny_cola, tiny_vae
from torch import Tensor

from opencola.flow.likelihood import Likelihood, log_density
from opencola.models.cola.importance import estimate
from opencola.models.cola.model import Cola
from opencola.models.cola.score import Scoring, evaluate, log_prior
from opencola.models.language_model import Score
from opencola.vae.gaussian import DiagonalGaussian

FAST = Scoring(solver="euler", steps=2, samples=3, divergence="exact")
TEXTS = [[3, 1, 4, 1, 5, 9, 2], [6, 5], [3, 5, 8, 9, 7, 9, 3, 2, 3, 8, 4, 6, 2]]
PROMPTS = [[1, 2, 3, 4, 5], [], [9, 8, 7, 6]]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def linear_gaussian(samples: int, spread: float) -> tuple[Tensor, float, float]:
    """log w of x = 1.3 z + 0.7 e in one dimension, z ~ N(0, 1) by its flow; log p(x); KL(q || posterior).

    spread: of q over the true posterior, at whose mean it is not, unless spread is 1.
    """
    x, a, s = 0.8, 1.3, 0.7
    variance = 1 / (1 + a * a / s**2)
    mean = variance * a * x / s**2
    posterior = DiagonalGaussian(*(torch.full((1, 1, 1), value).double() for value in (mean, math.log(variance))))
    q = DiagonalGaussian(posterior.mean + 0.5 * math.log(spread), posterior.logvar + 2 * math.log(spread))
    z = q.sample(normal(samples, 1, 1))
    flow = Likelihood(solver="rk4", steps=20, shift=1.0, divergence="exact")
    prior = log_density(lambda z, t: (2 * t - 1) / ((1 - t) ** 2 + t * t) * z, z, flow).log_prob[:, 0]
    given = DiagonalGaussian(a * z, torch.full_like(z, 2 * math.log(s))).log_prob(torch.full_like(z, x))[:, 0]
    total = -0.5 * (x * x / (a * a + s * s) + math.log(2 * math.pi * (a * a + s * s)))
    return given + prior - q.log_prob(z)[:, 0], total, q.kl(posterior).item()


def test_elbo_is_log_p_less_the_divergence_of_q_from_the_posterior() -> None:
    weights, total, kl = linear_gaussian(20_000, spread=1.6)
    elbo, iwae = estimate(weights, "elbo"), estimate(weights, "iwae")
    assert kl > 0.2 and elbo.standard_error < 0.02
    assert abs(elbo.value - (total - kl)) < 4 * elbo.standard_error
    assert abs(iwae.value - total) < 4 * iwae.standard_error
    weights, total, kl = linear_gaussian(50, spread=1.0)
    torch.testing.assert_close(weights, torch.full_like(weights, total), rtol=0, atol=1e-6)


def test_iwae_is_never_below_elbo_and_rises_with_the_samples() -> None:
    weights, total, _ = linear_gaussian(16_384, spread=1.6)
    means = []
    for count in (1, 2, 4, 16, 64):
        groups = weights.view(-1, count)
        iwae = torch.stack([estimate(group, "iwae").value for group in groups])
        elbo = torch.stack([estimate(group, "elbo").value for group in groups])
        assert (iwae >= elbo - 1e-12).all()
        means.append(iwae.mean().item())
    assert means == sorted(means) and means[0] < means[-1] - 0.1
    assert means[-1] < total + 4 * estimate(weights, "iwae").standard_error


@pytest.mark.parametrize("estimator", ["elbo", "iwae"])
def test_standard_errors_are_those_of_repetitions(estimator: Any) -> None:
    weights, _, _ = linear_gaussian(25_600, spread=1.2)
    found = [estimate(group, estimator) for group in weights.view(200, 128)]
    repeated = torch.stack([e.value for e in found]).std()
    claimed = torch.stack([e.standard_error for e in found]).mean()
    assert claimed == pytest.approx(repeated.item(), rel=0.2)  # of 200 repetitions: 5 % each standard deviation
    assert torch.isnan(estimate(weights[:1], estimator).standard_error)


def toy(size: int, patch: int = 1) -> Cola:
    """Three tokens, two channels, and a wide posterior, so that weights have few outliers."""
    vae = {"vocab_size": 3, "latent_dim": 2, "latent_scale": 0.8, "latent_shift": 0.2, "patch_size": patch}
    vae |= {"normalise_mean": False}
    if size > 1:
        vae |= {"attention": "block_causal", "block_size": size}
    cola = tiny_cola(vae, {"latent_dim": 2, "block_size": size, "num_layers": 1})
    cola.vae.posterior.weight.data *= 0.2
    cola.vae.posterior.bias.data = torch.tensor([0.2, 0.2, 0.8, 0.8]).double()  # the prior's mean, wider than the prior
    cola.dit.velocity_out.weight.data *= 0.3
    return cola


@pytest.mark.parametrize(
    ("size", "patch", "prompt", "length"),
    [(1, 1, [], 2), (2, 1, [], 2), (2, 1, [], 1), (1, 2, [], 2), (2, 1, [2], 1), (1, 1, [1, 0], 1), (1, 2, [2], 1)],
)
def test_a_language_small_enough_to_enumerate_has_probability_one(
    size: int, patch: int, prompt: list[int], length: int
) -> None:
    """All strings of a length, given a prompt or not, filled up to a block or not; each by 600 weights.

    The tolerance is 4 standard errors of 0.02 to 0.08; what RK4 adds with 6 steps is far below that.
    """
    settings = Scoring(solver="rk4", steps=6, samples=600, divergence="exact")
    strings = [list(string) for string in product(range(3), repeat=length)]
    found = evaluate(toy(size, patch), [prompt] * len(strings), strings, settings)
    weights = torch.stack([evaluation.terms.log_weights for evaluation in found]).exp()
    error = (weights.var(1) / 600).sum().sqrt().item()
    assert error < 0.08
    assert weights.mean(1).sum().item() == pytest.approx(1, abs=4 * error)
    iwae = torch.stack([evaluation.estimate("iwae").value for evaluation in found])
    torch.testing.assert_close(iwae.exp(), weights.mean(1))


@pytest.mark.parametrize("size", [1, 2])
def test_the_density_of_a_latent_given_the_one_before_has_mass_one(size: int) -> None:
    """On a grid, the one before being a block of its own, or pinned in the same."""
    axis = torch.linspace(-7, 7, 57).double()
    grid = torch.cartesian_prod(axis, axis)
    z_0 = torch.stack((torch.tensor([0.5, -1.0]).double().expand_as(grid), grid), dim=1)
    free = torch.tensor([False, True]).expand(len(grid), 2)
    settings = Likelihood(solver="rk4", steps=10, divergence="exact")
    log_prob = log_prior(toy(size), z_0, [(i,) for i in range(len(grid))], settings, free).log_prob[:, -1]
    assert log_prob.exp().sum().item() * 0.25**2 == pytest.approx(1, abs=5e-4)
    alone = -0.5 * grid.square().sum(-1) - math.log(2 * math.pi)
    assert (log_prob - alone).abs().max() > 0.1  # the flow does something


@pytest.mark.parametrize("trunk_layers", [0, 1])
def test_packed_equals_every_block_alone_with_its_history(trunk_layers: int) -> None:
    cola = tiny_cola(dit={"trunk_layers": trunk_layers})
    dit = cola.dit
    z_0, settings = normal(2, 12, 4), Likelihood(solver="rk4", steps=3, divergence="exact")
    free = torch.ones(2, 12, dtype=torch.bool)
    free[1, :6] = False  # a block, and two latents of the next
    packed = log_prior(cola, z_0, [(0,), (1,)], settings, free).log_prob
    for sample in range(2):
        for block in range(3):
            rows = slice(4 * block, 4 * block + 4)
            moving = free[sample, rows]

            def velocity(
                z: Tensor, t: float, sample: int = sample, block: int = block, moving: Tensor = moving
            ) -> Tensor:
                return one_block(dit, z_0[sample, : 4 * block], z[0, 0], t * moving.double())[None, None]

            mask = moving[None, None, :, None].expand(1, 1, 4, 4)
            alone = log_density(velocity, z_0[sample, rows][None, None], settings, free=mask).log_prob
            assert packed[sample, block].item() == pytest.approx(alone.item(), abs=1e-9)
    assert packed[1, 0] == 0 and packed[1, 1] != 0


def test_hutchinson_agrees_with_the_exact_divergence_of_the_model() -> None:
    cola, z_0 = tiny_cola(), normal(2, 8, 4)
    settings = Likelihood(solver="euler", steps=4, probes=200)
    found = log_prior(cola, z_0, [(0,), (1,)], settings)
    exact = log_prior(cola, z_0, [(0,), (1,)], replace(settings, divergence="exact")).log_prob
    error = found.by_probe.std(0) / 200**0.5
    assert (found.log_prob - exact).abs().max() > 0 and error.max() < 1
    assert ((found.log_prob - exact).abs() < 4 * error).all()


@pytest.mark.parametrize("conditional", ["joint", "blockwise", "first_block"])
@pytest.mark.parametrize("fields", [{}, {"divergence": "hutchinson"}, {"solver": "dopri5", "tolerance": 1.0}])
def test_alone_as_in_a_batch(conditional: Any, fields: dict[str, Any]) -> None:
    cola = tiny_cola(vae={"patch_size": 2})
    cola.dit.velocity_out.weight.data *= 0.1  # random velocities are rough, and dopri5 takes care
    settings = replace(FAST, conditional=conditional, rows=100, **fields)
    together = cola.score(PROMPTS, TEXTS, settings, ids=[4, 7, 5])
    by_two = cola.score(PROMPTS, TEXTS, replace(settings, rows=6), ids=[4, 7, 5])
    for place, id_ in enumerate([4, 7, 5]):
        alone = cola.score([PROMPTS[place]], [TEXTS[place]], settings, ids=[id_])
        for batch in (together, by_two):
            assert batch.total[place].item() == pytest.approx(alone.total.item(), rel=1e-9)
            assert batch.standard_error[place].item() == pytest.approx(alone.standard_error.item(), rel=1e-6)
    assert len(together.total.unique()) == 3
    assert together.total[0] != cola.score(PROMPTS[:1], TEXTS[:1], settings, ids=[8]).total[0]


def test_parts_add_up_to_the_elbo_and_blocks_to_parts() -> None:
    cola = tiny_cola(vae={"patch_size": 2, "latent_scale": 0.5})
    for conditional in ("joint", "blockwise"):
        settings = replace(FAST, conditional=conditional, estimator="elbo")
        score, found = (f(cola, PROMPTS, TEXTS, settings) for f in (Cola.score, evaluate))
        torch.testing.assert_close(sum(score.parts.values()), score.total)
        assert score.num_tokens.tolist() == [7, 2, 13] == [e.num_tokens for e in found]
        terms = found[2].terms
        assert terms.decoder.shape == (3, 24) and terms.posterior.shape == (3, 12) and terms.prior.shape == (3, 3)
        torch.testing.assert_close(sum(x.sum() for x in terms.by_block().values()), terms.log_weights.mean())
    # two whole latents of the prompt are known, and none of its tokens is scored
    assert (terms.posterior[:, :2] == 0).all() and (terms.posterior[:, 2:] != 0).all()
    assert (
        (terms.decoder[:, :4] == 0).all() and (terms.decoder[:, 4:17] != 0).all() and (terms.decoder[:, 17:] == 0).all()
    )


def test_joint_less_prefix_is_what_the_continued_blocks_add() -> None:
    cola, settings = tiny_cola(), replace(FAST, conditional="joint", estimator="elbo")
    prompt, text = TEXTS[2][:8], TEXTS[0]  # two whole blocks
    joint = cola.score([prompt], [text], settings)
    (whole,) = evaluate(cola, [[]], [prompt + text], settings)
    added = sum(x[2:].sum() for x in whole.terms.by_block().values())
    assert joint.total.item() == pytest.approx(added.item(), rel=1e-9)
    before = cola.score([[]], [prompt], settings)
    both = cola.score([[]], [prompt + text], settings)
    assert joint.total.item() == pytest.approx((both.total - before.total).item(), rel=1e-9)
    assert joint.standard_error < both.standard_error + before.standard_error


def test_the_first_block_is_scored_as_the_first_of_more() -> None:
    cola = tiny_cola()
    first = cola.score(PROMPTS[:1], TEXTS[:1], replace(FAST, conditional="first_block", estimator="elbo"))
    (more,) = evaluate(cola, PROMPTS[:1], TEXTS[:1], replace(FAST, conditional="blockwise"))
    assert first.num_tokens.tolist() == [3]
    of_block = sum(x[1] for x in more.terms.by_block().values())
    assert first.total.item() == pytest.approx(of_block.item(), rel=1e-9)


def test_kinds_and_labels() -> None:
    cola = tiny_cola()

    def of(prompt: list[int], **fields: Any) -> Score:
        return cola.score([prompt], [[1]], replace(FAST, **fields))

    noisy = {"divergence": "hutchinson"}
    assert of([]).kind == of([2]).kind == of([], estimator="elbo", **noisy).kind == "bound"
    assert of([], samples=1, **noisy).kind == "bound"
    assert of([], **noisy).kind == of([2], conditional="joint").kind == "estimate"
    assert of([2]).estimator == "IWAE, K = 3, euler, 2 steps (shift 0.2), exact divergence, blockwise"
    label = of([], estimator="elbo", solver="dopri5", tolerance=0.1, probes=2, **noisy).estimator
    assert label == "ELBO, K = 3, dopri5, tolerance 0.1, 2 rademacher probes"
    score = cola.score([[]], [[1, 2]], FAST)
    assert score.perplexity().item() == pytest.approx(math.exp(-score.total.item() / 2))


def test_mistakes() -> None:
    cola = tiny_cola()
    with pytest.raises(ValueError, match="continuation 1 is empty"):
        cola.score([[], [1]], [[1], []], FAST)
    with pytest.raises(ValueError, match=r"text 0 has a token id outside 0\.\.29"):
        cola.score([[30]], [[1]], FAST)
    with pytest.raises(ValueError, match="samples must be at least 1, but is 0"):
        replace(FAST, samples=0)
    with pytest.raises(ValueError, match="10 latents are not a multiple of block_size 4"):
        log_prior(cola, normal(1, 10, 4), [(0,)], FAST)
    cola.vae = tiny_vae(variational=False)
    with pytest.raises(ValueError, match="variational is false"):
        cola.score([[]], [[1]], FAST)
