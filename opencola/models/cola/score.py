"""Log-probabilities of texts under a Cola: ELBO and IWAE with K posterior samples (model.md §6).

L tokens, N latents of d channels, P tokens a latent, G blocks of S latents. A text that ends inside a block is filled
up: q of the filling latents is the encoder's posterior of filling tokens, which are not scored themselves. That is a
bound on the text alone, though a looser one.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from opencola.errors import UserError
from opencola.flow.likelihood import Density, Likelihood, draw_groups, draw_probes, log_density
from opencola.kernels.choice import invariant
from opencola.models.cola.importance import Estimator, Evaluation, Terms
from opencola.models.cola.parts import ColaParts
from opencola.models.cola.predict import trunk_score
from opencola.models.inputs import checked_texts, sample_ids
from opencola.models.language_model import Score
from opencola.ranges import Count


@dataclass(frozen=True)
class Scoring(Likelihood):
    """How texts are scored."""

    samples: Count = 8
    """Number of posterior samples K of every text."""
    estimator: Estimator | Literal["trunk"] = "iwae"
    """elbo: mean of log w over the samples' weights w; iwae: log of their mean, which is never below that; trunk: not
    the model's at all but its trunk's, which predicts token by token, so that it is exact (dit.vocab_size above 0)."""
    conditional: Literal["joint", "blockwise", "first_block"] = "blockwise"
    """A continuation given its prompt. joint: score of both less that of the prompt, a difference of bounds. blockwise:
    given the prompt's latents (posterior mean), those in the first continued block pinned, as when text is generated.
    first_block: the same, of the tokens in that block alone."""
    rows: Count = 32
    """Number of samples to solve at a time: memory; no figure depends on it."""

    @classmethod
    def quick(cls) -> "Scoring":
        """Settings that cost little: a sixteenth of the evaluations."""
        return cls(solver="midpoint", steps=8, samples=2)

    @property
    def texts_at_a_time(self) -> int:
        """How many to score together: steps of dopri5 are common to all that is solved together."""
        return 1 if self.solver == "dopri5" else max(1, self.rows // self.samples)

    def label(self) -> str:
        """All that the figures depend on, in words."""
        if self.estimator == "trunk":
            return "exact, of the trunk"
        return f"{self.estimator.upper()}, K = {self.samples}, {super().label()}"


@dataclass(frozen=True)
class Text:
    """What is scored: the tokens from `known` on, given the latents of those before (none: 0)."""

    tokens: list[int]
    known: int = 0

    def blocks(self, chunk: int) -> range:
        """The blocks, of `chunk` tokens each, that are scored."""
        return range(self.known // chunk, -(-len(self.tokens) // chunk))


def log_prior(
    model: ColaParts, z_0: Tensor, keys: Sequence[tuple[int, ...]], settings: Likelihood, free: Tensor | None = None
) -> Density:
    """log p of every block of normalised latents z_0 (B, N, d) given those before it, by one packed solve: (B, G).

    keys: of every row, such as (text, sample), for its probes; free (B, N) bool: latents that are scored; others are
    clean, at time 0, and do not move. Raises UserError where N is not a number of whole blocks.
    """
    num_latents = z_0.shape[1]
    size = model.dit.config.block_size
    if num_latents % size:
        raise ValueError(f"{num_latents} latents are not a multiple of block_size {size}")
    free = torch.ones_like(z_0[..., 0], dtype=torch.bool) if free is None else free

    first = int(free.any(0).unflatten(0, (-1, size)).any(-1).int().argmax())  # block that anything moves in
    given = model.dit.given(z_0, ~free, first * size)

    def velocity(z: Tensor, t: float) -> Tensor:
        v = given(z[:, first:].flatten(1, 2), t)
        return torch.nn.functional.pad(v.unflatten(1, (-1, size)), (0, 0, 0, 0, first, 0))

    z = z_0.unflatten(1, (-1, size))
    moves = free.unflatten(1, (-1, size))[..., None].expand_as(z)
    return log_density(velocity, z, settings, draw_probes(z, keys, settings), moves)


@torch.no_grad()
def text_terms(
    model: ColaParts, texts: Sequence[Text], ids: Sequence[int], settings: Scoring, pad_id: int = 0
) -> list[tuple[Terms, int]]:
    """Terms of every text, and evaluations of the velocity, of which there are as many for all: one packed solve."""
    prepared = [_Latents.draw(model, text, i, settings, pad_id) for text, i in zip(texts, ids, strict=True)]
    longest = max(latents.z.shape[1] for latents in prepared)

    def together(parts: list[Tensor]) -> Tensor:
        return torch.cat([torch.cat((x, x.new_zeros(len(x), longest - x.shape[1], *x.shape[2:])), 1) for x in parts])

    z_0 = together([model.vae.normalise(latents.z) for latents in prepared])
    free = together([latents.free.expand(settings.samples, -1) for latents in prepared])
    keys = [(i, sample) for i in ids for sample in range(settings.samples)]
    density = log_prior(model, z_0, keys, settings, free)
    results = []
    for text, latents, prior in zip(texts, prepared, density.log_prob.split(settings.samples), strict=True):
        groups = latents.z.shape[1] // model.dit.config.block_size
        # the prior's density is of normalised latents, q's is not
        volume = latents.z.shape[2] * math.log(abs(model.vae.config.latent_scale))
        scaled = latents.free.unflatten(0, (groups, -1)).sum(-1) * volume
        terms = latents.decode(model, text), prior[:, :groups].double() + scaled, latents.log_q.double()
        results.append((Terms(*terms, len(text.tokens) - text.known), density.evaluations))
    return results


@invariant
def evaluate(
    model: ColaParts,
    prompts: Sequence[Sequence[int]],
    continuations: Sequence[Sequence[int]],
    settings: Scoring,
    *,
    pad_id: int = 0,
    ids: Sequence[int] | None = None,
) -> list[Evaluation]:
    """Terms of every continuation. ids: decide the draws (places in the list when not given); pad_id: fills blocks up.

    A text's figures do not depend on the others, but for rounding. Raises UserError for empty continuations, ids
    beyond the vocabulary, and an encoder without a variance.
    """
    ids = sample_ids(prompts, ids)
    chunk = model.vae.config.patch_size * model.dit.config.block_size
    if not model.vae.config.release.variational:
        raise UserError("model.vae.release.variational is false: without a posterior there is no likelihood")
    texts, prefixes = [], []
    for prompt, tokens in zip(prompts, checked_texts(prompts, continuations, model.vae.config.vocab_size), strict=True):
        known = 0 if settings.conditional == "joint" else len(prompt)
        if settings.conditional == "first_block":
            tokens = tokens[: (known // chunk + 1) * chunk]
        texts.append(Text(tokens, known))
        prefixes.append(Text(list(prompt)) if settings.conditional == "joint" and prompt else None)
    jobs = [(place, text) for place, pair in enumerate(zip(texts, prefixes, strict=True)) for text in pair if text]
    by_job: dict[tuple[int, bool], tuple[Terms, int]] = {}
    for batch in _batches(jobs, chunk, settings.texts_at_a_time):
        results = text_terms(model, [text for _, text in batch], [ids[place] for place, _ in batch], settings, pad_id)
        keyed = zip(batch, results, strict=True)
        by_job |= {(place, text is prefixes[place]): result for (place, text), result in keyed}
    evaluations = []
    for place in range(len(texts)):
        terms, count = by_job[place, False]
        prefix = by_job.get((place, True))
        evaluations.append(Evaluation(terms, prefix and prefix[0], count))
    return evaluations


def score(
    model: ColaParts,
    prompts: Sequence[Sequence[int]],
    continuations: Sequence[Sequence[int]],
    settings: Scoring,
    *,
    pad_id: int = 0,
    ids: Sequence[int] | None = None,
) -> Score:
    """Log-probability of every continuation (token ids, with the end-of-text id where that is meant to be scored).

    parts: the ELBO's terms decoder, prior, posterior; others: elbo and iwae with their standard errors, and evaluations
    of the velocity. Otherwise as `evaluate`. Of the trunk (settings.estimator) as `predict.trunk_score`.
    """
    if settings.estimator == "trunk":
        return trunk_score(model, prompts, continuations, settings.rows, settings.label())
    evaluations = evaluate(model, prompts, continuations, settings, pad_id=pad_id, ids=ids)
    return to_score(evaluations, settings, any(prompts))


def to_score(evaluations: Sequence[Evaluation], settings: Scoring, conditional: bool) -> Score:
    """The evaluations as one Score; conditional: whether there were prompts."""
    names: tuple[Estimator, ...] = ("elbo", "iwae")
    estimates = {name: [evaluation.estimate(name) for evaluation in evaluations] for name in names}
    values = {name: torch.stack([e.value for e in several]) for name, several in estimates.items()}
    errors = {name: torch.stack([e.standard_error for e in several]) for name, several in estimates.items()}
    parts = [evaluation.parts() for evaluation in evaluations]
    conditional = conditional or settings.conditional == "first_block"
    label = settings.label() + (f", {settings.conditional}" if conditional else "")
    assert settings.estimator != "trunk"
    return Score(
        values[settings.estimator],
        errors[settings.estimator],
        torch.tensor([evaluation.num_tokens for evaluation in evaluations]),
        kind(settings, conditional),
        label,
        {name: torch.stack([p[name] for p in parts]) for name in parts[0]},
        {
            **{str(name): value for name, value in values.items()},
            **{f"{name}_standard_error": error for name, error in errors.items()},
            "evaluations": torch.tensor([evaluation.evaluations for evaluation in evaluations]),
        },
        [evaluation.terms.by_block() for evaluation in evaluations],
    )


def kind(settings: Scoring, conditional: bool) -> Literal["bound", "estimate"]:
    """What a score is: a difference of bounds is none, nor is an IWAE of weights with a random divergence."""
    noisy = settings.divergence == "hutchinson" and settings.estimator == "iwae" and settings.samples > 1
    return "estimate" if noisy or (conditional and settings.conditional == "joint") else "bound"


def _batches(jobs: Sequence[tuple[int, Text]], chunk: int, most: int) -> Iterator[list[tuple[int, Text]]]:
    """Jobs to solve together: from the first block that any scores to the last, at most twice what they need alone."""
    batch: list[tuple[int, Text]] = []
    for job in sorted(jobs, key=lambda job: (job[1].blocks(chunk).start, len(job[1].tokens))):
        alone = [text.blocks(chunk) for _, text in (*batch, job)]
        solved = len(alone) * (max(blocks.stop for blocks in alone) - alone[0].start)
        if batch and (len(batch) == most or solved > 2 * sum(len(blocks) for blocks in alone)):
            yield batch
            batch = []
        batch.append(job)
    if batch:
        yield batch


@dataclass(frozen=True)
class _Latents:
    """Posterior samples of one text."""

    z: Tensor  # (K, N, d) un-normalised
    log_q: Tensor  # (K, N), zero where not free
    free: Tensor  # (N,) bool: what was drawn

    @classmethod
    def draw(cls, model: ColaParts, text: Text, id_: int, settings: Scoring, pad_id: int) -> "_Latents":
        vae, size = model.vae, model.dit.config.block_size
        patch, device = vae.config.patch_size, vae.head.weight.device
        filled = text.tokens + [pad_id] * (-len(text.tokens) % (size * patch))
        posterior = vae.encode(torch.tensor([filled], device=device))
        num_latents, pinned = len(filled) // patch, text.known // patch
        keys = [(id_, sample) for sample in range(settings.samples)]
        shape = (size, vae.config.latent_dim)
        noise = draw_groups(shape, num_latents // size, settings.seed, "posterior", keys).flatten(1, 2)
        z = posterior.sample(noise.to(posterior.mean))
        log_q = posterior.log_prob(z)
        free = torch.arange(num_latents, device=device) >= pinned
        if pinned:  # encoded without what follows, as a prompt is; a patch that it fills in part is left to the prior
            z[:, :pinned] = vae.encode(torch.tensor([text.tokens[: pinned * patch]], device=device)).mean
        return cls(z, log_q * free, free)

    def decode(self, model: ColaParts, text: Text) -> Tensor:
        """log p(x_i | z) (K, N * P) of the scored tokens."""
        logits = model.vae.decode(self.z.to(model.vae.head.weight.dtype))
        scored = torch.tensor(text.tokens[text.known :], device=logits.device)
        chosen = logits[:, text.known : len(text.tokens)].double().log_softmax(-1)
        log_probabilities = chosen.gather(-1, scored.expand(len(chosen), -1)[..., None])[..., 0]
        rest = logits.shape[1] - len(text.tokens)
        return torch.nn.functional.pad(log_probabilities, (text.known, rest))
