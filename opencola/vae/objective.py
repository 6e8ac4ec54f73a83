"""The Text VAE's losses: stage 1 of model.md §2, and the terms that stage 2 shares with it."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from opencola.data.batch import Batch, divisor
from opencola.layers import randomness
from opencola.ranges import NotNegative, Share, check
from opencola.vae.gaussian import DiagonalGaussian
from opencola.vae.text_vae import TextVAE


@dataclass(frozen=True)
class VAEObjective:
    """Weights of the stage-1 loss CE + beta KL + lambda_mask L_mask, in nats per token."""

    beta: NotNegative = 1e-3
    """Weight of KL(q || N(0, I)); in stage 2, of the negative entropy of q."""
    lambda_mask: NotNegative = 1.0
    """Weight of the masking ("BERT-style") loss; 0 leaves the second view out."""
    mask_ratio: Share = 0.15
    """Share of input tokens that the second view replaces by [MASK]."""

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class Reconstruction:
    """What one pass of a batch through the VAE gives. Losses are means over scored tokens, in nats per token."""

    posterior: DiagonalGaussian
    z: Tensor  # a posterior sample, not normalised
    cross_entropy: Tensor
    masked_cross_entropy: Tensor
    accuracy: Tensor


def masked_tokens(batch: Batch, objective: VAEObjective) -> Tensor:
    """(B, L) bool: tokens that the second view replaces by [MASK]."""
    drawn = randomness.uniform(batch.tokens.shape[1:], batch.seed, "mask", batch.ids)
    return drawn.to(batch.tokens.device) < objective.mask_ratio


def scored_counts(batch: Batch, objective: VAEObjective) -> dict[str, Tensor]:
    """The denominators of `reconstruct`'s means."""
    scored = batch.is_scored()
    counts = {"tokens": scored.sum()}
    if objective.lambda_mask:
        counts["mask"] = (scored & masked_tokens(batch, objective)).sum()
    return counts


def counted(batch: Batch, counts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the figures of a loss are means over, by their names, where a batch's divisors are `counts`."""
    terms = {"cross_entropy": "tokens", "mask": "mask", "flow_matching": "flow_matching"}
    divisors = {term: counts[name] for term, name in terms.items() if name in counts}
    return divisors | {"reconstruction_accuracy": batch.is_scored().sum()}


def reconstruct(vae: TextVAE, batch: Batch, objective: VAEObjective) -> Reconstruction:
    """Encode, sample, decode and score a batch, with the masked second view when lambda_mask is not 0 (model.md §2)."""
    tokens, views = batch.tokens, 2 if objective.lambda_mask else 1
    counts = batch.counts or scored_counts(batch, objective)
    inputs, documents = tokens, batch.documents
    if objective.lambda_mask:
        masked = masked_tokens(batch, objective)
        inputs = torch.cat((tokens, tokens.masked_fill(masked, vae.mask_id)))
        documents = None if documents is None else documents.repeat(views, 1)
    both = vae.encode(inputs, documents=documents)
    noise = randomness.normal(both.mean.shape[1:], batch.seed, "posterior", batch.ids).to(both.mean)
    z = both.sample(noise.repeat(views, 1, 1))
    losses, best = vae.head.cross_entropy(vae.features(z, documents=documents), tokens.repeat(views, 1))
    losses = losses.view(views, *tokens.shape)
    right = (best[: len(tokens)] == tokens).to(losses.dtype)
    accuracy = right.mean()
    if batch.scored is not None:
        losses = losses * batch.scored
        accuracy = (right * batch.scored).sum() / batch.scored.sum().clamp(min=1)
    masked_loss = losses.new_zeros(())
    if objective.lambda_mask:
        masked_loss = (losses[1] * masked).sum() / divisor(counts["mask"])
    posterior = DiagonalGaussian(both.mean[: len(tokens)], both.logvar[: len(tokens)])
    cross_entropy = losses[0].sum() / divisor(counts["tokens"])
    return Reconstruction(posterior, z[: len(tokens)], cross_entropy, masked_loss, accuracy)


def latent_metrics(posterior: DiagonalGaussian, z: Tensor, accuracy: Tensor) -> dict[str, Tensor]:
    """Reported figures: reconstruction accuracy, VAE logSNR, standard deviation of each latent channel (d,)."""
    scale = z.flatten(0, 1).std(0)
    metrics = {"reconstruction_accuracy": accuracy, "vae_logsnr": posterior.logsnr(), "latent_scale": scale}
    return {name: value.detach() for name, value in metrics.items()}
