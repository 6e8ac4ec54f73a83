"""Cola DLM: the Text VAE and the block-causal prior, and their joint training (model.md §§3-4)."""

import copy
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from opencola.data.batch import Batch, divisor
from opencola.flow.dit import BlockCausalDiT
from opencola.flow.path import interpolate, target_velocity
from opencola.layers import randomness
from opencola.models.cola import generate as generation
from opencola.models.cola import predict
from opencola.models.cola import score as scoring
from opencola.models.cola.distil import grid_times, two_steps
from opencola.models.cola.parts import ColaConfig, ColaParts
from opencola.models.language_model import Loss
from opencola.vae.gaussian import DiagonalGaussian
from opencola.vae.objective import counted, latent_metrics, reconstruct, scored_counts
from opencola.vae.text_vae import TextVAE


class Cola(ColaParts):
    """A whole Cola DLM: Text VAE `vae` and prior `dit`. It is trained, writes, and scores (`LanguageModel`)."""

    begin = generation.begin
    cache_bytes = generation.cache_bytes
    log_probabilities = predict.log_probabilities
    generate = generation.generate
    score = scoring.score

    def __init__(self, config: ColaConfig) -> None:
        super().__init__(config)
        self.reference: TextVAE | None = None
        self.teacher: BlockCausalDiT | None = None

    def freeze_parts(self) -> None:
        """Call when the starting weights are in: freezes the VAE (`fixed`) or keeps a frozen reference copy of it.

        For distillation keeps a frozen copy of the prior, too, and freezes all that its trunk is made of.
        """
        prior = self.config.prior
        if prior.distil_steps:
            self.teacher = copy.deepcopy(self.dit).requires_grad_(False)
            self.dit.freeze_trunk()
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

    @property
    def _predicts(self) -> bool:
        return self.config.prior.lambda_ar > 0 and self.teacher is None

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Scored rows of the flow-matching loss and, where the VAE learns, scored and masked tokens."""
        counts = scored_counts(batch, self.config.objective) if self.vae_learns(batch.step) else {}
        if self._predicts:
            counts["next_token"] = batch.is_scored().sum()
        rows = self._noisy_latents(batch, batch.tokens.shape[1] // self.config.vae.patch_size)
        _, scored = self._prompt_rows(batch, rows)
        return counts | {"flow_matching": scored.sum()}

    def loss(self, batch: Batch) -> Loss:
        """lambda_vae (CE + beta E[log q] + lambda_mask L_mask) + lambda_fm L_FM + lambda_ref KL(q || q_ref), and with a
        trunk lambda_ar CE of the next token."""
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
        read = None
        if self.config.dit.trunk_layers:
            documents = self._documents(batch)
            before = None if documents is None else documents[:, :-1]
            read = self.dit.read_text(z_0[:, :-1], before, prior.recompute)
            if self._predicts:
                loss, metrics["next_token_accuracy"] = self.next_token(read, batch)
                terms["next_token"] = prior.lambda_ar * loss
        terms["flow_matching"] = prior.lambda_fm * self.flow_matching(z_0, batch, read)
        return Loss(sum(terms.values(), start=z_0.new_zeros(())), terms, metrics, counted(batch, counts))

    def _frozen_posterior(self, batch: Batch) -> tuple[DiagonalGaussian, Tensor]:
        with torch.no_grad():
            posterior = self.vae.encode(batch.tokens, documents=batch.documents)
            noise = randomness.normal(posterior.mean.shape[1:], batch.seed, "posterior", batch.ids)
            return posterior, posterior.sample(noise.to(posterior.mean))

    def next_token(self, read: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Mean cross-entropy of the scored tokens given the trunk's features (B, N - 1, D) of the latents before each,
        in nats, and their share that is right."""
        head, scored = self.dit.next_token, batch.is_scored()
        if head is None:
            raise ValueError("prior.lambda_ar is for a trunk with a head: dit.vocab_size must be that of the Text VAE")
        losses, best = head.out.cross_entropy(head.features(read, batch.documents), batch.tokens)
        count = batch.counts["next_token"] if batch.counts else scored.sum()
        right = ((best == batch.tokens) & scored).sum() / divisor(scored.sum())
        return (losses * scored).sum() / divisor(count), right

    def _documents(self, batch: Batch) -> Tensor | None:
        return None if batch.documents is None else batch.documents[:, :: self.config.vae.patch_size]

    def flow_matching(self, z_0: Tensor, batch: Batch, read: Tensor | None = None) -> Tensor:
        """L_FM of normalised latents z_0 (B, N, d): mean squared error of the velocity on noisy rows (model.md §3).

        In distillation the target is the mean velocity of the teacher's two steps. read (B, N - 1, D): the trunk's
        features of the text, where they are at hand.
        """
        prior, block_size = self.config.prior, self.config.dit.block_size
        rows = self._noisy_latents(batch, z_0.shape[1])
        copies, num_noisy, dim = prior.noisy_copies, len(rows), z_0.shape[-1]
        seed, ids = batch.seed, batch.ids
        z_0 = z_0[:, : rows.stop]
        if not prior.encoder_gradient:
            z_0 = z_0.detach()
        z_1 = randomness.normal((copies, num_noisy, dim), seed, "noise", ids).to(z_0)
        groups = 1 if prior.time.per == "sequence" else num_noisy // block_size
        drawn = randomness.normal((copies, groups), seed, "time", ids)
        t = (grid_times(drawn, prior.distil_steps) if self.teacher is not None else prior.time.times(drawn)).to(z_0)
        row_times = t.repeat_interleave(num_noisy // groups, dim=-1)[..., None]
        z_0 = z_0[:, None]
        noisy = z_0[:, :, rows.start :]
        z_t = interpolate(noisy, z_1, row_times)
        pinned, scored = (part.to(z_0.device) for part in self._prompt_rows(batch, rows))
        z_t = torch.where(pinned[..., None], noisy.detach(), z_t)
        history = None
        if prior.history_dropout and self.teacher is None:
            history = (randomness.uniform((), seed, "history", ids) >= prior.history_dropout).to(z_0.device)
        documents = self._documents(batch)
        documents = None if documents is None else documents[:, : rows.stop]

        def velocity(dit: BlockCausalDiT, z_t: Tensor, t: Tensor, history: Tensor | None) -> Tensor:
            return dit.packed(
                z_0[:, 0],
                z_t,
                t,
                pinned,
                history,
                documents=documents,
                recompute=prior.recompute,
                first=rows.start,
                read=read,
            )

        if self.teacher is None:
            target = target_velocity(noisy, z_1)
        else:
            teacher = partial(velocity, self.teacher)
            target = two_steps(teacher, z_t, t, pinned, 0.5 / prior.distil_steps, prior.distil_guidance)
        count = batch.counts["flow_matching"] if batch.counts else None
        return masked_mean_square(velocity(self.dit, z_t, t, history), target.detach(), scored, count)

    def _noisy_latents(self, batch: Batch, num_latents: int) -> range:
        """The latents whose blocks are learned at this step: all, or whole blocks from a drawn one on, where blocks may
        begin anywhere."""
        config, size = self.config.dit, self.config.dit.block_size
        places = size if config.grid < size < num_latents else 1
        first = randomness.below(places, batch.seed, "first block", batch.step)  # alike for all parts of a batch
        return range(first, num_latents - (num_latents - first) % size)

    def _prompt_rows(self, batch: Batch, rows: range) -> tuple[Tensor, Tensor]:
        """(B, copies, M) bool each, of the latents `rows`: which are given clean (prompt-in-block training), and which
        count in the loss.

        Clean are 1 to S - 1 first latents of some blocks, drawn, and in every block the latents before its first scored
        token, as they are when an answer begins inside a block. What is clean does not count, nor what is not scored.
        """
        block_size, seed, ids = self.config.dit.block_size, batch.seed, batch.ids
        blocks = (self.config.prior.noisy_copies, len(rows) // block_size)
        chosen = randomness.uniform(blocks, seed, "prompt", ids) < self.config.prior.prompt_in_block
        length = 1 + (randomness.uniform(blocks, seed, "prompt length", ids) * (block_size - 1)).long()
        pinned = torch.arange(block_size) < torch.where(chosen, length, 0)[..., None]
        pinned = pinned & torch.tensor(block_size > 1)
        if batch.scored is None:
            return pinned.flatten(-2), ~pinned.flatten(-2)
        latents = batch.scored.cpu().unflatten(1, (-1, self.config.vae.patch_size)).any(-1)
        scored = latents[:, rows.start : rows.stop].unflatten(1, (-1, block_size))[:, None]
        pinned = pinned | (scored.cumsum(-1) == 0)
        return pinned.flatten(-2), (scored & ~pinned).flatten(-2)


def masked_mean_square(velocity: Tensor, target: Tensor, scored: Tensor, count: Tensor | None = None) -> Tensor:
    """Mean over the scored rows (B, copies, N) of the mean over channels of the squared error.

    count: number to divide by, where these rows are part of a larger batch.
    """
    error = (velocity - target).square().mean(-1)
    return (error * scored).sum() / divisor(scored.sum() if count is None else count)
