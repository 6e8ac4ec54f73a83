import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path

import pytest
from results_files import answers, head, write

from opencola.evaluation.figures import standalone
from opencola.evaluation.reporting.accuracy_figure import accuracies
from opencola.evaluation.reporting.page import page
from opencola.evaluation.reporting.results import read_results
from opencola.evaluation.reporting.results_page import PROMPT_END, render_html, render_markdown
from opencola.evaluation.reporting.summary import Summary, summarise
from opencola.evaluation.statistics import wilson

RIGHT, WRONG = "on a hill", "in the sea"
EVIL = "</pre><script>alert(1)</script><img src=x onerror=y> & “é” $x^2$ --> ]]>"


class Page(HTMLParser):
    """Elements in order, each closed; the words of each kind."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.sections: list[str] = []
        self.words = ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        assert not any(name.startswith("on") for name, _ in attrs)
        if tag == "section":
            self.sections.append(dict(attrs)["id"] or "")
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words += data


def make(folder: Path, models: dict[str, dict[str, Sequence[str]]], asked: int = 3) -> list[Summary]:
    files = []
    for number, (model, said) in enumerate(models.items()):
        lines = [line for task, texts in said.items() for line in answers(task, texts)]
        files.append(write(folder / f"{number}.jsonl", head(dict.fromkeys(said, asked), model=model), *lines))
    return summarise([read_results(file) for file in files])


def test_the_page_of_two_models(tmp_path: Path) -> None:
    said = {"mmlu": [WRONG, RIGHT, RIGHT], "hellaswag": [WRONG, "(B)", WRONG]}
    read = Page(render_html(make(tmp_path, {"one": said, "two": {"mmlu": [RIGHT] * 2}})))
    assert read.sections == ["models", "accuracies", "table-1", "table-2", "examples"]
    assert "two is not finished; records: MMLU 2 of 3." in read.words and "one is not finished" not in read.words
    assert '"steps": 16' in read.words
    assert "66.67 (20.8 to 93.9)" in read.words
    assert "MMLU, record mmlu-1" in read.words, "the first that was right"
    assert "one: “on a hill” ✓ righttwo: “on a hill” ✓ right" in read.words
    assert "MMLU, record mmlu-0" in read.words, "the first that was wrong"
    assert "one: “in the sea” ✗ wrongtwo: “on a hill” ✓ right" in read.words
    assert "HellaSwag, record hellaswag-0" in read.words and "HellaSwag, record hellaswag-1" not in read.words
    assert "mmlu-2" not in read.words


def test_another_form_of_the_right_option_is_told_from_a_wrong_one(tmp_path: Path) -> None:
    read = Page(render_html(make(tmp_path, {"one": {"hellaswag": ["(B)", WRONG]}})))
    assert "one: “(B)” ✗ right option, other form" in read.words


def test_texts_of_models_stay_texts(tmp_path: Path) -> None:
    lines = answers("mmlu", [EVIL, RIGHT])
    for line in lines:
        line |= {"prompt": EVIL, "id": f"{EVIL}{line['index']}", "answer": EVIL}
    run = head({"mmlu": 9}, model=EVIL, model_hash=EVIL, settings={"stop": [EVIL]}, likelihood={"estimator": EVIL})
    both = summarise([read_results(write(tmp_path / "a.jsonl", run, *lines))])
    read = Page(render_html(both))
    assert not read.tags & {"script", "img"} and read.words.count("<script>alert(1)</script>") >= 7
    drawn = ElementTree.fromstring(standalone(accuracies(both)))
    assert EVIL in "".join(drawn.itertext()), "signs of formulas are none"
    said = render_markdown(both, "accuracies.svg")
    assert "<script>" not in said and "<img" not in said and said.count("&lt;script&gt;") >= 3


def test_a_page_escapes_its_title() -> None:
    text = page("</title><script>", "</p><script>", [])
    assert "<script>" not in text and text.count("&lt;script&gt;") == 3


def test_another_question_of_the_same_id_is_no_answer_to_this_one(tmp_path: Path) -> None:
    both = make(tmp_path, {"one": {"mmlu": [RIGHT]}})
    line = answers("mmlu", [WRONG])[0] | {"options": ["a", "b", "c", "d"]}
    file = write(tmp_path / "b.jsonl", head({"mmlu": 1}, model="two"), line)
    words = Page(render_html(summarise([both[0].results, read_results(file)]))).words
    assert "one: “on a hill”" in words and "two: “" not in words


def test_long_prompts_show_their_ends(tmp_path: Path) -> None:
    line = answers("mmlu", [RIGHT])[0] | {"prompt": "start" + "x" * PROMPT_END + "\nAnswer:"}
    both = summarise([read_results(write(tmp_path / "a.jsonl", head({"mmlu": 1}), line))])
    words = Page(render_html(both)).words
    assert "… xxx" in words and "x\nAnswer:" in words and "start" not in words


def test_the_page_of_a_run_without_records(tmp_path: Path) -> None:
    both = make(tmp_path, {"one": {"mmlu": []}})
    read = Page(render_html(both))
    assert read.sections == ["models", "examples"] and "There are no answers." in read.words
    assert "one is not finished; records: MMLU 0 of 3." in read.words
    said = render_markdown(both, "accuracies.svg")
    assert "**one is not finished; records: MMLU 0 of 3.**" in said and "accuracies.svg" not in said
    assert ElementTree.fromstring(standalone(accuracies(both))).tag.endswith("svg")


def test_markdown_has_all_tables(tmp_path: Path) -> None:
    both = make(tmp_path, {"one": {"mmlu": [RIGHT] * 3}, "two": {"mmlu": [RIGHT] * 3}})
    said = render_markdown(both, "accuracies.svg")
    assert re.findall("^#+ .*$", said, re.MULTILINE) == [
        "# Evaluation",
        "## Accuracy",
        "## The same records, two models",
    ]
    assert "- one: family cola, weights ab12, seed 0, " in said and "(accuracies.svg)" in said


@pytest.mark.parametrize("count", [1, 4, 5, 14, 29, 33, 100])
@pytest.mark.parametrize("said", [RIGHT, WRONG])
def test_all_right_and_all_wrong_can_be_drawn(count: int, said: str, tmp_path: Path) -> None:
    """Rounding may put the end of an interval beyond 0 or 1."""
    assert wilson(0, count)[0] == pytest.approx(0)
    assert "<svg" in accuracies(make(tmp_path, {"one": {"lambada": [said] * count}}))


def test_the_drawing_is_to_scale(tmp_path: Path) -> None:
    """Of markers, bars and chance the places on the axis, measured by its ticks."""
    drawing = accuracies(make(tmp_path, {"one": {"mmlu": [RIGHT, WRONG, WRONG, WRONG], "siqa": [RIGHT] * 4}}))
    uses = [(float(x), float(y)) for x, y in re.findall(r'<use href="#[^"]*" x="([\d.]+)" y="([\d.]+)"', drawing)]
    bottom = max(y for _, y in uses)
    ticks = sorted(x for x, y in uses if y == bottom)
    assert len(ticks) == 6, "0, 20, ... 100"

    def place(percent: float) -> float:
        return ticks[0] + (ticks[-1] - ticks[0]) * percent / 100

    low, high = (100 * end for end in wilson(1, 4))
    for percent in (25, low, high, 100, 100 * wilson(4, 4)[0]):
        assert any(abs(x - place(percent)) < 0.1 for x, y in uses if y != bottom), percent
    lines = re.findall(r'd="M ([\d.]+) [\d.]+ \s*L ([\d.]+) [\d.]+ \s*"[^>]*stroke-dasharray', drawing)
    starts = {round(float(x), 1) for x, end in lines if x == end}
    for chance in (25, 100 / 3):
        assert any(abs(x - place(chance)) < 0.2 for x in starts), chance
