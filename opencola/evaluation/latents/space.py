"""How a Text VAE uses its latents: rates, moments of the aggregated posterior, and how far that is from N(0, I).

M latents of d channels, all in float64. q(z) is the aggregated posterior: the equal mixture of the M posteriors, whose
moments are known in closed form. Rates and divergences are in nats.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

ACTIVE_VARIANCE = 0.01
"""A channel whose posterior means vary less is not in use (Burda et al. 2016, section 5.2)."""
CHUNK = 512  # latents whose densities under all posteriors are held at a time


@dataclass(frozen=True)
class Posteriors:
    """M posteriors N(mean, variance), both (M, d); `sequence` (M,) int64 is the number of the text each belongs to."""

    mean: Tensor
    variance: Tensor
    sequence: Tensor

    def normalised(self, shift: float, scale: float) -> "Posteriors":
        """As the prior sees them: (z - shift) * scale."""
        return Posteriors((self.mean - shift) * scale, self.variance * scale**2, self.sequence)

    def logsnr(self) -> float:
        """log(mean of mu² / mean of sigma²) over everything (model.md §2)."""
        return float(torch.log(self.mean.square().mean() / self.variance.mean()))

    def rates(self) -> Tensor:
        """KL(q(z | x) || N(0, I)) per latent and channel: (M, d)."""
        return 0.5 * (self.variance + self.mean.square() - 1 - self.variance.log())


@dataclass(frozen=True)
class Moments:
    """Of the aggregated posterior: per channel `mean`, `variance` and excess kurtosis (0 for a Gaussian), all (d,), and
    the `covariance` (d, d)."""

    mean: Tensor
    variance: Tensor
    excess_kurtosis: Tensor
    covariance: Tensor


def moments(posteriors: Posteriors) -> Moments:
    """Exact moments of the mixture: no samples are drawn."""
    mean = posteriors.mean.mean(0)
    apart = posteriors.mean - mean
    covariance = apart.T @ apart / len(apart) + posteriors.variance.mean(0).diag()
    own = posteriors.variance
    fourth = (apart**4 + 6 * apart.square() * own + 3 * own.square()).mean(0)
    variance = covariance.diagonal()
    return Moments(mean, variance, fourth / variance.square() - 3, covariance)


def gaussian_divergence(mean: Tensor, covariance: Tensor) -> float:
    """KL(N(mean, covariance) || N(0, I)).

    Of a q(z) with these moments, the part of KL(q(z) || N(0, I)) that a Gaussian shows: the rest, KL(q(z) || N(mean,
    covariance)), is never negative, so this is a lower bound.
    """
    logdet = torch.linalg.slogdet(covariance).logabsdet
    return float(0.5 * (covariance.trace() + mean.square().sum() - len(mean) - logdet))


def spectrum(posteriors: Posteriors) -> Tensor:
    """Eigenvalues (d,) of the covariance of the posterior means, the largest first."""
    apart = posteriors.mean - posteriors.mean.mean(0)
    return torch.linalg.eigvalsh(apart.T @ apart / len(apart)).flip(0).clamp(min=0)


def participation_ratio(eigenvalues: Tensor) -> float:
    """(sum of eigenvalues)² / sum of their squares: the number of dimensions if all were used alike."""
    total = eigenvalues.sum().square()
    return float(total / eigenvalues.square().sum()) if total > 0 else 0.0


def num_active(posteriors: Posteriors) -> int:
    """Channels whose posterior means vary by more than `ACTIVE_VARIANCE` from latent to latent."""
    return int((posteriors.mean.var(0, correction=0) > ACTIVE_VARIANCE).sum())


def index_information(posteriors: Posteriors, noise: Tensor) -> Tensor:
    """log q(z | x_m) - log q(z) for a sample z of each of the M posteriors, made from noise (M, d): (M,).

    The mean estimates the information between z and the number of its posterior, the first part of the mean rate in
    Hoffman and Johnson's decomposition (2016), rate = information + KL(q(z) || p); it cannot exceed ln M, so that with
    few latents the second part comes out too large. Costs M² d operations.
    """
    precision = 1 / posteriors.variance
    weighted = posteriors.mean * precision
    constant = -0.5 * (posteriors.mean * weighted - precision.log()).sum(-1)
    z = posteriors.mean + posteriors.variance.sqrt() * noise
    own = -0.5 * (noise.square().sum(-1) - precision.log().sum(-1))  # without the 2 pi, as below
    mixture = torch.cat(
        [(constant + part @ weighted.T - 0.5 * part.square() @ precision.T).logsumexp(-1) for part in z.split(CHUNK)]
    )
    return own - mixture + math.log(len(z))
