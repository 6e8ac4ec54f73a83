"""The diagnosis names what is wrong: with a story model of one speed, sabotaged, and with one of blocks, trained here.

tests/one_speed is the model that was shipped with blocks of one: where a trunk checks, it makes up for what the
denoiser loses, and most of these faults do not show.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from opencola.checkpoints import hub
from opencola.checkpoints.settings import load_sampling
from opencola.data.batch import Batch
from opencola.evaluation.diagnosis.conditions import accuracies, conditions, prepare, sweep
from opencola.evaluation.diagnosis.tasks import Task, nests, stories
from opencola.evaluation.diagnosis.verdicts import Diagnosis, Tally, diagnose
from opencola.flow.dit import DiTConfig
from opencola.models.cola.model import Cola
from opencola.models.cola.parts import ColaConfig, PriorObjective
from opencola.models.cola.sampling import ColaSampling
from opencola.models.text_stream import generate_text
from opencola.text.tokenizer import Tokenizer
from opencola.vae.objective import VAEObjective
from opencola.vae.text_vae import TextVAEConfig

Sabotage = Callable[[Cola, ColaSampling], tuple[Cola, ColaSampling]]
MODEL = Path(__file__).resolve().parents[2] / "one_speed"
SAMPLING = replace(load_sampling(MODEL), max_new_tokens=10)


def setting(**changes: object) -> Sabotage:
    return lambda model, sampling: (model, replace(sampling, **changes))  # type: ignore[arg-type]


@torch.no_grad()
def spoil(parameters: list[torch.nn.Parameter], size: float) -> None:
    """Add noise of `size` deviations of the weights."""
    for parameter in parameters:
        parameter.add_(size * parameter.std() * torch.randn_like(parameter))


def spoilt_head(model: Cola, sampling: ColaSampling) -> tuple[Cola, ColaSampling]:
    spoil([model.vae.head.weight], 4)
    return model, sampling


def spoilt_block(model: Cola, sampling: ColaSampling) -> tuple[Cola, ColaSampling]:
    spoil([weight for weight in model.dit.blocks[1].parameters() if weight.ndim > 1], 1)
    return model, sampling


@torch.no_grad()
def halved_velocity(model: Cola, sampling: ColaSampling) -> tuple[Cola, ColaSampling]:
    for parameter in model.dit.velocity_out.parameters():
        parameter.mul_(0.5)
    return model, sampling


def normalisation(scale: float, shift: float) -> Sabotage:
    def change(model: Cola, sampling: ColaSampling) -> tuple[Cola, ColaSampling]:
        config = replace(model.config, vae=replace(model.config.vae, latent_scale=scale, latent_shift=shift))
        other = Cola(config)
        other.load_state_dict(model.state_dict())
        return other.eval(), sampling

    return change


def diagnosis(sabotage: Sabotage, count: int = 8, places: int = 3) -> tuple[Diagnosis, dict[str, Tally]]:
    model, tokenizer = hub.load(MODEL)
    model, sampling = sabotage(model, SAMPLING)
    bench = prepare(model, tokenizer, stories(count), sampling, places)
    found = dict(conditions(bench))
    return diagnose(found, bench.latents), found


def test_the_healthy_model() -> None:
    result, found = diagnosis(lambda model, sampling: (model, sampling))
    assert result == Diagnosis("", True, "No link is at fault.")
    assert "inside" not in found, "blocks of one token"
    assert found["blind"].rate.value > 0.7 and found["decoded"].rate.value == 0
    assert all(found[name].rate.value < 0.1 for name in found if name != "blind")
    assert found["normalised"] is found["prior"], "statistics fit: nothing to repair"
    assert found["decoded"].rate.count == 24 and found["free"].rate.count > 60


CHEAP = {
    "guidance 30": (setting(guidance=30.0), "guidance", "guidance"),
    "head": (spoilt_head, "vae", "decoded"),
    "scale 1/4": (normalisation(0.25, 0.0), "normalisation", "normalised"),
}
OTHERS = {
    "block": (spoilt_block, "prior", "prior"),
    "half velocity": (halved_velocity, "prior", ""),
    "scale 2": (normalisation(2.0, 0.0), "normalisation", ""),
    "shift 1": (normalisation(1.0, 1.0), "normalisation", ""),
    "one step": (setting(steps=1), "steps", "steps"),
    "penalty": (setting(repetition_penalty=5.0), "choice", "choice"),
    "temperature": (setting(temperature=5.0), "choice", "choice"),
}


@pytest.mark.parametrize(
    ("sabotage", "link", "condition"),
    [*CHEAP.values(), *(pytest.param(*case, marks=pytest.mark.slow) for case in OTHERS.values())],
    ids=[*CHEAP, *OTHERS],
)
def test_sabotage_is_named(sabotage: Sabotage, link: str, condition: str) -> None:
    """`condition`: the one in which failures begin; the fault of the others shows in the latents alone."""
    result, found = diagnosis(sabotage, 12, 5) if link in ("steps", "choice") else diagnosis(sabotage)
    assert result.link == link, result.text
    names = [*found][1:]
    sound = names[: names.index(condition)] if condition else names
    assert all(found[name].rate.value < 0.1 for name in sound)
    assert not condition or found[condition].rate.value > 0.1
    assert "slope" not in result.text and (condition or "No link surely loses text" in result.text)


def test_a_task_that_the_model_never_learnt() -> None:
    model, tokenizer = hub.load(MODEL)
    bench = prepare(model, tokenizer, nests(4), SAMPLING, 2)
    result = diagnose(dict(conditions(bench)), bench.latents)
    assert not result.known and "does not know this task" in result.text
    assert accuracies(bench)["texts_from_mean"].value == 0


def test_latents_that_are_not_finite() -> None:
    model, tokenizer = hub.load(MODEL)
    with torch.no_grad():
        model.dit.velocity_out.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="the model's latents are not finite"):
        prepare(model, tokenizer, stories(4), SAMPLING, 2)


CYCLE = "abcdefgh"
LENGTH = 15


def turning(start: int, length: int) -> str:
    return "".join(CYCLE[(start + place) % len(CYCLE)] for place in range(length))


def can_begin(text: str) -> bool:
    return len(text) <= LENGTH and any(turning(start, len(text)) == text for start in range(len(CYCLE)))


TURNS = tuple(turning(start, LENGTH) for start in range(len(CYCLE)))
TASK = Task("cycle", TURNS, tuple(text[:5] for text in TURNS), can_begin, TURNS.__contains__)
LETTERS = Tokenizer.train(TURNS, 258)


def untrained() -> Cola:
    """A model of blocks of four."""
    sizes = TextVAEConfig(
        vocab_size=LETTERS.vocab_size, latent_dim=8, width=32, ffn_dim=64, num_heads=2, encoder_layers=0,
        decoder_layers=1,
    )  # fmt: skip
    dit = DiTConfig(
        latent_dim=8, width=48, num_layers=2, num_heads=2, head_dim=24, rope_dim=12, block_size=4, expansion=2
    )
    prior = PriorObjective(strategy="scratch", lambda_ref=0.0, prompt_in_block=0.5)
    torch.manual_seed(0)
    return Cola(ColaConfig(sizes, dit, VAEObjective(lambda_mask=0.0, beta=1e-3), prior))


@pytest.mark.parametrize("changes", [{"compatibility": "release"}, {"first_block": "left_pad"}, {}])
def test_prompts_are_filled_up_as_in_generation(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, sampling, filled = untrained().eval(), ColaSampling(steps=1, guidance=1.0, max_new_tokens=4), []
    sampling = replace(sampling, **changes)
    bench = prepare(model, LETTERS, TASK, sampling, 2)
    generate = Cola.generate

    def watched(*args: Any, pad_id: int, **options: Any) -> Any:
        filled.append(pad_id)
        return generate(*args, pad_id=pad_id, **options)

    monkeypatch.setattr(Cola, "generate", watched)
    bench.blocks(model, bench.cuts[:2], sampling)
    next(generate_text(model, LETTERS, ["abc"], sampling))
    assert filled == [LETTERS.pad_id if changes else 0] * 2


@pytest.fixture(scope="module")
def cyclic() -> Cola:
    """That model, having learnt to go round."""
    model = untrained()
    steps = 500
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    tokens = torch.tensor([[*LETTERS.encode(text), LETTERS.eos_id] for text in TURNS]).repeat(2, 1)
    for step in range(steps):
        optimizer.zero_grad()
        model.loss(Batch(tokens, torch.arange(16) + 16 * step, 0, step)).total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval()


@pytest.mark.slow
def test_a_prompt_that_ends_inside_a_block(cyclic: Cola) -> None:
    sampling = ColaSampling(steps=8, guidance=1.0, max_new_tokens=16)
    for mode in ("left_pad", "right_pad"):
        bench = prepare(cyclic, LETTERS, TASK, replace(sampling, first_block=mode), 5)  # type: ignore[arg-type]
        found = dict(conditions(bench))
        result = diagnose(found, bench.latents)
        assert result.link == "conditioning" and result.known, (mode, result.text)
    bench = prepare(cyclic, LETTERS, TASK, sampling, 5)
    found = dict(conditions(bench))
    result = diagnose(found, bench.latents)
    assert result.known and result.link != "conditioning", result.text
    assert found["choice"].rate.value < 0.15 and found["inside"].rate.value < 0.15
    assert found["guidance"] is found["steps"] and found["choice"] is found["steps"], "settings that are the same"
    changed = dict(sweep(bench))
    assert changed["guidance 1"].rate == found["choice"].rate
    assert changed["first_block clean"].rate == found["inside"].rate
    assert changed["first_block right_pad"].rate.value > 0.3
