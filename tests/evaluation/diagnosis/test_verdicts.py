"""The arithmetic of links, and the verdict on them, with numbers made by hand."""

import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from opencola.evaluation.diagnosis import verdicts
from opencola.evaluation.diagnosis.figure import draw
from opencola.evaluation.diagnosis.tasks import Run
from opencola.evaluation.diagnosis.verdicts import LINKS, Latents, Tally, diagnose, loss, losses, tally, worst
from opencola.evaluation.figures import standalone

TEXTS = 40
RIGHT = Latents([[0.0, 0.0], [1.0, 1.0]], [[0.0, 0.0], [1.1, 0.9]], 1.0, 1.0)
SCALED = Latents([[0.0, 0.0], [2.0, 2.0]], [[0.0, 0.0], [1.0, 1.0]], 0.3, 1.0)
HALVED = Latents([[0.0, 0.0], [1.0, 1.0]], [[0.0, 0.0], [0.7, 0.7]], 2.0, 1.4)


def rate(share: float) -> Tally:
    """`share` failures per token, spread over all texts as evenly as it goes."""
    tokens = np.full(TEXTS, 20)
    return Tally(np.diff(np.floor(np.arange(TEXTS + 1) * 20 * share + 1e-9)).astype(int), tokens)


def ladder(**shares: float) -> dict[str, Tally]:
    """Conditions, of which those that are not given have the figure of the one before."""
    now, found = 0.0, {"blind": rate(0.9)}
    for name in ("decoded", "prior", "normalised", "steps", "guidance", "choice", "inside", "clean", "free"):
        now = shares.get(name, now)
        found[name] = rate(now)
    return found


def test_tally() -> None:
    found = tally([Run(2, True, 3), Run(0, False, 4), Run(2, False, 1), Run(2, True, 1)], 4)
    assert found.failures.tolist() == [0, 0, 2, 0] and found.tokens.tolist() == [4, 0, 5, 0]
    assert found.rate.value == pytest.approx(2 / 9) and found.rate.count == 9
    assert tally([], 3).tokens.tolist() == [0, 0, 0]


def test_loss_by_hand() -> None:
    """Two texts: 1/2 and 1/2 of two tokens fail after, 0 and 1 of two before."""
    before = Tally(np.array([0, 1]), np.array([2, 2]))
    after = Tally(np.array([1, 1]), np.array([2, 2]))
    found = loss(LINKS[1], before, after)
    # influences: after (0, 0); before (-1/8, 1/8) of rate 1/4; sum of squares 1/32, times 2 / (2 - 1)
    assert found.value == pytest.approx(0.25)
    assert found.high - found.low == pytest.approx(2 * 1.959964 * 0.25)
    assert found.high + found.low == pytest.approx(0.5)


def test_loss_covers_the_truth() -> None:
    """Correlated failures in texts of random length: 95 % of the intervals hold the true difference."""
    rng = np.random.default_rng(0)
    covered, errors, repeats = 0, [], 1500
    for _ in range(repeats):
        hard = rng.beta(1, 9, TEXTS)  # mean 0.1, shared by both conditions of a text
        tokens = rng.integers(5, 20, (2, TEXTS))
        failures = rng.binomial(tokens, np.stack((0.5 * hard, hard)))
        found = loss(LINKS[1], Tally(failures[0], tokens[0]), Tally(failures[1], tokens[1]))
        covered += found.low <= 0.05 <= found.high
        errors.append(found.value - 0.05)
    assert abs(np.mean(errors)) < 0.001
    assert 0.93 < covered / repeats < 0.965


def test_losses_of_the_links() -> None:
    found = losses(ladder(decoded=0.05, prior=0.1, guidance=0.05, inside=0.3, clean=0.2, free=0.4))
    values = {one.link.name: round(one.value, 6) for one in found}
    assert values == {
        "vae": 0.05, "prior": 0.05, "normalisation": 0, "steps": 0, "guidance": -0.05, "choice": 0,
        "conditioning": 0.25, "history": 0.2,
    }  # fmt: skip
    assert worst(found).link.name == "conditioning"  # type: ignore[union-attr]
    blocks_of_one = ladder(free=0.1)
    del blocks_of_one["inside"]
    blocks_of_one["clean"] = tally([], TEXTS)
    assert [one.link.name for one in losses(blocks_of_one)] == [
        "vae", "prior", "normalisation", "steps", "guidance", "choice",
    ]  # fmt: skip


@pytest.mark.parametrize("link", LINKS, ids=lambda link: link.name)
def test_every_link_can_be_named(link: verdicts.Link) -> None:
    result = diagnose(ladder(**{link.after: 0.3}), RIGHT)
    assert result.link == link.name and result.known and link.label in result.text and "0.300" in result.text


def test_what_is_sure_and_allowed() -> None:
    assert diagnose(ladder(), RIGHT).link == ""
    assert diagnose(ladder(guidance=0.01), RIGHT).link == "", "allowed"
    unsure = ladder()
    unsure["free"] = Tally(np.array([20] + [0] * (TEXTS - 1)), np.full(TEXTS, 20))  # all in one text
    assert losses(unsure)[-1].value == pytest.approx(0.025) and losses(unsure)[-1].low < 0
    assert diagnose(unsure, RIGHT).link == ""


def test_unknown_tasks() -> None:
    for name in ("decoded", "prior"):
        result = diagnose(ladder(**{name: 0.9}), RIGHT)
        assert not result.known and "does not know this task" in result.text
    assert diagnose(ladder(guidance=0.95), RIGHT).known


@pytest.mark.parametrize(
    ("latents", "shares", "link"),
    [
        (RIGHT, {}, ""),
        (SCALED, {}, "normalisation"),
        (HALVED, {}, "prior"),
        (SCALED, {"free": 0.1}, "normalisation"),
        (SCALED, {"guidance": 0.1}, "guidance"),
        (HALVED, {"steps": 0.1}, "prior"),
        (HALVED, {"free": 0.1}, "prior"),
        (HALVED, {"decoded": 0.1}, "vae"),
        (RIGHT, {"free": 0.1}, "history"),
    ],
)
def test_what_the_latents_say(latents: Latents, shares: dict[str, float], link: str) -> None:
    result = diagnose(ladder(**shares), latents)
    assert result.link == link
    assert (latents.fault[1] in result.text) and (bool(latents.fault[0]) == (latents is not RIGHT))


def test_statistics_of_latents() -> None:
    shifted = Latents([[1.0, -1.0], [1.0, 1.0]], [[2.0, 0.0], [3.0, 3.0]], 1.0, 1.0)
    # root mean squares about the common mean: sqrt(1 + 1) and sqrt(1 + 9); means 0 and 1
    assert shifted.ratio == pytest.approx(5**0.5) and shifted.apart == pytest.approx(0.5**0.5)
    assert shifted.misplaced and not RIGHT.misplaced
    assert Latents([[0.0], [1.0]], [[0.3], [1.0]], 1.0, 1.0).misplaced
    assert Latents([[0.0], [1.0]], [[0.0], [1.0]], 1.3, 1.0).fault[0] == "prior"


def test_drawing() -> None:
    panels = {"stories": losses(ladder(guidance=0.3)), "brackets": losses(ladder())}
    drawing = standalone(draw(panels))
    assert ElementTree.fromstring(drawing).tag.endswith("svg") and drawing == standalone(draw(panels))
    for word in ("stories", "brackets", *(link.label for link in LINKS)):
        assert word in drawing
