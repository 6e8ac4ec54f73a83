"""A text token by token: what posterior, prior and decoder make of each, and its latent on a plane."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from opencola.evaluation.latents.slices import Slice, cut
from opencola.evaluation.statistics import Share, share
from opencola.flow.likelihood import Likelihood
from opencola.models.cola.inspect import Inspection, decode_instead, density_instead, inspect
from opencola.models.cola.model import Cola
from opencola.models.cola.sampling import ColaSampling
from opencola.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Seen:
    """One token. `log_posterior`: mean log-density of its latent's own samples under the posterior (minus its entropy);
    `log_decoder`: mean log-probability of the token from them; `log_prior`: their mean log-density under the prior, of
    the whole block `block`, given those before; all in nats. Shares of samples that decode to it: of
    the posterior, of the prior, of probes. `generated`: what the prior's first sample decodes to."""

    number: int
    token: str
    id: int
    generated: str
    log_posterior: float
    log_decoder: float
    block: int
    log_prior: float
    posterior_hit: Share
    prior_hit: Share
    probe_success: Share


def inspect_tokens(
    model: Cola,
    tokenizer: Tokenizer,
    ids: Sequence[int],
    num_samples: int,
    sampling: ColaSampling,
    deviation: float,
    density: Likelihood,
) -> tuple[Inspection, list[Seen]]:
    """A text's tokens, drawn and decoded as `inspect` says; end-of-text tokens, which nobody looks at, fill its last
    block."""
    chunk = model.dit.config.block_size * model.vae.config.patch_size
    rows = torch.tensor([[*ids] + [tokenizer.eos_id] * (-len(ids) % chunk)], device=model.vae.head.weight.device)
    inspection = inspect(model, rows, num_samples, sampling, deviation, density)
    return inspection, look(model, tokenizer, ids, inspection)


def look(model: Cola, tokenizer: Tokenizer, ids: Sequence[int], inspection: Inspection) -> list[Seen]:
    """What the inspection says of every token."""
    patch, count = model.vae.config.patch_size, len(inspection.posterior_samples)
    chunk = patch * model.dit.config.block_size
    log_posterior = -inspection.posterior.entropy()[0]

    def hits(tokens: torch.Tensor, number: int) -> Share:
        return share(int((tokens[:, number] == ids[number]).sum()), count)

    return [
        Seen(
            number,
            tokenizer.decode([token]),
            token,
            tokenizer.decode([int(inspection.prior_tokens[0, number])]),
            float(log_posterior[number // patch]),
            float(inspection.log_decoder[:, number].mean()),
            number // chunk,
            float(inspection.log_prior[:, number // chunk].mean()),
            hits(inspection.posterior_tokens, number),
            hits(inspection.prior_tokens, number),
            hits(inspection.probe_tokens, number),
        )
        for number, token in enumerate(ids)
    ]


def slice_of(
    model: Cola, tokenizer: Tokenizer, token: Seen, inspection: Inspection, density: Likelihood | None
) -> Slice:
    """The latent of a token on a plane, with contours of the prior's density where it is given how to compute that."""
    mean, patch = inspection.posterior.mean, model.vae.config.patch_size
    latent, place = divmod(token.number, patch)

    def decode(points: np.ndarray) -> list[str]:
        tokens = decode_instead(model, mean, latent, torch.from_numpy(points).to(mean))[:, place]
        return [tokenizer.decode([token]) for token in tokens.tolist()]

    def log_density(points: np.ndarray) -> np.ndarray:
        assert density is not None
        placed = torch.from_numpy(points).to(mean)
        return density_instead(model, mean, latent, placed, density).double().cpu().numpy()

    centre, posterior, prior = (
        z[:, latent].double().cpu().numpy() for z in (mean, inspection.posterior_samples, inspection.prior_samples)
    )
    return cut(
        f"token {token.number}: {token.token!r}",
        token.token,
        centre[0],
        posterior,
        prior,
        decode,
        None if density is None else log_density,
    )
