"""Solvers against equations whose solutions are known; guidance; repainting."""

import itertools
import math
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from opencola.flow.ode import Solver, Velocity, guide, repaint, solve, time_grid

SOLVERS: tuple[Solver, ...] = get_args(Solver)
START = torch.tensor([[0.3], [1.0], [-2.0]]).double()


def wave(z: Tensor, t: float) -> Tensor:
    """dz/dt = z cos(3 t) + sin(t) z² / 4, no symmetry to help a solver."""
    return z * math.cos(3 * t) + 0.25 * math.sin(t) * z**2


def exact() -> Tensor:
    """Its solution at 0 from START at 1, a Bernoulli equation: 1/z = e^{-F(t)} (1/z_1 + ∫_t^1 e^{F} sin / 4)."""
    t = torch.linspace(0, 1, 200_001).double()
    primitive = (torch.sin(3 * t) - math.sin(3)) / 3
    integral = torch.trapezoid(torch.exp(primitive) * torch.sin(t) / 4, t)
    return math.exp(math.sin(3) / 3) ** -1 / (1 / START + integral)


def last(velocity: Velocity, z: Tensor, steps: int, solver: Solver, **options: Any) -> Tensor:
    *_, end = solve(velocity, z, time_grid(steps), solver, **options)
    return end


def standard(*shape: int, seed: int = 0) -> Callable[..., Tensor]:
    """Reproducible noise by key."""

    def draw(*key: int) -> Tensor:
        generator = torch.Generator().manual_seed(hash((seed, *key)) % 2**62)
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return draw


def test_the_grid_falls_from_one_to_zero_in_equal_steps() -> None:
    assert time_grid(4) == [1, 0.75, 0.5, 0.25, 0]
    assert time_grid(1) == [1, 0]
    assert time_grid(4, shift=3.0) == pytest.approx([1, 0.9, 0.75, 0.5, 0])
    for extreme in (5e-324, 1e-30, 1e30):
        assert time_grid(2, shift=extreme) == pytest.approx([1, extreme / (1 + extreme), 0])


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2), ("midpoint", 2)])
def test_order_of_convergence(solver: Solver, order: int) -> None:
    errors = [(last(wave, START, steps, solver) - exact()).abs().max().item() for steps in (160, 320, 640)]
    for coarse, fine in itertools.pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.1)


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("tolerance", [1e-3, 1e-6, 1e-9])
def test_adaptive_keeps_its_tolerance_and_stays_inside_the_times(tolerance: float, steps: int) -> None:
    times: list[float] = []

    def velocity(z: Tensor, t: float) -> Tensor:
        times.append(t)
        return wave(z, t)

    error = (last(velocity, START, steps, "adaptive", tolerance=tolerance) - exact()).abs().max().item()
    assert error < 20 * tolerance
    assert all(0 <= t <= 1 for t in times)
    if steps == 1:
        assert error > 1e-4 * tolerance  # no finer than asked for
        assert len(times) > 10


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_state_for_every_time_of_the_grid(solver: Solver) -> None:
    states = list(solve(lambda z, t: torch.ones_like(z), START, [1.0, 0.6, 0.5, 0.0], solver))
    torch.testing.assert_close(torch.stack(states), torch.stack([START - 0.4, START - 0.5, START - 1]))


