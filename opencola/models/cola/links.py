"""What the links of a model do, one by one: conditions of generation that differ in one of them (model.md §5).

B texts, N latents of d channels in blocks of S, P tokens a latent. Latents are normalised, as the prior sees them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from opencola.flow.ode import Solver
from opencola.flow.path import interpolate, target_velocity
from opencola.layers import randomness
from opencola.models.cola.inspect import decode_blocks, prior_samples
from opencola.models.cola.model import Cola
from opencola.models.cola.sampling import ColaSampling

FINE_STEPS = 64
"""Solver steps at least, in conditions without an error of the sampler's own."""
FINER = 4
"""And this many times the model's own."""
COPIES = 4  # noisy ones of a text, for the velocity's slope


@dataclass(frozen=True)
class Spread:
    """Of normalised latents, over all of them: per channel `mean` and `deviation` (d,), and the deviation `overall`
    from the common `centre` of all channels."""

    mean: Tensor
    deviation: Tensor
    centre: float
    overall: float


@dataclass(frozen=True)
class Margins:
    """Of decoded tokens: the decoder's `margin` (log-probability of its first choice less that of the second, in nats,
    mean), and the share `changed` whose first choice noise of the posterior's size changes."""

    margin: float
    changed: float


def settings(own: ColaSampling) -> dict[str, ColaSampling]:
    """Settings of generation, by the link that comes in with them: from those without error to the model's own."""
    guidance = replace(own, temperature=0.0, top_k=0, top_p=1.0, repetition_penalty=1.0, candidates=1)
    steps = replace(guidance, guidance=1.0, guidance_from=1.0, guidance_until=0.0, guidance_every=1)
    solver: Solver = "heun" if own.solver == "adaptive" else own.solver  # the adaptive one is exact, but slow
    prior = replace(steps, steps=max(FINE_STEPS, FINER * own.steps), solver=solver, shift=1.0, bf16_times=False)
    return {"prior": prior, "steps": steps, "guidance": guidance, "choice": own}


def next_blocks(
    model: Cola, prompts: Sequence[Sequence[int]], sampling: ColaSampling, pad_id: int, batch_size: int
) -> list[list[int]]:
    """The new tokens of the first block that is generated after each prompt."""
    short = replace(sampling, max_new_tokens=model.dit.config.block_size * model.vae.config.patch_size)
    written = []
    for first in range(0, len(prompts), batch_size):
        part = prompts[first : first + batch_size]
        blocks = next(model.generate(part, short, pad_id=pad_id, ids=range(first, first + len(part))))
        written += [block.tokens for block in blocks]
    return written


def write(
    model: Cola,
    prompts: Sequence[Sequence[int]],
    sampling: ColaSampling,
    pad_id: int,
    batch_size: int,
    is_over: Callable[[int, list[int]], bool],
) -> list[list[int]]:
    """All new tokens after each prompt, on the model's own history, until is_over(prompt, new tokens) or the budget."""
    written: list[list[int]] = [[] for _ in prompts]
    for first in range(0, len(prompts), batch_size):
        part = prompts[first : first + batch_size]

        def stop(sample: int, tokens: list[int], first: int = first) -> int | None:
            return len(tokens) if is_over(first + sample, tokens) else None

        ids = range(first, first + len(part))
        for blocks in model.generate(part, sampling, pad_id=pad_id, ids=ids, stop=stop):
            for block in blocks:
                written[first + block.sample] += block.tokens
    return written


