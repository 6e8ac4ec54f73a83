"""Which link of a model loses text: losses between conditions that differ in that link alone, and the verdict on them.

A condition's figure is its failures per judged token (see `diagnosis.tasks`). Texts are independent, what is written in
one text is not: intervals are those of ratios over texts.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np

from opencola.evaluation.diagnosis.tasks import Run
from opencola.evaluation.statistics import Share, Z, ratio_difference, share

ALLOWED = 0.01
"""Failures per token that a link may cost: with one more in a hundred, every third text of forty tokens breaks."""
TOLERANCE = 1.25
"""Factor by which the prior's samples may be spread wider or narrower than the data's latents, and its velocities be
too large or too small; the means of samples and data may be TOLERANCE - 1 of the data's deviation apart."""


@dataclass(frozen=True)
class Link:
    """A link: it is the difference of the condition `after` from the condition `before` ("": no failures at all)."""

    name: str
    before: str
    after: str
    label: str


LINKS = (
    Link("vae", "", "decoded", "VAE round trip"),
    Link("prior", "decoded", "prior", "prior with clean history"),
    Link("normalisation", "prior", "normalised", "latent normalisation"),
    Link("steps", "normalised", "steps", "sampler steps and solver"),
    Link("guidance", "steps", "guidance", "guidance"),
    Link("choice", "guidance", "choice", "choice of tokens"),
    Link("conditioning", "choice", "inside", "prompt that ends inside a block"),
    Link("history", "clean", "free", "own latents as history"),
)
CONDITIONS = {
    "blind": "reference: tokens from elsewhere, without reading",
    "decoded": "true latents (posterior samples), decoded",
    "prior": "prior, true history, fine steps, guidance 1",
    "normalised": "with the model's own latent shift and scale",
    "steps": "with its own steps and solver",
    "guidance": "with its own guidance",
    "choice": "with its own choice of tokens: all its settings",
    "inside": "the same, prompts ending inside a block",
    "clean": "its own texts, their history encoded anew",
    "free": "its own texts as it writes them",
}


@dataclass(frozen=True)
class Latents:
    """Statistics of normalised latents.

    `data`, `prior`: means and deviations, per channel, of the texts' first blocks and of the prior's; these have no
    history, so neither guidance nor what the history holds has a part in them. `slope`: that of the targets of flow
    matching on the velocities, 1 where these are right; `fitted_slope`: the same under that normalisation at which the
    prior's samples are spread as the data's.
    """

    data: Sequence[Sequence[float]]
    prior: Sequence[Sequence[float]]
    slope: float
    fitted_slope: float

    @property
    def ratio(self) -> float:
        """Root of the prior's mean square about the mean of all channels, over the data's."""
        return _size(*self.prior) / _size(*self.data)

    @property
    def apart(self) -> float:
        """Distance of the means of all channels, over the data's root mean square about theirs."""
        return abs(fmean(self.prior[0]) - fmean(self.data[0])) / _size(*self.data)

    @property
    def misplaced(self) -> bool:
        """Whether the prior's samples do not lie as the data do."""
        return not _fits(self.ratio) or self.apart > TOLERANCE - 1

    @property
    def fault(self) -> tuple[str, str]:
        """The link that these figures alone find at fault, and why; ("", "") where they are as they should be.

        Misplaced samples are the normalisation's fault if the velocities are right once it is mended, else the prior's.
        """
        if self.misplaced and _fits(self.fitted_slope):
            spread = f"the prior's samples are spread {self.ratio:.2f} times as wide as the data's latents"
            return "normalisation", f"{spread}, and their means are {self.apart:.2f} of the data's deviation apart"
        if self.misplaced or not _fits(self.slope):
            return "prior", f"its velocities should be {self.slope:.2f} times as large"
        return "", ""


def _fits(ratio: float) -> bool:
    return 1 / TOLERANCE <= ratio <= TOLERANCE


