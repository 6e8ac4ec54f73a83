"""The path and its velocity, and the laws of training times against their quantiles."""

import math

import pytest
import torch

from opencola.flow.path import TimestepLaw, interpolate, target_velocity

QUANTILES = {0.025: -1.959964, 0.25: -0.674490, 0.5: 0.0, 0.75: 0.674490, 0.975: 1.959964}


@pytest.mark.parametrize(("loc", "scale"), [(1.0, 1.0), (0.0, 0.5), (2.3, 1.4)])
def test_logit_normal_quantiles(loc: float, scale: float) -> None:
    law = TimestepLaw(loc=loc, scale=scale)
    exact = law.times(torch.tensor(list(QUANTILES.values())))
    drawn = law.times(torch.randn(200_000)).quantile(torch.tensor(list(QUANTILES)))
    for number, normal in enumerate(QUANTILES.values()):
        expected = 1 / (1 + math.exp(-(loc + scale * normal)))
        assert exact[number].item() == pytest.approx(expected, abs=1e-6)
        assert drawn[number].item() == pytest.approx(expected, abs=0.01)


def test_uniform_quantiles() -> None:
    law = TimestepLaw(kind="uniform", loc=5.0, scale=9.0)
    assert law.times(torch.tensor(list(QUANTILES.values()))).tolist() == pytest.approx(list(QUANTILES), abs=1e-6)
    times = law.times(torch.randn(200_000))
    assert ((times >= 0) & (times <= 1)).all()
    assert times.quantile(torch.linspace(0, 1, 11)).tolist() == pytest.approx([k / 10 for k in range(11)], abs=0.005)


def test_defaults_are_the_papers() -> None:
    assert TimestepLaw() == TimestepLaw(kind="logit_normal", loc=1.0, scale=1.0, per="sequence")


def test_the_path_runs_straight_from_data_to_noise() -> None:
    z_0, z_1 = torch.randn(2, 3, 5, 4).double()
    assert torch.equal(interpolate(z_0, z_1, torch.tensor(0.0)), z_0)
    assert torch.equal(interpolate(z_0, z_1, torch.tensor(1.0)), z_1)
    t = torch.tensor([0.1, 0.5, 0.9]).double()[:, None, None]
    torch.testing.assert_close(interpolate(z_0, z_1, t)[1], (z_0[1] + z_1[1]) / 2)
    slope = (interpolate(z_0, z_1, t + 1e-6) - interpolate(z_0, z_1, t - 1e-6)) / 2e-6
    torch.testing.assert_close(target_velocity(z_0, z_1), slope, rtol=1e-7, atol=1e-7)
