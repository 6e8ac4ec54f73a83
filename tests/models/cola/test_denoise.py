"""The rule of guidance and its times, alone and as generation and inspection apply it, against a rule written out."""

from typing import Any

import pytest
import torch
from torch import Tensor

from opencola.flow.dit import DiTConfig
from opencola.flow.ode import solve, time_grid
from opencola.models.cola.denoise import guided, seen_times
from opencola.models.cola.inspect import prior_samples
from opencola.models.cola.model import Cola
from opencola.models.cola.parts import ColaConfig
from opencola.models.cola.sampling import ColaSampling
from opencola.vae.text_vae import TextVAEConfig

RULES: list[dict[str, Any]] = [
    {},
    {"guidance_every": 2},
    {"guidance_every": 3},
    {"guidance_from": 0.8},
    {"guidance_until": 0.45},
    {"guidance_from": 0.9, "guidance_until": 0.3, "guidance_every": 2},
    {"guidance": 1.0},
    {"guidance_from": 0.5, "guidance_until": 0.51, "steps": 3},
]


def rule(steps: int = 8, guidance: float = 3.0, every: int = 1, until: float = 0.0, start: float = 1.0) -> list[int]:
    """Passes of each evaluation of Euler's solver, for a sample with a history."""
    passes, count = [], 0
    for step in range(steps):
        t = 1 - step / steps
        if guidance != 1 and until <= t <= start:
            passes.append(2 if count % every == 0 else 1)
            count += 1
        else:
            passes.append(1)
    return passes


def expected(fields: dict[str, Any]) -> list[int]:
    names = {"guidance_every": "every", "guidance_until": "until", "guidance_from": "start"}
    return rule(**{names.get(name, name): value for name, value in fields.items()})


def settings(fields: dict[str, Any]) -> ColaSampling:
    return ColaSampling(**{"steps": 8, "guidance": 3.0, "max_new_tokens": 2} | fields)


def tiny() -> Cola:
    """Random weights, none of them zero: an untrained velocity would be."""
    vae = TextVAEConfig(
        vocab_size=40, latent_dim=6, width=16, ffn_dim=32, num_heads=2, encoder_layers=1, decoder_layers=1, block_size=2
    )
    dit = DiTConfig(latent_dim=6, width=16, num_layers=2, num_heads=2, head_dim=8, rope_dim=4, block_size=2)
    cola = Cola(ColaConfig(vae, dit)).double().eval()
    with torch.no_grad():
        for parameter in cola.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return cola


def conditional(z: Tensor, t: float) -> Tensor:
    return torch.cos(3 * z) + t


def free(z: Tensor, t: float) -> Tensor:
    return torch.sin(2 * z) - t * z


@pytest.mark.parametrize("fields", RULES)
def test_the_rule(fields: dict[str, Any]) -> None:
    """Two rows with a history and one without, whose velocity is the conditional one to the bit."""
    sampling, passes = settings(fields), []

    def one(z: Tensor, t: float) -> Tensor:
        passes.append(1)
        return conditional(z, t)

    def both(z: Tensor, t: float) -> tuple[Tensor, Tensor]:
        passes.append(2)
        return conditional(z, t), free(z, t)

    z, grid = torch.randn(3, 4, dtype=torch.float64), time_grid(sampling.steps)
    velocity = guided(one, both, sampling, torch.tensor([[True], [False], [True]]))
    *_, found = solve(velocity, z, grid)
    assert passes == expected(fields)
    by_hand, difference = z.clone(), torch.zeros_like(z)
    for step, number in enumerate(expected(fields)):
        t, v = grid[step], conditional(by_hand, grid[step])
        if number == 2:
            difference = v - free(by_hand, t)
        if sampling.guidance_until <= t <= sampling.guidance_from:
            v = v + (sampling.guidance - 1) * difference * torch.tensor([[1.0], [0.0], [1.0]])
        by_hand = by_hand + (grid[step + 1] - t) * v
    torch.testing.assert_close(found, by_hand, rtol=1e-12, atol=1e-12)
    *_, alone = solve(conditional, z[1:2], grid)
    assert torch.equal(found[1:2], alone)


def test_without_a_history_there_is_one_pass() -> None:
    def both(z: Tensor, t: float) -> tuple[Tensor, Tensor]:
        raise AssertionError("no unconditional pass is needed")

    velocity = guided(conditional, both, settings({}), torch.zeros(3, 1, dtype=torch.bool))
    assert velocity is conditional


@pytest.mark.parametrize("fields", RULES)
def test_generation_and_inspection_make_these_passes(fields: dict[str, Any]) -> None:
    cola, sampling, rows = tiny(), settings(fields), []
    hook = cola.dit.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    list(cola.generate([[1, 2]], sampling))
    assert rows[1:] == expected(fields)  # the first call commits the prompt's block
    rows.clear()
    with torch.no_grad():
        prior_samples(cola, torch.randn(1, 4, 6).double(), torch.randn(1, 4, 6).double(), {}, sampling)
    hook.remove()
    assert len(rows) == sum(expected(fields))  # every pass is a call


def test_times_are_rounded_as_the_release_rounds_them() -> None:
    times = [0.0, 1 / 3, 0.9371, 1.0]
    assert torch.equal(seen_times(times, ColaSampling()), torch.tensor(times, dtype=torch.float64))
    # 333.3 and 937.1 have 8 significant bits in bfloat16: steps of 2 and of 4
    seen = seen_times(times, ColaSampling(bf16_times=True))
    torch.testing.assert_close(seen, torch.tensor([0.0, 0.334, 0.936, 1.0], dtype=torch.float64), rtol=0, atol=1e-12)
