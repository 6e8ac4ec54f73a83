"""Inspection against generation from the true text before each block, and against plain decoding."""

from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch

from opencola.flow.dit import DiTConfig
from opencola.flow.likelihood import Likelihood
from opencola.models.cola.inspect import decode_blocks, decode_instead, density_instead, inspect, prior_samples
from opencola.models.cola.model import Cola
from opencola.models.cola.parts import ColaConfig
from opencola.models.cola.sampling import ColaSampling
from opencola.models.cola.score import Scoring, log_prior, score
from opencola.vae.text_vae import TextVAEConfig

COUNT, VOCABULARY = 3, 40
DEFAULTS: dict[str, Any] = {
    "guidance_every": 1, "guidance_from": 1.0, "guidance_until": 0.0, "bf16_times": False,
}  # fmt: skip
DENSITY = Likelihood(solver="euler", steps=3, shift=1.0, divergence="exact")


def model(patch_size: int, attention: str = "block_causal", fixed_logsnr: float | None = None) -> Cola:
    """Random weights, none of them zero: an untrained velocity would be."""
    vae = TextVAEConfig(
        vocab_size=VOCABULARY, latent_dim=6, patch_size=patch_size, width=16, ffn_dim=32, num_heads=2,
        encoder_layers=1, decoder_layers=1, attention=attention, block_size=2,  # type: ignore[arg-type]
        latent_shift=0.3, latent_scale=0.8, fixed_logsnr=fixed_logsnr,
    )  # fmt: skip
    dit = DiTConfig(latent_dim=6, width=16, num_layers=2, num_heads=2, head_dim=8, rope_dim=4, block_size=2)
    cola = Cola(ColaConfig(vae, dit)).double().eval()
    with torch.no_grad():
        for parameter in cola.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return cola


@pytest.mark.parametrize("patch_size", [1, 2])
@pytest.mark.parametrize("guidance", [1.0, 2.5])
@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_prior_samples_are_what_generation_writes(patch_size: int, guidance: float, solver: str) -> None:
    cola, size = model(patch_size), 2
    chunk = size * patch_size
    tokens = torch.randint(VOCABULARY, (1, 4 * chunk))
    sampling = ColaSampling(steps=4, solver=solver, guidance=guidance, max_new_tokens=chunk)  # type: ignore[arg-type]
    with torch.inference_mode():
        mean = cola.vae.normalise(cola.vae.encode(tokens).mean)
        z_1 = torch.randn(COUNT, *mean.shape[1:], dtype=torch.float64)
        z_0 = prior_samples(cola, mean, z_1, {}, sampling)
        for block, logits in enumerate(decode_blocks(cola, mean, z_0)):
            prompt = tokens[0, : block * chunk].tolist()
            noise = lambda i, _, block=block: z_1[i, block * size : (block + 1) * size]  # noqa: E731
            (written,) = cola.generate([prompt] * COUNT, sampling, noise=noise)
            assert [out.tokens for out in written] == logits.argmax(-1).tolist()
    assert len(z_0.unique()) == z_0.numel()


@pytest.mark.parametrize("solver", ["euler", "heun", "midpoint"])
@pytest.mark.parametrize(
    "changes",
    [
        {"guidance_every": 2},
        {"guidance_from": 0.8, "guidance_until": 0.3},
        {"bf16_times": True, "steps": 7},  # the times of 5 steps need no rounding
        {"guidance_every": 2, "bf16_times": True, "shift": 2.0},
    ],
)
def test_prior_samples_are_generations_latents(
    generate: Callable[..., Any], changes: dict[str, Any], solver: str
) -> None:
    cola, size = model(1), 2
    tokens = torch.randint(VOCABULARY, (1, 3 * size))
    fields: dict[str, Any] = {"steps": 5, "solver": solver, "guidance": 2.5, "max_new_tokens": size} | changes
    with torch.inference_mode():
        mean = cola.vae.normalise(cola.vae.encode(tokens).mean)
        z_1 = torch.randn(COUNT, *mean.shape[1:], dtype=torch.float64)
        z_0 = prior_samples(cola, mean, z_1, {}, ColaSampling(**fields))
        plain = prior_samples(cola, mean, z_1, {}, replace(ColaSampling(**fields), **DEFAULTS))
    for block in range(3):
        rows = slice(block * size, (block + 1) * size)
        prompt = tokens[0, : block * size].tolist()
        run = generate(cola, [prompt] * COUNT, noise=lambda i, _, rows=rows: z_1[i, rows], **fields)
        for sample in range(COUNT):
            torch.testing.assert_close(z_0[sample, rows], run.latents[sample, 0], rtol=1e-9, atol=1e-9)
    assert not torch.allclose(z_0[:, size:], plain[:, size:], atol=1e-4), "the settings have no effect"


