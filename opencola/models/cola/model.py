"""Cola DLM: the Text VAE and the block-causal prior, and their joint training (model.md §§3-4)."""

import copy
from dataclasses import replace

import torch
from torch import Tensor

from opencola.data.batch import Batch, divisor
from opencola.flow.path import interpolate, target_velocity
from opencola.layers import randomness
from opencola.models.cola import generate as generation
from opencola.models.cola import score as scoring
from opencola.models.cola.parts import ColaConfig, ColaParts
from opencola.models.language_model import Loss
from opencola.vae.gaussian import DiagonalGaussian
from opencola.vae.objective import counted, latent_metrics, reconstruct, scored_counts
from opencola.vae.text_vae import TextVAE


class Cola(ColaParts):
    """A whole Cola DLM: Text VAE `vae` and prior `dit`. It is trained, writes, and scores (`LanguageModel`)."""

    generate = generation.generate
    score = scoring.score

    def __init__(self, config: ColaConfig) -> None:
        super().__init__(config)
        self.reference: TextVAE | None = None

    def freeze_parts(self) -> None:
        """Call when the starting weights are in: freezes the VAE (`fixed`) or keeps a frozen reference copy of it."""
        prior = self.config.prior
        if prior.strategy == "fixed":
            self.vae.requires_grad_(False)
        elif prior.lambda_ref:
            self.reference = copy.deepcopy(self.vae).requires_grad_(False)
            del self.reference.decoder, self.reference.decoder_in, self.reference.unpatch, self.reference.head

    def learning_rate_ratios(self) -> dict[str, float]:
        """The VAE's learning rate over the DiT's."""
        return {"vae.": self.config.prior.vae_learning_rate_ratio}

    def vae_learns(self, step: int) -> bool:
        """Whether the VAE trains along at this step."""
        prior = self.config.prior
        if prior.strategy == "interval":
            return step % (prior.joint_steps + prior.frozen_steps) < prior.joint_steps
        return prior.strategy != "fixed"

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Scored rows of the flow-matching loss and, where the VAE learns, scored and masked tokens."""
        counts = scored_counts(batch, self.config.objective) if self.vae_learns(batch.step) else {}
        _, scored = self._prompt_rows(batch, batch.tokens.shape[1] // self.config.vae.patch_size)
        return counts | {"flow_matching": scored.sum()}

    def loss(self, batch: Batch) -> Loss:
        """lambda_vae (CE + beta E[log q] + lambda_mask L_mask) + lambda_fm L_FM + lambda_ref KL(q || q_ref)."""
        objective, prior = self.config.objective, self.config.prior
        counts = batch.counts or self.counts(batch)
        batch = replace(batch, counts=counts)
        terms: dict[str, Tensor] = {}
        if self.vae_learns(batch.step):
            result = reconstruct(self.vae, batch, objective)
            per_token = 1 / self.config.vae.patch_size
            terms["cross_entropy"] = prior.lambda_vae * result.cross_entropy
            terms["entropy"] = -prior.lambda_vae * objective.beta * per_token * result.posterior.entropy().mean()
            if objective.lambda_mask:
                terms["mask"] = prior.lambda_vae * objective.lambda_mask * result.masked_cross_entropy
            if self.reference is not None:
                with torch.no_grad():
                    reference = self.reference.encode(batch.tokens, documents=batch.documents)
                terms["reference"] = prior.lambda_ref * per_token * result.posterior.kl(reference).mean()
            posterior, z = result.posterior, result.z
            metrics = latent_metrics(posterior, z, result.accuracy)
        else:
            posterior, z = self._frozen_posterior(batch)
            metrics = {"vae_logsnr": posterior.logsnr(), "latent_scale": z.flatten(0, 1).std(0)}
        z_0 = self.vae.normalise(z)
        terms["flow_matching"] = prior.lambda_fm * self.flow_matching(z_0, batch)
        return Loss(sum(terms.values(), start=z_0.new_zeros(())), terms, metrics, counted(batch, counts))

    def _frozen_posterior(self, batch: Batch) -> tuple[DiagonalGaussian, Tensor]:
        with torch.no_grad():
            posterior = self.vae.encode(batch.tokens, documents=batch.documents)
            noise = randomness.normal(posterior.mean.shape[1:], batch.seed, "posterior", batch.ids)
            return posterior, posterior.sample(noise.to(posterior.mean))

    def flow_matching(self, z_0: Tensor, batch: Batch) -> Tensor:
        """L_FM of normalised latents z_0 (B, N, d): mean squared error of the velocity on noisy rows (model.md §3)."""
        prior, block_size = self.config.prior, self.config.dit.block_size
        copies, (_, num_latents, dim) = prior.noisy_copies, z_0.shape
        seed, ids = batch.seed, batch.ids
        if not prior.encoder_gradient:
            z_0 = z_0.detach()
        z_1 = randomness.normal((copies, num_latents, dim), seed, "noise", ids).to(z_0)
        groups = 1 if prior.time.per == "sequence" else num_latents // block_size
        t = prior.time.times(randomness.normal((copies, groups), seed, "time", ids)).to(z_0)
        row_times = t.repeat_interleave(num_latents // groups, dim=-1)[..., None]
        z_0 = z_0[:, None]
        z_t = interpolate(z_0, z_1, row_times)
        pinned, scored = (rows.to(z_0.device) for rows in self._prompt_rows(batch, num_latents))
        z_t = torch.where(pinned[..., None], z_0.detach(), z_t)
        history = None
        if prior.history_dropout:
            history = (randomness.uniform((), seed, "history", ids) >= prior.history_dropout).to(z_0.device)
        documents = None if batch.documents is None else batch.documents[:, :: self.config.vae.patch_size]
        velocity = self.dit.packed(z_0[:, 0], z_t, t, pinned, history, documents=documents, recompute=prior.recompute)
        target = target_velocity(z_0, z_1).detach()
        return masked_mean_square(velocity, target, scored, batch.counts["flow_matching"] if batch.counts else None)

    def _prompt_rows(self, batch: Batch, num_latents: int) -> tuple[Tensor, Tensor]:
        """(B, copies, N) bool each: rows given clean (prompt-in-block training), and rows that count in the loss.

        Clean are 1 to S - 1 first latents of some blocks, drawn, and in every block the latents before its first scored
        token, as they are when an answer begins inside a block. What is clean does not count, nor what is not scored.
        """
        block_size, seed, ids = self.config.dit.block_size, batch.seed, batch.ids
        blocks = (self.config.prior.noisy_copies, num_latents // block_size)
        chosen = randomness.uniform(blocks, seed, "prompt", ids) < self.config.prior.prompt_in_block
        length = 1 + (randomness.uniform(blocks, seed, "prompt length", ids) * (block_size - 1)).long()
        pinned = torch.arange(block_size) < torch.where(chosen, length, 0)[..., None]
        pinned = pinned & torch.tensor(block_size > 1)
        if batch.scored is None:
            return pinned.flatten(-2), ~pinned.flatten(-2)
        scored = batch.scored.cpu().unflatten(1, (num_latents, -1)).any(-1).unflatten(1, (-1, block_size))[:, None]
        pinned = pinned | (scored.cumsum(-1) == 0)
        return pinned.flatten(-2), (scored & ~pinned).flatten(-2)


def masked_mean_square(velocity: Tensor, target: Tensor, scored: Tensor, count: Tensor | None = None) -> Tensor:
    """Mean over the scored rows (B, copies, N) of the mean over channels of the squared error.

    count: number to divide by, where these rows are part of a larger batch.
    """
    error = (velocity - target).square().mean(-1)
    return (error * scored).sum() / divisor(scored.sum() if count is None else count)
