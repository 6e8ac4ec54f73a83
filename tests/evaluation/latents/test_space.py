"""Closed forms of how latents are used, against samples, torch's own divergences, and cases that are known."""

import math

import pytest
import torch
from torch.distributions import MultivariateNormal, Normal, kl_divergence

from opencola.evaluation.latents import space
from opencola.evaluation.latents.space import Posteriors


def some(count: int, dim: int = 3) -> Posteriors:
    mean = torch.randn(count, dim, dtype=torch.float64) * torch.tensor([2.0, 1.0, 0.05])[:dim] + 0.3
    return Posteriors(mean, torch.rand(count, dim, dtype=torch.float64) + 0.05, torch.arange(count))


def test_rates_are_the_divergence_of_every_channel() -> None:
    one = some(7)
    exact = kl_divergence(Normal(one.mean, one.variance.sqrt()), Normal(torch.zeros(()), torch.ones(())))
    assert torch.allclose(one.rates(), exact, rtol=1e-12)


def test_divergence_of_a_gaussian() -> None:
    root = torch.randn(4, 4, dtype=torch.float64)
    mean, covariance = torch.randn(4, dtype=torch.float64), root @ root.T + torch.eye(4)
    standard = MultivariateNormal(torch.zeros(4, dtype=torch.float64), torch.eye(4, dtype=torch.float64))
    exact = float(kl_divergence(MultivariateNormal(mean, covariance), standard))
    assert space.gaussian_divergence(mean, covariance) == pytest.approx(exact, rel=1e-10)
    assert space.gaussian_divergence(torch.zeros(4), torch.eye(4)) == pytest.approx(0, abs=1e-6)


def test_moments_are_those_of_samples_of_the_mixture() -> None:
    few = some(5)
    found = space.moments(few)
    z = few.mean + few.variance.sqrt() * torch.randn(200_000, *few.mean.shape, dtype=torch.float64)
    z = z.flatten(0, 1)
    assert torch.allclose(found.mean, z.mean(0), atol=0.01)
    assert torch.allclose(found.covariance, z.T.cov(), atol=0.03)
    assert torch.equal(found.variance, found.covariance.diagonal())
    fourth = (z - z.mean(0)).pow(4).mean(0) / z.var(0).square() - 3
    assert torch.allclose(found.excess_kurtosis, fourth, atol=0.02)


def test_one_gaussian_is_no_mixture() -> None:
    alike = Posteriors(torch.full((6, 2), 0.5).double(), torch.full((6, 2), 0.25).double(), torch.arange(6))
    found = space.moments(alike)
    assert torch.allclose(found.excess_kurtosis, torch.zeros(2).double(), atol=1e-12)
    assert torch.allclose(found.covariance, 0.25 * torch.eye(2).double())
    assert space.num_active(alike) == 0 and space.participation_ratio(space.spectrum(alike)) == 0
    noise = torch.randn(6, 2, dtype=torch.float64)
    assert torch.allclose(space.index_information(alike, noise), torch.zeros(6).double(), atol=1e-12)


def test_active_channels_by_their_variance() -> None:
    signs = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)[:, None]
    deviations = torch.tensor([1.0, 0.101, 0.099, 0.0], dtype=torch.float64)  # variances on either side of 0.01
    one = Posteriors(5 + signs * deviations, torch.ones(4, 4).double(), torch.arange(4))
    assert space.num_active(one) == 2


@pytest.mark.parametrize(("scales", "expected"), [((1, 1, 1, 1), 4), ((1, 1, 0, 0), 2), ((3, 0, 0, 0), 1)])
def test_participation_ratio_counts_the_axes(scales: tuple[int, ...], expected: int) -> None:
    turn, _ = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))
    axes = torch.tensor(scales, dtype=torch.float64).diag()
    mean = torch.cat([axes, -axes]) @ turn  # the spectrum does not know of the turn
    eigenvalues = space.spectrum(Posteriors(mean, torch.ones_like(mean), torch.arange(8)))
    assert eigenvalues.tolist() == pytest.approx([2 * scale**2 / 8 for scale in scales], abs=1e-12)
    assert space.participation_ratio(eigenvalues) == pytest.approx(expected)


def test_logsnr_and_normalisation() -> None:
    one = Posteriors(torch.full((4, 2), 2.0), torch.full((4, 2), 0.5), torch.arange(4))
    assert one.logsnr() == pytest.approx(math.log(4 / 0.5))
    seen = one.normalised(1.0, 3.0)
    assert seen.mean.unique().item() == 3 and seen.variance.unique().item() == 4.5


def test_information_against_brute_force() -> None:
    one, noise = some(1100), torch.randn(1100, 3, dtype=torch.float64)  # more than two chunks
    z = one.mean + one.variance.sqrt() * noise
    under = Normal(one.mean, one.variance.sqrt())
    every = under.log_prob(z[:, None]).sum(-1)
    expected = every.diagonal() - (every.logsumexp(-1) - math.log(1100))
    assert torch.allclose(space.index_information(one, noise), expected, atol=1e-9)


def test_information_of_posteriors_far_apart_is_ln_of_their_number() -> None:
    mean = torch.arange(8, dtype=torch.float64)[:, None] * 100
    apart = Posteriors(mean.repeat_interleave(5, 0), torch.ones(40, 1).double(), torch.arange(40))
    information = space.index_information(apart, torch.randn(40, 1, dtype=torch.float64))
    assert information.tolist() == pytest.approx([math.log(8)] * 40)


def test_the_bound_is_below_the_divergence() -> None:
    """Two narrow peaks: KL(q || N(0, 1)) by quadrature lies above what their Gaussian shows."""
    two = Posteriors(torch.tensor([[-1.0], [1.0]]).double(), torch.full((2, 1), 0.01).double(), torch.arange(2))
    found = space.moments(two)
    z = torch.linspace(-4, 4, 20_001, dtype=torch.float64)
    log_q = Normal(two.mean, two.variance.sqrt()).log_prob(z).logsumexp(0) - math.log(2)
    exact = float(torch.trapezoid(log_q.exp() * (log_q - Normal(0.0, 1.0).log_prob(z)), z))
    assert 0 <= space.gaussian_divergence(found.mean, found.covariance) < exact
    noise = torch.randn(2, 1, dtype=torch.float64)
    estimate = two.rates().sum() / 2 - space.index_information(two, noise).mean()
    assert float(estimate) == pytest.approx(exact, abs=1e-6), "the mixture is all there is, so the estimate is exact"