@pytest.mark.parametrize("solver", SOLVERS)
def test_known_rows_stay_pinned_wherever_the_velocity_is_asked(solver: Solver) -> None:
    known = torch.tensor([[5.0], [0.0], [0.0]]).double()
    pinned = known != 0
    seen: list[Tensor] = []

    def velocity(z: Tensor, t: float) -> Tensor:
        seen.append(z)
        return wave(z, t) + 0.1 * z.sum()

    def project(z: Tensor, t: float) -> Tensor:
        return torch.where(pinned, known, z)

    noise = standard(3, 1)
    states = list(solve(velocity, project(START, 1.0), time_grid(5), solver, project=project, noise=noise))
    assert all((z[0] == 5).all() for z in (*seen, *states))
    reduced = list(  # the other rows move as if the known one were a constant of the equation
        solve(
            lambda z, t: wave(z, t) + 0.1 * (5 + z.sum()),
            START[1:],
            time_grid(5),
            solver,
            noise=lambda step: noise(step)[1:],
            tolerance=1e-10,
        )
    )
    fine = list(
        solve(velocity, project(START, 1.0), time_grid(5), solver, project=project, noise=noise, tolerance=1e-10)
    )
    torch.testing.assert_close(fine[-1][1:], reduced[-1], rtol=0, atol=1e-8 if solver == "adaptive" else 1e-12)


def test_stochastic_without_fresh_noise_is_euler() -> None:
    euler = last(wave, START, 7, "euler")
    none, some = (last(wave, START, 7, "stochastic", noise=standard(3, 1), eta=eta) for eta in (0.0, 0.5))
    torch.testing.assert_close(none, euler, rtol=0, atol=1e-14)
    assert (some - euler).abs().min() > 0.01


MEAN, VARIANCE = 1.5, 0.25


def gaussian_velocity(z: Tensor, t: float) -> Tensor:
    """E[z_1 - z_0 | z_t] for data N(1.5, 0.25)."""
    gain = ((1 - t) ** 2 * VARIANCE + t**2) ** -1 * (z - (1 - t) * MEAN)
    return t * gain - (MEAN + (1 - t) * VARIANCE * gain)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_stochastic_moments_for_a_gaussian_target(eta: float) -> None:
    """z' = (1 - t') E[z_0 | z] + t' (sqrt(1 - eta²) E[z_1 | z] + eta noise) is linear here, so its moments are known.

    The mean is the data's for every eta. The variance is so only as eta -> 0: replacing z_1 by as much fresh noise in
    every step takes away the posterior spread of z_0 (model.md §5 asks for this rule).
    """
    steps, size = 16, 200_000
    variance = 1.0
    for t, after in itertools.pairwise(time_grid(steps)):
        total = (1 - t) ** 2 * VARIANCE + t**2
        to_data, to_noise = (1 - t) * VARIANCE / total, t / total
        variance *= ((1 - after) * to_data + after * (1 - eta**2) ** 0.5 * to_noise) ** 2
        variance += (after * eta) ** 2
    z = last(gaussian_velocity, torch.randn(size).double(), steps, "stochastic", noise=standard(size), eta=eta)
    assert z.mean().item() == pytest.approx(MEAN, abs=5 * (variance / size) ** 0.5)
    assert z.var().item() == pytest.approx(variance, rel=5 * (2 / size) ** 0.5)


@pytest.mark.parametrize(("solver", "steps"), [("euler", 600), ("heun", 60), ("midpoint", 60), ("adaptive", 1)])
def test_flow_to_a_gaussian_target(solver: Solver, steps: int) -> None:
    z_1 = torch.linspace(-3, 3, 13).double()
    z_0 = last(gaussian_velocity, z_1, steps, solver)
    torch.testing.assert_close(z_0, MEAN + VARIANCE**0.5 * z_1, rtol=0, atol=5e-3)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_every_stochastic_path_to_a_single_point_ends_there(eta: float) -> None:
    z = last(lambda z, t: (z - 3.0) / t, START, 6, "stochastic", noise=standard(3, 1), eta=eta)
    torch.testing.assert_close(z, torch.full_like(START, 3.0))


def test_guidance_extrapolates_from_the_unconditional_velocity() -> None:
    conditional, unconditional = torch.randn(2, 3, 4, 5).double()
    torch.testing.assert_close(guide(conditional, unconditional, 7.0), 7 * conditional - 6 * unconditional)
    scale = torch.tensor([0.0, 1.0, 3.0]).double()[:, None, None]
    out = guide(conditional, unconditional, scale)
    for row, factor in enumerate((0, 1, 3)):
        torch.testing.assert_close(out[row], factor * conditional[row] + (1 - factor) * unconditional[row])


