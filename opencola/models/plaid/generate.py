"""Texts of a Plaid: ancestral sampling, in which a prompt's rows are drawn from what they are known to be."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from opencola.kernels.choice import invariant
from opencola.layers import randomness
from opencola.models.finite import check_logits, check_states
from opencola.models.inputs import checked_prompts, sample_ids
from opencola.models.plaid.network import PlaidNetwork, pattern
from opencola.models.plaid.sampling import PlaidSampling
from opencola.models.sampling import choose, penalise
from opencola.models.stopping import OwnStop, StopRule, TokenBlock


@invariant
@torch.no_grad()
def generate(
    model: PlaidNetwork,
    prompts: Sequence[Sequence[int]],
    sampling: PlaidSampling,
    *,
    eos_ids: Sequence[int] = (),
    pad_id: int = 0,
    ids: Sequence[int] | None = None,
    stop: StopRule = lambda sample, tokens: None,
) -> Iterator[list[TokenBlock]]:
    """Yield the new tokens of every sample, whole; samples whose prompts are of one length are written together.

    prompts: token ids; eos_ids end a sample and are not given out; ids: the samples' ids, which decide their noise
    (their place in the batch when not given); stop(sample, new tokens) -> how many of these to keep, or None; pad_id
    changes nothing: no prompt is filled up. Raises ValueError for prompts with ids beyond the vocabulary.
    """
    ids = sample_ids(prompts, ids)
    texts = checked_prompts(prompts, model.config.vocab_size)
    policy = OwnStop(texts, sampling, eos_ids, stop)
    for length in sorted({len(text) for text in texts}):
        active = [place for place, text in enumerate(texts) if len(text) == length]
        known = torch.tensor([texts[place] for place in active], dtype=torch.long, device=model.embedding.device)
        written = write(model, known, [ids[place] for place in active], sampling)
        yield policy.cut(active, written.tolist(), 0)


def write(model: PlaidNetwork, known: Tensor, ids: Sequence[int], sampling: PlaidSampling) -> Tensor:
    """Tokens (B, P + max_new_tokens) that begin with the prompts known (B, P); draws depend on the ids (B)."""
    table, length = model.embeddings(), known.shape[1]
    shape = length + sampling.max_new_tokens, model.config.embedding_dim
    x = torch.nn.functional.embedding(known, table)

    def draw(step: int) -> Tensor:
        generators = [randomness.generator(sampling.seed, "ancestral", i, step) for i in ids]
        return torch.stack([torch.randn(shape, generator=g) for g in generators]).to(table)

    u = torch.linspace(1, 0, sampling.steps + 1, dtype=torch.float64).to(table)
    times = sampling.shift * u / (1 + (sampling.shift - 1) * u)
    shapes = model.schedule.shape(times)[0]
    noise = draw(0)
    z, first = clamp(noise, noise, x, model.schedule.gamma(shapes[0])), torch.zeros_like(noise)
    states: list[Tensor] = []
    for step in range(sampling.steps):
        later, sooner = shapes[step], shapes[step + 1]
        first = guided(model, z, later, first, known, sampling.guidance - 1)
        first[:, :length] = x
        noise = draw(step + 1)
        z = ancestral(z, first, noise, model.schedule.gamma(later), model.schedule.gamma(sooner))
        z = clamp(z, noise, x, model.schedule.gamma(sooner))
        states.append(z)
    check_states(states, ids)
    logits = model.decoder(z)[:, length:]
    check_logits(logits, ids)
    logits = penalise(logits, known.tolist(), sampling.repetition_penalty)
    tokens = choose(logits, sampling, [randomness.generator(sampling.seed, "token", i) for i in ids])
    return torch.cat((known, tokens), dim=1)


def ancestral(z: Tensor, estimate: Tensor, noise: Tensor, gamma: Tensor, gamma_sooner: Tensor) -> Tensor:
    """A draw of q(z_s | z_t, x = estimate), s < t: z_t, estimate and noise (B, R, E), gamma(t) () and gamma(s) ()."""
    mean, variance = posterior(z, estimate, gamma, gamma_sooner)
    return mean + variance.sqrt() * noise


def posterior(z: Tensor, x: Tensor, gamma: Tensor, gamma_sooner: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of q(z_s | z_t, x), s < t (Kingma et al. 2021, appendix A): z, x (B, R, E), gammas ()."""
    c = -torch.expm1(gamma_sooner - gamma)
    alpha, alpha_sooner = torch.sigmoid(-gamma).sqrt(), torch.sigmoid(-gamma_sooner).sqrt()
    return alpha_sooner * ((1 - c) / alpha * z + c * x), torch.sigmoid(gamma_sooner) * c


def clamp(z: Tensor, noise: Tensor, x: Tensor, gamma: Tensor) -> Tensor:
    """z (B, R, E) with its first rows drawn from q(z_t | x) of the prompt's embeddings x (B, P, E)."""
    length = x.shape[1]
    fixed = torch.sigmoid(-gamma).sqrt() * x + torch.sigmoid(gamma).sqrt() * noise[:, :length]
    return torch.cat((fixed, z[:, length:]), dim=1)


def guided(model: PlaidNetwork, z: Tensor, shape: Tensor, first: Tensor, known: Tensor, weight: float) -> Tensor:
    """Estimate of x (B, R, E), moved by token guidance towards the prompt's tokens known (B, P) (§5).

    The score gets weight * grad log p(known | z_t), so the estimate gets sigma² / alpha times that.
    """
    length = known.shape[1]
    guide = weight != 0 and length > 0
    with torch.set_grad_enabled(guide):
        z = z.detach().requires_grad_(guide)
        logits = model.logits(z, shape[None], first, pattern(z.shape[1]))  # one time for all, computed once
        estimate = model.mean_embedding(logits)
        if not guide:
            return estimate
        chosen = logits[:, :length].log_softmax(-1).gather(-1, known[..., None])
        (gradient,) = torch.autograd.grad(chosen.sum(), z)
    gamma = model.schedule.gamma(shape)
    return estimate.detach() + weight * torch.sigmoid(gamma) / torch.sigmoid(-gamma).sqrt() * gradient
