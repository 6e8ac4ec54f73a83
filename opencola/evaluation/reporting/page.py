"""HTML pages that need nothing but themselves, on light and dark screens."""

import json
from collections.abc import Sequence
from html import escape
from typing import Any


def page(title: str, subtitle: str, sections: Sequence[tuple[str, str, str]]) -> str:
    """A page with sections of an id, a heading, and what is in them; these two are HTML already."""
    body = "".join(f'<section id="{name}"><h2>{heading}</h2>{inner}</section>' for name, heading, inner in sections)
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{CSS}</style></head><body><main>"
        f"<header><h1>{escape(title)}</h1><p>{escape(subtitle)}</p></header>{body}"
        "</main></body></html>\n"
    )


def details(summary: str, values: Any) -> str:
    """Plain JSON values that unfold under a line of text."""
    text = escape(json.dumps(values, indent=2, ensure_ascii=False))
    return f"<details><summary>{escape(summary)}</summary><pre>{text}</pre></details>"


def scroll(table: str) -> str:
    """A table that scrolls by itself where the screen is narrow."""
    return f'<div class="scroll">{table}</div>'


CSS = """
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
.scroll+p{font-size:.82rem}.groups th{text-align:center;color:var(--ink);border-bottom:none}
.warning{color:var(--bad)}pre.text{white-space:pre-wrap;margin:.4rem 0}h3{font-size:1rem;margin:1.5rem 0 .25rem}
"""
