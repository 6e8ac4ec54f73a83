"""Every reference in code and documents leads somewhere: sections and quirks of docs/spec, links, files, modules.

`dead` reads one text and says what in it leads nowhere. It is given every file of the repository, and made-up texts, to
see that it finds anything. A bare section (§3) is a paper's and is not looked up, but for the pages of docs/spec, where
it is one of their own.
"""

import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SPEC = ROOT / "docs" / "spec"
PACKAGE = ROOT / "opencola"
ROOMS = ("opencola", "tests", "experiments", "benchmarks", "examples")
FILES = [
    ROOT / "README.md",
    *(file for room in ROOMS for kind in ("py", "c", "h") for file in (ROOT / room).rglob(f"*.{kind}")),
    *(ROOT / "recipes").rglob("*.yaml"),
    *(ROOT / "docs").rglob("*.md"),
]
DATA = {".bin", ".html", ".json", ".jsonl", ".md", ".safetensors", ".svg", ".txt", ".yaml"}
OUTPUTS = {"README.md", "results.md"}  # a model's card and a report, which commands write

GAP = r"[\s#/*]+"  # between two words, which may stand on two lines of a comment
NUMBER = r"\d+(?:\.\d+)*"
RANGE = rf"§+\s?{NUMBER}(?:[-–]{NUMBER})?"
SECTIONS = re.compile(
    rf"\b(?P<page>model\.md|evaluation\.md|official-format(?:\.md)?)\)?,?{GAP}"
    rf"(?P<list>{RANGE}(?:(?:,|{GAP}and){GAP}(?:{RANGE}|item{GAP}\d+))*)"
)
QUIRK = re.compile(r"\bQ(\d+)\b")
PAGE = re.compile(r"(?<![\w/.*-])(?:[\w.-]+/)*[\w-]+\.md\b")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
ROOTED = re.compile(
    r"(?<![\w/.{-])(?:opencola|tests|experiments|benchmarks|examples|docs|recipes)/[\w/-]+\.(?:py|c|h|md|yaml)\b"
)
TICKED = re.compile(r"`([^`\n]+)`")
RUN = re.compile(rf"(?:^[ \t]*from|^[ \t]*import|-m)\s+((?:{'|'.join(ROOMS)})(?:\.\w+)*)", re.MULTILINE)
HIDDEN = {
    "an issue": re.compile(
        rf"\bissues?{GAP}(?:number\s|no\.?\s)?#?\d|(?<![\w&#/(\"'])#\d+\b|\bthe{GAP}issues?{GAP}(?:on|of)\b"
    ),
    "the prototype": re.compile(r"\bprototype\b", re.IGNORECASE),
    "files beside the repository": re.compile(r"\.\./shared\b"),
}
Found = Iterator[tuple[int, str]]  # place in the text, what is wrong


def dead(path: Path, text: str) -> list[str]:
    """`file:line: what is wrong` of all that a text, standing at a path, cites and a reader cannot find."""
    found = [*sections(path, text), *quirks(path, text), *files(path, text), *hidden(text)]
    if path.suffix == ".md":
        found += [*links(path, text), *commands(text)]
    lines = sorted((text.count("\n", 0, place) + 1, wrong) for place, wrong in found)
    return [f"{path.relative_to(ROOT)}:{line}: {wrong}" for line, wrong in dict.fromkeys(lines)]


def sections(path: Path, text: str) -> Found:
    """Sections of docs/spec, by the page's name; on these pages also without it."""
    for match in SECTIONS.finditer(text):
        page = SPEC / (match["page"].removesuffix(".md") + ".md")
        yield from ((match.start(), wrong) for wrong in missing_sections(page, match["list"]))
    if path.parent == SPEC:
        others = [match.span() for match in SECTIONS.finditer(text)]
        for match in re.finditer(RANGE, text):
            if not any(start <= match.start() < end for start, end in others):
                yield from ((match.start(), wrong) for wrong in missing_sections(path, match[0]))


def missing_sections(page: Path, cited: str) -> Iterator[str]:
    """What a page lacks of `§§1.1-1.2, §4` or `§5, item 4`."""
    if not page.is_file():
        yield f"there is no {page.name}"
        return
    section = ""
    for item, first, last in re.findall(rf"item{GAP}(\d+)|({NUMBER})(?:[-–]({NUMBER}))?", cited):
        section = first or section
        if item and item not in items(page, section):
            yield f"{page.name} §{section} has no item {item}"
        for number in {first, last} - {""} - titles(page).keys():
            yield f"{page.name} has no §{number}"


