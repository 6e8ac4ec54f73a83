"""The demo's report of a run on the story world: one HTML page (that of evaluations is in `results_page`)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from opencola.evaluation.figures import MetricsRecord, latent_maps, loss_curves
from opencola.evaluation.latents.reconstruction import LatentMap
from opencola.evaluation.latents.traces import Trace
from opencola.evaluation.reporting.page import details, page, scroll
from opencola.evaluation.writing import PROMPT_SENTENCES, Continuation
from opencola.text.lines import read_objects


@dataclass(frozen=True)
class Measure:
    """A result: its `name` in metrics.json, its `value`, whether that is a share (a fraction of 1), the share's 95 %
    `interval` where it was sampled, the number of cases, and what it says."""

    name: str
    value: float
    is_share: bool
    interval: tuple[float, float] | None
    count: int
    meaning: str

    @property
    def label(self) -> str:
        """The name for people."""
        return self.name.replace("_", " ").replace("logsnr", "logSNR").replace("vae", "VAE")

    @property
    def text(self) -> str:
        """The value for people."""
        return f"{100 * self.value:.{self._digits}f} %" if self.is_share else f"{self.value:.2f}"

    @property
    def interval_text(self) -> str:
        """The interval for people, "" without one."""
        return (
            "" if self.interval is None else "–".join(f"{100 * end:.{self._digits}f}" for end in self.interval) + " %"
        )

    @property
    def _digits(self) -> int:
        return 2 if 0.99 < self.value < 1 else 1  # near 1 the second digit tells a good value from a better one


@dataclass(frozen=True)
class DemoPage:
    """All that the page shows. `stages`: the records of each stage's metrics.jsonl, in order; `headlines`: names of the
    measures that stand on top; `settings`: plain JSON values."""

    title: str
    subtitle: str
    measures: Sequence[Measure]
    headlines: Sequence[str]
    stages: Mapping[str, Sequence[MetricsRecord]]
    samples: Sequence[Continuation]
    maps: Sequence[LatentMap]
    trace: Trace
    settings: Mapping[str, Any]


def render(report: DemoPage) -> str:
    """The page."""
    sections = [
        ("results", "Results", _results(report)),
        ("losses", "Training", _stages(report.stages)),
        ("samples", "Samples", _samples(report.samples)),
        ("latents", "Latent map", _maps(report.maps)),
        ("denoising", "From noise to text", _trace(report.trace)),
        ("settings", "Settings", details("model, sampling, evaluation", report.settings)),
    ]
    return page(report.title, report.subtitle, sections)


def _results(report: DemoPage) -> str:
    tops = [measure for name in report.headlines for measure in report.measures if measure.name == name]
    cards = "".join(
        f'<div class="card"><b>{measure.text}</b><span>{escape(measure.label)}</span>{_bar(measure)}</div>'
        for measure in tops
    )
    rows = "".join(
        f"<tr><th>{escape(measure.label)}</th><td>{measure.text}</td><td>{measure.interval_text}</td><td>{measure.count:,}</td>"
        f'<td class="words">{escape(measure.meaning)}</td></tr>'
        for measure in report.measures
    )
    head = "<tr><th></th><th>value</th><th>95 % interval</th><th>cases</th><th class='words'>what it says</th></tr>"
    return f'<div class="cards">{cards}</div>{scroll(f"<table><thead>{head}</thead><tbody>{rows}</tbody></table>")}'


def _bar(measure: Measure) -> str:
    if measure.interval is None:
        return '<i class="bar none"></i>'
    low, high = measure.interval
    return (
        f'<i class="bar" title="95 % interval: {measure.interval_text}">'
        f'<i style="left:{100 * low:.1f}%;width:{100 * (high - low):.1f}%"></i>'
        f'<i class="mark" style="left:{100 * measure.value:.1f}%"></i></i>'
    )


def _stages(stages: Mapping[str, Sequence[MetricsRecord]]) -> str:
    if not stages:
        return "<p>No training records were found beside the model.</p>"
    rows = ""
    for name, records in stages.items():
        last = records[-1]
        terms = ", ".join(
            f"{key.removeprefix('loss/').replace('_', ' ')} {value:.4g}"
            for key, value in last.items()
            if key.startswith("loss/") and value is not None
        )
        rows += (
            f"<tr><th>{escape(name)}</th><td>{last['step']:,}</td><td>{last['tokens']:,}</td>"
            f"<td>{last['seconds']:,.0f} s</td><td class='words'>{escape(terms)}</td></tr>"
        )
    head = "<tr><th>stage</th><th>steps</th><th>tokens</th><th>time</th><th class='words'>last loss terms</th></tr>"
    note = (
        "Weighted loss terms, each the mean since the record before; a term that can be negative is in the table only."
    )
    table = scroll(f"<table><thead>{head}</thead><tbody>{rows}</tbody></table>")
    return f"<figure>{loss_curves(stages)}<figcaption>{note}</figcaption></figure>{table}"


def _samples(samples: Sequence[Continuation]) -> str:
    items = ""
    for sample in samples:
        spans = ""
        for number, sentence in enumerate(sample.sentences):
            part = "bad" if sentence.fault else "prompt" if number < PROMPT_SENTENCES else "good"
            spans += f'<span class="{part}">{escape(sentence.text)}</span> '
            if sentence.fault:
                spans += f"<small>{escape(sentence.fault)}</small> "
        mark = '<em class="good">✓ consistent</em>'
        if sample.fault:
            mark = f'<em class="bad">✗ {escape(sample.fault)}</em>'
        items += f"<li>{spans}{mark}</li>"
    note = (
        "The prompt is grey. A sentence that the world could not have told here is red, with the reason behind it; "
        "illegal is one that no template of the story world makes."
    )
    return f"<p>{note}</p><ol>{items}</ol>"


def _maps(maps: Sequence[LatentMap]) -> str:
    if not maps:
        return "<p>Too few held-out stories for a map.</p>"
    note = (
        "Every point is the posterior mean at one word of a held-out story, the first word that tells the variable; "
        "the two axes are the principal axes of these latents. The latent also carries the word's surroundings."
    )
    return f"<figure>{latent_maps(maps)}<figcaption>{note}</figcaption></figure>"


def _trace(trace: Trace) -> str:
    columns = "".join(f"<th>block {number + 1}</th>" for number in range(len(trace.blocks)))
    rows = ""
    for step, time in enumerate(trace.times):
        cells = ""
        for number, states in enumerate(trace.blocks):
            given = trace.given if number == 0 else 0
            cells += f'<td class="tokens">{_tokens(states[step], states[-1], given)}</td>'
        rows += f"<tr><th>{time:.3g}</th>{cells}</tr>"
    note = (
        "Each block starts as noise (t = 1) and is carried to text (t = 0) before the next one begins; a row shows "
        "what the state would decode to after a step. Tokens stand out where they are what they end as; those of the "
        "prompt are underlined and pinned."
    )
    table = scroll(f"<table class='trace'><thead><tr><th>t</th>{columns}</tr></thead><tbody>{rows}</tbody></table>")
    return f"<p>{note}</p><p class='prompt'>{escape(trace.prompt)} …</p>{table}"


def _tokens(tokens: Sequence[str], last: Sequence[str], given: int) -> str:
    spans = ""
    for place, (token, final) in enumerate(zip(tokens, last, strict=True)):
        part = "given" if place < given else "there" if token == final else "not"
        spans += f'<span class="{part}">{escape(token if place else token.lstrip())}</span>'
    return spans


def read_stages(out: Path) -> dict[str, list[dict[str, Any]]]:
    """The records of every training stage below a run's folder, or in it, in the order in which they ended."""
    files = [*out.glob("metrics.jsonl"), *out.glob("*/metrics.jsonl")]
    files = sorted(files, key=lambda file: (file.stat().st_mtime, file))
    stages = {file.parent.name: [record for _, record in read_objects(file)] for file in files}
    return {name: records for name, records in stages.items() if records}
