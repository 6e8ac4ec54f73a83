"""The figures of `opencola latents`: every one with its name, unit, interval and number of cases."""

import torch
from torch import Tensor

from opencola.evaluation.latents import space
from opencola.evaluation.latents.reconstruction import Documents
from opencola.evaluation.latents.robustness import VAE, Draw, Robustness, most_frequent
from opencola.evaluation.statistics import Entry, mean_entry, share, share_entry

MAX_INFORMATION = 4096
"""Latents that the information is estimated from: its cost grows with their square."""
KINDS = {
    "path": "tokens right from z_t = (1 - t) z_0 + t noise",
    "rescaled": "tokens right from z_t / (1 - t)",
    "mean": "tokens right from posterior mean + s noise",
}


def entries(result: Robustness, documents: Documents, vae: VAE, draw: Draw) -> list[Entry]:
    """All figures of a VAE on some documents."""
    seen = result.posteriors.normalised(vae.shift, vae.scale)
    return [
        *accuracies(result, documents),
        *bounds(result, seen),
        *mismatch(seen, draw),
        *usage(result.posteriors, seen),
        *channels(seen),
    ]


def accuracies(result: Robustness, documents: Documents) -> list[Entry]:
    """Accuracy by kind and amount of noise, and that of always saying the most frequent token."""
    total = int(result.tokens.sum())

    def entry(name: str, label: str, right: int, at: float | None) -> Entry:
        return share_entry(name, label, share(right, total), "tokens", at)

    blind = "tokens right without latents: always the most frequent"
    return [
        *(entry(f"accuracy_{amount.kind}", KINDS[amount.kind], n, amount.at) for amount, n in result.right.items()),
        entry("most_frequent_token", blind, most_frequent(documents), None),
    ]


def bounds(result: Robustness, seen: space.Posteriors) -> list[Entry]:
    """Rate, distortion, and their sum."""
    rate = per_sequence(seen.rates().sum(-1), seen.sequence, len(result.tokens))
    named = {
        "rate": ("KL(q(z|x) || N(0, I))", rate),
        "distortion": ("cross-entropy of tokens from a posterior sample", result.distortion),
        "standard_normal_bound": ("rate + distortion: -ELBO of a prior N(0, I)", rate + result.distortion),
    }
    return [
        mean_entry(name, label, "nats per token", sums, result.tokens, "tokens")
        for name, (label, sums) in named.items()
    ]


def mismatch(seen: space.Posteriors, draw: Draw) -> list[Entry]:
    """How far the aggregated posterior is from N(0, I): a lower bound, and the rate's decomposition as an estimate."""
    count = len(seen.mean)
    moments = space.moments(seen)
    bound = space.gaussian_divergence(moments.mean, moments.covariance)
    chosen = torch.linspace(0, count - 1, min(count, MAX_INFORMATION)).long()
    part = space.Posteriors(seen.mean[chosen], seen.variance[chosen], seen.sequence[chosen])
    noise = draw(seen.mean.shape[1:], "information", torch.arange(len(chosen))).double()
    information = space.index_information(part, noise)
    num_sequences = int(seen.sequence.max()) + 1
    counts = per_sequence(torch.ones(len(chosen)), part.sequence, num_sequences)
    rest = part.rates().sum(-1) - information
    estimates = {
        "information": (f"information of latents about themselves, at most ln {len(chosen):,} (estimate)", information),
        "mismatch_estimate": ("KL(q(z) || N(0, I)): rate - information (estimate, rather too large)", rest),
    }
    label = "KL(q(z) || N(0, I)) of the Gaussian with q(z)'s moments (lower bound)"
    return [
        Entry("mismatch_gaussian", label, "nats per latent", bound, count, "latents"),
        *(
            mean_entry(
                name, said, "nats per latent", per_sequence(values, part.sequence, num_sequences), counts, "latents"
            )
            for name, (said, values) in estimates.items()
        ),
    ]


def usage(posteriors: space.Posteriors, seen: space.Posteriors) -> list[Entry]:
    """LogSNR, active channels, effective dimension, spectrum."""
    count, eigenvalues = len(seen.mean), space.spectrum(seen)
    active = f"channels whose posterior means have a variance above {space.ACTIVE_VARIANCE}"
    effective = "effective dimension: participation ratio of the means' covariance"
    return [
        Entry("vae_logsnr", "log(mean of mu² / mean of sigma²)", "", posteriors.logsnr(), count, "latents"),
        Entry("active_channels", active, f"of {len(eigenvalues)}", space.num_active(seen), count, "latents"),
        Entry("effective_dimension", effective, "", space.participation_ratio(eigenvalues), count, "latents"),
        *(
            Entry("eigenvalue", "of the means' covariance", "", value, count, "latents", at=axis)
            for axis, value in enumerate(eigenvalues.tolist())
        ),
    ]


def channels(seen: space.Posteriors) -> list[Entry]:
    """Rate and moments of each channel."""
    moments = space.moments(seen)
    named = {
        "channel_rate": ("KL(q(z|x) || N(0, 1)) of the channel", "nats per latent", seen.rates().mean(0)),
        "channel_mean": ("mean of q(z)", "", moments.mean),
        "channel_variance": ("variance of q(z)", "", moments.variance),
        "channel_mean_variance": ("variance of posterior means", "", seen.mean.var(0, correction=0)),
        "channel_excess_kurtosis": ("excess kurtosis of q(z)", "", moments.excess_kurtosis),
    }
    return [
        Entry(name, label, unit, value, len(seen.mean), "latents", at=channel)
        for name, (label, unit, values) in named.items()
        for channel, value in enumerate(values.tolist())
    ]


def per_sequence(values: Tensor, sequence: Tensor, num_sequences: int) -> Tensor:
    """Sums (num_sequences,) of the values (M,) of each sequence."""
    return torch.zeros(num_sequences, dtype=torch.float64).index_add(0, sequence, values.double())
