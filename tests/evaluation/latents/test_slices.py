import numpy as np
import pytest

from opencola.evaluation.latents.slices import RESOLUTION, cut, slices

RANDOM = np.random.default_rng(0)
TURN = np.linalg.qr(RANDOM.normal(size=(5, 5)))[0][:2]
CENTRE = RANDOM.normal(size=5)
PRIOR = CENTRE + RANDOM.normal(size=(40, 2)) * [4, 1] @ TURN
POSTERIOR = CENTRE + 0.1 * RANDOM.normal(size=(30, 5))


def sides(points: np.ndarray) -> list[str]:
    """Which side of the centre a point is on, along the prior's wide axis."""
    return ["$left" if place < 0 else "right" for place in (points - CENTRE) @ TURN[0]]


def test_the_plane_is_the_priors() -> None:
    one = cut("x", "right", CENTRE, POSTERIOR, PRIOR, sides, density=lambda points: -((points - CENTRE) ** 2).sum(1))
    distance = np.linalg.norm(PRIOR - CENTRE, axis=1)
    assert np.linalg.norm(one.prior, axis=1) == pytest.approx(distance), "the prior's samples lie in it"
    assert one.prior[:, 0].std() > 2 * one.prior[:, 1].std()
    assert (np.linalg.norm(one.posterior, axis=1) < np.linalg.norm(POSTERIOR - CENTRE, axis=1)).all()
    for samples in (one.prior, one.posterior):
        assert ((samples > (one.x[0], one.y[0])) & (samples < (one.x[-1], one.y[-1]))).all()
    assert one.density is not None
    assert one.density == pytest.approx(-(one.x[None, ::3] ** 2 + one.y[::3, None] ** 2)), "rows along y"
    shares = [(one.regions == side).mean() for side in ("$left", "right")]
    assert sum(shares) == 1 and min(shares) > 0.2 and one.regions.shape == (RESOLUTION, RESOLUTION)


def test_drawing() -> None:
    known = cut("token 3: 'a'", "right", CENTRE, POSTERIOR, PRIOR, sides, density=lambda p: -((p - CENTRE) ** 2).sum(1))
    plain = cut("token 4: 'b'", "nowhere", CENTRE, POSTERIOR, PRIOR, sides)
    svg = slices([known, plain])
    assert svg == slices([known, plain]) and svg.startswith("<svg ")
    for words in ("token 3", "token 4", "prior samples", "posterior samples", "right' (the token)", "$left"):
        assert words in svg
    assert "nowhere" not in svg, "a token that no region has"
    assert "other tokens" not in svg
    many = cut("x", "0", CENTRE, POSTERIOR, PRIOR, lambda points: [str(n % 9) for n in range(len(points))])
    assert "other tokens" in slices([many])


def test_one_sample_makes_no_plane() -> None:
    with pytest.raises(ValueError, match="at least 2 samples"):
        cut("x", "right", CENTRE, POSTERIOR, PRIOR[:1], sides)
