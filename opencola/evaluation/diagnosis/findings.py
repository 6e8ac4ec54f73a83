"""All that is measured at a task: failures under every condition, the decoder's margins, and the diagnosis."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from rich.progress import Progress

from opencola.evaluation.diagnosis.conditions import (
    FIRST_BLOCKS,
    GUIDANCES,
    STEPS,
    Bench,
    accuracies,
    conditions,
    sweep,
)
from opencola.evaluation.diagnosis.verdicts import ALLOWED, CONDITIONS, Diagnosis, Latents, Tally, diagnose, losses
from opencola.evaluation.statistics import Share
from opencola.models.cola.links import Margins, margins

WATCHED = 8  # texts in which the decoder's margins are measured


@dataclass(frozen=True)
class Findings:
    """All that is known of a model at a task."""

    conditions: dict[str, Tally]
    settings: dict[str, Tally]
    round_trip: dict[str, Share]
    latents: Latents
    decoder: dict[str, Margins]
    diagnosis: Diagnosis

    def records(self) -> Iterator[dict[str, Any]]:
        """Every figure."""
        for name, condition in self.conditions.items():
            yield {"measure": "condition", "name": name, "label": CONDITIONS[name], **asdict(condition.rate)}
        for name, condition in self.settings.items():
            yield {"measure": "setting", "name": name, **asdict(condition.rate)}
        for name, rate in self.round_trip.items():
            yield {"measure": "round_trip", "name": name, **asdict(rate)}
        for loss in losses(self.conditions):
            ends = {"value": loss.value, "low": loss.low, "high": loss.high}
            yield {"measure": "link", "name": loss.link.name, **ends, "allowed": ALLOWED, "at_fault": loss.at_fault}
        ratio, apart = self.latents.ratio, self.latents.apart
        yield {"measure": "latents", "name": "first_blocks", **asdict(self.latents), "ratio": ratio, "apart": apart}
        for name, margin in self.decoder.items():
            yield {"measure": "decoder", "name": name, **asdict(margin)}
        yield {
            "measure": "verdict",
            "name": self.diagnosis.link,
            "known": self.diagnosis.known,
            "text": self.diagnosis.text,
        }


def examine(bench: Bench, bar: Progress) -> Findings:
    """All figures of a model at a task, with a line of the bar for it."""
    in_blocks = bench.chunk > 1
    count = len(CONDITIONS) + len(GUIDANCES) + len(STEPS) + (len(FIRST_BLOCKS) if in_blocks else -1)
    job = bar.add_task(bench.task.name, total=count)
    tallies: list[dict[str, Tally]] = []
    for source in (conditions(bench), sweep(bench)):
        tallies.append({})
        for name, condition in source:
            tallies[-1][name] = condition
            bar.advance(job)
    sides = margins(bench.model, bench.tokens[:WATCHED], bench.scored[:WATCHED], bench.sampling)
    decoder = dict(zip(("true_latents", "generated_latents"), sides, strict=True))
    measured, changed = tallies
    diagnosis = diagnose(measured, bench.latents)
    return Findings(measured, changed, accuracies(bench), bench.latents, decoder, diagnosis)
