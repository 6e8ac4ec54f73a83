"""Statistics of a model's links, on tiny random models."""

from dataclasses import replace

import pytest
import torch
from tiny import VOCABULARY, tiny_cola

from opencola.models.cola import links as diagnosis
from opencola.models.cola.sampling import ColaSampling

SETTINGS = ColaSampling(steps=3, guidance=2.0, max_new_tokens=8)


def tokens(count: int = 6, length: int = 8) -> torch.Tensor:
    return torch.randint(VOCABULARY, (count, length), generator=torch.Generator().manual_seed(4))


def test_each_setting_comes_in_alone() -> None:
    own = replace(
        SETTINGS, temperature=0.7, top_k=5, top_p=0.9, repetition_penalty=1.2, candidates=3, shift=2.0, bf16_times=True,
        guidance_from=0.9, guidance_until=0.1, guidance_every=2, first_block="left_pad", seed=5, solver="adaptive",
    )  # fmt: skip
    found = diagnosis.settings(own)
    assert [*found] == ["prior", "steps", "guidance", "choice"] and found["choice"] == own

    def differing(one: ColaSampling, other: ColaSampling) -> set[str]:
        return {name for name in vars(own) if vars(one)[name] != vars(other)[name]}

    choice = {"temperature", "top_k", "top_p", "repetition_penalty", "candidates"}
    guidance = {"guidance", "guidance_from", "guidance_until", "guidance_every"}
    assert differing(found["choice"], found["guidance"]) == choice
    assert differing(found["guidance"], found["steps"]) == guidance
    assert differing(found["steps"], found["prior"]) == {"steps", "solver", "shift", "bf16_times"}
    assert found["prior"].steps == 64 and diagnosis.settings(replace(own, steps=100))["prior"].steps == 400
    plain = ColaSampling(steps=16, guidance=1.0)
    assert diagnosis.settings(plain)["choice"] == diagnosis.settings(plain)["steps"]


def test_blocks_and_texts_are_those_of_generation() -> None:
    model, prompts = tiny_cola(), [row.tolist()[: 4 + number] for number, row in enumerate(tokens())]
    texts: list[list[int]] = [[] for _ in prompts]
    for blocks in model.generate(prompts, SETTINGS):
        for block in blocks:
            texts[block.sample] += block.tokens
    assert all(len(text) == 8 for text in texts)
    first = [text[: 4 - len(prompt) % 4] for prompt, text in zip(prompts, texts, strict=True)]
    for batch_size in (2, 100):
        assert diagnosis.next_blocks(model, prompts, SETTINGS, 0, batch_size) == first
        assert diagnosis.write(model, prompts, SETTINGS, 0, batch_size, lambda number, new: False) == texts

    def is_over(number: int, new: list[int]) -> bool:
        assert new == texts[number][: len(new)]
        return number in (1, 4)

    stopped = [new if i in (1, 4) else text for i, (new, text) in enumerate(zip(first, texts, strict=True))]
    assert diagnosis.write(model, prompts, SETTINGS, 0, 4, is_over) == stopped


def test_spread_by_hand() -> None:
    found = diagnosis.spread(torch.tensor([[[0.0, 2.0], [4.0, 2.0]]]))
    assert found.mean.tolist() == [2, 2] and found.centre == 2 and found.overall == pytest.approx(2**0.5)
    assert found.deviation.tolist() == pytest.approx([8**0.5, 0])


def test_renormalised_data_lie_as_the_prior() -> None:
    model = tiny_cola(vae={"latent_scale": 0.7, "latent_shift": 0.3})
    data, prior = diagnosis.first_spreads(model, tokens(20, 4), SETTINGS)
    assert abs(data.overall / prior.overall - 1) > 0.05
    other = diagnosis.renormalised(model, data, prior)
    again, same = diagnosis.first_spreads(other, tokens(20, 4), SETTINGS)
    assert again.overall == pytest.approx(prior.overall) and again.centre == pytest.approx(prior.centre)
    assert same.overall == prior.overall and torch.equal(same.mean, prior.mean), "it has no part in first blocks"
    assert model.vae.config.latent_scale == 0.7 and not other.training
    z = torch.randn(3, 4, dtype=torch.float64)
    assert torch.allclose(other.vae.denormalise(other.vae.normalise(z)), z)


@torch.no_grad()
def test_slope_is_that_of_a_regression() -> None:
    model = tiny_cola()
    scored = torch.ones(6, 8, dtype=torch.bool)
    slope = diagnosis.velocity_slope(model, tokens(), scored, 0)
    for parameter in (model.dit.velocity_out.weight, model.dit.velocity_out.bias):
        parameter.mul_(slope)
    assert diagnosis.velocity_slope(model, tokens(), scored, 0) == pytest.approx(1)
    for parameter in (model.dit.velocity_out.weight, model.dit.velocity_out.bias):
        parameter.mul_(0.5)
    assert diagnosis.velocity_slope(model, tokens(), scored, 0) == pytest.approx(2)
    changed = tokens()
    changed[:, 4:] = 0
    scored[:, 4:] = False
    first = diagnosis.velocity_slope(model, tokens(), scored, 0)
    assert diagnosis.velocity_slope(model, changed, scored, 0) == pytest.approx(first), "what is not scored has no part"
    assert first != pytest.approx(2)


@torch.no_grad()
def test_round_trip_and_margins() -> None:
    model = tiny_cola()
    model.vae.posterior.bias[4:] = -40.0  # posteriors so narrow that a sample is the mean
    model.vae.posterior.weight[4:] = 0.0
    scored = torch.ones(6, 8, dtype=torch.bool)
    from_mean, from_sample = diagnosis.given_back(model, tokens(), 0)
    logits = model.vae.decode(model.vae.encode(tokens()).mean)
    assert torch.equal(from_mean, logits.argmax(-1)) and torch.equal(from_sample, from_mean)
    true, made = diagnosis.margins(model, tokens(), scored, SETTINGS)
    best = logits.topk(2, -1).values
    assert true.margin == pytest.approx(float((best[..., 0] - best[..., 1]).mean()))
    assert true.changed == made.changed == 0 and made.margin != pytest.approx(true.margin)
    model.vae.posterior.bias[4:] = 4.0
    true, made = diagnosis.margins(model, tokens(), scored, SETTINGS)
    assert true.changed > 0.2 and made.changed > 0.2
    from_mean, from_sample = diagnosis.given_back(model, tokens(), 0)
    assert not torch.equal(from_sample, from_mean)
