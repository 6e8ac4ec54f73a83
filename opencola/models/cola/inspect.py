"""What posterior, prior and decoder make of every token of a text, each given the true text before (model.md §6).

N latents of d channels in G blocks of S, P tokens a latent, K samples. Latents are normalised, as the prior sees them.
The text before a block is given by its latents' posterior means, as in generation.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from opencola.flow.likelihood import Likelihood
from opencola.flow.ode import solve, time_grid
from opencola.layers import randomness
from opencola.models.cola.denoise import guided, seen_times
from opencola.models.cola.parts import ColaParts
from opencola.models.cola.sampling import ColaSampling
from opencola.models.cola.score import log_prior
from opencola.vae.gaussian import DiagonalGaussian

POINTS = 256  # decoded at a time
ROWS = 16  # whose density is found at a time


@dataclass(frozen=True)
class Inspection:
    """Of one text. `posterior`: q(z | x), (1, N, d); samples of it, of the prior, and the probes: (K, N, d); the tokens
    that each decodes to: (K, N * P); of posterior samples, in nats: `log_decoder` (K, N * P), log p(x_i | z), and
    `log_prior` (K, G), log p of a block given the sample's own blocks before."""

    posterior: DiagonalGaussian
    posterior_samples: Tensor
    prior_samples: Tensor
    probes: Tensor
    posterior_tokens: Tensor
    prior_tokens: Tensor
    probe_tokens: Tensor
    log_decoder: Tensor
    log_prior: Tensor

    def elbo(self, num_tokens: int) -> Tensor:
        """The ELBO of the first tokens, by each posterior sample, in nats: (K,). What fills the last block has latents,
        too, which loosens the bound."""
        return self.log_decoder[:, :num_tokens].sum(1) + self.log_prior.sum(1) + self.posterior.entropy().sum()


@torch.no_grad()
def inspect(
    model: ColaParts, tokens: Tensor, num_samples: int, sampling: ColaSampling, deviation: float, density: Likelihood
) -> Inspection:
    """Draw latents of every block of tokens (1, N * P) and decode them.

    deviation: of the noise that makes probes of posterior means; density: how densities of the prior are computed. All
    other draws come from (sampling.seed, purpose, number of the sample). Raises ValueError where the tokens are not a
    number of whole blocks.
    """
    chunk = model.dit.config.block_size * model.vae.config.patch_size
    if tokens.shape[1] % chunk:
        raise ValueError(f"{tokens.shape[1]} tokens are not a multiple of {chunk}: the text must end with a block")
    vae = model.vae
    encoded = vae.encode(tokens)
    mean = vae.normalise(encoded.mean)
    shift = 2 * torch.tensor(vae.config.latent_scale).abs().log().to(encoded.logvar)
    posterior = DiagonalGaussian(mean, encoded.logvar + shift)
    ids = torch.arange(num_samples)

    def draw(purpose: str, *step: int) -> Tensor:
        return randomness.normal(mean.shape[1:], sampling.seed, f"inspect {purpose}", ids, *step).to(mean)

    samples = posterior.sample(draw("posterior"))
    probes = mean + deviation * draw("probe")
    noise = {step: draw("step", step) for step in range(sampling.steps) if sampling.solver == "stochastic"}
    prior = prior_samples(model, mean, draw("noise"), noise, sampling)
    logits = vae.decode(vae.denormalise(samples))
    log_decoder = logits.log_softmax(-1).gather(-1, tokens.expand(num_samples, -1)[..., None]).squeeze(-1)
    from_prior, from_probes = (
        torch.cat([part.argmax(-1) for part in decode_blocks(model, mean, z)], 1) for z in (prior, probes)
    )
    log_p = [log_prior(model, samples[part], [(int(i),) for i in part], density).log_prob for part in ids.split(ROWS)]
    decoded = logits.argmax(-1), from_prior, from_probes
    return Inspection(posterior, samples, prior, probes, *decoded, log_decoder, torch.cat(log_p))


def prior_samples(
    model: ColaParts, mean: Tensor, z_1: Tensor, noise: dict[int, Tensor], sampling: ColaSampling
) -> Tensor:
    """Samples (K, N, d) of every block given the latents mean (1, N, d) before it: all blocks in one packed solve.

    z_1 (K, N, d): noise at t = 1; noise: by step, for the stochastic solver.
    """
    clean = mean.expand_as(z_1)
    blind = torch.zeros(len(z_1), dtype=torch.bool, device=z_1.device)

    def branch(z: Tensor, t: float, history: Tensor | None = None) -> Tensor:
        times = seen_times([t], sampling).to(z).expand(len(z), 1, 1)
        return model.dit.packed(clean, z[:, None], times, history=history)[:, 0]

    has_history = (torch.arange(z_1.shape[1], device=z_1.device) >= model.dit.config.block_size)[:, None]
    velocity = guided(branch, lambda z, t: (branch(z, t), branch(z, t, blind)), sampling, has_history)
    grid = time_grid(sampling.steps, sampling.shift)
    *_, z_0 = solve(
        velocity, z_1, grid, sampling.solver,
        noise=noise.__getitem__, eta=sampling.eta, tolerance=sampling.tolerance,
    )  # fmt: skip
    return z_0


def decode_blocks(model: ColaParts, mean: Tensor, z: Tensor) -> Iterator[Tensor]:
    """Logits (K, S * P, V) of every block of z (K, N, d), with the latents mean (1, N, d) before it."""
    size = model.dit.config.block_size
    for start in range(0, mean.shape[1], size):
        rows = torch.cat((mean[:, :start].expand(len(z), -1, -1), z[:, start : start + size]), 1)
        yield model.vae.decode(model.vae.denormalise(rows))[:, -size * model.vae.config.patch_size :]


@torch.no_grad()
def decode_instead(model: ColaParts, mean: Tensor, latent: int, points: Tensor) -> Tensor:
    """Tokens (R, P) of latent number `latent` of the means (1, N, d), with points (R, d) in its place."""
    size, patch = model.dit.config.block_size, model.vae.config.patch_size
    end = latent - latent % size + size
    tokens = []
    for part in points.split(POINTS):
        rows = mean[:, :end].repeat(len(part), 1, 1)
        rows[:, latent] = part
        logits = model.vae.decode(model.vae.denormalise(rows))
        tokens.append(logits[:, latent * patch : (latent + 1) * patch].argmax(-1))
    return torch.cat(tokens)


def density_instead(model: ColaParts, mean: Tensor, latent: int, points: Tensor, settings: Likelihood) -> Tensor:
    """Log-density (R,) under the prior of the block of latent number `latent` of the means (1, N, d), with points
    (R, d) in its place; all points have the same probes, so that they can be compared."""
    size = model.dit.config.block_size
    rows = mean[:, : latent - latent % size + size].repeat(len(points), 1, 1)
    rows[:, latent] = points
    log_densities = [
        log_prior(model, part, [(0,)] * len(part), settings).log_prob[:, -1] for part in rows.split(POINTS)
    ]
    return torch.cat(log_densities)
