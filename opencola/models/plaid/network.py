"""The network of Plaid: embeddings of tokens, noise schedule and trunk (Gulrajani & Hashimoto 2023).

gamma(t) = -log SNR(t) grows from gamma(0), nearly clean, to gamma(1), nearly noise. alpha² = sigmoid(-gamma), sigma² =
sigmoid(gamma), q(z_t | x) = N(alpha x, sigma² I) for the embedding x of a token. B sequences of L tokens, E channels, V
words. The decoder p(x | z_0) is the output prior alone, so that training needs no pass of the trunk at t = 0.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opencola.kernels.choice import products_in
from opencola.layers.attention import Attend
from opencola.layers.llama import Llama, LlamaConfig
from opencola.layers.operations import Linear, linear
from opencola.layers.packed import block_causal
from opencola.layers.transformer import TimeEmbedding, initialise
from opencola.ranges import LARGEST, Count, Range, Share, check

SHAPE_SCALE = 1e-3
"""Of the gradient of the schedule's shape: at full size its outliers decide the norm that all gradients are clipped by,
and the trunk does not learn from the very batches that it is wrong about. To AdamW the scale is nothing."""


@dataclass(frozen=True)
class PlaidConfig:
    """Sizes of a Plaid."""

    vocab_size: Annotated[int, Range(2, LARGEST)] = 1024
    """Number of tokens in the vocabulary, V; set from the tokenizer when training."""
    embedding_dim: Count = 16
    """Number of channels of a token's embedding, E: what diffuses."""
    trunk: LlamaConfig = field(default_factory=LlamaConfig)
    """Sizes of the transformer, which sees the whole sequence."""
    self_conditioning: Share = 0.25
    """Share of training sequences whose estimate sees a first estimate; 0: the trunk never sees one."""

    def __post_init__(self) -> None:
        check(self)


