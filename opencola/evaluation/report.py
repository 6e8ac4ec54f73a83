"""The report of a run on the story world: one HTML page that needs nothing but itself, on light and dark screens."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from opencola.evaluation.figures import Record, latent_maps, loss_curves
from opencola.evaluation.latents import LatentMap
from opencola.evaluation.stories import PROMPT_SENTENCES, Continuation


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
class Trace:
    """How a continuation came out of noise: after every solver step of every block, what its state would decode to.

    `times`: of the states, ending at 0; `blocks[b][s]`: the texts of block b's tokens in state s; the first `given`
    tokens of block 0 belong to the prompt.
    """

    prompt: str
    times: Sequence[float]
    blocks: Sequence[Sequence[Sequence[str]]]
    given: int


@dataclass(frozen=True)
class Report:
    """All that the page shows. `stages`: the records of each stage's metrics.jsonl, in order; `headlines`: names of the
    measures that stand on top; `settings`: plain JSON values."""

    title: str
    subtitle: str
    measures: Sequence[Measure]
    headlines: Sequence[str]
    stages: Mapping[str, Sequence[Record]]
    samples: Sequence[Continuation]
    maps: Sequence[LatentMap]
    trace: Trace
    settings: Mapping[str, Any]


def render(report: Report) -> str:
    """The page."""
    sections = [
        ("results", "Results", _results(report)),
        ("losses", "Training", _stages(report.stages)),
        ("samples", "Samples", _samples(report.samples)),
        ("latents", "Latent map", _maps(report.maps)),
        ("denoising", "From noise to text", _trace(report.trace)),
        ("settings", "Settings", _settings(report.settings)),
    ]
    body = "".join(f'<section id="{name}"><h2>{title}</h2>{inner}</section>' for name, title, inner in sections)
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(report.title)}</title><style>{_CSS}</style></head><body><main>"
        f"<header><h1>{escape(report.title)}</h1><p>{escape(report.subtitle)}</p></header>{body}"
        "</main></body></html>\n"
    )


def _results(report: Report) -> str:
    tops = [measure for name in report.headlines for measure in report.measures if measure.name == name]
    cards = "".join(
        f'<div class="card"><b>{measure.text}</b><span>{escape(measure.label)}</span>{_bar(measure)}</div>'
        for measure in tops
    )
    rows = "".join(
        f"<tr><th>{escape(one.label)}</th><td>{one.text}</td><td>{one.interval_text}</td><td>{one.count:,}</td>"
        f'<td class="words">{escape(one.meaning)}</td></tr>'
        for one in report.measures
    )
    head = "<tr><th></th><th>value</th><th>95 % interval</th><th>cases</th><th class='words'>what it says</th></tr>"
    return f'<div class="cards">{cards}</div>{_scroll(f"<table><thead>{head}</thead><tbody>{rows}</tbody></table>")}'


def _bar(measure: Measure) -> str:
    if measure.interval is None:
        return '<i class="bar none"></i>'
    low, high = measure.interval
    return (
        f'<i class="bar" title="95 % interval: {measure.interval_text}">'
        f'<i style="left:{100 * low:.1f}%;width:{100 * (high - low):.1f}%"></i>'
        f'<i class="mark" style="left:{100 * measure.value:.1f}%"></i></i>'
    )


def _stages(stages: Mapping[str, Sequence[Record]]) -> str:
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
    table = _scroll(f"<table><thead>{head}</thead><tbody>{rows}</tbody></table>")
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
    table = _scroll(f"<table class='trace'><thead><tr><th>t</th>{columns}</tr></thead><tbody>{rows}</tbody></table>")
    return f"<p>{note}</p><p class='prompt'>{escape(trace.prompt)} …</p>{table}"


def _tokens(tokens: Sequence[str], last: Sequence[str], given: int) -> str:
    spans = ""
    for place, (token, final) in enumerate(zip(tokens, last, strict=True)):
        part = "given" if place < given else "there" if token == final else "not"
        spans += f'<span class="{part}">{escape(token if place else token.lstrip())}</span>'
    return spans


def _settings(settings: Mapping[str, Any]) -> str:
    text = escape(json.dumps(settings, indent=2, ensure_ascii=False))
    return f"<details><summary>model, sampling, evaluation</summary><pre>{text}</pre></details>"


def _scroll(table: str) -> str:
    return f'<div class="scroll">{table}</div>'


_CSS = """
:root{color-scheme:light dark;--page:#fcfcfa;--ink:#1d1f23;--soft:#6b7078;--line:#dfe0dc;--card:#f2f2ee;
--good:#15803d;--bad:#c2333f;--accent:#2f7ed8}
@media(prefers-color-scheme:dark){:root{--page:#15171a;--ink:#e6e6e3;--soft:#969ba3;--line:#33373d;--card:#1e2125;
--good:#4cc27a;--bad:#f07178;--accent:#5b9df0}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:62rem;margin:0 auto;padding:2.5rem 1.25rem 4rem}
h1{font-size:1.9rem;line-height:1.2;margin:0 0 .25rem;letter-spacing:-.015em}
h2{font-size:1.2rem;margin:3rem 0 .75rem;padding-top:1rem;border-top:1px solid var(--line)}
p{max-width:46rem}header p,figcaption,section>p{color:var(--soft);margin:.25rem 0 1rem}
figcaption,small{font-size:.82rem}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(10.5rem,1fr));gap:.75rem;margin-bottom:1.5rem}
.card{display:flex;flex-direction:column;background:var(--card);border-radius:.6rem;padding:.9rem 1rem}
.card b{display:block;font-size:1.75rem;line-height:1.15;font-weight:650;font-variant-numeric:tabular-nums}
.card span{font-size:.85rem;color:var(--soft)}
.card span{margin-bottom:.6rem}
.bar{display:block;position:relative;height:4px;margin-top:auto;border-radius:2px;background:var(--line)}
.bar.none{visibility:hidden}
.bar i{position:absolute;top:0;height:4px;min-width:2px;border-radius:2px;background:var(--accent);opacity:.55}
.bar .mark{width:3px;margin-left:-1.5px;top:-3px;height:10px;opacity:1}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-size:.88rem;width:100%;font-variant-numeric:tabular-nums}
th,td{text-align:right;padding:.35rem .7rem;border-bottom:1px solid var(--line);white-space:nowrap;vertical-align:top}
th:first-child{text-align:left;padding-left:0}td.words,th.words{text-align:left;white-space:normal;min-width:16rem;padding-right:0}
thead th{color:var(--soft);font-weight:500}tbody th{font-weight:600}
figure{margin:0 0 1rem}svg{width:100%;height:auto;max-width:100%}
svg text{font-family:inherit!important}
ol{padding-left:1.6rem;margin:0}li{margin-bottom:.9rem;max-width:52rem}
li em{font-style:normal;margin-left:.35rem;font-size:.85rem;white-space:nowrap}li small{font-style:italic}
.prompt{color:var(--soft)}em.good{color:var(--good)}.bad{color:var(--bad)}
span.bad{text-decoration:underline wavy 1px;text-underline-offset:3px}li small{color:var(--bad);opacity:.8}
.trace{width:auto}.trace td,.trace thead th{text-align:left}.trace td,.trace th{padding:.2rem 1.1rem .2rem 0}
.trace tbody th{font-weight:400;color:var(--soft)}.trace tbody tr:last-child th{color:var(--ink)}
.tokens{font:.8rem/1.4 ui-monospace,Menlo,Consolas,monospace;white-space:pre!important}
.not{color:var(--soft);opacity:.65}.there{font-weight:600}
.given{color:var(--soft);text-decoration:underline;text-underline-offset:3px}
summary{cursor:pointer;color:var(--soft)}
pre{background:var(--card);border-radius:.6rem;padding:1rem;font-size:.8rem;line-height:1.45;overflow-x:auto}
"""
