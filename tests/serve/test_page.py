"""The server's page as a file: it loads nothing, everything has a name, and its colours can be read."""

import re
from html.parser import HTMLParser
from itertools import product

from stub_server import PAGE

TEXT = PAGE.read_text(encoding="utf-8")
STYLE, SCRIPT = (re.search(f"<{tag}>(.*?)</{tag}>", TEXT, re.DOTALL)[1] for tag in ("style", "script"))


class Elements(HTMLParser):
    """All start tags with their attributes, and the text inside buttons."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.said: list[str] = []  # by the newest element
        self.feed(TEXT)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        self.said.append("")

    def handle_data(self, data: str) -> None:
        if self.said:
            self.said[-1] += data.strip()


def test_it_loads_nothing_and_is_small() -> None:
    assert len(TEXT.encode()) < 60_000
    assert "://" not in TEXT
    assert not re.search(r"@import|url\(|\bimport\b", STYLE + SCRIPT)
    links = [attrs[name] for _, attrs in Elements().found for name in ("src", "href", "action") if name in attrs]
    assert all(link.startswith("data:") for link in links)
    policy = next(attrs["content"] for tag, attrs in Elements().found if attrs.get("http-equiv"))
    assert "default-src 'none'" in policy and "connect-src 'self'" in policy


def test_what_comes_from_the_server_is_never_read_as_markup() -> None:
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function|DOMParser", SCRIPT
    )
    attributes = [name for _, attrs in Elements().found for name in attrs]
    assert not [name for name in attributes if name.startswith("on") or name == "style"]


def test_ids_and_labels() -> None:
    elements = Elements()
    ids = [attrs["id"] for _, attrs in elements.found if "id" in attrs]
    assert len(ids) == len(set(ids))
    labelled = {attrs["for"] for tag, attrs in elements.found if tag == "label"}
    fields = {attrs["id"] for tag, attrs in elements.found if tag in ("input", "select", "textarea")}
    assert labelled == fields
    for name in ("aria-describedby", "aria-labelledby"):
        assert {attrs[name] for _, attrs in elements.found if name in attrs} <= set(ids)
    buttons = [
        said or attrs.get("aria-label")
        for (tag, attrs), said in zip(elements.found, elements.said, strict=True)
        if tag == "button"
    ]
    assert all(buttons) and len(set(buttons)) == len(buttons)
    assert set(re.findall(r'\$\("([\w-]+)"\)', SCRIPT)) <= set(ids)


def luminance(colour: str) -> float:
    """Relative luminance of WCAG 2."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_colours_can_be_read_in_both_schemes() -> None:
    assert contrast("#000000", "#ffffff") == 21
    schemes = [dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", part)) for part in STYLE.split("@media (prefers-color")]
    light, dark = schemes[0], {**schemes[0], **schemes[1]}
    assert luminance(light["paper"]) > 0.8 and luminance(dark["paper"]) < 0.02
    for scheme in (light, dark):
        for ink, ground in product(("ink", "soft", "accent"), ("paper", "raised", "wash")):
            assert contrast(scheme[ink], scheme[ground]) >= 4.5, (ink, ground)
        for ground in ("paper", "raised"):
            assert contrast(scheme["edge"], scheme[ground]) >= 3, ground
        assert contrast(scheme["on-accent"], scheme["accent"]) >= 4.5
