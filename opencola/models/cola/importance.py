"""Importance weights of posterior samples, and what they say of a text's log-probability (model.md §6).

log w = log p(x | z) + log p(z) - log q(z | x). K samples, G blocks of S latents, P tokens a latent; nats, float64.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Estimator = Literal["elbo", "iwae"]


@dataclass(frozen=True)
class Estimate:
    """A figure in nats, and what each of the K samples adds to its deviation (the delta method)."""

    value: Tensor  # ()
    influence: Tensor  # (K,), mean 0

    @property
    def standard_error(self) -> Tensor:
        """(); nan with a single sample."""
        count = len(self.influence)
        return self.influence.std() / count**0.5 if count > 1 else torch.full_like(self.value, torch.nan)

    def __sub__(self, other: "Estimate") -> "Estimate":
        """Of a difference, whose samples were drawn alike."""
        return Estimate(self.value - other.value, self.influence - other.influence)


def estimate(log_weights: Tensor, estimator: Estimator) -> Estimate:
    """ELBO, the mean of log w (K,), or IWAE, log of the mean of w."""
    if estimator == "elbo":
        mean = log_weights.mean()
        return Estimate(mean, log_weights - mean)
    total, count = log_weights.logsumexp(0), len(log_weights)
    return Estimate(total - math.log(count), count * (log_weights - total).exp() - 1)


@dataclass(frozen=True)
class Terms:
    """The terms of log w of one text, filled up to whole blocks; zero where nothing is scored."""

    decoder: Tensor  # (K, G * S * P): log p(x_i | z)
    prior: Tensor  # (K, G): log p of a block given those before, of un-normalised latents
    posterior: Tensor  # (K, G * S): log q
    num_tokens: int  # scored

    @property
    def log_weights(self) -> Tensor:
        """(K,)."""
        return self.decoder.sum(1) + self.prior.sum(1) - self.posterior.sum(1)

    def by_block(self) -> dict[str, Tensor]:
        """What each block adds to the ELBO, means over the samples: (G,) by decoder, prior, posterior."""
        groups = self.prior.shape[1]
        decoder, posterior = (x.unflatten(1, (groups, -1)).sum(-1).mean(0) for x in (self.decoder, self.posterior))
        return {"decoder": decoder, "prior": self.prior.mean(0), "posterior": -posterior}


@dataclass(frozen=True)
class Evaluation:
    """One text's terms, and those of its prompt where a score is joint minus prefix."""

    terms: Terms
    prefix: Terms | None
    evaluations: int  # of the velocity, in the solve that the text was in

    def estimate(self, estimator: Estimator) -> Estimate:
        """The text's score."""
        whole = estimate(self.terms.log_weights, estimator)
        return whole if self.prefix is None else whole - estimate(self.prefix.log_weights, estimator)

    @property
    def num_tokens(self) -> int:
        """Tokens scored."""
        return self.terms.num_tokens - (0 if self.prefix is None else self.prefix.num_tokens)

    def parts(self) -> dict[str, Tensor]:
        """The terms of the ELBO: scalars that add up to it."""
        parts = {name: value.sum() for name, value in self.terms.by_block().items()}
        if self.prefix is not None:
            parts = {name: parts[name] - value.sum() for name, value in self.prefix.by_block().items()}
        return parts