@torch.inference_mode()
def given_back(model: Cola, tokens: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Tokens (B, N * P) as they come back from the posterior's mean and from a sample of it."""
    posterior = model.vae.encode(tokens)
    noise = randomness.normal(posterior.mean.shape[1:], seed, "round trip", torch.arange(len(tokens)))
    latents = posterior.mean, posterior.sample(noise.to(posterior.mean))
    from_mean, from_sample = (model.vae.decode(z).argmax(-1) for z in latents)
    return from_mean, from_sample


@torch.inference_mode()
def first_spreads(model: Cola, tokens: Tensor, sampling: ColaSampling) -> tuple[Spread, Spread]:
    """Of texts' first blocks (B, S * P), posterior samples of them and samples of the prior.

    A first block has no history, so neither guidance nor what latents the history holds has a part in these.
    """
    posterior = model.vae.encode(tokens)

    def draw(purpose: str, *step: int) -> Tensor:
        ids = torch.arange(len(tokens))
        return randomness.normal(posterior.mean.shape[1:], sampling.seed, f"spread {purpose}", ids, *step).to(
            posterior.mean
        )

    data = model.vae.normalise(posterior.sample(draw("posterior")))
    noise = {step: draw("step", step) for step in range(sampling.steps) if sampling.solver == "stochastic"}
    return spread(data), spread(prior_samples(model, data, draw("noise"), noise, sampling))


@torch.inference_mode()
def velocity_slope(model: Cola, tokens: Tensor, scored: Tensor, seed: int) -> float:
    """Slope of the regression of the targets z_1 - z_0 on the velocities, over texts (B, N * P) and times.

    scored (B, N * P) bool: the tokens whose latents count.

    It is 1 for the velocity that flow matching aims at, the targets' conditional mean, however hard the texts are: what
    the mean leaves over is orthogonal to it. Velocities that are half as large as they should be give 2.
    """
    posterior, ids = model.vae.encode(tokens), torch.arange(len(tokens))
    shape = posterior.mean.shape[1:]

    def draw(purpose: str, size: Sequence[int]) -> Tensor:
        return randomness.normal(size, seed, f"slope {purpose}", ids).to(posterior.mean)

    z_0 = model.vae.normalise(posterior.sample(draw("posterior", shape)))
    z_1 = draw("noise", (COPIES, *shape))
    t = torch.special.ndtr(draw("time", (COPIES, 1)))
    velocity = model.dit.packed(z_0, interpolate(z_0[:, None], z_1, t[..., None]), t).double()
    velocity = velocity * scored.unflatten(1, (shape[0], -1)).any(-1)[:, None, :, None]
    return float((target_velocity(z_0[:, None], z_1) * velocity).sum() / velocity.square().sum())


def spread(z: Tensor) -> Spread:
    """Of latents z (..., d)."""
    rows = z.double().flatten(0, -2).cpu()
    centre = rows.mean()
    return Spread(rows.mean(0), rows.std(0), float(centre), float((rows - centre).square().mean().sqrt()))


def renormalised(model: Cola, data: Spread, prior: Spread) -> Cola:
    """The model with that latent shift and scale at which its data are spread as its prior's samples are."""
    vae = model.vae.config
    scale = vae.latent_scale * prior.overall / data.overall
    shift = vae.latent_shift + data.centre / vae.latent_scale - prior.centre / scale
    config = replace(model.config, vae=replace(vae, latent_scale=scale, latent_shift=shift))
    with torch.device("meta"):
        other = Cola(config)
    other.load_state_dict(model.state_dict(), assign=True, strict=False)
    return other.eval()


@torch.inference_mode()
def margins(model: Cola, tokens: Tensor, scored: Tensor, sampling: ColaSampling) -> tuple[Margins, Margins]:
    """Of the decoder on posterior means of texts (B, N * P), and on samples of the prior given the true text before.

    scored (B, N * P) bool: the tokens that count.
    """
    posterior = model.vae.encode(tokens)
    mean, deviation = (
        model.vae.normalise(posterior.mean),
        torch.exp(0.5 * posterior.logvar) * abs(model.vae.config.latent_scale),
    )

    def draw(purpose: str, *step: int) -> Tensor:
        return randomness.normal(
            mean.shape[1:], sampling.seed, f"margins {purpose}", torch.arange(len(mean)), *step
        ).to(mean)

    noise = {step: draw("step", step) for step in range(sampling.steps) if sampling.solver == "stochastic"}
    prior = prior_samples(model, mean, draw("noise"), noise, sampling)

    def of(z: Tensor) -> Margins:
        logits, moved = (
            torch.cat([*decode_blocks(model, mean, rows)], 1) for rows in (z, z + deviation * draw("posterior"))
        )
        best = logits.log_softmax(-1).topk(2, -1).values
        margin = (best[..., 0] - best[..., 1])[scored].double().mean()
        return Margins(float(margin), float((logits.argmax(-1) != moved.argmax(-1))[scored].double().mean()))

    return of(mean), of(prior)
