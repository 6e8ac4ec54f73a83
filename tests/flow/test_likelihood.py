"""Log-densities of known flows: Gaussian and mixture targets, whose velocity E[z_1 - z_0 | z_t = z] is exact."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from opencola.flow.likelihood import Likelihood, Velocity, draw_probes, log_density

MEANS = torch.tensor([[1.0, -0.5, 0.3], [-1.2, 0.4, 0.8]]).double()
SCALES = torch.tensor([[0.6, 1.3, 0.9], [0.8, 0.5, 1.1]]).double()
WEIGHTS = torch.tensor([0.3, 0.7]).double()
EXACT: dict[str, Any] = {"divergence": "exact", "shift": 1.0}


def component(z: Tensor, t: float, weights: Tensor) -> Tensor:
    """Log of weight times density at time t of each Gaussian: (..., components)."""
    variance = ((1 - t) * SCALES).square() + t * t
    squared = (z[..., None, :] - (1 - t) * MEANS).square() / variance
    return weights.log() - 0.5 * (squared + variance.log() + math.log(2 * math.pi)).sum(-1)


def target(weights: Tensor) -> Velocity:
    """Velocity of the linear path from the mixture to N(0, I): linear in z per component, mixed by their posterior."""

    def velocity(z: Tensor, t: float) -> Tensor:
        variance = ((1 - t) * SCALES).square() + t * t
        slope = (t - (1 - t) * SCALES.square()) / variance
        each = -MEANS + slope * (z[..., None, :] - (1 - t) * MEANS)
        return (component(z, t, weights).softmax(-1)[..., None] * each).sum(-2)

    return velocity


def points(samples: int = 4, groups: int = 2) -> Tensor:
    return torch.randn(samples, groups, 3, generator=torch.Generator().manual_seed(0)).double() * 1.2


GAUSSIAN, MIXTURE = torch.tensor([1.0, 0.0]).double(), WEIGHTS


@pytest.mark.parametrize("weights", [GAUSSIAN, MIXTURE], ids=["gaussian", "mixture"])
def test_rk4_gives_the_exact_density(weights: Tensor) -> None:
    z_0 = points()
    found = log_density(target(weights), z_0, Likelihood(solver="rk4", steps=40, **EXACT))
    torch.testing.assert_close(found.log_prob, component(z_0, 0, weights).logsumexp(-1), rtol=0, atol=1e-4)
    assert found.evaluations == 4 * 40 and found.log_prob.shape == (4, 2)


@pytest.mark.parametrize("tolerance", [1e-3, 1e-5, 1e-7])
def test_dopri5_keeps_its_tolerance(tolerance: float) -> None:
    z_0 = points()
    found = log_density(target(MIXTURE), z_0, Likelihood(solver="dopri5", tolerance=tolerance, **EXACT))
    error = (found.log_prob - component(z_0, 0, MIXTURE).logsumexp(-1)).abs().max().item()
    assert 1e-4 * tolerance < error < 20 * tolerance


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("midpoint", 2), ("heun", 2), ("rk4", 4)])
def test_order_of_convergence(solver: Any, order: int) -> None:
    z_0 = points()
    exact = component(z_0, 0, MIXTURE).logsumexp(-1)
    coarse, fine = (
        (log_density(target(MIXTURE), z_0, Likelihood(solver=solver, steps=n, **EXACT)).log_prob - exact).abs().max()
        for n in (80, 160)
    )
    assert math.log2(coarse / fine) == pytest.approx(order, abs=0.3)


def test_a_shifted_grid_suits_a_sharp_density() -> None:
    """Four times as sharp, steps near the data pay."""
    z_0 = points() / 4

    def velocity(z: Tensor, t: float) -> Tensor:
        variance = ((1 - t) * SCALES[0] / 4).square() + t * t
        return -MEANS[0] / 4 + (t - (1 - t) * (SCALES[0] / 4).square()) / variance * (z - (1 - t) * MEANS[0] / 4)

    exact = component(4 * z_0, 0, GAUSSIAN).logsumexp(-1) + 3 * math.log(4)
    even, shifted = (
        (log_density(velocity, z_0, Likelihood(**EXACT | {"steps": 20, "shift": s})).log_prob - exact)
        .abs()
        .max()
        .item()
        for s in (1.0, 0.3)
    )
    assert shifted < even / 5 and shifted < 0.01


def test_float32_is_close() -> None:
    z_0 = points()
    settings = Likelihood(steps=32, **EXACT)
    single = log_density(lambda z, t: target(MIXTURE)(z.double(), t).float(), z_0.float(), settings).log_prob
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), log_density(target(MIXTURE), z_0, settings).log_prob, rtol=0, atol=1e-5)


def test_what_is_not_free_is_a_condition() -> None:
    """With independent numbers, fixing one leaves the density of the others."""
    z_0 = points()
    free = torch.tensor([True, False, True]).expand_as(z_0)

    def velocity(z: Tensor, t: float) -> Tensor:
        assert torch.equal(z[..., 1], z_0[..., 1])
        return target(GAUSSIAN)(z, t)

    found = log_density(velocity, z_0, Likelihood(steps=40, **EXACT), free=free).log_prob
    variance, difference = SCALES[0].square(), z_0 - MEANS[0]
    each = -0.5 * (difference.square() / variance + (2 * math.pi * variance).log())
    torch.testing.assert_close(found, each[..., [0, 2]].sum(-1), rtol=0, atol=1e-4)
    none = log_density(velocity, z_0, Likelihood(steps=2, **EXACT), free=torch.zeros_like(free)).log_prob
    assert torch.equal(none, torch.zeros_like(none))


@pytest.mark.parametrize("law", ["rademacher", "gaussian"])
def test_hutchinson_agrees_within_its_standard_error(law: Any) -> None:
    z_0, exact = points(), Likelihood(steps=8, **EXACT)
    settings = Likelihood(steps=8, shift=1.0, probes=400, probe_law=law)
    probes = draw_probes(z_0, [(i,) for i in range(4)], settings)
    found = log_density(target(MIXTURE), z_0, settings, probes)
    error = found.by_probe.std(0) / 400**0.5
    deviation = (found.log_prob - log_density(target(MIXTURE), z_0, exact).log_prob) / error
    assert found.by_probe.shape == (400, 4, 2) and error.max() < 0.3
    assert deviation.abs().max() < 4 and deviation.square().mean() < 3
    assert found.by_probe.std(0).min() > 1e-3  # the probes differ, so the estimate is one


def test_rademacher_probes_are_exact_for_a_diagonal_jacobian() -> None:
    """The Gaussian's velocity has one; so any single probe gives the divergence."""
    z_0, settings = points(), Likelihood(steps=8, shift=1.0)
    found = log_density(target(GAUSSIAN), z_0, settings, draw_probes(z_0, [(i,) for i in range(4)], settings))
    torch.testing.assert_close(
        found.log_prob, log_density(target(GAUSSIAN), z_0, Likelihood(steps=8, **EXACT)).log_prob
    )


def test_probes_depend_on_sample_and_group_alone() -> None:
    settings = Likelihood(probes=2, probe_law="gaussian")
    many = draw_probes(points(3, 4), [(5, 0), (7, 1), (5, 1)], settings)
    few = draw_probes(points(1, 2), [(7, 1)], settings)
    assert many is not None and few is not None and many.shape == (2, 3, 4, 3)
    assert torch.equal(many[:, 1, :2], few[:, 0])
    assert len(many.flatten().unique()) == many.numel()


def test_settings_are_checked() -> None:
    for fields, message in [
        ({"steps": 0}, "steps"),
        ({"probes": 0}, "probes"),
        ({"tolerance": 0.0}, "tolerance"),
        ({"shift": 0.0}, "shift"),
    ]:
        with pytest.raises(ValueError, match=message):
            Likelihood(**fields)
    with pytest.raises(ValueError, match="needs probes"):
        log_density(target(MIXTURE), points(), Likelihood())
    with pytest.raises(ValueError, match="exact"):
        log_density(target(MIXTURE), points(), Likelihood(**EXACT), points()[None])
