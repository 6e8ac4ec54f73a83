import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest

from opencola.evaluation.figures import latent_maps, loss_curves
from opencola.evaluation.latents.reconstruction import LatentMap
from opencola.evaluation.latents.traces import Trace
from opencola.evaluation.reporting.demo_page import DemoPage, Measure, render
from opencola.evaluation.writing import held_out, judge

VOID = {"meta", "br", "link", "img", "hr", "input"}
RECORDS = [
    {"step": step, "tokens": 10 * step, "seconds": 1.0 * step, "loss/kl": 0.001 * step, "loss/entropy": step - 2.0}
    for step in (1, 2, 3)
]
TALE = held_out(1)[0]
PROMPT = " ".join(TALE.sentences[:2])
SAMPLES = [
    judge(PROMPT, TALE.text[len(PROMPT) :], ""),
    judge(PROMPT, " The <b>bold</b> & the brave.", ""),
]
MAP = LatentMap("animal", np.array([[0.0, 1.0], [1.0, 0.0], [0.5, 0.5]]), ["dog", "cat", "dog"], 0.5)
REPORT = DemoPage(
    title="A title <1>",
    subtitle="What it is",
    measures=[
        Measure("legal_sentences", 0.75, True, (0.5, 0.9), 1234, "what it means"),
        Measure("vae_logsnr", 4.5, False, None, 99, "signal & noise"),
    ],
    headlines=["legal_sentences"],
    stages={"vae": RECORDS, "prior": RECORDS},
    samples=SAMPLES,
    maps=[MAP],
    trace=Trace("Tom said", [0.5, 0.0], [[["a", " x"], ["a", " dog"]], [["<", "."], [" ran", "."]]], 1),
    settings={"sampling": {"steps": 16, "stop": ["</pre>"]}},
)


class Page(HTMLParser):
    """Reads a page strictly: every element is closed, in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sections: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.words = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        self.sections += [value or "" for name, value in attrs if tag == "section" and name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data


def test_the_page_is_whole_and_needs_nothing_else() -> None:
    text = render(REPORT)
    page = Page(text)
    assert page.sections == ["results", "losses", "samples", "latents", "denoising", "settings"]
    links = [value for _, name, value in page.attributes if name.split(":")[-1] in ("src", "href")]
    assert all(link.startswith("#") for link in links)
    assert "http:" not in text and "https:" not in text and "//" not in text and "@import" not in text
    assert not {"script", "link", "img"} & {tag for tag, _, _ in page.attributes}
    assert len(text) < 100_000


def test_text_is_shown_as_it_is() -> None:
    page = Page(render(REPORT))
    for words in ("A title <1>", "The <b>bold</b> & the brave.", "signal & noise", "</pre>"):
        assert words in page.words
    assert "b" not in {tag for tag, _, value in page.attributes if value == "bold"}


def test_numbers_and_intervals() -> None:
    words = Page(render(REPORT)).words
    assert "75.0 %" in words and "50.0–90.0 %" in words and "1,234" in words and "4.50" in words
    assert words.count("75.0 %") == 2, "on a card, and in the table"


@pytest.mark.parametrize(("value", "text"), [(1.0, "100.0 %"), (0.9987, "99.87 %"), (0.5, "50.0 %"), (0.0, "0.0 %")])
def test_shares_near_one_keep_another_digit(value: float, text: str) -> None:
    assert Measure("x", value, True, None, 1, "").text == text


def test_samples_are_marked_by_sentence() -> None:
    text = render(REPORT)
    good, bad = re.findall(r"<li>.*?</li>", text)
    assert good.count('<span class="prompt">') == bad.count('<span class="prompt">') == 2
    assert "consistent" in good and 'class="bad"' not in good and "<small>" not in good
    assert good.count('<span class="good">') == len(TALE.sentences) - 2
    assert '<span class="bad">The &lt;b&gt;bold' in bad and "<small>illegal</small>" in bad
    assert "✗ 1 illegal sentence" in bad


def test_denoising_marks_what_stays() -> None:
    table = render(REPORT).split('id="denoising"')[1].split("</section>")[0]
    first, last = re.findall(r"<tr><th>0.*?</tr>", table)
    assert first.startswith("<tr><th>0.5</th>")
    assert '<span class="given">a</span><span class="not"> x</span>' in first
    assert '<span class="not">&lt;</span><span class="there">.</span>' in first
    assert '<span class="given">a</span><span class="there"> dog</span>' in last and "not" not in last


def test_a_page_without_training_records_or_maps() -> None:
    page = Page(render(replace(REPORT, stages={}, maps=[])))
    assert len(page.sections) == 6 and "No training records" in page.words and "Too few" in page.words


def test_loss_curves_leave_out_what_a_logarithm_cannot_show() -> None:
    svg = loss_curves({"vae": RECORDS})
    assert "kl" in Page(svg).words and "entropy" not in Page(svg).words
    assert "0.001" in Page(svg).words, "numbers on the axis are not rounded away"
    assert "nan" not in svg.lower()
    missing = [{"step": 4, "tokens": 1, "seconds": 1.0, "loss/kl": None}]
    assert "kl" in Page(loss_curves({"vae": [*RECORDS, *missing]})).words


def test_figures_take_the_pages_colour_and_repeat_exactly() -> None:
    svg = latent_maps([MAP])
    assert "currentColor" in svg and "#010203" not in svg
    assert Page(svg).words.count("dog") == 2, "at the points, and in the legend"
    assert svg == latent_maps([MAP])