class NoiseSchedule(nn.Module):
    """gamma(t) = gamma(0) + (gamma(1) - gamma(0)) s(t): trained ends, and a trained shape s from 0 to 1, increasing.

    s is a sum of a line and sigmoids, all of positive slope, shifted and scaled to its ends.
    """

    def __init__(self, start: float = -3.0, end: float = 6.0, units: int = 32) -> None:
        super().__init__()
        self.start = nn.Parameter(torch.tensor(float(start)))
        self.log_span = nn.Parameter(torch.tensor(math.log(end - start)))
        self.log_line = nn.Parameter(torch.zeros(()))
        self.log_weight = nn.Parameter(torch.full((units,), -math.log(units)))
        self.log_steepness = nn.Parameter(torch.full((units,), math.log(8.0)))
        self.centre = nn.Parameter((torch.arange(units) + 0.5) / units)

    def _raw(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """s(t) before it is shifted and scaled, and ds/dt."""
        steps = torch.sigmoid(self.log_steepness.exp() * (t[..., None] - self.centre))
        slopes = (self.log_weight + self.log_steepness).exp() * steps * (1 - steps)
        line = self.log_line.exp()
        return line * t + (self.log_weight.exp() * steps).sum(-1), line + slopes.sum(-1)

    def shape(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """s(t) and ds/dt for times t of any shape."""
        raw, slope = self._raw(t)
        low, high = self._raw(t.new_tensor([0.0, 1.0]))[0]
        return (raw - low) / (high - low), slope / (high - low)

    def gamma(self, shape: Tensor) -> Tensor:
        """gamma where the shape has the value `shape`: 0 at the data's end, 1 at the noise's."""
        return self.start + self.log_span.exp() * shape


def noised(x: Tensor, noise: Tensor, gamma: Tensor) -> Tensor:
    """A draw alpha x + sigma noise of q(z_t | x): x, noise (B, L, E), gamma (B,)."""
    gamma = gamma[:, None, None]
    return torch.sigmoid(-gamma).sqrt() * x + torch.sigmoid(gamma).sqrt() * noise


def output_prior(z: Tensor, embeddings: Tensor, gamma: Tensor) -> Tensor:
    """log q(z_t | x) of every token, but for what all tokens share: (B, L, V) of z (B, L, E), gamma (B,) (§3.3).

    embeddings (V, E) of one common length, so that of -|z - alpha x|² / (2 sigma²) only alpha z x / sigma² differs.
    """
    scale = torch.sigmoid(-gamma).sqrt() / torch.sigmoid(gamma)
    with torch.autocast(z.device.type, enabled=False), products_in("float32"):  # differences of large numbers
        return scale[:, None, None] * linear(z, embeddings)


def prior_kl(x: Tensor, gamma: Tensor) -> Tensor:
    """KL(q(z_1 | x) || N(0, I)) in nats, by token: (B, L) of x (B, L, E) and gamma(1) ()."""
    alpha2, sigma2 = torch.sigmoid(-gamma), torch.sigmoid(gamma)
    return 0.5 * (sigma2 + alpha2 * x.square() - 1 - F.logsigmoid(gamma)).sum(-1)


def diffusion_integrand(x: Tensor, estimate: Tensor, gamma: Tensor, slope: Tensor) -> Tensor:
    """1/2 gamma'(t) exp(-gamma(t)) |x - estimate|²: nats a unit of time, by token (B, L); gamma, slope (B,)."""
    weight = 0.5 * slope * torch.exp(-gamma)
    return weight[:, None] * (x - estimate).square().sum(-1)


def pattern(rows: int, documents: Tensor | None = None) -> Attend:
    """Every row sees every row, or every row of its own document (documents (B, L))."""
    return block_causal(rows, rows, documents)


class PlaidNetwork(nn.Module):
    """Embeddings, noise schedule and trunk."""

    def __init__(self, config: PlaidConfig) -> None:
        super().__init__()
        self.config = config
        width, dim = config.trunk.width, config.embedding_dim
        self.embedding = nn.Parameter(torch.randn(config.vocab_size, dim))
        self.schedule = NoiseSchedule()
        self.embed = Linear(dim * (2 if config.self_conditioning else 1), width, bias=False)
        self.time = TimeEmbedding(width)
        self.head = Linear(width, config.vocab_size)
        initialise(self, lambda linear: linear.in_features**-0.5)
        self.trunk = Llama(config.trunk)
        # the output prior alone, to begin with; zeros would keep the trunk's first gradient at zero
        nn.init.normal_(self.head.weight, std=0.02)

    @property
    def vocab_size(self) -> int:
        """Tokens."""
        return self.config.vocab_size

    def embeddings(self) -> Tensor:
        """(V, E), each of length sqrt(E): a channel has unit scale, whatever training does (§3.1)."""
        wide = self.embedding.to(torch.promote_types(self.embedding.dtype, torch.float32))
        return F.normalize(wide, dim=-1) * math.sqrt(self.config.embedding_dim)

    def logits(self, z: Tensor, shape: Tensor, first: Tensor, attend: Attend) -> Tensor:
        """Logits (B, L, V) of the tokens given z_t (B, L, E): the trunk's and the output prior's.

        shape (B,): s(t); first (B, L, E): an earlier estimate, zeros for none, not read without self-conditioning.
        """
        h = torch.cat((z, first), dim=-1) if self.config.self_conditioning else z
        h = self.embed(h) + self.time(shape)[:, None]
        h = self.trunk(h, torch.arange(z.shape[1], device=z.device), attend)
        prior = output_prior(z, self.embeddings(), self.schedule.gamma(shape))
        return self.head(h).to(prior.dtype) + prior

    def estimate(self, z: Tensor, shape: Tensor, first: Tensor, attend: Attend) -> Tensor:
        """Estimate of x (B, L, E): the mean embedding under the logits (categorical reparameterisation, §3.2)."""
        return self.mean_embedding(self.logits(z, shape, first, attend))

    def mean_embedding(self, logits: Tensor) -> Tensor:
        """Of the tokens under logits (B, L, V): (B, L, E)."""
        with torch.autocast(logits.device.type, enabled=False), products_in("float32"):
            return linear(logits.softmax(-1), self.embeddings().T)

    def decoder(self, z: Tensor) -> Tensor:
        """log p(x | z_0) of every token: (B, L, V) of z_0 (B, L, E)."""
        gamma = self.schedule.gamma(z.new_zeros(len(z)))
        return output_prior(z, self.embeddings(), gamma).log_softmax(-1)

    def terms(
        self,
        tokens: Tensor,
        scored: Tensor,
        t: Tensor,
        noise: Tensor,
        conditioned: Sequence[int],
        documents: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """One draw of the bound's terms, in nats, by token: each (B, L), 0 where not scored. Differentiable.

        tokens, scored (B, L); t (B,) times; noise (2, B, L, E) of z_0 and z_t; conditioned: places of sequences whose
        estimate sees a first one; documents (B, L): what sees each other. Tokens that are not scored are given: they
        are noised along, and a first estimate knows them. By Jensen's inequality that bounds the scored tokens'
        probability given the others.
        """
        table = self.embeddings()
        x = F.embedding(tokens, table)
        shape, slope = self.schedule.shape(t)
        factor = torch.ones_like(t)
        for value in (shape, slope):
            if value.requires_grad:
                value.register_hook(lambda gradient: gradient * factor)
        gamma = self.schedule.gamma(shape)
        z = noised(x, noise[1], gamma)
        first = torch.zeros_like(z)
        if self.config.self_conditioning and conditioned:
            rows = torch.tensor(conditioned, device=z.device)
            with torch.no_grad():
                attend = pattern(tokens.shape[1], None if documents is None else documents[rows])
                estimated = self.estimate(z[rows], shape[rows], first[rows], attend)
                first[rows] = torch.where(scored[rows, :, None], estimated, x[rows])
        estimate = self.estimate(z, shape, first, pattern(tokens.shape[1], documents))
        slope = slope * self.schedule.log_span.exp()
        diffusion = scored * diffusion_integrand(x, estimate, gamma, slope)
        # The bound does not depend on the shape, only how much this estimate x of it varies with t. Its square, which
        # the paper has the shape descend, has tails so heavy that the shape collapses; x log x, as convex, is least for
        # the same shape. Its gradient is each sequence's own times log x + 1; the ends keep the bound's (§3.1).
        value = (diffusion.sum(1) / scored.sum(1).clamp(min=1)).detach().clamp(min=1e-6)
        factor = (SHAPE_SCALE * (value.log() + 1)).to(t.dtype)
        z_0 = noised(x, noise[0], self.schedule.gamma(torch.zeros_like(t)))
        chosen = self.decoder(z_0).gather(-1, tokens[..., None])[..., 0]
        prior = prior_kl(x, self.schedule.gamma(torch.ones_like(t[0])))
        return {"reconstruction": scored * -chosen, "prior": scored * prior, "diffusion": diffusion}