POINTS = torch.randn(30_000, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
KNOWN_ROWS = torch.tensor([True, False])


def repainted(repeats: int, fraction: float, **options: Any) -> tuple[list[tuple[float, Tensor]], Tensor]:
    """Times and states at which the velocity was asked, and the end; data is the point (3, 3), 3 known of row 0."""
    seen: list[tuple[float, Tensor]] = []

    def velocity(z: Tensor, t: float) -> Tensor:
        seen.append((t, z))
        return (z - 3.0) / t

    options = {"solver": "euler", "eta": 1.0, "tolerance": 1e-4} | options
    states = repaint(
        velocity,
        POINTS,
        time_grid(4),
        known=torch.full_like(POINTS, 3.0),
        mask=KNOWN_ROWS,
        repeats=repeats,
        fraction=fraction,
        noise=standard(*POINTS.shape),
        **options,
    )
    *_, end = states
    return seen, end


@pytest.mark.parametrize("repeats", [1, 3])
def test_repaint_puts_known_rows_on_their_path(repeats: int) -> None:
    seen, end = repainted(repeats, fraction=0.5)
    assert [t for t, _ in seen] == [1.0] * repeats + [0.75] * repeats + [0.5, 0.25]
    noise, keys = standard(*POINTS.shape), itertools.product((0, 1), range(repeats))
    for (step, repeat), (t, z) in zip(keys, seen, strict=False):
        torch.testing.assert_close(z[:, 0], (1 - t) * 3.0 + t * noise(step, repeat, 0)[:, 0])
    torch.testing.assert_close(end, torch.full_like(end, 3.0))


def test_repaint_goes_back_along_the_path_with_fresh_noise() -> None:
    """States stay distributed as (1 - t) 3 + t N(0, 1), whatever is repeated, and a repeat is not the same state."""
    seen, _ = repainted(3, fraction=1.0)
    for (t, z), (t_again, again) in itertools.pairwise(seen):
        assert z[:, 1].mean().item() == pytest.approx((1 - t) * 3, abs=0.03)
        assert z[:, 1].std().item() == pytest.approx(t, rel=0.03)
        if t == t_again:  # shared part: (1 - t) / (1 - t') of the noise t' that is left
            after = t - 0.25
            correlation = torch.corrcoef(torch.stack((z[:, 1], again[:, 1])))[0, 1].item()
            assert correlation == pytest.approx((1 - t) / (1 - after) * after / t, abs=0.03)


def test_repaint_without_a_share_of_the_steps_is_the_plain_solver() -> None:
    seen, _ = repainted(5, fraction=0.0, solver="heun")
    plain: list[Tensor] = []

    def velocity(z: Tensor, t: float) -> Tensor:
        plain.append(z)
        return (z - 3.0) / t

    last(velocity, POINTS, 4, "heun")
    assert len(plain) == len(seen) == 7  # Heun's last step, to time 0, is Euler's
    assert all(torch.equal(z, expected) for (_, z), expected in zip(seen, plain, strict=True))


def test_repaint_gives_the_stochastic_solver_its_own_noise() -> None:
    used: list[tuple[int, ...]] = []

    def noise(*key: int) -> Tensor:
        used.append(key)
        return torch.zeros(1, 1)

    list(
        repaint(
            lambda z, t: z,
            torch.ones(1, 1),
            time_grid(2),
            "stochastic",
            known=torch.ones(1, 1),
            mask=torch.ones(1, 1, dtype=torch.bool),
            repeats=2,
            fraction=0.5,
            noise=noise,
            eta=0.5,
            tolerance=1e-4,
        )
    )
    assert len(set(used)) == len(used)
    assert len(used) == 3 + 2 + 1  # two painted tries and one way back; a draw for each of the three solver steps
