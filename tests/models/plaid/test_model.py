"""Plaid's bound against closed forms, sums over enumerable vocabularies and Gaussians by hand, in float64."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from opencola.data.batch import Batch
from opencola.layers.llama import LlamaConfig
from opencola.models.bounds import BoundScoring
from opencola.models.language_model import Loss
from opencola.models.plaid.generate import ancestral, posterior
from opencola.models.plaid.model import Plaid
from opencola.models.plaid.network import SHAPE_SCALE, NoiseSchedule, PlaidConfig, diffusion_integrand, noised, prior_kl

TRUNK = LlamaConfig(width=16, num_layers=1, num_heads=2, ffn_dim=24)


def plaid(vocab_size: int = 11, embedding_dim: int = 4, self_conditioning: float = 0.5) -> Plaid:
    torch.manual_seed(3)
    return Plaid(PlaidConfig(vocab_size, embedding_dim, TRUNK, self_conditioning)).double()


def batch(num: int = 4, length: int = 6, **fields: Any) -> Batch:
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(11, (num, length), generator=generator)
    return Batch(tokens, torch.arange(num) + 7, seed=1, step=0, **fields)


def bump(schedule: NoiseSchedule) -> None:
    """Away from the symmetric start."""
    with torch.no_grad():
        for name, parameter in schedule.named_parameters():
            if parameter.ndim:
                parameter += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))


def by_bayes(z: Tensor, x: Tensor, gamma_s: float, gamma_t: float) -> tuple[Tensor, float]:
    """q(z_s | z_t, x) as the product of q(z_s | x) and q(z_t | z_s)."""
    var_s, var_t = (1 / (1 + math.exp(-g)) for g in (gamma_s, gamma_t))
    alpha_s, alpha_t = math.sqrt(1 - var_s), math.sqrt(1 - var_t)
    ratio = alpha_t / alpha_s
    var_ts = var_t - ratio**2 * var_s
    var = 1 / (1 / var_s + ratio**2 / var_ts)
    return var * (alpha_s * x / var_s + ratio * z / var_ts), var


def test_gamma_is_monotone_and_its_slope_is_its_derivative() -> None:
    schedule = NoiseSchedule(-3, 6).double()
    bump(schedule)
    t = torch.linspace(0, 1, 401, dtype=torch.float64, requires_grad=True)
    shape, slope = schedule.shape(t)
    gamma = schedule.gamma(shape)
    assert bool((gamma.diff() > 0).all())
    assert gamma[[0, -1]].tolist() == pytest.approx([-3, 6], abs=1e-6)
    (derivative,) = torch.autograd.grad(shape.sum(), t)
    torch.testing.assert_close(slope, derivative, rtol=1e-10, atol=1e-12)
    assert float(slope.detach().std()) > 0.01


def test_embeddings_have_unit_scale() -> None:
    model = plaid()
    with torch.no_grad():
        model.embedding *= 5
    torch.testing.assert_close(model.embeddings().square().mean(-1), torch.ones(11, dtype=torch.float64))


def test_prior_kl_is_the_gaussian_one() -> None:
    x, gamma = torch.randn(2, 3, 4).double(), torch.tensor(1.3).double()
    mean, scale = torch.sigmoid(-gamma).sqrt() * x, torch.sigmoid(gamma).sqrt()
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(mean, scale.expand_as(x)), normal(0 * x, 0 * x + 1))
    torch.testing.assert_close(prior_kl(x, gamma), expected.sum(-1))


def test_reconstruction_is_the_likelihoods_share() -> None:
    """Of the word among all words, from densities of the normal distribution."""
    model = plaid(vocab_size=5)
    table, token = model.embeddings(), 3
    noise = torch.randn(2, 1, 1, 4).double()
    tokens, scored = torch.tensor([[token]]), torch.ones(1, 1, dtype=torch.bool)
    term = model.terms(tokens, scored, torch.tensor([0.5]).double(), noise, [])["reconstruction"]
    gamma = model.schedule.start.item()
    sigma = math.sqrt(1 / (1 + math.exp(-gamma)))
    alpha = math.sqrt(1 - sigma**2)
    z = alpha * table[token] + sigma * noise[0, 0, 0]
    logs = [torch.distributions.Normal(alpha * row, sigma).log_prob(z).sum() for row in table]
    assert term.item() == pytest.approx(-(logs[token] - torch.stack(logs).logsumexp(0)).item(), rel=1e-6)


def test_posterior_is_bayes() -> None:
    z, x = torch.randn(2, 3, 4).double(), torch.randn(2, 3, 4).double()
    mean, variance = posterior(z, x, torch.tensor(0.7).double(), torch.tensor(-1.1).double())
    expected, var = by_bayes(z, x, -1.1, 0.7)
    torch.testing.assert_close(mean, expected)
    assert float(variance) == pytest.approx(var)
    drawn = ancestral(z, x, torch.ones_like(z), torch.tensor(0.7).double(), torch.tensor(-1.1).double())
    torch.testing.assert_close(drawn, expected + math.sqrt(var))


@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
def test_diffusion_integrand_is_the_limit_of_discrete_kls(t: float) -> None:
    """T times the KL of a step of 1 / T between q(z_s | z_t, x) and the same with the estimate."""
    schedule = NoiseSchedule(-3, 6).double()
    bump(schedule)
    steps = 20_000
    times = torch.tensor([t - 0.5 / steps, t, t + 0.5 / steps]).double()
    shape, slope = schedule.shape(times)
    gamma = schedule.gamma(shape).detach()
    x, estimate, z = (torch.randn(1, 2, 4).double() for _ in range(3))
    (mean, var), (guess, _) = (by_bayes(z, y, float(gamma[0]), float(gamma[2])) for y in (x, estimate))
    expected = steps * ((mean - guess).square() / (2 * var)).sum(-1)
    found = diffusion_integrand(x, estimate, gamma[1:2], slope[1:2] * schedule.log_span.exp())
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=0)


def exact_bound(start: float, end: float) -> tuple[Tensor, Tensor]:
    """Bounds (V,) of one-token texts and -log p (V,), of the exact posterior mean, by integration over t and noise."""
    model = plaid(vocab_size=3, embedding_dim=2, self_conditioning=0)
    log_p = torch.tensor([0.6, 0.3, 0.1]).double().log()
    with torch.no_grad():
        model.head.weight.zero_()  # the head's bias and the output prior are Bayes' rule
        model.head.bias.copy_(log_p)
        angles = torch.tensor([0.0, 2.0, 4.5]).double()
        model.embedding.copy_(torch.stack((angles.cos(), angles.sin()), dim=-1))
        model.schedule.start.fill_(start)
        model.schedule.log_span.fill_(math.log(end - start))
    axis = torch.linspace(-6, 6, 37).double()
    grid = torch.cartesian_prod(axis, axis)
    weights = (-0.5 * grid.square().sum(-1)).softmax(0)
    noise = grid[:, None].expand(2, -1, 1, -1)
    count, bounds = 48, []
    for token in range(3):
        tokens, scored = torch.full((len(grid), 1), token), torch.ones(len(grid), 1, dtype=torch.bool)
        total = torch.zeros(()).double()
        for t in (torch.arange(count).double() + 0.5) / count:
            with torch.no_grad():
                terms = model.terms(tokens, scored, t.expand(len(grid)), noise, [])
            total += sum((weights @ value[:, 0] for value in terms.values()), start=0 * total) / count
        bounds.append(total)
    return torch.stack(bounds), -log_p


def test_conditioned_sequences_are_a_share_at_all_times(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[torch.Tensor, list[int]]] = []

    def note(self: Plaid, *arguments: Any, **fields: Any) -> Any:
        asked.append((arguments[2], arguments[4]))
        return whole(self, *arguments, **fields)

    whole = Plaid.terms
    monkeypatch.setattr(Plaid, "terms", note)
    ids = torch.arange(7000, 7400)
    plaid(self_conditioning=0.25).loss(Batch(torch.zeros(400, 1, dtype=torch.long), ids, seed=3, step=0))
    ((t, conditioned),) = asked
    assert abs(len(conditioned) - 100) <= 2
    for quarter in range(4):  # of the times, too: neither decides the other
        both = [place for place in conditioned if int(4 * t[place]) == quarter]
        assert abs(len(both) - 25) <= 4


def test_bound_with_the_exact_posterior_mean_is_tight_with_wide_ends() -> None:
    tight, truth = exact_bound(-7, 10)
    torch.testing.assert_close(tight, truth, rtol=0, atol=1e-3)
    assert bool((tight > truth - 1e-4).all())  # the integration's own error
    loose, _ = exact_bound(-1, 3)  # a model of other p's than the data's: a bound on their entropy only on average
    assert float(torch.exp(-truth) @ (loose - truth)) > 0.01


def test_total_is_the_sum_of_the_terms() -> None:
    loss = plaid().loss(batch())
    assert set(loss.terms) == {"reconstruction", "prior", "diffusion"}
    torch.testing.assert_close(loss.total, torch.stack(list(loss.terms.values())).sum())


def test_parts_of_a_batch_have_the_loss_of_the_whole() -> None:
    model = plaid()
    scored = torch.rand(4, 6, generator=torch.Generator().manual_seed(0)) < 0.6
    whole = batch(scored=scored)
    counts = {name: value / 2 for name, value in model.counts(whole).items()}
    assert int(model.counts(whole)["tokens"]) == int(scored.sum())
    split = [Batch(p.tokens, p.ids, p.seed, p.step, None, p.scored, counts) for p in map(whole.shard, (0, 1), (2, 2))]
    torch.testing.assert_close(Loss.mean([model.loss(part) for part in split]).total, model.loss(whole).total)


def test_gradient_reaches_every_parameter() -> None:
    model = plaid(self_conditioning=1)
    bump(model.schedule)
    model.loss(batch()).total.backward()
    still = [name for name, p in model.named_parameters() if p.grad is None or not float(p.grad.abs().max()) > 0]
    assert still == []


def test_the_shape_descends_its_measure_of_variation_and_the_ends_the_bound() -> None:
    model, one = plaid(self_conditioning=0), batch(1)
    loss = model.loss(one)
    loss.total.backward()
    step = 1e-5
    for parameter, of_shape in ((model.schedule.centre, True), (model.schedule.start, False)):
        assert parameter.grad is not None
        place = parameter.view(-1)[:1]
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                place += sign * step
                moved = model.loss(one)
                place -= sign * step
            value = moved.terms["diffusion"]
            values.append(float(SHAPE_SCALE * value * value.log() if of_shape else moved.total))
        expected = (values[0] - values[1]) / (2 * step)
        assert float(parameter.grad.view(-1)[0]) == pytest.approx(expected, rel=1e-5)


def test_the_ends_learn_slowly() -> None:
    ratios, names = plaid().learning_rate_ratios(), [name for name, _ in plaid().named_parameters()]
    assert all(sum(name.startswith(prefix) for name in names) == 1 and ratio < 1 for prefix, ratio in ratios.items())
    assert {name.split(".")[1] for name in ratios} == {name for name, _ in plaid().schedule.named_parameters()}


def test_documents_do_not_see_each_other() -> None:
    model = plaid(self_conditioning=1)
    documents = torch.tensor([[0, 0, 0, 1, 1, 1]])
    scored = documents == 0
    tokens = batch(1).tokens
    other = torch.where(scored, tokens, (tokens + 1) % 11)
    first, second = (model.loss(Batch(t, torch.tensor([3]), 1, 0, documents, scored)).total for t in (tokens, other))
    torch.testing.assert_close(first, second)
    seen = [model.loss(Batch(t, torch.tensor([3]), 1, 0, None, scored)).total for t in (tokens, other)]
    assert abs(float(seen[0] - seen[1])) > 1e-6


def test_score_is_the_mean_bound() -> None:
    model = plaid()
    one = BoundScoring(samples=64, rows=7)
    score = model.score([[1, 2], []], [[3, 4, 5], [6]], one)
    assert score.kind == "bound" and score.num_tokens.tolist() == [3, 1]
    torch.testing.assert_close(sum(score.parts.values(), start=torch.zeros(2).double()), score.total)
    alone = model.score([[]], [[6]], BoundScoring(samples=64, rows=64), ids=[1])
    torch.testing.assert_close(alone.total, score.total[1:])
    fresh = model.score([[1, 2], []], [[3, 4, 5], [6]], BoundScoring(samples=512, rows=512, seed=9))
    assert bool(((fresh.total - score.total).abs() < 4 * score.standard_error).all())
    assert bool((fresh.standard_error < score.standard_error).all())
    with pytest.raises(ValueError, match="continuation 0 is empty"):
        model.score([[1]], [[]], one)
    with pytest.raises(ValueError, match=r"text 0 has a token id outside 0\.\.10"):
        model.score([[1]], [[11]], one)


def test_noised_has_the_moments_of_q() -> None:
    x, gamma = torch.ones(1, 1, 2).double(), torch.tensor([0.4]).double()
    drawn = noised(x, torch.randn(20_000, 1, 2).double(), gamma)
    assert float(drawn.mean()) == pytest.approx(float(torch.sigmoid(-gamma).sqrt()), abs=0.02)
    assert float(drawn.var()) == pytest.approx(float(torch.sigmoid(gamma)), rel=0.03)