def quirks(path: Path, text: str) -> Found:
    """(Q7), alone or among other things in parentheses; on the pages of docs/spec anywhere."""
    for chunk in re.finditer(r"(?s).+" if path.parent == SPEC else r"\([^()]*\)", text):
        for match in QUIRK.finditer(text, *chunk.span()):
            if match[1] not in known_quirks():
                yield match.start(), f"official-format.md has no {match[0]}"


def files(path: Path, text: str) -> Found:
    """Documents and paths from the root, wherever they stand; between backticks also modules and short paths."""
    for match in ROOTED.finditer(text):
        if not is_file(match[0]):
            yield match.start(), f"there is no {match[0]}"
    for match in PAGE.finditer(text):
        is_ours = path.suffix == ".md" or "docs/" in match[0] or "spec/" in match[0]
        if is_ours and match[0] not in OUTPUTS and not is_file(match[0]) and not (path.parent / match[0]).exists():
            yield match.start(), f"there is no {match[0]}"
    for match in TICKED.finditer(text):
        if (path.suffix == ".md" or match[1].startswith("opencola.")) and not leads(match[1]):
            yield match.start(), f"there is no {match[1]}"


def links(path: Path, text: str) -> Found:
    """Relative links of Markdown, with their anchors."""
    for match in LINK.finditer(text):
        name, _, anchor = match[1].partition("#")
        if ":" in name:
            continue
        target = path.parent / name if name else path
        if not target.exists():
            yield match.start(), f"there is no {name}"
        elif anchor and target.suffix == ".md" and anchor not in titles(target).values():
            yield match.start(), f"{name or path.name} has no #{anchor}"


def commands(text: str) -> Found:
    """Modules that a document imports or runs."""
    for match in RUN.finditer(text):
        if not is_module(match[1]):
            yield match.start(1), f"there is no {match[1]}"


def hidden(text: str) -> Found:
    """What only those who wrote the text could see."""
    for what, pattern in HIDDEN.items():
        yield from ((match.start(), f"cites {what}") for match in pattern.finditer(text))


