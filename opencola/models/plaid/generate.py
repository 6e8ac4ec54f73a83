"""Texts of a Plaid: ancestral sampling, in which a prompt's rows are drawn from what they are known to be."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from opencola.kernels.choice import invariant
from opencola.layers import randomness
from opencola.models.finite import check_logits, check_states
from opencola.models.inputs import check_held, checked_prompts
from opencola.models.plaid.network import PlaidNetwork, pattern
from opencola.models.plaid.sampling import PlaidSampling
from opencola.models.sampling import choose, penalise
from opencola.models.stopping import StopRule, Text, TokenBlock
from opencola.models.writing import begun, write


@invariant
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
    texts = begin(model, begun(prompts, sampling, eos_ids, ids, stop)).texts
    for rows in _alike(texts):
        yield from write(PlaidWriting(model, [texts[row] for row in rows]))


def begin(model: PlaidNetwork, texts: Sequence[Text], pad_id: int = 0) -> "PlaidWriting":
    """Texts to write. Arguments and errors as those of `generate`."""
    for text in texts:
        check_held(text)
    checked_prompts([text.prompt for text in texts], model.config.vocab_size)
    return PlaidWriting(model, texts)


def _alike(texts: Sequence[Text]) -> list[list[int]]:
    """The places of texts that can be written together: those of one length."""
    lengths = [(len(text.prompt), text.sampling.max_new_tokens) for text in texts]
    return [[row for row, own in enumerate(lengths) if own == length] for length in sorted(set(lengths))]


class PlaidWriting:
    """Texts that are written whole, in one step (`Writing`)."""

    def __init__(self, model: PlaidNetwork, texts: Sequence[Text]) -> None:
        self.model, self.texts = model, texts

    @torch.no_grad()
    def step(self) -> list[TokenBlock]:
        """As in the protocol."""
        new: dict[int, list[int]] = {}
        for rows in _alike(self.texts):
            new |= zip(rows, write_whole(self.model, [self.texts[row] for row in rows]).tolist(), strict=True)
        return [text.take(new[row]) for row, text in enumerate(self.texts)]

    def select(self, rows: Sequence[int]) -> "PlaidWriting":
        """As in the protocol."""
        return PlaidWriting(self.model, [self.texts[row] for row in rows])

    def join(self, other: "PlaidWriting") -> "PlaidWriting":
        """As in the protocol."""
        return PlaidWriting(self.model, [*self.texts, *other.texts])


def cache_bytes(model: PlaidNetwork, text: Text) -> int:
    """There is no cache: bytes of the logits of a text, the largest of what is computed for it."""
    return 8 * (len(text.prompt) + text.sampling.max_new_tokens) * model.config.vocab_size


def write_whole(model: PlaidNetwork, texts: Sequence[Text]) -> Tensor:
    """The new tokens (B, max_new_tokens) of texts whose prompts are of one length, and their budgets, too."""
    samplings: list[PlaidSampling] = [text.sampling for text in texts]
    shared, ids = samplings[0], [text.id for text in texts]
    known = torch.tensor([text.prompt for text in texts], dtype=torch.long, device=model.embedding.device)
    table, length = model.embeddings(), known.shape[1]
    shape = length + shared.max_new_tokens, model.config.embedding_dim
    x = torch.nn.functional.embedding(known, table)

    def generators(purpose: str, *step: int) -> list[torch.Generator]:
        return [randomness.generator(text.sampling.seed, purpose, text.id, *step) for text in texts]

    def draw(step: int) -> Tensor:
        return torch.stack([torch.randn(shape, generator=g) for g in generators("ancestral", step)]).to(table)

    u = torch.linspace(1, 0, shared.steps + 1, dtype=torch.float64).to(table)
    times = shared.shift * u / (1 + (shared.shift - 1) * u)
    shapes = model.schedule.shape(times)[0]
    noise = draw(0)
    z, first = clamp(noise, noise, x, model.schedule.gamma(shapes[0])), torch.zeros_like(noise)
    states: list[Tensor] = []
    for step in range(shared.steps):
        later, sooner = shapes[step], shapes[step + 1]
        first = guided(model, z, later, first, known, shared.guidance - 1)
        first[:, :length] = x
        noise = draw(step + 1)
        z = ancestral(z, first, noise, model.schedule.gamma(later), model.schedule.gamma(sooner))
        z = clamp(z, noise, x, model.schedule.gamma(sooner))
        states.append(z)
    check_states(states, ids)
    logits = model.decoder(z)[:, length:]
    check_logits(logits, ids)
    logits = penalise(logits, known.tolist(), [sampling.repetition_penalty for sampling in samplings])
    return choose(logits, samplings, generators("token"))


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
