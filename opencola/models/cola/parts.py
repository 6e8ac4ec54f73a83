"""The parts of a Cola DLM: its configuration, its Text VAE and its prior (model.md §1)."""

from dataclasses import dataclass, field
from typing import Literal

from torch import nn

from opencola.errors import UserError
from opencola.flow.dit import BlockCausalDiT, DiTConfig
from opencola.flow.path import TimestepLaw
from opencola.ranges import Count, Finite, NotNegative, Share, Size, check
from opencola.vae.objective import VAEObjective
from opencola.vae.text_vae import TextVAE, TextVAEConfig


@dataclass(frozen=True)
class PriorObjective:
    """Flow matching and how the latent space moves under it (model.md §§3-4)."""

    strategy: Literal["fixed", "joint", "scratch", "interval"] = "joint"
    """Latent space: frozen VAE; trained along from stage 1; trained along from random weights; in cycles of both."""
    joint_steps: Count = 2000
    """Number of steps of a cycle in which the VAE trains along (strategy interval)."""
    frozen_steps: Count = 3000
    """Number of steps of a cycle in which the VAE is frozen (strategy interval)."""
    vae_learning_rate_ratio: NotNegative = 1.0
    """Learning rate of the VAE as a multiple of the DiT's, where it trains along; the paper's weak variant is 0.01."""
    lambda_vae: NotNegative = 1.0
    """Weight of the VAE's own terms (cross-entropy, entropy, masking) in the loss of joint training."""
    lambda_fm: NotNegative = 1.0
    """Weight of the flow-matching term in the loss."""
    lambda_ar: NotNegative = 0.0
    """Weight of the trunk's own prediction of the next token (cross-entropy; dit.trunk_layers above 0)."""
    lambda_ref: NotNegative = 0.1
    """Weight of KL(q || q_ref), q_ref a frozen copy of the encoder that training started from."""
    encoder_gradient: bool = True
    """Whether the flow-matching loss reaches the encoder through z_t. History and target never carry gradient."""
    noisy_copies: Count = 2
    """Number of noisy copies of a clean sequence: more training of the prior per pass over the history."""
    time: TimestepLaw = field(default_factory=TimestepLaw)
    prompt_in_block: Share = 0.3
    """Probability that a block is given a clean prefix of random length, without loss there."""
    history_dropout: Share = 0.1
    """Probability that a sequence's noisy blocks see no history, for guidance."""
    distil_steps: Size = 0
    """Number n of Euler steps to distil to (0: flow matching): one step learns to do what two of the starting weights,
    of length 1 / 2 n, do (progressive distillation). Halve stage by stage; a trunk stays as it is."""
    distil_guidance: Finite = 1.0
    """Scale of the guidance of the starting weights that is learned in (distil_steps); 1: none."""
    recompute: bool = False
    """Activation checkpointing of the DiT's blocks: less memory for a third more computation."""

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class ColaConfig:
    """A whole Cola DLM."""

    vae: TextVAEConfig = field(default_factory=TextVAEConfig)
    dit: DiTConfig = field(default_factory=DiTConfig)
    objective: VAEObjective = field(default_factory=VAEObjective)
    prior: PriorObjective = field(default_factory=PriorObjective)

    def __post_init__(self) -> None:
        if self.vae.latent_dim != self.dit.latent_dim:
            raise UserError(f"vae.latent_dim {self.vae.latent_dim} differs from dit.latent_dim {self.dit.latent_dim}")
        if self.vae.attention == "full" or self.dit.block_size % self.vae.visible_block:
            raise UserError(
                f"vae.attention {self.vae.attention} with vae.block_size {self.vae.block_size} sees beyond blocks of "
                f"dit.block_size {self.dit.block_size}, so blocks cannot be decoded one by one: it must divide that"
            )
        if self.dit.trunk_layers and self.vae.visible_block > 1:
            raise UserError(
                f"vae.attention {self.vae.attention} with vae.block_size {self.vae.block_size} sees ahead in a block, "
                f"but a trunk (dit.trunk_layers {self.dit.trunk_layers}) reads latents one by one: make it causal"
            )
        if self.prior.distil_steps and self.prior.strategy != "fixed":
            raise UserError(f"prior.distil_steps {self.prior.distil_steps} needs prior.strategy fixed")
        if self.prior.lambda_ar and not self.dit.trunk_layers:
            raise UserError(f"prior.lambda_ar {self.prior.lambda_ar} is for a trunk: set dit.trunk_layers above 0")
        if (self.prior.lambda_ar or self.dit.vocab_size) and self.vae.patch_size > 1:
            raise UserError(
                f"a trunk predicts single tokens (prior.lambda_ar), not the {self.vae.patch_size} of a latent"
            )
        if self.dit.vocab_size not in (0, self.vae.vocab_size):
            raise UserError(f"dit.vocab_size {self.dit.vocab_size} differs from vae.vocab_size {self.vae.vocab_size}")
        if self.prior.strategy == "scratch" and self.prior.lambda_ref:
            raise UserError("prior.strategy scratch has no stage-1 encoder to stay near: set prior.lambda_ref to 0")


class ColaParts(nn.Module):
    """Text VAE `vae` and prior `dit`: all that generation and scores need."""

    def __init__(self, config: ColaConfig) -> None:
        super().__init__()
        self.config = config
        self.vae = TextVAE(config.vae)
        self.dit = BlockCausalDiT(config.dit)

    @property
    def vocab_size(self) -> int:
        """Tokens."""
        return self.config.vae.vocab_size