def _size(means: Sequence[float], deviations: Sequence[float]) -> float:
    centre = fmean(means)
    squares = [(m - centre) ** 2 + s**2 for m, s in zip(means, deviations, strict=True)]
    return math.sqrt(fmean(squares))


@dataclass(frozen=True)
class Tally:
    """Failures and judged tokens of a condition in each of n texts, both (n,)."""

    failures: np.ndarray
    tokens: np.ndarray

    @property
    def rate(self) -> Share:
        """Failures per token, with Wilson's interval, which takes tokens for independent."""
        return share(int(self.failures.sum()), int(self.tokens.sum()))


@dataclass(frozen=True)
class Loss:
    """Failures per token that a link costs, with its 95 % interval; negative where the link helps."""

    link: Link
    value: float
    low: float
    high: float

    @property
    def at_fault(self) -> bool:
        """Whether the link certainly costs more than is allowed."""
        return self.low > ALLOWED


def tally(runs: Sequence[Run], num_texts: int) -> Tally:
    """The runs of a condition by text."""
    texts = np.array([run.text for run in runs], dtype=int)
    counts = ([run.failed for run in runs], [run.tokens for run in runs])
    return Tally(*(np.bincount(texts, count, num_texts).astype(int) for count in counts))


def loss(link: Link, before: Tally, after: Tally) -> Loss:
    """The difference of two conditions on the same texts: sum of failures / sum of tokens of each."""
    value, error = ratio_difference((after.failures, after.tokens), (before.failures, before.tokens))
    return Loss(link, value, value - Z * error, value + Z * error)


def losses(tallies: Mapping[str, Tally]) -> list[Loss]:
    """Of every link of which both conditions have judged tokens."""
    result = []
    for link in LINKS:
        if link.after not in tallies or (link.before and link.before not in tallies):
            continue
        after = tallies[link.after]
        before = tallies[link.before] if link.before else Tally(0 * after.failures, after.tokens)
        if after.tokens.sum() and before.tokens.sum():
            result.append(loss(link, before, after))
    return result


def worst(of_links: Sequence[Loss]) -> Loss | None:
    """The link that loses most of those at fault; None where none is."""
    return max((lost for lost in of_links if lost.at_fault), key=lambda lost: lost.value, default=None)


@dataclass(frozen=True)
class Diagnosis:
    """The link at fault ("" for none), whether the task is `known` to the model, and both in words."""

    link: str
    known: bool
    text: str


def diagnose(tallies: Mapping[str, Tally], latents: Latents) -> Diagnosis:
    """The diagnosis of a model at a task.

    The link that loses most of those at fault is named. Where none is, the statistics of the latents name one, if they
    show a fault. They also do where velocities are wrong and what loses most lies behind them, and where the model's
    own latents make a worse history than the encoder's: the statistics are then the cause.
    A task counts as unknown where true latents, or the prior with a clean history, do no better than a blind guess:
    nothing then tells a model that never learnt it from one that is broken.
    """
    named = worst(losses(tallies))
    blind = tallies["blind"].rate.low
    known = all(tallies[name].rate.high < blind for name in ("decoded", "prior"))
    link, why = latents.fault
    label = {link.name: link.label for link in LINKS}
    if named is None:
        text = f"No link surely loses text, but {label[link]} is at fault: {why}." if link else "No link is at fault."
        return Diagnosis(link, known, text)
    cause = bool(link) and (named.link.name == "history" or (link == "prior" and named.link.name != "vae"))
    interval = f"95 % interval {named.low:.3f} to {named.high:.3f}"
    text = f"The link that loses most: {named.link.label}, {named.value:.3f} failures per token more ({interval})."
    if not known:
        text += " The model does no better than a blind guess: it does not know this task, or this link is broken."
    elif link == named.link.name:
        text += f" Indeed {why}."
    elif link:
        text += f" {'The cause is' if cause else 'Also at fault:'} {label[link]}, for {why}."
    return Diagnosis(link if cause else named.link.name, known, text)
