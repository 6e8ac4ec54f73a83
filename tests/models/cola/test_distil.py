"""Distillation: the target is what a solver of two steps does, and only the denoiser learns it."""

from typing import Any

import pytest
import torch
from tiny import VOCABULARY, tiny_batch, tiny_cola

from opencola.flow.ode import guide, solve
from opencola.models.cola.distil import grid_times, two_steps
from opencola.models.cola.model import Cola


def student(**prior: Any) -> Cola:
    dit = {"num_layers": 3, "trunk_layers": 2, "vocab_size": VOCABULARY}
    model = tiny_cola({}, dit, strategy="fixed", lambda_ref=0.0, lambda_ar=1.0, distil_steps=2, **prior)
    model.freeze_parts()
    return model


def test_times_are_those_of_the_grid() -> None:
    times = grid_times(torch.linspace(-4, 4, 1001), 4)
    assert times.unique().tolist() == [0.25, 0.5, 0.75, 1.0]
    assert grid_times(torch.tensor([-40.0, 40.0]), 1).tolist() == [1.0, 1.0]


@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_the_target_is_the_way_of_an_euler_solver_with_twice_the_steps(guidance: float) -> None:
    """From t = 1 to 1/2 in two steps of four, and one step at the target's velocity."""
    model = student()
    z_0, z = torch.randn(2, 8, 4).double(), torch.randn(2, 1, 8, 4).double()
    pinned = torch.zeros(2, 1, 8, dtype=torch.bool)
    pinned[0, 0, :2] = True
    alone = torch.zeros(2, dtype=torch.bool)

    def packed(z: torch.Tensor, t: torch.Tensor, history: Any) -> torch.Tensor:
        return model.dit.packed(z_0, z, t, pinned, history)

    def guided(z: torch.Tensor, t: float) -> torch.Tensor:
        at = torch.full((2, 1, 1), t).double()
        return guide(packed(z, at, None), packed(z, at, alone), guidance)

    def project(state: torch.Tensor, t: float) -> torch.Tensor:
        return torch.where(pinned[..., None], z, state)

    first, second = list(solve(guided, z, [1.0, 0.75, 0.5], project=project))
    velocity = two_steps(packed, z, torch.ones(2, 1, 1).double(), pinned, 0.25, guidance)
    moved = project(z - 0.5 * velocity, 0.5)
    torch.testing.assert_close(moved, second, rtol=0, atol=1e-12)
    assert (first - second).abs().max() > 1e-3


def test_only_the_denoiser_learns_and_the_teacher_stays() -> None:
    model, batch = student(), tiny_batch()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    loss = model.loss(batch)
    assert set(loss.terms) == {"flow_matching"}
    loss.total.backward()
    moved = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert {"dit.blocks.2.qkv.weight", "dit.velocity_out.weight", "dit.context_in.weight"} <= moved
    frozen = ("vae", "teacher", "dit.blocks.0", "dit.blocks.1", "dit.latent_in", "dit.time_embedding", "dit.next_token")
    assert not any(name.startswith(frozen) for name in moved)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    optimizer.step()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == moved


def test_a_student_that_is_its_teacher_has_no_loss_where_velocities_are_constant() -> None:
    model = student()
    for dit in (model.dit, model.teacher):
        assert dit is not None
        dit.velocity_out.weight.data.zero_()
    assert model.loss(tiny_batch()).total.item() == pytest.approx(0, abs=1e-20)
    model.dit.velocity_out.bias.data += 0.5
    assert model.loss(tiny_batch()).total.item() == pytest.approx(0.25, rel=1e-9)


def test_guidance_is_learned_in() -> None:
    losses = [student(distil_guidance=scale).loss(tiny_batch()).total.item() for scale in (1.0, 1.0, 3.0)]
    assert losses[0] == losses[1] != losses[2]


def test_distillation_wants_latents_that_stay() -> None:
    with pytest.raises(ValueError, match="prior.distil_steps 4 needs prior.strategy fixed"):
        tiny_cola(distil_steps=4, strategy="joint")
