"""DiagonalGaussian against torch.distributions and Monte Carlo."""

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Independent, Normal, kl_divergence

from opencola.vae.gaussian import DiagonalGaussian


def gaussian(seed: int) -> DiagonalGaussian:
    generator = torch.Generator().manual_seed(seed)
    mean, logvar = torch.randn(2, 2, 3, 4, generator=generator, dtype=torch.float64)
    return DiagonalGaussian(mean, logvar)


def reference(q: DiagonalGaussian) -> Independent:
    return Independent(Normal(q.mean, torch.exp(q.logvar) ** 0.5), 1)


STANDARD = DiagonalGaussian(torch.zeros(2, 3, 4).double(), torch.zeros(2, 3, 4).double())


def close(a: Tensor, b: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


def test_samples_have_the_mean_and_variance() -> None:
    q = gaussian(0)
    assert torch.equal(q.sample(torch.zeros_like(q.mean)), q.mean)
    samples = q.sample(torch.randn(40_000, 2, 3, 4).double())
    sigma = torch.exp(q.logvar / 2)
    close((samples.mean(0) - q.mean) / sigma, torch.zeros_like(sigma), 0.02)
    close(samples.var(0) / sigma**2, torch.ones_like(sigma), 0.04)


def test_log_density_and_entropy() -> None:
    q, z = gaussian(0), torch.randn(2, 3, 4).double()
    close(q.log_prob(z), reference(q).log_prob(z))
    close(q.entropy(), reference(q).entropy())


@pytest.mark.parametrize("other", [None, gaussian(1)], ids=["standard", "other"])
def test_kl_in_closed_form_and_by_samples(other: DiagonalGaussian | None) -> None:
    q, p = gaussian(0), other or STANDARD
    close(q.kl(other), kl_divergence(reference(q), reference(p)))
    z = q.sample(torch.randn(100_000, 2, 3, 4).double())
    ratios = q.log_prob(z) - p.log_prob(z)
    assert ((ratios.mean(0) - q.kl(other)).abs() < 5 * ratios.std(0) / math.sqrt(len(z))).all()
    close(q.kl(q), torch.zeros(2, 3).double())


def test_negative_entropy_is_kl_less_cross_entropy_to_the_standard_normal() -> None:
    q = gaussian(0)
    second_moment = (q.mean**2 + torch.exp(q.logvar)).sum(-1)
    close(-q.entropy(), q.kl() - 0.5 * (second_moment + 4 * math.log(2 * math.pi)))


def test_logsnr_is_a_ratio_of_means_over_everything() -> None:
    q = gaussian(0)
    signal = sum(mu**2 for mu in q.mean.flatten().tolist())
    noise = sum(math.exp(v) for v in q.logvar.flatten().tolist())
    assert q.logsnr().item() == pytest.approx(math.log(signal / noise), abs=1e-12)
