"""Stage 1: the Text VAE on its own (model.md §2)."""

from dataclasses import dataclass, field, replace

from torch import Tensor, nn

from opencola.data.batch import Batch
from opencola.models.language_model import Loss
from opencola.vae.objective import VAEObjective, counted, latent_metrics, reconstruct, scored_counts
from opencola.vae.text_vae import TextVAE, TextVAEConfig


@dataclass(frozen=True)
class StageOneConfig:
    """A Text VAE and its loss."""

    vae: TextVAEConfig = field(default_factory=TextVAEConfig)
    objective: VAEObjective = field(default_factory=VAEObjective)


class StageOne(nn.Module):
    """L_VAE = CE + beta KL(q || N(0, I)) + lambda_mask L_mask, every term in nats per token."""

    def __init__(self, config: StageOneConfig) -> None:
        super().__init__()
        self.config = config
        self.vae = TextVAE(config.vae)

    def loss(self, batch: Batch) -> Loss:
        """Stage-1 loss of a batch."""
        objective, counts = self.config.objective, batch.counts or self.counts(batch)
        result = reconstruct(self.vae, replace(batch, counts=counts), objective)
        kl = result.posterior.kl().mean() / self.config.vae.patch_size
        terms: dict[str, Tensor] = {"cross_entropy": result.cross_entropy, "kl": objective.beta * kl}
        if objective.lambda_mask:
            terms["mask"] = objective.lambda_mask * result.masked_cross_entropy
        total = sum(terms.values(), start=kl.new_zeros(()))
        metrics = latent_metrics(result.posterior, result.z, result.accuracy)
        return Loss(total, terms, metrics, counted(batch, counts))

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Scored tokens, and those of them that are masked."""
        return scored_counts(batch, self.config.objective)

    def learning_rate_ratios(self) -> dict[str, float]:
        """All parameters learn at the same rate."""
        return {}
