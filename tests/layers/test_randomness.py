"""Draws depend on (seed, purpose, id, keys) and on nothing else."""

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from opencola.layers.randomness import generator, normal, uniform

IDS = torch.tensor([4, 0, 10**12, 7])


@pytest.mark.parametrize("draw", [normal, uniform])
def test_a_row_depends_on_its_id_alone(draw: Callable[..., Tensor]) -> None:
    full = draw((2, 3), 1, "noise", IDS)
    assert full.shape == (4, 2, 3)
    order = torch.tensor([2, 0])
    torch.rand(5)  # the global generator has no part in it
    assert torch.equal(draw((2, 3), 1, "noise", IDS[order]), full[order])


@pytest.mark.parametrize("draw", [normal, uniform])
def test_the_global_generator_is_left_alone(draw: Callable[..., Tensor]) -> None:
    before = torch.get_rng_state()
    draw((2,), 1, "noise", IDS)
    assert torch.equal(torch.get_rng_state(), before)


def test_no_two_of_many_keys_share_a_stream() -> None:
    keys = itertools.product((0, 1), ("noise", "time"), (0, 1, 10_000), (0, 1))
    draws = {torch.randint(2**62, (), generator=generator(*key)).item() for key in keys}
    assert len(draws) == 2 * 2 * 3 * 2
    assert torch.rand(1, generator=generator(0, "a", 1, 2)) != torch.rand(1, generator=generator(0, "a", 12))


def test_moments() -> None:
    ids = torch.arange(200)
    z, u = normal((500,), 3, "z", ids), uniform((500,), 3, "u", ids)
    assert abs(z.mean()) < 0.01 and abs(z.var() - 1) < 0.02
    assert ((u >= 0) & (u < 1)).all()
    assert abs(u.mean() - 0.5) < 0.005 and abs(u.var() - 1 / 12) < 0.002
    across = z[:, 0]  # streams of neighbouring ids are independent, too
    assert abs(across.mean()) < 0.25 and 0.7 < across.var() < 1.3