@pytest.mark.parametrize(("patch_size", "attention"), [(1, "causal"), (2, "block_causal")])
def test_decoding_in_blocks_is_decoding(patch_size: int, attention: str) -> None:
    cola = model(patch_size, attention)
    tokens = torch.randint(VOCABULARY, (1, 8 * patch_size))
    sampling = ColaSampling(steps=2, guidance=2.0, solver="stochastic", seed=4)
    found = inspect(cola, tokens, COUNT, sampling, 0.0, DENSITY)
    with torch.inference_mode():
        encoded = cola.vae.encode(tokens)
        whole = cola.vae.decode(encoded.mean)
        assert torch.equal(found.probe_tokens, whole.argmax(-1).expand(COUNT, -1)), "probes without noise: the means"
        scale = torch.exp(found.posterior.logvar - encoded.logvar).sqrt()
        assert torch.allclose(scale, torch.full_like(scale, 0.8))
        mean = found.posterior.mean
        points = torch.cat((mean[0, 5:6], torch.randn(600, 6).double()))
        tokens_there = decode_instead(cola, mean, 5, points)
        assert tokens_there.shape == (601, patch_size)
        assert torch.equal(tokens_there[0], whole.argmax(-1)[0, 5 * patch_size : 6 * patch_size])
        moved = mean.clone()
        moved[0, 5] = points[400]
        again = cola.vae.decode(cola.vae.denormalise(moved)).argmax(-1)
        assert torch.equal(tokens_there[400], again[0, 5 * patch_size : 6 * patch_size])
        logs = cola.vae.decode(cola.vae.denormalise(found.posterior_samples)).log_softmax(-1)
        expected = logs.gather(-1, tokens.expand(COUNT, -1)[..., None]).squeeze(-1)
        assert torch.allclose(found.log_decoder, expected)
        assert torch.equal(found.posterior_tokens, logs.argmax(-1))


@pytest.mark.parametrize("patch_size", [1, 2])
def test_the_bound_is_that_of_scoring(patch_size: int) -> None:
    """With an exact divergence both estimate the same ELBO, by samples of their own."""
    cola, count = model(patch_size, fixed_logsnr=3.0), 400
    tokens = torch.randint(VOCABULARY, (1, 4 * patch_size))
    found = inspect(cola, tokens, count, ColaSampling(steps=1, guidance=1.0), 0.5, DENSITY)
    elbo = found.elbo(4 * patch_size)
    settings = Scoring(**asdict(DENSITY), samples=count, estimator="elbo", rows=count)
    other = score(cola, [[]], [tokens[0].tolist()], settings)
    error = (elbo.var() / count + other.standard_error[0] ** 2).sqrt()
    assert abs(elbo.mean() - other.total[0]) < 4 * error < 2


def test_densities_in_a_latents_place() -> None:
    cola, tokens = model(1), torch.randint(VOCABULARY, (1, 8))
    with torch.no_grad():
        mean = cola.vae.normalise(cola.vae.encode(tokens).mean)
        points = torch.randn(300, 6).double()
        found = density_instead(cola, mean, 3, points, DENSITY)
        moved = mean.clone()
        moved[0, 3] = points[299]
        exact = log_prior(cola, moved, [(0,)], DENSITY).log_prob[0, 1]
    assert found.shape == (300,) and torch.allclose(found[299], exact)
    assert found.std() > 0.1


def test_draws_depend_on_the_sample_alone() -> None:
    cola, tokens = model(1), torch.randint(VOCABULARY, (1, 8))
    sampling = ColaSampling(steps=3, guidance=2.0, solver="stochastic", seed=4)
    few, many = (inspect(cola, tokens, count, sampling, 0.5, DENSITY) for count in (2, 5))
    assert torch.allclose(few.prior_samples, many.prior_samples[:2], atol=1e-10)
    assert torch.allclose(few.posterior_samples, many.posterior_samples[:2], atol=1e-10)
    again = inspect(cola, tokens, 2, ColaSampling(steps=3, guidance=2.0, solver="stochastic", seed=5), 0.5, DENSITY)
    assert not torch.allclose(few.prior_samples, again.prior_samples)
    assert float((few.prior_samples - few.posterior_samples).abs().min()) > 0


def test_whole_blocks_alone() -> None:
    with pytest.raises(ValueError, match="7 tokens are not a multiple of 2"):
        inspect(model(1), torch.zeros(1, 7, dtype=torch.long), 2, ColaSampling(), 0.5, DENSITY)
