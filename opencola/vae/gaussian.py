"""Diagonal Gaussians over latents."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class DiagonalGaussian:
    """N(mean, exp(logvar)) per position and channel; both (B, N, d). Densities in nats, summed over the channels."""

    mean: Tensor
    logvar: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """mean + sigma * noise, noise (B, N, d) standard normal."""
        return self.mean + torch.exp(0.5 * self.logvar) * noise

    def log_prob(self, z: Tensor) -> Tensor:
        """Log-density of z (B, N, d): (B, N)."""
        squared = (z - self.mean).square() * torch.exp(-self.logvar)
        return -0.5 * (squared + self.logvar + math.log(2 * math.pi)).sum(-1)

    def entropy(self) -> Tensor:
        """Differential entropy (B, N)."""
        return 0.5 * (self.logvar + math.log(2 * math.pi) + 1).sum(-1)

    def kl(self, other: "DiagonalGaussian | None" = None) -> Tensor:
        """KL(self || other) in closed form (B, N); other defaults to N(0, I)."""
        if other is None:
            other = DiagonalGaussian(torch.zeros_like(self.mean), torch.zeros_like(self.logvar))
        ratio = torch.exp(self.logvar - other.logvar)
        squared = (self.mean - other.mean).square() * torch.exp(-other.logvar)
        return 0.5 * (ratio + squared - 1 + other.logvar - self.logvar).sum(-1)

    def logsnr(self) -> Tensor:
        """log(mean of mu² / mean of sigma²) over everything (model.md §2): a scalar."""
        return torch.log(self.mean.square().mean() / torch.exp(self.logvar).mean())