@functools.cache
def titles(page: Path) -> dict[str, str]:
    """Number (or, without one, title) of each heading of a Markdown page -> its anchor, as GitHub makes it."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    found: dict[str, str] = {}
    for title in re.findall(r"^#+ +(.+?) *$", text, re.MULTILINE):
        anchor = re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
        number = re.match(rf"({NUMBER})\.? ", title)
        found[number[1] if number else title] = anchor
    return found


def items(page: Path, section: str) -> set[str]:
    """Numbers of the list in a section."""
    _, _, rest = re.sub(rf"(?m)^#+ {re.escape(section)}\.? .*$", "\0", page.read_text(encoding="utf-8")).partition("\0")
    return set(re.findall(r"(?m)^(\d+)\. ", re.split(r"(?m)^#", rest)[0]))


@functools.cache
def known_quirks() -> set[str]:
    """Numbers of the quirks that official-format lists."""
    page = SPEC / "official-format.md"
    return set(re.findall(r"(?m)^- \*\*Q(\d+)\*\*", page.read_text(encoding="utf-8"))) if page.is_file() else set()


@functools.cache
def is_file(name: str) -> bool:
    """Whether a path, from the root, the documents or the package, leads anywhere; a name alone may lie in any room."""
    if any((base / name).exists() for base in (ROOT, ROOT / "docs", SPEC, PACKAGE)):
        return True
    return "/" not in name and any(any((ROOT / room).rglob(name)) for room in ROOMS)


@functools.cache
def is_module(dotted: str) -> bool:
    """Whether a dotted name, from the root or from inside the package, is a module or a name in one."""
    parts = dotted.split(".")
    place = ROOT if parts[0] in ROOMS else PACKAGE
    while parts and (place / parts[0]).is_dir():
        place /= parts.pop(0)
    file = place / "__init__.py"
    if parts and (place / f"{parts[0]}.py").is_file():
        file = place / f"{parts.pop(0)}.py"
    if not parts:
        return True
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    name = re.escape(parts[0])
    return re.search(rf"(?m)^(?:(?:def|class|from .* import|import) (?:.*\b)?)?{name}\b", text) is not None


def leads(ticked: str) -> bool:
    """Whether what stands between backticks leads somewhere, if it is a file or module of ours at all."""
    if re.fullmatch(rf"(?:{'|'.join(ROOMS)}|docs|recipes)/[\w./-]*", ticked):
        return is_file(ticked)
    if re.fullmatch(r"(?:[\w-]+/)*[\w-]+\.(?:py|c|h)", ticked):
        return is_file(ticked)
    dotted = ticked.removesuffix("()")
    if re.fullmatch(r"(?:\w+/)+\w+\.[a-z_]\w+", dotted) and Path(dotted).suffix not in DATA:
        dotted = dotted.replace("/", ".")  # `layers/masks.dense`
    elif Path(dotted).suffix in DATA or not re.fullmatch(r"\w+(?:\.\w+){2,}|opencola\.\w+", dotted):
        return True
    room = dotted.split(".")[0]
    return not (room in ROOMS or (PACKAGE / room / "__init__.py").is_file()) or is_module(dotted)


@pytest.mark.parametrize("room", ["README.md", *ROOMS, "recipes", "docs"])
def test_references_lead_somewhere(room: str) -> None:
    """But for this file, whose made-up texts do not."""
    ours = [file for file in FILES if file.relative_to(ROOT).parts[0] == room and file != Path(__file__).resolve()]
    assert ours
    found = [wrong for file in sorted(ours) for wrong in dead(file, file.read_text(encoding="utf-8"))]
    assert not found, "dead references:\n" + "\n".join(found)


DEAD = [
    ("opencola/x.py", '"""Noise (model.md §19)."""', "model.md has no §19"),
    ("opencola/x.py", '"""Names (official-format §2, §2.7)."""', "official-format.md has no §2.7"),
    ("opencola/x.py", '"""Names (official-format §§1.1-1.9)."""', "official-format.md has no §1.9"),
    ("opencola/x.c", "/* as in model.md\n * §9 */", "model.md has no §9"),
    ("opencola/x.py", "# repainting (model.md §5, item 9)", "model.md §5 has no item 9"),
    ("opencola/x.py", "# pads leak (official-format §5, Q77)", "official-format.md has no Q77"),
    ("opencola/x.py", '"""See `opencola.models.nowhere`."""', "there is no opencola.models.nowhere"),
    ("recipes/x.yaml", "# Expect: docs/nothing.md", "there is no docs/nothing.md"),
    ("tests/x.py", '"""By tests/test_nothing.py."""', "there is no tests/test_nothing.py"),
    ("docs/spec/model.md", "see §1 and §12", "model.md has no §12"),
    ("docs/spec/model.md", "as Q1 and Q0 say", "official-format.md has no Q0"),
    ("docs/page.md", "[more](nothing.md)", "there is no nothing.md"),
    ("docs/page.md", "[more](spec/model.md#nothing)", "spec/model.md has no #nothing"),
    ("docs/scale.md", "[above](#nothing)", "scale.md has no #nothing"),
    ("docs/guide.md", "`layers/nothing.py`", "there is no layers/nothing.py"),
    ("docs/guide.md", "`nothing.c`", "there is no nothing.c"),
    ("docs/guide.md", "`layers/masks.nothing`", "there is no layers/masks.nothing"),
    ("docs/guide.md", "`layers.masks.nothing`", "there is no layers.masks.nothing"),
    ("docs/guide.md", "`recipes/nothing/`", "there is no recipes/nothing/"),
    ("docs/guide.md", "python -m benchmarks.nothing", "there is no benchmarks.nothing"),
    ("docs/guide.md", "    from opencola.nothing import x", "there is no opencola.nothing"),
    ("docs/guide.md", "Left to issue 12", "cites an issue"),
    ("opencola/x.py", "# see #12", "cites an issue"),
    ("docs/guide.md", "the aims of the issue on speed", "cites an issue"),
    ("docs/guide.md", "as the prototype had it", "cites the prototype"),
    ("docs/guide.md", "in ../shared/data", "cites files beside the repository"),
]  # fmt: skip


@pytest.mark.parametrize(("file", "text", "wrong"), DEAD)
def test_dead_references_are_found(file: str, text: str, wrong: str) -> None:
    found = dead(ROOT / file, f"\n{text}\n")
    assert {place.split(": ", 1)[1] for place in found} == {wrong}
    assert all(place.startswith(f"{file}:") and place.split(":")[1] in "23" for place in found)


ALIVE = [
    ("opencola/x.py", '"""Names (official-format §§1.1-1.2, §4.2; model.md §5, item 4), and a slip of theirs (Q7)."""'),
    ("opencola/models/plaid.py", '"""Plaid (arXiv 2305.18619, section 2.3; §9.9)."""'),
    ("opencola/x.py", 'text = "an open issue, at #fff and &#39;"'),
    ("docs/spec/model.md", "see §1, official-format §4.2 and Q3"),
    ("docs/page.md", "[more](spec/model.md#3-block-causal-dit-prior), [out](https://example.org/x.md#y)"),
    (
        "docs/guide.md",
        "`layers/masks.py`, `layers/masks.dense`, `masks.py`, `train.steps`, `model.vae.width`, `docs/spec/`",
    ),
]


@pytest.mark.parametrize(("file", "text"), ALIVE)
def test_living_references_pass(file: str, text: str) -> None:
    assert dead(ROOT / file, text) == []


def test_quirks_are_numbered_in_a_row() -> None:
    assert known_quirks() == {str(number) for number in range(1, 19)}
